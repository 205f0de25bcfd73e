"""Layers of encoder, decoder and core, and constants that all parts share; frames are (batch, width, frames), 100 a
second."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

FRAME_RATE_HZ = 100
CONTEXT_LEVEL = 0.1  # -20 dBFS RMS: contexts are scaled to this level before they are encoded
QUIETEST_RMS = 1e-3  # softer contexts are amplified as if they had this level
WINDOW_HOPS = 4  # of the encoder's filters and of the decoder's inverse STFT


def typical_magnitude(bins: int, window_hops: int = WINDOW_HOPS) -> Tensor:
    """Compute the typical magnitude of music at CONTEXT_LEVEL, relative to a full-scale sine, in the first `bins`
    bins of a DFT over `window_hops` hops: (bins, 1). It falls by 40 dB from 100 Hz to 5 kHz; divided by it, all bins
    are of similar size."""
    frequencies = torch.arange(bins) * (FRAME_RATE_HZ / window_hops)
    return (0.025 / (1 + (frequencies / 400) ** 1.7))[:, None]


class ChannelNorm(nn.Module):
    """Root mean square normalisation over the channels of each frame (Zhang and Sennrich 2019). Frames are
    independent, so that a crop is normalised like the whole."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (batch, width, frames)."""
        power = x.float().square().mean(dim=1, keepdim=True)
        return x * torch.rsqrt(power + 1e-6).to(x.dtype) * self.scale


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then a pointwise network, added to the input (Liu et al. 2022)."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(width, width, 7, padding=3 * dilation, dilation=dilation, groups=width),
            ChannelNorm(width),
            nn.Conv1d(width, 3 * width, 1),
            nn.GELU(),
            nn.Conv1d(3 * width, width, 1),
        )
        self.layer_scale = nn.Parameter(torch.full((width, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Transform x (batch, width, frames): the same shape."""
        return x + self.layer_scale * self.layers(x)


def blocks(width: int, count: int) -> nn.Sequential:
    """Make ConvNeXt blocks, every second with dilation 4."""
    return nn.Sequential(*(ConvNeXtBlock(width, dilation=4 if i % 2 else 1) for i in range(count)))


def without_autocast(x: Tensor):
    """Return a context manager that disables autocast on the device of x; the meta device has none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def crossfade(x: Tensor, into: Tensor) -> Tensor:
    """Crossfade the end of x (..., samples) into the shorter `into`."""
    fade = into.shape[-1]
    ramp = torch.linspace(0, 1, fade, device=x.device)
    return torch.cat([x[..., :-fade], x[..., -fade:] * (1 - ramp) + into * ramp], dim=-1)
