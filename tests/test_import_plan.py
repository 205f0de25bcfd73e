"""Scripts import the package, never the reverse, and what is slow to load only where it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SCRIPTS = ("preprocess", "create_dataset", "train", "generate", "evaluate", "model")
SLOW = {"librosa", "matplotlib"}  # they take seconds, and many commands need neither


def imports(path: Path) -> set[str]:
    """Top names of everything that a file imports, at its top or inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def python(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_root_holds_the_scripts_and_nothing_else():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("path", sorted((ROOT / "continuation").rglob("*.py")), ids=lambda path: path.stem)
def test_package_imports_no_script(path: Path):
    assert not imports(path) & set(SCRIPTS)


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_no_script_imports_a_script(path: Path):
    scripts = {*SCRIPTS} | {other.stem for other in path.parent.glob("*.py")}
    assert not imports(path) & scripts


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS[:-1])
def test_help_loads_no_slow_library(name: str):
    code = (
        f"import sys, contextlib, io, {name}\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    {name}.parse_args(['--help'])\n"
        "print(*sys.modules)"
    )
    assert not SLOW & set(python("-c", code).split())
