"""Input and output of the core."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Context:
    """Input of the core.

    latents: (batch, latent_channels, latents) of the context.
    outlook: (batch, 2 * rows, steps), the levels expected from the copies at the target's time: their weighted mean,
    then their mean distance from it (mixer.expectation). Legacy has none.
    """

    latents: Tensor
    outlook: Tensor | None


class Prediction(NamedTuple):
    """Output of the core: the next chunk.

    latents: (batch, latent_channels, latents). levels: (batch, rows, steps); legacy has none.
    """

    latents: Tensor
    levels: Tensor | None
