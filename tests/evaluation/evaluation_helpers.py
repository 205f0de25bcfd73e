"""A dataset and networks so small that an evaluation takes seconds, and how evaluate.py is called on them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import synth
import torch

import evaluate
from continuation import audio, checkpoint
from model import PRESETS, make_model

PROJECT = Path(evaluate.__file__).parent
RATE, CHUNK_SECONDS = 4000, 10
CHUNK = CHUNK_SECONDS * RATE
SONG_ROWS = (6, 2)  # the last song is too short for a passage elsewhere
SMALL = dataclasses.replace(
    PRESETS["tiny"], sample_rate=RATE, chunk_samples=CHUNK, encoder_widths=(8, 8), encoder_blocks=(1, 1),
    decoder_widths=(8, 8), decoder_blocks=(1, 1), latent_channels=4, core_layers=1, core_width=16, core_heads=2,
)  # fmt: skip
MSE = dataclasses.replace(SMALL, objective="mse")
LEGACY = dataclasses.replace(PRESETS["legacy"], sample_rate=RATE, chunk_samples=CHUNK)


def write_dataset(folder: Path, song_rows=SONG_ROWS) -> Path:
    """A dataset whose test side has these songs; train and val have a short one each."""
    folder.mkdir(parents=True)
    songs = []
    for split, rows in {"train": (2,), "val": (2,), "test": song_rows}.items():
        sounds, pairs, first_row = [], [], 0
        for number, count in enumerate(rows):
            x = audio.to_int16(0.3 * synth.song(number, count * CHUNK_SECONDS, RATE))
            sounds.append(x.reshape(2, count, CHUNK).transpose(1, 0, 2))
            name = f"{split}-{number}"
            songs.append({"id": name, "source": f"{name}.mp3", "split": split, "group": name})
            songs[-1] |= {"first_row": first_row, "rows": count}
            pairs += [(row, row + 1) for row in range(first_row, first_row + count - 1)]
            first_row += count
        np.save(folder / f"{split}.npy", np.concatenate(sounds))
        np.save(folder / f"{split}_pairs.npy", np.array(pairs, np.int64))
    meta = {"format": 1, "kind": "dataset", "sample_rate": RATE, "channels": 2, "chunk_samples": CHUNK}
    (folder / "meta.json").write_text(json.dumps({**meta, "dtype": "int16", "settings": {}, "songs": songs}))
    return folder


def write_checkpoint(folder: Path, config=SMALL, stage=2, trained_on=()) -> Path:
    """A network whose core says something, so that contexts and seeds matter."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = make_model(config)
    if not config.is_legacy:
        for layer in (model.core.head.to_velocity, model.core.to_levels):
            torch.nn.init.normal_(layer.weight, std=0.1)
    songs = [{"id": name, "split": "train"} for name in trained_on]
    state = {"config": dataclasses.asdict(config), "ema": model.state_dict(), "stage": stage, "step": 5}
    checkpoint.save(folder / "best.pt", {**state, "data_meta": {"songs": songs}})
    return folder


def arguments(dataset, checkpoints, output, *flags):
    line = ["--dataset_folder", dataset, "--checkpoint_folder", *checkpoints, "--output_folder", output]
    return evaluate.parse_args(
        [str(flag) for flag in (*line, "--steps", 2, "--guidance", 2, "--pairs_per_song", 2, *flags)]
    )


def read_card(folder: Path) -> dict:
    return json.loads((folder / "scorecard.json").read_text())
