"""Windows of audio at the pairs of a split, and their augmentation.

    windows = Windows(splits["train"], meta)
    windows.pair(17)                                        # float32 (channels, 2 * chunk)

batches.py makes the items of training batches from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import fft

from continuation.audio import INT16_SCALE
from continuation.dataset import Split, read_window
from continuation.layers import CONTEXT_LEVEL, QUIETEST_RMS
from continuation.rng import make_rng

GAIN_RANGE_DB = (-6, 3)
SPEED_RANGE = 0.06  # about a semitone
MARGIN_SECONDS = 0.05  # cut off after a change of speed, where the circular resampling wraps around
PASSAGE_DISTANCE = 2  # fewest chunks between a pair and another passage of its song


def next_other(groups: Sequence, i: int) -> int | None:
    """Return the index of the next of `groups` after the i-th, cyclically, that differs from it, so that its music
    does too; None where all are equal."""
    following = [*range(i + 1, len(groups)), *range(i)]
    return next((j for j in following if groups[j] != groups[i]), None)


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
    anywhere in the music; its first chunk sets its level, times the gain of its augmentation.
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

    def _finish(self, x: np.ndarray, gain: float, change: Augmentation) -> np.ndarray:
        x = x[::-1] if change.swap else x
        return np.ascontiguousarray(x * np.float32(gain * change.gain))

    def _input_start(self, pair: int) -> int:
        return (int(self.split.pairs[pair, 0]) - self.song(pair)["first_row"]) * self.chunk

    def _read_near(self, pair: int, length: int, place: float) -> np.ndarray:
        start, song = self._input_start(pair), self.song(pair)
        latest = min(start + self.chunk // 2, song["rows"] * self.chunk - length)
        earliest = min(max(start - self.chunk // 2, 0), latest)
        return self._read(song, earliest + round(place * (latest - earliest)), length)

    def _read(self, song: dict, start: int, length: int) -> np.ndarray:
        return read_window(self.split, song, start, length).astype(np.float32) / INT16_SCALE
