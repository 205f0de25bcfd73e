"""Turn a folder of songs into int16 chunk arrays and a manifest.

    python preprocess.py --input_folder /path/to/audio --output_folder /path/to/output

Every song becomes OUT/<id>.npy, int16 (chunks, channels, samples): consecutive chunks of 10 s. OUT/manifest.jsonl has
one line per input file, with its result and the reason. Run the same command again after an interruption, or after
adding songs: finished, unchanged songs are not done again. Until a run has ended, OUT/manifest.jsonl.unfinished tells
create_dataset.py that songs may be missing.
Exit codes: 0 done, 1 failed, 2 wrong usage or refused input, 75 interrupted: run the same command again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from continuation import audio, audio_decoders, files, manifests, plots
from continuation.cli import (
    INTERRUPTED,
    HelpFormatter,
    RunError,
    UsageError,
    add_debug_flag,
    available_cores,
    entry_point,
    environment_int,
    existing_folder,
    listed,
    make_folder,
    one_line,
    output_code,
    positive_float,
    positive_int,
    up_to_a_day,
)
from continuation.signals import StopSignals
from continuation.song_files import find_songs
from continuation.song_workers import Settings, Song, file_sha256, run_workers, song_id

# Tokens per second of every preset except tiny, which has 12.5: a chunk must contain a whole number.
LATENT_GRID_PER_SECOND = 25
PLOTTED_SONGS = 4
PLOTTED_CHUNKS = 6
LISTED_REJECTIONS = 10


# Arguments


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Turn a folder of songs into int16 chunk arrays and a manifest.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--input_folder", required=True, type=Path, help="folder of songs, searched with its subfolders")
    add("--output_folder", required=True, type=Path, help="folder for the chunk arrays and the manifest")
    add("--sample_rate", type=_sample_rate, default=24000, help="Hz, a multiple of 100")
    add("--channels", type=int, choices=(1, 2), default=2, help="mono is doubled for 2, stereo averaged for 1")
    add("--chunk_seconds", type=_chunk_seconds, default=audio.CHUNK_SECONDS, help="length of a chunk, s")
    add("--clip_seconds", type=_clip_seconds, help="use only the first seconds of each song (default: all)")
    add("--workers", type=positive_int, help="processes (default: SLURM_CPUS_PER_TASK, else the cores given)")
    add("--max_files", type=positive_int, help="do only the first files in sorted order (default: all)")
    add("--shard", type=_shard, help="I/N: do the files i with i %% N == I (default: the Slurm array's, if any)")
    add("--other_input_folder", action="store_true",
        help="OUT was made of another folder: remove its songs that IN lacks, replace those that differ")  # fmt: skip
    add("--verify", action="store_true", help="compare what is there with its checksums, do again what differs")
    add("--plot", action="store_true", help="draw the waveforms of a few songs to OUT/waveforms.png")
    add("--dry_run", action="store_true", help="print what is to do and how large it gets; write nothing")
    add_debug_flag(parser)
    return parser.parse_args(argv)


def _sample_rate(text: str) -> int:
    rate = int(text)
    if rate <= 0 or rate % 100:
        raise argparse.ArgumentTypeError(f"{rate} Hz is no multiple of 100 Hz: take 24000 (or 12000)")
    return rate


def _clip_seconds(text: str) -> float:
    return up_to_a_day(positive_float(text))


def _chunk_seconds(text: str) -> float:
    seconds = up_to_a_day(positive_float(text))
    latents = seconds * LATENT_GRID_PER_SECOND
    if abs(latents - round(latents)) > 1e-6:
        raise argparse.ArgumentTypeError(
            f"{seconds:g} s is no whole number of latents: take a multiple of {1 / LATENT_GRID_PER_SECOND} s"
        )
    return seconds


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, such as 0/4")
    return int(match[1]), int(match[2])


def shard_of_slurm_array(environment: dict[str, str]) -> tuple[int, int] | None:
    """Return (I, N) of a Slurm array task, None outside of one. Raises UsageError for an irregular array, and for
    environment variables that are no numbers."""
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "STEP", "COUNT")]
    if not all(name in environment for name in names):
        return None
    task, first = (environment_int(environment, name) for name in names[:2])
    step, count = (environment_int(environment, name, least=1) for name in names[2:])
    index, rest = divmod(task - first, step)
    if rest or not 0 <= index < count:
        raise UsageError("the Slurm array's task numbers are not evenly spaced: give --shard I/N")
    return index, count


# The output folder


def agree_on_meta(folder: Path, settings: Settings, dry_run: bool) -> None:
    """Write meta.json, or check that an existing one is the same. Raises UsageError where it differs."""
    path = folder / "meta.json"
    meta = {
        "format": 1,
        "kind": "chunks",
        "sample_rate": settings.sample_rate,
        "channels": settings.channels,
        "chunk_samples": settings.chunk_samples,
        "dtype": "int16",
        "settings": {"chunk_seconds": settings.chunk_seconds, "clip_seconds": settings.clip_seconds},
    }
    if not path.exists():
        if dry_run:
            return
        files.write_first(path, json.dumps(meta, indent=2) + "\n")
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = _differences(there | there["settings"], meta | meta["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if differing:
        raise UsageError(f"{folder} was made with other settings ({differing}): take another folder")


def _differences(there: dict, here: dict) -> str:
    names = [name for name in here if name != "settings" and there.get(name) != here[name]]
    return ", ".join(f"{name} {there.get(name)}, not {here[name]}" for name in names)


def is_done(line: dict | None, song: Song, settings: Settings, verify: bool = False) -> bool:
    """Return whether a song is done: its file and its array are as its line says, the array by its header, or with
    `verify` by its checksum. A song whose line has no mtime (no ffmpeg, a crash) is always done again."""
    if line is None or line.get("mtime") is None:
        return False
    try:
        if not is_as_it_was(line, song):
            return False
        if line["status"] != "ok":
            return True
        array = files.open_array(song.array, np.int16, (settings.channels, settings.chunk_samples))
    except (OSError, UsageError):
        return False
    if verify and line.get("array_sha256") != files.array_sha256(array):
        return False
    return len(array) == line["chunks"]


def is_as_it_was(line: dict, song: Song) -> bool:
    """Return whether the file has the size and time of its line. Raises OSError where it cannot be read."""
    status = os.stat(song.path)
    return (status.st_size, status.st_mtime_ns) == (line["size"], line["mtime"])


# The run


def check_folders(source: Path, target: Path) -> None:
    """Raise UsageError for folders that cannot be input and output."""
    if not source.is_dir():
        raise UsageError(f"--input_folder {source} is not a folder")
    if source.resolve() == target.resolve():
        raise UsageError("--input_folder and --output_folder must not be the same folder")


@dataclass
class Plan:
    """Songs that one run has to do, and the manifest lines of those that are done."""

    manifest: Path
    input_folder: str  # as in the lines
    todo: list[Song]
    lines: dict[str, dict]  # of this shard, by source
    gone: list[dict]  # lines of files that no longer exist
    is_empty_shard: bool

    @property
    def mark(self) -> Path:
        return manifests.unfinished_mark(self.manifest)


def make_plan(args: argparse.Namespace, settings: Settings, shard: tuple[int, int] | None) -> Plan:
    """Compare the input folder with the manifests. Raises UsageError where they are of another folder."""
    folder, manifest = args.output_folder, args.output_folder / manifests.file_name(shard)
    known, own = manifests.read_all_lines(folder, shard), manifests.read_lines(manifest)
    sources, is_complete = find_songs(args.input_folder, folder)
    songs = [
        Song(source, os.path.join(args.input_folder, source), folder / f"{song_id(source)}.npy") for source in sources
    ]
    index, count = shard or (0, 1)
    mine = songs[index::count]
    check_input_folder(args, known, sources, mine)
    here = os.path.realpath(args.input_folder)
    done = [song.source for song in mine if is_done(known.get(song.source), song, settings, args.verify)]
    lines = {source: known[source] | {"input_folder": here} for source in done}
    wanted = set(sources[: args.max_files])
    todo = [song for song in mine if song.source in wanted and song.source not in lines]
    gone = [own[source] for source in sorted(own.keys() - set(sources))]
    if not is_complete:  # a folder cannot be read: its songs may still exist
        lines |= {line["source"]: line for line in gone}
        gone = []
    return Plan(manifest, here, todo, lines, gone, bool(sources) and not mine)


def check_input_folder(
    args: argparse.Namespace, known: dict[str, dict], sources: list[str], mine: list[Song]
) -> None:
    """Raise UsageError where songs would be lost because the output was made from another folder: one with another
    path that lacks songs, or has other songs of the same name. --other_input_folder allows the loss."""
    folder = args.output_folder
    if known and known.keys().isdisjoint(sources) and not (sources and args.other_input_folder):
        raise UsageError(
            f"none of the {len(known)} files that {folder} was made of is in {args.input_folder}: is it the right "
            f"folder, and mounted? To start anew, delete {folder}"
        )
    here = os.path.realpath(args.input_folder)
    of_others = {
        source: line
        for source, line in known.items()
        if line.get("status") == "ok" and line.get("input_folder", here) != here
    }
    lost = of_others.keys() - set(sources)
    lost |= {song.source for song in mine if song.source in of_others and has_changed(of_others[song.source], song)}
    if lost and not args.other_input_folder:
        made_of = of_others[min(lost)]["input_folder"]
        raise UsageError(
            f"{folder} was made of {made_of}, and {len(lost)} of its songs are not in {args.input_folder} "
            f"({listed(lost)}): take another output folder, or remove them by --other_input_folder"
        )


def has_changed(line: dict, song: Song) -> bool:
    """Return whether a file's content has changed since its line was written."""
    try:
        return not is_as_it_was(line, song) and file_sha256(song.path) != line["sha256"]
    except OSError:
        return True


def begin(plan: Plan) -> None:
    """Mark the manifest as unfinished, and remove the lines and arrays of files that no longer exist."""
    files.write_atomic(plan.mark, "")
    manifests.write_lines(plan.manifest, plan.lines)
    for line in plan.gone:
        (plan.manifest.parent / f"{song_id(line['source'])}.npy").unlink(missing_ok=True)
    if removed := [line["source"] for line in plan.gone if line.get("status") == "ok"]:
        print(f"{len(removed)} songs are no longer in the input folder and were removed: {listed(removed)}")


def do_songs(plan: Plan, settings: Settings, workers: int, stop: StopSignals) -> dict[str, str]:
    """Process the planned songs, and write each manifest line as soon as the song is done.

    Returns, by source, how the worker ended, for songs that are not done because it was killed from outside.
    """
    started, seconds, undone = time.monotonic(), 0.0, {}
    results = run_workers(plan.todo, settings, workers, stop)
    with closing(results), tqdm(total=len(plan.todo), unit="song", disable=not plan.todo) as bar:
        for song, line in results:
            bar.update()
            if isinstance(line, str):
                undone[song.source] = line
                continue
            if line["status"] != "ok":
                song.array.unlink(missing_ok=True)  # of earlier content of this file
            line["input_folder"] = plan.input_folder
            manifests.append_line(plan.manifest, line)
            plan.lines[song.source] = line
            seconds += line["seconds"]
            bar.set_postfix_str(f"{seconds / (time.monotonic() - started):.0f} x real time", refresh=False)
    return undone


def print_dry_run(plan: Plan, settings: Settings, folder: Path) -> None:
    """Print the songs that this run has to do, and their size by the lengths in the files' headers; folder: on the
    disk of the output."""
    stated = [audio_decoders.stated_seconds(Path(song.path)) for song in tqdm(plan.todo, unit="song", disable=None)]
    known = [seconds for seconds in stated if seconds is not None]
    mean = sum(known) / max(1, len(known))
    limit = math.inf if settings.clip_seconds is None else settings.clip_seconds
    lengths = [min(mean if seconds is None else seconds, limit) for seconds in stated]
    chunks = sum(int(seconds / settings.chunk_seconds) for seconds in lengths)
    size = chunks * settings.chunk_samples * settings.channels * np.dtype(np.int16).itemsize
    done = len(plan.lines)
    print(f"{done + len(plan.todo)} files: {done} done before and not changed, {len(plan.todo)} to do")
    if plan.gone:
        print(f"{len(plan.gone)} done before are no longer in the input folder: they would be removed")
    print(
        f"to do: about {sum(lengths) / 3600:.2f} hours, {chunks} chunks of {settings.chunk_seconds:g} s, "
        f"{size / 1e9:.2f} GB ({shutil.disk_usage(folder).free / 1e9:.1f} GB free)"
    )
    if unknown := len(stated) - len(known):
        taken = "the mean of the others is taken" if known else "they are not counted"
        print(f"{unknown} of them do not tell their length before they are decoded: {taken}")
    print("dry run: nothing is written")


def print_summary(args: argparse.Namespace, lines: dict[str, dict], kept: int) -> None:
    """Print songs, chunks and hours, and the rejected files."""
    ok = [line for line in lines.values() if line["status"] == "ok"]
    bad = [line for line in lines.values() if line["status"] != "ok"]
    chunks = sum(line["chunks"] for line in ok)
    hours = chunks * args.chunk_seconds / 3600
    sizes = f"{len(ok)} songs, {chunks} chunks of {args.chunk_seconds:g} s, {hours:.2f} hours"
    print(f"{sizes} in {args.output_folder}")
    if kept:
        print(f"{kept} of {len(lines)} files were done before and have not changed")
    kinds = Counter(line["reason"].split(":")[0] for line in bad)
    if bad:
        print(f"{len(bad)} rejected: " + ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common()))
    for line in bad[:LISTED_REJECTIONS]:
        print(f"  {line['source']!r}: {one_line(line['reason'])}")
    if len(bad) > LISTED_REJECTIONS:
        print(f"  ... and {len(bad) - LISTED_REJECTIONS} more in the manifest")


def print_undone(ends: dict[str, str]) -> None:
    """Print which files are not done; ends: the result of `do_songs`."""
    print(
        f"error: {len(ends)} files are not done, for their worker process was killed: {listed(ends)} "
        f"({listed(set(ends.values()))}; out of memory?): run the same command again, perhaps with fewer --workers",
        file=sys.stderr,
    )


def plot_songs(args: argparse.Namespace, lines: dict[str, dict]) -> None:
    """Draw the first minute of a few songs, evenly spread over the sorted list."""
    ok = [lines[source] for source in sorted(lines) if lines[source]["status"] == "ok"]
    items = []
    for line in ok[:: -(-len(ok) // PLOTTED_SONGS)]:
        chunks = np.load(args.output_folder / f"{line['id']}.npy", mmap_mode="r")[:PLOTTED_CHUNKS]
        items.append((line["source"], audio.from_int16(np.concatenate(chunks, axis=1))))
    path = args.output_folder / "waveforms.png"
    plots.plot_waveforms(path, items, args.sample_rate)
    print(f"waveforms in {path}")


def run(args: argparse.Namespace) -> int:
    settings = Settings(args.sample_rate, args.channels, args.chunk_seconds, args.clip_seconds)
    shard, workers = args.shard or shard_of_slurm_array(os.environ), args.workers or available_cores()
    if shard and not args.shard:
        print(f"shard {shard[0]}/{shard[1]}, from the Slurm array")
    check_folders(args.input_folder, args.output_folder)
    if args.dry_run:
        there = existing_folder(args.output_folder, "--output_folder")
        agree_on_meta(args.output_folder, settings, dry_run=True)
        print_dry_run(make_plan(args, settings, shard), settings, there)
        return output_code()
    make_folder(args.output_folder, "--output_folder")
    agree_on_meta(args.output_folder, settings, dry_run=False)
    lock = args.output_folder / f".{manifests.file_name(shard)}.lock"
    with files.locked(lock), StopSignals(second_interrupt=False) as stop:
        plan = make_plan(args, settings, shard)
        kept = len(plan.lines)
        begin(plan)
        undone = do_songs(plan, settings, workers, stop)
        if stop.requested:
            print(f"interrupted with {len(plan.lines)} files done: run the same command again to go on")
            return INTERRUPTED
        manifests.write_lines(plan.manifest, plan.lines)
        if undone:
            print_undone(undone)
            return 1
        plan.mark.unlink()
        print_summary(args, plan.lines, kept)
        if plan.is_empty_shard:
            print("this shard has no files")
            return 0
        if not any(line["status"] == "ok" for line in plan.lines.values()):
            if shard and plan.lines:  # all damaged; create_dataset.py refuses if all shards are empty
                print("this shard has no usable audio file")
                return 0
            print(f"error: no usable audio file in {args.input_folder}", file=sys.stderr)
            return 1
        if args.plot:
            plot_songs(args, plan.lines)
    folder = shlex.quote(str(args.output_folder))
    print(f"next: python create_dataset.py --output_folder {folder} --dataset_folder DATASET")
    return 0


@entry_point
def main(args: argparse.Namespace) -> int:
    try:
        return run(args)
    except OSError as error:
        raise RunError(f"cannot write to {args.output_folder}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main(parse_args()))
