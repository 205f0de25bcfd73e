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


@pytest.fixture(scope="session")
def slurm() -> Iterator[PrivateSlurm]:
    """A cluster of this test run's own. Without Slurm its tests are skipped, and fail where REQUIRE_SLURM is set."""
    cluster = PrivateSlurm()
    try:
        if not cluster.is_installed():
            (pytest.fail if os.environ.get("REQUIRE_SLURM") else pytest.skip)("skipped: no Slurm")
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
