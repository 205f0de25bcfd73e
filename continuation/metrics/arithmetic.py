"""Arithmetic of the measures: decibels, and quotients and means of partly undefined values."""

import numpy as np

LIMIT_DB = 100.0


def check_pair(reference: np.ndarray, estimate: np.ndarray) -> None:
    """Raise ValueError unless both are (channels, samples) of one shape."""
    if reference.ndim != 2 or reference.shape != estimate.shape:
        raise ValueError(
            f"expected two (channels, samples) arrays of one shape, got {reference.shape} and {estimate.shape}"
        )


def decibels(power_ratio: np.ndarray | float) -> np.ndarray:
    """Compute 10 log10, limited to +-100 dB; nan stays nan."""
    smallest, largest = 10 ** (-LIMIT_DB / 10), 10 ** (LIMIT_DB / 10)
    return 10 * np.log10(np.clip(power_ratio, smallest, largest))


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide elementwise; x / 0 is inf and 0 / 0 is nan, without a warning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(numerator, dtype=np.float64) / np.asarray(denominator, dtype=np.float64)


def mean_of_defined(values: np.ndarray) -> float:
    """Compute the mean of the defined values; nan where there is none."""
    defined = np.asarray(values, dtype=np.float64)
    defined = defined[~np.isnan(defined)]
    return float(defined.mean()) if defined.size else float("nan")


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the Pearson correlation along the last axis; nan where either is constant."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
    return divide(np.sum(a * b, axis=-1), np.sqrt(np.sum(a * a, axis=-1) * np.sum(b * b, axis=-1)))
