"""What encoder, decoder, core and mixer are built of; frames are (batch, width, frames), 100 a second."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

FRAME_RATE_HZ = 100
CONTEXT_LEVEL = 0.1  # -20 dBFS RMS: every context is brought to this level before it is encoded
QUIETEST_RMS = 1e-3  # softer contexts are not lifted further
WINDOW_HOPS = 4  # of the encoder's filters and of the decoder's inverse STFT


def typical_magnitude(bins: int, window_hops: int = WINDOW_HOPS) -> Tensor:
    """Return the typical magnitude of music at CONTEXT_LEVEL, where a full-scale sine is 1, in the first `bins` bins
    of a DFT over so many hops: (bins, 1). It falls by 40 dB from 100 Hz to 5 kHz; divided by it, all bins are of a
    size."""
    frequencies = torch.arange(bins) * (FRAME_RATE_HZ / window_hops)
    return (0.025 / (1 + (frequencies / 400) ** 1.7))[:, None]


class ChannelNorm(nn.Module):
    """Root mean square normalisation over the channels of each frame (Zhang and Sennrich 2019): no frame hears
    another, so a cut-out and the whole are normalised alike."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1))

    def forward(self, x: Tensor) -> Tensor:
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
        return x + self.layer_scale * self.layers(x)


def blocks(width: int, count: int) -> nn.Sequential:
    """Make ConvNeXt blocks, of which every second looks four times as far."""
    return nn.Sequential(*(ConvNeXtBlock(width, dilation=4 if i % 2 else 1) for i in range(count)))


def without_autocast(x: Tensor):
    """Return a context in which x is computed with in its own precision; the meta device has no autocast to turn
    off."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def crossfade(x: Tensor, into: Tensor) -> Tensor:
    """Crossfade the end of x (..., samples) into the shorter `into`."""
    fade = into.shape[-1]
    ramp = torch.linspace(0, 1, fade, device=x.device)
    return torch.cat([x[..., :-fade], x[..., -fade:] * (1 - ramp) + into * ramp], dim=-1)
