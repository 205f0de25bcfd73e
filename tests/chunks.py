"""Folders of chunks as preprocess.py leaves them, and what create_dataset.py makes of them."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import numpy as np

import create_dataset
from continuation.dataset import Split, open_dataset
from continuation.fingerprint import FINGERPRINT_BANDS

RATE, CHANNELS, SAMPLES = 1000, 2, 500


def random_fingerprint(seed: int, error_share: float = 0.0, frames: int = 160) -> str:
    """Random signs, some of them turned over: what a copy's fingerprint looks like."""
    bits = np.random.default_rng(seed).choice([-1, 1], (frames, FINGERPRINT_BANDS))
    wrong = np.random.default_rng(1000 + seed).random(bits.shape) < error_share
    bits = np.where(wrong, -bits, bits).astype(np.int8)
    return base64.b64encode(zlib.compress(bits.tobytes())).decode()


class Chunks:
    """A folder as preprocess.py leaves it behind."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.folder.mkdir(parents=True)
        self.lines: list[dict] = []
        meta = {"format": 1, "kind": "chunks", "sample_rate": RATE, "channels": CHANNELS}
        meta |= {"chunk_samples": SAMPLES, "dtype": "int16", "settings": {"chunk_seconds": 0.5}}
        (folder / "meta.json").write_text(json.dumps(meta))

    def add(self, name: str, rows: int = 4, quiet_rows: tuple[int, ...] = (), **line) -> None:
        rng = np.random.default_rng(list(name.encode()))
        chunks = rng.integers(-9000, 9000, (rows, CHANNELS, SAMPLES), dtype=np.int16)
        chunks[list(quiet_rows)] //= 9000
        np.save(self.folder / f"{name}.npy", chunks)
        fixed = {"id": name, "source": f"{name}.mp3", "sha256": name, "status": "ok", "reason": ""}
        fixed |= {"seconds": rows / 2, "chunks": rows, "peak": 0.3, "rms": 0.1, "silent_share": 0.0}
        self.lines.append(fixed | {"fingerprint": ""} | line)

    def add_many(self, first: int, last: int) -> None:
        for number in range(first, last):
            self.add(f"song{number:03}", rows=2 + number % 4)

    def write(self, shards: int = 0) -> None:
        self.lines.append({"id": "bad", "source": "bad.mp3", "status": "rejected", "reason": "no audio"})
        for index in range(shards or 1):
            name = f"manifest.{index}-of-{shards}.jsonl" if shards else "manifest.jsonl"
            lines = self.lines[index :: shards or 1]
            (self.folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.lines.pop()

    def array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy")


def run(chunks: Chunks, name: str = "ds", *flags: str) -> tuple[int, Path]:
    folder = chunks.folder.parent / name
    arguments = ["--output_folder", str(chunks.folder), "--dataset_folder", str(folder), *flags]
    return create_dataset.main(create_dataset.parse_args(arguments)), folder


def made(chunks: Chunks, name: str = "ds", *flags: str) -> tuple[dict, dict[str, Split]]:
    code, folder = run(chunks, name, *flags)
    assert code == 0
    return open_dataset(folder)


def refusal(chunks: Chunks, capsys, *flags: str, code: int = 2) -> str:
    """The sentence that says why there is no dataset."""
    capsys.readouterr()
    assert run(chunks, "ds", *flags)[0] == code
    assert not (chunks.folder.parent / "ds" / "meta.json").exists()
    return capsys.readouterr().err.splitlines()[-1]


def split_by_id(meta: dict) -> dict[str, str]:
    return {song["id"]: song["split"] for song in meta["songs"]}
