"""Repetition: the lags at which a context repeats itself, and the copies of it that the decoder mixes in.

A copy can continue the context exactly to the sample, so that tones stay in phase. Everything is computed from the
context alone.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from continuation.spectral import stft

COPIES = 12  # candidates for the continuation of a context
SHORTEST_LAG, LONGEST_LAG = 0.1, 0.8  # of a context's length; shorter loops sound like a buzz
LAG_DISTANCE = 0.01  # of a context's length, between the lags of two candidates
PATTERN = 0.2  # of a context's length: its end, which is searched for in what precedes it
SOFTEST_MATCH = 0.01  # of the pattern's power; softer matches have a lower similarity
LONGER_LAG = 0.07  # added to the score per octave of lag: longer loops repeat more material, less often
LOOP_BIAS = 2.0  # of the first copy
MULTIPLES = 4  # first lags of which the longest multiple is played too
LONGEST_MULTIPLE = 0.9  # of a context's length
SEAM_HOPS = 2  # length of the crossfade between repetitions
ONSET_WINDOW_HOPS = 4
ONSET_BANDS = 8


@dataclass(frozen=True)
class Copies:
    """Candidates for the continuation of a context: its end, tiled at several lags. The first one is the loop."""

    context: Tensor  # (batch, channels, samples)
    lags: Tensor  # (batch, copies), in samples
    base_lags: Tensor  # (batch, copies), in samples: lags of the repetitions that were found; `lags` are multiples
    similarity: Tensor  # (batch, copies, 2): correlation of the sound, and of the onsets, at the base lag
    bias: Tensor  # (batch, copies): added to their logits in the mixer
    hop: int
    levels: Tensor | None = None  # (batch, rows, steps) of the context, for the mixer; None: not computed

    def play(self, start: int, length: int) -> Tensor:
        """Compute the samples start .. start + length of every copy, counted from the context's end (a negative start
        lies before it): (batch, copies, channels, length)."""
        sound = [tile_tail(self.context, lag, start, length, SEAM_HOPS * self.hop) for lag in self.lags.unbind(1)]
        return torch.stack(sound, dim=1)

    def places(self, time: Tensor) -> Tensor:
        """Return the samples of the context that every copy plays at `time` (n,), counted from its end:
        (batch, copies, n)."""
        return self.context.shape[-1] + tile_position(time, self.lags[..., None])

    def with_multiples(self) -> "Copies":
        """Add copies at the longest multiple, within the context, of each of the first MULTIPLES lags. They play more
        of the context, and each of its beats in the same place of the bar."""
        lags, bias = self.lags[:, :MULTIPLES], self.bias[:, :MULTIPLES]
        factor = int(LONGEST_MULTIPLE * self.context.shape[-1]) // lags
        return replace(
            self,
            lags=torch.cat([self.lags, factor.clamp(min=1) * lags], dim=1),
            base_lags=torch.cat([self.base_lags, lags], dim=1),
            similarity=torch.cat([self.similarity, self.similarity[:, :MULTIPLES]], dim=1),
            bias=torch.cat([self.bias, bias.masked_fill(factor < 2, -torch.inf)], dim=1),
        )

    def varied(self, variety: float, seed: int) -> "Copies":
        """Add Gumbel noise of scale `variety` to the bias, drawn from `seed`: other copies get the largest shares."""
        uniform = torch.rand(self.bias.shape, generator=torch.Generator().manual_seed(seed)).clamp(min=1e-9)
        return replace(self, bias=self.bias - variety * (-uniform.log()).log().to(self.bias))

    def seams(self, length: int) -> list[int]:
        """Return the samples, below `length` and in order, at which a copy of a context (batch of one) restarts."""
        return sorted({place for lag in self.lags[0].tolist() for place in range(lag, length, lag)})


@torch.no_grad()
def find_copies(x: Tensor, hop: int, count: int = COPIES) -> Copies:
    """Find the `count` lags at which the context x (batch, channels, samples) repeats best, LAG_DISTANCE apart."""
    lags, sound, rhythm, score = lag_scores(x, hop)
    best = [score.argmax(-1)]
    for _ in range(count - 1):
        near = (lags - lags[best[-1]][:, None]).abs() < LAG_DISTANCE * x.shape[-1]
        score = score.masked_fill(near, -torch.inf)
        best.append(score.argmax(-1))
    best = torch.stack(best, dim=1)
    similarity = torch.stack([sound.gather(1, best), rhythm.gather(1, best)], dim=-1)
    bias = LOOP_BIAS * (torch.arange(count, device=x.device) == 0).float().expand(best.shape)
    return Copies(x, lags[best], lags[best], similarity.clamp(0, 1), bias, hop)


def tile_tail(x: Tensor, lag: Tensor, start: int, length: int, seam: int = 0) -> Tensor:
    """Tile the last `lag` (batch,) samples of x (batch, channels, samples), and return the samples start .. start +
    length after x's end: (batch, channels, length). Before x's end (a negative start) they are those of x one lag
    earlier. The last `seam` samples of every repetition crossfade into those that precede the tile in x."""
    time = start + torch.arange(length, device=x.device)
    lag = lag[:, None]
    position = tile_position(time, lag)
    source = x.shape[-1] + position  # (batch, length)
    own = gather_samples(x, source)
    if not seam:
        return own
    into_seam = position + seam
    weight = (into_seam.clamp(min=0) / seam) * (source >= lag)  # nothing precedes x's first sample
    return own.lerp(gather_samples(x, (source - lag).clamp(min=0)), weight[:, None].to(x.dtype))


def tile_position(time: Tensor, lag: Tensor) -> Tensor:
    """Return which sample, from the end (negative), a tile of the last `lag` samples plays at `time` after it; time
    and lag of shapes that broadcast."""
    return torch.where(time < 0, time, time % lag) - lag


def gather_samples(x: Tensor, places: Tensor) -> Tensor:
    """Gather x (batch, channels, samples) at `places` (batch, length)."""
    return x.gather(2, places[:, None].expand(-1, x.shape[1], -1))


def lag_scores(x: Tensor, hop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the possible lags in samples (lags,) of x (batch, channels, samples), and for each lag, (batch, lags),
    the correlation coefficients of the sound and of the onsets, and the score.

    The sound is compared over the last PATTERN at sample resolution, the onsets over all of x: played music hardly
    ever repeats its sound exactly, but it repeats its beat.
    """
    x = x.float()
    length = x.shape[-1]
    lags = torch.arange(round(SHORTEST_LAG * length), round(LONGEST_LAG * length) + 1, device=x.device)
    sound = pattern_similarity(x, round(PATTERN * length), lags)
    rhythm = self_similarity(onset_strength(x, hop))[:, (lags + hop // 2) // hop]
    return lags, sound, rhythm, sound + rhythm + LONGER_LAG * (lags / length).log2()


def pattern_similarity(x: Tensor, size: int, lags: Tensor) -> Tensor:
    """Compute the correlation coefficient of the last `size` samples of x (batch, channels, samples) with those
    `lags` (lags,) samples earlier: (batch, lags)."""
    length = x.shape[-1]
    spectra = torch.fft.rfft(x) * torch.fft.rfft(x[..., -size:], length).conj()
    products = torch.fft.irfft(spectra, length).sum(1)  # by the first sample of the match
    sums = F.pad(x.double().square().sum(1).cumsum(-1), (1, 0))
    power = (sums[:, size:] - sums[:, :-size]).float()  # likewise
    places, pattern = length - size - lags, power[:, -1:]
    energy = pattern * torch.maximum(power[:, places], SOFTEST_MATCH * pattern)
    return products[:, places] / energy.clamp(min=1e-12).sqrt()


def onset_strength(x: Tensor, hop: int) -> Tensor:
    """Compute the onset strength, the spectral flux of logarithmic magnitudes (Bello et al. 2005), in ONSET_BANDS
    bands of equal logarithmic width, less its mean: (batch, at most ONSET_BANDS, samples // hop)."""
    size = ONSET_WINDOW_HOPS * hop
    excess = size - hop
    magnitudes = stft(F.pad(x, (excess // 2, excess - excess // 2)), size, hop).abs()
    floor = (0.01 * magnitudes.mean((1, 2, 3), keepdim=True)).clamp(min=1e-8)  # softer sounds have no onsets
    levels = (magnitudes + floor).log().mean(1)
    edges = sorted({round(levels.shape[-1] ** (i / ONSET_BANDS)) for i in range(ONSET_BANDS + 1)})
    bands = torch.stack([levels[..., low:high].mean(-1) for low, high in pairwise(edges)], 1)
    rises = F.pad(bands.diff(dim=-1).relu(), (1, 0))
    return rises - rises.mean(-1, keepdim=True)


def self_similarity(z: Tensor) -> Tensor:
    """Compute the correlation coefficient of z (batch, rows, length) with itself, by lag: (batch, length)."""
    z = z.float()
    length = z.shape[-1]
    spectrum = torch.fft.rfft(z, 2 * length)
    products = torch.fft.irfft((spectrum * spectrum.conj()).real.sum(1), 2 * length)[:, :length]
    power = F.pad(z.square().sum(1).cumsum(-1), (1, 0))
    energy = power[:, 1:].flip(-1) * (power[:, -1:] - power[:, :-1])  # of both overlapping parts
    return products / energy.clamp(min=1e-6).sqrt()
