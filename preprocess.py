"""Turn a folder of songs into int16 chunk arrays and a manifest.

    python preprocess.py --input_folder /path/to/audio --output_folder /path/to/output

Every song becomes OUT/<id>.npy, int16 (chunks, channels, samples): consecutive chunks of 10 s. One line of
OUT/manifest.jsonl per input file says what became of it, and why. Run the same command again after an
interruption, or after adding songs: what is done and unchanged is not done again. Until a run has come to its end,
OUT/manifest.jsonl.unfinished tells create_dataset.py that songs may be missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import signal
import stat
import sys
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from continuation import audio, containers, data, files, signals
from continuation.cli import (
    INTERRUPTED,
    UsageError,
    environment_int,
    listed,
    one_line,
    positive_float,
    positive_int,
    steady_output,
    up_to_a_day,
)

SILENCE_DB = -60.0
SILENCE_FRAMES_PER_SECOND = 10
# Tokens a second of every preset but tiny, which has 10: a chunk must hold a whole number.
LATENT_GRID_PER_SECOND = 25
PLOTTED_SONGS = 4
PLOTTED_CHUNKS = 6
LISTED_REJECTIONS = 10
# What a decoder's own bug ends a process with; any other end (out of memory, an operator) tells nothing of the song.
CRASHES = frozenset(
    getattr(signal, n) for n in ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT") if hasattr(signal, n)
)
SECONDS_TO_END = 5  # for a worker process, before it is killed


# ---------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Turn a folder of songs into int16 chunk arrays and a manifest.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--input_folder", required=True, type=Path, help="folder of songs, searched with its subfolders")
    add("--output_folder", required=True, type=Path, help="folder for the chunk arrays and the manifest")
    add("--sample_rate", type=_sample_rate, default=24000, help="Hz, a multiple of 100")
    add("--channels", type=int, choices=(1, 2), default=2, help="mono is doubled for 2, stereo averaged for 1")
    add("--chunk_seconds", type=_chunk_seconds, default=audio.CHUNK_SECONDS, help="length of a chunk, s")
    add("--clip_seconds", type=_clip_seconds, help="use only the first seconds of each song (None: all)")
    add("--workers", type=positive_int, help="processes (None: SLURM_CPUS_PER_TASK, else the cores given)")
    add("--max_files", type=positive_int, help="do only the first files in sorted order (None: all)")
    add("--shard", type=_shard, help="I/N: do the files i with i %% N == I (None: the Slurm array, if any)")
    add("--other_input_folder", action="store_true",
        help="OUT was made of another folder: remove its songs that IN lacks, replace those that differ")  # fmt: skip
    add("--verify", action="store_true", help="compare what is there with its checksums, do again what differs")
    add("--plot", action="store_true", help="draw the waveforms of a few songs to OUT/waveforms.png")
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
    """(I, N) of a Slurm array task, None outside of one. AudioError for an irregular array, UsageError where it is
    no number that the environment holds."""
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "STEP", "COUNT")]
    if not all(name in environment for name in names):
        return None
    task, first = (environment_int(environment, name) for name in names[:2])
    step, count = (environment_int(environment, name, least=1) for name in names[2:])
    index, rest = divmod(task - first, step)
    if rest or not 0 <= index < count:
        raise audio.AudioError("the Slurm array's task numbers are not evenly spaced: give --shard I/N")
    return index, count


def default_workers() -> int:
    """The cores that this process was given."""
    if "SLURM_CPUS_PER_TASK" in os.environ:
        return environment_int(os.environ, "SLURM_CPUS_PER_TASK", least=1)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------
# One song (runs in a worker process)


@dataclass(frozen=True)
class Settings:
    """What decides about the content of an array."""

    sample_rate: int
    channels: int
    chunk_seconds: float
    clip_seconds: float | None

    @property
    def chunk_samples(self) -> int:
        return round(self.chunk_seconds * self.sample_rate)


@dataclass(frozen=True)
class Song:
    source: str  # relative to the input folder, with '/'
    path: str
    array: Path

    @property
    def id(self) -> str:
        return self.array.stem


def song_id(source: str) -> str:
    """A readable name that no other file of the input folder has: 'my-song-0123456789'."""
    stem = unicodedata.normalize("NFKD", source.rsplit("/", 1)[-1].rsplit(".", 1)[0])
    slug = re.sub(r"[^a-z0-9]+", "-", stem.lower().encode("ascii", "ignore").decode()).strip("-")[:40]
    digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    return f"{slug or 'song'}-{digest}"


class Levels:
    """Peak, RMS and share of silent 100 ms frames of audio that comes in blocks."""

    def __init__(self, sample_rate: int):
        self.samples = 0
        self.peak = 0.0
        self._square_sum = 0.0
        self._values = 0
        self._frame_samples = sample_rate // SILENCE_FRAMES_PER_SECOND
        self._frames = self._silent_frames = 0
        self._rest: np.ndarray | None = None  # (channels, n), less than a frame

    def add(self, block: np.ndarray) -> None:
        """Count a block (channels, n)."""
        self.samples += block.shape[1]
        self.peak = max(self.peak, float(np.abs(block).max()))
        self._square_sum += float(np.square(block, dtype=np.float64).sum())
        self._values += block.size
        joined = block if self._rest is None else np.concatenate([self._rest, block], axis=1)
        frames = joined.shape[1] // self._frame_samples
        whole = frames * self._frame_samples
        self._rest = joined[:, whole:].copy()
        squares = np.square(joined[:, :whole]).reshape(len(joined), frames, self._frame_samples)
        self._frames += frames
        self._silent_frames += int((squares.mean(axis=(0, 2)) < 10 ** (SILENCE_DB / 10)).sum())

    @property
    def rms(self) -> float:
        return (self._square_sum / max(1, self._values)) ** 0.5

    @property
    def silent_share(self) -> float:
        return self._silent_frames / max(1, self._frames)


def process_song(song: Song, settings: Settings) -> dict:
    """Decode one file into its array and return its manifest line.

    Whatever is wrong with the input becomes a 'rejected' line; an OSError is trouble with the output.
    """
    line = blank_line(song)
    try:
        status = os.stat(song.path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block for ever
            return rejected(line, "unreadable: not a regular file")
        line |= {"size": status.st_size, "mtime": status.st_mtime_ns, "sha256": _sha256(song.path)}
    except OSError as error:
        return rejected(line, f"unreadable: {error.strerror}")
    try:
        notes = store_song(song, settings, line)
    except audio.FfmpegMissing as error:
        return rejected(line | {"mtime": None}, str(error))  # to be tried again, see is_done
    except audio.AudioError as error:
        return rejected(line, str(error))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a decoder's own bug must not stop the run
        return rejected(line | {"mtime": None}, f"decoder failed: {type(error).__name__}: {error}")
    return line | {"status": "ok", "reason": "; ".join(notes)}


def blank_line(song: Song) -> dict:
    return {
        "id": song.id,
        "source": song.source,
        "sha256": "",
        "status": "",
        "reason": "",
        "seconds": 0.0,
        "chunks": 0,
        "peak": 0.0,
        "rms": 0.0,
        "silent_share": 0.0,
        "fingerprint": "",
        "array_sha256": "",
        "input_folder": "",
        "size": 0,
        "mtime": None,
    }


def rejected(line: dict, reason: str) -> dict:
    return line | {"status": "rejected", "reason": reason, "chunks": 0}


def store_song(song: Song, settings: Settings, line: dict) -> list[str]:
    """Write the array of a song, fill in its line, return what is to be said about it.

    Raises AudioError, with no array left behind, when the song is of no use.
    """
    rate, chunk_samples = settings.sample_rate, settings.chunk_samples
    decoder = audio.Decoder(song.path, rate, settings.channels, settings.clip_seconds)
    levels, fingerprinter, digest = Levels(rate), audio.Fingerprinter(rate), hashlib.sha256()
    chunk, filled = np.empty((1, settings.channels, chunk_samples), np.int16), 0
    with files.ArrayWriter(song.array, np.int16, chunk.shape[1:]) as writer:
        for block in decoder:
            levels.add(block)
            fingerprinter.add(block)
            block = audio.to_int16(block)
            while block.shape[1]:
                part = block[:, : chunk_samples - filled]
                chunk[0, :, filled : filled + part.shape[1]] = part
                block, filled = block[:, part.shape[1] :], filled + part.shape[1]
                if filled == chunk_samples:
                    writer.append(chunk)
                    digest.update(chunk)
                    filled = 0
        line |= {"seconds": levels.samples / rate, "peak": levels.peak, "rms": levels.rms}
        line |= {"silent_share": levels.silent_share}
        notes = "".join(f"; {note}" for note in decoder.notes)
        if not writer.rows:
            raise audio.AudioError(f"shorter than one chunk: {line['seconds']:.2f} s{notes}")
        if levels.silent_share == 1:
            raise audio.AudioError(f"silent: never above {SILENCE_DB:g} dBFS{notes}")
        line |= {"chunks": writer.rows, "fingerprint": fingerprinter.result(), "array_sha256": digest.hexdigest()}
    too_short = ["shorter than two chunks: gives no pair"] if line["chunks"] == 1 else []
    return too_short + decoder.notes


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------
# Worker processes


def run_workers(songs: list[Song], settings: Settings, count: int, stop: signals.StopSignals) -> Iterator[tuple]:
    """Yield (song, line) as songs get done, in any order, until all are or `stop` was asked for.

    One pipe for each worker, so that a worker that dies takes down one song and nothing else: the song
    is tried a second time, and then rejected where its decoder crashed. Where the worker was killed from
    outside, the song is as it was: instead of a line comes how the worker ended. OSErrors of the workers
    (a full disk) are raised here.
    """
    from multiprocessing.connection import wait

    waiting = deque((song, 1) for song in songs)
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.song for worker in workers):
            if len(workers) < count and waiting:
                workers.append(_Worker(settings))
            for worker in workers:
                if waiting and worker.song is None:
                    worker.give(*waiting.popleft())
            wait([worker.pipe for worker in workers if worker.song], timeout=0.2)
            if stop.requested:
                return
            for worker in [worker for worker in workers if worker.song and worker.pipe.poll()]:
                song, attempt = worker.song, worker.attempt
                line = worker.take()
                if line is not None:
                    yield song, line
                    continue
                workers.remove(worker)
                if attempt == 1:
                    waiting.append((song, 2))
                elif -worker.process.exitcode in CRASHES:
                    yield song, rejected(blank_line(song), f"decoder crashed: {worker.how_it_ended()}")
                else:
                    yield song, worker.how_it_ended()
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.bury()


class _Worker:
    """A process that does one song at a time, seen from the parent."""

    def __init__(self, settings: Settings):
        import multiprocessing

        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()  # so that the worker's death ends the pipe
        self.song: Song | None = None
        self.attempt = 0

    def give(self, song: Song, attempt: int) -> None:
        self.song, self.attempt = song, attempt
        with suppress(OSError):  # it is dead already: take() will say so
            self.pipe.send(song)

    def take(self) -> dict | None:
        """The line of the song it was given; None when it died over it. Raises the OSError it had."""
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.bury()
            return None
        if isinstance(answer, BaseException):
            raise answer
        self.song = None
        return answer

    def bury(self) -> None:
        """End the process and remove what it had begun to write."""
        self.process.join(timeout=SECONDS_TO_END)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self.pipe.close()
        if self.song:
            files.remove_leftovers(self.song.array.parent)

    def how_it_ended(self) -> str:
        code = self.process.exitcode
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _work(pipe, settings: Settings) -> None:
    """The life of a worker process: songs in, lines out, until the parent hangs up or dies."""
    # Ctrl-C, Slurm's warning and a closed terminal reach every process; the parent decides.
    signals.ignore("SIGINT", "SIGUSR1", "SIGHUP")
    signals.exit_on_sigterm()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # mpg123 prints its opinion of every bad mp3 there, across the progress bar.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with suppress(EOFError):
        while True:
            song = pipe.recv()
            try:
                answer = process_song(song, settings)
            except OSError as error:
                answer = error
            pipe.send(answer)


def _end_with_parent() -> None:
    """End this process when its parent does, of SIGKILL too: an orphan would go on writing into the next run."""
    import multiprocessing

    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)  # as the parent would: temporaries are removed
    time.sleep(SECONDS_TO_END)
    os._exit(1)  # from a decoder that does not come back


# ---------------------------------------------------------------------------------------------------
# The output folder


def agree_on_meta(folder: Path, settings: Settings) -> None:
    """Write meta.json, or find there what this run would write. Raises AudioError when it differs."""
    meta = {
        "format": 1,
        "kind": "chunks",
        "sample_rate": settings.sample_rate,
        "channels": settings.channels,
        "chunk_samples": settings.chunk_samples,
        "dtype": "int16",
        "settings": {"chunk_seconds": settings.chunk_seconds, "clip_seconds": settings.clip_seconds},
    }
    path = folder / "meta.json"
    if not path.exists():
        files.write_first(path, json.dumps(meta, indent=2) + "\n")
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = _differences(there | there["settings"], meta | meta["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise audio.AudioError(f"{path} is damaged: {error}") from error
    if differing:
        raise audio.AudioError(f"{folder} was made with other settings ({differing}): take another folder")


def _differences(there: dict, here: dict) -> str:
    names = [name for name in here if name != "settings" and there.get(name) != here[name]]
    return ", ".join(f"{name} {there.get(name)}, not {here[name]}" for name in names)


def read_lines(path: Path) -> dict[str, dict]:
    """The lines of a manifest by source; a line that a crash tore is left out, so its song is redone."""
    lines = filter(None, files.read_jsonl(path))
    return {line["source"]: line for line in lines if isinstance(line.get("source"), str)}


def rewrite_lines(path: Path, lines: dict[str, dict]) -> None:
    files.write_atomic(path, "".join(json.dumps(lines[source]) + "\n" for source in sorted(lines)))


def append_line(path: Path, line: dict) -> None:
    """Append one line and wait until it is on the disk; on an error the file is as it was before."""
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        data = json.dumps(line).encode("ascii") + b"\n"
        try:
            if file.write(data) != len(data):
                raise OSError(f"{path}: the disk is full")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def is_done(line: dict | None, song: Song, settings: Settings, verify: bool = False) -> bool:
    """Whether a line is still true: the file is as it was, and so is its array, as far as the header tells or, to
    `verify`, the checksum. A line without mtime (no ffmpeg, a crash) never is: try again."""
    if line is None or line.get("mtime") is None:
        return False
    try:
        if not is_as_it_was(line, song):
            return False
        if line["status"] != "ok":
            return True
        array = data.open_array(song.array, np.int16, (settings.channels, settings.chunk_samples))
    except (OSError, data.DataError):
        return False
    if verify and line.get("array_sha256") != data.array_sha256(array):
        return False
    return len(array) == line["chunks"]


def is_as_it_was(line: dict, song: Song) -> bool:
    """Whether the file has the size and time of its line. Raises OSError when it cannot be seen."""
    status = os.stat(song.path)
    return (status.st_size, status.st_mtime_ns) == (line["size"], line["mtime"])


# ---------------------------------------------------------------------------------------------------
# The input folder


def find_songs(folder: Path, skipped_folder: Path) -> tuple[list[str], bool]:
    """(sources, complete): the relative paths of all audio files, sorted; whether all folders could be read.

    A file without the name of an audio file is one by its first bytes; such files are named to the user.
    Linked folders are followed, after all real ones, and each real folder is entered once.
    """
    seen = {os.path.realpath(skipped_folder)}
    folders, links = deque([""]), deque()
    sources, by_content, is_complete = [], [], True
    while folders or links:
        here = folders.popleft() if folders else links.popleft()
        real = os.path.realpath(os.path.join(folder, here))
        if real in seen:
            continue
        seen.add(real)
        try:
            names = sorted(os.listdir(real))
        except OSError as error:
            print(f"warning: folder {here!r} is left out: {error.strerror}", file=sys.stderr)
            is_complete = False
            continue
        for name in names:
            path, source = os.path.join(folder, here, name), f"{here}/{name}".lstrip("/")
            if os.path.isdir(path):
                (links if os.path.islink(path) else folders).append(source)
            elif os.path.splitext(name)[1].lower() in audio.AUDIO_SUFFIXES:
                sources.append(source)
            elif containers.begins_as_audio(path):
                by_content.append(source)
    if by_content:
        listed = ", ".join(repr(source) for source in sorted(by_content)[:LISTED_REJECTIONS])
        more = ", ..." if len(by_content) > LISTED_REJECTIONS else ""
        print(f"audio by content and not by name, read too: {len(by_content)} ({listed}{more})")
    return sorted(sources + by_content), is_complete


# ---------------------------------------------------------------------------------------------------
# The run


def check_folders(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise audio.AudioError(f"--input_folder {source} is not a folder")
    if source.resolve() == target.resolve():
        raise audio.AudioError("--input_folder and --output_folder must not be the same folder")
    if target.exists() and not target.is_dir():
        raise audio.AudioError(f"--output_folder {target} is not a folder")


def manifest_name(shard: tuple[int, int] | None) -> str:
    return f"manifest.{shard[0]}-of-{shard[1]}.jsonl" if shard else "manifest.jsonl"


def read_all_manifests(folder: Path, shard: tuple[int, int] | None) -> dict[str, dict]:
    """The lines of all shards, by source: when files are added, a song may come to another shard.

    Raises AudioError when the folder was filled with another number of shards.
    """
    names = [manifest_name((index, shard[1])) for index in range(shard[1])] if shard else [manifest_name(None)]
    for path in folder.glob("manifest*.jsonl"):
        if path.name not in names:
            raise audio.AudioError(f"{path} comes from a run with other shards: take another folder")
    lines = {}
    for name in names:
        lines |= read_lines(folder / name)
    return lines


@dataclass
class Plan:
    """What one run has to do, and what it knows already."""

    manifest: Path
    input_folder: str  # as the lines name it
    todo: list[Song]
    lines: dict[str, dict]  # of this shard, by source
    gone: list[dict]  # lines of files that are no longer there
    is_empty_shard: bool

    @property
    def mark(self) -> Path:
        return data.unfinished_mark(self.manifest)


def make_plan(args: argparse.Namespace, settings: Settings, shard: tuple[int, int] | None) -> Plan:
    """Compare the input folder with the manifests. Raises AudioError where it is another than they were made of."""
    folder, manifest = args.output_folder, args.output_folder / manifest_name(shard)
    known, own = read_all_manifests(folder, shard), read_lines(manifest)
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
    if not is_complete:  # a folder that cannot be read today: its songs may not be gone
        lines |= {line["source"]: line for line in gone}
        gone = []
    return Plan(manifest, here, todo, lines, gone, bool(sources) and not mine)


def check_input_folder(
    args: argparse.Namespace, known: dict[str, dict], sources: list[str], mine: list[Song]
) -> None:
    """Raise AudioError where songs would be lost because the output was made of another folder: one that is at
    another place, and lacks songs or has others of the same name. --other_input_folder asks for the loss."""
    folder = args.output_folder
    if known and known.keys().isdisjoint(sources) and not (sources and args.other_input_folder):
        raise audio.AudioError(
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
    lost |= {song.source for song in mine if song.source in of_others and is_another(of_others[song.source], song)}
    if lost and not args.other_input_folder:
        made_of = of_others[min(lost)]["input_folder"]
        raise audio.AudioError(
            f"{folder} was made of {made_of}, and {len(lost)} of its songs are not in {args.input_folder} "
            f"({listed(lost)}): take another output folder, or remove them by --other_input_folder"
        )


def is_another(line: dict, song: Song) -> bool:
    """Whether a file has another content than when its line was written."""
    try:
        return not is_as_it_was(line, song) and _sha256(song.path) != line["sha256"]
    except OSError:
        return True


def begin(plan: Plan) -> None:
    """Mark the set as unfinished, and drop the lines and arrays of files that are gone."""
    files.write_atomic(plan.mark, "")
    rewrite_lines(plan.manifest, plan.lines)
    for line in plan.gone:
        (plan.manifest.parent / f"{song_id(line['source'])}.npy").unlink(missing_ok=True)
    if removed := [line["source"] for line in plan.gone if line.get("status") == "ok"]:
        print(f"{len(removed)} songs are no longer in the input folder and were removed: {listed(removed)}")


def do_songs(plan: Plan, settings: Settings, workers: int, stop: signals.StopSignals) -> dict[str, str]:
    """Do what is to do; a song's manifest line is written as soon as the song is done.

    Returns how the worker ended, by source, for songs that are not done because somebody killed it.
    """
    from tqdm import tqdm

    started, seconds, undone = time.monotonic(), 0.0, {}
    results = run_workers(plan.todo, settings, workers, stop)
    with closing(results), tqdm(total=len(plan.todo), unit="song", disable=not plan.todo) as bar:
        for song, line in results:
            bar.update()
            if isinstance(line, str):
                undone[song.source] = line
                continue
            if line["status"] != "ok":
                song.array.unlink(missing_ok=True)  # of an earlier content of this file
            line["input_folder"] = plan.input_folder
            append_line(plan.manifest, line)
            plan.lines[song.source] = line
            seconds += line["seconds"]
            bar.set_postfix_str(f"{seconds / (time.monotonic() - started):.0f} x real time", refresh=False)
    return undone


def print_summary(args: argparse.Namespace, lines: dict[str, dict], kept: int) -> None:
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
    """Say which files are not done; `ends` is what `do_songs` returned."""
    print(
        f"error: {len(ends)} files are not done, for their worker process was killed: {listed(ends)} "
        f"({listed(set(ends.values()))}; out of memory?): run the same command again, perhaps with fewer --workers",
        file=sys.stderr,
    )


def plot_songs(args: argparse.Namespace, lines: dict[str, dict]) -> None:
    """Draw the first minute of a few songs, evenly spread over the sorted list."""
    from continuation import plots

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
    shard, workers = args.shard or shard_of_slurm_array(os.environ), args.workers or default_workers()
    if shard and not args.shard:
        print(f"shard {shard[0]}/{shard[1]}, from the Slurm array")
    check_folders(args.input_folder, args.output_folder)
    args.output_folder.mkdir(parents=True, exist_ok=True)
    agree_on_meta(args.output_folder, settings)
    lock = args.output_folder / f".{manifest_name(shard)}.lock"
    with files.locked(lock), signals.StopSignals(second_interrupt=False) as stop:
        plan = make_plan(args, settings, shard)
        kept = len(plan.lines)
        begin(plan)
        undone = do_songs(plan, settings, workers, stop)
        if stop.requested:
            print(f"interrupted with {len(plan.lines)} files done: run the same command again to go on")
            return INTERRUPTED
        rewrite_lines(plan.manifest, plan.lines)
        if undone:
            print_undone(undone)
            return 1
        plan.mark.unlink()
        print_summary(args, plan.lines, kept)
        if plan.is_empty_shard:
            print("this shard has no files")
            return 0
        if not any(line["status"] == "ok" for line in plan.lines.values()):
            if shard and plan.lines:  # all damaged; create_dataset.py refuses where no other shard has one either
                print("this shard has no usable audio file")
                return 0
            print(f"error: no usable audio file in {args.input_folder}", file=sys.stderr)
            return 1
        if args.plot:
            plot_songs(args, plan.lines)
    folder = shlex.quote(str(args.output_folder))
    print(f"next: python create_dataset.py --output_folder {folder} --dataset_folder DATASET")
    return 0


@steady_output()
def main(args: argparse.Namespace) -> int:
    try:
        return run(args)
    except (UsageError, audio.AudioError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write to {args.output_folder}: {error.strerror or error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(parse_args()))
