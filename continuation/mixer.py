"""Mixing of the decoder's own output with copies of the context, at the levels that the core predicts.

Shapes: spectra are complex (batch, sources, channels, bins, frames), of mid and side, 100 frames a second; levels are
(batch, sources, channels * bands, steps), one step per STEP_FRAMES frames. The sources are the decoder's own output,
then the copies, the first of which is the loop.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from continuation.layers import without_autocast
from continuation.repetition import Copies
from continuation.spectral import QUIETEST_POWER, STEP_FRAMES, BandLevels

OWN_LOGIT, LOOP_LOGIT = -2.0, 2.0  # of the decoder's own output, and of the loop, added to its others
SIMILARITY_LOGIT = 8.0  # per unit of correlation, of the sound and of the onsets
ERROR_LOGIT = 8.0  # subtracted per unit of the logarithm of a copy's past error in a band
PULL = 0.6  # share of the difference to the target level, in nepers, that a source is corrected by
LOUDEST_GAIN = 0.7  # nepers (6 dB): largest correction of a source's level, up or down
LEAST_ERROR = 0.03  # nepers: lower limit of a copy's past error
TRUST = 4.0  # a copy's weight falls with this power of its past error
PAST_SHARE = 0.8  # end of the context in which the past error of each lag is measured, as a share of it
LOUDEST_CORRECTION = 1.0  # nepers: largest correction of a band's power over all decoded frames


def past_error(past: Tensor, copies: Copies) -> Tensor:
    """Compute the error of each lag as a predictor of the context itself: the mean distance of its last levels
    (batch, rows, steps) from those one lag earlier, in nepers, at least LEAST_ERROR: (batch, copies, rows)."""
    steps = past.shape[-1]
    end = torch.arange(steps - round(PAST_SHARE * steps), steps, device=past.device)
    step_samples = STEP_FRAMES * copies.hop
    before = end - ((copies.lags + step_samples // 2) // step_samples)[..., None]  # (batch, copies, steps)
    places = before.clamp(min=0)[:, :, None].expand(-1, -1, past.shape[1], -1)
    error = (past[:, None].expand(-1, before.shape[1], -1, -1).gather(3, places) - past[:, None, :, end]).abs()
    known = (before >= 0)[:, :, None]
    return ((error * known).sum(-1) / known.sum(-1).clamp(min=1)).clamp(min=LEAST_ERROR)


def agreement(error: Tensor) -> Tensor:
    """Compute the weights of the copies by band from their `past_error`: (batch, copies, rows), with sum 1 over the
    copies."""
    return (-TRUST * error.log()).softmax(1)


def expectation(levels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the weighted mean of the copies' levels (batch, copies, rows, steps), and their weighted mean distance
    from it: (batch, rows, steps) each."""
    weights = weights[..., None]
    mean = (weights * levels).sum(1)
    return mean, (weights * (levels - mean[:, None]).abs()).sum(1)


class Mixer(nn.Module):
    """Weighted sum of the sources in the STFT domain, without trained weights.

    Each source has a share by band, larger where the context repeats better at its lag, and is scaled part of the
    way to the target level in every band and step. Since different copies cancel in part, every band of the sum is
    then scaled to the power of the copies.
    """

    def __init__(self, bins: int):
        super().__init__()
        self.bands = BandLevels(bins)

    def forward(self, sources: Tensor, past: Tensor, copies: Copies, levels: Tensor | None = None) -> Tensor:
        """Mix the sources (batch, 1 + copies, channels, bins, frames) to (batch, channels, bins, frames).

        past: spectrum of the context (batch, channels, bins, frames). levels (batch, channels * bands, steps): target
        levels of the last steps; before them, and by default, the target is the weighted mean of the copies' levels.
        """
        with without_autocast(sources):
            found = self.bands(sources)
            error = past_error(self.bands(past), copies)
            weights = agreement(error)
            wanted, _ = expectation(found[:, 1:], weights)
            if levels is not None:
                wanted = torch.cat([wanted[..., : -levels.shape[-1]], levels], dim=-1)
            gains = PULL * (wanted[:, None] - found)
            gains = self.shares(copies, error)[..., None] * (LOUDEST_GAIN * (gains / LOUDEST_GAIN).tanh()).exp()
            mixed = (sources * self.bands.to_bins(gains, sources.shape[-1])).sum(1)
            return mixed * self.power_correction(sources, mixed, weights)

    @staticmethod
    def shares(copies: Copies, error: Tensor) -> Tensor:
        """Compute the shares of the sources by band, with sum 1: (batch, 1 + copies, channels * bands)."""
        logits = SIMILARITY_LOGIT * copies.similarity.sum(-1, keepdim=True) - ERROR_LOGIT * error.log()
        logits = torch.cat([logits[:, :1] + LOOP_LOGIT, logits[:, 1:]], dim=1)
        return F.pad(logits, (0, 0, 1, 0), value=OWN_LOGIT).softmax(1)

    def power_correction(self, sources: Tensor, mixed: Tensor, weights: Tensor) -> Tensor:
        """Compute the gains that bring every band's power, over all frames, to the weighted mean power of the copies:
        (batch, channels, bins, 1)."""
        with torch.no_grad():
            power = self.bands.power(sources[:, 1:]).mean(-1)  # (batch, copies, channels, bands)
            wanted = (weights.view_as(power) * power).sum(1)
        found = self.bands.power(mixed).mean(-1)
        gain = ((wanted + QUIETEST_POWER) / (found + QUIETEST_POWER)).log() / 2
        gain = gain.clamp(-LOUDEST_CORRECTION, LOUDEST_CORRECTION).exp()
        return self.bands.interpolate @ gain[..., None]
