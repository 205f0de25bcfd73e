"""Fixtures that more than one test file uses. The sounds themselves are in synth.py."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def needs_ffmpeg() -> None:
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not on PATH")
