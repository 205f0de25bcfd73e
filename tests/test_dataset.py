"""What is read is what lies on the disk; what is damaged is refused with a sentence, never executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from chunks import random_fingerprint

from continuation import dataset, files
from continuation.cli import UsageError

CHANNELS, SAMPLES = 2, 50
SONG_ROWS = {"train": (3, 4), "val": (2,), "test": (1, 2)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset whose sample values count up from 0 within each split."""
    songs = []
    for split, song_rows in SONG_ROWS.items():
        rows = sum(song_rows)
        np.save(tmp_path / f"{split}.npy", counting(rows))
        pairs, first_row = [], 0
        for number, count in enumerate(song_rows):
            name = f"{split}{number}"
            songs.append({"id": name, "source": f"{name}.mp3", "split": split, "group": name})
            songs[-1] |= {"first_row": first_row, "rows": count}
            pairs += [(row, row + 1) for row in range(first_row, first_row + count - 1)]
            first_row += count
        np.save(tmp_path / f"{split}_pairs.npy", np.array(pairs, np.int64))
    meta = {"format": 1, "kind": "dataset", "sample_rate": 100, "channels": CHANNELS}
    meta |= {"chunk_samples": SAMPLES, "dtype": "int16", "settings": {}, "songs": songs}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path


def counting(rows: int) -> np.ndarray:
    return np.arange(rows * CHANNELS * SAMPLES, dtype=np.int16).reshape(rows, CHANNELS, SAMPLES)


def edit_meta(folder: Path, **changes) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_song(folder: Path, **changes) -> None:
    songs = json.loads((folder / "meta.json").read_text())["songs"]
    songs[1] |= changes
    edit_meta(folder, songs=songs)


def test_open_dataset_returns_the_three_splits_as_written(folder):
    meta, splits = dataset.open_dataset(folder)
    assert meta["sample_rate"] == 100
    assert list(splits) == ["train", "val", "test"]
    for name, split in splits.items():
        assert split.name == name
        assert [song["rows"] for song in split.songs] == list(SONG_ROWS[name])
        np.testing.assert_array_equal(split.rows, counting(sum(SONG_ROWS[name])))
    np.testing.assert_array_equal(splits["train"].pairs, [(0, 1), (1, 2), (3, 4), (4, 5), (5, 6)])


def test_rows_are_a_memory_map_that_cannot_be_written(folder):
    rows = dataset.open_dataset(folder)[1]["train"].rows
    assert isinstance(rows, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 0


@pytest.mark.parametrize("start", [0, 1, 49, 50, 75, 100])
@pytest.mark.parametrize("length", [0, 1, 50, 51, 100])
def test_window_crosses_row_borders_and_equals_the_joined_song(folder, start, length):
    split = dataset.open_dataset(folder)[1]["train"]
    whole = np.concatenate(counting(7)[3:], axis=1)  # (channels, samples) of the second song
    window = dataset.read_window(split, split.songs[1], start, length)
    assert window.dtype == np.int16
    np.testing.assert_array_equal(window, whole[:, start : start + length])


def test_window_is_a_copy(folder):
    split = dataset.open_dataset(folder)[1]["train"]
    window = dataset.read_window(split, split.songs[0], 0, SAMPLES)
    window[:] = -1
    assert split.rows[0, 0, 0] == 0


@pytest.mark.parametrize(("start", "length"), [(-1, 10), (0, 151), (150, 1), (149, 2)])
def test_window_outside_the_song_is_refused(folder, start, length):
    split = dataset.open_dataset(folder)[1]["train"]
    with pytest.raises(UsageError, match="no samples"):
        dataset.read_window(split, split.songs[0], start, length)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_object_array(path: Path, bomb: Bomb) -> None:
    np.save(path, np.array([bomb], dtype=object), allow_pickle=True)


def write_pickle(path: Path, bomb: Bomb) -> None:
    path.write_bytes(pickle.dumps(bomb))


@pytest.mark.parametrize("write", [write_object_array, write_pickle])
def test_pickled_array_is_refused_and_never_executed(folder, write):
    mark = folder / "executed"
    write(folder / "train.npy", Bomb(mark))
    with pytest.raises(UsageError, match=r"train\.npy is damaged, or no plain array"):
        dataset.open_dataset(folder)
    assert not mark.exists()


def test_array_cut_short_is_refused(folder):
    path = folder / "val.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"val\.npy"):
        dataset.open_dataset(folder)


def test_array_with_something_appended_is_refused(folder):
    path = folder / "val.npy"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UsageError, match="size does not fit"):
        dataset.open_dataset(folder)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("train.npy", counting(7).astype(np.int32)),
        ("train.npy", counting(7).astype(">i2")),
        ("train.npy", counting(7)[:, :1]),
        ("train.npy", np.int16(3)),
        ("train.npy", np.asfortranarray(counting(7))),
        ("train.npy", counting(6)),
        ("train_pairs.npy", np.array([(0, 2)])),
        ("train_pairs.npy", np.array([(2, 3)])),  # the end of one song, the beginning of the next
        ("train_pairs.npy", np.array([(6, 7)])),
        ("train_pairs.npy", np.array([(-1, 0)])),
        ("train_pairs.npy", np.array([(0, 1)], np.int32)),
        ("train_pairs.npy", np.zeros((0, 2), np.int64)),
    ],
)
def test_array_that_does_not_fit_is_refused_by_name(folder, name, array):
    np.save(folder / name, array)
    with pytest.raises(UsageError, match=name.split(".")[0]):
        dataset.open_dataset(folder)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{", b"\0" * 500])
def test_garbage_instead_of_an_array_is_refused(tmp_path, content):
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.npy is damaged"):
        files.open_array(path, np.int16)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "[" * 100_000, "\udcff"])
def test_damaged_meta_is_refused(folder, text):
    (folder / "meta.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=r"meta\.json"):
        dataset.open_dataset(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"kind": "chunks"},
        {"sample_rate": "100"},
        {"sample_rate": 0},
        {"channels": True},
        {"chunk_samples": 12.5},
        {"dtype": "float32"},
        {"settings": None},
        {"songs": {}},
        {"songs": [1]},
        {"songs": []},
    ],
)
def test_meta_with_a_wrong_value_is_refused(folder, changes):
    edit_meta(folder, **changes)
    with pytest.raises(UsageError):
        dataset.open_dataset(folder)


@pytest.mark.parametrize(
    "changes", [{"split": "trial"}, {"first_row": 2}, {"rows": 5}, {"rows": 0}, {"id": 7}, {"group": None}]
)
def test_song_with_a_wrong_value_is_refused(folder, changes):
    edit_song(folder, **changes)
    with pytest.raises(UsageError):
        dataset.open_dataset(folder)


@pytest.mark.parametrize(
    "id", ["../../x", "/x", "a/b", "a\\b", "..", ".x", "", "a\n", "a b", "a\0", "x" * 101, "\udcff", "-x", "é"]
)
def test_id_after_which_no_file_may_be_called_is_refused(folder, id):
    edit_song(folder, id=id)
    with pytest.raises(UsageError, match=r"meta\.json is damaged: id '") as caught:
        dataset.open_dataset(folder)
    assert str(caught.value).isprintable()


def test_id_that_two_songs_have_is_refused(folder):
    edit_song(folder, id="train0")
    with pytest.raises(UsageError, match="two songs have the same id"):
        dataset.open_dataset(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("name", ["meta.json", "train.npy", "val_pairs.npy"])
def test_named_pipe_is_refused_at_once(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UsageError, match="named pipe"):
        dataset.open_dataset(folder)


def test_folder_without_meta_is_refused_by_saying_who_writes_it(tmp_path):
    with pytest.raises(UsageError, match=r"create_dataset\.py has not finished"):
        dataset.open_dataset(tmp_path)


# The same song in another dataset


def entry(name: str, content: int, **changes) -> dict:
    """A song whose file and music are `content`."""
    return {"id": name, "group": name, "sha256": f"{content}", "fingerprint": random_fingerprint(content)} | changes


def known(songs: list[dict], others: list[dict]) -> dict[str, list[str]]:
    return {group: [song["id"] for song in found] for group, found in dataset.known_by_group(songs, others).items()}


def test_a_song_is_known_by_its_file_whatever_it_is_called():
    assert known([entry("a", 1), entry("b", 2)], [entry("x", 2), entry("y", 3)]) == {"a": [], "b": ["x"]}


def test_a_song_is_known_by_its_music_when_it_was_encoded_anew():
    anew = entry("a", 1, sha256="another", fingerprint=random_fingerprint(1, 0.15))
    others = [entry(f"x{number}", number) for number in range(40)]
    assert known([anew, entry("b", 99)], others) == {"a": ["x1"], "b": []}


def test_the_name_of_a_song_that_is_another_tells_nothing():
    assert known([entry("a", 1)], [entry("a", 2)]) == {"a": []}


@pytest.mark.parametrize("key", ["sha256", "fingerprint"])
@pytest.mark.parametrize("is_old", ["the dataset", "the other"])
def test_where_the_content_is_not_told_the_name_counts(key, is_old):
    songs, others = [entry("a", 1)], [entry("a", 2)]
    del (songs if is_old == "the dataset" else others)[0][key]
    assert known(songs, others) == {"a": ["a"]}


def test_songs_of_one_group_are_known_together():
    songs = [entry("a", 1), entry("b", 2, group="a"), entry("c", 3)]
    assert known(songs, [entry("x", 2), entry("y", 1)]) == {"a": ["y", "x"], "c": []}


def test_a_damaged_fingerprint_is_refused():
    with pytest.raises(UsageError, match="damaged fingerprint"):
        dataset.known_by_group([entry("a", 1)], [entry("b", 2, fingerprint="AAAA")])


def test_content_of_a_wrong_type_is_refused(folder):
    edit_song(folder, sha256=3)
    with pytest.raises(UsageError, match="'sha256' is '3'"):
        dataset.open_dataset(folder)


def test_the_checksum_of_an_array_is_that_of_its_bytes():
    rows = counting(3)
    assert files.array_sha256(rows) == hashlib.sha256(rows.tobytes()).hexdigest()


def test_a_dataset_is_the_same_where_an_earlier_version_did_not_tell_its_contents():
    old = {"songs": [{"id": "a"}, {"id": "b"}], "sample_rate": 100}
    new = {"songs": [song | {"sha256": song["id"], "fingerprint": ""} for song in old["songs"]], "sample_rate": 100}
    changed = new | {"songs": [song | {"sha256": "x"} for song in new["songs"]]}
    for one, other, is_same in ((old, new, True), (new, new, True), (new, changed, False)):
        assert dataset.is_same_dataset(one, other) == dataset.is_same_dataset(other, one) == is_same
    assert not dataset.is_same_dataset(old, new | {"sample_rate": 200})
    assert not dataset.is_same_dataset(old, new | {"songs": new["songs"][:1]})
