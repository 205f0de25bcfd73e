"""The condition of the core."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What the core predicts from.

    latents: (batch, latent_channels, latents) of the context.
    outlook: (batch, 2 * rows, steps), in the target's place: the levels that the copies agree on, then how far the
    copies are from them. Legacy has none.
    """

    latents: Tensor
    outlook: Tensor | None
