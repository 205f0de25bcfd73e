"""Means and intervals: over songs, never over pairs, since pairs of one song are alike."""

from collections.abc import Iterable, Sequence

import numpy as np

from continuation.metrics.arithmetic import mean_of_defined

BOOTSTRAP_DRAWS = 5000
NORMAL_QUANTILE = 1.96  # of 95 %


def per_song(values: Sequence[float], songs: Sequence[str | int]) -> dict[str | int, float]:
    """Mean of the defined values of each song, in the order of first appearance."""
    grouped: dict[str | int, list[float]] = {}
    for value, song in zip(values, songs, strict=True):
        grouped.setdefault(song, []).append(value)
    return {song: mean_of_defined(group) for song, group in grouped.items()}


def bootstrap_interval(values_per_song: Iterable[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean over songs and its 95 % percentile bootstrap interval: (mean, low, high).

    One value a song, nan where undefined (left out). With fewer than two songs the interval is nan. Efron and
    Tibshirani, "An Introduction to the Bootstrap", 1993.
    """
    values = np.asarray(list(values_per_song), dtype=np.float64)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return mean_of_defined(values), float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(len(values), size=(BOOTSTRAP_DRAWS, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def paired_interval(
    values_per_song: Sequence[float], others_per_song: Sequence[float], seed: int = 0
) -> tuple[float, float, float]:
    """Bootstrap interval of the difference (first - second) over the songs in which both are defined."""
    return bootstrap_interval(np.subtract(values_per_song, others_per_song), seed)


def jackknife_interval(value: float, without_each_song: Sequence[float]) -> tuple[float, float, float]:
    """A statistic of all songs with its 95 % interval from its values without each of them: (value, low, high).

    For what is no mean over songs, and where songs drawn twice, as in a bootstrap, would count as alike. Tukey's
    jackknife with the normal quantile: Efron and Tibshirani, 1993, chapter 11. nan with fewer than two songs.
    """
    without = np.asarray(without_each_song, dtype=np.float64)
    if len(without) < 2:
        return value, float("nan"), float("nan")
    error = np.sqrt((len(without) - 1) * without.var())
    return value, float(value - NORMAL_QUANTILE * error), float(value + NORMAL_QUANTILE * error)
