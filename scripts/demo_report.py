"""What scripts/demo.sh and slurm/submit_all.sh read out of the files that the project's scripts leave behind.

    python scripts/demo_report.py song demo/synthetic/dataset
    python scripts/demo_report.py figures demo/synthetic/checkpoints

`song` prints the longest song of the test side, relative to the folder of songs, byte for byte. `figures` prints
three measures on validation songs beside their values before training; the exit code is 1 when one of them is
worse than that, or missing.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    key: str  # in the evaluation lines of metrics.jsonl
    label: str
    hint: str
    badness: Callable[[float], float]


FIGURES = (
    Figure("val_mr_stft", "multi-resolution STFT distance", "lower is better", lambda distance: distance),
    # an untrained core repeats its context and has a large gain; what is learned needs the context less, but still
    Figure("val_context_gain", "context gain", "above 0 is right", lambda gain: -min(gain, 0.0)),
    Figure("val_loudness_ratio_db", "loudness ratio in dB", "0 is best", abs),
)


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file; a last line that an interruption cut short is left out."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def before_and_after(lines: Sequence[dict], key: str) -> tuple[float, float]:
    """The first value, at a stage's step 0, and the last one, after training; nan where there is none."""
    evaluated = [line for line in lines if line.get(key) is not None]
    untrained = evaluated[0][key] if evaluated and evaluated[0]["step"] == 0 else math.nan
    trained = evaluated[-1][key] if evaluated and evaluated[-1]["step"] > 0 else math.nan
    return untrained, trained


def print_figures(checkpoint_folder: Path) -> int:
    lines = read_lines(checkpoint_folder / "metrics.jsonl")
    print(f"{'on validation songs':32} {'untrained':>10} {'trained':>10}")
    worse = []
    for figure in FIGURES:
        untrained, trained = before_and_after(lines, figure.key)
        print(f"{figure.label:32} {untrained:10.4f} {trained:10.4f}   {figure.hint}")
        if not figure.badness(trained) <= figure.badness(untrained):  # so that nan counts as worse
            worse.append(figure.label)
    if worse:
        print(f"error: worse than untrained: {', '.join(worse)}", file=sys.stderr)
    return 1 if worse else 0


def print_song(dataset_folder: Path) -> int:
    meta = json.loads((dataset_folder / "meta.json").read_text(encoding="utf-8"))
    songs = [song for song in meta["songs"] if song["split"] == "test"]
    source = max(songs, key=lambda song: song["rows"])["source"]
    sys.stdout.buffer.write(os.fsencode(source) + b"\n")  # for a shell, and names of files need not be valid UTF-8
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What scripts/demo.sh tells at its end.")
    parser.add_argument("what", choices=("song", "figures"), help="a held-out song's path, or measured figures")
    parser.add_argument("folder", type=Path, help="dataset folder for song, checkpoint folder for figures")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    return print_song(args.folder) if args.what == "song" else print_figures(args.folder)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
