"""The head of the core: velocity of the flow over latents, from the transformer's tokens."""

import torch
from torch import Tensor, nn

from continuation.layers import ChannelNorm, blocks
from continuation.transformer import unpatchify

VELOCITY_BLOCKS = 2
TIME_FEATURES = 128


class FlowHead(nn.Module):
    """Velocity of the flow at the latent rate: ConvNeXt blocks on the noisy latents, conditioned on the flow time and
    the core's tokens (a small denoiser after a transformer that runs once, as in Li et al. 2024)."""

    def __init__(self, core_width: int, channels: int, latents_per_token: int):
        super().__init__()
        width, self.latents_per_token = core_width // 2, latents_per_token
        self.from_tokens = nn.Linear(core_width, latents_per_token * width)
        self.from_latents = nn.Conv1d(channels, width, 1)
        self.from_time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = blocks(width, VELOCITY_BLOCKS)
        self.norm = ChannelNorm(width)
        self.to_velocity = nn.Conv1d(width, channels, 1)
        nn.init.zeros_(self.to_velocity.weight)
        nn.init.zeros_(self.to_velocity.bias)

    def forward(self, noisy: Tensor, tokens: Tensor, time: Tensor) -> Tensor:
        """Compute the velocity of the noisy latents (batch, latent_channels, latents) at flow `time` (batch,), from 0
        (noise) to 1 (data): of the same shape."""
        token_features = unpatchify(self.from_tokens(tokens), self.latents_per_token)
        x = self.from_latents(noisy) + token_features + self.from_time(self.embed_time(time))[:, :, None]
        return self.to_velocity(self.norm(self.blocks(x)))

    @staticmethod
    def embed_time(time: Tensor) -> Tensor:
        """Compute sines and cosines of the flow time: (batch,) -> (batch, TIME_FEATURES)."""
        half = TIME_FEATURES // 2
        angles = time[:, None] * 1000.0 ** (torch.arange(half, device=time.device) / (half - 1))
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
