"""Combs: tones at the multiples of a network's frame rates, which its decoder may leave in its output."""

import numpy as np

from continuation.metrics.arithmetic import mean_of_defined
from continuation.metrics.sound import WELCH_SIZE, Sound

LEGACY_COMB_HZ = 300
COMB_FIRST_HZ = 150.0
COMB_PEAK_HZ = 2.0
COMB_SURROUNDINGS = 0.2


def comb(x: Sound, spacing_hz: float) -> float:
    """Compute by how many dB the multiples of `spacing_hz` exceed their surroundings; subtract the truth's own value.

    Welch spectrum, n = 32768 (Hann, half overlapped). For each multiple from 150 Hz up: the peak within 2 Hz
    minus the median within +-20 % of the spacing, in dB; the mean over the multiples. White noise gives about
    2.5 dB (10 s at 12 kHz), because a peak is compared with a median. Undefined for silence and for less than
    32768 samples.
    """
    return mean_of_defined(list(_heights(x, spacing_hz).values()))


def combs_above_truth(reference: Sound, estimate: Sound, latent_rate: float, hop_rate: float) -> dict[str, float]:
    """Compute `comb` of the estimate minus that of the truth, in dB, at the latent rate, the hop rate and 300 Hz."""
    spacings = {"latent": latent_rate, "hop": hop_rate, "300": LEGACY_COMB_HZ}
    return {
        f"comb_{name}_db": comb(estimate, spacing) - comb(reference, spacing) for name, spacing in spacings.items()
    }


def hum(reference: Sound, estimate: Sound, latent_rate: float, hop_rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the multiples that `combs_above_truth` averages, in Hz, and by how many dB the estimate exceeds the
    truth at each; both empty where either is undefined.

    One loud tone among sixty multiples hardly changes their mean. Averaged over songs, whose own partials differ, it
    shows at its multiple.
    """
    differences = {}
    for spacing in dict.fromkeys((latent_rate, hop_rate, LEGACY_COMB_HZ)):
        found, own = _heights(estimate, spacing), _heights(reference, spacing)
        if found and own:
            differences |= {frequency: height - own[frequency] for frequency, height in found.items()}
    return np.array(list(differences)), np.array(list(differences.values()))


def _heights(x: Sound, spacing_hz: float) -> dict[float, float]:
    """Compute frequency in Hz of each multiple of `spacing_hz` -> its height in dB above its surroundings, mean over
    the channels; empty where the spectrum is undefined."""
    level = x.welch_db
    if not len(level):
        return {}
    frequencies = np.arange(WELCH_SIZE // 2 + 1) * x.sample_rate / WELCH_SIZE
    reach = COMB_SURROUNDINGS * spacing_hz
    first = int(np.ceil(COMB_FIRST_HZ / spacing_hz))
    last = int((x.sample_rate / 2 - reach) // spacing_hz)
    heights = {}
    for centre in spacing_hz * np.arange(first, last + 1):
        near = slice(*np.searchsorted(frequencies, (centre - COMB_PEAK_HZ, centre + COMB_PEAK_HZ)))
        around = slice(*np.searchsorted(frequencies, (centre - reach, centre + reach)))
        height = level[:, near].max(axis=-1) - np.median(level[:, around], axis=-1)
        heights[float(centre)] = float(height.mean())
    return heights
