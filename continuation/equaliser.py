"""Prediction of the long-term average spectrum of a continuation, and the filter that gives it to a sound.

The long-term average spectrum (LTAS) is the mean power over all frames of a chunk, in bands of 1/24 octave: which
notes sound, and how loud. Copies play too much of the few notes that the end of the context happens to have.

Shapes: powers are (batch, channels, bands, frames), of mid and side; spectra (batch, channels, bands), the logarithms
of mean powers. Gains are nepers of amplitude: half as much.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from continuation.layers import FRAME_RATE_HZ, WINDOW_HOPS, ChannelNorm, blocks, without_autocast
from continuation.mixer import copy_weights
from continuation.repetition import Copies
from continuation.spectral import band_at, interpolate_between, istft, left_right, mid_side, stft

BANDS_PER_OCTAVE = 24
LOWEST_HZ = 50
WINDOW_SECONDS = 1 / 3  # resolves semitones from 100 Hz on
OVERLAP = 4  # hops of a window
QUIETEST_LEVEL = -12.0  # natural logarithm of power, relative to the loudest band: lower limit of the spectra
LEAST_FLATNESS = -4.0
QUIETEST_POWER = 1e-9
CONTEXT_PARTS = 4  # of equal length, whose spectra are features
FEATURES = CONTEXT_PARTS + 5
WIDTH, BLOCKS = 32, 4
STRENGTH = 0.6  # share of the predicted correction that is applied
LARGEST_GAIN = 0.7  # nepers, 6 dB: of a band, up or down


class LogBands(nn.Module):
    """Powers in bands of equal width in log frequency, from LOWEST_HZ to half the sample rate, and filters with a
    gain for each band; without trained weights."""

    def __init__(self, sample_rate: int):
        super().__init__()
        self.hop = round(WINDOW_SECONDS * sample_rate / OVERLAP)
        self.size = OVERLAP * self.hop
        bin_hz = sample_rate / self.size
        frequencies = bin_hz * torch.arange(self.size // 2 + 1)
        centres = LOWEST_HZ * 2 ** ((torch.arange(band_count(sample_rate)) + 0.5) / BANDS_PER_OCTAVE)
        width = (centres * (2 ** (1 / BANDS_PER_OCTAVE) - 1)).clamp(min=2 * bin_hz)  # at least one bin falls inside
        pool = (1 - (frequencies - centres[:, None]).abs() / width[:, None]).clamp(min=0)
        self.register_buffer("pool", pool / pool.sum(1, keepdim=True), persistent=False)
        to_bins = interpolate_between(centres.log(), frequencies.clamp(min=1).log())
        self.register_buffer("interpolate", to_bins, persistent=False)
        mixer_bins = WINDOW_HOPS * (sample_rate // FRAME_RATE_HZ) // 2 + 1
        self.register_buffer("coarse", band_at(centres, mixer_bins), persistent=False)  # the mixer's band of each

    def spectrum(self, x: Tensor) -> Tensor:
        """Compute the STFT of mid and side of audio x (batch, channels, samples), centred on multiples of the hop:
        complex (batch, channels, bins, frames)."""
        x = F.pad(x.float(), (self.size // 2, self.size // 2 + -x.shape[-1] % self.hop))
        return stft(mid_side(x), self.size, self.hop).transpose(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the powers of audio x (batch, channels, samples): (batch, channels, bands, frames)."""
        return self.pool @ self.spectrum(x).abs().square()

    def filter(self, x: Tensor, gains: Tensor) -> Tensor:
        """Filter audio x (batch, channels, samples) by gains of mid and side (batch, channels, bands), in nepers of
        amplitude."""
        filtered = self.spectrum(x) * (self.interpolate @ gains[..., None]).exp()
        return left_right(istft(filtered, self.hop)[..., self.size // 2 :][..., : x.shape[-1]])


def band_count(sample_rate: int) -> int:
    """Return the number of bands from LOWEST_HZ to half the sample rate."""
    return max(1, math.floor(BANDS_PER_OCTAVE * math.log2(sample_rate / 2 / LOWEST_HZ)))


class Equaliser(nn.Module):
    """Network that predicts how the LTAS of a continuation differs from that expected from the copies, and filter
    that corrects it.

    ConvNeXt blocks along log frequency: the same at every pitch, so that a song in another key is nothing new.
    Untrained, it predicts no difference, and changes nothing.
    """

    def __init__(self, sample_rate: int, dropout: float):
        super().__init__()
        self.bands = LogBands(sample_rate)
        self.from_features = nn.Conv1d(FEATURES, WIDTH, 1)
        self.blocks = blocks(WIDTH, BLOCKS)
        self.norm = ChannelNorm(WIDTH)
        self.dropout = nn.Dropout1d(dropout)
        self.to_correction = nn.Conv1d(WIDTH, 1, 1)
        nn.init.zeros_(self.to_correction.weight)
        nn.init.zeros_(self.to_correction.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Predict the correction of the expected spectrum, a difference of logarithms, from `features` (batch,
        channels, FEATURES, bands): (batch, channels, bands)."""
        x = self.dropout(self.from_features(features.flatten(0, 1)))
        x = self.dropout(self.norm(self.blocks(x)))
        return self.to_correction(x)[:, 0].unflatten(0, features.shape[:2])

    @torch.no_grad()
    def features(self, copies: Copies, length: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """Compute the features (batch, channels, FEATURES, bands) for the `length` samples from `start` samples after
        the context's end on, and the level (batch, 1, 1) of the loudest band expected there.

        They are: the expected spectrum, relative to that level; the differences from it of the spectra of each part
        of the context and of all of it; how flat each band is in time (the geometric over the arithmetic mean of its
        power); channel; frequency.
        """
        powers = self.bands(copies.context)
        expected = log(self.expected_power(powers, copies, length, start))
        level = expected.amax((1, 2), keepdim=True)
        whole = log(powers.mean(-1))
        flatness = (log(powers).mean(-1) - whole).clamp(min=LEAST_FLATNESS)
        expected = relative(expected, level)
        parts = [log(part.mean(-1)) for part in powers.tensor_split(CONTEXT_PARTS, dim=-1)]
        differences = [relative(spectrum, level) - expected for spectrum in (*parts, whole)]
        channel = torch.arange(expected.shape[1], device=expected.device)[:, None].expand_as(expected)
        frequency = torch.linspace(-1, 1, expected.shape[2], device=expected.device).expand_as(expected)
        return torch.stack([expected, *differences, flatness, channel, frequency], dim=2), level

    def expected_power(self, powers: Tensor, copies: Copies, length: int, start: int) -> Tensor:
        """Compute the mean power of the copies over these samples, weighted as in the mixer, from the powers of the
        context: (batch, channels, bands)."""
        hop, last = self.bands.hop, powers.shape[-1] - 1
        time = start + hop * torch.arange(max(1, length // hop), device=powers.device) + hop // 2
        frames = ((copies.places(time) + hop // 2) // hop).clamp(max=last)  # (batch, copies, times)
        numbers = torch.arange(last + 1, device=powers.device)
        shares = (frames[..., None] == numbers).to(powers.dtype).mean(2)  # of the context's frames in each copy
        played = torch.einsum("bcnf,bkf->bkcn", powers, shares)
        weights = copy_weights(copies).unflatten(2, (powers.shape[1], -1))[..., self.bands.coarse]
        return (weights * played).sum(1)

    def training_pair(self, copies: Copies, target: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features for what follows the copies' context, and the true correction (batch, channels, bands)
        from the audio that does, `target` (batch, channels, samples)."""
        with without_autocast(target):  # powers overflow in fp16
            features, level = self.features(copies, target.shape[-1])
            return features, relative(log(self.bands(target).mean(-1)), level) - features[:, :, 0]

    def equalise(self, x: Tensor, copies: Copies, start: int = 0) -> Tensor:
        """Filter audio x (batch, channels, samples), which begins `start` samples after the end of the copies'
        context, STRENGTH of the way to the predicted spectrum."""
        with without_autocast(x):
            features, _ = self.features(copies, x.shape[-1], start)
            gains = (STRENGTH * self(features) / 2).clamp(-LARGEST_GAIN, LARGEST_GAIN)
            return self.bands.filter(x, gains)


def untrained_weights() -> dict[str, Tensor]:
    """Return the weights, always the same, of an equaliser that changes nothing; all have the same shapes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return dict(Equaliser(sample_rate=FRAME_RATE_HZ, dropout=0.0).state_dict())


def log(power: Tensor) -> Tensor:
    """Compute the natural logarithm of powers; QUIETEST_POWER bounds it from below."""
    return (power + QUIETEST_POWER).log()


def relative(spectrum: Tensor, level: Tensor) -> Tensor:
    """Compute a spectrum (batch, channels, bands) relative to a level (batch, 1, 1), at least QUIETEST_LEVEL."""
    return (spectrum - level).clamp(min=QUIETEST_LEVEL)
