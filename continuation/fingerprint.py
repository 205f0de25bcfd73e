"""Fingerprints of songs, which find the same music in two files of different encoders, levels and trims.

printer = fingerprint.Fingerprinter(sample_rate=24000)
for block in blocks: printer.add(block)          # float32 (channels, samples)
bits = fingerprint.read_fingerprint(printer.result())
fingerprint.find_same_music([bits, ...])         # (i, j, similarity) of every match
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from continuation.cli import UsageError, available_cores

FINGERPRINTS_PER_SECOND = 4
FINGERPRINT_SECONDS = 300  # of a song's beginning
FINGERPRINT_BANDS = 32
_MOST_FRAMES = FINGERPRINT_SECONDS * FINGERPRINTS_PER_SECOND
SAME_MUSIC_SIMILARITY = 0.38  # see docs/experiments.md
_BAND_EDGES_HZ = np.rint(np.geomspace(250, 3000, FINGERPRINT_BANDS + 2)).astype(int)
_FFT_FRAMES = 8  # at once: a fast FFT, in bounded memory
_TIME_LAG = 2  # fingerprint frames
_SILENCE = 1e-6  # of a song's loudest frame: -60 dB
_SEGMENT_FRAMES = 30 * FINGERPRINTS_PER_SECOND
_LEAST_FRAMES = 32  # of a song of 9 s; fewer frames agree with anything
_QUERY_SONGS, _LONGER_SONGS = 8, 16  # a block: their products take some 50 MB
_QUERY_FRAMES = 10800  # of a block with more queries, when all songs are short


class Fingerprinter:
    """Fingerprint of audio that comes in blocks; it is robust against mp3 encoding, level and trimming.

    Every 250 ms: the energy of one second in 33 bands from 250 to 3000 Hz, summed over the channels (the energy of
    the sum of the channels would vanish where they are of opposite phase). Of these energies: the sign of the
    difference between neighbouring bands, less that half a second earlier, so that neither level nor equaliser
    matters (after Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System", 2002, with longer frames): -1, 0
    or 1, where 0 is silence. Memory: the energies of the first five minutes.
    """

    def __init__(self, sample_rate: int):
        self._window = np.hanning(sample_rate).astype(np.float32)  # 1 s, so that bin k lies at k Hz
        self._hop = sample_rate // FINGERPRINTS_PER_SECOND
        self._rest: np.ndarray | None = None  # (channels, n), what the next frames need
        self._energies: list[np.ndarray] = []

    def add(self, block: np.ndarray) -> None:
        """Add a block, float32 (channels, n)."""
        if self._is_full():
            return
        joined = block if self._rest is None else np.concatenate([self._rest, block], axis=1)
        frames = max(0, 1 + (joined.shape[1] - len(self._window)) // self._hop)
        for first in range(0, frames, _FFT_FRAMES):
            last = min(first + _FFT_FRAMES, frames)
            span = joined[:, first * self._hop : (last - 1) * self._hop + len(self._window)]
            self._energies += list(self._band_energies(span))
        del self._energies[_MOST_FRAMES:]
        self._rest = joined[:, frames * self._hop :].copy()

    def result(self) -> str:
        """Return the compressed matrix int8 (frames, bands) as text, at most 8 kB; see `read_fingerprint`."""
        bits = np.zeros((0, FINGERPRINT_BANDS), np.int8)
        if len(self._energies) > _TIME_LAG:
            bits = _sign_bits(np.stack(self._energies).astype(np.float64))
        return base64.b64encode(zlib.compress(bits.tobytes())).decode("ascii")

    def _is_full(self) -> bool:
        return len(self._energies) == _MOST_FRAMES

    def _band_energies(self, x: np.ndarray) -> np.ndarray:
        """Return the energies (frames, bands + 1) of all whole frames in x (channels, n)."""
        from scipy import fft  # here, because of all programs only the workers of preprocess.py need it

        seconds = np.lib.stride_tricks.sliding_window_view(x, len(self._window), axis=1)[:, :: self._hop]
        spectra = fft.rfft(seconds * self._window)[..., : _BAND_EDGES_HZ[-1]]
        power = np.zeros((spectra.shape[1], _BAND_EDGES_HZ[-1]))  # a low sample rate has nothing in the upper bands
        power[:, : spectra.shape[2]] = (spectra.real**2 + spectra.imag**2).sum(axis=0)
        return np.add.reduceat(power, _BAND_EDGES_HZ[:-1], axis=1)


def _sign_bits(energies: np.ndarray) -> np.ndarray:
    """Convert band energies (frames, bands + 1) to signs, int8 (frames - lag, bands)."""
    level = np.log(energies + _SILENCE * energies.mean() + 1e-20)
    across_bands = np.diff(level, axis=1)
    bits = np.sign(across_bands[_TIME_LAG:] - across_bands[:-_TIME_LAG]).astype(np.int8)
    loudness = energies.max(axis=1)
    audible = loudness > _SILENCE * loudness.max()
    bits[~(audible[_TIME_LAG:] | audible[:-_TIME_LAG])] = 0
    return bits


def read_fingerprint(text: str) -> np.ndarray:
    """Read the text of `Fingerprinter.result`: int8 (frames, bands); '' is a song without a fingerprint (no frames).

    Raises UsageError when the text is damaged.
    """
    if not text:
        return np.zeros((0, FINGERPRINT_BANDS), np.int8)
    try:
        compressed = base64.b64decode(text, validate=True)
        data = zlib.decompressobj().decompress(compressed, _MOST_FRAMES * FINGERPRINT_BANDS)
        return np.frombuffer(data, np.int8).reshape(-1, FINGERPRINT_BANDS)
    except (ValueError, zlib.error) as error:
        raise UsageError(f"damaged fingerprint: {error}") from error


def find_same_music(
    fingerprints: list[np.ndarray], threshold: float = SAME_MUSIC_SIMILARITY
) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, similarity) for every two fingerprints that share a passage of music.

    30 s of every minute of the shorter song are compared with the longer song at every lag; similarity is the largest
    mean product of their signs: 1 for equal, about 0 for unrelated. A segment that is mostly silence, or a song
    shorter than 9 s, matches nothing. All lags are computed at once by FFT, with the sum over bands as a matrix
    product at each frequency, in blocks of bounded memory, on all cores. Time grows with the square of the number of
    songs.
    """
    with ThreadPoolExecutor(available_cores()) as pool:
        yield from _matches(fingerprints, threshold, pool)


def _matches(
    fingerprints: list[np.ndarray], threshold: float, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, int, float]]:
    """Yield what `find_same_music` does; each block of shorter songs is compared with the longer ones in `pool`."""
    order = sorted(range(len(fingerprints)), key=lambda i: len(fingerprints[i]))
    order = [i for i in order if len(fingerprints[i]) >= _LEAST_FRAMES]
    longest = max((len(fingerprints[i]) for i in order), default=0)
    length = -(-(longest + _SEGMENT_FRAMES) // 90) * 90  # 2 * 3**2 * 5 times a small number: a fast FFT
    query_songs = max(_QUERY_SONGS, _QUERY_FRAMES // length)
    for first in range(0, len(order), query_songs):
        queries = order[first : first + query_songs]
        owners, segments = _segments([fingerprints[i] for i in queries])
        if not len(segments):
            continue
        sizes = np.abs(segments).sum(axis=(1, 2))
        spectra = np.fft.rfft(segments, length, axis=1).conj().astype(np.complex64).transpose(1, 2, 0)
        blocks = [order[second : second + _LONGER_SONGS] for second in range(first, len(order), _LONGER_SONGS)]
        agreement_with_queries = partial(_best_agreement, segments=spectra, length=length)
        agreements = pool.map(agreement_with_queries, [[fingerprints[i] for i in others] for others in blocks])
        for number, (others, agreement) in enumerate(zip(blocks, agreements, strict=True)):
            similarities = np.zeros((len(others), len(queries)), np.float32)
            np.maximum.at(similarities, (slice(None), owners), agreement / sizes)
            for m, k in np.argwhere(similarities >= threshold):
                if k < number * _LONGER_SONGS + m:
                    yield queries[k], others[m], float(similarities[m, k])


def _segments(fingerprints: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (owners (n,), segments (n, frames, bands)): 30 s of every minute, and each song's last 30 s."""
    owners, segments = [], []
    for owner, bits in enumerate(fingerprints):
        last = max(0, len(bits) - _SEGMENT_FRAMES)
        for start in sorted({*range(0, last, 2 * _SEGMENT_FRAMES), last}):
            part = bits[start : start + _SEGMENT_FRAMES].astype(np.float32)
            if np.abs(part).mean() > 0.5:
                owners.append(owner)
                segments.append(np.pad(part, ((0, _SEGMENT_FRAMES - len(part)), (0, 0))))
    shape = (-1, _SEGMENT_FRAMES, FINGERPRINT_BANDS)
    return np.array(owners, int), np.array(segments, np.float32).reshape(shape)


def _best_agreement(fingerprints: list[np.ndarray], segments: np.ndarray, length: int) -> np.ndarray:
    """Return the largest sum of products over all lags, (songs, n), for segment spectra (frequency, bands, n)."""
    padded = np.zeros((len(fingerprints), length, FINGERPRINT_BANDS), np.float32)
    for row, bits in zip(padded, fingerprints, strict=True):
        row[: len(bits)] = bits
    spectra = np.fft.rfft(padded, axis=1).astype(np.complex64).transpose(1, 0, 2)
    products = spectra @ segments  # (frequency, songs, n)
    return np.fft.irfft(products, length, axis=0).max(axis=0)
