"""How music goes on if it goes on repeating itself: what the core is told beside the context, and starts from.

In sound a repetition is exact to the sample, so that tones go on in phase; latents, a hundred a second, can only
repeat to the nearest, and still do so where bars are alike without being the same.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

LAG_OCTAVES = (0.1, 0.2, 0.4, 0.8)  # of a context's length: 1 s, 2 s, 4 s and 8 s
PATTERN = 0.2  # of a context's length, at its end: what is looked for in the sound before it
SOFTEST_MATCH = 0.01  # its power relative to the pattern's; what is softer matches less


@torch.no_grad()
def repeat(x: Tensor) -> tuple[Tensor, Tensor]:
    """What follows audio x (batch, channels, samples) if it repeats itself to the sample, of the same shape, and how
    well it has done so (batch,), 0..1.

    Its end over and over, at the lag at which its last PATTERN correlates the most with what was there before; the
    correlation coefficient there.
    """
    lag, correlation = sound_lag(x)
    return over_and_over(x, lag), correlation


def over_and_over(x: Tensor, lag: Tensor) -> Tensor:
    """The last `lag` (batch,) of x (batch, channels, length), repeated to x's own length."""
    length, lag = x.shape[-1], lag[:, None]
    source = length - lag + torch.arange(length, device=x.device) % lag
    return x.gather(2, source[:, None].expand_as(x))


def sound_lag(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of x's end, in samples, within LAG_OCTAVES, and its correlation coefficient: (batch,) each."""
    x = x.float()
    length = x.shape[-1]
    size = round(PATTERN * length)
    shortest, longest = round(LAG_OCTAVES[0] * length), round(LAG_OCTAVES[-1] * length)
    spectra = torch.fft.rfft(x) * torch.fft.rfft(x[..., -size:], length).conj()
    products = torch.fft.irfft(spectra, length).sum(1)  # by the place where the match begins
    sums = F.pad(x.double().square().sum(1).cumsum(-1), (1, 0))
    power = (sums[:, size:] - sums[:, :-size]).float()  # likewise
    lags = torch.arange(shortest, longest + 1, device=x.device)
    places, pattern = length - size - lags, power[:, -1:]
    energy = pattern * torch.maximum(power[:, places], SOFTEST_MATCH * pattern)
    correlation, best = (products[:, places] / energy.clamp(min=1e-12).sqrt()).max(-1)
    return lags[best], correlation.clamp(0, 1)


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
    length = z.shape[-1]
    z = z.float()
    spectrum = torch.fft.rfft(z, 2 * length)
    products = torch.fft.irfft((spectrum * spectrum.conj()).real.sum(1), 2 * length)  # by lag
    power = z.square().sum(1).cumsum(-1)
    edges = [round(share * length) for share in LAG_OCTAVES]
    found = []
    for shortest, longest in pairwise(edges):
        lags = torch.arange(shortest, longest + 1, device=z.device)
        energy = power[:, length - 1 - lags] * (power[:, -1:] - power[:, lags - 1])  # of both overlapping parts
        correlation, best = (products[:, lags] / energy.clamp(min=1e-6).sqrt()).max(-1)
        found.append((lags[best], correlation.clamp(0, 1)))
    lags, correlations = zip(*found, strict=True)
    return torch.stack(lags, 1), torch.stack(correlations, 1)
