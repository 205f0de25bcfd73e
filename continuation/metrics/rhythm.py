"""Measures of onsets, tempo and beat."""

import numpy as np

from continuation.metrics.arithmetic import check_pair, pearson
from continuation.metrics.sound import ONSET_HOP_SECONDS, Sound

ONSET_TOLERANCE_SECONDS = 0.05
SAME_TEMPO_OCTAVES = 0.06  # largest deviation of equal tempi (4 %)
SAME_BEAT = 0.1  # of a beat


def onset_times(x: Sound) -> np.ndarray:
    """Detect the onsets, in seconds, of the mean of the channels: peaks of the log-mel spectral flux.

    By librosa's detector, after Böck et al., "Evaluating the online capabilities of onset detection methods", 2012.
    """
    import librosa

    if not x.onset_strength.any():
        return np.zeros(0)
    return librosa.onset.onset_detect(
        onset_envelope=x.onset_strength, sr=x.sample_rate, hop_length=x.onset_hop, units="time"
    )


def match_onsets(reference_times: np.ndarray, estimate_times: np.ndarray, tolerance: float) -> int:
    """Return the size of the largest one-to-one matching of two sorted lists of times within `tolerance` seconds.

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


def onset_f(reference: Sound, estimate: Sound) -> float:
    """Compute the F-measure, 0..1, of the onsets within 50 ms (as `mir_eval.onset.f_measure`; Böck et al. 2012).

    Onsets are of the mean of the channels. Undefined where the reference has none.
    """
    check_pair(reference.samples, estimate.samples)
    expected, found = onset_times(reference), onset_times(estimate)
    if not len(expected):
        return float("nan")
    return 2 * match_onsets(expected, found, ONSET_TOLERANCE_SECONDS) / (len(expected) + len(found))


def onset_correlation(reference: Sound, estimate: Sound) -> float:
    """Compute the Pearson correlation of the onset strengths, smoothed over 50 ms: are there onsets at the same
    times? Undefined where either is constant."""
    check_pair(reference.samples, estimate.samples)
    window = np.hanning(7)[1:-1]
    a, b = (np.convolve(x.onset_strength, window, mode="same") for x in (reference, estimate))
    return float(pearson(a, b))


def tempo_deviation(context: Sound, continuation: Sound) -> float:
    """Compute the deviation of the continuation's tempo from the context's, in octaves: |log2 of the ratio|, folded
    to the nearest octave, 0..0.5, since half and double time are the same beat. Undefined where either has no
    tempo."""
    octaves = np.log2(continuation.tempo / context.tempo)
    return float(abs(octaves - np.round(octaves)))


def beat_phase_error(context: Sound, continuation: Sound) -> float:
    """Compute the distance of the continuation's onsets from the context's beat, 0..0.5 beats: the difference of the
    phases of both onset strengths at the context's tempo, extrapolated from the context. Undefined without tempo."""
    beat = 60 / context.tempo / ONSET_HOP_SECONDS  # in frames
    if not np.isfinite(beat) or not continuation.samples.any():
        return float("nan")
    whole = Sound(np.concatenate([context.samples, continuation.samples], axis=-1), context.sample_rate)
    phasors = whole.onset_strength * np.exp(2j * np.pi * np.arange(len(whole.onset_strength)) / beat)
    cut = round(context.samples.shape[-1] / context.sample_rate / ONSET_HOP_SECONDS)
    before, after = phasors[:cut].sum(), phasors[cut:].sum()
    if not abs(before) or not abs(after):
        return float("nan")
    return float(abs(np.angle(after / before)) / (2 * np.pi))


def beat_measures(context: Sound, reference: Sound, estimate: Sound) -> dict[str, float]:
    """Compute the tempo and beat measures of the estimate against the context, where the true continuation keeps
    both."""
    measures = {"tempo_deviation": float("nan"), "beat_phase_error": float("nan")}
    if tempo_deviation(context, reference) <= SAME_TEMPO_OCTAVES:
        measures["tempo_deviation"] = tempo_deviation(context, estimate)
        if beat_phase_error(context, reference) <= SAME_BEAT:
            measures["beat_phase_error"] = beat_phase_error(context, estimate)
    return measures
