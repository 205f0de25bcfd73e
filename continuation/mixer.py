"""Mixing of the decoder's own sound with copies of the context.

Shapes: spectra are complex (batch, sources, channels, bins, frames), of mid and side, 100 frames a second; levels are
(batch, rows, steps) of the context and (batch, copies, rows, steps) of the copies, with channels * bands rows and one
step per STEP_FRAMES frames. The sources are the decoder's own sound, then the copies, the first of which is the loop.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from continuation.layers import without_autocast
from continuation.repetition import Copies
from continuation.spectral import QUIETEST_POWER, STEP_FRAMES, BandLevels

SIMILARITY_LOGIT = 8.0  # added per unit of correlation, of the sound and of the onsets
ERROR_LOGIT = 8.0  # subtracted per unit of the logarithm of a source's error in a band
OWN_ERROR = 1.3  # nepers: the error that own sound counts as
LEAST_ERROR = 0.03  # nepers: lower limit of a copy's past error
PAST_SHARE = 0.8  # end of the context in which the past error of each lag is measured, as a share of it
LOUDEST_CORRECTION = 1.0  # nepers: largest correction of a band's power over all decoded frames


def past_error(past: Tensor, lags: Tensor, hop: int) -> Tensor:
    """Compute the error of each of `lags` (batch, copies), in samples, as a predictor of the context itself: the mean
    distance of its last levels (batch, rows, steps) from those one lag earlier, in nepers, at least LEAST_ERROR:
    (batch, copies, rows)."""
    steps = past.shape[-1]
    end = torch.arange(steps - round(PAST_SHARE * steps), steps, device=past.device)
    step_samples = STEP_FRAMES * hop
    before = end - ((lags + step_samples // 2) // step_samples)[..., None]  # (batch, copies, steps)
    places = before.clamp(min=0)[:, :, None].expand(-1, -1, past.shape[1], -1)
    error = (past[:, None].expand(-1, before.shape[1], -1, -1).gather(3, places) - past[:, None, :, end]).abs()
    known = (before >= 0)[:, :, None]
    return ((error * known).sum(-1) / known.sum(-1).clamp(min=1)).clamp(min=LEAST_ERROR)


def expected_levels(copies: Copies, start: int, steps: int) -> tuple[Tensor, Tensor]:
    """Compute the levels expected from the copies in the `steps` from `start` samples after the context's end on, and
    their uncertainty: weighted mean and mean distance from it, (batch, rows, steps) each.

    A copy's levels are taken from those of the context, to the nearest step.
    """
    past = copies.levels
    step_samples = STEP_FRAMES * copies.hop
    time = start + step_samples * torch.arange(steps, device=past.device) + step_samples // 2
    places = (copies.places(time) // step_samples).clamp(max=past.shape[-1] - 1)  # (batch, copies, steps)
    played = past[:, None].expand(-1, places.shape[1], -1, -1)
    played = played.gather(3, places[:, :, None].expand(-1, -1, past.shape[1], -1))
    return expectation(played, copy_weights(copies))


def copy_logits(copies: Copies) -> Tensor:
    """Compute the logits of the copies by band: (batch, copies, rows).

    They are larger where the context repeats itself better at the copy's lag. Little of the context tells the error
    of a multiple: it is averaged with that of its base lag.
    """
    preference = SIMILARITY_LOGIT * copies.similarity.sum(-1) + copies.bias
    errors = [past_error(copies.levels, lags, copies.hop) for lags in (copies.lags, copies.base_lags)]
    return preference[..., None] - ERROR_LOGIT * (sum(errors) / 2).log()


def copy_weights(copies: Copies) -> Tensor:
    """Compute the weights of the copies by band, with sum 1 over the copies: (batch, copies, rows)."""
    return copy_logits(copies).softmax(1)


def expectation(levels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the weighted mean of the copies' levels (batch, copies, rows, steps), and their weighted mean distance
    from it: (batch, rows, steps) each."""
    weights = weights[..., None]
    mean = (weights * levels).sum(1)
    return mean, (weights * (levels - mean[:, None]).abs()).sum(1)


class Mixer(nn.Module):
    """Weighted sum of the sources in the STFT domain, without trained weights.

    Each source has a share by band: a copy's is larger where the context repeats itself better at its lag, own sound
    has one where it hardly repeats itself at all. Since different copies cancel in part, every band of the sum is
    then scaled to the power of its sources.
    """

    def __init__(self, bins: int):
        super().__init__()
        self.bands = BandLevels(bins)

    def forward(self, sources: Tensor, copies: Copies) -> Tensor:
        """Mix the sources (batch, 1 + copies, channels, bins, frames) to (batch, channels, bins, frames)."""
        with without_autocast(sources):
            own_logit = -ERROR_LOGIT * math.log(OWN_ERROR)
            logits = F.pad(copy_logits(copies), (0, 0, 1, 0), value=own_logit)
            shares = logits.softmax(1).unflatten(2, (sources.shape[2], -1))  # (batch, sources, channels, bands)
            mixed = (sources * self.bands.to_bins(shares)).sum(1)
            return mixed * self.power_correction(sources, mixed, shares)

    def power_correction(self, sources: Tensor, mixed: Tensor, shares: Tensor) -> Tensor:
        """Compute the gains that bring every band's power, over all frames, to the mean power of the sources weighted
        by their shares (batch, sources, channels, bands): (batch, channels, bins, 1)."""
        with torch.no_grad():
            wanted = (shares * self.bands.power(sources).mean(-1)).sum(1)  # (batch, channels, bands)
        found = self.bands.power(mixed).mean(-1)
        gain = ((wanted + QUIETEST_POWER) / (found + QUIETEST_POWER)).log() / 2
        return self.bands.to_bins(gain.clamp(-LOUDEST_CORRECTION, LOUDEST_CORRECTION).exp())
