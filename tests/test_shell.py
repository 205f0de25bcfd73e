"""The shell scripts work in the project's folder whatever the shell that calls them has exported."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
SCRIPTS = ("scripts/demo.sh", "scripts/setup.sh", "scripts/test.sh", "scripts/make_corpus.sh", ".ci/run")
PROGRAMS = ("apt-get", "dpkg", "ffmpeg", "slurmctld", "chromium", "sudo")  # found, so that nothing is installed
FOLDERS = ("my songs", "corpus")


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def write_project(folder: Path, log: Path, script: str) -> None:
    """A project whose programs and other scripts log where they are called, and with what."""
    logs = f'echo "$PWD $*" >>{log}'
    for name in SCRIPTS:
        write_program(folder / name, logs)
    for name in ("python", "ruff"):
        write_program(folder / ".venv" / "bin" / name, logs)
    for name in ("requirements.txt", "requirements-dev.txt", "constraints.txt"):
        (folder / name).touch()
    for name in FOLDERS:
        (folder / name).mkdir()
    (folder / "corpus" / ".nexuiz-music.done").touch()
    shutil.copy(PROJECT / script, folder / script)


@pytest.mark.parametrize(
    "words",
    [["scripts/demo.sh", "my songs"], ["scripts/setup.sh"], ["scripts/test.sh"], ["scripts/make_corpus.sh", "corpus"],
     [".ci/run"]],
    ids=SCRIPTS,
)  # fmt: skip
def test_exported_cdpath_leads_no_script_elsewhere(tmp_path, words):
    project, other, log = tmp_path / "project", tmp_path / "other", tmp_path / "log"
    for folder in (project, other):
        folder.mkdir()
        write_project(folder, log, words[0])
    for name in PROGRAMS:
        write_program(tmp_path / "bin" / name, "")
    environment = os.environ | {"CDPATH": str(other), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", *words], cwd=project, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    told = done.stdout + (log.read_text() if log.exists() else "")
    assert str(project) in told
    assert str(other) not in told
    if words[0] == "scripts/demo.sh":
        assert f"--input_folder {project / 'my songs'} " in told
    if words[0] == "scripts/make_corpus.sh":
        assert f"songs in {project / 'corpus'}: 0\n" in told


@pytest.mark.parametrize(
    ("words", "given"),
    [([], ""), (["-k", "audio"], " -k audio"), (["--fast"], " -m not slow"), (["--fast", "-x"], " -m not slow -x")],
)
def test_fast_tests_are_those_that_are_not_marked_slow(tmp_path, words, given):
    log = tmp_path / "log"
    write_project(tmp_path, log, "scripts/test.sh")
    subprocess.run(["bash", "scripts/test.sh", *words], cwd=tmp_path, check=True, timeout=60)
    assert log.read_text().splitlines()[-1] == f"{tmp_path} -m pytest -q -rs{given}"
