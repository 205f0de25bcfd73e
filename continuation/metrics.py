"""Every measure of this project, one function each.

Signals are float arrays of shape (channels, samples) in -1..1; where two are taken, the reference comes
first and the estimate second, equal in shape. A measure of several channels is the mean over the channels in
which it is defined, unless its docstring says otherwise. What is undefined (the flatness of silence) is nan.
Levels in dB are limited to +-100 dB, so that a mean over songs stays finite.

|S| is the unnormalised magnitude of a short-time Fourier transform with a periodic Hann window of n samples
and a hop of n/4; only frames that lie wholly inside the signal are taken.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

MR_STFT_SIZES = (2048, 1024, 512, 256, 128)
MR_STFT_FLOOR = 1e-3
LSD_SIZE = 1024
LSD_RANGE_DB = 60.0
RECONSTRUCTION_BANDS_HZ = (0, 300, 1000, 2500, 6000)
CONTINUATION_BANDS_HZ = (0, 150, 400, 1000, 2000, 3500, 6000)
LOW_BAND_HZ = 1000
LEGACY_COMB_HZ = 300
COMB_SIZE = 32768
COMB_FIRST_HZ = 150.0
COMB_PEAK_HZ = 2.0
COMB_SURROUNDINGS = 0.2
ENVELOPE_FRAME_SECONDS = 0.01
ONSET_TOLERANCE_SECONDS = 0.05
ONSET_HOP_SECONDS = 0.01
HORIZONS_SECONDS = (0, 1, 3, 10)
CHROMA_SIZE_AT_12K = 4096
CHROMA_HZ = (55, 2000)
KEY_PROFILES = (  # of major and minor, by semitones above the tonic
    (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
)
TEMPO_HARMONICS = (1, 2, 4)  # of the beat, which its own frequency alone need not carry
TEMPO_REACH_FRAMES = 1.0  # around librosa's beat
TEMPO_CANDIDATES = 81
SAME_TEMPO_OCTAVES = 0.06  # tempi count as one up to here (4 %)
SAME_BEAT = 0.1  # of a beat
CLICK_SIZE = 256
CLICK_ABOVE_HZ = 2000
CLICK_SECONDS = 0.04
COPY_SECONDS = 2.0
COPY_FRAME_SECONDS = 0.05
COPY_BANDS = 24
COPY_LOWEST_HZ = 60
LIMIT_DB = 100.0
LARGEST_STD_RATIO = 100.0
BOOTSTRAP_DRAWS = 5000
NORMAL_QUANTILE = 1.96  # of 95 %

SMOOTH_SIZE_AT_12K = 512
SMOOTH_BINS_FRAMES = (5, 3)


# Shared arithmetic


def _decibels(power_ratio: np.ndarray | float) -> np.ndarray:
    """10 log10, limited to +-100 dB; nan stays nan."""
    smallest, largest = 10 ** (-LIMIT_DB / 10), 10 ** (LIMIT_DB / 10)
    return 10 * np.log10(np.clip(power_ratio, smallest, largest))


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient; x / 0 is inf and 0 / 0 is nan, without a warning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(numerator, dtype=np.float64) / np.asarray(denominator, dtype=np.float64)


def _mean(values: np.ndarray) -> float:
    """Mean of the defined values; nan where there is none."""
    defined = np.asarray(values, dtype=np.float64)
    defined = defined[~np.isnan(defined)]
    return float(defined.mean()) if defined.size else float("nan")


def _check_pair(reference: np.ndarray, estimate: np.ndarray) -> None:
    if reference.ndim != 2 or reference.shape != estimate.shape:
        raise ValueError(
            f"expected two (channels, samples) arrays of one shape, got {reference.shape} and {estimate.shape}"
        )


def _magnitudes(x: np.ndarray, size: int) -> np.ndarray:
    """|S| of (channels, samples) as (channels, frames, size // 2 + 1); no frames when x is too short."""
    from scipy import fft, signal

    if x.shape[-1] < size:
        return np.zeros((x.shape[0], 0, size // 2 + 1), dtype=np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(x.astype(np.float32, copy=False), size, axis=-1)
    window = signal.get_window("hann", size).astype(np.float32)
    return np.abs(fft.rfft(frames[:, :: size // 4] * window))  # (channels, frames, bins)


def _bands(edges_hz: Sequence[float], sample_rate: int) -> list[tuple[str, float, float]]:
    """(name, low, high) of the bands between the edges that begin below the Nyquist frequency."""
    return [(f"{low}_{high}", low, high) for low, high in pairwise(edges_hz) if low < sample_rate / 2]


def _bins(size: int, sample_rate: int, low: float, high: float) -> slice:
    """The bins low <= f < high of a real transform; a band up to the Nyquist frequency includes it."""
    first = int(np.ceil(low * size / sample_rate))
    last = size // 2 + 1 if high >= sample_rate / 2 else int(np.ceil(high * size / sample_rate))
    return slice(first, last)


def _band_pass(x: np.ndarray, sample_rate: int, low: float, high: float) -> np.ndarray:
    """Zero-phase band-pass by one transform of the whole signal: the bands of a partition add up to x."""
    from scipy import fft

    spectrum = fft.rfft(x.astype(np.float64))
    kept = np.zeros_like(spectrum)
    bins = _bins(x.shape[-1], sample_rate, low, high)
    kept[:, bins] = spectrum[:, bins]
    return fft.irfft(kept, n=x.shape[-1])


# Reconstruction: how close is decode(encode(x)) to x?


def waveform_mse(reference: np.ndarray, estimate: np.ndarray) -> float:
    """Mean squared difference of the samples (linear, full scale = 1)."""
    _check_pair(reference, estimate)
    return float(np.mean(np.square(reference.astype(np.float64) - estimate)))


def si_sdr(reference: np.ndarray, estimate: np.ndarray, sample_rate: int, below_hz: float | None = None) -> float:
    """Scale-invariant signal-to-distortion ratio in dB.

    Le Roux et al., "SDR - half-baked or well done?", 2019. The estimate is split into a scaled copy of
    the reference and the rest; the ratio of their energies. With `below_hz` both signals are low-passed
    first, with zero phase. Undefined where either signal is silent.
    """
    _check_pair(reference, estimate)
    s, e = reference.astype(np.float64), estimate.astype(np.float64)
    if below_hz is not None:
        s, e = _band_pass(s, sample_rate, 0, below_hz), _band_pass(e, sample_rate, 0, below_hz)
    scale = _divide(np.sum(s * e, axis=-1), np.sum(s * s, axis=-1))
    target = scale[:, None] * s
    return _mean(_decibels(_divide(np.sum(target**2, axis=-1), np.sum((e - target) ** 2, axis=-1))))


def onset_times(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Onsets in seconds of the sum of all channels: peaks of the log-mel spectral flux.

    librosa's detector, after Böck et al., "Evaluating the online capabilities of onset detection methods",
    2012; window 1024 samples at 12 kHz and as long at other rates, hop 10 ms.
    """
    import librosa

    strength = _onset_strength(x, sample_rate)
    if not strength.any():
        return np.zeros(0)
    hop = round(ONSET_HOP_SECONDS * sample_rate)
    return librosa.onset.onset_detect(onset_envelope=strength, sr=sample_rate, hop_length=hop, units="time")


def _onset_strength(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Spectral flux every ONSET_HOP_SECONDS; zero everywhere in silence."""
    return _mono_onset_strength(x.mean(axis=0).astype(np.float32).tobytes(), sample_rate)


@lru_cache(maxsize=8)  # every system is compared with the same input and truth
def _mono_onset_strength(samples: bytes, sample_rate: int) -> np.ndarray:
    import librosa

    mono = np.frombuffer(samples, np.float32)
    hop = round(ONSET_HOP_SECONDS * sample_rate)
    size = round(1024 * sample_rate / 12000)
    return librosa.onset.onset_strength(y=mono, sr=sample_rate, hop_length=hop, n_fft=size, n_mels=64)


def match_onsets(reference_times: np.ndarray, estimate_times: np.ndarray, tolerance: float) -> int:
    """Size of the largest one-to-one matching of two sorted lists of times within `tolerance` seconds.

    With one tolerance for all, taking the earliest possible partner each time is optimal.
    """
    matched = i = j = 0
    while i < len(reference_times) and j < len(estimate_times):
        difference = estimate_times[j] - reference_times[i]
        if abs(difference) <= tolerance:
            matched, i, j = matched + 1, i + 1, j + 1
        elif difference < 0:
            j += 1
        else:
            i += 1
    return matched


def onset_f(reference: np.ndarray, estimate: np.ndarray, sample_rate: int) -> float:
    """F-measure of the onsets, 0..1, within 50 ms (as `mir_eval.onset.f_measure`; Böck et al. 2012).

    Of the sum of the channels. Undefined where the reference has no onset.
    """
    _check_pair(reference, estimate)
    expected, found = onset_times(reference, sample_rate), onset_times(estimate, sample_rate)
    if not len(expected):
        return float("nan")
    return 2 * match_onsets(expected, found, ONSET_TOLERANCE_SECONDS) / (len(expected) + len(found))


def mr_stft_distance(reference: np.ndarray, estimate: np.ndarray) -> float:
    """Multi-resolution STFT distance, no unit; 0 for equal spectrograms.

    The mean over n = 2048, 1024, 512, 256, 128 of mean |ln ratio| (magnitudes below 1e-3 count as 1e-3)
    + mean |difference| / (mean |S_ref| + 1e-3). After Yamamoto et al., "Parallel WaveGAN", 2020, with an L1
    in place of the Frobenius convergence. The means run over all channels together.
    """
    _check_pair(reference, estimate)
    return _mean([_stft_distance(_magnitudes(reference, n), _magnitudes(estimate, n)) for n in MR_STFT_SIZES])


def _stft_distance(reference: np.ndarray, estimate: np.ndarray) -> float:
    if not reference.size:
        return float("nan")
    log_ratio = np.log(np.maximum(estimate, MR_STFT_FLOOR) / np.maximum(reference, MR_STFT_FLOOR))
    difference = np.mean(np.abs(estimate - reference), dtype=np.float64)
    return float(
        np.mean(np.abs(log_ratio), dtype=np.float64)
        + difference / (np.mean(reference, dtype=np.float64) + MR_STFT_FLOOR)
    )


def log_spectral_distance(
    reference: np.ndarray,
    estimate: np.ndarray,
    sample_rate: int,
    edges_hz: Sequence[float] = RECONSTRUCTION_BANDS_HZ,
) -> dict[str, float]:
    """Log-spectral distance in dB: the root mean square of 20 log10 |S_est| / |S_ref|, n = 1024.

    Magnitudes more than 60 dB under the largest of the reference (all channels) count as that floor. Keys:
    `whole`, and one for each band, `0_300` ... `2500_6000`. The means run over all channels together.
    Undefined where the reference is silent. After Gray and Markel, "Distance measures for speech
    processing", 1976.
    """
    _check_pair(reference, estimate)
    squared = _squared_log_ratio(_magnitudes(reference, LSD_SIZE), _magnitudes(estimate, LSD_SIZE))
    distances = {"whole": np.sqrt(_mean(squared))}
    for name, low, high in _bands(edges_hz, sample_rate):
        distances[name] = np.sqrt(_mean(squared[..., _bins(LSD_SIZE, sample_rate, low, high)]))
    return {name: float(value) for name, value in distances.items()}


def _squared_log_ratio(reference: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """(20 log10 ratio)^2 above the floor; empty where the reference is silent or too short."""
    if not np.any(reference):
        return np.zeros((*reference.shape[:2], 0))
    floor = reference.max() * 10 ** (-LSD_RANGE_DB / 20)
    return np.square(20 * np.log10(np.maximum(estimate, floor) / np.maximum(reference, floor)))


def mid_side_energy_ratio_db(reference: np.ndarray, estimate: np.ndarray) -> float:
    """Side / mid energy of the estimate over that of the reference, in dB: > 0 is wider than the truth.

    Undefined for other than two channels, and where mid or side of the reference is silent.
    """
    _check_pair(reference, estimate)
    if reference.shape[0] != 2:
        return float("nan")
    expected = _side_to_mid(reference)
    if not 0 < expected < np.inf:
        return float("nan")
    return float(_decibels(_side_to_mid(estimate) / expected))


def _side_to_mid(x: np.ndarray) -> np.ndarray:
    left, right = x.astype(np.float64)
    return _divide(np.sum((left - right) ** 2), np.sum((left + right) ** 2))


def spectral_flatness_ratio_db(
    reference: np.ndarray,
    estimate: np.ndarray,
    sample_rate: int,
    edges_hz: Sequence[float] = RECONSTRUCTION_BANDS_HZ,
) -> dict[str, float]:
    """Spectral flatness of the estimate over the reference's, in dB by band; > 0 is noisier than the truth.

    Flatness is the geometric over the arithmetic mean of |S|^2 over the bins of a band in a frame (n = 1024;
    Johnston, "Transform coding of audio signals using perceptual noise criteria", 1988), with the floor of
    the log-spectral distance. The mean of the dB runs over the frames of all channels in which both signals
    are above that floor.
    """
    _check_pair(reference, estimate)
    expected, found = (np.square(_magnitudes(x, LSD_SIZE), dtype=np.float64) for x in (reference, estimate))
    floor = expected.max(initial=0.0) * 10 ** (-LSD_RANGE_DB / 10)
    ratios = {}
    for name, low, high in _bands(edges_hz, sample_rate):
        bins = _bins(LSD_SIZE, sample_rate, low, high)
        difference = _flatness_db(found[..., bins], floor) - _flatness_db(expected[..., bins], floor)
        ratios[name] = _mean(difference)
    return ratios


def _flatness_db(power: np.ndarray, floor: float) -> np.ndarray:
    """Flatness in dB by channel and frame; nan where the frame's mean power does not exceed the floor."""
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
    """Pearson correlation by band of the RMS in consecutive 10 ms frames, after a zero-phase band-pass.

    Undefined where an envelope does not move (silence).
    """
    _check_pair(reference, estimate)
    correlations = {}
    for name, low, high in _bands(edges_hz, sample_rate):
        expected, found = (
            _envelope(_band_pass(x, sample_rate, low, high), sample_rate) for x in (reference, estimate)
        )
        correlations[name] = _mean(_correlation(expected, found))
    return correlations


def _envelope(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """RMS of consecutive 10 ms frames, (channels, frames)."""
    frame = round(ENVELOPE_FRAME_SECONDS * sample_rate)
    whole = x[:, : x.shape[-1] // frame * frame]
    return np.sqrt(np.mean(np.square(whole.reshape(x.shape[0], -1, frame)), axis=-1))


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation along the last axis; nan where either does not move."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
    return _divide(np.sum(a * b, axis=-1), np.sqrt(np.sum(a * a, axis=-1) * np.sum(b * b, axis=-1)))


def band_energy_ratios_db(
    reference: np.ndarray,
    estimate: np.ndarray,
    sample_rate: int,
    edges_hz: Sequence[float] = CONTINUATION_BANDS_HZ,
) -> dict[str, float]:
    """Energy of the estimate over that of the reference in dB, by band, all channels together.

    Undefined where the reference has less than -100 dB of its own energy in the band.
    """
    _check_pair(reference, estimate)
    expected, found = _power_spectrum(reference), _power_spectrum(estimate)
    smallest = expected.sum() * 10 ** (-LIMIT_DB / 10)
    ratios = {}
    for name, low, high in _bands(edges_hz, sample_rate):
        bins = _bins(reference.shape[-1], sample_rate, low, high)
        energy = expected[bins].sum()
        ratios[name] = float(_decibels(found[bins].sum() / energy)) if energy > smallest else float("nan")
    return ratios


def _power_spectrum(x: np.ndarray) -> np.ndarray:
    """|transform of the whole signal|^2, summed over channels."""
    from scipy import fft

    return np.square(np.abs(fft.rfft(x.astype(np.float64)))).sum(axis=0)


def comb(x: np.ndarray, sample_rate: int, spacing_hz: float) -> float:
    """By how many dB the multiples of `spacing_hz` stand above their surroundings; subtract the truth's own.

    Welch spectrum, n = 32768 (Hann, half overlapped). For each multiple from 150 Hz up: the peak within 2 Hz
    minus the median within +-20 % of the spacing, in dB; the mean over the multiples. White noise gives about
    2.5 dB (10 s at 12 kHz), because a peak is compared with a median. Undefined for silence and for less than
    32768 samples.
    """
    return _prominence(_comb_levels(x, sample_rate), sample_rate, spacing_hz)


def combs_above_truth(
    reference: np.ndarray, estimate: np.ndarray, sample_rate: int, latent_rate: float, hop_rate: float
) -> dict[str, float]:
    """`comb` of the estimate minus the truth's own, in dB, at the latent rate, the hop rate and 300 Hz."""
    levels = [_comb_levels(x, sample_rate) for x in (estimate, reference)]
    combs = {}
    for name, spacing in (("latent", latent_rate), ("hop", hop_rate), ("300", LEGACY_COMB_HZ)):
        found, own = (_prominence(level, sample_rate, spacing) for level in levels)
        combs[f"comb_{name}_db"] = found - own
    return combs


def _comb_levels(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Welch spectrum in dB of the channels that sound, (channels, bins); without channels where undefined."""
    if x.shape[-1] < COMB_SIZE or not np.any(x):
        return np.zeros((0, COMB_SIZE // 2 + 1))
    return _levels_of(x.tobytes(), x.dtype.str, len(x), sample_rate)


@lru_cache(maxsize=8)  # every system is compared with the same truth, for its combs and for its hum
def _levels_of(samples: bytes, dtype: str, channels: int, sample_rate: int) -> np.ndarray:
    from scipy import signal

    x = np.frombuffer(samples, dtype).reshape(channels, -1)
    _, power = signal.welch(x[np.any(x, axis=-1)], sample_rate, nperseg=COMB_SIZE)
    return 10 * np.log10(np.maximum(power, power.max(axis=-1, keepdims=True) * 1e-12))


def hum(
    reference: np.ndarray, estimate: np.ndarray, sample_rate: int, latent_rate: float, hop_rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """The multiples that `combs_above_truth` averages, in Hz, and by how many dB the estimate stands above the truth
    at each; empty where either is undefined.

    One loud line among sixty multiples hardly moves their mean. Averaged over songs, in which music's own lines lie
    elsewhere, it stands out here.
    """
    levels = [_comb_levels(x, sample_rate) for x in (estimate, reference)]
    differences = {}
    for spacing in dict.fromkeys((latent_rate, hop_rate, LEGACY_COMB_HZ)):
        found, own = (_prominences(level, sample_rate, spacing) for level in levels)
        if found and own:
            differences |= {frequency: height - own[frequency] for frequency, height in found.items()}
    return np.array(list(differences)), np.array(list(differences.values()))


def _prominence(level: np.ndarray, sample_rate: int, spacing_hz: float) -> float:
    """Mean height in dB of the multiples of `spacing_hz` in `level` over their surroundings."""
    return _mean(list(_prominences(level, sample_rate, spacing_hz).values()))


def _prominences(level: np.ndarray, sample_rate: int, spacing_hz: float) -> dict[float, float]:
    """Frequency in Hz of each multiple of `spacing_hz` -> its height in dB over its surroundings, mean over the
    channels; empty for silence."""
    if not len(level):
        return {}
    frequencies = np.arange(COMB_SIZE // 2 + 1) * sample_rate / COMB_SIZE
    reach = COMB_SURROUNDINGS * spacing_hz
    first = int(np.ceil(COMB_FIRST_HZ / spacing_hz))
    last = int((sample_rate / 2 - reach) // spacing_hz)
    prominences = {}
    for centre in spacing_hz * np.arange(first, last + 1):
        near = slice(*np.searchsorted(frequencies, (centre - COMB_PEAK_HZ, centre + COMB_PEAK_HZ)))
        around = slice(*np.searchsorted(frequencies, (centre - reach, centre + reach)))
        height = level[:, near].max(axis=-1) - np.median(level[:, around], axis=-1)
        prominences[float(centre)] = float(height.mean())
    return prominences


def reconstruction_measures(
    reference: np.ndarray, estimate: np.ndarray, sample_rate: int, latent_rate: float, hop_rate: float
) -> dict[str, float]:
    """All measures of a reconstruction under stable names; combs are minus the truth's own.

    `latent_rate` and `hop_rate` in Hz (at least 10). Bands: 0-300-1000-2500-6000 Hz.
    """
    measures = {
        "waveform_mse": waveform_mse(reference, estimate),
        "si_sdr_db": si_sdr(reference, estimate, sample_rate),
        "si_sdr_below_1000_db": si_sdr(reference, estimate, sample_rate, below_hz=LOW_BAND_HZ),
        "onset_f": onset_f(reference, estimate, sample_rate),
        "mr_stft": mr_stft_distance(reference, estimate),
        "mid_side_ratio_db": mid_side_energy_ratio_db(reference, estimate),
    }
    pair = (reference, estimate, sample_rate)
    for stem, unit, by_band in (
        ("lsd", "_db", log_spectral_distance(*pair)),
        ("energy", "_db", band_energy_ratios_db(*pair, RECONSTRUCTION_BANDS_HZ)),
        ("flatness", "_db", spectral_flatness_ratio_db(*pair)),
        ("envelope_correlation", "", envelope_correlation(*pair)),
    ):
        measures |= {f"{stem}_{band}{unit}": value for band, value in by_band.items()}
    return measures | combs_above_truth(*pair, latent_rate, hop_rate)


# References: what a spectral distance already rewards


def noise_reference(x: np.ndarray, sample_rate: int, seed: int) -> np.ndarray:
    """Gaussian noise, independent by channel, under the true spectrum smoothed as in `_smoothed_power`.

    Right energy in every band and moment, and nothing else: no phases, no partials, no stereo image.
    """
    noise = _spectrum(np.random.default_rng(seed).standard_normal(x.shape), sample_rate)
    noise_power = np.mean(np.abs(noise) ** 2)
    gain = np.sqrt(_smoothed_power(_spectrum(x, sample_rate)) / noise_power)
    return _signal(noise * gain, x.shape[-1], sample_rate)


def smooth_reference(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """The true phases under magnitudes smoothed as in `_smoothed_power`: right phases, a coarse spectrum."""
    spectrum = _spectrum(x, sample_rate)
    magnitudes = np.sqrt(_smoothed_power(spectrum))
    return _signal(magnitudes * np.exp(1j * np.angle(spectrum)), x.shape[-1], sample_rate)


def _smoothed_power(spectrum: np.ndarray) -> np.ndarray:
    """Mean of |S|^2 over the 5 bins x 3 frames around each: 117 Hz x 32 ms.

    Sampled without overlap that is 51 bands x 31 times = 1600 numbers a second and channel at 12 kHz, 3200 in
    stereo: as many as a code of 100 Hz x 32 has.
    """
    from scipy import ndimage

    power = np.abs(spectrum) ** 2  # (channels, bins, frames)
    return ndimage.uniform_filter(power, size=(1, *SMOOTH_BINS_FRAMES), mode="nearest").clip(min=0)


def _smooth_window(sample_rate: int) -> dict[str, int]:
    """Window of 512 samples at 12 kHz (43 ms) and as long at other rates; hop a quarter of it."""
    size = 4 * round(SMOOTH_SIZE_AT_12K * sample_rate / 12000 / 4)
    return {"nperseg": size, "noverlap": size - size // 4}


def _spectrum(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Complex STFT, Hann, (channels, bins, frames)."""
    from scipy import signal

    return signal.stft(x.astype(np.float64), **_smooth_window(sample_rate))[2]


def _signal(spectrum: np.ndarray, samples: int, sample_rate: int) -> np.ndarray:
    """Inverse of `_spectrum`, float32 (channels, samples)."""
    from scipy import signal

    return signal.istft(spectrum, **_smooth_window(sample_rate))[1][:, :samples].astype(np.float32)


# Intervals: resampled over songs, never over pairs


def bootstrap_interval(values_per_song: Iterable[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean over songs and its 95 % percentile bootstrap interval: (mean, low, high).

    One value a song, nan where undefined (left out). With fewer than two songs the interval is nan. Efron and
    Tibshirani, "An Introduction to the Bootstrap", 1993.
    """
    values = np.asarray(list(values_per_song), dtype=np.float64)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return _mean(values), float("nan"), float("nan")
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


def per_song(values: Sequence[float], songs: Sequence[str | int]) -> dict[str | int, float]:
    """Mean of the defined values of each song, in the order of first appearance."""
    grouped: dict[str | int, list[float]] = {}
    for value, song in zip(values, songs, strict=True):
        grouped.setdefault(song, []).append(value)
    return {song: _mean(group) for song, group in grouped.items()}


# Continuation: how well does the next 10 s follow?


def loudness_ratio_db(reference: np.ndarray, estimate: np.ndarray) -> float:
    """RMS of the estimate over that of the reference in dB, all channels together; silent truth: nan."""
    expected, found = (np.sum(np.square(x, dtype=np.float64)) / x.size for x in (reference, estimate))
    return float(_decibels(_divide(found, expected))) if expected > 0 else float("nan")


def horizons(x: np.ndarray, sample_rate: int) -> dict[str, np.ndarray]:
    """The parts 0-1, 1-3 and 3-10 s after the join of a continuation, as far as it reaches."""
    parts = {
        f"{start}_{end}s": x[:, start * sample_rate : end * sample_rate] for start, end in pairwise(HORIZONS_SECONDS)
    }
    return {name: part for name, part in parts.items() if part.shape[-1]}


def chroma_cosine(reference: np.ndarray, estimate: np.ndarray, sample_rate: int) -> float:
    """Cosine of the mean pitch-class profiles, 0..1: do both use the same notes? Undefined for silence.

    |S|^2 between 55 and 2000 Hz (n = 4096 at 12 kHz, and as long at other rates), each bin counted to its
    nearest semitone (A = 440 Hz), every frame scaled to sum 1. Of the sum of the channels. After Fujishima,
    "Realtime chord recognition of musical sound", 1999.
    """
    _check_pair(reference, estimate)
    a, b = (_pitch_classes(x, sample_rate) for x in (reference, estimate))
    return float(_divide(np.dot(a, b), np.linalg.norm(a) * np.linalg.norm(b)))


def _pitch_classes(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Mean over frames of the shares of the 12 pitch classes; zeros for silence."""
    size = 4 * round(CHROMA_SIZE_AT_12K * sample_rate / 12000 / 4)
    frequencies = np.arange(size // 2 + 1) * sample_rate / size
    bins = np.flatnonzero((frequencies >= CHROMA_HZ[0]) & (frequencies < CHROMA_HZ[1]))
    pitch = np.round(12 * np.log2(frequencies[bins] / 440)).astype(int) % 12
    power = np.square(_magnitudes(x.mean(axis=0, keepdims=True), size)[0][:, bins], dtype=np.float64)
    classes = power @ (pitch[:, None] == np.arange(12))
    sums = classes.sum(axis=1, keepdims=True)
    sounding = sums[:, 0] > 0
    return (classes[sounding] / sums[sounding]).mean(axis=0) if sounding.any() else np.zeros(12)


def key(x: np.ndarray, sample_rate: int) -> int | None:
    """Key 0..23: the tonic's pitch class from A up, plus 12 for minor, whose profile correlates best with the mean
    pitch classes (Krumhansl, Cognitive Foundations of Musical Pitch, 1990). None for silence."""
    classes = _pitch_classes(x, sample_rate)
    if not classes.any():
        return None
    rotations = [np.roll(profile, tonic) for profile in KEY_PROFILES for tonic in range(12)]
    return int(np.argmax([np.corrcoef(classes, rotation)[0, 1] for rotation in rotations]))


def key_agreement(reference: np.ndarray, estimate: np.ndarray, sample_rate: int) -> float:
    """1 where both are in the same key, else 0; undefined for silence."""
    a, b = key(reference, sample_rate), key(estimate, sample_rate)
    return float("nan") if a is None or b is None else float(a == b)


def onset_correlation(reference: np.ndarray, estimate: np.ndarray, sample_rate: int) -> float:
    """Pearson correlation of the onset strengths, smoothed over 50 ms: do both strike at the same times? Undefined
    where either is flat."""
    _check_pair(reference, estimate)
    window = np.hanning(7)[1:-1]
    a, b = (np.convolve(_onset_strength(x, sample_rate), window, mode="same") for x in (reference, estimate))
    return float(_correlation(a, b))


def tempo(x: np.ndarray, sample_rate: int) -> float:
    """Beats a minute; undefined without onsets.

    librosa's autocorrelation of the onset strength knows the beat in whole frames of 10 ms: an error of half a frame
    is a fifth of a beat after 10 s at 120 a minute. Of the beats up to a frame longer or shorter, the one is taken at
    which the strength's Fourier components once, twice and four times a beat are strongest.
    """
    strength = _onset_strength(x, sample_rate)
    return _tempo_of(strength.tobytes(), sample_rate) if strength.any() else float("nan")


@lru_cache(maxsize=8)
def _tempo_of(strength: bytes, sample_rate: int) -> float:
    import librosa

    strength = np.frombuffer(strength, np.float32)
    hop = round(ONSET_HOP_SECONDS * sample_rate)
    frames_a_minute = 60 * sample_rate / hop
    coarse = frames_a_minute / float(
        librosa.feature.tempo(onset_envelope=strength, sr=sample_rate, hop_length=hop)[0]
    )
    beats = coarse + np.linspace(-TEMPO_REACH_FRAMES, TEMPO_REACH_FRAMES, TEMPO_CANDIDATES)  # in frames
    moving = strength - strength.mean()
    turns = np.exp(2j * np.pi * np.arange(len(strength))[:, None] / beats)
    power = sum(np.abs(moving @ turns**often) ** 2 for often in TEMPO_HARMONICS)
    return frames_a_minute / float(beats[np.argmax(power)])


def tempo_deviation(context: np.ndarray, continuation: np.ndarray, sample_rate: int) -> float:
    """How far the continuation's tempo is from the input's, in octaves: |log2 of the ratio|, folded to the nearest
    octave, 0..0.5, since half and double time are the same beat."""
    octaves = np.log2(tempo(continuation, sample_rate) / tempo(context, sample_rate))
    return float(abs(octaves - np.round(octaves)))


def beat_phase_error(context: np.ndarray, continuation: np.ndarray, sample_rate: int) -> float:
    """How far the continuation's strikes are from the input's beat, 0..0.5 of a beat: the difference between the
    phases of both onset strengths at the input's tempo, counted on from the input. Undefined without a tempo."""
    beat = 60 / tempo(context, sample_rate) / ONSET_HOP_SECONDS  # in frames
    if not np.isfinite(beat) or not continuation.any():
        return float("nan")
    whole = _onset_strength(np.concatenate([context, continuation], axis=-1), sample_rate)
    turns = whole * np.exp(2j * np.pi * np.arange(len(whole)) / beat)
    cut = round(context.shape[-1] / sample_rate / ONSET_HOP_SECONDS)
    before, after = turns[:cut].sum(), turns[cut:].sum()
    if not abs(before) or not abs(after):
        return float("nan")
    return float(abs(np.angle(after / before)) / (2 * np.pi))


def click_percentiles(
    context: np.ndarray, continuation: np.ndarray, sample_rate: int, places: Sequence[int] = (0,)
) -> np.ndarray:
    """Where clicks at `places`, in samples behind the join, stand among the input's own attacks: 0..100 each, the
    percentile of its flux.

    Flux: the sum over channels and bins above 2 kHz of the growth of |S| from frame to frame (n = 256). Its
    largest value from 30 ms before the place, where the crossfade lies, to 10 ms after it is ranked among the
    largest values of the consecutive 40 ms of the input before; equal values count half. Undefined where the
    input is silent above 2 kHz, and at a place too near to the end.
    """
    hop = CLICK_SIZE // 4
    magnitudes = _magnitudes(np.concatenate([context, continuation], axis=-1), CLICK_SIZE)
    high = magnitudes[..., _bins(CLICK_SIZE, sample_rate, CLICK_ABOVE_HZ, sample_rate / 2)]
    flux = np.maximum(np.diff(high, axis=1), 0).sum(axis=(0, 2))
    length = round(CLICK_SECONDS * sample_rate / hop)
    # Flux i is centred between frames i and i + 1.
    centres = ((context.shape[-1] + np.asarray(places)) - CLICK_SIZE / 2) / hop - 0.5
    starts = np.round(centres - 0.75 * length).astype(int)
    join = round((context.shape[-1] - CLICK_SIZE / 2) / hop - 0.5 - 0.75 * length)
    own = flux[join % length : join].reshape(-1, length).max(axis=1) if join >= length else np.zeros(0)
    return np.array([_percentile(own, flux[start : start + length]) for start in starts])


def _percentile(own: np.ndarray, found: np.ndarray) -> float:
    """Rank of the largest of `found` among `own`."""
    if not np.any(own) or not found.size:
        return float("nan")
    return float(100 * np.mean((own < found.max()) + 0.5 * (own == found.max())))


def copy_index(context: np.ndarray, continuation: np.ndarray, sample_rate: int) -> float:
    """How literally the continuation repeats the input, -1..1; subtract the truth's own.

    Log energies in 24 bands, even in log frequency from 60 Hz up, every 50 ms, each band's mean over the
    passage taken away, so that sharing a timbre does not count. For every 2 s of the continuation (a step of
    1 s) the largest Pearson correlation with 2 s of the input at any lag; the mean over these. Undefined for
    silence and below 2 s.
    """
    inputs, outputs = passages(context, sample_rate, COPY_FRAME_SECONDS), passages(continuation, sample_rate, 1.0)
    if not len(inputs) or not len(outputs):
        return float("nan")
    return float((outputs @ inputs.T).max(axis=1).mean())


def passages(x: np.ndarray, sample_rate: int, step_seconds: float) -> np.ndarray:
    """What `copy_index` compares: 2 s of band levels every `step_seconds`, mean 0 and norm 1, so that a product of
    two is their correlation: (passages, bands * frames). Flat ones (silence) are dropped."""
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
    """Log energies (frames, 24 bands) of the sum of the channels, every 50 ms, each band's mean removed."""
    from scipy import fft

    frame = round(COPY_FRAME_SECONDS * sample_rate)
    mono = x.mean(axis=0)
    frames = mono[: mono.size // frame * frame].reshape(-1, frame) * np.hanning(frame)
    power = np.square(np.abs(fft.rfft(frames, n=4 * frame)))
    edges = np.geomspace(COPY_LOWEST_HZ, sample_rate / 2, COPY_BANDS + 1)
    bins = np.round(edges * 4 * frame / sample_rate).astype(int)
    energies = np.stack([power[:, low:high].sum(axis=1) for low, high in pairwise(bins)], axis=1)
    levels = np.log(energies + 1e-6 * energies.max(initial=0.0) + 1e-12)
    return levels - levels.mean(axis=0)


def nearest_likeness(found: np.ndarray, rows: Iterable[np.ndarray], sample_rate: int) -> np.ndarray:
    """For each of `found` (`passages` of continuations) the correlation with the nearest passage of all `rows`
    (channels, samples) each, at any lag: has it been learned by heart? nan where no row sounds."""
    nearest = np.full(len(found), np.nan)
    for row in rows:
        learned = passages(row, sample_rate, COPY_FRAME_SECONDS)
        if len(learned):
            nearest = np.fmax(nearest, (found @ learned.T.astype(found.dtype)).max(axis=1))
    return nearest


def latent_diversity(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared difference of two samples of latents (channels, latents) over what it is for independent ones of
    the same spread, twice their variance over time: 0 one and the same, 1 nothing in common."""
    difference = np.mean((a - b) ** 2, axis=-1, dtype=np.float64)
    spread = a.var(axis=-1, dtype=np.float64) + b.var(axis=-1, dtype=np.float64)
    return _mean(_divide(difference, spread))


def continuation_measures(
    context: np.ndarray,
    reference: np.ndarray,
    estimate: np.ndarray,
    sample_rate: int,
    seams: Sequence[int] = (),
) -> dict[str, float]:
    """Measures of a continuation (estimate) against the true one (reference) after the same context.

    Loudness and energy ratios in dB, by horizon; the join click of the truth and the copy index minus the
    truth's own stand beside theirs. seams: where copies of the input begin anew in the estimate, in samples.
    """
    true_parts, parts = horizons(reference, sample_rate), horizons(estimate, sample_rate)
    copied, own = (copy_index(context, x, sample_rate) for x in (estimate, reference))
    loudness = loudness_ratio_db(reference, estimate)
    measures = {
        "mr_stft": mr_stft_distance(reference, estimate),
        "loudness_db": loudness,
        "loudness_error_db": abs(loudness),
        "chroma_cosine": chroma_cosine(reference, estimate, sample_rate),
        "key_agreement": key_agreement(reference, estimate, sample_rate),
        "onset_correlation": onset_correlation(reference, estimate, sample_rate),
        **beat_measures(context, reference, estimate, sample_rate),
        "join_click_percentile": _mean(click_percentiles(context, estimate, sample_rate)),
        "join_click_percentile_truth": _mean(click_percentiles(context, reference, sample_rate)),
        "seam_click_percentile": _mean(click_percentiles(context, estimate, sample_rate, seams)),
        "copy_index": copied,
        "copy_index_above_truth": copied - own,
    }
    for horizon, part in parts.items():
        measures[f"loudness_{horizon}_db"] = loudness_ratio_db(true_parts[horizon], part)
        for band, ratio in band_energy_ratios_db(true_parts[horizon], part, sample_rate).items():
            measures[f"energy_{band}_{horizon}_db"] = ratio
    return measures


def beat_measures(
    context: np.ndarray, reference: np.ndarray, estimate: np.ndarray, sample_rate: int
) -> dict[str, float]:
    """Tempo and beat of the continuation against the input's, only where the true continuation keeps them."""
    measures = {"tempo_deviation": float("nan"), "beat_phase_error": float("nan")}
    if tempo_deviation(context, reference, sample_rate) <= SAME_TEMPO_OCTAVES:
        measures["tempo_deviation"] = tempo_deviation(context, estimate, sample_rate)
        if beat_phase_error(context, reference, sample_rate) <= SAME_BEAT:
            measures["beat_phase_error"] = beat_phase_error(context, estimate, sample_rate)
    return measures


def latent_std_ratios(reference: np.ndarray, estimate: np.ndarray) -> dict[str, float]:
    """Standard deviation over time of predicted latents over that of the true ones: 1 is right, 0 is collapse.

    Both (pairs, channels, latents), the pairs of one song; variances are averaged over the pairs, so that a level
    that differs between pairs counts as no movement. Keys: the median over the channels, their lower and upper
    decile, and `worst_decile`, the larger of 1 / lower and upper: 1.25 means 'from 0.8 to 1.25' (at most 100, so
    that a mean over songs stays finite). Channels in which the truth does not move are left out.
    """
    names = [f"latent_std_ratio_{name}" for name in ("median", "lower_decile", "upper_decile", "worst_decile")]
    expected, found = (x.var(axis=-1, dtype=np.float64).mean(axis=0) for x in (reference, estimate))
    moving = expected > 0
    if not moving.any():
        return dict.fromkeys(names, float("nan"))
    low, median, high = np.percentile(np.sqrt(found[moving] / expected[moving]), (10, 50, 90)).tolist()
    worst = min(LARGEST_STD_RATIO, max(high, 1 / max(low, 1 / LARGEST_STD_RATIO)))
    return dict(zip(names, (median, low, high, worst), strict=True))
