"""Measures of a continuation, relative to its context and to the true continuation."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from scipy import fft

from continuation.metrics.arithmetic import check_pair, decibels, divide, mean_of_defined
from continuation.metrics.rhythm import beat_measures, onset_correlation
from continuation.metrics.sound import Sound
from continuation.metrics.spectra import band_bins, band_energy_ratios_db, mr_stft_distance, stft_magnitudes

HORIZONS_SECONDS = (0, 1, 3, 10)
CHROMA_SIZE_AT_12K = 4096
CHROMA_HZ = (55, 2000)
KEY_PROFILES = (  # of major and minor, by semitones above the tonic
    (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
)
CLICK_SIZE = 256
CLICK_ABOVE_HZ = 2000
CLICK_SECONDS = 0.04
COPY_SECONDS = 2.0
COPY_FRAME_SECONDS = 0.05
COPY_BANDS = 24
COPY_LOWEST_HZ = 60
LARGEST_STD_RATIO = 100.0


def continuation_measures(
    context: Sound, reference: Sound, estimate: Sound, seams: Sequence[int] = ()
) -> dict[str, float]:
    """Compute all measures of a continuation (estimate) against the true one (reference) after the same context.

    Loudness and energy ratios are in dB, by horizon. The join click of the truth, and the copy index minus the
    truth's own, have keys of their own. seams: samples of the estimate at which copies of the context restart.
    """
    rate = context.sample_rate
    past, true, found = context.samples, reference.samples, estimate.samples
    copied, own = copy_index(past, found, rate), copy_index(past, true, rate)
    loudness = loudness_ratio_db(true, found)
    measures = {
        "mr_stft": mr_stft_distance(true, found),
        "loudness_db": loudness,
        "loudness_error_db": abs(loudness),
        "chroma_cosine": chroma_cosine(true, found, rate),
        "key_agreement": key_agreement(true, found, rate),
        "onset_correlation": onset_correlation(reference, estimate),
        **beat_measures(context, reference, estimate),
        "join_click_percentile": mean_of_defined(click_percentiles(past, found, rate)),
        "join_click_percentile_truth": mean_of_defined(click_percentiles(past, true, rate)),
        "seam_click_percentile": mean_of_defined(click_percentiles(past, found, rate, seams)),
        "copy_index": copied,
        "copy_index_above_truth": copied - own,
    }
    true_parts = horizons(true, rate)
    for horizon, part in horizons(found, rate).items():
        measures[f"loudness_{horizon}_db"] = loudness_ratio_db(true_parts[horizon], part)
        for band, ratio in band_energy_ratios_db(true_parts[horizon], part, rate).items():
            measures[f"energy_{band}_{horizon}_db"] = ratio
    return measures


def loudness_ratio_db(reference: np.ndarray, estimate: np.ndarray) -> float:
    """Compute the RMS of the estimate over that of the reference in dB, all channels together; silent truth: nan."""
    expected, found = (np.sum(np.square(x, dtype=np.float64)) / x.size for x in (reference, estimate))
    return float(decibels(divide(found, expected))) if expected > 0 else float("nan")


def horizons(x: np.ndarray, sample_rate: int) -> dict[str, np.ndarray]:
    """Return the parts 0-1, 1-3 and 3-10 s after the join of a continuation, as far as it reaches."""
    parts = {
        f"{start}_{end}s": x[:, start * sample_rate : end * sample_rate] for start, end in pairwise(HORIZONS_SECONDS)
    }
    return {name: part for name, part in parts.items() if part.shape[-1]}


def chroma_cosine(reference: np.ndarray, estimate: np.ndarray, sample_rate: int) -> float:
    """Compute the cosine similarity of the mean pitch-class profiles, 0..1: do both use the same notes? Undefined for
    silence.

    The profile is |S|^2 of the sum of the channels between 55 and 2000 Hz (n = 4096 at 12 kHz, the same duration at
    other rates), each bin assigned to its nearest semitone (A = 440 Hz), every frame scaled to sum 1. After
    Fujishima, "Realtime chord recognition of musical sound", 1999.
    """
    check_pair(reference, estimate)
    a, b = (_pitch_classes(x, sample_rate) for x in (reference, estimate))
    return float(divide(np.dot(a, b), np.linalg.norm(a) * np.linalg.norm(b)))


def _pitch_classes(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Compute the mean over frames of the shares of the 12 pitch classes; zeros for silence."""
    size = 4 * round(CHROMA_SIZE_AT_12K * sample_rate / 12000 / 4)
    frequencies = np.arange(size // 2 + 1) * sample_rate / size
    bins = np.flatnonzero((frequencies >= CHROMA_HZ[0]) & (frequencies < CHROMA_HZ[1]))
    pitch = np.round(12 * np.log2(frequencies[bins] / 440)).astype(int) % 12
    power = np.square(stft_magnitudes(x.mean(axis=0, keepdims=True), size)[0][:, bins], dtype=np.float64)
    classes = power @ (pitch[:, None] == np.arange(12))
    sums = classes.sum(axis=1, keepdims=True)
    sounding = sums[:, 0] > 0
    return (classes[sounding] / sums[sounding]).mean(axis=0) if sounding.any() else np.zeros(12)


def key(x: np.ndarray, sample_rate: int) -> int | None:
    """Estimate the key whose profile correlates best with the mean pitch classes (Krumhansl, Cognitive Foundations of
    Musical Pitch, 1990): 0..23, the tonic's pitch class from A up, plus 12 for minor. None for silence."""
    classes = _pitch_classes(x, sample_rate)
    if not classes.any():
        return None
    rotations = [np.roll(profile, tonic) for profile in KEY_PROFILES for tonic in range(12)]
    return int(np.argmax([np.corrcoef(classes, rotation)[0, 1] for rotation in rotations]))


def key_agreement(reference: np.ndarray, estimate: np.ndarray, sample_rate: int) -> float:
    """Return 1 if both have the same key, else 0; undefined for silence."""
    a, b = key(reference, sample_rate), key(estimate, sample_rate)
    return float("nan") if a is None or b is None else float(a == b)


def click_percentiles(
    context: np.ndarray, continuation: np.ndarray, sample_rate: int, places: Sequence[int] = (0,)
) -> np.ndarray:
    """Compute the percentile, 0..100 each, of the spectral flux at `places`, in samples after the join, among the
    input's own attacks: high values are clicks.

    Flux: the sum over channels and bins above 2 kHz of the growth of |S| from frame to frame (n = 256). Its maximum
    from 30 ms before the place, where the crossfade lies, to 10 ms after it is ranked among the maxima of consecutive
    40 ms of the input; equal values count half. Undefined where the input is silent above 2 kHz, and for a place too
    near to the end.
    """
    hop = CLICK_SIZE // 4
    magnitudes = stft_magnitudes(np.concatenate([context, continuation], axis=-1), CLICK_SIZE)
    high = magnitudes[..., band_bins(CLICK_SIZE, sample_rate, CLICK_ABOVE_HZ, sample_rate / 2)]
    flux = np.maximum(np.diff(high, axis=1), 0).sum(axis=(0, 2))
    length = round(CLICK_SECONDS * sample_rate / hop)
    # Flux i is centred between frames i and i + 1.
    centres = ((context.shape[-1] + np.asarray(places)) - CLICK_SIZE / 2) / hop - 0.5
    starts = np.round(centres - 0.75 * length).astype(int)
    join = round((context.shape[-1] - CLICK_SIZE / 2) / hop - 0.5 - 0.75 * length)
    own = flux[join % length : join].reshape(-1, length).max(axis=1) if join >= length else np.zeros(0)
    return np.array([_percentile(own, flux[start : start + length]) for start in starts])


def _percentile(own: np.ndarray, found: np.ndarray) -> float:
    """Compute the percentile of the maximum of `found` among `own`."""
    if not np.any(own) or not found.size:
        return float("nan")
    return float(100 * np.mean((own < found.max()) + 0.5 * (own == found.max())))


def copy_index(context: np.ndarray, continuation: np.ndarray, sample_rate: int) -> float:
    """Compute how literally the continuation repeats the input, -1..1; subtract the truth's own value.

    For every 2 s of the continuation (every 1 s), the largest Pearson correlation with 2 s of the input at any lag;
    the mean over these. Correlated are log energies every 50 ms in 24 bands, equal in log frequency from 60 Hz up,
    less each band's mean over the passage, so that sharing a timbre does not count. Undefined for silence and below
    2 s.
    """
    inputs, outputs = passages(context, sample_rate, COPY_FRAME_SECONDS), passages(continuation, sample_rate, 1.0)
    if not len(inputs) or not len(outputs):
        return float("nan")
    return float((outputs @ inputs.T).max(axis=1).mean())


def passages(x: np.ndarray, sample_rate: int, step_seconds: float) -> np.ndarray:
    """Compute the passages that `copy_index` compares: 2 s of band levels every `step_seconds`, with mean 0 and norm
    1, so that the product of two is their correlation: (passages, bands * frames). Constant ones (silence) are
    dropped."""
    levels = _band_levels(x, sample_rate)
    length, step = round(COPY_SECONDS / COPY_FRAME_SECONDS), round(step_seconds / COPY_FRAME_SECONDS)
    if len(levels) < length:
        return np.zeros((0, length * levels.shape[1]))
    windows = np.lib.stride_tricks.sliding_window_view(levels, length, axis=0)[::step]
    windows = windows.reshape(len(windows), -1)
    windows = windows - windows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(windows, axis=1, keepdims=True)
    moving = norms[:, 0] > 1e-6
    return windows[moving] / norms[moving]


def _band_levels(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Compute the log energies (frames, 24 bands) of the sum of the channels, every 50 ms, less each band's mean."""
    frame = round(COPY_FRAME_SECONDS * sample_rate)
    mono = x.mean(axis=0)
    frames = mono[: mono.size // frame * frame].reshape(-1, frame) * np.hanning(frame)
    power = np.square(np.abs(fft.rfft(frames, n=4 * frame)))
    edges = np.geomspace(COPY_LOWEST_HZ, sample_rate / 2, COPY_BANDS + 1)
    bins = np.round(edges * 4 * frame / sample_rate).astype(int)
    energies = np.stack([power[:, low:high].sum(axis=1) for low, high in pairwise(bins)], axis=1)
    levels = np.log(energies + 1e-6 * energies.max(initial=0.0) + 1e-12)
    return levels - levels.mean(axis=0)


def nearest_similarity(found: np.ndarray, rows: Iterable[np.ndarray], sample_rate: int) -> np.ndarray:
    """Compute for each of `found` (`passages` of continuations) the largest correlation with a passage of any of
    `rows` (channels, samples), at any lag, as a measure of memorisation; nan where all rows are silent."""
    nearest = np.full(len(found), np.nan)
    for row in rows:
        learned = passages(row, sample_rate, COPY_FRAME_SECONDS)
        if len(learned):
            nearest = np.fmax(nearest, (found @ learned.T.astype(found.dtype)).max(axis=1))
    return nearest


def latent_diversity(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the mean squared difference of two samples of latents (channels, latents), relative to that of
    independent ones of the same spread, twice their variance over time: 0 for equal, 1 for unrelated samples."""
    difference = np.mean((a - b) ** 2, axis=-1, dtype=np.float64)
    spread = a.var(axis=-1, dtype=np.float64) + b.var(axis=-1, dtype=np.float64)
    return mean_of_defined(divide(difference, spread))


def latent_std_ratios(reference: np.ndarray, estimate: np.ndarray) -> dict[str, float]:
    """Compute the standard deviation over time of predicted latents relative to that of true ones: 1 is right, 0 is
    collapse.

    Both: (pairs, channels, latents), of the pairs of one song; variances are averaged over the pairs, so that offsets
    between pairs do not count. Keys: the median over the channels, their lower and upper decile, and `worst_decile`,
    the larger of 1 / lower and upper: 1.25 means 'from 0.8 to 1.25' (at most 100, so that a mean over songs stays
    finite). Channels in which the truth is constant are left out.
    """
    names = [f"latent_std_ratio_{name}" for name in ("median", "lower_decile", "upper_decile", "worst_decile")]
    expected, found = (x.var(axis=-1, dtype=np.float64).mean(axis=0) for x in (reference, estimate))
    moving = expected > 0
    if not moving.any():
        return dict.fromkeys(names, float("nan"))
    low, median, high = np.percentile(np.sqrt(found[moving] / expected[moving]), (10, 50, 90)).tolist()
    worst = min(LARGEST_STD_RATIO, max(high, 1 / max(low, 1 / LARGEST_STD_RATIO)))
    return dict(zip(names, (median, low, high, worst), strict=True))
