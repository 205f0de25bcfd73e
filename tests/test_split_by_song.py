"""create_dataset.py splits by song: no music is in two splits, and what was known stays where it was."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from chunks import CHANNELS, SAMPLES, Chunks, made, random_fingerprint, refusal, split_by_id

from continuation.dataset import SPLITS, open_dataset


@pytest.mark.parametrize("seed", range(6))
def test_no_song_is_in_two_splits_and_every_split_has_pairs(chunks, seed):
    meta, splits = made(chunks, "ds", "--seed", str(seed))
    assert len({song["id"] for song in meta["songs"]}) == len(meta["songs"]) == 12
    seen = {name: {chunk.tobytes() for chunk in split.rows} for name, split in splits.items()}
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]
    assert all(len(split.pairs) for split in splits.values())


def shares(meta: dict) -> dict[str, float]:
    """Of all rows, by split."""
    rows = {split: sum(song["rows"] for song in meta["songs"] if song["split"] == split) for split in SPLITS}
    return {split: count / sum(rows.values()) for split, count in rows.items()}


def largest_share(meta: dict) -> float:
    """Of all rows, in one group."""
    groups = Counter()
    for song in meta["songs"]:
        groups[song["group"]] += song["rows"]
    return max(groups.values()) / groups.total()


@pytest.mark.parametrize("seed", range(5))
def test_splits_have_the_hours_that_were_asked_for_but_for_one_group(tmp_path, seed):
    chunks = Chunks(tmp_path / "out")
    for number in range(80):  # of 1 to 12 chunks; every ninth is the same music as the one before
        same = number - (number % 9 == 8)
        chunks.add(f"s{number:02}", rows=1 + number * number % 12, sha256=str(same))
    chunks.write()
    flags = ("--val_fraction", "0.1", "--test_fraction", "0.3", "--seed", str(seed))
    meta = made(chunks, "ds", *flags)[0]
    assert shares(meta) == pytest.approx({"train": 0.6, "val": 0.1, "test": 0.3}, abs=largest_share(meta))


def test_a_group_larger_than_its_split_is_for_training(tmp_path):
    chunks = Chunks(tmp_path / "out")
    chunks.add_many(0, 20)
    chunks.add("long", rows=100)
    chunks.write()
    for seed in range(10):
        assert split_by_id(made(chunks, f"ds{seed}", "--seed", str(seed))[0])["long"] == "train"


def test_splits_come_back_to_their_shares_when_songs_are_added(tmp_path):
    chunks = Chunks(tmp_path / "out")
    chunks.add_many(0, 3)
    chunks.write()
    known = split_by_id(made(chunks)[0])
    for last in (10, 40, 80):
        chunks.add_many(len(chunks.lines), last)
        chunks.write()
        meta = made(chunks)[0]
        assert known.items() <= split_by_id(meta).items()
        known = split_by_id(meta)
    assert shares(meta) == pytest.approx({"train": 0.8, "val": 0.1, "test": 0.1}, abs=largest_share(meta))


@pytest.mark.parametrize("seed", range(4))
def test_known_songs_keep_their_split_when_songs_are_added(chunks, seed):
    before = split_by_id(made(chunks, "ds", "--seed", str(seed))[0])
    chunks.add_many(12, 40)
    chunks.write()
    after = split_by_id(made(chunks, "ds", "--seed", str(seed))[0])
    assert len(after) == 40
    assert before.items() <= after.items()


def rename(chunks: Chunks, line: dict, **changes) -> None:
    """As if the song's file were at another place now."""
    new = f"moved-{line['id']}"
    (chunks.folder / f"{line['id']}.npy").rename(chunks.folder / f"{new}.npy")
    line |= {"id": new, "source": f"elsewhere/{line['source']}"} | changes


@pytest.mark.parametrize("changed", [False, True], ids=["the same file", "encoded anew"])
def test_a_known_song_keeps_its_split_under_another_name(tmp_path, changed):
    chunks = Chunks(tmp_path / "out")
    for number in range(40):
        chunks.add(f"s{number}", fingerprint=random_fingerprint(number))
    chunks.write()
    before = split_by_id(made(chunks, "ds", "--test_fraction", "0.4")[0])
    for number, line in enumerate(chunks.lines):
        changes = {"sha256": f"other {number}", "fingerprint": random_fingerprint(number, 0.15)} if changed else {}
        rename(chunks, line, **changes)
    chunks.add_many(0, 40)
    chunks.write()
    after = split_by_id(made(chunks, "ds", "--test_fraction", "0.4")[0])
    assert {f"moved-{name}": split for name, split in before.items()}.items() <= after.items()


def test_songs_that_leave_the_dataset_are_counted_and_named(chunks, capsys):
    made(chunks)
    del chunks.lines[3:5]
    chunks.write()
    capsys.readouterr()
    made(chunks)
    assert "2 songs of the dataset that was here before are gone: 'song003.mp3', 'song004.mp3'\n" in (
        capsys.readouterr().out
    )


def test_other_music_under_a_known_name_is_a_new_song(tmp_path):
    chunks = Chunks(tmp_path / "out")
    for number in range(40):
        chunks.add(f"s{number}", fingerprint=random_fingerprint(number))
    chunks.write()
    flags = ("--test_fraction", "0.4")
    before = split_by_id(made(chunks, "ds", *flags)[0])
    tested = [line for line in chunks.lines if before[line["id"]] == "test"]
    for number, line in enumerate(tested):  # the test songs leave, others come under their names
        line |= {"sha256": f"new {number}", "fingerprint": random_fingerprint(100 + number)}
        line["chunks"] = 400 if not number else line["chunks"]
        np.save(chunks.folder / f"{line['id']}.npy", np.ones((line["chunks"], CHANNELS, SAMPLES), np.int16) * 999)
    chunks.write()
    after = split_by_id(made(chunks, "ds", *flags)[0])
    assert after[tested[0]["id"]] == "train"  # too long for the test split: it was not simply kept


def test_splits_of_a_dataset_without_contents_are_kept_by_name(chunks):
    before, folder = made(chunks)[0], chunks.folder.parent / "ds"
    for song in before["songs"]:
        del song["sha256"], song["fingerprint"]  # as an earlier version wrote it
    (folder / "meta.json").write_text(json.dumps(before))
    assert open_dataset(folder)[0] == before
    chunks.add_many(12, 40)
    chunks.write()
    assert split_by_id(before).items() <= split_by_id(made(chunks)[0]).items()


def test_a_split_that_becomes_empty_is_lent_new_songs_first(tmp_path):
    for seed in range(6):
        chunks = Chunks(tmp_path / f"{seed}" / "out")
        chunks.add_many(0, 10)
        chunks.write()
        flags = ("ds", "--test_fraction", "0", "--seed", str(seed))
        known = split_by_id(made(chunks, *flags)[0])
        chunks.lines = [line for line in chunks.lines if known[line["id"]] != "test"]
        chunks.add("new")
        chunks.write()
        after = split_by_id(made(chunks, *flags)[0])
        assert [name for name, split in after.items() if split == "test"] == ["new"]


def test_another_val_fraction_leaves_the_test_songs_alone(tmp_path):
    chunks = Chunks(tmp_path / "out")
    chunks.add_many(0, 40)
    chunks.write()
    few, many = (made(chunks, "ds", "--val_fraction", share)[1]["test"].songs for share in ("0.1", "0.4"))
    assert [song["id"] for song in few] == [song["id"] for song in many]


def test_another_seed_draws_another_split(chunks):
    assert split_by_id(made(chunks)[0]) != split_by_id(made(chunks, "ds", "--seed", "1")[0])


def test_near_duplicates_stay_in_one_split(tmp_path, capsys):
    chunks = Chunks(tmp_path / "out")
    for number in range(20):
        chunks.add(f"a{number}", fingerprint=random_fingerprint(number))
        chunks.add(f"b{number}", fingerprint=random_fingerprint(number, error_share=0.15))
    chunks.write()
    meta, _ = made(chunks, "ds", "--val_fraction", "0.3", "--test_fraction", "0.3")
    splits = split_by_id(meta)
    assert all(splits[f"a{number}"] == splits[f"b{number}"] for number in range(20))
    groups = {song["id"]: song["group"] for song in meta["songs"]}
    assert all(groups[f"a{number}"] == groups[f"b{number}"] == f"a{number}" for number in range(20))
    out = capsys.readouterr().out
    assert "20 groups of the same music" in out
    assert "'a7.mp3', 'b7.mp3'" in out


def test_chain_of_matches_is_one_group(tmp_path):
    chunks = Chunks(tmp_path / "out")
    chunks.add("c", sha256="x", fingerprint=random_fingerprint(1))
    chunks.add("b", sha256="x", fingerprint=random_fingerprint(2))
    chunks.add("a", fingerprint=random_fingerprint(2))
    chunks.add_many(0, 3)
    chunks.write()
    groups = {song["id"]: song["group"] for song in made(chunks)[0]["songs"]}
    assert [groups[name] for name in "abc"] == ["a", "a", "a"]
    assert len(set(groups.values())) == 4


def test_group_that_was_trained_on_stays_in_train(tmp_path, capsys):
    chunks = Chunks(tmp_path / "out")
    chunks.add_many(0, 30)
    chunks.write()
    before = split_by_id(made(chunks)[0])
    tested, trained = (next(k for k, split in before.items() if split == name) for name in ("test", "train"))
    for line in chunks.lines:
        if line["id"] in (tested, trained):
            line["sha256"] = "the same"
    chunks.write()
    after = split_by_id(made(chunks)[0])
    assert after[tested] == after[trained] == "train"
    assert f"1 songs came to another split than before: '{tested}.mp3'" in capsys.readouterr().out


def test_fewer_than_three_different_songs_are_refused(tmp_path, capsys):
    chunks = Chunks(tmp_path / "out")
    chunks.add("a", sha256="x")
    chunks.add("b", sha256="x")
    chunks.add("c")
    chunks.add("one-chunk", rows=1)
    chunks.add("silent", quiet_rows=(0, 1, 2, 3))
    chunks.write()
    assert "2 different songs have a usable pair, 3 are needed" in refusal(chunks, capsys)


def test_three_songs_give_one_to_each_split(tmp_path):
    chunks = Chunks(tmp_path / "out")
    for name in "abc":
        chunks.add(name)
    chunks.write()
    for seed in range(8):
        splits = split_by_id(made(chunks, f"ds{seed}", "--seed", str(seed), "--test_fraction", "0.8")[0])
        assert sorted(splits.values()) == ["test", "train", "val"]
