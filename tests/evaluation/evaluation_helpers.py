"""A dataset so small that an evaluation takes seconds, and how evaluate.py is called on it."""

import json
from pathlib import Path

import numpy as np
import synth

import evaluate
from continuation import audio

PROJECT = Path(evaluate.__file__).parent
RATE, CHUNK_SECONDS = 4000, 10
CHUNK = CHUNK_SECONDS * RATE
SONG_ROWS = (6, 2)  # the last song is too short for a passage elsewhere
FORMAT = {"sample_rate": RATE, "chunk_samples": CHUNK}  # of the networks


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


def arguments(dataset, checkpoints, output, *flags):
    line = ["--dataset_folder", dataset, "--checkpoint_folder", *checkpoints, "--output_folder", output]
    return evaluate.parse_args(
        [str(flag) for flag in (*line, "--steps", 2, "--guidance", 2, "--pairs_per_song", 2, *flags)]
    )


def read_card(folder: Path) -> dict:
    return json.loads((folder / "scorecard.json").read_text())
