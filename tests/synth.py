"""Sound with a known answer, made with numpy: float32 (channels, samples), full scale 1; ffmpeg is for odd files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np


def tone(frequency: float, seconds: float, sample_rate: int, channels: int = 1, level: float = 0.5) -> np.ndarray:
    """A sine of the given peak level, the same in every channel."""
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    wave = level * np.sin(2 * np.pi * frequency * time)
    return np.tile(wave.astype(np.float32), (channels, 1))


def noise(seed: int, seconds: float, sample_rate: int, channels: int = 1, level: float = 0.1) -> np.ndarray:
    """White noise of the given RMS level, independent in every channel."""
    samples = round(seconds * sample_rate)
    return (level * np.random.default_rng(seed).standard_normal((channels, samples))).astype(np.float32)


def song(seed: int, seconds: float, sample_rate: int, channels: int = 2) -> np.ndarray:
    """Drums on the beat over a chord that changes every bar; tempo, key and panning come from the seed."""
    rng = np.random.default_rng(seed)
    samples = round(seconds * sample_rate)
    time = np.arange(samples) / sample_rate
    beat_seconds = 60 / rng.uniform(80, 160)
    beat, since_beat = np.divmod(time, beat_seconds)
    root = 110 * 2 ** (rng.integers(0, 12) / 12)
    steps = rng.choice([0, 3, 5, 7, 8, 10], size=4)[(beat.astype(int) // 4) % 4]  # semitones, by bar
    chord = np.zeros(samples)
    for interval in (0, rng.choice([3, 4]), 7):
        phase = 2 * np.pi * np.cumsum(root * 2 ** ((steps + interval) / 12)) / sample_rate
        chord += 0.1 * np.sin(phase) + 0.04 * np.sin(2 * phase) + 0.02 * np.sin(5 * phase)
    kick = 0.4 * np.sin(2 * np.pi * 55 * since_beat) * np.exp(-since_beat * 20)
    since_half = np.mod(time + beat_seconds / 2, beat_seconds)
    hat = 0.1 * rng.standard_normal(samples) * np.exp(-since_half * 60)
    pans = rng.uniform(0.6, 1.0, size=(channels, 1))
    return (pans * chord + kick + pans[::-1] * hat).astype(np.float32)


def write(path: str | Path, x: np.ndarray, sample_rate: int, **options) -> Path:
    """Write (channels, samples) with soundfile (`options` are its own) and return the path."""
    import soundfile

    soundfile.write(path, x.T, sample_rate, **options)
    return Path(path)


def encode(path: str | Path, x: np.ndarray, sample_rate: int, *arguments: str) -> Path:
    """Write (channels, samples) with ffmpeg, whose output arguments these are, and return the path."""
    command = ["ffmpeg", "-v", "error", "-y", "-f", "f32le", "-ar", str(sample_rate), "-ac", str(len(x))]
    command += ["-i", "-", *arguments, os.fspath(path)]
    subprocess.run(command, input=np.ascontiguousarray(x.T, "<f4").tobytes(), check=True)
    return Path(path)


def decode(path: str | Path, sample_rate: int, channels: int) -> np.ndarray:
    """What ffmpeg reads from a file of this rate: float32 (channels, samples)."""
    command = ["ffmpeg", "-nostdin", "-v", "fatal", "-i", os.fspath(path), "-map", "0:a:0", "-ar", str(sample_rate)]
    command += ["-ac", str(channels), "-f", "f32le", "-"]
    data = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return np.frombuffer(data, "<f4").reshape(-1, channels).T


def convert(source: str | Path, *arguments: str | Path) -> None:
    """Let ffmpeg read a file; its output arguments are these."""
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-i", source, *arguments], check=True)


def mp3_bytes(path: Path, seconds: float = 10.0, rate: int = 44100, **options) -> bytes:
    """Write a song as mp3 and return the file's bytes."""
    options = {"bitrate_mode": "CONSTANT", "compression_level": 0.5} | options
    return write(path, song(1, seconds, rate), rate, **options).read_bytes()
