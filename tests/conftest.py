"""Fixtures that more than one test file uses. The sounds themselves are in synth.py."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from private_slurm import PrivateSlurm


@pytest.fixture
def needs_ffmpeg() -> None:
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not on PATH")


def skip_without(program: str) -> None:
    """Skip the test, or fail it where the environment has REQUIRE_ and the program's name."""
    (pytest.fail if os.environ.get(f"REQUIRE_{program.upper()}") else pytest.skip)(f"skipped: no {program}")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a browser of Chromium's kin."""
    return shutil.which("chromium") or shutil.which("google-chrome") or skip_without("Chromium")


@pytest.fixture(scope="session")
def slurm() -> Iterator[PrivateSlurm]:
    """A cluster of this test run's own."""
    cluster = PrivateSlurm()
    try:
        if not cluster.is_installed():
            skip_without("Slurm")
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
