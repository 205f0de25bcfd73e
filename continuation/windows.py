"""Windows of audio at the pairs of a split, their augmentation, and the items of the batches.

    windows = Windows(splits["train"], meta)
    items = CropItems(windows, noise_shape, crop_samples, seed)
    items[17]["x"]                                          # float32 (channels, crop_samples)

Every random draw has its own generator, keyed by seed, purpose and item number: an item does not depend on the
process that reads it, nor on what was read before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import fft

from continuation.audio import INT16_SCALE
from continuation.dataset import Split, read_window
from continuation.layers import CONTEXT_LEVEL, QUIETEST_RMS

STREAMS = {
    "order": 0,
    "crop": 1,
    "pair": 2,
    "window": 3,
    "spectral": 4,
    "validation": 5,
    "dropout": 6,
    "other_passage": 7,
}
GAIN_RANGE_DB = (-6, 3)
SPEED_RANGE = 0.06  # about a semitone
MARGIN_SECONDS = 0.05  # cut off after a change of speed, where the circular resampling wraps around
TIME_SHIFT = 3  # of the flow's times towards noise, where the prediction depends on the context alone
PASSAGE_DISTANCE = 2  # fewest chunks between a pair and another passage of its song


def next_other(groups: Sequence, i: int) -> int | None:
    """Return the index of the next of `groups` after the i-th, cyclically, that differs from it, so that its music
    does too; None where all are equal."""
    following = [*range(i + 1, len(groups)), *range(i)]
    return next((j for j in following if groups[j] != groups[i]), None)


def make_rng(seed: int, stream: str, *key: int) -> np.random.Generator:
    """Make the generator of one random draw from its key alone, so that resuming and data workers change nothing."""
    return np.random.default_rng([seed, STREAMS[stream], *key])


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of one window.

    place: its start, from 0 (the earliest possible) to 1 (the latest). gain: a factor, negative for inverted
    polarity. swap: channels in reverse order. speed: a factor.
    """

    place: float
    gain: float
    swap: bool
    speed: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Augmentation:
        """Sample an augmentation; half of the windows keep their speed."""
        gain = rng.choice((-1.0, 1.0)) * 10 ** (rng.uniform(*GAIN_RANGE_DB) / 20)
        speed = rng.uniform(1 - SPEED_RANGE, 1 + SPEED_RANGE) if rng.random() < 0.5 else 1.0
        return cls(rng.uniform(), gain, bool(rng.random() < 0.5), speed)


def rms_gain(context: np.ndarray) -> float:
    """Compute the factor that scales a context (channels, samples) to CONTEXT_LEVEL."""
    return CONTEXT_LEVEL / max(float(np.sqrt(np.mean(np.square(context, dtype=np.float64)))), QUIETEST_RMS)


def fast_length(samples: float) -> int:
    """Return the next larger length in samples that has a fast FFT; at most a percent more."""
    return fft.next_fast_len(math.ceil(samples))


def change_speed(x: np.ndarray, length: int) -> np.ndarray:
    """Resample x (channels, samples) to `length` samples, band-limited and circular, by the FFT."""
    if x.shape[-1] == length:
        return x
    spectrum = fft.rfft(x)[:, : length // 2 + 1]
    return fft.irfft(spectrum, length) * np.float32(length / x.shape[-1])


class Windows:
    """Windows of audio at and around the pairs of one split, with the context at CONTEXT_LEVEL, as in generation.

    A training window starts within half a chunk of its pair's start, inside the pair's song, so that cuts fall
    anywhere in the music; its first chunk sets its level.
    """

    def __init__(self, split: Split, meta: dict):
        self.split, self.chunk, self.sample_rate = split, meta["chunk_samples"], meta["sample_rate"]
        self.margin = round(MARGIN_SECONDS * self.sample_rate)
        first_rows = [song["first_row"] for song in split.songs]
        self.song_of_pair = np.searchsorted(first_rows, split.pairs[:, 0], side="right") - 1

    def __len__(self) -> int:
        return len(self.split.pairs)

    def song(self, pair: int) -> dict:
        return self.split.songs[self.song_of_pair[pair]]

    def pair(self, pair: int) -> np.ndarray:
        """Read input and target without augmentation, float32 (channels, 2 * chunk), the input at CONTEXT_LEVEL."""
        return self.gain(pair) * self._read(self.song(pair), self._input_start(pair), 2 * self.chunk)

    def gain(self, pair: int) -> np.float32:
        """Compute the factor that scales the pair's input to CONTEXT_LEVEL."""
        return np.float32(rms_gain(self._read(self.song(pair), self._input_start(pair), self.chunk)))

    def start_seconds(self, pair: int) -> float:
        """Return the start of the pair's input in its song, in seconds."""
        return self._input_start(pair) / self.sample_rate

    def other_passage(self, pair: int) -> np.ndarray | None:
        """Read another chunk of the pair's song at CONTEXT_LEVEL (channels, chunk), the same at every call.

        It is drawn from the chunks in pairs, which are not silent, with at least PASSAGE_DISTANCE chunks between the
        pair and it. None where the song has none.
        """
        song, own = self.song(pair), int(self.split.pairs[pair, 0])
        rows = np.unique(self.split.pairs[self.song_of_pair == self.song_of_pair[pair]])
        far = rows[(rows < own - PASSAGE_DISTANCE) | (rows > own + 1 + PASSAGE_DISTANCE)]
        if not len(far):
            return None
        row = int(make_rng(0, "other_passage", pair).choice(far))
        x = self._read(song, (row - song["first_row"]) * self.chunk, self.chunk)
        return x * np.float32(rms_gain(x))

    def window(self, pair: int, chunks: int, change: Augmentation) -> np.ndarray:
        """Read an augmented window of whole chunks: float32 (channels, chunks * chunk)."""
        length = chunks * self.chunk
        needed = fast_length((length + 2 * self.margin) * change.speed)
        if change.speed == 1 or needed > self.song(pair)["rows"] * self.chunk:
            x = self._read_near(pair, length, change.place)
        else:
            whole = self._read_near(pair, needed, change.place)
            # The resampling filter would leak the future into the first chunk, the context: the context is resampled
            # with its own end, mirrored, in place of the future.
            cut = (self.margin + self.chunk) * needed // (length + 2 * self.margin)
            alone = np.pad(whole[:, :cut], ((0, 0), (0, needed - cut)), mode="reflect", reflect_type="odd")
            first, rest = (change_speed(x, length + 2 * self.margin)[:, self.margin :] for x in (alone, whole))
            x = np.concatenate([first[:, : self.chunk], rest[:, self.chunk : length]], axis=1)
        return self._finish(x, rms_gain(x[:, : self.chunk]), change)

    def crop(self, pair: int, length: int, change: Augmentation, place: float) -> np.ndarray:
        """Read `length` samples at `place` (0..1) of an augmented window of one chunk: float32 (channels, length)."""
        window = self._read_near(pair, self.chunk, change.place)
        needed = fast_length((length + 2 * self.margin) * change.speed)
        if change.speed == 1 or needed > self.chunk:
            margin, needed = 0, length
        else:
            margin = self.margin
        offset = round(place * (self.chunk - needed))
        x = change_speed(window[:, offset : offset + needed], length + 2 * margin)
        return self._finish(x[:, margin : margin + length], rms_gain(window), change)

    def _finish(self, x: np.ndarray, level: float, change: Augmentation) -> np.ndarray:
        x = x[::-1] if change.swap else x
        return np.ascontiguousarray(x * np.float32(level * change.gain))

    def _input_start(self, pair: int) -> int:
        return (int(self.split.pairs[pair, 0]) - self.song(pair)["first_row"]) * self.chunk

    def _read_near(self, pair: int, length: int, place: float) -> np.ndarray:
        start, song = self._input_start(pair), self.song(pair)
        latest = min(start + self.chunk // 2, song["rows"] * self.chunk - length)
        earliest = min(max(start - self.chunk // 2, 0), latest)
        return self._read(song, earliest + round(place * (latest - earliest)), length)

    def _read(self, song: dict, start: int, length: int) -> np.ndarray:
        return read_window(self.split, song, start, length).astype(np.float32) / INT16_SCALE


# Items: the elements of a batch, by number


class PairSampler:
    """Map from item number to pair: every epoch visits all pairs once, in a new random order."""

    def __init__(self, pairs: int, seed: int, stage: int):
        self.pairs, self.seed, self.stage = pairs, seed, stage
        self.epoch, self.permutation = -1, np.empty(0, int)

    def __getitem__(self, item: int) -> int:
        epoch, position = divmod(item, self.pairs)
        if epoch != self.epoch:
            self.epoch = epoch
            self.permutation = make_rng(self.seed, "order", self.stage, epoch).permutation(self.pairs)
        return int(self.permutation[position])


def items_of_rank(first: int, batch_size: int, rank: int, processes: int):
    """Yield, without end, the numbers of the items that process `rank` reads, from `first` on: one of every
    `processes` batches."""
    for start in itertools.count(first + rank * batch_size, processes * batch_size):
        yield from range(start, start + batch_size)


class CropItems:
    """Items of stage 1: x, a random crop of audio (channels, crop_samples), and the noise for its latents."""

    def __init__(self, windows: Windows, noise_shape: tuple[int, int], crop_samples: int, seed: int):
        self.windows, self.noise_shape, self.crop_samples, self.seed = windows, noise_shape, crop_samples, seed
        self.sampler = PairSampler(len(windows), seed, stage=1)

    def __getitem__(self, item: int) -> dict:
        rng = make_rng(self.seed, "crop", item)
        change = Augmentation.sample(rng)
        x = self.windows.crop(self.sampler[item], self.crop_samples, change, rng.uniform())
        return {"x": x, **sample_latent_noise(rng, self.noise_shape)}


def sample_latent_noise(rng: np.random.Generator, shape: tuple[int, int]) -> dict:
    """Sample the noise of the reparametrisation, and noise of a random strength 0..1 that makes decoding robust;
    shape: (latent_channels, latents)."""
    posterior, robust = rng.standard_normal((2, *shape), dtype=np.float32)
    return {"posterior_noise": posterior, "robust_noise": robust * np.float32(rng.uniform())}


class PairItems:
    """Items of stage 2: an encoded pair from the latent cache (see ContinuationModel.encode_pair), and the random
    inputs of the flow (see `sample_flow`)."""

    def __init__(self, pairs: int, shape: tuple[int, int], variants: int, seed: int, cache):
        """shape: (latent_channels, latents) of a chunk; cache: a LatentCache."""
        self.shape, self.variants, self.seed, self.cache = shape, variants, seed, cache
        self.sampler = PairSampler(pairs, seed, stage=2)

    def __getitem__(self, item: int) -> dict:
        rng = make_rng(self.seed, "pair", item)
        variant = int(rng.integers(self.variants))
        return self.cache.read(variant, self.sampler[item]) | sample_flow(rng, self.shape)


class JointItems:
    """Items of the joint part of stage 2: a crop, as in stage 1, and an encoded pair."""

    def __init__(self, crops: CropItems, pairs: PairItems):
        self.crops, self.pairs = crops, pairs

    def __getitem__(self, item: int) -> dict:
        return self.crops[item] | self.pairs[item]


class WindowItems:
    """Augmented windows that one variant of the latent cache encodes, by pair: x (channels, 2 * chunk)."""

    def __init__(self, windows: Windows, variant: int, seed: int):
        self.windows, self.variant, self.seed = windows, variant, seed

    def __getitem__(self, pair: int) -> dict:
        change = Augmentation.sample(make_rng(self.seed, "window", self.variant, pair))
        return {"x": self.windows.window(pair, 2, change)}


class FixedPairItems:
    """Items of the legacy network: the pairs (0, 1), (2, 3), ... of every song without augmentation, x (channels, 2 *
    chunk)."""

    def __init__(self, windows: Windows, seed: int, stage: int):
        self.windows = windows
        rows = windows.split.pairs[:, 0]
        first_rows = np.array([song["first_row"] for song in windows.split.songs])[windows.song_of_pair]
        self.pairs = np.flatnonzero((rows - first_rows) % 2 == 0)
        self.sampler = PairSampler(len(self.pairs), seed, stage)

    def __getitem__(self, item: int) -> dict:
        return {"x": self.windows.pair(int(self.pairs[self.sampler[item]]))}


def sample_flow(rng: np.random.Generator, shape: tuple[int, int]) -> dict:
    """Sample the random inputs of the rectified flow for one item; shape: (latent_channels, latents).

    time: logit-normal, shifted towards noise (Esser et al. 2024), 0 in 15 % of the samples. context_share: the share
    of the context that is given, all in 70 %, only its end in 20 %, nothing in 10 %. context_noise: added to the
    context's latents, in half of the samples.
    """
    flow_noise, context_noise = rng.standard_normal((2, *shape), dtype=np.float32)
    time = 0.0 if rng.random() < 0.15 else 1 / (1 + TIME_SHIFT * np.exp(-rng.standard_normal()))
    share = rng.choice((1.0, rng.uniform(0.1, 1.0), 0.0), p=(0.7, 0.2, 0.1))
    strength = rng.uniform(0, 0.3) if rng.random() < 0.5 else 0.0
    return {
        "flow_noise": flow_noise,
        "context_noise": context_noise * np.float32(strength),
        "time": np.float32(time),
        "context_share": np.float32(share),
    }
