"""Spectra and bands, and the two spectral measures of both reconstructions and continuations."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy import fft, signal

from continuation.metrics.arithmetic import LIMIT_DB, check_pair, decibels, mean_of_defined

CONTINUATION_BANDS_HZ = (0, 150, 400, 1000, 2000, 3500, 6000)
MR_STFT_SIZES = (2048, 1024, 512, 256, 128)
MR_STFT_FLOOR = 1e-3


def mr_stft_distance(reference: np.ndarray, estimate: np.ndarray) -> float:
    """Compute the multi-resolution STFT distance, without unit; 0 for equal spectrograms.

    It is the mean over n = 2048, 1024, 512, 256, 128 of mean |ln ratio| (magnitudes below 1e-3 count as 1e-3) + mean
    |difference| / (mean |S_ref| + 1e-3). After Yamamoto et al., "Parallel WaveGAN", 2020, with an L1 in place of the
    Frobenius convergence. Means are over all channels together.
    """
    check_pair(reference, estimate)
    return mean_of_defined(
        [_stft_distance(stft_magnitudes(reference, n), stft_magnitudes(estimate, n)) for n in MR_STFT_SIZES]
    )


def _stft_distance(reference: np.ndarray, estimate: np.ndarray) -> float:
    if not reference.size:
        return float("nan")
    log_ratio = np.log(np.maximum(estimate, MR_STFT_FLOOR) / np.maximum(reference, MR_STFT_FLOOR))
    difference = np.mean(np.abs(estimate - reference), dtype=np.float64)
    return float(
        np.mean(np.abs(log_ratio), dtype=np.float64)
        + difference / (np.mean(reference, dtype=np.float64) + MR_STFT_FLOOR)
    )


def band_energy_ratios_db(
    reference: np.ndarray,
    estimate: np.ndarray,
    sample_rate: int,
    edges_hz: Sequence[float] = CONTINUATION_BANDS_HZ,
) -> dict[str, float]:
    """Compute the energy of the estimate over that of the reference in dB, by band, all channels together.

    Undefined where the reference has less than -100 dB of its own energy in the band.
    """
    check_pair(reference, estimate)
    expected, found = power_spectrum(reference), power_spectrum(estimate)
    smallest = expected.sum() * 10 ** (-LIMIT_DB / 10)
    ratios = {}
    for name, low, high in bands(edges_hz, sample_rate):
        bins = band_bins(reference.shape[-1], sample_rate, low, high)
        energy = expected[bins].sum()
        ratios[name] = float(decibels(found[bins].sum() / energy)) if energy > smallest else float("nan")
    return ratios


def stft_magnitudes(x: np.ndarray, size: int) -> np.ndarray:
    """Compute |S| of (channels, samples): (channels, frames, size // 2 + 1), without frames if x is too short."""
    if x.shape[-1] < size:
        return np.zeros((x.shape[0], 0, size // 2 + 1), dtype=np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(x.astype(np.float32, copy=False), size, axis=-1)
    window = signal.get_window("hann", size).astype(np.float32)
    return np.abs(fft.rfft(frames[:, :: size // 4] * window))  # (channels, frames, bins)


def power_spectrum(x: np.ndarray) -> np.ndarray:
    """Compute |DFT of the whole signal|^2, summed over channels."""
    return np.square(np.abs(fft.rfft(x.astype(np.float64)))).sum(axis=0)


def bands(edges_hz: Sequence[float], sample_rate: int) -> list[tuple[str, float, float]]:
    """List (name, low, high) of the bands between the edges that begin below the Nyquist frequency."""
    return [(f"{low}_{high}", low, high) for low, high in pairwise(edges_hz) if low < sample_rate / 2]


def band_bins(size: int, sample_rate: int, low: float, high: float) -> slice:
    """Return the bins low <= f < high of a real DFT; a band up to the Nyquist frequency includes it."""
    first = int(np.ceil(low * size / sample_rate))
    last = size // 2 + 1 if high >= sample_rate / 2 else int(np.ceil(high * size / sample_rate))
    return slice(first, last)


def band_pass(x: np.ndarray, sample_rate: int, low: float, high: float) -> np.ndarray:
    """Apply a zero-phase band-pass by one DFT of the whole signal; the bands of a partition add up to x."""
    spectrum = fft.rfft(x.astype(np.float64))
    kept = np.zeros_like(spectrum)
    bins = band_bins(x.shape[-1], sample_rate, low, high)
    kept[:, bins] = spectrum[:, bins]
    return fft.irfft(kept, n=x.shape[-1])
