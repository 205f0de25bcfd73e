"""Transformer blocks over tokens (batch, tokens, width)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotary_angles(positions: int, size: int, device) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines of rotary position embedding (Su et al. 2021): (positions, size / 2) each."""
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, device=device).float() / size)
    angles = torch.outer(torch.arange(positions, device=device).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (batch, heads, positions, size) by rotary position embedding (Su et al. 2021); angles: their cosines
    and sines."""
    cosine, sine = (a.to(x.dtype) for a in angles)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], dim=-1)


class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation (Zhang and Sennrich 2019) in the precision of its input, since torch's own warns
    about fp32 weights under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., width)."""
        return F.rms_norm(x, self.normalized_shape, eps=self.eps) * self.weight.to(x.dtype)


class TransformerBlock(nn.Module):
    """Pre-norm block: attention with rotary positions and normalised queries and keys, then SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, heads: int, layers: int, dropout: float):
        super().__init__()
        hidden = 64 * round(8 * width / 3 / 64)
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_swiglu = (RMSNorm(width, eps=1e-6) for _ in range(2))
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.from_heads = nn.Linear(width, width, bias=False)
        self.to_hidden = nn.Linear(width, 2 * hidden, bias=False)
        self.from_hidden = nn.Linear(hidden, width, bias=False)
        for projection in (self.from_heads, self.from_hidden):
            projection.weight.data /= math.sqrt(2 * layers)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Transform tokens x; angles: `rotary_angles` of their positions."""
        x = x + self.drop(self.attend(self.norm_attention(x), angles))
        return x + self.drop(self.swiglu(self.norm_swiglu(x)))

    def attend(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Compute multi-head self-attention over the tokens x."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (rotate(F.rms_norm(part, part.shape[-1:], eps=1e-6), angles) for part in (q, k))
        return self.from_heads(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def swiglu(self, x: Tensor) -> Tensor:
        """Compute the gated feed-forward network of each token of x."""
        gate, value = self.to_hidden(x).chunk(2, dim=-1)
        return self.from_hidden(F.silu(gate) * value)

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout in training."""
        return F.dropout(x, self.dropout, self.training)


def patchify(x: Tensor, count: int) -> Tensor:
    """Stack neighbours into tokens: (batch, channels, tokens x count) -> (batch, tokens, count x channels)."""
    return x.transpose(1, 2).unflatten(1, (-1, count)).flatten(2)


def unpatchify(tokens: Tensor, count: int) -> Tensor:
    """Invert `patchify`: (batch, tokens, count x channels) -> (batch, channels, tokens x count)."""
    return tokens.unflatten(-1, (count, -1)).flatten(1, 2).transpose(1, 2)
