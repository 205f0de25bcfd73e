"""The dataset on disk: songs as int16 rows of 10 s, pairs of rows, split by song into train, val and test.

    meta, splits = dataset.open_dataset("dataset")
    context_row, target_row = splits["train"].pairs[0]

Everything is checked when it is opened: a damaged dataset is refused with one sentence (UsageError), and no file is
unpickled. Arrays are memory maps: opening is fast for datasets of any size.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from continuation import files
from continuation.cli import UsageError
from continuation.fingerprint import find_same_music, read_fingerprint

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")
_META_KEYS = {"sample_rate": int, "channels": int, "chunk_samples": int, "dtype": str, "settings": dict}
_SONG_KEYS = {"id": str, "source": str, "split": str, "group": str, "first_row": int, "rows": int}
_CONTENT_KEYS = {"sha256": str, "fingerprint": str}  # datasets of earlier versions lack them


# Reading the format


@dataclass(frozen=True)
class Split:
    """One of train, val and test."""

    name: str
    rows: np.ndarray  # int16 (rows, channels, samples), a memory map; songs contiguous and in time
    pairs: np.ndarray  # int64 (pairs, 2): the rows of input and target, neighbours in one song
    songs: list[dict]  # id, source, sha256, fingerprint, split, group, first_row, rows


def read_meta(folder: str | os.PathLike, kind: str) -> dict:
    """Read and check a folder's meta.json; `kind` is 'chunks' (of preprocess.py) or 'dataset'.

    Raises UsageError where it is missing, damaged, or of another kind or format.
    """
    path = Path(folder) / "meta.json"
    writer = {"chunks": "preprocess.py", "dataset": "create_dataset.py"}[kind]
    files.refuse_pipe(path)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: {writer} has not finished there") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if not isinstance(meta, dict) or meta.get("kind") != kind:
        raise UsageError(f"{path} does not describe a folder that {writer} wrote")
    if meta.get("format") != FORMAT_VERSION:
        raise UsageError(f"{path} has format {meta.get('format')!r}, this program reads {FORMAT_VERSION}")
    check_keys(meta, _META_KEYS, path)
    if min(meta["sample_rate"], meta["channels"], meta["chunk_samples"]) < 1 or meta["dtype"] != "int16":
        raise UsageError(f"{path} is damaged: its sample format makes no sense")
    if kind == "dataset":
        check_keys(meta, {"songs": list}, path)
        for song in meta["songs"]:
            check_keys(song, _SONG_KEYS, path)
            check_keys(song, {key: kind for key, kind in _CONTENT_KEYS.items() if key in song}, path)
            check_id(song["id"], path)
        if len({song["id"] for song in meta["songs"]}) < len(meta["songs"]):
            raise UsageError(f"{path} is damaged: two songs have the same id")
    return meta


def check_id(id: str, where: object) -> None:
    """Raise UsageError, naming `where`, unless a song's id is a plain name: files are named after it."""
    if not re.fullmatch(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,99}", id):
        raise UsageError(f"{where} is damaged: id {id[:80]!r}")


def check_keys(values: object, types: dict[str, type | tuple[type, ...]], where: object) -> None:
    """Raise UsageError, naming `where`, unless `values` is a dict that holds these keys with these types."""
    if not isinstance(values, dict):
        raise UsageError(f"{where} is damaged: {str(values)[:40]!r} should be an object")
    for key, kind in types.items():
        value = values.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(f"{where} is damaged: {key!r} is {str(value)[:40]!r}")


def open_dataset(folder: str | os.PathLike) -> tuple[dict, dict[str, Split]]:
    """Return (meta, {'train': Split, 'val': Split, 'test': Split}) of a folder that create_dataset.py wrote.

    Raises UsageError when anything in it is missing, damaged, or does not fit the rest.
    """
    folder = Path(folder)
    meta = read_meta(folder, "dataset")
    row_shape = (meta["channels"], meta["chunk_samples"])
    splits = {}
    for name in SPLITS:
        songs = sorted((s for s in meta["songs"] if s["split"] == name), key=lambda s: s["first_row"])
        rows = files.open_array(folder / f"{name}.npy", np.int16, row_shape)
        pairs = np.array(files.open_array(folder / f"{name}_pairs.npy", np.int64, (2,)))
        splits[name] = Split(name, rows, pairs, songs)
        _check_split(splits[name], folder)
    if sum(len(split.songs) for split in splits.values()) != len(meta["songs"]):
        raise UsageError(f"{folder / 'meta.json'} is damaged: a song is in no split")
    return meta, splits


def _check_split(split: Split, folder: Path) -> None:
    """Check that songs follow each other without gaps, and that a pair is two neighbours in one of them."""
    next_row = 0
    for song in split.songs:
        if song["first_row"] != next_row or song["rows"] < 1:
            raise UsageError(f"{folder / 'meta.json'} is damaged: the rows of {song['id']!r} are wrong")
        next_row += song["rows"]
    if next_row != len(split.rows):
        raise UsageError(f"{folder}: {split.name}.npy has {len(split.rows)} rows, its songs have {next_row}")
    owner = np.repeat(np.arange(len(split.songs)), [song["rows"] for song in split.songs])
    inputs, targets = split.pairs.T
    if not len(split.pairs) or inputs.min() < 0 or targets.max() >= len(owner):
        raise UsageError(f"{folder / f'{split.name}_pairs.npy'} is damaged: no pairs, or rows that do not exist")
    if (targets != inputs + 1).any() or (owner[inputs] != owner[targets]).any():
        raise UsageError(f"{folder / f'{split.name}_pairs.npy'} is damaged: not all pairs are neighbours")


def read_window(split: Split, song: dict, start: int, length: int) -> np.ndarray:
    """Read samples [start, start + length) of a song of this split, counted from its first row, across rows.

    Returns int16 (channels, length), a copy. Raises UsageError where the song has no such samples.
    """
    chunk_samples = split.rows.shape[2]
    if start < 0 or length < 0 or start + length > song["rows"] * chunk_samples:
        raise UsageError(f"song {song['id']!r} has no samples {start} to {start + length}")
    first, offset = divmod(start, chunk_samples)
    end = -(-(start + length) // chunk_samples)
    rows = split.rows[song["first_row"] + first : song["first_row"] + end]
    if not len(rows):
        return np.zeros((split.rows.shape[1], 0), np.int16)
    return np.concatenate(rows, axis=1)[:, offset : offset + length]


# Songs are identified by content, not by file name


def is_same_dataset(one: dict, other: dict) -> bool:
    """Return whether two meta dicts describe the same dataset.

    Where either lacks sha256 and fingerprint, as earlier versions do, these are not compared.
    """
    songs = [song for meta in (one, other) for song in meta.get("songs", [])]
    if all(key in song for song in songs for key in _CONTENT_KEYS):
        return one == other
    return _without_content(one) == _without_content(other)


def _without_content(meta: dict) -> dict:
    songs = [
        {key: value for key, value in song.items() if key not in _CONTENT_KEYS} for song in meta.get("songs", [])
    ]
    return meta | {"songs": songs}


def known_by_group(songs: Sequence[dict], known: Sequence[dict]) -> dict[str, list[dict]]:
    """Find, for each group of `songs`, the same music among `known`, the songs of another dataset: by group.

    Songs are the same music if their files are equal or, without an equal file, if their fingerprints match. Where
    either lacks sha256 or fingerprint, as in earlier versions, equal ids count. A song of `known` that is found in
    one group is not searched for in others, since `songs` have been compared with each other already. Raises
    UsageError for a damaged fingerprint.
    """
    by_content = _by_key(known, "sha256")
    by_id = _by_key(known, "id")
    found: dict[str, list[dict]] = {}
    unknown, gone = [], {id(other): other for other in known}
    for song in songs:
        same = by_content.get(song.get("sha256"), [])
        same = same or [
            other for other in by_id.get(song["id"], []) if not (_has_content(song) and _has_content(other))
        ]
        found.setdefault(song["group"], []).extend(same)
        for other in same:
            gone.pop(id(other), None)
        if not same and _has_content(song):
            unknown.append(song)
    for song, other in _same_music(unknown, [other for other in gone.values() if _has_content(other)]):
        found[song["group"]].append(other)
    return found


def _by_key(songs: Sequence[dict], key: str) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for song in songs:
        if song.get(key):
            found.setdefault(song[key], []).append(song)
    return found


def _has_content(song: dict) -> bool:
    return all(song.get(key) for key in _CONTENT_KEYS)


def _same_music(songs: Sequence[dict], others: Sequence[dict]) -> Iterator[tuple[dict, dict]]:
    """Yield songs with matching fingerprints; in blocks, because find_same_music compares all with all."""
    size = max(len(songs), 16)
    for first in range(0, len(others) if songs else 0, size):
        block = others[first : first + size]
        fingerprints = [read_fingerprint(song["fingerprint"]) for song in (*songs, *block)]
        for match in find_same_music(fingerprints):
            i, j = sorted(match[:2])
            if i < len(songs) <= j:
                yield songs[i], block[j - len(songs)]
