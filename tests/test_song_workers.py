"""One song becomes one array and one manifest line; a worker process that dies takes down its song alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import synth
from preprocessing import (
    RATE,
    SETTINGS,
    command,
    contents,
    make_songs,
    manifest,
    preprocess_here,
    process,
    wait_for,
)

import preprocess
from continuation import audio, song_workers
from continuation.signals import StopSignals

# What is stored


def test_the_array_holds_the_decoded_song_in_whole_chunks_and_drops_the_rest(tmp_path):
    path = synth.write(tmp_path / "x.flac", synth.song(0, 3.7, 44100), 44100)
    line = process(path)
    chunks = np.load(tmp_path / "x.npy", allow_pickle=False)
    whole = audio.to_int16(audio.load_audio(path, RATE, 2))
    assert chunks.shape == (3, 2, RATE)
    assert chunks.dtype == np.int16
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), whole[:, : 3 * RATE])
    assert (line["status"], line["chunks"], line["seconds"]) == ("ok", 3, 3.7)


def test_peak_rms_and_silent_share_are_those_of_the_signal(tmp_path):
    x = np.concatenate([synth.tone(500, 3, RATE, 2, level=0.5), np.zeros((2, RATE), np.float32)], axis=1)
    line = process(synth.write(tmp_path / "x.wav", x, RATE, subtype="FLOAT"))
    assert line["peak"] == pytest.approx(0.5, abs=1e-3)
    assert line["rms"] == pytest.approx(0.5 * (0.5 * 3 / 4) ** 0.5, abs=1e-4)
    assert line["silent_share"] == 0.25


def test_clip_seconds_takes_the_beginning_only(tmp_path):
    path = synth.write(tmp_path / "x.wav", synth.song(0, 5, RATE), RATE)
    whole = process(path)
    all_chunks = np.load(tmp_path / "x.npy")
    clipped = process(path, song_workers.Settings(RATE, 2, 1.0, clip_seconds=2.5))
    assert (whole["seconds"], clipped["seconds"], clipped["chunks"]) == (5.0, 2.5, 2)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), all_chunks[:2])


def test_a_long_song_needs_no_more_memory_than_a_short_one(tmp_path):
    path = synth.write(tmp_path / "x.wav", synth.tone(300, 600, RATE), RATE, subtype="PCM_U8")
    process(synth.write(tmp_path / "warm_up.wav", synth.tone(300, 2, RATE), RATE))
    tracemalloc.start()
    line = process(path, song_workers.Settings(12000, 2, 10.0, None))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    float_bytes = 600 * 12000 * 2 * 4
    assert line["chunks"] == 60
    assert peak_bytes < float_bytes / 4


def test_ids_are_readable_and_differ_for_one_name_in_two_folders():
    assert song_workers.song_id("a/Für Elise (live).mp3").startswith("fur-elise-live-")
    assert song_workers.song_id("a/x.mp3") != song_workers.song_id("b/x.mp3")
    assert song_workers.song_id("日本.mp3").startswith("song-")
    assert song_workers.song_id(os.fsdecode(b"caf\xe9.mp3")).startswith("caf-")
    assert len(song_workers.song_id("x" * 300 + ".mp3")) == 40 + 1 + 10


# Worker processes


class Poison(song_workers.Song):
    """A song that kills the worker process that touches it, by a crash."""

    signal = signal.SIGSEGV

    @property
    def id(self) -> str:
        if multiprocessing.parent_process():
            os.kill(os.getpid(), self.signal)
        return super().id


def test_all_workers_have_a_song_before_any_is_waited_for(tmp_path, monkeypatch):
    folder = make_songs(tmp_path / "songs", 3)
    songs = [song_workers.Song(path.name, str(path), tmp_path / f"{path.stem}.npy") for path in folder.iterdir()]
    waited_for = []
    wait = song_workers.wait
    monkeypatch.setattr(
        song_workers, "wait", lambda pipes, **more: waited_for.append(len(pipes)) or wait(pipes, **more)
    )
    assert len(list(song_workers.run_workers(songs, SETTINGS, 3, StopSignals()))) == 3
    assert waited_for[0] == 3


@pytest.mark.slow
def test_a_file_that_kills_its_worker_twice_is_rejected_and_the_others_are_done(tmp_path):
    folder = make_songs(tmp_path / "songs", 2)
    names = ["song 0.wav", "poison.wav", "song 1.wav"]
    kinds = [song_workers.Song, Poison, song_workers.Song]
    songs = [
        kind(name, str(folder / name), tmp_path / f"{name}.npy") for kind, name in zip(kinds, names, strict=True)
    ]
    done = song_workers.run_workers(songs, SETTINGS, 1, StopSignals())
    reasons = {song.source: (line["status"], line["reason"]) for song, line in done}
    assert reasons == {
        "song 0.wav": ("ok", ""),
        "song 1.wav": ("ok", ""),
        "poison.wav": ("rejected", "decoder crashed: signal 11"),
    }


class Victim(Poison):
    """A song whose worker process is killed from outside."""

    signal = signal.SIGKILL


@pytest.mark.slow
def test_a_song_whose_worker_is_killed_from_outside_is_not_rejected_but_tried_again(tmp_path, monkeypatch, capsys):
    folder, out = make_songs(tmp_path / "songs", 3), tmp_path / "out"
    run_workers = preprocess.run_workers

    def with_a_victim(songs, *rest):
        kinds = [Victim if song.source == "song 1.wav" else song_workers.Song for song in songs]
        victims = [kind(song.source, song.path, song.array) for kind, song in zip(kinds, songs, strict=True)]
        return run_workers(victims, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "run_workers", with_a_victim)
        assert preprocess_here(folder, out) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "1 files are not done, for their worker process was killed: 'song 1.wav' ('signal 9'" in said
    assert list(manifest(out)) == ["song 0.wav", "song 2.wav"]
    assert (out / "manifest.jsonl.unfinished").exists()
    assert preprocess_here(folder, out) == 0
    assert [line["status"] for line in manifest(out).values()] == ["ok"] * 3
    assert not (out / "manifest.jsonl.unfinished").exists()


def test_a_worker_without_memory_tells_nothing_about_its_song(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(song_workers, "store_song", fail)
    with pytest.raises(MemoryError):
        process(synth.write(tmp_path / "x.wav", synth.song(0, 3, RATE), RATE))


@pytest.fixture
def orphan(tmp_path):
    """(folder, its output, process id of a worker in the middle of a song, whose parent was killed while it slept)"""
    if not Path("/proc/self/task").exists():
        pytest.skip("this system has no /proc")
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    synth.write(folder / "long.wav", synth.noise(0, 1200, RATE), RATE, subtype="PCM_U8")
    running = subprocess.Popen(command(folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: any(size > 10**5 for size in sizes(out.glob(".*.tmp"))))
    [worker] = workers_of(running.pid)
    os.kill(worker, signal.SIGSTOP)
    running.kill()
    running.wait()
    yield folder, out, worker
    if is_running(worker):
        os.kill(worker, signal.SIGKILL)


def sizes(paths: Iterable[Path]) -> Iterator[int]:
    """Of those that are still there: a temporary file may go at any moment."""
    for path in paths:
        with suppress(FileNotFoundError):
            yield path.stat().st_size


@pytest.mark.slow
def test_an_orphaned_worker_ends_at_once_and_leaves_nothing(orphan):
    _, out, worker = orphan
    os.kill(worker, signal.SIGCONT)
    wait_for(lambda: not is_running(worker))
    assert not [path for path in out.iterdir() if path.suffix in (".npy", ".tmp")]


@pytest.mark.slow
def test_an_orphaned_worker_that_outlives_the_next_run_changes_nothing(orphan, no_workers):
    folder, out, worker = orphan
    assert preprocess_here(folder, out) == 0
    done = contents(out)
    assert len(done) == 4
    os.kill(worker, signal.SIGCONT)
    wait_for(lambda: not is_running(worker))
    assert contents(out) == done


@pytest.mark.slow
def test_what_a_killed_worker_was_writing_is_removed_by_the_next_run(orphan, no_workers):
    folder, out, worker = orphan
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not is_running(worker))
    assert list(out.glob(".*.tmp"))
    assert preprocess_here(folder, out) == 0
    assert not list(out.glob(".*.tmp"))


def workers_of(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    """Its first thread may be a zombie while others still hold its files, and so their locks."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    except (FileNotFoundError, ProcessLookupError):  # the latter when it goes between opening and reading
        return False
    return state != "Z" or threads > 1
