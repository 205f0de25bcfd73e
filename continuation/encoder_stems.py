"""The encoder's first layers: audio to frames, 100 a second."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from continuation.layers import WINDOW_HOPS, typical_magnitude
from continuation.spectral import stft

LONG_WINDOW_HOPS = 16  # of the longer windows, which resolve neighbouring partials


class Stem(nn.Module):
    """Audio -> frames: one trainable filter bank for all channels, initialised as a windowed DFT. The features of a
    bin, relative to its typical magnitude, are the square root of the magnitude with its phase, and the magnitude's
    logarithm."""

    def __init__(self, channels: int, hop: int, width: int):
        super().__init__()
        size = WINDOW_HOPS * hop
        bins = size // 2 + 1
        self.hop = hop
        self.filters = nn.Conv1d(1, 2 * bins, size, stride=hop, bias=False)
        self.filters.weight.data = self.windowed_dft(size)[:, None]
        self.register_buffer("scale", 4 / size / typical_magnitude(bins).repeat(2, 1), persistent=False)
        self.mix = nn.Conv1d(channels * 3 * bins, width, 1)

    @staticmethod
    def windowed_dft(size: int) -> Tensor:
        """Return real parts, then imaginary parts, of a Hann-windowed DFT: (size + 2, size)."""
        phase = 2 * math.pi * torch.outer(torch.arange(size // 2 + 1.0), torch.arange(size) - size / 2) / size
        window = torch.hann_window(size)
        return torch.cat([phase.cos() * window, -phase.sin() * window])

    def forward(self, x: Tensor) -> Tensor:
        """Compute frames (batch, width, frames) of audio x (batch, channels, samples)."""
        batch, channels, _ = x.shape
        excess = (WINDOW_HOPS - 1) * self.hop
        x = F.pad(x, (excess // 2, excess - excess // 2))
        x = self.filters(x.reshape(batch * channels, 1, -1))
        real, imaginary = (x.float() * self.scale).chunk(2, dim=1)
        power = real.square() + imaginary.square() + 1e-4
        compression = power ** (-1 / 4)
        level = power.detach().log() / 4  # detached: its gradient, steep for quiet bins, made training diverge
        x = torch.cat([real * compression, imaginary * compression, level], dim=1).to(self.mix.weight.dtype)
        return self.mix(x.reshape(batch, -1, x.shape[-1]))


class LongStem(nn.Module):
    """Audio -> frames: log magnitudes in windows of LONG_WINDOW_HOPS, relative to each bin's typical magnitude; each
    is repeated for WINDOW_HOPS frames."""

    def __init__(self, channels: int, hop: int, width: int):
        super().__init__()
        self.size, self.hop = LONG_WINDOW_HOPS * hop, WINDOW_HOPS * hop
        bins = self.size // 2 + 1
        scale = 4 / self.size / typical_magnitude(bins, LONG_WINDOW_HOPS)
        self.register_buffer("scale", scale[:, 0], persistent=False)
        self.mix = nn.Conv1d(channels * bins, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute frames (batch, width, frames) of audio x (batch, channels, samples)."""
        excess = self.size - self.hop
        spectrum = stft(F.pad(x, (excess // 2, excess - excess // 2)), self.size, self.hop)
        power = (spectrum.abs() * self.scale).square()  # (batch, channels, frames, bins)
        level = (power + 1e-4).log() / 4
        x = self.mix(level.transpose(2, 3).flatten(1, 2).to(self.mix.weight.dtype))
        return x.repeat_interleave(WINDOW_HOPS, dim=-1)
