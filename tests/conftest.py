"""Fixtures that more than one test file uses. The sounds themselves are in synth.py."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fake_windows
import numpy as np
import pytest
import synth
import torch
from chunks import Chunks
from private_slurm import PrivateSlurm
from small_networks import RATE, small_context, small_network

import preprocess
from continuation import audio, song_workers
from continuation.context import Context
from continuation.windows import Windows
from model import ContinuationModel

SLOW_FIXTURES = {"slurm", "chromium", "scores"}  # a cluster, a browser, a whole evaluation


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses a slow fixture: `scripts/test.sh --fast` leaves it out."""
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


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


@pytest.fixture
def no_workers(monkeypatch) -> list[str]:
    """Let the songs be done in this process, which saves a second a run. Returns the sources done."""
    done = []

    def run_workers(songs, settings, count, stop):
        for song in songs:
            done.append(song.source)
            yield song, song_workers.process_song(song, settings)

    monkeypatch.setattr(preprocess, "run_workers", run_workers)
    return done


@pytest.fixture
def chunks(tmp_path: Path) -> Chunks:
    chunks = Chunks(tmp_path / "out")
    chunks.add_many(0, 12)
    chunks.write()
    return chunks


@pytest.fixture(scope="module")
def model() -> ContinuationModel:
    """Return the small network, whose random weights depend on the context."""
    return small_network()


@pytest.fixture(scope="module")
def song() -> torch.Tensor:
    """Return 5 s of synthetic music at the small network's rate: (channels, samples)."""
    return torch.from_numpy(synth.song(0, 5, RATE))


@pytest.fixture(scope="module")
def context() -> Context:
    return small_context()


@pytest.fixture
def counting(monkeypatch) -> Windows:
    """Windows whose samples are their own numbers: left counts up from 0, right down. Levels are left alone."""
    monkeypatch.setattr("continuation.windows.rms_gain", lambda context: 32768.0)
    left = np.arange(sum(fake_windows.SONG_ROWS) * fake_windows.CHUNK, dtype=np.int16).reshape(
        -1, 1, fake_windows.CHUNK
    )
    return fake_windows.windows_of(np.concatenate([left, -left], axis=1))


@pytest.fixture
def noisy() -> Windows:
    x = synth.noise(
        0, sum(fake_windows.SONG_ROWS) * fake_windows.CHUNK / fake_windows.RATE, fake_windows.RATE, channels=2
    )
    return fake_windows.windows_of(audio.to_int16(x).reshape(2, -1, fake_windows.CHUNK).transpose(1, 0, 2))
