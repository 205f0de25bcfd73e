"""Print values for scripts/demo.sh and slurm/submit_all.sh from the files of the project's scripts.

    python scripts/demo_report.py song demo/synthetic/dataset
    python scripts/demo_report.py figures demo/synthetic/checkpoints

`song` prints the path of the longest song of the test split, relative to the folder of songs, byte for byte.
`figures` prints the distance of the network's continuation of validation songs from the true one, and for comparison
that of the weights before training, of the loop, and of the input repeated; the exit code is 1 unless the network is
nearer than the input repeated.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from continuation import files


def before_and_after(lines: Sequence[dict], key: str) -> tuple[float, float]:
    """Return the first value of `key`, at a stage's step 0, and the last one, after training; nan where there is
    none."""
    evaluated = [line for line in lines if line.get(key) is not None]
    untrained = evaluated[0][key] if evaluated and evaluated[0]["step"] == 0 else math.nan
    trained = evaluated[-1][key] if evaluated and evaluated[-1]["step"] > 0 else math.nan
    return untrained, trained


def print_figures(checkpoint_folder: Path) -> int:
    lines = [line for line in files.read_jsonl(checkpoint_folder / "metrics.jsonl") if line]
    untrained, trained = before_and_after(lines, "val_continuation")
    repeated, loop = (before_and_after(lines, f"val_{name}")[1] for name in ("input_repeated", "loop"))
    print("distance from the true continuation of validation songs (lower is better)")
    for name, distance in (
        ("input repeated", repeated),
        ("loop: its end repeated, no network", loop),
        ("network, the weights in the box", untrained),
        ("network, trained on these songs", trained),
    ):
        print(f"  {name:46} {distance:8.4f}")
    if not trained < repeated:  # so that nan counts as worse
        print("error: the network is no nearer to the truth than the input repeated: train longer", file=sys.stderr)
        return 1
    print(f"The network is {'nearer to' if trained < loop else 'no nearer to'} the truth than the loop.")
    return 0


def print_song(dataset_folder: Path) -> int:
    meta = json.loads((dataset_folder / "meta.json").read_text(encoding="utf-8"))
    songs = [song for song in meta["songs"] if song["split"] == "test"]
    source = max(songs, key=lambda song: song["rows"])["source"]
    sys.stdout.buffer.write(os.fsencode(source) + b"\n")  # for a shell: file names need not be valid UTF-8
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("song", "figures"), help="a held-out song's path, or measured figures")
    parser.add_argument("folder", type=Path, help="dataset folder for song, checkpoint folder for figures")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    return print_song(args.folder) if args.what == "song" else print_figures(args.folder)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
