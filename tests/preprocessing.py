"""Runs of preprocess.py on synthetic songs, and what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import synth

import preprocess
from continuation import song_workers

RATE = 8000
SETTINGS = song_workers.Settings(sample_rate=RATE, channels=2, chunk_seconds=1.0, clip_seconds=None)
SMALL = ("--sample_rate", str(RATE), "--chunk_seconds", "1", "--workers", "1")


def command(folder: Path, out: Path, *arguments: str) -> list[str]:
    script = str(Path(preprocess.__file__))
    return [
        *(sys.executable, script, "--input_folder", str(folder), "--output_folder", str(out)),
        *SMALL,
        *arguments,
    ]


def preprocess_cli(folder: Path, out: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(folder, out, *arguments), capture_output=True, text=True, **options)


def preprocess_here(folder: Path, out: Path, *arguments: str) -> int:
    """In this process, and without worker processes; see `no_workers`."""
    return preprocess.main(preprocess.parse_args(command(folder, out, *arguments)[2:]))


def manifest(out: Path, name: str = "manifest.jsonl") -> dict[str, dict]:
    lines = [json.loads(line) for line in (out / name).read_text().splitlines()]
    return {line["source"]: line for line in lines}


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".npy", ".jsonl")}


def make_songs(folder: Path, count: int, seconds: float = 2.5) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        synth.write(folder / f"song {number}.wav", synth.song(number, seconds, RATE), RATE)
    return folder


def process(path: Path, settings: song_workers.Settings = SETTINGS) -> dict:
    return song_workers.process_song(song_workers.Song(path.name, str(path), path.with_suffix(".npy")), settings)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
