"""Write the network of a training as one small file: EMA weights in half precision, without the optimiser.

    python scripts/export_weights.py checkpoints pretrained/tiny.pt

The file is a checkpoint that model.load_model and train.py --init_from read; as best.pt in a folder of its own,
generate.py and evaluate.py do too. It lists the songs that the network was trained on, so that evaluate.py can report
songs that are not held out.
Exit codes: 0 done, 1 failed, 2 wrong usage or refused input, 75 interrupted: run the same command again.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from continuation import checkpoint
from continuation.cli import UsageError, add_debug_flag, entry_point, make_folder, one_line


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint_folder", type=Path, help="what train.py wrote; best.pt is used")
    parser.add_argument("output", type=Path, help="file to write: a .pt")
    add_debug_flag(parser)
    return parser.parse_args(argv)


def export(source: Path, target: Path) -> None:
    """Write the network of the checkpoint `source` to `target`. Raises UsageError unless it is of stage 2."""
    state = checkpoint.load(source)
    checkpoint.check_network(source, state)
    if state["stage"] != 2:
        raise UsageError(f"{source} is still in stage 1, and only stage 2 learns to continue a song: train on")
    make_folder(target.parent, "output")
    checkpoint.save(target, checkpoint.network_alone(state))


@entry_point
def main(args: argparse.Namespace) -> int:
    if args.output.suffix != ".pt" or args.output.is_dir():
        raise UsageError(f"{args.output} is not the name of a .pt file")
    export(args.checkpoint_folder / checkpoint.BEST_NAME, args.output)
    print(one_line(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB"))
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
