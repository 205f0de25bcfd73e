"""How the decoder uses the sound that was heard: it plays copies of it, at the levels that the core predicts.

Shapes: spectra are complex (batch, sources, channels, bins, frames), of mid and side, 100 frames a second; levels are
(batch, sources, channels * bands, steps), a step every STEP_FRAMES. The sources are the decoder's own sound, then the
copies, the first of which is the loop.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from continuation.layers import without_autocast
from continuation.repetition import Copies
from continuation.spectral import QUIETEST_POWER, STEP_FRAMES, BandLevels

OWN_LOGIT, LOOP_LOGIT = -2.0, 2.0  # of the decoder's own sound, and of the loop beside the other copies
SIMILARITY_LOGIT = 8.0  # of each of a copy's two correlations
ERROR_LOGIT = 8.0  # what a copy's share falls by with the logarithm of its past error in a band
PULL = 0.6  # how far the level of every source is led to the wanted one
LOUDEST_GAIN = 0.7  # 6 dB up and down, a neper is 8.7 dB
LEAST_ERROR = 0.03  # nepers: no copy is trusted more
TRUST = 4.0  # the power of the error that the weight of a copy falls with
PAST_SHARE = 0.8  # of a context, its end: where it is measured how well each lag would have done
LOUDEST_CORRECTION = 1.0  # of a band's power over the whole of what is decoded, as a gain in nepers


def past_error(past: Tensor, copies: Copies) -> Tensor:
    """Compute how well each lag would have done in the context: the mean distance of its last levels (batch, rows,
    steps) from those a lag before, in nepers, at least LEAST_ERROR: (batch, copies, rows)."""
    steps = past.shape[-1]
    end = torch.arange(steps - round(PAST_SHARE * steps), steps, device=past.device)
    step_samples = STEP_FRAMES * copies.hop
    before = end - ((copies.lags + step_samples // 2) // step_samples)[..., None]  # (batch, copies, steps)
    places = before.clamp(min=0)[:, :, None].expand(-1, -1, past.shape[1], -1)
    error = (past[:, None].expand(-1, before.shape[1], -1, -1).gather(3, places) - past[:, None, :, end]).abs()
    known = (before >= 0)[:, :, None]
    return ((error * known).sum(-1) / known.sum(-1).clamp(min=1)).clamp(min=LEAST_ERROR)


def agreement(error: Tensor) -> Tensor:
    """Weigh copies by their `past_error`, by band: (batch, copies, rows), adding up to 1 over the copies."""
    return (-TRUST * error.log()).softmax(1)


def expectation(levels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the levels of the copies (batch, copies, rows, steps) agree on, their weighted mean, and how far
    they are from it, the weighted mean distance: (batch, rows, steps) each."""
    weights = weights[..., None]
    mean = (weights * levels).sum(1)
    return mean, (weights * (levels - mean[:, None]).abs()).sum(1)


class Mixer(nn.Module):
    """Play each source by its share, in every band and step led part of the way to the level that is wanted.

    Copies at whose lag a band of the context has repeated itself better have larger shares. Sources are added up in
    the STFT; then every band is given the power that the copies have, since copies that differ cancel in part. The
    mixer has no weights: the core says which levels are wanted.
    """

    def __init__(self, bins: int):
        super().__init__()
        self.bands = BandLevels(bins)

    def forward(self, sources: Tensor, past: Tensor, copies: Copies, levels: Tensor | None = None) -> Tensor:
        """Mix own sound and copies (batch, 1 + copies, channels, bins, frames) into (batch, channels, bins, frames).

        past: spectrum of the context. levels (batch, channels * bands, steps) are wanted in the last steps; by
        default, and before, those that the copies agree on.
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
        """Compute the shares of the sources by band, which add up to 1: (batch, 1 + copies, channels * bands)."""
        logits = SIMILARITY_LOGIT * copies.similarity.sum(-1, keepdim=True) - ERROR_LOGIT * error.log()
        logits = torch.cat([logits[:, :1] + LOOP_LOGIT, logits[:, 1:]], dim=1)
        return F.pad(logits, (0, 0, 1, 0), value=OWN_LOGIT).softmax(1)

    def power_correction(self, sources: Tensor, mixed: Tensor, weights: Tensor) -> Tensor:
        """Compute what gives every band, over all frames, the power that the copies have by their weights: (batch,
        channels, bins, 1)."""
        with torch.no_grad():
            power = self.bands.power(sources[:, 1:]).mean(-1)  # (batch, copies, channels, bands)
            wanted = (weights.view_as(power) * power).sum(1)
        found = self.bands.power(mixed).mean(-1)
        gain = ((wanted + QUIETEST_POWER) / (found + QUIETEST_POWER)).log() / 2
        gain = gain.clamp(-LOUDEST_CORRECTION, LOUDEST_CORRECTION).exp()
        return self.bands.interpolate @ gain[..., None]
