"""The dataset on disk, and how it is read: songs as int16 rows of 10 s, pairs of rows, three sides.

    meta, sides = data.open_dataset("dataset")
    context_row, target_row = sides["train"].pairs[0]

Everything is checked when it is opened; what is damaged is refused with one sentence, and no file is ever
unpickled. Arrays are memory maps: opening costs nothing, however large the dataset is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import fft

from continuation import audio

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")
_META_KEYS = {"sample_rate": int, "channels": int, "chunk_samples": int, "dtype": str, "settings": dict}
_SONG_KEYS = {"id": str, "source": str, "split": str, "group": str, "first_row": int, "rows": int}
_CONTENT_KEYS = {"sha256": str, "fingerprint": str}  # datasets of earlier versions lack them


class DataError(Exception):
    """A dataset that cannot be used, said in one clear sentence."""


# ---------------------------------------------------------------------------------------------------
# Reading the format


def unfinished_mark(manifest: Path) -> Path:
    """The file that is beside a manifest from the beginning of a run of preprocess.py until all is done."""
    return manifest.with_name(f"{manifest.name}.unfinished")


@dataclass(frozen=True)
class Side:
    """One of train, val and test."""

    name: str
    rows: np.ndarray  # int16 (rows, channels, samples), a memory map; songs contiguous and in time
    pairs: np.ndarray  # int64 (pairs, 2): the rows of input and target, neighbours in one song
    songs: list[dict]  # id, source, sha256, fingerprint, split, group, first_row, rows


def read_meta(folder: str | os.PathLike, kind: str) -> dict:
    """Read and check a folder's meta.json; `kind` is 'chunks' (of preprocess.py) or 'dataset'."""
    path = Path(folder) / "meta.json"
    writer = {"chunks": "preprocess.py", "dataset": "create_dataset.py"}[kind]
    refuse_pipe(path)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {writer} has not finished there") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(meta, dict) or meta.get("kind") != kind:
        raise DataError(f"{path} does not describe a folder that {writer} wrote")
    if meta.get("format") != FORMAT_VERSION:
        raise DataError(f"{path} has format {meta.get('format')!r}, this program reads {FORMAT_VERSION}")
    check_keys(meta, _META_KEYS, path)
    if min(meta["sample_rate"], meta["channels"], meta["chunk_samples"]) < 1 or meta["dtype"] != "int16":
        raise DataError(f"{path} is damaged: its sample format makes no sense")
    if kind == "dataset":
        check_keys(meta, {"songs": list}, path)
        for song in meta["songs"]:
            check_keys(song, _SONG_KEYS, path)
            check_keys(song, {key: kind for key, kind in _CONTENT_KEYS.items() if key in song}, path)
            check_id(song["id"], path)
        if len({song["id"] for song in meta["songs"]}) < len(meta["songs"]):
            raise DataError(f"{path} is damaged: two songs have the same id")
    return meta


def check_id(id: str, where: object) -> None:
    """Raise DataError, naming `where`, unless a song's id is a plain name: files are called after it."""
    if not re.fullmatch(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,99}", id):
        raise DataError(f"{where} is damaged: id {id[:80]!r}")


def refuse_pipe(path: Path) -> None:
    """Raise DataError for a named pipe: opening it would wait for ever."""
    with suppress(OSError):  # which opening it says too
        if path.is_fifo():
            raise DataError(f"{path} is a named pipe, not a file")


def check_keys(values: object, types: dict[str, type | tuple[type, ...]], where: object) -> None:
    """Raise DataError, naming `where`, unless `values` is a dict that holds these keys with these types."""
    if not isinstance(values, dict):
        raise DataError(f"{where} is damaged: {str(values)[:40]!r} should be an object")
    for key, kind in types.items():
        value = values.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(f"{where} is damaged: {key!r} is {str(value)[:40]!r}")


def open_array(
    path: str | os.PathLike, dtype: np.typing.DTypeLike, row_shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """Open an .npy file as a read-only memory map (n, *row_shape) of this dtype.

    Raises DataError for anything else: no .npy, pickled objects, another type or shape, a file that is
    shorter or longer than its header says (reading past its end would kill the process).
    """
    path = Path(path)
    refuse_pipe(path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # numpy's header parser meets garbage with errors of many kinds
        raise DataError(f"{path} is damaged, or no plain array: {error}") from error
    if array.dtype != np.dtype(dtype):
        raise DataError(f"{path} holds {array.dtype}, not {np.dtype(dtype)}")
    if array.ndim < 1 or (row_shape is not None and array.shape[1:] != tuple(row_shape)):
        raise DataError(f"{path} has the shape {array.shape}, not (n, {', '.join(map(str, row_shape or ()))})")
    if not array.flags.c_contiguous or path.stat().st_size != array.offset + array.nbytes:
        raise DataError(f"{path} is damaged: its size does not fit its header")
    return array


def array_sha256(rows: np.ndarray) -> str:
    """SHA-256 of the bytes of an array, read row by row."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.ascontiguousarray(row))
    return digest.hexdigest()


def open_dataset(folder: str | os.PathLike) -> tuple[dict, dict[str, Side]]:
    """(meta, {'train': Side, 'val': Side, 'test': Side}) of a folder that create_dataset.py wrote.

    Raises DataError when anything in it is missing, damaged, or does not fit the rest.
    """
    folder = Path(folder)
    meta = read_meta(folder, "dataset")
    row_shape = (meta["channels"], meta["chunk_samples"])
    sides = {}
    for name in SPLITS:
        songs = sorted((s for s in meta["songs"] if s["split"] == name), key=lambda s: s["first_row"])
        rows = open_array(folder / f"{name}.npy", np.int16, row_shape)
        pairs = np.array(open_array(folder / f"{name}_pairs.npy", np.int64, (2,)))
        sides[name] = Side(name, rows, pairs, songs)
        _check_side(sides[name], folder)
    if sum(len(side.songs) for side in sides.values()) != len(meta["songs"]):
        raise DataError(f"{folder / 'meta.json'} is damaged: a song is on no side")
    return meta, sides


def _check_side(side: Side, folder: Path) -> None:
    """Songs follow each other without gaps; a pair is two neighbours in one of them."""
    next_row = 0
    for song in side.songs:
        if song["first_row"] != next_row or song["rows"] < 1:
            raise DataError(f"{folder / 'meta.json'} is damaged: the rows of {song['id']!r} are wrong")
        next_row += song["rows"]
    if next_row != len(side.rows):
        raise DataError(f"{folder}: {side.name}.npy has {len(side.rows)} rows, its songs have {next_row}")
    owner = np.repeat(np.arange(len(side.songs)), [song["rows"] for song in side.songs])
    inputs, targets = side.pairs.T
    if not len(side.pairs) or inputs.min() < 0 or targets.max() >= len(owner):
        raise DataError(f"{folder / f'{side.name}_pairs.npy'} is damaged: no pairs, or rows that do not exist")
    if (targets != inputs + 1).any() or (owner[inputs] != owner[targets]).any():
        raise DataError(f"{folder / f'{side.name}_pairs.npy'} is damaged: not all pairs are neighbours")


def read_window(side: Side, song: dict, start: int, length: int) -> np.ndarray:
    """Samples [start, start + length) of a song of this side, counted from its first row, across rows.

    int16 (channels, length), a copy. Raises DataError where the song has no such samples.
    """
    chunk_samples = side.rows.shape[2]
    if start < 0 or length < 0 or start + length > song["rows"] * chunk_samples:
        raise DataError(f"song {song['id']!r} has no samples {start} to {start + length}")
    first, offset = divmod(start, chunk_samples)
    end = -(-(start + length) // chunk_samples)
    rows = side.rows[song["first_row"] + first : song["first_row"] + end]
    if not len(rows):
        return np.zeros((side.rows.shape[1], 0), np.int16)
    return np.concatenate(rows, axis=1)[:, offset : offset + length]


# ---------------------------------------------------------------------------------------------------
# What a song is, whatever its file is called


def is_same_dataset(one: dict, other: dict) -> bool:
    """Whether two meta are of one dataset, perhaps made by an earlier version, which did not tell what a song is."""
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
    """By group of `songs`: which of `known`, the songs of another dataset, are the same music.

    That are equal files, and where a song has none, matching fingerprints. Where sha256 or fingerprint is not told
    on one side (an earlier version wrote it), equal ids. A song of `known` that is found in one group is not looked
    for in others, since `songs` were compared with each other already. Raises DataError for a damaged fingerprint.
    """
    by_content = _by_key(known, "sha256")
    by_id = _by_key(known, "id")
    found: dict[str, list[dict]] = {}
    unknown, gone = [], {id(other): other for other in known}
    for song in songs:
        same = by_content.get(song.get("sha256"), [])
        same = same or [other for other in by_id.get(song["id"], []) if not (_tells(song) and _tells(other))]
        found.setdefault(song["group"], []).extend(same)
        for other in same:
            gone.pop(id(other), None)
        if not same and _tells(song):
            unknown.append(song)
    for song, other in _same_music(unknown, [other for other in gone.values() if _tells(other)]):
        found[song["group"]].append(other)
    return found


def _by_key(songs: Sequence[dict], key: str) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for song in songs:
        if song.get(key):
            found.setdefault(song[key], []).append(song)
    return found


def _tells(song: dict) -> bool:
    return all(song.get(key) for key in _CONTENT_KEYS)


def _same_music(songs: Sequence[dict], others: Sequence[dict]) -> Iterator[tuple[dict, dict]]:
    """Songs with matching fingerprints; in blocks, because audio.find_same_music compares all with all."""
    size = max(len(songs), 16)
    for first in range(0, len(others) if songs else 0, size):
        block = others[first : first + size]
        try:
            fingerprints = [audio.read_fingerprint(song["fingerprint"]) for song in (*songs, *block)]
        except audio.AudioError as error:
            raise DataError(str(error)) from error
        for match in audio.find_same_music(fingerprints):
            i, j = sorted(match[:2])
            if i < len(songs) <= j:
                yield songs[i], block[j - len(songs)]


# ---------------------------------------------------------------------------------------------------
# Windows of audio for training

STREAMS = {
    "order": 0,
    "crop": 1,
    "pair": 2,
    "window": 3,
    "spectral": 4,
    "validation": 5,
    "dropout": 6,
    "elsewhere": 7,
}
# model.py brings a context to these levels too: it stands alone, and this file works without torch.
CONTEXT_LEVEL = 0.1  # -20 dBFS RMS
QUIETEST_RMS = 1e-3  # softer passages are not lifted further
GAIN_RANGE_DB = (-6, 3)
SPEED_RANGE = 0.06  # about a semitone
MARGIN_SECONDS = 0.05  # cut off after a change of speed, where the circular resampling wraps around
PRESENT_COPY = 0.85  # probability of each copy in the joint part, and that there are any
ANY_COPIES = 0.9
TIME_SHIFT = 3  # early times, where only the context can tell what comes, count more than the unshifted flow's
ELSEWHERE_CHUNKS = 2  # at least so many lie between a pair and its 'same song elsewhere'


def next_other(groups: Sequence, i: int) -> int | None:
    """Index of the next of `groups` after the i-th, round the end, that is another: other music, which the same music
    in two files is not. None where there is none."""
    following = [*range(i + 1, len(groups)), *range(i)]
    return next((j for j in following if groups[j] != groups[i]), None)


def draws(seed: int, stream: str, *key: int) -> np.random.Generator:
    """The generator of one random decision: a pure function of its key, so that resume and workers change nothing."""
    return np.random.default_rng([seed, STREAMS[stream], *key])


@dataclass(frozen=True)
class Augmentation:
    """How one window is cut and changed. `place`, 0..1: where it starts in the room that it has."""

    place: float
    gain: float
    swap: bool
    speed: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Augmentation:
        """Polarity is the sign of the gain; half of the windows keep their speed."""
        gain = rng.choice((-1.0, 1.0)) * 10 ** (rng.uniform(*GAIN_RANGE_DB) / 20)
        speed = rng.uniform(1 - SPEED_RANGE, 1 + SPEED_RANGE) if rng.random() < 0.5 else 1.0
        return cls(rng.uniform(), gain, bool(rng.random() < 0.5), speed)


def level_gain(context: np.ndarray) -> float:
    """The factor that brings a context (channels, samples) to CONTEXT_LEVEL."""
    return CONTEXT_LEVEL / max(float(np.sqrt(np.mean(np.square(context, dtype=np.float64)))), QUIETEST_RMS)


def fast_length(samples: float) -> int:
    """The next whole number of samples that has a fast Fourier transform; at most a percent more."""
    return fft.next_fast_len(math.ceil(samples))


def change_speed(x: np.ndarray, length: int) -> np.ndarray:
    """Play x (channels, samples) in `length` samples: circular band-limited resampling by the FFT."""
    if x.shape[-1] == length:
        return x
    spectrum = fft.rfft(x)[:, : length // 2 + 1]
    return fft.irfft(spectrum, length) * np.float32(length / x.shape[-1])


class Windows:
    """Windows of audio at and around the pairs of one side, at the level that generation gives its context.

    A training window starts within half a chunk of its pair's own start, inside the pair's song, so that cuts
    fall everywhere; its level is set by its first chunk.
    """

    def __init__(self, side: Side, meta: dict):
        self.side, self.chunk, self.sample_rate = side, meta["chunk_samples"], meta["sample_rate"]
        self.margin = round(MARGIN_SECONDS * self.sample_rate)
        first_rows = [song["first_row"] for song in side.songs]
        self.song_of_pair = np.searchsorted(first_rows, side.pairs[:, 0], side="right") - 1

    def __len__(self) -> int:
        return len(self.side.pairs)

    def song(self, pair: int) -> dict:
        return self.side.songs[self.song_of_pair[pair]]

    def pair(self, pair: int) -> np.ndarray:
        """Input and target as they are, float32 (channels, 2 * chunk), at the context's level."""
        return self.gain(pair) * self._float(self.song(pair), self._own_start(pair), 2 * self.chunk)

    def gain(self, pair: int) -> np.float32:
        """What brings the pair's input to the context's level."""
        return np.float32(level_gain(self._float(self.song(pair), self._own_start(pair), self.chunk)))

    def start_seconds(self, pair: int) -> float:
        """Where the pair's input begins in its song."""
        return self._own_start(pair) / self.sample_rate

    def elsewhere(self, pair: int) -> np.ndarray | None:
        """A chunk of the same song at the context's level (channels, chunk), the same at every call: drawn from those
        in pairs, so no silent one, with at least ELSEWHERE_CHUNKS between the pair and them. None without one."""
        song, own = self.song(pair), int(self.side.pairs[pair, 0])
        rows = np.unique(self.side.pairs[self.song_of_pair == self.song_of_pair[pair]])
        far = rows[(rows < own - ELSEWHERE_CHUNKS) | (rows > own + 1 + ELSEWHERE_CHUNKS)]
        if not len(far):
            return None
        row = int(draws(0, "elsewhere", pair).choice(far))
        x = self._float(song, (row - song["first_row"]) * self.chunk, self.chunk)
        return x * np.float32(level_gain(x))

    def window(self, pair: int, chunks: int, change: Augmentation) -> np.ndarray:
        """An augmented window of whole chunks: float32 (channels, chunks * chunk)."""
        length = chunks * self.chunk
        needed = fast_length((length + 2 * self.margin) * change.speed)
        if change.speed == 1 or needed > self.song(pair)["rows"] * self.chunk:
            x = self._near(pair, length, change.place)
        else:
            whole = self._near(pair, needed, change.place)
            # The filter that changes the speed would tell the first chunk, a context, of what follows: it is changed
            # with its own end, mirrored, in the future's place.
            cut = (self.margin + self.chunk) * needed // (length + 2 * self.margin)
            alone = np.pad(whole[:, :cut], ((0, 0), (0, needed - cut)), mode="reflect", reflect_type="odd")
            first, rest = (change_speed(x, length + 2 * self.margin)[:, self.margin :] for x in (alone, whole))
            x = np.concatenate([first[:, : self.chunk], rest[:, self.chunk : length]], axis=1)
        return self._finish(x, level_gain(x[:, : self.chunk]), change)

    def crop(self, pair: int, length: int, change: Augmentation, place: float) -> np.ndarray:
        """`length` samples at `place` (0..1) of a window of one chunk: float32 (channels, length)."""
        window = self._near(pair, self.chunk, change.place)
        needed = fast_length((length + 2 * self.margin) * change.speed)
        if change.speed == 1 or needed > self.chunk:
            margin, needed = 0, length
        else:
            margin = self.margin
        offset = round(place * (self.chunk - needed))
        x = change_speed(window[:, offset : offset + needed], length + 2 * margin)
        return self._finish(x[:, margin : margin + length], level_gain(window), change)

    def _finish(self, x: np.ndarray, level: float, change: Augmentation) -> np.ndarray:
        x = x[::-1] if change.swap else x
        return np.ascontiguousarray(x * np.float32(level * change.gain))

    def _own_start(self, pair: int) -> int:
        return (int(self.side.pairs[pair, 0]) - self.song(pair)["first_row"]) * self.chunk

    def _near(self, pair: int, length: int, place: float) -> np.ndarray:
        own, song = self._own_start(pair), self.song(pair)
        latest = min(own + self.chunk // 2, song["rows"] * self.chunk - length)
        earliest = min(max(own - self.chunk // 2, 0), latest)
        return self._float(song, earliest + round(place * (latest - earliest)), length)

    def _float(self, song: dict, start: int, length: int) -> np.ndarray:
        return read_window(self.side, song, start, length).astype(np.float32) / 32768


# ---------------------------------------------------------------------------------------------------
# Items: what one element of a batch is made of, by its number


class Order:
    """Item number -> pair: every epoch passes over all pairs, in an order of its own."""

    def __init__(self, pairs: int, seed: int, stage: int):
        self.pairs, self.seed, self.stage = pairs, seed, stage
        self.epoch, self.permutation = -1, np.empty(0, int)

    def __getitem__(self, item: int) -> int:
        epoch, position = divmod(item, self.pairs)
        if epoch != self.epoch:
            self.epoch = epoch
            self.permutation = draws(self.seed, "order", self.stage, epoch).permutation(self.pairs)
        return int(self.permutation[position])


def own_items(first: int, batch_size: int, rank: int, processes: int):
    """Numbers of the items from `first` on that this process reads: of every `processes` batches one."""
    for start in itertools.count(first + rank * batch_size, processes * batch_size):
        yield from range(start, start + batch_size)


class CropItems:
    """Stage 1: a crop of audio, and the noise that its latents get."""

    def __init__(self, windows: Windows, noise_shape: tuple[int, int], crop_samples: int, seed: int):
        self.windows, self.noise_shape, self.crop_samples, self.seed = windows, noise_shape, crop_samples, seed
        self.order = Order(len(windows), seed, stage=1)

    def __getitem__(self, item: int) -> dict:
        rng = draws(self.seed, "crop", item)
        change = Augmentation.draw(rng)
        x = self.windows.crop(self.order[item], self.crop_samples, change, rng.uniform())
        return {"x": x, **latent_noise(rng, self.noise_shape)}


def latent_noise(rng: np.random.Generator, shape: tuple[int, int]) -> dict:
    """Noise for reparametrisation, and noise of a random strength 0..1 that makes decoding robust."""
    posterior, robust = rng.standard_normal((2, *shape), dtype=np.float32)
    return {"posterior_noise": posterior, "robust_noise": robust * np.float32(rng.uniform())}


class PairItems:
    """Stage 2: a context and its target, as cached latents and, in the joint part, as 20 s of audio too; and all that
    the flow draws for them.

    Item keys: context, target, flow_noise, context_noise (latents); time, heard (numbers, see AttentionCore). With
    audio: x, the noise of CropItems, `present_copies`, and the place, 0..1, of what is continued.
    """

    def __init__(
        self, windows: Windows, shape: tuple[int, int], variants: int, seed: int, cache, crop=None, copies=0
    ):
        """shape: (latent_channels, latents) of a chunk; cache: a LatentCache. For audio too, crop: shape of the noise
        for the reconstruction, and copies: how many there are of a context."""
        self.windows, self.shape, self.variants, self.seed = windows, shape, variants, seed
        self.cache, self.crop, self.copies = cache, crop, copies
        self.order = Order(len(windows), seed, stage=2)

    def __getitem__(self, item: int) -> dict:
        pair = self.order[item]
        rng = draws(self.seed, "pair", item)
        variant = int(rng.integers(self.variants))
        drawn = flow_draws(rng, self.shape)
        context, target = self.cache.read(variant, pair)
        latents = {"context": context, "target": target, **drawn}
        if self.crop is None:
            return latents
        audio = WindowItems(self.windows, variant, self.seed)[pair] | latent_noise(rng, self.crop)
        return latents | audio | {"present": present_copies(rng, self.copies), "place": np.float32(rng.uniform())}


def present_copies(rng: np.random.Generator, count: int) -> np.ndarray:
    """Which of so many copies the decoder may play, bool (count,): it must do without any, and without all."""
    return (rng.random(count) < PRESENT_COPY) & (rng.random() < ANY_COPIES)


class WindowItems:
    """What one variant of the latent cache encodes, by pair: x (channels, 2 * chunk), as PairItems has it too."""

    def __init__(self, windows: Windows, variant: int, seed: int):
        self.windows, self.variant, self.seed = windows, variant, seed

    def __getitem__(self, pair: int) -> dict:
        change = Augmentation.draw(draws(self.seed, "window", self.variant, pair))
        return {"x": self.windows.window(pair, 2, change)}


class FixedPairItems:
    """Legacy: the pairs (0, 1), (2, 3), ... of every song as they are, x (channels, 2 * chunk)."""

    def __init__(self, windows: Windows, seed: int, stage: int):
        self.windows = windows
        rows = windows.side.pairs[:, 0]
        first_rows = np.array([song["first_row"] for song in windows.side.songs])[windows.song_of_pair]
        self.pairs = np.flatnonzero((rows - first_rows) % 2 == 0)
        self.order = Order(len(self.pairs), seed, stage)

    def __getitem__(self, item: int) -> dict:
        return {"x": self.windows.pair(int(self.pairs[self.order[item]]))}


def flow_draws(rng: np.random.Generator, shape: tuple[int, int]) -> dict:
    """t: logit-normal, shifted to the noise (Esser et al. 2024), 0 in 15 % of the draws. Context: all of it in 70 %,
    its near end in 20 %, none in 10 %; noise on it, not on its hints, in half of the draws."""
    flow_noise, context_noise = rng.standard_normal((2, *shape), dtype=np.float32)
    time = 0.0 if rng.random() < 0.15 else 1 / (1 + TIME_SHIFT * np.exp(-rng.standard_normal()))
    heard = rng.choice((1.0, rng.uniform(0.1, 1.0), 0.0), p=(0.7, 0.2, 0.1))
    strength = rng.uniform(0, 0.3) if rng.random() < 0.5 else 0.0
    return {
        "flow_noise": flow_noise,
        "context_noise": context_noise * np.float32(strength),
        "time": np.float32(time),
        "heard": np.float32(heard),
    }


# ---------------------------------------------------------------------------------------------------
# The latent cache of stage 2


class LatentCache:
    """Encoded windows of all pairs: fp16 (pairs, latent_channels, latents), a file a variant and part.

    Part `context` is what the core is told of the first 10 s (ContinuationModel.hear): latents cut out of a longer
    encoding would have heard the future. Part `target` is the second half of the 20 s encoded together.

    `key.json` names the encoder, dataset and seed that the latents are of, and holds the checksum of every file.
    """

    PARTS = ("context", "target")

    def __init__(self, folder, variants: int, shapes: dict[str, tuple[int, int]], pairs: int):
        """shapes: (latent_channels, latents) by part."""
        self.folder, self.variants, self.shapes, self.pairs = Path(folder), variants, shapes, pairs
        self.key, self.checksums = "", {}
        self._arrays = {}

    def path(self, part: str, variant: int) -> Path:
        return self.folder / f"{part}-{variant}.npy"

    def array(self, part: str, variant: int) -> np.ndarray:
        if (part, variant) not in self._arrays:
            self._arrays[part, variant] = open_array(self.path(part, variant), np.float16, self.shapes[part])
        return self._arrays[part, variant]

    def read(self, variant: int, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """Context and target, float32."""
        return tuple(self.array(part, variant)[pair].astype(np.float32) for part in self.PARTS)

    def begin(self, key: str) -> None:
        """Keep the latents of just this encoder, dataset and seed, and remove all others. OSError where it cannot."""
        self.key, self.checksums = key, self._checksums_of(key)
        self.clear(kept=self.checksums)
        self.folder.resolve().mkdir(exist_ok=True)  # behind a link too

    def _checksums_of(self, key: str) -> dict[str, str]:
        """Checksum by name of the files that the folder holds of this key; none where key.json is missing, damaged,
        or of a version without them."""
        path = self.folder / "key.json"
        try:
            refuse_pipe(path)
            index = json.loads(path.read_text(encoding="utf-8"))
            return dict(index["sha256"]) if index["key"] == key else {}
        except (DataError, OSError, ValueError, LookupError, TypeError, RecursionError):
            return {}

    def clear(self, kept=()) -> None:
        """Remove all files of latents but the `kept` names; the folder may be a link, and stays."""
        for path in [path for part in self.PARTS for path in self.folder.glob(f"{part}-*")]:
            if path.name not in kept:
                path.unlink()

    def missing(self) -> list[int]:
        """Variants that are not wholly there, or have changed since they were written, which is said."""
        return [v for v in range(self.variants) if not all([self._is_whole(part, v) for part in self.PARTS])]

    def _is_whole(self, part: str, variant: int) -> bool:
        path = self.path(part, variant)
        if path.name not in self.checksums:
            return False
        try:
            rows = open_array(path, np.float16, self.shapes[part])
            is_whole = array_sha256(rows) == self.checksums[path.name]
        except (DataError, OSError):
            is_whole = False
        if not is_whole:
            print(f"note: {path} is missing or damaged, it is made again", file=sys.stderr)
        return is_whole

    def index(self, variant: int) -> str:
        """What to write into key.json when a variant has been written, with its checksums."""
        for path in (self.path(part, variant) for part in self.PARTS):
            self.checksums[path.name] = array_sha256(open_array(path, np.float16))
        return json.dumps({"key": self.key, "sha256": self.checksums})

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the targets by channel, float64 (latent_channels, 1)."""
        count, total, squares = 0, 0.0, 0.0
        for variant in range(self.variants):
            for rows in np.array_split(self.array("target", variant), -(-self.pairs // 256)):
                rows = rows.astype(np.float64)
                count += rows.shape[0] * rows.shape[2]
                total = total + rows.sum((0, 2))
                squares = squares + np.square(rows).sum((0, 2))
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 1e-10))
        return mean[:, None], std[:, None]
