"""Signals for the tests of the measures: noise, sines and clicks at 12 kHz, stereo."""

import numpy as np

from continuation.metrics import Sound

RATE = 12000
SAMPLES = 4 * RATE


def noise(seed: int, samples: int = SAMPLES, level: float = 0.1) -> np.ndarray:
    return (level * np.random.default_rng(seed).standard_normal((2, samples))).astype(np.float32)


def sine(frequency: float, samples: int = SAMPLES, level: float = 0.5) -> np.ndarray:
    wave = level * np.sin(2 * np.pi * frequency * np.arange(samples) / RATE)
    return np.stack([wave, wave]).astype(np.float32)


def clicks(times: list[float], samples: int = SAMPLES) -> np.ndarray:
    x = 1e-4 * noise(9, samples)
    burst = np.hanning(400)[None, 200:] * noise(8, 200, level=0.5)
    for time in times:
        start = round(time * RATE)
        x[:, start : start + 200] += burst
    return x


SILENCE = np.zeros((2, SAMPLES), dtype=np.float32)


def sound(x: np.ndarray) -> Sound:
    return Sound(x, RATE)
