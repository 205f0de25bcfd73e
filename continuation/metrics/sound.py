"""A signal with the features that several measures need."""

from functools import cached_property

import numpy as np
from scipy import signal

ONSET_HOP_SECONDS = 0.01
ONSET_SIZE_AT_12K = 1024
ONSET_MELS = 64
TEMPO_HARMONICS = (1, 2, 4)  # of the beat, whose own frequency may be weak
TEMPO_REACH_FRAMES = 1.0  # around librosa's beat
TEMPO_CANDIDATES = 81
WELCH_SIZE = 32768


class Sound:
    """Samples (channels, samples) and their features, each computed once at its first use, since a context and its
    true continuation are compared with the continuation of every system."""

    def __init__(self, samples: np.ndarray, sample_rate: int):
        self.samples, self.sample_rate = samples, sample_rate

    @cached_property
    def onset_strength(self) -> np.ndarray:
        """Log-mel spectral flux of the mean of the channels, float32, every ONSET_HOP_SECONDS; zeros for silence.

        The window has 1024 samples at 12 kHz, and the same duration at other rates.
        """
        import librosa

        mono = self.samples.mean(axis=0).astype(np.float32)
        size = round(ONSET_SIZE_AT_12K * self.sample_rate / 12000)
        return librosa.onset.onset_strength(
            y=mono, sr=self.sample_rate, hop_length=self.onset_hop, n_fft=size, n_mels=ONSET_MELS
        )

    @property
    def onset_hop(self) -> int:
        """Samples between two values of the onset strength."""
        return round(ONSET_HOP_SECONDS * self.sample_rate)

    @cached_property
    def tempo(self) -> float:
        """Beats per minute; nan without onsets.

        librosa's autocorrelation of the onset strength gives the beat in whole frames of 10 ms: an error of half a
        frame is a fifth of a beat after 10 s at 120 per minute. It is refined, by up to a frame, to the beat at which
        the strength's Fourier components at once, twice and four times its frequency are strongest.
        """
        import librosa

        strength = self.onset_strength
        if not strength.any():
            return float("nan")
        frames_a_minute = 60 * self.sample_rate / self.onset_hop
        coarse = frames_a_minute / float(
            librosa.feature.tempo(onset_envelope=strength, sr=self.sample_rate, hop_length=self.onset_hop)[0]
        )
        beats = coarse + np.linspace(-TEMPO_REACH_FRAMES, TEMPO_REACH_FRAMES, TEMPO_CANDIDATES)  # in frames
        centred = strength - strength.mean()
        phases = np.exp(2j * np.pi * np.arange(len(strength))[:, None] / beats)
        power = sum(np.abs(centred @ phases**harmonic) ** 2 for harmonic in TEMPO_HARMONICS)
        return frames_a_minute / float(beats[np.argmax(power)])

    @cached_property
    def welch_db(self) -> np.ndarray:
        """Welch spectrum in dB (n = 32768, Hann, half overlapped) of the channels that are not silent, (channels,
        bins); without channels for silence and for less than 32768 samples."""
        x = self.samples
        if x.shape[-1] < WELCH_SIZE or not np.any(x):
            return np.zeros((0, WELCH_SIZE // 2 + 1))
        _, power = signal.welch(x[np.any(x, axis=-1)], self.sample_rate, nperseg=WELCH_SIZE)
        return 10 * np.log10(np.maximum(power, power.max(axis=-1, keepdims=True) * 1e-12))
