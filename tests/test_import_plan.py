"""The plan of the house: scripts above, modules below, and what is slow to load only where it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each file may import of the project.
SCRIPTS = {
    "preprocess": {"arguments", "audio", "containers", "data", "files", "plots"},
    "create_dataset": {"arguments", "audio", "data", "files", "plots"},
    "train": {
        "arguments",
        "model",
        "losses",
        "muon",
        "data",
        "memory",
        "checkpoint",
        "validation",
        "ranks",
        "repetition",
        "audio",
        "files",
        "plots",
    },
    "generate": {"arguments", "model", "checkpoint", "audio", "plots"},
    "evaluate": {
        "arguments",
        "baselines",
        "embedding",
        "gates",
        "listen",
        "scorecard",
        "model",
        "losses",
        "checkpoint",
        "data",
        "metrics",
        "audio",
        "files",
        "plots",
    },
}
MODULES = {
    "arguments": set(),
    "model": {"layers", "mixer", "repetition"},
    "layers": set(),
    "mixer": {"layers", "repetition"},
    "repetition": set(),
    "losses": {"layers", "repetition"},
    "ranks": {"arguments"},
    "muon": set(),
    "data": {"audio"},
    "files": {"arguments"},
    "memory": {"model", "losses", "muon", "data", "ranks", "repetition"},
    "validation": {"data", "losses", "metrics"},
    "checkpoint": {"arguments", "files", "model"},
    "audio": {"containers", "files"},
    "containers": set(),
    "baselines": {"layers", "metrics", "mixer", "model", "repetition"},
    "listen": {"arguments"},
    "embedding": set(),
    "gates": {"metrics"},
    "scorecard": {"arguments"},
    "metrics": set(),
    "plots": {"arguments", "files"},
}
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


def third_party(name: str) -> set[str]:
    return imports(ROOT / f"{name}.py") - set(sys.stdlib_module_names) - SCRIPTS.keys() - MODULES.keys()


def python(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.parametrize(("name", "allowed"), (SCRIPTS | MODULES).items())
def test_file_imports_of_the_project_only_what_the_plan_allows(name: str, allowed: set[str]):
    project = SCRIPTS.keys() | MODULES.keys()
    assert imports(ROOT / f"{name}.py") & project <= allowed


def test_every_python_file_is_in_the_plan():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS.keys() | MODULES.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_no_script_imports_a_script(path: Path):
    scripts = SCRIPTS.keys() | {other.stem for other in path.parent.glob("*.py")}
    assert not imports(path) & scripts


@pytest.mark.parametrize("name", ["model", "layers", "mixer", "repetition", "losses", "muon"])
def test_network_needs_torch_and_nothing_else(name: str):
    assert third_party(name) == {"torch"}


@pytest.mark.parametrize("name", ["preprocess", "audio", "metrics", "plots"])
def test_file_works_without_torch(name: str):
    assert "torch" not in imports(ROOT / f"{name}.py")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_loads_no_slow_library(name: str):
    code = (
        f"import sys, contextlib, io, {name}\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    {name}.parse_args(['--help'])\n"
        "print(*sys.modules)"
    )
    assert not SLOW & set(python("-c", code).split())
