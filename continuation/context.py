"""What goes into the core and what comes out of it."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What the core is told; legacy has no copies."""

    latents: Tensor  # (batch, latent_channels, latents) of what was heard
    copies: Tensor | None  # (batch, 1 + copies, rows, steps): in the target's place, the levels that the copies agree
    # on, then those of each


class Prediction(NamedTuple):
    """What the core predicts; legacy has no levels."""

    latents: Tensor  # (batch, latent_channels, latents)
    levels: Tensor | None  # (batch, rows, steps)
