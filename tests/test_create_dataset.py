"""create_dataset.py keeps every sample, splits by song, and refuses what is damaged."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
from chunks import CHANNELS, RATE, SAMPLES, Chunks, made, refusal, run, split_by_id

import create_dataset
from continuation import files
from continuation.cli import UsageError
from continuation.dataset import open_dataset, read_meta

SCRIPT = Path(create_dataset.__file__)

# What is written


def test_every_sample_of_every_chunk_is_kept(chunks):
    _, splits = made(chunks)
    songs = [(split, song) for split in splits.values() for song in split.songs]
    assert sorted(song["id"] for _, song in songs) == [f"song{i:03}" for i in range(12)]
    for split, song in songs:
        rows = split.rows[song["first_row"] : song["first_row"] + song["rows"]]
        np.testing.assert_array_equal(rows, chunks.array(song["id"]))


def test_pairs_are_all_neighbours_within_a_song_and_no_others(chunks):
    for split in made(chunks)[1].values():
        ends = [(song["first_row"], song["first_row"] + song["rows"]) for song in split.songs]
        expected = [(row, row + 1) for first, end in ends for row in range(first, end - 1)]
        np.testing.assert_array_equal(split.pairs, expected)


def test_meta_carries_the_chunks_format_and_all_settings(chunks):
    meta, _ = made(chunks, "ds", "--seed", "3", "--min_rms_db", "-50")
    assert (meta["sample_rate"], meta["channels"], meta["chunk_samples"]) == (RATE, CHANNELS, SAMPLES)
    assert meta["settings"] == {
        "val_fraction": 0.1,
        "test_fraction": 0.1,
        "min_rms_db": -50.0,
        "seed": 3,
        "chunks": {"chunk_seconds": 0.5},
    }


def test_pair_with_a_quiet_half_is_dropped_and_its_rows_are_kept(tmp_path):
    chunks = Chunks(tmp_path / "out")
    for name in "abc":
        chunks.add(name, rows=5, quiet_rows=(2,))
    chunks.write()
    for split in made(chunks)[1].values():
        assert len(split.rows) == 5
        np.testing.assert_array_equal(split.pairs, [(0, 1), (3, 4)])


def test_min_rms_db_decides_what_is_quiet(tmp_path):
    chunks = Chunks(tmp_path / "out")
    for name in "abc":
        chunks.add(name, rows=3, quiet_rows=(1,))  # -1 and 0: about -93 dBFS
    chunks.write()
    assert len(made(chunks, "ds", "--min_rms_db", "-100")[1]["train"].pairs) == 2


def test_song_of_one_chunk_has_a_row_and_no_pair(chunks):
    chunks.add("short", rows=1)
    chunks.write()
    meta, splits = made(chunks)
    (song,) = [song for song in meta["songs"] if song["id"] == "short"]
    assert song["rows"] == 1
    assert song["first_row"] not in splits[song["split"]].pairs


def test_same_command_gives_the_same_bytes(chunks):
    _, first = run(chunks, "first")
    _, second = run(chunks, "second")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_summary_names_pairs_hours_and_dropped_pairs(chunks, capsys):
    chunks.add("pause", rows=4, quiet_rows=(1,))
    chunks.write()
    _, splits = made(chunks)
    out = capsys.readouterr().out
    assert f"train {len(splits['train'].songs):6} songs{len(splits['train'].pairs):8} pairs" in out
    assert "2 pairs dropped: input or target below -60 dBFS" in out


def test_picture_is_drawn_on_request(chunks, monkeypatch):
    from continuation import plots

    drawn = {}
    monkeypatch.setattr(create_dataset, "tempo_bpm", lambda song, meta: 120.0)
    monkeypatch.setattr(plots, "plot_dataset", lambda path, rows: drawn.update({path: rows}))
    _, folder = run(chunks, "ds", "--plot")
    rows = drawn[folder / "dataset.png"]
    assert len(rows) == 12
    assert sum(row["hours"] for row in rows) == pytest.approx(sum(2 + i % 4 for i in range(12)) / 2 / 3600)
    assert rows[0] | {"split": "", "hours": 0} == {
        "split": "",
        "hours": 0,
        "rms_db": pytest.approx(-20.0),
        "silent_share": 0.0,
        "tempo_bpm": 120.0,
    }


# Damaged and incomplete input


def test_all_shards_are_read(chunks):
    (chunks.folder / "manifest.jsonl").unlink()
    chunks.write(shards=3)
    assert len(made(chunks)[0]["songs"]) == 12


def test_missing_shard_is_refused_by_name(chunks, capsys):
    (chunks.folder / "manifest.jsonl").unlink()
    chunks.write(shards=3)
    (chunks.folder / "manifest.1-of-3.jsonl").unlink()
    assert "lacks manifest.1-of-3.jsonl" in refusal(chunks, capsys)


@pytest.mark.parametrize("other", ["manifest.0-of-1.jsonl", "manifest-copy.jsonl"])
def test_manifests_of_different_runs_are_refused(chunks, capsys, other):
    (chunks.folder / other).write_bytes((chunks.folder / "manifest.jsonl").read_bytes())
    assert "manifests of different runs" in refusal(chunks, capsys)


def test_song_in_two_shards_is_refused(chunks, capsys):
    (chunks.folder / "manifest.jsonl").unlink()
    chunks.lines.append(chunks.lines[0] | {"source": "moved.mp3"})
    chunks.write(shards=5)
    assert "song000 is in two manifests" in refusal(chunks, capsys)


def test_folder_without_manifest_is_refused(chunks, capsys):
    (chunks.folder / "manifest.jsonl").unlink()
    assert "holds no manifest" in refusal(chunks, capsys)


def test_folder_that_preprocess_did_not_write_is_refused(chunks, capsys):
    (chunks.folder / "meta.json").write_text("{}")
    assert "does not describe a folder that preprocess.py wrote" in refusal(chunks, capsys)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"status": "ok"}', '{"status": 3}', "[" * 100_000],
)
def test_damaged_manifest_line_is_refused_with_its_number(chunks, capsys, text):
    path = chunks.folder / "manifest.jsonl"
    path.write_text(path.read_text() + text)
    assert "manifest.jsonl, line 14, is damaged" in refusal(chunks, capsys)


@pytest.mark.parametrize("name", ["../out/song000", "", "a\nb", "/etc/passwd"])
def test_id_that_is_no_plain_name_is_refused(chunks, capsys, name):
    chunks.lines[0]["id"] = name
    chunks.write()
    assert "line 1, is damaged: id" in refusal(chunks, capsys)


def test_damaged_fingerprint_is_refused(chunks, capsys):
    chunks.lines[0]["fingerprint"] = "AAAA"
    chunks.write()
    assert "damaged fingerprint" in refusal(chunks, capsys)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, CHANNELS, SAMPLES), np.float32),
        np.zeros((2, 1, SAMPLES), np.int16),
        np.zeros((2, CHANNELS, SAMPLES + 1), np.int16),
        np.zeros((3, CHANNELS, SAMPLES), np.int16),
        np.zeros((0, CHANNELS, SAMPLES), np.int16),
        np.zeros(5, np.int16),
    ],
)
def test_array_that_does_not_fit_its_manifest_line_is_refused_by_name(chunks, capsys, array):
    np.save(chunks.folder / "song000.npy", array)
    assert "song000.npy" in refusal(chunks, capsys)


def test_missing_array_is_refused_by_name(chunks, capsys):
    (chunks.folder / "song003.npy").unlink()
    assert "song003.npy is missing" in refusal(chunks, capsys)


def test_array_cut_short_is_refused_by_name(chunks, capsys):
    path = chunks.folder / "song001.npy"
    path.write_bytes(path.read_bytes()[:-100])
    assert "song001.npy is damaged" in refusal(chunks, capsys)


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_array_is_refused_and_never_executed(chunks, capsys, tmp_path):
    for name in ("song000", "song001"):
        bomb = Bomb(tmp_path / "executed")
        path = chunks.folder / f"{name}.npy"
        if name == "song000":
            np.save(path, np.array([bomb, bomb], dtype=object), allow_pickle=True)
        else:
            path.write_bytes(pickle.dumps(bomb))
        assert f"{name}.npy is damaged" in refusal(chunks, capsys)
        np.save(path, np.ones((2, CHANNELS, SAMPLES), np.int16))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--val_fraction", "1"],
        ["--test_fraction", "-0.1"],
        ["--val_fraction", "nan"],
        ["--val_fraction", "0.5", "--test_fraction", "0.5"],
    ],
)
def test_impossible_fractions_are_wrong_usage(chunks, flags):
    with pytest.raises(SystemExit) as stopped:
        run(chunks, "ds", *flags)
    assert stopped.value.code == 2


def test_dataset_in_the_chunk_folder_itself_is_refused(chunks):
    assert run(chunks, "out")[0] == 2
    assert read_meta(chunks.folder, "chunks")


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_dataset_in_whose_place_a_file_is_is_refused(chunks, capsys, name):
    (chunks.folder.parent / "file").touch()
    assert run(chunks, name)[0] == 2
    assert "error: --dataset_folder: a file is in the place of the folder" in capsys.readouterr().err


@pytest.mark.parametrize("shards", [0, 3])
def test_an_unfinished_run_of_preprocess_is_refused(chunks, capsys, shards):
    (chunks.folder / "manifest.jsonl").unlink()
    chunks.write(shards=shards)
    mark = chunks.folder / ("manifest.1-of-3.jsonl.unfinished" if shards else "manifest.jsonl.unfinished")
    mark.touch()
    assert f"{mark} says that songs are missing" in refusal(chunks, capsys)
    mark.unlink()
    made(chunks)


def test_an_array_whose_samples_have_changed_is_refused(chunks, capsys):
    for line in chunks.lines:
        line["array_sha256"] = files.array_sha256(chunks.array(line["id"]))
    chunks.write()
    made(chunks, "whole")
    array = chunks.array("song004")
    array[-1, -1, -1] ^= 1
    np.save(chunks.folder / "song004.npy", array)
    assert "song004.npy is damaged: its checksum is another one; run preprocess.py with --verify" in (
        refusal(chunks, capsys)
    )


# Before writing


def test_dry_run_prints_the_split_that_the_run_makes_and_writes_nothing(chunks, capsys):
    folder = chunks.folder.parent / "ds"
    assert run(chunks, "ds", "--dry_run")[0] == 0
    planned = capsys.readouterr().out.splitlines()
    assert not folder.exists()
    made(chunks)
    done = capsys.readouterr().out.splitlines()
    assert planned[:-1] == done[:-1]
    assert planned[-1] == "dry run: nothing is written"


def test_dry_run_over_a_dataset_says_what_would_change_and_leaves_it(chunks, capsys):
    made(chunks)
    folder = chunks.folder.parent / "ds"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    chunks.lines = chunks.lines[:-2]
    chunks.write()
    capsys.readouterr()
    assert run(chunks, "ds", "--dry_run")[0] == 0
    assert "2 songs of the dataset that was here before are gone" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("is_dry", [False, True])
def test_dataset_folder_below_a_file_is_refused(chunks, capsys, is_dry):
    (chunks.folder.parent / "file").touch()
    assert run(chunks, "file/ds", *(["--dry_run"] if is_dry else []))[0] == 2
    assert "--dataset_folder: a file is in the place of the folder" in capsys.readouterr().err


# Trouble while writing


def leftovers(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock")


def test_size_is_printed_and_checked_against_the_free_space_before_writing(chunks, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(create_dataset.shutil, "disk_usage", lambda path: usage(10**6, 10**6, 5000))
    assert "only 0.00 GB are free" in refusal(chunks, capsys, code=1)
    assert leftovers(chunks.folder.parent / "ds") == []


@pytest.mark.parametrize("broken_row", [0, 5, 30])
def test_full_disk_leaves_the_old_dataset_and_nothing_else(chunks, capsys, monkeypatch, broken_row):
    before = made(chunks)[0]
    there = leftovers(chunks.folder.parent / "ds")
    chunks.add_many(12, 20)
    chunks.write()
    append, calls = files.ArrayWriter.append, iter(range(1000))

    def full(self, rows):
        if next(calls) == broken_row:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, rows)

    monkeypatch.setattr(files.ArrayWriter, "append", full)
    code, folder = run(chunks)
    assert code == 1
    assert "No space left on device" in capsys.readouterr().err
    assert open_dataset(folder)[0] == before
    assert leftovers(folder) == there


@pytest.mark.slow
def test_file_size_limit_is_a_clear_error(chunks):
    folder = chunks.folder.parent / "ds"
    code = (
        "import resource, signal, sys, create_dataset\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "sys.exit(create_dataset.main(create_dataset.parse_args()))"
    )
    command = [sys.executable, "-c", code]
    command += ["--output_folder", str(chunks.folder), "--dataset_folder", str(folder)]
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "File too large" in done.stderr
    assert leftovers(folder) == []


def test_crash_while_files_change_place_leaves_no_dataset_that_could_be_mistaken(chunks, monkeypatch):
    made(chunks)
    chunks.add_many(12, 20)
    chunks.write()
    replace, calls = Path.replace, iter(range(100))

    def crash(self, target):
        if next(calls) == 3:
            raise OSError("the plug was pulled")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        assert run(chunks)[0] == 1
    with pytest.raises(UsageError, match="has not finished"):
        open_dataset(chunks.folder.parent / "ds")
    assert len(made(chunks)[0]["songs"]) == 20


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_exits_with_75_and_leaves_the_old_dataset(chunks, number):
    before = made(chunks)[0]
    folder = chunks.folder.parent / "ds"
    there = leftovers(folder)
    code = (
        "import signal, sys, time, create_dataset\n"
        "from continuation import files\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs start ignoring it
        "append = files.ArrayWriter.append\n"
        "files.ArrayWriter.append = lambda *a: (append(*a), print('row', flush=True), time.sleep(0.5))\n"
        "sys.exit(create_dataset.main(create_dataset.parse_args()))"
    )
    command = [sys.executable, "-c", code, "--seed", "5"]
    command += ["--output_folder", str(chunks.folder), "--dataset_folder", str(folder)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=SCRIPT.parent, **options) as process:
        while process.stdout.readline() != "row\n":
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=120) == 75
    assert open_dataset(folder)[0] == before
    assert leftovers(folder) == there


def test_what_a_killed_run_left_behind_is_cleared_away(chunks):
    remains = chunks.folder.parent / "ds" / "unfinished"
    remains.mkdir(parents=True)
    (remains / "train.npy.tmp").write_bytes(b"half")
    made(chunks)
    assert not remains.exists()


@pytest.mark.slow
def test_command_line_works_as_documented(chunks):
    folder = chunks.folder.parent / "ds"
    command = [sys.executable, str(SCRIPT), "--output_folder", str(chunks.folder)]
    done = subprocess.run([*command, "--dataset_folder", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"next: python train.py --dataset_folder {folder}" in done.stdout
    assert len(open_dataset(folder)[0]["songs"]) == 12


# Kills, and what they leave


def forked(function, *arguments) -> int:
    """The exit code of a process that runs a function."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def run_and_die(chunks: Chunks, calls: int) -> None:
    """Be killed at the given one of all calls that make, rename or remove something on the disk."""

    def counted(real):
        def call(*arguments, **options):
            nonlocal calls
            calls -= 1
            if calls < 0:
                os._exit(9)
            return real(*arguments, **options)

        return call

    for name in ("mkdir", "replace", "unlink", "rmdir", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    os._exit(run(chunks)[0])


@pytest.mark.slow
def test_killed_anywhere_it_leaves_a_whole_dataset_or_none_and_no_split_is_lost(tmp_path):
    chunks = Chunks(tmp_path / "out")
    chunks.add_many(0, 8)
    chunks.write()
    before = made(chunks)[0]
    template, folder = tmp_path / "template", tmp_path / "ds"
    folder.rename(template)
    chunks.add_many(8, 12)
    chunks.write()
    ends = Counter()
    for calls in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        code = forked(run_and_die, chunks, calls)
        try:
            meta = open_dataset(folder)[0]
            ends["old" if meta == before else "new"] += 1
            assert meta == before or len(meta["songs"]) == 12
        except UsageError as error:
            assert "has not finished there" in str(error)
            ends["none"] += 1
        after = made(chunks)[0]
        assert split_by_id(before).items() <= split_by_id(after).items()
        assert leftovers(folder) == leftovers(template)
        if code == 0:
            break
    assert min(ends[end] for end in ("old", "new", "none")) > 1


def test_the_space_of_a_killed_run_is_free_before_space_is_checked(chunks, monkeypatch):
    made(chunks)
    folder = chunks.folder.parent / "ds"
    used = sum(path.stat().st_size for path in folder.glob("*.npy"))
    remains = folder / "unfinished"
    remains.mkdir()
    (remains / "train.npy").write_bytes(bytes(used))
    (remains / f".{'0' * 32}.tmp").write_bytes(bytes(used))
    usage = namedtuple("usage", "total used free")

    def just_fits(path):
        taken = sum(path.stat().st_size for path in folder.rglob("*"))
        return usage(0, 0, 2 * used + 30_000 - taken)

    monkeypatch.setattr(create_dataset.shutil, "disk_usage", just_fits)
    made(chunks)


def test_a_second_run_in_the_same_folder_is_refused(chunks, capsys):
    made(chunks)
    folder = chunks.folder.parent / "ds"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with files.locked(folder / ".lock"):
        assert run(chunks)[0] == 2
    assert "folder in use: another run is working in" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("meta", "sentence"), [(None, "which songs were for training is lost"), ("{", "is damaged"), ("", "is damaged")]
)
def test_splits_that_cannot_be_read_are_not_drawn_anew(chunks, capsys, meta, sentence):
    made(chunks)
    path = chunks.folder.parent / "ds" / "meta.json"
    path.unlink() if meta is None else path.write_text(meta)
    assert run(chunks)[0] == 2
    assert sentence in capsys.readouterr().err
    assert path.exists() == (meta is not None)


def test_the_folder_of_another_script_is_not_overwritten(chunks, capsys):
    other = Chunks(chunks.folder.parent / "ds")
    before = leftovers(other.folder)
    assert run(chunks)[0] == 2
    assert "does not describe a folder that create_dataset.py wrote" in capsys.readouterr().err
    assert leftovers(other.folder) == before
