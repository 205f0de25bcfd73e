"""The network of the tests of generate.py, and how what it wrote is read."""

from pathlib import Path

import soundfile

import generate

PROJECT = Path(generate.__file__).parent
RATE = 12000
FORMAT = {"sample_rate": RATE, "chunk_samples": 10 * RATE}  # of the network
SONG_SECONDS = 24.5


def read(path, expected_rate=RATE):
    x, rate = soundfile.read(path, dtype="float32", always_2d=True)
    assert rate == expected_rate
    return x.T
