"""files.py: what is written is there whole or not at all, nothing else is touched, and one run works in a folder."""

from __future__ import annotations

import builtins
import errno
import multiprocessing
import os
import stat
import time

import numpy as np
import pytest
import synth

from continuation import audio, checkpoint, files, plots
from continuation.cli import UsageError

unix_only = pytest.mark.skipif(os.name == "nt", reason="needs fork, fcntl and kill")
RATE = 8000
X = synth.tone(440, 1, RATE, 2)


def write_array(path) -> None:
    with files.ArrayWriter(path, np.int16, (2,)) as writer:
        writer.append(np.ones((3, 2), np.int16))


WRITERS = {
    "x.json": lambda path: files.write_atomic(path, "new"),
    "x.npy": write_array,
    "x.wav": lambda path: audio.encode_audio(path, X, RATE),
    "x.mp3": lambda path: audio.encode_audio(path, X, RATE),
    "x.png": lambda path: plots.plot_waveforms(path, [("a", X)], RATE),
    "x.pt": lambda path: checkpoint.save(path, {"step": 1}),
}
GUESSES = ("{}.tmp", ".{}.tmp", f".{{}}.{os.getpid()}.tmp")


@pytest.mark.parametrize("name", WRITERS)
def test_only_the_file_itself_is_written_and_no_link_is_followed(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    links = [guess.format(name) for guess in GUESSES]
    for link in (*links, name):
        (tmp_path / link).symlink_to(victim)
    WRITERS[name](tmp_path / name)
    assert victim.read_text() == "precious"
    assert all((tmp_path / link).is_symlink() for link in links)
    assert (tmp_path / name).stat().st_size and not (tmp_path / name).is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"victim", name, *links}


@pytest.mark.parametrize("name", WRITERS)
def test_files_may_be_read_by_those_whom_the_umask_lets(tmp_path, name):
    before = os.umask(0o027)
    try:
        WRITERS[name](tmp_path / name)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_an_output_may_have_the_longest_name_that_a_file_can_have(tmp_path):
    files.write_atomic(tmp_path / ("x" * 255), "text")


def test_of_several_first_writers_one_wins_and_nothing_else_is_left(tmp_path):
    for text in ("first", "second"):
        files.write_first(tmp_path / "x", text)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["first"]


def test_first_writer_needs_no_hard_links(tmp_path, monkeypatch):
    def fail(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", fail)
    files.write_first(tmp_path / "x", "text")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["text"]


def started(function, *arguments) -> multiprocessing.Process:
    """A forked process that runs a function."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def forked(function, *arguments) -> None:
    started(function, *arguments).join()


def die_while_writing(path) -> None:
    with files.replacing(path) as file:
        file.write(b"half")
        os._exit(9)


def test_what_dead_runs_were_writing_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "below").mkdir()
    forked(die_while_writing, tmp_path / "x")
    forked(die_while_writing, tmp_path / "below" / "x")
    leftovers = list(tmp_path.rglob(".*.tmp"))
    assert len(leftovers) == 2
    for name in ("x", "user.tmp", ".short.tmp"):
        (tmp_path / name).write_text("user's")
    with files.replacing(tmp_path / "y") as file:
        file.write(b"in work")
        files.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"below", "x", "user.tmp", ".short.tmp", "y"}
    assert (tmp_path / "y").read_bytes() == b"in work"


def test_a_temporary_file_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock = files._lock

    def too_late(file):
        monkeypatch.setattr(files, "_lock", lock)
        files.remove_leftovers(tmp_path)
        lock(file)

    monkeypatch.setattr(files, "_lock", too_late)
    files.write_atomic(tmp_path / "x", "text")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["text"]


def test_array_writer_writes_what_numpy_reads(tmp_path):
    rows = np.random.default_rng(0).integers(-99, 99, (5, 2, 7)).astype(np.int16)
    with files.ArrayWriter(tmp_path / "x.npy", np.int16, (2, 7)) as writer:
        writer.append(rows[:2])
        assert not (tmp_path / "x.npy").exists()
        writer.append(rows[2:])
    there = np.load(tmp_path / "x.npy", mmap_mode="r", allow_pickle=False)
    np.testing.assert_array_equal(there, rows)
    assert (tmp_path / "x.npy").stat().st_size == files.NPY_HEADER_BYTES + rows.nbytes


def test_array_writer_refuses_rows_of_another_type_or_shape(tmp_path):
    with files.ArrayWriter(tmp_path / "x.npy", np.int16, (2, 7)) as writer:
        for rows in (np.zeros((1, 2, 7), np.float32), np.zeros((1, 2, 8), np.int16)):
            with pytest.raises(ValueError, match="rows are"):
                writer.append(rows)


class FullDisk:
    """Lets one file operation fail with ENOSPC."""

    def __init__(self, monkeypatch, operation: str):
        if operation == "fsync":
            monkeypatch.setattr(os, "fsync", self.fail)
        else:
            self.operation, self.open = operation, builtins.open
            monkeypatch.setattr(builtins, "open", self.failing_open)
            monkeypatch.setattr("io.open", self.failing_open)

    def fail(self, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def failing_open(self, path, mode="r", *args, **kwargs):
        if not set(mode) & set("wax"):
            return self.open(path, mode, *args, **kwargs)
        if self.operation == "open":
            self.fail()
        self.open(path, mode, *args, **kwargs).close()
        return self.open("/dev/full", "wb")


@pytest.mark.parametrize("operation", ["open", "write", "fsync"])
def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path, monkeypatch, operation):
    if operation == "write" and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    (tmp_path / "x.npy").write_text("old")
    (tmp_path / "x.json").write_text("old")
    with monkeypatch.context() as patch:
        FullDisk(patch, operation)
        with (
            pytest.raises(OSError, match="No space left"),
            files.ArrayWriter(tmp_path / "x.npy", np.int16, (9,)) as writer,
        ):
            writer.append(np.zeros((9999, 9), np.int16))
        with pytest.raises(OSError, match="No space left"):
            files.write_atomic(tmp_path / "x.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x.npy": "old", "x.json": "old"}


# One run per folder


def test_a_lock_is_held_by_one_and_clears_up(tmp_path):
    forked(die_while_writing, tmp_path / "x")
    with files.locked(tmp_path / ".lock"):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        with (
            pytest.raises(UsageError, match="folder in use: another run is working in"),
            files.locked(tmp_path / ".lock"),
        ):
            pass
    with files.locked(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize("is_dangling", [True, False])
def test_a_link_in_a_locks_place_is_refused_and_not_followed(tmp_path, is_dangling):
    victim = tmp_path / "victim"
    if not is_dangling:
        victim.write_text("precious")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(UsageError, match="is a link"), files.locked(tmp_path / ".lock"):
        pass
    assert victim.exists() != is_dangling
    assert is_dangling or victim.read_text() == "precious"


def hold_lock(folder, seconds, wait_seconds=0.0):
    try:
        with files.locked(folder / ".lock", wait_seconds):
            (folder / "held").touch()
            time.sleep(seconds)
    except UsageError:
        os._exit(42)


def wait_for(path):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@unix_only
def test_second_run_in_a_folder_is_refused_after_its_wait(tmp_path, capfd):
    with files.locked(tmp_path / ".lock"):
        second = started(hold_lock, tmp_path, 0.0, 0.3)
        second.join()
    assert second.exitcode == 42
    assert "waiting up to 0.3 s" in capfd.readouterr().err


@unix_only
def test_second_run_goes_on_when_the_first_ends_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_POLL_SECONDS", 0.05)
    first = started(hold_lock, tmp_path, 0.5)
    wait_for(tmp_path / "held")
    with files.locked(tmp_path / ".lock", 60):
        first.join(timeout=60)
        assert first.exitcode == 0


@unix_only
def test_killed_run_leaves_no_lock(tmp_path):
    first = started(hold_lock, tmp_path, 600)
    wait_for(tmp_path / "held")
    first.kill()
    first.join()
    with files.locked(tmp_path / ".lock"):
        pass


@unix_only
def test_lock_is_free_again_after_its_block(tmp_path):
    with files.locked(tmp_path / ".lock"):
        pass
    second = started(hold_lock, tmp_path, 0.0)
    second.join()
    assert second.exitcode == 0


def test_without_fcntl_the_run_goes_on_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "fcntl", None)
    with files.locked(tmp_path / ".lock"):
        pass
    assert capsys.readouterr().err.count("\n") == 1


@unix_only
def test_file_system_without_locks_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with files.locked(tmp_path / ".lock"):
        pass
    assert "not locked" in capsys.readouterr().err


@unix_only
def test_a_process_that_was_forked_meanwhile_does_not_hold_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_POLL_SECONDS", 0.05)
    with files.locked(tmp_path / ".lock"):
        worker = started(time.sleep, 60)
    with files.locked(tmp_path / ".lock", 60):
        pass
    worker.kill()
    worker.join()


# Lines of JSON


def test_lines_are_read_and_torn_ones_are_none(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n[1]\n{"a": \n\xff\n' + b"[" * 100_000 + b'\n{"b": 2}')
    assert files.read_jsonl(path) == [{"a": 1}, None, None, None, None, {"b": 2}]
    assert files.read_jsonl(tmp_path / "missing") == []
