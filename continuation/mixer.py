"""How the decoder uses the sound of the context: it plays copies of it beside its own sound.

Shapes: spectra are complex (batch, sources, channels, bins, frames), of mid and side, 100 frames a second; levels are
(batch, sources, rows, steps), rows are channels * bands, a step every STEP_FRAMES. The sources are the decoder's own
sound, then the copies, the first of which is the loop.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from continuation.layers import without_autocast
from continuation.repetition import Copies
from continuation.spectral import QUIETEST_POWER, STEP_FRAMES, BandLevels

LOOP_LOGIT = 2.0  # of the loop beside the other copies
SIMILARITY_LOGIT = 8.0  # of each of a copy's two correlations
ERROR_LOGIT = 8.0  # what a source's logit falls by with the logarithm of its error in a band
OWN_ERROR = 0.8  # nepers: mean distance of the own sound's levels from the truth's, tiny on songs it has not seen
LEAST_ERROR = 0.03  # nepers: no copy is trusted more
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


def copy_logits(past: Tensor, copies: Copies) -> Tensor:
    """Compute the logits of the copies by band, from the levels of the context (batch, rows, steps): (batch, copies,
    rows). Larger where the context has repeated itself better at the copy's lag."""
    logits = SIMILARITY_LOGIT * copies.similarity.sum(-1, keepdim=True) - ERROR_LOGIT * past_error(past, copies).log()
    return torch.cat([logits[:, :1] + LOOP_LOGIT, logits[:, 1:]], dim=1)


def copy_weights(past: Tensor, copies: Copies) -> Tensor:
    """Compute the weights of the copies by band, adding up to 1 over the copies: (batch, copies, rows)."""
    return copy_logits(past, copies).softmax(1)


def expectation(levels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the levels of the copies (batch, copies, rows, steps) agree on, their weighted mean, and how far
    they are from it, the weighted mean distance: (batch, rows, steps) each."""
    weights = weights[..., None]
    mean = (weights * levels).sum(1)
    return mean, (weights * (levels - mean[:, None]).abs()).sum(1)


class Mixer(nn.Module):
    """Play each source by its share in every band, added up in the STFT. Then every band is given the power that the
    sources have, since copies that differ cancel in part. Own sound has a share where the context hardly repeats
    itself. The mixer has no weights."""

    def __init__(self, bins: int):
        super().__init__()
        self.bands = BandLevels(bins)

    def forward(self, sources: Tensor, past: Tensor, copies: Copies) -> Tensor:
        """Mix own sound and copies (batch, 1 + copies, channels, bins, frames) into (batch, channels, bins, frames);
        past: spectrum of the context."""
        with without_autocast(sources):
            own_logit = -ERROR_LOGIT * math.log(OWN_ERROR)
            logits = F.pad(copy_logits(self.bands(past), copies), (0, 0, 1, 0), value=own_logit)
            shares = logits.softmax(1).unflatten(2, (sources.shape[2], -1))  # (batch, sources, channels, bands)
            mixed = (sources * self.bands.to_bins(shares)).sum(1)
            return mixed * self.power_correction(sources, mixed, shares)

    def power_correction(self, sources: Tensor, mixed: Tensor, shares: Tensor) -> Tensor:
        """Compute the gains that give every band, over all frames, the power that the sources have by their shares:
        (batch, channels, bins, 1)."""
        with torch.no_grad():
            wanted = (shares * self.bands.power(sources).mean(-1)).sum(1)  # (batch, channels, bands)
        found = self.bands.power(mixed).mean(-1)
        gain = ((wanted + QUIETEST_POWER) / (found + QUIETEST_POWER)).log() / 2
        return self.bands.to_bins(gain.clamp(-LOUDEST_CORRECTION, LOUDEST_CORRECTION).exp())
