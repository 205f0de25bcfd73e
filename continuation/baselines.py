"""Baselines: continuations without a network, and an oracle that bounds what copying the context can reach.

Audio is float32 (channels, samples); a continuation is as long as its input.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from continuation.layers import FRAME_RATE_HZ
from continuation.metrics import Sound
from continuation.repetition import find_copies
from continuation.spectral import ISTFTHead, interpolation, pooling

ORACLE_COPIES = 12
ORACLE_FRAMES = 8  # 80 ms


class Loop(NamedTuple):
    """The end of a context, repeated."""

    sound: np.ndarray
    longest: np.ndarray  # the same at the longest multiple of its lag that the context allows
    seams: list[int]  # samples at which it restarts
    correlation: float  # 0..1, of the context with itself at the loop's lag


def loop(context: np.ndarray, sample_rate: int) -> Loop:
    """Repeat the end of the context at the lag at which it repeats itself best, at sample resolution."""
    copies = find_copies(torch.from_numpy(context)[None], sample_rate // FRAME_RATE_HZ, count=1)
    length = context.shape[-1]
    sound, longest = copies.with_multiples().play(0, length)[0].numpy()
    return Loop(sound, longest, copies.seams(length), copies.similarity[0, 0, 0].item())


def tempo_locked_loop(context: np.ndarray, sample_rate: int) -> np.ndarray | None:
    """Repeat the last two bars of the context (one, where two do not fit), of four beats each at its estimated tempo;
    None without a tempo."""
    bar = 4 * 60 / Sound(context, sample_rate).tempo * sample_rate
    if not bar <= context.shape[-1]:
        return None
    bar = round(bar)
    length = 2 * bar if 2 * bar <= context.shape[-1] else bar
    return np.resize(context[:, -length:].T, context.T.shape).T


def copy_oracle(context: np.ndarray, target: np.ndarray, sample_rate: int) -> np.ndarray:
    """Choose, by band of mid and side and every 80 ms, the one of 12 copies whose magnitudes are nearest to those of
    the true continuation: an upper bound for choosing among these."""
    hop = sample_rate // FRAME_RATE_HZ
    stft = ISTFTHead(1, context.shape[0], hop)
    copies = find_copies(torch.from_numpy(context)[None], hop, ORACLE_COPIES)
    frames = -(-target.shape[-1] // hop)
    sources = stft.spectrum(copies.play(0, frames * hop)[0])  # (copies, channels, bins, frames)
    padded = F.pad(torch.from_numpy(target), (0, frames * hop - target.shape[-1]))
    truth = stft.spectrum(padded[None])
    error = pooling(stft.bins) @ (sources.abs() - truth.abs()).square()
    error = F.avg_pool1d(error.flatten(0, 1), ORACLE_FRAMES, ceil_mode=True).unflatten(0, error.shape[:2])
    chosen = torch.zeros_like(error).scatter(0, error.argmin(0, keepdim=True), 1.0)
    gains = interpolation(stft.bins) @ chosen.repeat_interleave(ORACLE_FRAMES, dim=-1)[..., :frames]
    return stft.audio((sources * gains).sum(0, keepdim=True))[0, :, : target.shape[-1]].numpy()
