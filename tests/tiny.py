"""A dataset and a network so small that a training takes seconds, and what makes two trainings the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import synth
import torch
from small_networks import SIZES

from continuation import audio, checkpoint

RATE, CHANNELS, CHUNK = 8000, 1, 24000  # rows of 3 s
SONG_ROWS = {"train": (4, 3, 3), "val": (5, 2), "test": (2,)}
NETWORK = " ".join(f"--{name} {' '.join(map(str, np.atleast_1d(size)))}" for name, size in SIZES.items())
SCHEDULE = "--batch_size 2 --stage1_steps 3 --stage2_steps 6 --joint_share 0.34 --latent_variants 2 --device cpu"
TINY = f"--preset tiny {NETWORK} {SCHEDULE}"  # stage 2: four steps of 2a, two of 2b
LEGACY = "--preset legacy --batch_size 1 --accumulate 1 --stage1_steps 1 --stage2_steps 1 --device cpu"


def write_dataset(folder: Path, first_seed: int = 0) -> Path:
    """A dataset as create_dataset.py writes it, of synthetic songs."""
    folder.mkdir()
    songs = []
    for split, song_rows in SONG_ROWS.items():
        rows, pairs, first = [], [], 0
        for number, count in enumerate(song_rows):
            x = synth.song(first_seed + len(songs), count * CHUNK / RATE, RATE, CHANNELS)
            rows.append(audio.to_int16(x).reshape(CHANNELS, count, CHUNK).transpose(1, 0, 2))
            name = f"{split}{number}"
            songs.append({"id": name, "source": f"{name}.mp3", "split": split, "group": name})
            songs[-1] |= {"first_row": first, "rows": count}
            pairs += [(row, row + 1) for row in range(first, first + count - 1)]
            first += count
        np.save(folder / f"{split}.npy", np.concatenate(rows))
        np.save(folder / f"{split}_pairs.npy", np.array(pairs, np.int64))
    meta = {"format": 1, "kind": "dataset", "sample_rate": RATE, "channels": CHANNELS, "chunk_samples": CHUNK}
    meta |= {"dtype": "int16", "settings": {"first_seed": first_seed}, "songs": songs}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def assert_same_tensors(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_same_network(first: Path, second: Path) -> None:
    """Two checkpoint files hold bit-identical weights, averages and optimiser states, at the same point."""
    one, other = checkpoint.load(first), checkpoint.load(second)
    assert [one[key] for key in ("stage", "step", "sampler")] == [other[key] for key in ("stage", "step", "sampler")]
    assert_same_tensors(one["weights"], other["weights"])
    assert_same_tensors(one["ema"], other["ema"])
    assert_same_tensors(flat(one["optimiser"]["state"]), flat(other["optimiser"]["state"]))
    assert one["early_stop"] == other["early_stop"]


def flat(states: dict) -> dict:
    values = {(number, name): value for number, state in states.items() for name, value in state.items()}
    return {key: torch.as_tensor(value) for key, value in values.items()}


class NotStopped:
    requested = False


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def snapshot(module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def moved(module, before: list[torch.Tensor]) -> bool:
    return any(not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
