"""What goes into the core and what comes out of it."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What the core is told; legacy has no outlook."""

    latents: Tensor  # (batch, latent_channels, latents) of what was heard
    outlook: (
        Tensor | None
    )  # (batch, 2 * rows, steps): in the target's place, the levels that the copies agree on, then
    # how far the copies are from them


class Prediction(NamedTuple):
    """What the core predicts; legacy has no levels."""

    latents: Tensor  # (batch, latent_channels, latents)
    levels: Tensor | None  # (batch, rows, steps)
