"""Measures of a sound, or of one against another, one function each. Kernel audio distance is in kad.py, the distance
that training prints in validation.py.

Signals are float arrays of shape (channels, samples) in -1..1, or a `Sound` of them; where two are taken, the
reference comes first and the estimate second, equal in shape. A measure of several channels is the mean over the
channels in which it is defined, unless its docstring says otherwise. Undefined values (the flatness of silence) are
nan. Levels in dB are limited to +-100 dB, so that a mean over songs stays finite.

|S| is the unnormalised magnitude of a short-time Fourier transform with a periodic Hann window of n samples and a hop
of n/4; only frames that lie wholly inside the signal are used.
"""

# ruff: noqa: F401 (one name for all: metrics.chroma_cosine)

from continuation.metrics.combs import comb, combs_above_truth, hum
from continuation.metrics.continuation import (
    COPY_SECONDS,
    chroma_cosine,
    click_percentiles,
    continuation_measures,
    copy_index,
    horizons,
    key,
    key_agreement,
    latent_diversity,
    latent_std_ratios,
    loudness_ratio_db,
    nearest_similarity,
    passages,
)
from continuation.metrics.reconstruction import (
    RECONSTRUCTION_BANDS_HZ,
    envelope_correlation,
    log_spectral_distance,
    mid_side_energy_ratio_db,
    noise_reference,
    reconstruction_measures,
    si_sdr,
    smooth_reference,
    spectral_flatness_ratio_db,
    waveform_mse,
)
from continuation.metrics.rhythm import (
    beat_measures,
    beat_phase_error,
    match_onsets,
    onset_correlation,
    onset_f,
    onset_times,
    tempo_deviation,
)
from continuation.metrics.sound import Sound
from continuation.metrics.spectra import band_energy_ratios_db, mr_stft_distance
from continuation.metrics.statistics import bootstrap_interval, jackknife_interval, paired_interval, per_song
