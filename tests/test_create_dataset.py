"""create_dataset.py keeps every sample, splits by song, and refuses what is damaged."""

from __future__ import annotations

import base64
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

import audio
import create_dataset
import data

RATE, CHANNELS, SAMPLES = 1000, 2, 500
SCRIPT = Path(create_dataset.__file__)


def fingerprint(seed: int, error_share: float = 0.0, frames: int = 160) -> str:
    """Random signs, some of them turned over: what a copy's fingerprint looks like."""
    bits = np.random.default_rng(seed).choice([-1, 1], (frames, audio.FINGERPRINT_BANDS))
    wrong = np.random.default_rng(1000 + seed).random(bits.shape) < error_share
    bits = np.where(wrong, -bits, bits).astype(np.int8)
    return base64.b64encode(zlib.compress(bits.tobytes())).decode()


class Chunks:
    """A folder as preprocess.py leaves it behind."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.folder.mkdir(parents=True)
        self.lines: list[dict] = []
        meta = {"format": 1, "kind": "chunks", "sample_rate": RATE, "channels": CHANNELS}
        meta |= {"chunk_samples": SAMPLES, "dtype": "int16", "settings": {"chunk_seconds": 0.5}}
        (folder / "meta.json").write_text(json.dumps(meta))

    def add(self, name: str, rows: int = 4, quiet_rows: tuple[int, ...] = (), **line) -> None:
        rng = np.random.default_rng(list(name.encode()))
        chunks = rng.integers(-9000, 9000, (rows, CHANNELS, SAMPLES), dtype=np.int16)
        chunks[list(quiet_rows)] //= 9000
        np.save(self.folder / f"{name}.npy", chunks)
        fixed = {"id": name, "source": f"{name}.mp3", "sha256": name, "status": "ok", "reason": ""}
        fixed |= {"seconds": rows / 2, "chunks": rows, "peak": 0.3, "rms": 0.1, "silent_share": 0.0}
        self.lines.append(fixed | {"fingerprint": ""} | line)

    def add_many(self, first: int, last: int) -> None:
        for number in range(first, last):
            self.add(f"song{number:03}", rows=2 + number % 4)

    def write(self, shards: int = 0) -> None:
        self.lines.append({"id": "bad", "source": "bad.mp3", "status": "rejected", "reason": "no audio"})
        for index in range(shards or 1):
            name = f"manifest.{index}-of-{shards}.jsonl" if shards else "manifest.jsonl"
            lines = self.lines[index :: shards or 1]
            (self.folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.lines.pop()

    def array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy")


@pytest.fixture
def chunks(tmp_path: Path) -> Chunks:
    chunks = Chunks(tmp_path / "out")
    chunks.add_many(0, 12)
    chunks.write()
    return chunks


def run(chunks: Chunks, name: str = "ds", *flags: str) -> tuple[int, Path]:
    folder = chunks.folder.parent / name
    arguments = ["--output_folder", str(chunks.folder), "--dataset_folder", str(folder), *flags]
    return create_dataset.main(create_dataset.parse_args(arguments)), folder


def made(chunks: Chunks, name: str = "ds", *flags: str) -> tuple[dict, dict[str, data.Side]]:
    code, folder = run(chunks, name, *flags)
    assert code == 0
    return data.open_dataset(folder)


def refusal(chunks: Chunks, capsys, *flags: str, code: int = 2) -> str:
    """The sentence that says why there is no dataset."""
    capsys.readouterr()
    assert run(chunks, "ds", *flags)[0] == code
    assert not (chunks.folder.parent / "ds" / "meta.json").exists()
    return capsys.readouterr().err.splitlines()[-1]


def splits(meta: dict) -> dict[str, str]:
    return {song["id"]: song["split"] for song in meta["songs"]}


# ---- what is written


def test_every_sample_of_every_chunk_is_kept(chunks):
    _, sides = made(chunks)
    songs = [(side, song) for side in sides.values() for song in side.songs]
    assert sorted(song["id"] for _, song in songs) == [f"song{i:03}" for i in range(12)]
    for side, song in songs:
        rows = side.rows[song["first_row"] : song["first_row"] + song["rows"]]
        np.testing.assert_array_equal(rows, chunks.array(song["id"]))


def test_pairs_are_all_neighbours_within_a_song_and_no_others(chunks):
    for side in made(chunks)[1].values():
        ends = [(song["first_row"], song["first_row"] + song["rows"]) for song in side.songs]
        expected = [(row, row + 1) for first, end in ends for row in range(first, end - 1)]
        np.testing.assert_array_equal(side.pairs, expected)


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
    for side in made(chunks)[1].values():
        assert len(side.rows) == 5
        np.testing.assert_array_equal(side.pairs, [(0, 1), (3, 4)])


def test_min_rms_db_decides_what_is_quiet(tmp_path):
    chunks = Chunks(tmp_path / "out")
    for name in "abc":
        chunks.add(name, rows=3, quiet_rows=(1,))  # -1 and 0: about -93 dBFS
    chunks.write()
    assert len(made(chunks, "ds", "--min_rms_db", "-100")[1]["train"].pairs) == 2


def test_song_of_one_chunk_has_a_row_and_no_pair(chunks):
    chunks.add("short", rows=1)
    chunks.write()
    meta, sides = made(chunks)
    (song,) = [song for song in meta["songs"] if song["id"] == "short"]
    assert song["rows"] == 1
    assert song["first_row"] not in sides[song["split"]].pairs


def test_same_command_gives_the_same_bytes(chunks):
    _, first = run(chunks, "first")
    _, second = run(chunks, "second")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_summary_names_pairs_hours_and_dropped_pairs(chunks, capsys):
    chunks.add("pause", rows=4, quiet_rows=(1,))
    chunks.write()
    _, sides = made(chunks)
    out = capsys.readouterr().out
    assert f"train {len(sides['train'].songs):6} songs{len(sides['train'].pairs):8} pairs" in out
    assert "2 pairs dropped: input or target below -60 dBFS" in out


def test_picture_is_drawn_on_request(chunks, monkeypatch):
    import plots

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


# ---- the split


@pytest.mark.parametrize("seed", range(6))
def test_no_song_is_on_two_sides_and_every_side_has_pairs(chunks, seed):
    meta, sides = made(chunks, "ds", "--seed", str(seed))
    assert len({song["id"] for song in meta["songs"]}) == len(meta["songs"]) == 12
    seen = {name: {chunk.tobytes() for chunk in side.rows} for name, side in sides.items()}
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]
    assert all(len(side.pairs) for side in sides.values())


def test_fractions_are_kept_on_many_songs(tmp_path):
    chunks = Chunks(tmp_path / "out")
    for number in range(300):
        chunks.add(f"s{number}", rows=2)
    chunks.write()
    sides = list(splits(made(chunks, "ds", "--val_fraction", "0.2", "--test_fraction", "0.3")[0]).values())
    assert sides.count("val") == pytest.approx(60, abs=20)
    assert sides.count("test") == pytest.approx(90, abs=24)


@pytest.mark.parametrize("seed", range(4))
def test_known_songs_keep_their_side_when_songs_are_added(chunks, seed):
    before = splits(made(chunks, "ds", "--seed", str(seed))[0])
    chunks.add_many(12, 40)
    chunks.write()
    after = splits(made(chunks, "ds", "--seed", str(seed))[0])
    assert len(after) == 40
    assert before.items() <= after.items()


def test_known_songs_keep_their_side_in_a_new_folder_too(tmp_path):
    chunks = Chunks(tmp_path / "out")
    chunks.add_many(0, 40)  # enough that no side is empty, and none must lend
    chunks.write()
    before = splits(made(chunks, "first")[0])
    chunks.add_many(40, 80)
    chunks.write()
    assert before.items() <= splits(made(chunks, "second")[0]).items()


def test_another_val_fraction_leaves_the_test_songs_alone(tmp_path):
    chunks = Chunks(tmp_path / "out")
    chunks.add_many(0, 40)
    chunks.write()
    few, many = (made(chunks, "ds", "--val_fraction", share)[1]["test"].songs for share in ("0.1", "0.4"))
    assert [song["id"] for song in few] == [song["id"] for song in many]


def test_another_seed_draws_another_split(chunks):
    assert splits(made(chunks)[0]) != splits(made(chunks, "ds", "--seed", "1")[0])


def test_near_duplicates_stay_on_one_side(tmp_path, capsys):
    chunks = Chunks(tmp_path / "out")
    for number in range(20):
        chunks.add(f"a{number}", fingerprint=fingerprint(number))
        chunks.add(f"b{number}", fingerprint=fingerprint(number, error_share=0.15))
    chunks.write()
    meta, _ = made(chunks, "ds", "--val_fraction", "0.3", "--test_fraction", "0.3")
    sides = splits(meta)
    assert all(sides[f"a{number}"] == sides[f"b{number}"] for number in range(20))
    groups = {song["id"]: song["group"] for song in meta["songs"]}
    assert all(groups[f"a{number}"] == groups[f"b{number}"] == f"a{number}" for number in range(20))
    out = capsys.readouterr().out
    assert "20 groups of the same music" in out
    assert "'a7.mp3', 'b7.mp3'" in out


def test_chain_of_matches_is_one_group(tmp_path):
    chunks = Chunks(tmp_path / "out")
    chunks.add("c", sha256="x", fingerprint=fingerprint(1))
    chunks.add("b", sha256="x", fingerprint=fingerprint(2))
    chunks.add("a", fingerprint=fingerprint(2))
    chunks.add_many(0, 3)
    chunks.write()
    groups = {song["id"]: song["group"] for song in made(chunks)[0]["songs"]}
    assert [groups[name] for name in "abc"] == ["a", "a", "a"]
    assert len(set(groups.values())) == 4


def test_group_that_was_trained_on_stays_in_train(tmp_path, capsys):
    chunks = Chunks(tmp_path / "out")
    chunks.add_many(0, 30)
    chunks.write()
    before = splits(made(chunks)[0])
    tested, trained = (next(k for k, side in before.items() if side == name) for name in ("test", "train"))
    for line in chunks.lines:
        if line["id"] in (tested, trained):
            line["sha256"] = "the same"
    chunks.write()
    after = splits(made(chunks)[0])
    assert after[tested] == after[trained] == "train"
    assert f"1 songs came to another side than before: '{tested}.mp3'" in capsys.readouterr().out


def test_fewer_than_three_different_songs_are_refused(tmp_path, capsys):
    chunks = Chunks(tmp_path / "out")
    chunks.add("a", sha256="x")
    chunks.add("b", sha256="x")
    chunks.add("c")
    chunks.add("one-chunk", rows=1)
    chunks.add("silent", quiet_rows=(0, 1, 2, 3))
    chunks.write()
    assert "2 different songs have a usable pair, 3 are needed" in refusal(chunks, capsys)


def test_three_songs_give_one_to_each_side(tmp_path):
    chunks = Chunks(tmp_path / "out")
    for name in "abc":
        chunks.add(name)
    chunks.write()
    for seed in range(8):
        sides = splits(made(chunks, f"ds{seed}", "--seed", str(seed), "--test_fraction", "0.8")[0])
        assert sorted(sides.values()) == ["test", "train", "val"]


# ---- damaged and incomplete input


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
    assert data.read_meta(chunks.folder, "chunks")


# ---- trouble while writing


def leftovers(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_size_is_printed_and_checked_against_the_free_space_before_writing(chunks, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(create_dataset.shutil, "disk_usage", lambda path: usage(10**6, 10**6, 5000))
    assert "only 0.00 GB are free" in refusal(chunks, capsys, code=1)
    assert leftovers(chunks.folder.parent / "ds") == []


@pytest.mark.parametrize("broken_row", [0, 5, 30])
def test_full_disk_leaves_the_old_dataset_and_nothing_else(chunks, capsys, monkeypatch, broken_row):
    before = made(chunks)[0]
    files = leftovers(chunks.folder.parent / "ds")
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
    assert data.open_dataset(folder)[0] == before
    assert leftovers(folder) == files


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
    with pytest.raises(data.DataError, match="has not finished"):
        data.open_dataset(chunks.folder.parent / "ds")
    assert len(made(chunks)[0]["songs"]) == 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_exits_with_75_and_leaves_the_old_dataset(chunks, number):
    before = made(chunks)[0]
    folder = chunks.folder.parent / "ds"
    files = leftovers(folder)
    code = (
        "import signal, sys, time, audio, create_dataset\n"
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
        assert process.wait(timeout=20) == 75
    assert data.open_dataset(folder)[0] == before
    assert leftovers(folder) == files


def test_what_a_killed_run_left_behind_is_cleared_away(chunks):
    remains = chunks.folder.parent / "ds" / "unfinished"
    remains.mkdir(parents=True)
    (remains / "train.npy.tmp").write_bytes(b"half")
    made(chunks)
    assert not remains.exists()


def test_command_line_works_as_documented(chunks):
    folder = chunks.folder.parent / "ds"
    command = [sys.executable, str(SCRIPT), "--output_folder", str(chunks.folder)]
    done = subprocess.run([*command, "--dataset_folder", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"next: python train.py --dataset_folder {folder}" in done.stdout
    assert len(data.open_dataset(folder)[0]["songs"]) == 12
