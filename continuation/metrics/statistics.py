"""Means and intervals over songs, never over pairs, since pairs of one song are not independent."""

from collections.abc import Iterable, Sequence

import numpy as np

from continuation.metrics.arithmetic import mean_of_defined

BOOTSTRAP_DRAWS = 5000
NORMAL_QUANTILE = 1.96  # of 95 %


def per_song(values: Sequence[float], songs: Sequence[str | int]) -> dict[str | int, float]:
    """Compute the mean of the defined values of each song, in the order of first appearance."""
    grouped: dict[str | int, list[float]] = {}
    for value, song in zip(values, songs, strict=True):
        grouped.setdefault(song, []).append(value)
    return {song: mean_of_defined(group) for song, group in grouped.items()}


def bootstrap_interval(values_per_song: Iterable[float], seed: int = 0) -> tuple[float, float, float]:
    """Compute the mean over songs and its 95 % percentile bootstrap interval: (mean, low, high).

    values_per_song: one value per song, nan where undefined (left out). With fewer than two songs the interval is
    nan. Efron and Tibshirani, "An Introduction to the Bootstrap", 1993.
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
    """Compute the bootstrap interval of the difference (first - second) over the songs in which both are defined."""
    return bootstrap_interval(np.subtract(values_per_song, others_per_song), seed)


def jackknife_interval(value: float, without_each_song: Sequence[float]) -> tuple[float, float, float]:
    """Compute the 95 % interval of a statistic of all songs from its values without each song: (value, low, high).

    It is for statistics that are no means over songs, and in which songs drawn twice, as in a bootstrap, would count
    as similar. Tukey's jackknife with the normal quantile: Efron and Tibshirani, 1993, chapter 11. The interval is
    nan with fewer than two songs.
    """
    without = np.asarray(without_each_song, dtype=np.float64)
    if len(without) < 2:
        return value, float("nan"), float("nan")
    error = np.sqrt((len(without) - 1) * without.var())
    return value, float(value - NORMAL_QUANTILE * error), float(value + NORMAL_QUANTILE * error)
