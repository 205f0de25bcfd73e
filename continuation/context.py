"""Input of the core."""

from dataclasses import dataclass

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
