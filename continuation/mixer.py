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
from continuation.spectral import QUIETEST_POWER, BandLevels

OWN_LOGIT, LOOP_LOGIT, SIMILARITY_LOGIT = -2.0, 2.0, 8.0  # of own sound, of the loop, of each correlation of a copy
PULL = 0.6  # how far the level of every source is led to the wanted one
LOUDEST_GAIN = 0.7  # 6 dB up and down, a neper is 8.7 dB
LEAST_ERROR = 0.02  # variance of a copy's error relative to the sound's: no copy is trusted more than that
RHYTHM_WEIGHT = 2.0  # how much the similarity of the onsets counts beside that variance, in nepers
LOUDEST_CORRECTION = 1.0  # of a band's power over the whole of what is decoded, as a gain in nepers


def agreement(copies: Copies) -> Tensor:
    """Weigh copies by the inverse variance of their errors, as estimates should be, and by how well their onsets
    agree: (batch, copies), adding up to 1."""
    sound, rhythm = copies.similarity.unbind(-1)
    return (RHYTHM_WEIGHT * rhythm - (1 + LEAST_ERROR - sound.square()).log()).softmax(1)


def expected(levels: Tensor, copies: Copies) -> Tensor:
    """Average the levels of the copies (batch, copies, rows, steps) by their `agreement`: (batch, rows, steps)."""
    return (agreement(copies)[..., None, None] * levels).sum(1)


class Mixer(nn.Module):
    """Play each source by its share, in every band and step led part of the way to the level that is wanted.

    Copies at whose lag the context has repeated itself better have larger shares. Sources are added up in the STFT;
    then every band is given the power that the copies have, since copies that differ cancel in part. The mixer has no
    weights: the core says which levels are wanted.
    """

    def __init__(self, bins: int):
        super().__init__()
        self.bands = BandLevels(bins)

    def forward(self, sources: Tensor, copies: Copies, levels: Tensor | None = None) -> Tensor:
        """Mix own sound and copies (batch, 1 + copies, channels, bins, frames) into (batch, channels, bins, frames).

        levels (batch, channels * bands, steps) are wanted in the last steps; by default, and before, those that the
        copies agree on.
        """
        with without_autocast(sources):
            found = self.bands(sources)
            wanted = expected(found[:, 1:], copies)
            if levels is not None:
                wanted = torch.cat([wanted[..., : -levels.shape[-1]], levels], dim=-1)
            difference = wanted[:, None] - found
            gains = LOUDEST_GAIN * (PULL * difference / LOUDEST_GAIN).tanh()
            gains = self.shares(copies)[..., None, None] * gains.exp()
            mixed = (sources * self.bands.to_bins(gains, sources.shape[-1])).sum(1)
            return mixed * self.power_correction(sources, mixed, copies)

    @staticmethod
    def shares(copies: Copies) -> Tensor:
        """Shares of the sources, which add up to 1: (batch, 1 + copies)."""
        logits = SIMILARITY_LOGIT * copies.similarity.sum(-1)
        logits = torch.cat([logits[:, :1] + LOOP_LOGIT, logits[:, 1:]], dim=1)
        return F.pad(logits, (1, 0), value=OWN_LOGIT).softmax(1)

    def power_correction(self, sources: Tensor, mixed: Tensor, copies: Copies) -> Tensor:
        """Compute what gives every band, over all frames, the power that the copies have: (batch, channels, bins,
        1)."""
        with torch.no_grad():
            power = self.bands.power(sources[:, 1:]).mean(-1)
            wanted = (agreement(copies)[..., None, None] * power).sum(1)
        found = self.bands.power(mixed).mean(-1)
        gain = ((wanted + QUIETEST_POWER) / (found + QUIETEST_POWER)).log() / 2
        gain = gain.clamp(-LOUDEST_CORRECTION, LOUDEST_CORRECTION).exp()
        return self.bands.interpolate @ gain[..., None]
