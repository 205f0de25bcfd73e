"""Turn the chunk arrays of preprocess.py into a dataset of (10 s, next 10 s) pairs, split by song.

    python create_dataset.py --output_folder /path/to/output --dataset_folder /path/to/dataset

Writes, for each split s of train, val and test: DS/s.npy, int16 (rows, channels, samples), songs contiguous and in
order of time; DS/s_pairs.npy, int64 (pairs, 2), the rows of input and target, neighbours in one song; and
DS/meta.json with each song's rows.

Files with the same music (equal content, or matching fingerprints: see fingerprint.py) form a group, and a group is
in one split. Groups are ranked by the hash of the seed and their smallest id; test takes the lowest ones, as long as
that brings its hours nearer to test_fraction of all, then val does, and the rest is train: every share is within half
a group of the given fraction, and test does not depend on val_fraction. A split without any pair gets the lowest
group of train.

A song of an earlier dataset in DS, of the same seed and fractions, keeps its split, even if its file has another name
now: songs are identified by content. Where songs of two splits become one group, the group is in train, since songs
that were trained on can no longer be test songs.

A song of one chunk has a row and no pair. A run that is killed leaves the old dataset, or the new one in
DS/unfinished, where meta.json is written last and marks it as complete. The next run first moves it to DS; until then
DS has no meta.json and is refused.
Exit codes: 0 done, 1 failed, 2 wrong usage or refused input, 75 interrupted: run the same command again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from continuation import audio, files, manifests, plots, signals
from continuation.cli import (
    HelpFormatter,
    RunError,
    UsageError,
    add_debug_flag,
    entry_point,
    existing_folder,
    listed,
    make_folder,
    output_code,
)
from continuation.dataset import SPLITS, known_by_group, read_meta
from continuation.fingerprint import find_same_music, read_fingerprint

TEMPO_SECONDS = 60
LISTED_GROUPS = 20
ARRAYS = tuple(f"{split}{kind}.npy" for split in SPLITS for kind in ("", "_pairs"))
UNFINISHED = "unfinished"  # folder inside DS


# Arguments


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Turn the chunk arrays of preprocess.py into a dataset of pairs, split by song.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--output_folder", required=True, type=Path, help="the folder that preprocess.py wrote")
    add("--dataset_folder", required=True, type=Path, help="folder for the dataset")
    add(
        "--val_fraction", type=_fraction, default=0.1, help="this share of the hours steers training, at least a song"
    )
    add("--test_fraction", type=_fraction, default=0.1, help="this share is for the scorecard, at least a song")
    add("--min_rms_db", type=float, default=-60.0, help="drop pairs with a quieter input or target, dBFS")
    add("--seed", type=int, default=0, help="another seed draws another split")
    add("--plot", action="store_true", help="draw hours, loudness, silence and tempo to DS/dataset.png")
    add("--dry_run", action="store_true", help="print the split and how large the dataset gets; write nothing")
    add_debug_flag(parser)
    args = parser.parse_args(argv)
    if args.val_fraction + args.test_fraction >= 1:
        parser.error("--val_fraction and --test_fraction leave nothing to train on: their sum must be below 1")
    return args


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return value


# Input: the folder of preprocess.py


@dataclass
class Song:
    """A song of preprocess.py, with its pairs and its place in the dataset."""

    line: dict  # of the manifest
    path: Path  # of the array, int16 (rows, channels, samples)
    bytes: int
    pairs: np.ndarray  # int64 (pairs, 2), rows counted from the song's first
    quiet_pairs: int  # left out because they are too quiet
    group: str = ""  # the smallest id among the songs with the same music
    split: str = ""

    @property
    def id(self) -> str:
        return self.line["id"]

    @property
    def identity(self) -> dict:
        """Part of its entry in meta.json that is the same in every dataset."""
        return {key: self.line[key] for key in ("id", "source", "sha256", "fingerprint")} | {"group": self.group}

    @property
    def rows(self) -> int:
        return self.line["chunks"]

    def chunks(self) -> np.ndarray:
        """Open the array as a memory map, for each use again, since the whole corpus must not stay mapped."""
        return files.open_array(self.path, np.int16)


def open_song(folder: Path, line: dict, meta: dict, min_rms_db: float) -> Song:
    """Check a song's array against its manifest line, and find its pairs. Reads the whole array, chunk by chunk.

    Raises UsageError where the array is not as preprocess.py wrote it.
    """
    path = folder / f"{line['id']}.npy"
    chunks = files.open_array(path, np.int16, (meta["channels"], meta["chunk_samples"]))
    if len(chunks) != line["chunks"]:
        raise UsageError(f"{path} has {len(chunks)} chunks, its manifest line says {line['chunks']}")
    if line.get("array_sha256", "") not in ("", files.array_sha256(chunks)):
        raise UsageError(f"{path} is damaged: its checksum is another one; run preprocess.py with --verify")
    is_loud = np.array([audio.rms_db(audio.from_int16(chunk)) >= min_rms_db for chunk in chunks])
    inputs = np.flatnonzero(is_loud[:-1] & is_loud[1:]).astype(np.int64)
    pairs = np.stack([inputs, inputs + 1], axis=1)
    return Song(line, path, chunks.nbytes, pairs, quiet_pairs=len(chunks) - 1 - len(pairs))


def open_songs(folder: Path, meta: dict, min_rms_db: float) -> list[Song]:
    """Open all songs of a folder of chunks, sorted by id."""
    with tqdm(manifests.read_songs(folder), desc="reading", unit="song") as lines:
        return [open_song(folder, line, meta, min_rms_db) for line in lines]


# The split


def group_same_music(songs: list[Song]) -> None:
    """Assign every song to a group: union-find over equal files and matching fingerprints."""
    root = list(range(len(songs)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    def join(i: int, j: int) -> None:
        # Songs are sorted by id: the smallest index of a group is its smallest id.
        root[max(find(i), find(j))] = min(find(i), find(j))

    first_with: dict[str, int] = {}
    for i, song in enumerate(songs):
        if song.line["sha256"]:
            join(i, first_with.setdefault(song.line["sha256"], i))
    fingerprints = [read_fingerprint(song.line["fingerprint"]) for song in songs]
    print(f"comparing the fingerprints of {len(songs)} songs", flush=True)
    for i, j, _ in find_same_music(fingerprints):
        join(i, j)
    for i, song in enumerate(songs):
        song.group = songs[find(i)].id


def hash_rank(seed: int, group: str) -> float:
    """Return a number in [0, 1) that depends on the seed and the group alone."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_songs(songs: list[Song], known: dict[str, list[dict]], args: argparse.Namespace) -> None:
    """Assign every song to a split, see the module docstring; known: songs of an earlier dataset by group.

    Raises UsageError when fewer than three groups have a pair.
    """
    groups: dict[str, list[Song]] = {}
    for song in songs:
        groups.setdefault(song.group, []).append(song)
    order = sorted(groups, key=lambda group: hash_rank(args.seed, group))
    usable = [group for group in order if any(len(song.pairs) for song in groups[group])]
    if len(usable) < 3:
        raise UsageError(
            f"{len(usable)} different songs have a usable pair, 3 are needed (train, val, test): "
            f"add songs of at least two chunks above {args.min_rms_db:g} dBFS"
        )
    assigned = {}
    for group, earlier in known.items():
        if earlier:
            assigned[group] = next(split for split in SPLITS if split in {song["split"] for song in earlier})
    rows = {group: sum(song.rows for song in groups[group]) for group in order}
    _assign_new(assigned, rows, {"test": args.test_fraction, "val": args.val_fraction})
    # New groups come first: songs that were trained on can no longer be test songs.
    _fill_empty(assigned, sorted(usable, key=lambda group: bool(known[group])))
    for song in songs:
        song.split = assigned[song.group]


def _assign_new(assigned: dict[str, str], rows: dict[str, int], shares: dict[str, float]) -> None:
    """Assign the groups that `assigned` lacks; rows: of all groups, lowest first. Each split of `shares` takes a
    group if that brings it nearer to its share of all rows; the rest is train."""
    for split, share in shares.items():
        missing = share * sum(rows.values()) - sum(rows[group] for group in rows if assigned.get(group) == split)
        for group in rows:
            if group not in assigned and rows[group] <= 2 * missing:
                assigned[group] = split
                missing -= rows[group]
    for group in rows:
        assigned.setdefault(group, "train")


def _fill_empty(assigned: dict[str, str], usable: list[str]) -> None:
    """Move a group with pairs to every split without any: the lowest of train, or of the split with most groups."""
    held = {name: [group for group in usable if assigned[group] == name] for name in SPLITS}
    for empty in [name for name in ("test", "val", "train") if not held[name]]:
        lender = "train" if len(held["train"]) > 1 else max(held, key=lambda name: len(held[name]))
        group = held[lender].pop(-1 if empty == "train" else 0)
        held[empty].append(group)
        assigned[group] = empty


def known_songs(folder: Path, settings: dict) -> list[dict]:
    """Return the songs of an earlier dataset in this folder, if its seed and fractions are the same.

    Raises UsageError for a dataset whose splits cannot be read, since they would be drawn again.
    """
    if not (folder / "meta.json").exists():
        if arrays := [name for name in ARRAYS if (folder / name).exists()]:
            raise UsageError(
                f"{folder} holds {arrays[0]} and no meta.json: which songs were for training is lost; take another "
                f"folder, or delete this one to draw all splits anew"
            )
        return []
    meta = read_meta(folder, "dataset")
    if any(meta["settings"].get(key) != settings[key] for key in ("seed", "val_fraction", "test_fraction")):
        return []
    return [song for song in meta["songs"] if song["split"] in SPLITS]


# Writing


def check_space(songs: list[Song], folder: Path) -> None:
    """Print the size of the dataset; raise OSError where the disk of `folder` has not enough space for it."""
    size = sum(song.bytes + song.pairs.nbytes + 1000 for song in songs)
    free = shutil.disk_usage(folder).free
    print(f"the dataset takes {size / 1e9:.2f} GB ({free / 1e9:.1f} GB free)", flush=True)
    if size > free:
        raise OSError(f"the dataset needs {size / 1e9:.2f} GB and only {free / 1e9:.2f} GB are free")


def write_dataset(folder: Path, songs: list[Song], meta: dict) -> None:
    """Write the dataset to a folder inside `folder`, meta.json last, then move it to `folder`."""
    new = folder / UNFINISHED
    new.mkdir()
    try:
        with tqdm(total=sum(song.rows for song in songs), desc="writing", unit="row") as bar:
            entries = []
            for split in SPLITS:
                entries += write_split(new, split, [song for song in songs if song.split == split], meta, bar)
        files.sync_folder(new)
        files.write_atomic(new / "meta.json", json.dumps(meta | {"songs": entries}, indent=1) + "\n")
        files.sync_folder(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    put_in_place(folder)


def put_in_place(folder: Path) -> None:
    """Replace the dataset in `folder` by the one in `folder`/unfinished if that is complete, else remove the latter.

    It may be killed at any point: the next call continues, and until then there is no meta.json, so no dataset.
    """
    new = folder / UNFINISHED
    if (new / "meta.json").exists():
        (folder / "meta.json").unlink(missing_ok=True)
        for name in (name for name in ARRAYS if (new / name).exists()):
            (new / name).replace(folder / name)
        files.sync_folder(folder)
        (new / "meta.json").replace(folder / "meta.json")
        files.sync_folder(folder)
    shutil.rmtree(new, ignore_errors=True)


def write_split(folder: Path, split: str, songs: list[Song], meta: dict, bar) -> list[dict]:
    """Write the rows and pairs of one split, and return its songs' entries in meta.json."""
    row_shape = (meta["channels"], meta["chunk_samples"])
    entries = []
    with ExitStack() as stack:
        rows = stack.enter_context(files.ArrayWriter(folder / f"{split}.npy", np.int16, row_shape))
        pairs = stack.enter_context(files.ArrayWriter(folder / f"{split}_pairs.npy", np.int64, (2,)))
        for song in songs:
            first_row = rows.rows
            entries.append(song.identity | {"split": split, "first_row": first_row, "rows": song.rows})
            pairs.append(song.pairs + first_row)
            for chunk in song.chunks():
                rows.append(chunk[None])
                bar.update()
    return entries


# Printing and plots


def print_summary(songs: list[Song], meta: dict) -> None:
    """Print songs, pairs and hours of every split, and the number of those left out."""
    hours_a_row = meta["chunk_samples"] / meta["sample_rate"] / 3600
    for split in SPLITS:
        inside = [song for song in songs if song.split == split]
        pairs, rows = sum(len(song.pairs) for song in inside), sum(song.rows for song in inside)
        print(f"{split:6}{len(inside):6} songs{pairs:8} pairs{rows * hours_a_row:8.2f} hours")
    if dropped := sum(song.quiet_pairs for song in songs):
        print(f"{dropped} pairs dropped: input or target below {meta['settings']['min_rms_db']:g} dBFS")
    if short := sum(song.rows == 1 for song in songs):
        print(f"{short} songs of one chunk give no pair")
    print_groups(songs)


def print_changes(songs: list[Song], earlier: list[dict], known: dict[str, list[dict]]) -> None:
    """Print which songs of the `earlier` dataset are in another split, and which are no longer there (not in
    `known`)."""
    assigned = {song.group: song.split for song in songs}
    here = [(song, assigned[group]) for group, found in known.items() for song in found]
    if moved := [song["source"] for song, split in here if song["split"] != split]:
        print(f"{len(moved)} songs came to another split than before: {', '.join(map(repr, moved))}")
    ids = {song["id"] for song, _ in here}
    if gone := [song["source"] for song in earlier if song["id"] not in ids]:
        print(f"{len(gone)} songs of the dataset that was here before are gone: {listed(gone)}")


def print_groups(songs: list[Song]) -> None:
    """Print which files are the same music."""
    sizes = Counter(song.group for song in songs)
    joined = [group for group, size in sizes.items() if size > 1]
    if joined:
        print(f"{len(joined)} groups of the same music, each kept in one split:")
    for group in joined[:LISTED_GROUPS]:
        print("  " + ", ".join(repr(song.line["source"]) for song in songs if song.group == group))
    if len(joined) > LISTED_GROUPS:
        print(f"  ... and {len(joined) - LISTED_GROUPS} more: see 'group' in meta.json")


def plot_songs(path: Path, songs: list[Song], meta: dict) -> None:
    """Draw hours, loudness, silence and tempo of all songs."""
    hours_a_row = meta["chunk_samples"] / meta["sample_rate"] / 3600
    rows = [
        {
            "split": song.split,
            "hours": song.rows * hours_a_row,
            "rms_db": 20 * np.log10(max(song.line["rms"], 1e-10)),
            "silent_share": song.line["silent_share"],
            "tempo_bpm": tempo_bpm(song, meta),
        }
        for song in tqdm(songs, desc="tempo", unit="song")
    ]
    plots.plot_dataset(path, rows)
    print(f"picture in {path}")


def tempo_bpm(song: Song, meta: dict) -> float:
    """Estimate the beats per minute of a song's first minute by librosa."""
    import librosa

    rate = meta["sample_rate"]
    rows = -(-TEMPO_SECONDS * rate // meta["chunk_samples"])
    x = audio.from_int16(np.concatenate(song.chunks()[:rows], axis=1)).mean(axis=0)
    return float(librosa.feature.tempo(y=x, sr=rate, hop_length=rate // 50)[0])


# The run


def plan(args: argparse.Namespace, meta: dict, earlier: list[dict]) -> tuple[list[Song], dict[str, list[dict]]]:
    """Return all songs with their splits, and the songs of the `earlier` dataset by group."""
    songs = open_songs(args.output_folder, meta, args.min_rms_db)
    group_same_music(songs)
    known = known_by_group([song.identity for song in songs], earlier)
    split_songs(songs, known, args)
    return songs, known


def dry_run(args: argparse.Namespace, meta: dict) -> None:
    """Print the dataset that `run` would make, and write nothing."""
    target = args.dataset_folder
    unfinished = target / UNFINISHED  # a run would move it to the target if it is complete
    earlier = known_songs(unfinished if (unfinished / "meta.json").exists() else target, meta["settings"])
    songs, known = plan(args, meta, earlier)
    check_space(songs, existing_folder(target, "--dataset_folder"))
    print_summary(songs, meta)
    print_changes(songs, earlier, known)
    print("dry run: nothing is written")


def run(args: argparse.Namespace) -> int:
    source, target = args.output_folder, args.dataset_folder
    if source.resolve() == target.resolve():
        raise UsageError("--output_folder and --dataset_folder must not be the same folder")
    chunks_meta = read_meta(source, "chunks")
    settings = {name: getattr(args, name) for name in ("val_fraction", "test_fraction", "min_rms_db", "seed")}
    meta = chunks_meta | {"kind": "dataset", "settings": settings | {"chunks": chunks_meta["settings"]}}
    if args.dry_run:
        dry_run(args, meta)
        return output_code()
    make_folder(target, "--dataset_folder")
    with files.locked(target / ".lock"):
        put_in_place(target)  # finishes a killed run, or frees its space
        earlier = known_songs(target, settings)
        songs, known = plan(args, meta, earlier)
        check_space(songs, target)
        write_dataset(target, songs, meta)
        print_summary(songs, meta)
        print_changes(songs, earlier, known)
        if args.plot:
            plot_songs(target / "dataset.png", songs, meta)
    print(f"next: python train.py --dataset_folder {shlex.quote(str(target))} --checkpoint_folder CHECKPOINTS")
    return 0


@entry_point
def main(args: argparse.Namespace) -> int:
    try:
        with signals.sigterm_as_ctrl_c():
            return run(args)
    except OSError as error:
        raise RunError(f"{error.filename or args.dataset_folder}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main(parse_args()))
