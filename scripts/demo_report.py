"""Print values for scripts/demo.sh and slurm/submit_all.sh from the files of the project's scripts.

    python scripts/demo_report.py song demo/synthetic/dataset
    python scripts/demo_report.py figures demo/synthetic/checkpoints

`song` prints the path of the longest song of the test split, relative to the folder of songs, byte for byte.
`figures` prints the distance of the network's continuation (best.pt) of validation songs from the true one, and for
comparison that of the weights before training, of the loop, and of the input repeated; the exit code is 1 unless the
network is nearer than the input repeated.
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


def print_figures(checkpoint_folder: Path) -> int:
    lines = files.read_jsonl(checkpoint_folder / "metrics.jsonl")
    evaluated = [line for line in lines if line and line["stage"] == 2 and "val_loss" in line]
    if not evaluated:
        print(
            "error: no figure says that the network is nearer to the truth than the input repeated", file=sys.stderr
        )
        return 1
    box, best = evaluated[0], min(evaluated, key=lambda line: line["val_loss"])  # best: what best.pt holds
    repeated, loop = figure(best, "val_input_repeated"), figure(best, "val_loop")
    untrained, trained = (figure(line, "val_continuation") for line in (box, best))
    print("distance from the true continuation of validation songs (lower is better)")
    for name, distance in (
        ("input repeated", repeated),
        ("loop: its end repeated, no network", loop),
        ("network, the pretrained weights", untrained),
        ("network, trained on these songs", trained),
    ):
        print(f"  {name:46} {distance:8.4f}")
    if best is box:
        print("No evaluation of the training had a lower loss: best.pt holds the weights that it started from.")
    if not trained < repeated:  # so that nan counts as worse
        print("error: the network is no nearer to the truth than the input repeated: train longer", file=sys.stderr)
        return 1
    print(f"The network is {'nearer to' if trained < loop else 'no nearer to'} the truth than the loop.")
    return 0


def figure(line: dict, name: str) -> float:
    """Return a figure of an evaluation; nan where it has none."""
    return math.nan if line.get(name) is None else line[name]


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
