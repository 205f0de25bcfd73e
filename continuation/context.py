"""What goes into the core and what comes out of it."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What the core is told.

    latents: (batch, latent_channels, latents) of what was heard.
    outlook: (batch, 2 * rows, steps), in the target's place: the levels that the copies agree on, then how far the
    copies are from them. Legacy has none.
    """

    latents: Tensor
    outlook: Tensor | None


class Prediction(NamedTuple):
    """What the core predicts.

    latents: (batch, latent_channels, latents). levels: (batch, rows, steps); legacy has none.
    """

    latents: Tensor
    levels: Tensor | None
