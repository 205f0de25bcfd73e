"""The worker processes of preprocess.py: each decodes one song at a time into its array and manifest line.

    for song, line in run_workers(songs, settings, count, stop): ...

A decoder that crashes ends its worker process alone, and the run continues.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
import stat
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from continuation import audio, files, signals
from continuation.fingerprint import Fingerprinter
from continuation.signals import StopSignals

SILENCE_DB = -60.0
SILENCE_FRAMES_PER_SECOND = 10
# Signals by which a bug in a decoder ends a process; any other end (out of memory, an operator) is not the song's
# fault.
CRASHES = frozenset(
    getattr(signal, n) for n in ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT") if hasattr(signal, n)
)
SECONDS_TO_END = 5  # for a worker process, before it is killed


# One song


@dataclass(frozen=True)
class Settings:
    """Settings that the content of an array depends on."""

    sample_rate: int
    channels: int
    chunk_seconds: float
    clip_seconds: float | None

    @property
    def chunk_samples(self) -> int:
        return round(self.chunk_seconds * self.sample_rate)


@dataclass(frozen=True)
class Song:
    """An input file, and the array made from it."""

    source: str  # relative to the input folder, with '/'
    path: str
    array: Path

    @property
    def id(self) -> str:
        return self.array.stem


def song_id(source: str) -> str:
    """Make a readable name that is unique in the input folder: 'my-song-0123456789'."""
    stem = unicodedata.normalize("NFKD", source.rsplit("/", 1)[-1].rsplit(".", 1)[0])
    slug = re.sub(r"[^a-z0-9]+", "-", stem.lower().encode("ascii", "ignore").decode()).strip("-")[:40]
    digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    return f"{slug or 'song'}-{digest}"


class LevelMeter:
    """Meter of peak, RMS and the share of silent 100 ms frames of audio that comes in blocks."""

    def __init__(self, sample_rate: int):
        self.samples = 0
        self.peak = 0.0
        self._square_sum = 0.0
        self._values = 0
        self._frame_samples = sample_rate // SILENCE_FRAMES_PER_SECOND
        self._frames = self._silent_frames = 0
        self._rest: np.ndarray | None = None  # (channels, n), less than a frame

    def add(self, block: np.ndarray) -> None:
        """Add a block (channels, n)."""
        self.samples += block.shape[1]
        self.peak = max(self.peak, float(np.abs(block).max()))
        self._square_sum += float(np.linalg.norm(block)) ** 2  # a dot product, without a copy in float64
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

    Any problem with the input gives a 'rejected' line; an OSError means that the output cannot be written.
    """
    line = blank_line(song)
    try:
        status = os.stat(song.path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
            return rejected(line, "unreadable: not a regular file")
        line |= {"size": status.st_size, "mtime": status.st_mtime_ns, "sha256": file_sha256(song.path)}
    except OSError as error:
        return rejected(line, f"unreadable: {error.strerror}")
    try:
        notes = store_song(song, settings, line)
    except audio.FfmpegMissing as error:
        return rejected(line | {"mtime": None}, str(error))  # so that the next run tries again
    except audio.AudioError as error:
        return rejected(line, str(error))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a bug in a decoder must not stop the run
        return rejected(line | {"mtime": None}, f"decoder failed: {type(error).__name__}: {error}")
    return line | {"status": "ok", "reason": "; ".join(notes)}


def blank_line(song: Song) -> dict:
    """Return the manifest line of a song that has not been read yet."""
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
    """Return the manifest line of a song that is rejected."""
    return line | {"status": "rejected", "reason": reason, "chunks": 0}


def store_song(song: Song, settings: Settings, line: dict) -> list[str]:
    """Write the array of a song, fill in its manifest line, and return notes on what is unusual.

    Raises AudioError, with no array left behind, when the song cannot be used.
    """
    rate, chunk_samples = settings.sample_rate, settings.chunk_samples
    decoder = audio.Decoder(song.path, rate, settings.channels, settings.clip_seconds)
    levels, fingerprinter, digest = LevelMeter(rate), Fingerprinter(rate), hashlib.sha256()
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


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


# Worker processes


def run_workers(songs: list[Song], settings: Settings, count: int, stop: StopSignals) -> Iterator[tuple]:
    """Yield (song, line) as songs are done, in any order, until all are done or a stop is requested.

    Every worker has its own pipe, so that a worker that dies affects one song only: the song is tried a second time,
    and then rejected if its decoder crashed. If the worker was killed from outside, the song is not done, and instead
    of its line a description of the worker's end is yielded. OSErrors of the workers (a full disk) are raised here.
    """
    waiting = deque((song, 1) for song in songs)
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.song for worker in workers):
            for worker in workers:
                if waiting and worker.song is None:
                    worker.give(*waiting.popleft())
            while waiting and len(workers) < count:
                workers.append(_Worker(settings))
                workers[-1].give(*waiting.popleft())
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
            worker.end()


class _Worker:
    """A process that does one song at a time, seen from the parent."""

    def __init__(self, settings: Settings):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the worker
        self.song: Song | None = None
        self.attempt = 0

    def give(self, song: Song, attempt: int) -> None:
        self.song, self.attempt = song, attempt
        with suppress(OSError):  # it has died: `take` returns None
            self.pipe.send(song)

    def take(self) -> dict | None:
        """Return the line of the given song, None if the worker has died. Raises the worker's OSError."""
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.end()
            return None
        if isinstance(answer, BaseException):
            raise answer
        self.song = None
        return answer

    def end(self) -> None:
        """Wait for the process to end, kill it after SECONDS_TO_END, and remove its unfinished files."""
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
    """Run a worker process: songs in, lines out, until the parent closes the pipe or dies."""
    # Ctrl-C, Slurm's warning and a closed terminal signal every process; the parent decides.
    signals.ignore("SIGINT", "SIGUSR1", "SIGHUP")
    signals.exit_on_sigterm()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # mpg123 prints warnings about damaged mp3s to stderr, across the progress bar.
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
    """End this process when its parent ends, even by SIGKILL: an orphan would keep writing during the next run."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)  # as the parent would: temporary files are removed
    time.sleep(SECONDS_TO_END)
    os._exit(1)  # in case a decoder does not return
