"""Measures of a reconstruction against the original, and two reference signals for spectral distances."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage, signal

from continuation.metrics.arithmetic import check_pair, decibels, divide, mean_of_defined, pearson
from continuation.metrics.combs import combs_above_truth
from continuation.metrics.rhythm import onset_f
from continuation.metrics.sound import Sound
from continuation.metrics.spectra import (
    band_bins,
    band_energy_ratios_db,
    band_pass,
    bands,
    mr_stft_distance,
    stft_magnitudes,
)

RECONSTRUCTION_BANDS_HZ = (0, 300, 1000, 2500, 6000)
LOW_BAND_HZ = 1000
LSD_SIZE = 1024
LSD_RANGE_DB = 60.0
ENVELOPE_FRAME_SECONDS = 0.01
SMOOTH_SIZE_AT_12K = 512
SMOOTH_BINS_FRAMES = (5, 3)


def reconstruction_measures(
    reference: Sound, estimate: Sound, latent_rate: float, hop_rate: float
) -> dict[str, float]:
    """Compute all measures of a reconstruction under stable names; combs are minus the truth's own.

    `latent_rate` and `hop_rate` in Hz (at least 10). Bands: 0-300-1000-2500-6000 Hz.
    """
    pair = (reference.samples, estimate.samples)
    rate = reference.sample_rate
    measures = {
        "waveform_mse": waveform_mse(*pair),
        "si_sdr_db": si_sdr(*pair, rate),
        "si_sdr_below_1000_db": si_sdr(*pair, rate, below_hz=LOW_BAND_HZ),
        "onset_f": onset_f(reference, estimate),
        "mr_stft": mr_stft_distance(*pair),
        "mid_side_ratio_db": mid_side_energy_ratio_db(*pair),
    }
    for stem, unit, by_band in (
        ("lsd", "_db", log_spectral_distance(*pair, rate)),
        ("energy", "_db", band_energy_ratios_db(*pair, rate, RECONSTRUCTION_BANDS_HZ)),
        ("flatness", "_db", spectral_flatness_ratio_db(*pair, rate)),
        ("envelope_correlation", "", envelope_correlation(*pair, rate)),
    ):
        measures |= {f"{stem}_{band}{unit}": value for band, value in by_band.items()}
    return measures | combs_above_truth(reference, estimate, latent_rate, hop_rate)


def waveform_mse(reference: np.ndarray, estimate: np.ndarray) -> float:
    """Compute the mean squared difference of the samples (linear, full scale = 1)."""
    check_pair(reference, estimate)
    return float(np.mean(np.square(reference.astype(np.float64) - estimate)))


def si_sdr(reference: np.ndarray, estimate: np.ndarray, sample_rate: int, below_hz: float | None = None) -> float:
    """Compute the scale-invariant signal-to-distortion ratio in dB.

    The estimate is split into a scaled copy of the reference and the rest; the ratio is that of their energies (Le
    Roux et al., "SDR - half-baked or well done?", 2019). With `below_hz` both signals are low-passed first, with zero
    phase. Undefined where either signal is silent.
    """
    check_pair(reference, estimate)
    s, e = reference.astype(np.float64), estimate.astype(np.float64)
    if below_hz is not None:
        s, e = band_pass(s, sample_rate, 0, below_hz), band_pass(e, sample_rate, 0, below_hz)
    scale = divide(np.sum(s * e, axis=-1), np.sum(s * s, axis=-1))
    target = scale[:, None] * s
    return mean_of_defined(decibels(divide(np.sum(target**2, axis=-1), np.sum((e - target) ** 2, axis=-1))))


def log_spectral_distance(
    reference: np.ndarray,
    estimate: np.ndarray,
    sample_rate: int,
    edges_hz: Sequence[float] = RECONSTRUCTION_BANDS_HZ,
) -> dict[str, float]:
    """Compute the log-spectral distance in dB: the root mean square of 20 log10 |S_est| / |S_ref|, n = 1024.

    Magnitudes more than 60 dB under the largest of the reference (all channels) count as that floor. Keys:
    `whole`, and one for each band, `0_300` ... `2500_6000`. The means run over all channels together.
    Undefined where the reference is silent. After Gray and Markel, "Distance measures for speech
    processing", 1976.
    """
    check_pair(reference, estimate)
    squared = _squared_log_ratio(stft_magnitudes(reference, LSD_SIZE), stft_magnitudes(estimate, LSD_SIZE))
    distances = {"whole": np.sqrt(mean_of_defined(squared))}
    for name, low, high in bands(edges_hz, sample_rate):
        distances[name] = np.sqrt(mean_of_defined(squared[..., band_bins(LSD_SIZE, sample_rate, low, high)]))
    return {name: float(value) for name, value in distances.items()}


def _squared_log_ratio(reference: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Compute (20 log10 ratio)^2 above the floor; empty where the reference is silent or too short."""
    if not np.any(reference):
        return np.zeros((*reference.shape[:2], 0))
    floor = reference.max() * 10 ** (-LSD_RANGE_DB / 20)
    return np.square(20 * np.log10(np.maximum(estimate, floor) / np.maximum(reference, floor)))


def mid_side_energy_ratio_db(reference: np.ndarray, estimate: np.ndarray) -> float:
    """Compute side / mid energy of the estimate over that of the reference, in dB: > 0 is wider than the truth.

    Undefined for other than two channels, and where mid or side of the reference is silent.
    """
    check_pair(reference, estimate)
    if reference.shape[0] != 2:
        return float("nan")
    expected = _side_to_mid(reference)
    if not 0 < expected < np.inf:
        return float("nan")
    return float(decibels(_side_to_mid(estimate) / expected))


def _side_to_mid(x: np.ndarray) -> np.ndarray:
    left, right = x.astype(np.float64)
    return divide(np.sum((left - right) ** 2), np.sum((left + right) ** 2))


def spectral_flatness_ratio_db(
    reference: np.ndarray,
    estimate: np.ndarray,
    sample_rate: int,
    edges_hz: Sequence[float] = RECONSTRUCTION_BANDS_HZ,
) -> dict[str, float]:
    """Compute the spectral flatness of the estimate over that of the reference, in dB by band: > 0 is noisier than
    the truth.

    Flatness is the geometric over the arithmetic mean of |S|^2 over the bins of a band in a frame (n = 1024;
    Johnston, "Transform coding of audio signals using perceptual noise criteria", 1988), with the floor of
    the log-spectral distance. The mean of the dB runs over the frames of all channels in which both signals
    are above that floor.
    """
    check_pair(reference, estimate)
    expected, found = (np.square(stft_magnitudes(x, LSD_SIZE), dtype=np.float64) for x in (reference, estimate))
    floor = expected.max(initial=0.0) * 10 ** (-LSD_RANGE_DB / 10)
    ratios = {}
    for name, low, high in bands(edges_hz, sample_rate):
        bins = band_bins(LSD_SIZE, sample_rate, low, high)
        difference = _flatness_db(found[..., bins], floor) - _flatness_db(expected[..., bins], floor)
        ratios[name] = mean_of_defined(difference)
    return ratios


def _flatness_db(power: np.ndarray, floor: float) -> np.ndarray:
    """Compute the flatness in dB by channel and frame; nan where a frame's mean power does not exceed the floor."""
    if floor == 0 or power.shape[-1] == 0:
        return np.full(power.shape[:-1], np.nan)
    clamped = np.maximum(power, floor)
    flatness = 10 * np.mean(np.log10(clamped), axis=-1) - 10 * np.log10(np.mean(clamped, axis=-1))
    return np.where(power.mean(axis=-1) > floor, flatness, np.nan)


def envelope_correlation(
    reference: np.ndarray,
    estimate: np.ndarray,
    sample_rate: int,
    edges_hz: Sequence[float] = RECONSTRUCTION_BANDS_HZ,
) -> dict[str, float]:
    """Compute the Pearson correlation by band of the RMS in consecutive 10 ms frames, after a zero-phase band-pass.

    Undefined where an envelope is constant (silence).
    """
    check_pair(reference, estimate)
    correlations = {}
    for name, low, high in bands(edges_hz, sample_rate):
        expected, found = (
            _envelope(band_pass(x, sample_rate, low, high), sample_rate) for x in (reference, estimate)
        )
        correlations[name] = mean_of_defined(pearson(expected, found))
    return correlations


def _envelope(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Compute the RMS of consecutive 10 ms frames: (channels, frames)."""
    frame = round(ENVELOPE_FRAME_SECONDS * sample_rate)
    whole = x[:, : x.shape[-1] // frame * frame]
    return np.sqrt(np.mean(np.square(whole.reshape(x.shape[0], -1, frame)), axis=-1))


def noise_reference(x: np.ndarray, sample_rate: int, seed: int) -> np.ndarray:
    """Make Gaussian noise, independent by channel, with the true spectrum smoothed as in `_smoothed_power`.

    It has the right energy in every band at every time, but no phases, partials or stereo image.
    """
    noise = _spectrum(np.random.default_rng(seed).standard_normal(x.shape), sample_rate)
    noise_power = np.mean(np.abs(noise) ** 2)
    gain = np.sqrt(_smoothed_power(_spectrum(x, sample_rate)) / noise_power)
    return _signal(noise * gain, x.shape[-1], sample_rate)


def smooth_reference(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Make the signal with the true phases and with magnitudes smoothed as in `_smoothed_power`."""
    spectrum = _spectrum(x, sample_rate)
    magnitudes = np.sqrt(_smoothed_power(spectrum))
    return _signal(magnitudes * np.exp(1j * np.angle(spectrum)), x.shape[-1], sample_rate)


def _smoothed_power(spectrum: np.ndarray) -> np.ndarray:
    """Compute the mean of |S|^2 over the 5 bins x 3 frames around each value: 117 Hz x 32 ms.

    Sampled without overlap these are 51 bands x 31 times = 1600 numbers per second and channel at 12 kHz, 3200 in
    stereo: as many as in latents of 100 Hz x 32.
    """
    power = np.abs(spectrum) ** 2  # (channels, bins, frames)
    return ndimage.uniform_filter(power, size=(1, *SMOOTH_BINS_FRAMES), mode="nearest").clip(min=0)


def _smooth_window(sample_rate: int) -> dict[str, int]:
    """Return window and overlap in samples: 512 at 12 kHz (43 ms), the same duration at other rates; 3/4 of it."""
    size = 4 * round(SMOOTH_SIZE_AT_12K * sample_rate / 12000 / 4)
    return {"nperseg": size, "noverlap": size - size // 4}


def _spectrum(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Compute the complex STFT with a Hann window: (channels, bins, frames)."""
    return signal.stft(x.astype(np.float64), **_smooth_window(sample_rate))[2]


def _signal(spectrum: np.ndarray, samples: int, sample_rate: int) -> np.ndarray:
    """Invert `_spectrum`: float32 (channels, samples)."""
    return signal.istft(spectrum, **_smooth_window(sample_rate))[1][:, :samples].astype(np.float32)
