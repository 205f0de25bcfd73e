"""Atomic writing of files, checked reading of arrays and JSON lines, and the lock of a folder.

    files.write_atomic("scores/scorecard.json", text)
    with files.replacing("song.wav") as file: ...
    rows = files.open_array("train.npy", np.int16)
    with files.locked("scores/.lock"): ...

A file is written under a unique name beside its target, so that no link, input or other run's file is ever written
to. It is locked while its writer lives, so that `remove_leftovers` can tell what killed runs left behind.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import struct
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from continuation.cli import UsageError, print_note

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NPY_HEADER_BYTES = 128
LOCK_POLL_SECONDS = 1
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")


# Writing


@contextmanager
def temporary_file(folder: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yield a new, empty, locked file in `folder`; it is deleted afterwards unless it was renamed."""
    path, file = _create(Path(folder))
    try:
        yield file
    finally:
        with suppress(OSError):  # on a full disk this fails again
            file.close()
        path.unlink(missing_ok=True)


def _create(folder: Path) -> tuple[Path, BinaryIO]:
    while True:
        path = folder / f".{uuid.uuid4().hex}.tmp"
        file = open(path, "xb")  # noqa: SIM115 (closed by temporary_file)
        with suppress(OSError):  # a file system without locks
            _lock(file)
        if path.exists():  # else `remove_leftovers` of another run saw it before it was locked
            return path, file
        file.close()


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yield a new file, to be written by its handle or its name: on success it is fsynced and renamed to `path`.

    On an error `path` is as it was and nothing is left behind. A link at `path` is replaced, not followed.
    """
    path = Path(path)
    with temporary_file(path.parent) as file:
        yield file
        sync(file)
        if os.name == "nt":  # Windows renames no open file
            file.close()
        os.replace(file.name, path)


def sync(file: BinaryIO) -> None:
    """Flush an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: str | os.PathLike) -> None:
    """Flush the renames in a folder to the disk (not on Windows, where folders cannot be opened)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomic(path: str | os.PathLike, text: str) -> None:
    """Write text as UTF-8; `path` has the old or the new content at every moment, never a part of it."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_first(path: str | os.PathLike, text: str) -> None:
    """Write text as UTF-8 to `path` unless the file exists: exactly one of several simultaneous runs does."""
    path = Path(path)
    with temporary_file(path.parent) as file:
        file.write(text.encode("utf-8"))
        sync(file)
        try:
            os.link(file.name, path)  # unlike a rename, it succeeds in exactly one of them
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            file.close()
            os.replace(file.name, path)


class ArrayWriter:
    """Writer of an .npy file, row by row: `with ArrayWriter(path, np.int16, (2, 240000)) as w: w.append(rows)`.

    The file gets its name on a clean exit, with the final row count in its header, fsynced; on any error nothing is
    left behind. It uses plain writes, because a writable memory map dies of SIGBUS on a full disk.
    """

    def __init__(self, path: str | os.PathLike, dtype: np.typing.DTypeLike, row_shape: tuple[int, ...]):
        self.path = Path(path)
        self.dtype = np.dtype(dtype)
        self.row_shape = tuple(row_shape)
        self.rows = 0

    def __enter__(self) -> ArrayWriter:
        with ExitStack() as stack:
            self._file = stack.enter_context(replacing(self.path))
            self._file.write(self._header())
            stack.push(self._complete)
            self._cleanup = stack.pop_all()
        return self

    def append(self, rows: np.ndarray) -> None:
        """Append rows (n, *row_shape) of exactly this dtype."""
        if rows.dtype != self.dtype or rows.shape[1:] != self.row_shape:
            raise ValueError(f"rows are {rows.dtype} {rows.shape[1:]}, not {self.dtype} {self.row_shape}")
        self._file.write(np.ascontiguousarray(rows).data)
        self.rows += len(rows)

    def __exit__(self, *failure) -> None:
        self._cleanup.__exit__(*failure)

    def _complete(self, kind, error, trace) -> None:
        if kind is None:
            self._file.seek(0)
            self._file.write(self._header())

    def _header(self) -> bytes:
        """Make the .npy version 1.0 header, padded to a fixed size so that it can be rewritten in place."""
        fields = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.rows, *self.row_shape)}
        prefix = b"\x93NUMPY\x01\x00" + struct.pack("<H", NPY_HEADER_BYTES - 10)
        return prefix + repr(fields).encode("ascii").ljust(NPY_HEADER_BYTES - 11) + b"\n"


# Reading


def refuse_pipe(path: Path) -> None:
    """Raise UsageError for a named pipe: opening it would block."""
    with suppress(OSError):  # opening the file raises it too
        if path.is_fifo():
            raise UsageError(f"{path} is a named pipe, not a file")


def open_array(
    path: str | os.PathLike, dtype: np.typing.DTypeLike, row_shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """Open an .npy file as a read-only memory map (n, *row_shape) of this dtype.

    Raises UsageError for anything else: no .npy, pickled objects, another type or shape, or a file shorter or longer
    than its header says (reading past its end would kill the process).
    """
    path = Path(path)
    refuse_pipe(path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise UsageError(f"{path} is missing") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # numpy's header parser raises many kinds of errors for garbage
        raise UsageError(f"{path} is damaged, or no plain array: {error}") from error
    if array.dtype != np.dtype(dtype):
        raise UsageError(f"{path} holds {array.dtype}, not {np.dtype(dtype)}")
    if array.ndim < 1 or (row_shape is not None and array.shape[1:] != tuple(row_shape)):
        raise UsageError(f"{path} has the shape {array.shape}, not (n, {', '.join(map(str, row_shape or ()))})")
    if not array.flags.c_contiguous or path.stat().st_size != array.offset + array.nbytes:
        raise UsageError(f"{path} is damaged: its size does not fit its header")
    return array


def array_sha256(rows: np.ndarray) -> str:
    """Compute the SHA-256 of the bytes of an array, read row by row."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.ascontiguousarray(row))
    return digest.hexdigest()


def read_jsonl(path: str | os.PathLike) -> list[dict | None]:
    """Read a file of one JSON object per line; None for a damaged line, as left by a crash. A missing file has no
    lines."""
    path = Path(path)
    return [_json_object(line) for line in path.read_bytes().splitlines()] if path.is_file() else []


def _json_object(text: bytes) -> dict | None:
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        return value if isinstance(value, dict) else None
    return None


# Locks


@contextmanager
def locked(path: str | os.PathLike, wait_seconds: float = 0) -> Iterator[None]:
    """Hold the lock file `path`, so that no other run works in its folder, and remove what killed runs left there.

    It waits up to `wait_seconds` for another run (a requeued job may overlap its predecessor), and raises UsageError
    if that still holds the lock. A lock ends with its process; the file stays. Where locks are not supported, one
    line is printed and the run continues.
    """
    path = Path(path)
    with open_lock(path) as file:
        if hasattr(os, "register_at_fork"):  # else a child, such as a data worker, would hold it too
            os.register_at_fork(after_in_child=file.close)
        _wait_for_lock(file, path.parent, wait_seconds)
        remove_leftovers(path.parent)
        yield


def _wait_for_lock(file: BinaryIO, folder: Path, wait_seconds: float) -> None:
    deadline = time.monotonic() + wait_seconds
    is_told = False
    while not _try_lock(file, folder):
        if time.monotonic() >= deadline:
            raise UsageError(f"folder in use: another run is working in {folder}")
        if not is_told:
            print_note(f"another run is working in {folder}, waiting up to {wait_seconds:g} s")
            is_told = True
        time.sleep(min(LOCK_POLL_SECONDS, max(0.0, deadline - time.monotonic())))


def _try_lock(file: BinaryIO, folder: Path) -> bool:
    """Try to lock the file; return False while another run holds the lock."""
    if fcntl is None:
        print_note(f"note: {folder} is not locked against a second run, this system has no fcntl")
        return True
    try:
        _lock(file)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        print_note(f"note: {folder} is not locked against a second run ({error.strerror})")
    return True


def open_lock(path: str | os.PathLike) -> BinaryIO:
    """Open a lock file, or make it, without changing its content; UsageError for a link."""
    if os.path.islink(path):
        raise UsageError(f"{path} is a link, and a lock must be a file: delete it")
    # A link that appears only now is an OSError: O_NOFOLLOW, which Windows does not have.
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666), "r+b")


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Delete what killed runs were writing in `folder` and below; nothing where locks are not supported."""
    if fcntl is None:
        return
    for parent, _, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in names if _TEMPORARY.fullmatch(name)):
            with suppress(OSError), open(path, "rb+") as file:
                _lock(file)
                os.unlink(path)


def _lock(file: BinaryIO) -> None:
    """Lock an open file until it is closed; BlockingIOError when it is locked already. Does nothing on Windows."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
