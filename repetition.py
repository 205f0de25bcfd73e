"""How music goes on if it goes on repeating itself: what the core is told beside the context, and starts from.

In sound a repetition can be exact to the sample, so that tones go on in phase; latents, a hundred a second, can only
repeat to the nearest, and still do so where bars are alike without being the same.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

LAG_OCTAVES = (0.1, 0.2, 0.4, 0.8)  # of a context's length: 1 s, 2 s, 4 s and 8 s
PATTERN = 0.2  # of a context's length, at its end: what is looked for in the sound before it
SOFTEST_MATCH = 0.01  # its power relative to the pattern's; what is softer matches less
LONGER_LAG = 0.07  # what an octave more of lag counts, as a correlation: more is repeated, and less often
ONSET_WINDOW_HOPS = 4
ONSET_BANDS = 8


@torch.no_grad()
def repeat(x: Tensor, hop: int) -> tuple[Tensor, Tensor]:
    """What follows audio x (batch, channels, samples) if it goes on repeating itself, of the same shape, and how
    exactly it has done so (batch,), 0..1: its end over and over, at its `sound_lag`, and the correlation there."""
    lag, correlation = sound_lag(x, hop)
    return over_and_over(x, lag), correlation


def over_and_over(x: Tensor, lag: Tensor) -> Tensor:
    """The last `lag` (batch,) of x (batch, channels, length), repeated to x's own length."""
    length, lag = x.shape[-1], lag[:, None]
    source = length - lag + torch.arange(length, device=x.device) % lag
    return x.gather(2, source[:, None].expand_as(x))


def sound_lag(x: Tensor, hop: int) -> tuple[Tensor, Tensor]:
    """Of x's end, in samples, within LAG_OCTAVES, and the correlation coefficient of the sound there: (batch,) each.

    It is where sound and rhythm together resemble themselves the most: the last PATTERN of the sound, to the sample,
    and all of the `onset_strength`. Played music hardly ever repeats its sound, but its beat.
    """
    x = x.float()
    length = x.shape[-1]
    lags = torch.arange(round(LAG_OCTAVES[0] * length), round(LAG_OCTAVES[-1] * length) + 1, device=x.device)
    sound = pattern_similarity(x, round(PATTERN * length), lags)
    rhythm = self_similarity(onset_strength(x, hop))[:, (lags + hop // 2) // hop]
    best = (sound + rhythm + LONGER_LAG * (lags / lags[0]).log2()).argmax(-1)
    return lags[best], sound.gather(1, best[:, None])[:, 0].clamp(0, 1)


def pattern_similarity(x: Tensor, size: int, lags: Tensor) -> Tensor:
    """Correlation coefficient of the last `size` samples of x (batch, channels, samples) with those that were there
    `lags` (lags,) before: (batch, lags)."""
    length = x.shape[-1]
    spectra = torch.fft.rfft(x) * torch.fft.rfft(x[..., -size:], length).conj()
    products = torch.fft.irfft(spectra, length).sum(1)  # by the place where the match begins
    sums = F.pad(x.double().square().sum(1).cumsum(-1), (1, 0))
    power = (sums[:, size:] - sums[:, :-size]).float()  # likewise
    places, pattern = length - size - lags, power[:, -1:]
    energy = pattern * torch.maximum(power[:, places], SOFTEST_MATCH * pattern)
    return products[:, places] / energy.clamp(min=1e-12).sqrt()


def onset_strength(x: Tensor, hop: int) -> Tensor:
    """By how much each of ONSET_BANDS, equal on a logarithmic scale of frequency, gets louder from frame to frame,
    less its mean: (batch, at most ONSET_BANDS, samples // hop). The spectral flux of logarithmic magnitudes (Bello et
    al. 2005)."""
    size = ONSET_WINDOW_HOPS * hop
    excess = size - hop
    frames = F.pad(x.float(), (excess // 2, excess - excess // 2)).unfold(-1, size, hop)
    magnitudes = torch.fft.rfft(frames * torch.hann_window(size, device=x.device)).abs()
    floor = (0.01 * magnitudes.mean((1, 2, 3), keepdim=True)).clamp(min=1e-8)  # what is softer has no onsets
    levels = (magnitudes + floor).log().mean(1)
    edges = sorted({round(levels.shape[-1] ** (i / ONSET_BANDS)) for i in range(ONSET_BANDS + 1)})
    bands = torch.stack([levels[..., low:high].mean(-1) for low, high in pairwise(edges)], 1)
    rises = F.pad(bands.diff(dim=-1).relu(), (1, 0))
    return rises - rises.mean(-1, keepdim=True)


def self_similarity(z: Tensor) -> Tensor:
    """Correlation coefficient of z (batch, rows, length) with itself, by lag: (batch, length)."""
    z = z.float()
    length = z.shape[-1]
    spectrum = torch.fft.rfft(z, 2 * length)
    products = torch.fft.irfft((spectrum * spectrum.conj()).real.sum(1), 2 * length)[:, :length]
    power = F.pad(z.square().sum(1).cumsum(-1), (1, 0))
    energy = power[:, 1:].flip(-1) * (power[:, -1:] - power[:, :-1])  # of both overlapping parts
    return products / energy.clamp(min=1e-6).sqrt()


@torch.no_grad()
def long_term_prediction(z: Tensor) -> Tensor:
    """What follows latents (batch, latent_channels, latents) if they repeat themselves, of the same shape.

    Their end over and over at each of their `latent_lags`, scaled about their mean by the correlation there; of
    these the mean weighted by squared correlation: the long-term predictor of speech codecs (Atal and Schroeder
    1970), for beats, bars and phrases instead of pitch periods.
    """
    mean, std = z.mean(-1, keepdim=True), z.std(-1, keepdim=True)
    lags, correlations = latent_lags((z - mean) / std.clamp(min=1e-6))
    weights = correlations**3 / correlations.square().sum(1, keepdim=True).clamp(min=1e-6)
    prediction = mean.expand_as(z)
    for lag, weight in zip(lags.unbind(1), weights.to(z.dtype).unbind(1), strict=True):
        prediction = prediction + weight[:, None, None] * over_and_over(z - mean, lag)
    return prediction


def latent_lags(z: Tensor) -> tuple[Tensor, Tensor]:
    """In each octave of lags, LAG_OCTAVES of their length, the one at which standardised latents (batch,
    latent_channels, latents) resemble themselves the most, in latents, and the correlation coefficient there:
    (batch, octaves) each."""
    similarity = self_similarity(z)
    edges = [round(share * z.shape[-1]) for share in LAG_OCTAVES]
    found = []
    for shortest, longest in pairwise(edges):
        correlation, best = similarity[:, shortest : longest + 1].max(-1)
        found.append((shortest + best, correlation.clamp(0, 1)))
    lags, correlations = zip(*found, strict=True)
    return torch.stack(lags, 1), torch.stack(correlations, 1)
