"""Evaluate checkpoints on held-out songs against baselines without a network: the scorecard.

    python evaluate.py --dataset_folder dataset --checkpoint_folder checkpoints --output_folder scores

Writes scorecard.json, scorecard.csv, scorecard.md, listen.html, pictures/ and sounds/ into the output folder. The
same command gives the same scorecard, bit for bit on the CPU.
Exit codes: 0 done, 1 failed, 2 wrong usage or refused input, 75 interrupted: run the same command again.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from continuation import checkpoint, criteria, files, kad, scorecard, signals
from continuation.cli import (
    INTERRUPTED,
    HelpFormatter,
    RunError,
    UsageError,
    add_debug_flag,
    entry_point,
    make_folder,
    not_negative_float,
    one_line,
    positive_int,
    repetitions,
    seed_number,
)
from continuation.dataset import SPLITS, open_dataset
from continuation.evaluator import Evaluator
from continuation.listening_page import ListeningPage
from continuation.pairs import Pairs, training_sounds
from continuation.signals import Stopped
from continuation.systems import (
    BASELINES,
    CEILING,
    PREDICTIONS,
    TRUTH,
    Network,
    Sampling,
    System,
    file_name,
    load_prediction,
)
from continuation.windows import Windows
from model import GUIDANCE, SAMPLING_STEPS, build_model, load_checkpoint

SHOWN_SONGS = 3  # songs whose first pair is written as pictures and sounds
LONG_SONGS = 10  # songs whose first pair is continued for a minute
KEPT_OF_A_CHECKPOINT = ("config", "ema", "stage", "step", "data_meta")  # the rest is large
PASSAGES_AT_ONCE = 2**30  # bytes of passages that are compared with the training songs together


# Arguments


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    folders = parser.add_argument_group("folders")
    folders.add_argument("--dataset_folder", required=True, type=Path, help="what create_dataset.py wrote")
    folders.add_argument(
        "--checkpoint_folder", required=True, type=Path, nargs="+", metavar="CK", help="what train.py wrote, best.pt"
    )
    folders.add_argument("--output_folder", required=True, type=Path, help="where the scorecard is written")
    folders.add_argument(
        "--predictions", type=named_folder, nargs="+", action="extend", metavar="NAME=DIR",
        help="continuations by anybody else: a folder with ID.wav for every pair id that scorecard.json lists",
    )  # fmt: skip
    songs = parser.add_argument_group("songs")
    songs.add_argument("--split", choices=SPLITS, default="test", help="split of the dataset")
    songs.add_argument("--pairs_per_song", type=positive_int, default=4, help="pairs, spread over each song")
    songs.add_argument("--seed", type=seed_number, default=0, help="of everything that is drawn")
    sampling = parser.add_argument_group("sampling and hardware")
    sampling.add_argument("--steps", type=repetitions, default=SAMPLING_STEPS, help="steps from noise to music")
    sampling.add_argument(
        "--guidance", type=not_negative_float, default=GUIDANCE,
        help="how strongly the input is followed; 1: as trained",
    )  # fmt: skip
    sampling.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add_debug_flag(parser)
    return parser.parse_args(argv)


def named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    if not file_name(name):
        raise argparse.ArgumentTypeError(f"{text!r}: a name needs a letter or a digit, files are called after it")
    return name, Path(folder)


# Loading


def load_networks(args: argparse.Namespace, meta: dict) -> list[Network]:
    """Load and name the networks of all checkpoint folders; UsageError where one does not fit the dataset."""
    states = []
    for folder in args.checkpoint_folder:
        state = load_checkpoint(folder / checkpoint.BEST_NAME)
        check_fit(folder, state, meta)
        states.append({key: state.get(key) for key in KEPT_OF_A_CHECKPOINT})
    names = names_of(args.checkpoint_folder, [state["config"] for state in states])
    device, sampling = checkpoint.choose_device(args.device), Sampling(args.steps, args.guidance)
    return [
        Network(name, folder, state, build_model(state, device), sampling, args.seed)
        for name, folder, state in zip(names, args.checkpoint_folder, states, strict=True)
    ]


def check_fit(folder: Path, state: dict, meta: dict) -> None:
    for key, unit in (("sample_rate", " Hz"), ("channels", " channels"), ("chunk_samples", " samples a chunk")):
        own = state["config"][key]
        if own != meta[key]:
            raise UsageError(f"{folder} was trained at {own}{unit}, and the dataset has {meta[key]}{unit}")


def names_of(folders: list[Path], configs: list[dict]) -> list[str]:
    """Name networks preset-objective, where needed with the folder's name in brackets, or its path."""
    short = [f"{config['preset']}-{config['objective']}" for config in configs]
    long = [f"{name} ({folder.resolve().name})" for name, folder in zip(short, folders, strict=True)]
    longest = [f"{name} ({folder})" for name, folder in zip(short, folders, strict=True)]
    names = [n if short.count(n) == 1 else m for n, m in zip(short, long, strict=True)]
    names = [n if names.count(n) == 1 else m for n, m in zip(names, longest, strict=True)]
    if len({file_name(name) for name in names}) < len(names):
        raise UsageError("--checkpoint_folder names the same folder twice, or two that differ in signs alone")
    return names


def load_predictions(args: argparse.Namespace, networks: list[Network], pairs: Pairs, meta: dict) -> list[System]:
    """Make the systems of external predictions. Names that other systems have or may have, and files that are missing
    or cannot be measured, are refused before hours of work."""
    taken = {system.file_name for system in (*BASELINES, TRUTH)} | {file_name(network.name) for network in networks}
    predictions = [System(name, PREDICTIONS, folder=folder) for name, folder in args.predictions or ()]
    for system in predictions:
        if system.file_name in taken or "," in system.name or " through " in system.name:
            raise UsageError(f"--predictions {system.name}={system.folder}: the name is taken by another system")
        taken.add(system.file_name)
        for path in (system.folder / f"{id}.wav" for id in pairs.ids()):
            if not path.is_file():
                raise UsageError(f"{path} is missing: there must be a continuation of every pair")
            load_prediction(path, meta["sample_rate"], meta["channels"], meta["chunk_samples"])
    return predictions


def notes_on(networks: list[Network], facts: dict[str, dict], pairs: Pairs, split: str) -> list[str]:
    """List the caveats that a reader of the figures must know."""
    notes = [f"{n.name} is still in stage 1: its reconstruction only" for n in networks if not n.continues]
    for network in networks:
        seen = len(facts[network.name]["songs_trained_on"])
        if seen:
            notes.append(f"{network.name} was trained on {seen} of these {len(pairs.songs)} songs: not held out")
    presets = dict.fromkeys(n.config.preset for n in networks if n.config.preset != "legacy") or {"tiny": None}
    expected = [(preset, objective) for preset in presets for objective in ("flow", "mse")] + [("legacy", "mse")]
    there = {(network.config.preset, network.config.objective) for network in networks}
    missing = [f"{preset}-{objective}" for preset, objective in expected if (preset, objective) not in there]
    if missing:
        notes.append(f"missing, for want of a checkpoint: {', '.join(missing)}")
    if kad.find_weights() is None:
        notes.append("missing, for want of its weights: KAD; pip install --no-deps musicnn==0.1.0 brings them")
    if split == "val":
        notes.append("training and every choice are steered by val: only test is held out")
    return notes


# Evaluation


def evaluate(evaluator: Evaluator, pairs: Pairs, page: ListeningPage, training_split, meta: dict, stop) -> None:
    """Measure all systems on all pairs, and the similarity of their continuations to the training songs."""

    def search_training_songs() -> None:
        if evaluator.passages:
            sounds = tqdm(training_sounds(training_split, meta), desc="memorisation", total=len(training_split.rows))
            evaluator.measure_memorisation(until_stopped(sounds, stop))

    with torch.inference_mode(), tqdm(total=len(pairs), unit="pair") as bar:
        for position, song in enumerate(pairs.songs):
            for i, pair in enumerate(until_stopped(pairs.of_song(position), stop)):
                if i == 0 and position < LONG_SONGS:
                    evaluator.continue_long(pair)
                reconstructions = evaluator.reconstruct(pair)
                evaluator.measure_reconstructions(pair, reconstructions)
                continuations = evaluator.continue_pair(pair)
                evaluator.measure_continuations(pair, continuations)
                if i == 0 and position < SHOWN_SONGS:
                    page.add(pair, reconstructions, continuations)
                bar.update()
            evaluator.finish_song(song["id"])
            if evaluator.passage_bytes() > PASSAGES_AT_ONCE:
                search_training_songs()
    search_training_songs()


def until_stopped(items: Iterable, stop) -> Iterator:
    for item in items:
        if stop.requested:
            raise Stopped
        yield item


# Writing


def make_card(
    args: argparse.Namespace, evaluator: Evaluator, pairs: Pairs, facts: dict[str, dict], notes: list[str]
) -> dict:
    figures = scorecard.summarise(evaluator.rows, args.seed)
    songs = [song["id"] for song in pairs.songs]
    card = {
        "format": 1,
        "dataset": str(args.dataset_folder),
        "settings": {name: getattr(args, name) for name in ("split", "pairs_per_song", "seed", "steps", "guidance")},
        "device": evaluator.networks[0].model.latent_mean.device.type,
        "versions": checkpoint.versions(),
        "checkpoints": facts,
        "songs": {song["id"]: song["source"] for song in pairs.songs},
        "pairs": len(pairs),
        "pair_ids": pairs.ids(),
        "notes": notes,
        "figures": figures,
        "hum": evaluator.worst_hums(),
        **distances(evaluator, songs),
        "halves": {
            half: {"songs": of_half, **distances(evaluator, of_half)} for half, of_half in evaluator.halves().items()
        },
        "long": evaluator.long_measures(),
        "ranks": scorecard.rank(figures["continuation"], ceilings(evaluator), args.seed),
    }
    return card | {"gates": [asdict(criterion) for criterion in criteria.check(card)]}


def distances(evaluator: Evaluator, songs: list[str]) -> dict[str, dict]:
    return {
        "kernel_audio_distance": evaluator.kernel_distances("musicnn", songs),
        "kernel_audio_distance_mel": evaluator.kernel_distances("mel", songs),
    }


def ceilings(evaluator: Evaluator) -> dict[str, str]:
    """Return the name of each network's ceiling."""
    systems = (system for network in evaluator.networks for system in network.systems)
    return {system.network.name: system.name for system in systems if system.kind == CEILING}


def write_card(folder: Path, card: dict) -> None:
    files.write_atomic(folder / "scorecard.json", scorecard.as_json(card))
    files.write_atomic(folder / "scorecard.csv", scorecard.as_csv(card["figures"]))
    files.write_atomic(folder / "scorecard.md", scorecard.as_markdown(card))


# Main


def run(args: argparse.Namespace, stop) -> None:
    meta, splits = open_dataset(args.dataset_folder)
    pairs = Pairs(Windows(splits[args.split], meta), args.pairs_per_song)
    networks = load_networks(args, meta)
    predictions = load_predictions(args, networks, pairs, meta)
    facts = {network.name: network.facts(pairs.songs) for network in networks}
    notes = notes_on(networks, facts, pairs, args.split)
    for note in notes:
        print(f"note: {one_line(note)}")
    make_folder(args.output_folder, "--output_folder")
    with files.locked(args.output_folder / ".lock"):
        evaluator = Evaluator(networks, predictions, meta["sample_rate"], args.seed)
        page = ListeningPage(args.output_folder, meta["sample_rate"])
        evaluate(evaluator, pairs, page, splits["train"], meta, stop)
        write_card(args.output_folder, make_card(args, evaluator, pairs, facts, notes))
        page.write()
    card_path = one_line(args.output_folder / "scorecard.md")
    print(f"done: {card_path}; listen.html, .json, .csv, pictures and sounds are beside it")


@entry_point
def main(args: argparse.Namespace) -> int:
    checkpoint.versions()  # of the code that runs, whatever is checked out before it ends
    try:
        with signals.StopSignals() as stop:
            run(args, stop)
    except (Stopped, KeyboardInterrupt):
        print(f"interrupted by {stop.name}: run the same command again", file=sys.stderr)
        return INTERRUPTED
    except torch.cuda.OutOfMemoryError as error:
        raise RunError("the GPU's memory ran out: free some of it, or use --device cpu") from error
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
