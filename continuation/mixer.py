"""How the decoder uses the sound that was heard: it plays copies of it, band by band, beside its own sound.

Shapes: spectra are complex (batch, [sources,] channels, bins, frames), of mid and side, 100 frames a second; levels
are (batch, sources, channels * bands, steps), a step every STEP_FRAMES. The sources are the decoder's own sound, then
the copies, the first of which is the loop.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from continuation.layers import ChannelNorm, blocks, typical_magnitude, without_autocast
from continuation.repetition import Copies

BANDS = 24
STEP_FRAMES = 4
QUIETEST_POWER = 1e-3  # of a band, relative to what is typical; softer ones are alike
LOUDEST_GAIN = 0.7  # 6 dB up and down, a neper is 8.7 dB
PULL = 0.3  # at first: how far the level of every source is led to what the copies expect together
LEAST_ERROR = 0.02  # variance of a copy's error relative to the sound's: no copy is trusted more than that
RHYTHM_WEIGHT = 2.0  # how much the similarity of the onsets counts beside that variance, in nepers
NO_COPIES = -20.0  # the logit of own sound in that
LOUDEST_CORRECTION = 1.0  # of a band's power over the whole of what is decoded, as a gain in nepers
PAST_SHARE = 0.5  # of a context, its end: where it is measured how well each lag would have done
WIDTH = 64
BLOCKS = 4
LOGIT_SCALE = 3.0
PRIOR = (
    -2.0,
    2.0,
    8.0,
    8.0,
)  # logits for own sound, the first copy, similar sound, similar onsets: at first it loops


def band_edges(bins: int) -> list[int]:
    """First bins of at most BANDS bands and the end of the last: single bins of 25 Hz, then equal on a logarithmic
    scale."""
    single = BANDS // 3
    ratio = (bins / single) ** (1 / (BANDS - single))
    return sorted({*range(single), *(round(single * ratio**i) for i in range(BANDS - single + 1))})


def pooling(bins: int) -> Tensor:
    """Mean over the bins of each band: (bands, bins)."""
    places = torch.arange(bins)
    rows = torch.stack([(places >= low) & (places < high) for low, high in pairwise(band_edges(bins))]).float()
    return rows / rows.sum(1, keepdim=True)


def interpolation(bins: int) -> Tensor:
    """Linear interpolation between the middles of the bands, flat beyond the outermost: (bins, bands)."""
    edges = torch.tensor(band_edges(bins), dtype=torch.float)
    middles = (edges[:-1] + edges[1:] - 1) / 2
    way = ((torch.arange(bins)[:, None] - middles[:-1]) / middles.diff()).clamp(0, 1)  # from each middle to the next
    return F.pad(way, (1, 0), value=1.0) * F.pad(1 - way, (0, 1), value=1.0)


class Mixer(nn.Module):
    """Choose, by band and step, how much of which source is played.

    One small network looks at every source alike: at its levels, how they differ from those of the decoder's own
    sound and of the context, and how well the copy's lag would have done in the context; it also sees the mean over
    all sources. Levels are led part of the way to what the copies say together. The sources are added up in the STFT;
    then every band is given the power that the copies have, since copies that differ would cancel in part.
    """

    def __init__(self, channels: int, bins: int, decoder_width: int):
        super().__init__()
        rows = channels * (len(band_edges(bins)) - 1)
        full_scale = (bins - 1) / 2  # magnitude of a sine, Hann window
        self.register_buffer("typical_power", (full_scale * typical_magnitude(bins)).square(), persistent=False)
        self.register_buffer("pool", pooling(bins), persistent=False)
        self.register_buffer("interpolate", interpolation(bins), persistent=False)
        self.from_source = nn.Conv1d(4 * rows + 6, WIDTH, 1)
        self.from_decoder = nn.Conv1d(decoder_width, WIDTH, 1)
        self.blocks = blocks(WIDTH, BLOCKS)
        self.norms = nn.ModuleList(ChannelNorm(WIDTH) for _ in range(BLOCKS))
        self.from_mean = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(BLOCKS))
        self.norm = ChannelNorm(WIDTH)
        self.to_logits = nn.Conv1d(WIDTH, rows, 1)
        nn.init.zeros_(self.to_logits.weight)
        nn.init.zeros_(self.to_logits.bias)
        self.prior = nn.Parameter(torch.tensor(PRIOR))
        self.pull = nn.Parameter(torch.full((rows, 1), PULL))

    def forward(self, sources: Tensor, context: Tensor, hidden: Tensor, copies: Copies, start: int) -> Tensor:
        """Mix own sound and copies (batch, 1 + copies, channels, bins, frames) into (batch, channels, bins, frames).

        context: spectrum of the context. hidden: the decoder's frames (batch, decoder_width, frames). start: samples
        from the cut to the first frame.
        """
        with without_autocast(sources):
            levels = self.levels(sources)
            features = self.features(levels, self.levels(context), copies, start)
        shares = self.shares(features, hidden, F.pad(copies.present, (1, 0), value=True))
        with without_autocast(sources):
            gains = self.pull * (self.expected(levels, copies) - levels)
            gains = shares * (LOUDEST_GAIN * (gains / LOUDEST_GAIN).tanh()).exp()
            mixed = (sources * self.to_bins(gains, sources.shape[-1])).sum(1)
            return mixed * self.power_correction(sources, mixed, copies)

    def band_power(self, spectrum: Tensor) -> Tensor:
        """Power relative to what is typical, (..., bins, frames) -> (..., bands, steps)."""
        power = (spectrum.real.square() + spectrum.imag.square()) / self.typical_power
        pooled = F.avg_pool1d(power.flatten(0, -3), STEP_FRAMES, ceil_mode=True).unflatten(0, power.shape[:-2])
        return self.pool @ pooled

    def levels(self, spectrum: Tensor) -> Tensor:
        """Logarithms of magnitudes in nepers, (..., channels, bins, frames) -> (..., channels * bands, steps)."""
        return (self.band_power(spectrum) + QUIETEST_POWER).log().flatten(-3, -2) / 2

    def features(self, levels: Tensor, past: Tensor, copies: Copies, start: int) -> Tensor:
        """What is known of every source: (batch, 1 + copies, features, steps)."""
        batch, sources, _, steps = levels.shape
        error = F.pad(self.past_error(past, copies), (0, 0, 1, 0))  # own sound has none
        by_source = torch.zeros(batch, sources, 5, device=levels.device)  # similarities, lag, is own, is first
        by_source[:, 1:, :2] = copies.similarity
        by_source[:, 1:, 2] = (copies.lags / copies.context.shape[-1]).log2() / 4
        by_source[:, 0, 3] = 1
        by_source[:, 1:, 4] = copies.present & (copies.present.cumsum(1) == 1)
        hops = torch.arange(steps, device=levels.device) * STEP_FRAMES + start / copies.hop
        time = (hops * copies.hop / copies.context.shape[-1]).clamp(max=1).expand(batch, sources, 1, -1)
        constant = torch.cat([error, by_source], dim=2)[..., None].expand(-1, -1, -1, steps)
        own, mean = levels[:, :1], past.mean(-1, keepdim=True)[:, None]
        return torch.cat([levels, levels - own, levels - mean, constant, time], dim=2)

    def past_error(self, past: Tensor, copies: Copies) -> Tensor:
        """By how much levels of the context's end differ from those a lag before, mean over PAST_SHARE of it: (batch,
        copies, channels * bands)."""
        steps = past.shape[-1]
        end = torch.arange(steps - round(PAST_SHARE * steps), steps, device=past.device)
        step_samples = STEP_FRAMES * copies.hop
        before = end - ((copies.lags + step_samples // 2) // step_samples)[..., None]  # (batch, copies, steps)
        places = before.clamp(min=0)[:, :, None].expand(-1, -1, past.shape[1], -1)
        error = (past[:, None].expand(-1, before.shape[1], -1, -1).gather(3, places) - past[:, None, :, end]).abs()
        known = (before >= 0)[:, :, None]
        return (error * known).sum(-1) / known.sum(-1).clamp(min=1)

    def agreement(self, copies: Copies) -> Tensor:
        """How much each source counts in what is expected: (batch, 1 + copies), adding up to 1. Copies count by the
        inverse variance of their errors, as estimates should, and more where their onsets agree; own sound counts
        where there are no copies."""
        sound, rhythm = copies.similarity.unbind(-1)
        weights = RHYTHM_WEIGHT * rhythm - (1 + LEAST_ERROR - sound.square()).log()
        weights = weights.masked_fill(~copies.present, -torch.inf)
        return F.pad(weights, (1, 0), value=NO_COPIES).softmax(1)

    def expected(self, levels: Tensor, copies: Copies) -> Tensor:
        """What the copies say together that the levels will be: (batch, 1, channels * bands, steps)."""
        return (self.agreement(copies)[..., None, None] * levels).sum(1, keepdim=True)

    def shares(self, features: Tensor, hidden: Tensor, present: Tensor) -> Tensor:
        """Shares of the sources that are present, which add up to 1: (batch, 1 + copies, channels * bands, steps)."""
        size = features.shape[:2]
        said = self.from_decoder(F.avg_pool1d(hidden, STEP_FRAMES, ceil_mode=True))
        x = self.from_source(features.flatten(0, 1)) + said.repeat_interleave(size[1], dim=0)
        for block, norm, from_mean in zip(self.blocks, self.norms, self.from_mean, strict=True):
            x = block(x)
            mean = from_mean(norm(x).unflatten(0, size).mean(1))
            x = x + mean.repeat_interleave(size[1], dim=0)
        logits = self.to_logits(self.norm(x)).float().unflatten(0, size)
        similarity, _, flags = features[:, :, -6:-1, 0].float().split([2, 1, 2], dim=-1)  # flags: own, first
        prior = torch.cat([flags, similarity], dim=-1) @ self.prior
        logits = LOGIT_SCALE * logits + prior[..., None, None]
        return logits.masked_fill(~present[..., None, None], -torch.inf).softmax(1)

    def to_bins(self, gains: Tensor, frames: int) -> Tensor:
        """(batch, sources, channels * bands, steps) -> (batch, sources, channels, bins, frames), linear between the
        middles of bands and steps."""
        smooth = F.interpolate(gains.flatten(0, 1), scale_factor=STEP_FRAMES, mode="linear")[..., :frames]
        bands = self.interpolate.shape[1]
        return self.interpolate @ smooth.unflatten(0, gains.shape[:2]).unflatten(2, (-1, bands))

    def power_correction(self, sources: Tensor, mixed: Tensor, copies: Copies) -> Tensor:
        """What gives every band, over all frames, the power that the copies have, or without any own sound: (batch,
        channels, bins, 1)."""
        with torch.no_grad():
            power = self.band_power(sources).mean(-1)
            wanted = (self.agreement(copies)[..., None, None] * power).sum(1)
        found = self.band_power(mixed).mean(-1)
        gain = ((wanted + QUIETEST_POWER) / (found + QUIETEST_POWER)).log() / 2
        gain = gain.clamp(-LOUDEST_CORRECTION, LOUDEST_CORRECTION).exp()
        return self.interpolate @ gain[..., None]
