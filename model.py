"""The network: hears the first 10 seconds of a track, plays the next 10.

    python model.py            layer tables, parameters and FLOPs of every preset

Shapes, everywhere in this file:
    x        (batch, channels, samples)             audio in -1..1
    frames   (batch, width, frames)                 100 a second
    latents  (batch, latent_channels, latents)      one a frame (legacy: one in 40 samples)
    context  (batch, latent_channels, 3 * latents)  of what was heard; a guess at what follows; the repetition
    tokens   (batch, tokens, core_width)            25 a second (tiny: 10)

Three parts: the encoder (convolution and pooling), the core (a transformer over latents, then convolutions) and the
decoder, which mixes its own sound with copies of the sound that was heard (repetition.py, mixer.py).
Two outputs: the reconstruction decode(encode(x)) and the decoded prediction of what follows x.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from continuation import checkpoint
from continuation.layers import (
    CONTEXT_LEVEL,
    FRAME_RATE_HZ,
    QUIETEST_RMS,
    WINDOW_HOPS,
    ChannelNorm,
    blocks,
    crossfade,
    typical_magnitude,
)
from continuation.legacy import LEGACY_HOP, LegacyCore, LegacyDecoder, LegacyEncoder
from continuation.mixer import Mixer
from continuation.repetition import Copies, find_copies, long_term_prediction, loop
from continuation.spectral import ISTFTHead, stft

LONG_WINDOW_HOPS = 16  # of the encoder's second look, that tells neighbouring partials apart
JOIN_SHARE = 0.1  # of the context, its end, is decoded together with the prediction
FADE_SECONDS = 0.02
SEED_STRIDE = 0x9E3779B1  # between the noises of a long continuation; odd and far from small numbers
VELOCITY_BLOCKS = 4  # of the core's head, at the latent rate
VELOCITY_REACH = 30  # latents that they see to each side
SAMPLING_STEPS = 8
GUIDANCE = 1.0
GUIDANCE_RESCALE = 0.7

PRESET_NAMES = ("legacy", "tiny", "base", "large")
RANGES = {  # of the whole numbers of a config, both ends included
    "sample_rate": (FRAME_RATE_HZ, 384_000), "channels": (1, 32), "chunk_samples": (1, 2**31),
    "latent_channels": (1, 4096), "encoder_widths": (1, 16384), "encoder_blocks": (0, 256),
    "decoder_widths": (1, 16384), "decoder_blocks": (0, 256),
    "core_layers": (1, 256), "core_width": (1, 16384), "core_heads": (1, 1024), "latents_per_token": (1, 4096),
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape of a model; it is saved in the checkpoint. Lengths in samples."""

    preset: str = "base"
    sample_rate: int = 24000
    channels: int = 2
    chunk_samples: int = 240000
    objective: str = "flow"  # or mse: the same network, trained to say the mean
    latent_channels: int = 32
    encoder_widths: tuple[int, int] = (384, 512)  # before pooling, after it
    encoder_blocks: tuple[int, int] = (2, 4)
    decoder_widths: tuple[int, int] = (512, 384)
    decoder_blocks: tuple[int, int] = (4, 6)
    core_layers: int = 8
    core_width: int = 512
    core_heads: int = 8
    core_dropout: float = 0.1
    latents_per_token: int = 4

    def __post_init__(self):
        self.check_ranges()
        if self.sample_rate % FRAME_RATE_HZ:
            raise ValueError(f"the sample rate must be a multiple of {FRAME_RATE_HZ} Hz, not {self.sample_rate}")
        token_samples = self.latent_samples * (1 if self.is_legacy else self.latents_per_token)
        if self.chunk_samples % token_samples:
            raise ValueError(f"a chunk of {self.chunk_samples} samples is no multiple of {token_samples}")
        if self.core_width % (2 * self.core_heads):
            raise ValueError(f"core_width {self.core_width} must be a multiple of 2 x core_heads {self.core_heads}")
        if self.objective not in ("flow", "mse"):
            raise ValueError(f"the objective is flow or mse, not {self.objective!r:.40}")

    def check_ranges(self) -> None:
        """Raise ValueError for what no network can be, as in a file of others, before any memory is taken for it."""
        if self.preset not in PRESET_NAMES:
            raise ValueError(f"the preset is one of {', '.join(PRESET_NAMES)}, not {self.preset!r:.40}")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            is_pair = name.endswith(("_widths", "_blocks"))
            numbers = value if is_pair else (value,)
            is_right = type(numbers) is tuple and len(numbers) == 1 + is_pair
            if not is_right or not all(type(number) is int and least <= number <= most for number in numbers):
                what = "two whole numbers" if is_pair else "a whole number"
                raise ValueError(f"{name} must be {what} from {least} to {most}, not {value!r:.40}")
        if type(self.core_dropout) not in (int, float) or not 0 <= self.core_dropout <= 1:
            raise ValueError(f"core_dropout must be from 0 to 1, not {self.core_dropout!r:.40}")

    @property
    def is_legacy(self) -> bool:
        return self.preset == "legacy"

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return self.sample_rate // FRAME_RATE_HZ

    @property
    def latent_samples(self) -> int:
        """Samples a latent."""
        return LEGACY_HOP if self.is_legacy else self.hop

    @property
    def latent_rate(self) -> float:
        """Latents a second."""
        return self.sample_rate / self.latent_samples

    @property
    def chunk_latents(self) -> int:
        """Latents of what is heard, and of a prediction."""
        return self.chunk_samples // self.latent_samples

    @property
    def context_latents(self) -> int:
        """Latents of all that the core is told: what was heard and, but for legacy, two hints at what follows."""
        return self.chunk_latents * (1 if self.is_legacy else 3)


PRESETS = {
    "legacy": ModelConfig(
        preset="legacy", sample_rate=12000, chunk_samples=120000, objective="mse", core_layers=1, core_width=64,
        core_heads=4, core_dropout=0.0, latent_channels=64, latents_per_token=1,
    ),
    "tiny": ModelConfig(
        preset="tiny", sample_rate=12000, chunk_samples=120000, encoder_widths=(128, 128), encoder_blocks=(1, 2),
        decoder_widths=(128, 128), decoder_blocks=(2, 2), core_layers=3, core_width=192, core_heads=3,
        core_dropout=0.0, latents_per_token=10,
    ),
    "base": ModelConfig(),
    "large": ModelConfig(
        preset="large", sample_rate=48000, chunk_samples=480000, encoder_widths=(768, 1024), encoder_blocks=(3, 6),
        decoder_widths=(1024, 768), decoder_blocks=(6, 8), core_layers=20, core_width=1024, core_heads=16,
    ),
}  # fmt: skip


# Encoder and decoder


class Stem(nn.Module):
    """Audio to frames: one trainable filter bank for all channels, started as a windowed DFT. Of every bin, relative
    to what is typical of it, the square root of the magnitude with its phase, and the magnitude's logarithm."""

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
        """Real parts, then imaginary parts, of a Hann-windowed DFT: (size + 2, size)."""
        phase = 2 * math.pi * torch.outer(torch.arange(size // 2 + 1.0), torch.arange(size) - size / 2) / size
        window = torch.hann_window(size)
        return torch.cat([phase.cos() * window, -phase.sin() * window])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _ = x.shape
        excess = (WINDOW_HOPS - 1) * self.hop
        x = F.pad(x, (excess // 2, excess - excess // 2))
        x = self.filters(x.reshape(batch * channels, 1, -1))
        real, imaginary = (x.float() * self.scale).chunk(2, dim=1)
        power = real.square() + imaginary.square() + 1e-4
        compression = power ** (-1 / 4)
        level = power.detach().log() / 4  # with its gradient, which is steep where it is quiet, training diverged
        x = torch.cat([real * compression, imaginary * compression, level], dim=1).to(self.mix.weight.dtype)
        return self.mix(x.reshape(batch, -1, x.shape[-1]))  # (batch, width, frames)


class LongStem(nn.Module):
    """Audio to frames: logarithms of magnitudes in windows of LONG_WINDOW_HOPS, relative to what is typical of each
    bin; every WINDOW_HOPS frames are alike."""

    def __init__(self, channels: int, hop: int, width: int):
        super().__init__()
        self.size, self.hop = LONG_WINDOW_HOPS * hop, WINDOW_HOPS * hop
        bins = self.size // 2 + 1
        scale = 4 / self.size / typical_magnitude(bins, LONG_WINDOW_HOPS)
        self.register_buffer("scale", scale[:, 0], persistent=False)
        self.mix = nn.Conv1d(channels * bins, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        excess = self.size - self.hop
        spectrum = stft(F.pad(x, (excess // 2, excess - excess // 2)), self.size, self.hop)
        power = (spectrum.abs() * self.scale).square()  # (batch, channels, frames, bins)
        level = (power + 1e-4).log() / 4
        x = self.mix(level.transpose(2, 3).flatten(1, 2).to(self.mix.weight.dtype))
        return x.repeat_interleave(WINDOW_HOPS, dim=-1)  # (batch, width, frames)


class Encoder(nn.Module):
    """Audio -> mean and log-variance of the latents."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        first, second = config.encoder_widths
        self.alignment = WINDOW_HOPS * config.hop
        self.stem = Stem(config.channels, config.hop, first)
        self.long_stem = LongStem(config.channels, config.hop, first)
        self.blocks_before = blocks(first, config.encoder_blocks[0])
        self.before_pool = nn.Conv1d(first, second, 3, padding=1)
        self.pool = nn.MaxPool1d(3, stride=1, padding=1)
        self.beside_pool = nn.Conv1d(first, second, 1)  # carries the phase that the maximum loses
        self.blocks_after = blocks(second, config.encoder_blocks[1])
        self.norm = ChannelNorm(second)
        self.to_posterior = nn.Conv1d(second, 2 * config.latent_channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.pad(x, (0, -x.shape[-1] % self.alignment))
        x = self.blocks_before(self.stem(x) + self.long_stem(x))
        x = self.pool(self.before_pool(x)) + self.beside_pool(x)
        x = self.norm(self.blocks_after(x))
        mean, log_variance = self.to_posterior(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 4)  # (batch, latent_channels, latents) each


class Decoder(nn.Module):
    """Latents, and copies of the sound that was heard -> audio. Without copies it plays its own sound alone. No
    transposed convolution: it is what hums in the legacy network."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        first, second = config.decoder_widths
        self.trunk = nn.Sequential(
            nn.Conv1d(config.latent_channels, first, 3, padding=1),
            *blocks(first, config.decoder_blocks[0]),
            nn.Conv1d(first, second, 3, padding=1),
            *blocks(second, config.decoder_blocks[1]),
            ChannelNorm(second),
        )
        self.head = ISTFTHead(second, config.channels, config.hop)
        self.mixer = Mixer(config.channels, self.head.bins, second)

    def forward(self, z: Tensor, copies: Copies | None = None, start: int = 0) -> tuple[Tensor, Tensor]:
        """Latents (batch, latent_channels, latents), the first of which stands for the samples from `start` on behind
        the cut -> audio (batch, channels, samples), and the levels that ISTFTHead gives."""
        hidden = self.trunk(z)
        spectrum, levels = self.head(hidden)
        if copies is not None:
            spectrum = self.mixer(*self.sources(spectrum, copies, start), hidden, copies, start)
        return self.head.audio(spectrum), levels

    def own(self) -> list[nn.Module]:
        """What makes the decoder's own sound: all but the mixer."""
        return [self.trunk, self.head]

    def sources(self, own: Tensor, copies: Copies, start: int) -> tuple[Tensor, Tensor]:
        """Spectra that are mixed, own sound and copies, and that of the context."""
        sound = copies.play(start, own.shape[-1] * self.head.hop)
        played = self.head.spectrum(sound.flatten(0, 1)).unflatten(0, sound.shape[:2])
        return torch.cat([own[:, None], played], dim=1), self.head.spectrum(copies.context)


# The core


def rotary_angles(positions: int, size: int, device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embedding (Su et al. 2021): (positions, size / 2) each."""
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, device=device).float() / size)
    angles = torch.outer(torch.arange(positions, device=device).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = (a.to(x.dtype) for a in angles)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], dim=-1)


class CoreBlock(nn.Module):
    """Attention with rotary positions and normalised queries and keys, then SwiGLU (Shazeer 2020); both steered
    by the flow time through one modulation shared by all blocks plus an offset of the block's own."""

    def __init__(self, width: int, heads: int, layers: int, dropout: float):
        super().__init__()
        hidden = 64 * round(8 * width / 3 / 64)
        self.heads, self.dropout = heads, dropout
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.from_heads = nn.Linear(width, width, bias=False)
        self.to_hidden = nn.Linear(width, 2 * hidden, bias=False)
        self.from_hidden = nn.Linear(hidden, width, bias=False)
        self.offset = nn.Parameter(torch.tensor([0.0, 0.0, 1.0] * 2)[:, None].repeat(1, width))
        for projection in (self.from_heads, self.from_hidden):
            projection.weight.data /= math.sqrt(2 * layers)

    def forward(self, x: Tensor, modulation: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        shift_a, scale_a, gate_a, shift_b, scale_b, gate_b = (modulation + self.offset)[:, :, None].unbind(1)
        x = x + gate_a * self.drop(self.attend(self.norm(x) * (1 + scale_a) + shift_a, angles))
        return x + gate_b * self.drop(self.swiglu(self.norm(x) * (1 + scale_b) + shift_b))

    def attend(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.norm(q), angles), rotate(self.norm(k), angles)  # (batch, heads, tokens, size)
        return self.from_heads(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def swiglu(self, x: Tensor) -> Tensor:
        gate, value = self.to_hidden(x).chunk(2, dim=-1)
        return self.from_hidden(F.silu(gate) * value)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    @staticmethod
    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def stack(z: Tensor, count: int) -> Tensor:
    """Neighbours into tokens: (batch, channels, tokens x count) -> (batch, tokens, count x channels)."""
    return z.transpose(1, 2).unflatten(1, (-1, count)).flatten(2)


def unstack(tokens: Tensor, count: int) -> Tensor:
    """(batch, tokens, count x channels) -> (batch, channels, tokens x count)."""
    return tokens.unflatten(-1, (count, -1)).flatten(1, 2).transpose(1, 2)


class VelocityHead(nn.Module):
    """The last part of the core: ConvNeXt blocks at the latent rate, since tokens are too coarse to take the noise
    off single latents. They see what the target's tokens say, the noisy latents, the hints and, in front of the cut,
    the end of the context."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, channels = config.core_width // 2, config.latent_channels
        self.latents_per_token = config.latents_per_token
        self.from_tokens = nn.Linear(config.core_width, config.latents_per_token * width)
        self.from_latents = nn.Conv1d(3 * channels + 1, width, 1)
        self.blocks = blocks(width, VELOCITY_BLOCKS)
        self.norm = ChannelNorm(width)
        self.to_velocity = nn.Conv1d(width, channels, 1)

    def forward(self, tokens: Tensor, noisy: Tensor, hints: Tensor, before: Tensor) -> Tensor:
        """Of the target's normalised tokens (batch, tokens, core_width), its noisy latents at unit variance (batch,
        latent_channels, latents), both hints in their places (batch, 2 * latent_channels, latents), and as many of
        the context's latents as are seen."""
        edge = before.shape[-1]  # the last channel says whose place it is, the context's or the target's
        before = torch.cat([F.pad(before, (0, 0, 0, hints.shape[1])), torch.ones_like(before[:, :1])], dim=1)
        here = torch.cat([noisy, hints, torch.zeros_like(noisy[:, :1])], dim=1)
        said = unstack(self.from_tokens(tokens), self.latents_per_token)
        x = self.from_latents(torch.cat([before, here], dim=-1)) + F.pad(said, (edge, 0))
        return self.to_velocity(self.norm(self.blocks(x)[..., edge:]))


class AttentionCore(nn.Module):
    """Velocity of the flow: transformer over [context latents | target latents], neighbours stacked into tokens, then
    a convolutional head at the latent rate. Both are also given two hints in the target's places, the context's guess
    and its repetition, so that the beat need not be counted."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, stacked = config.core_width, config.latent_channels * config.latents_per_token
        self.config = config
        self.from_context = nn.Linear(stacked, width)
        self.from_target = nn.Linear(stacked, width)
        self.from_hints = nn.Linear(2 * stacked, width, bias=False)
        self.no_context = nn.Parameter(torch.randn(width) * 0.02)
        self.from_time = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, 6 * width))
        layers = config.core_layers
        self.blocks = nn.ModuleList(
            CoreBlock(width, config.core_heads, layers, config.core_dropout) for _ in range(layers)
        )
        self.head = VelocityHead(config)
        for layer in (self.from_time[-1], self.head.to_velocity):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, noisy: Tensor, context: Tensor, time: Tensor, heard: Tensor | None = None) -> Tensor:
        """Velocity at `time` (batch,), 0 noise .. 1 music, as (batch, latent_channels, latents).

        Blocks and head see inputs of unit variance and say only what a linear guess of the velocity lacks, with unit
        variance too (preconditioning after Karras et al. 2022): the one for music of unit variance around the
        context's guess. They need not carry noise and guess to the output.
        `heard` (batch,), 0..1, default 1: the share of the context's own latents, counted back from the cut, that is
        not replaced by the null vector; 0 is 'no context' and no hints either.
        """
        heard = torch.ones_like(time) if heard is None else heard
        count = self.config.latents_per_token
        own, *hints = context.chunk(3, dim=-1)
        guess, repetition = (hint * (heard > 0)[:, None, None] for hint in hints)
        hints = torch.cat([guess, repetition], dim=1)
        own = stack(own, count)
        age = torch.arange(own.shape[1], 0, -1, device=own.device) / own.shape[1]
        is_heard = (age <= heard[:, None])[:, :, None]
        tokens = self.from_context(own)
        tokens = torch.where(is_heard, tokens, self.no_context.to(tokens.dtype))
        own = unstack(own * is_heard, count)
        t = time[:, None, None]
        spread = (t.square() + (1 - t).square()).sqrt()  # of noisy latents, where music and noise have unit variance
        target = self.from_target(stack(noisy / spread, count)) + self.from_hints(stack(hints, count))
        tokens = torch.cat([tokens, target], dim=1)
        modulation = self.from_time(self.embed_time(time)).unflatten(-1, (6, -1))
        angles = rotary_angles(tokens.shape[1], self.config.core_width // self.config.core_heads, tokens.device)
        for block in self.blocks:
            tokens = block(tokens, modulation, angles)
        said = CoreBlock.norm(tokens[:, -tokens.shape[1] // 2 :])
        rest = self.head(said, noisy / spread, hints, own[..., -VELOCITY_REACH:])
        linear = ((2 * t - 1) * noisy + (1 - t) * guess) / spread.square()
        return linear + rest / spread

    @staticmethod
    def embed_time(time: Tensor) -> Tensor:
        """Sines and cosines of the flow time: (batch,) -> (batch, 128)."""
        frequencies = 1000.0 ** (torch.arange(64, device=time.device) / 63)
        angles = time[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


# The whole


class ContinuationModel(nn.Module):
    """Encoder, core and decoder; the two outputs; and the whole way from samples to samples.

    model = load_model("checkpoints/best.pt")
    continuation = model.generate(audio, seconds=10, seed=0)
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        legacy = config.is_legacy
        self.encoder = LegacyEncoder(config.channels) if legacy else Encoder(config)
        self.core = LegacyCore() if legacy else AttentionCore(config)
        self.decoder = LegacyDecoder(config.channels) if legacy else Decoder(config)
        # Statistics of the latents by channel, running in stage 1 and measured at its end: the core works on
        # standardised latents.
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels, 1))
        self.register_buffer("latent_std", torch.ones(config.latent_channels, 1))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance (legacy: None) of the latents of x (batch, channels, samples)."""
        channels = self.config.channels
        assert x.ndim == 3 and x.shape[1] == channels, f"expected (batch, {channels}, samples), got {tuple(x.shape)}"
        return self.encoder(x)

    def encode(self, x: Tensor) -> Tensor:
        """Latents of x, the posterior mean: (batch, latent_channels, latents)."""
        return self.posterior(x)[0]

    def hear(self, x: Tensor) -> Tensor:
        """The context of the chunk x, as the core is told it. It is encoded without what follows it, as generation
        hears it, so that no future leaks into it. Legacy has no repetition: (batch, latent_channels, latents).

        The repetition is that of the sound, encoded; the guess is it where the sound has repeated itself exactly, and
        elsewhere the long-term prediction of the latents. On training pairs the fourth power of the correlation was
        the best weight of the powers from 1.5 to 4.
        """
        if self.config.is_legacy:
            return self.encode(x)
        repeated, correlation = loop(x, self.config.hop)
        latents = self.config.chunk_latents
        both = self.encode(torch.cat([x, repeated], dim=-1))[..., : 2 * latents]  # the encoder rounds up
        own, repetition = both.float().split(latents, dim=-1)
        guess = long_term_prediction(own).lerp(repetition, correlation[:, None, None] ** 4)
        return torch.cat([own, guess, repetition], dim=-1)

    def parts(self, context: Tensor) -> tuple[Tensor, ...]:
        """Of a context what was heard and, but for legacy, the guess at what follows and the repetition: (batch,
        latent_channels, latents) each."""
        return context.split(self.config.chunk_latents, dim=-1)

    def encode_pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Context of the first chunk of x (batch, channels, 2 * chunk), and latents of the second, encoded behind the
        first: (batch, latent_channels, latents)."""
        latents = self.config.chunk_latents  # the encoder rounds their number up
        return self.hear(x[..., : self.config.chunk_samples]), self.encode(x)[..., latents : 2 * latents]

    def copies(self, x: Tensor) -> Copies | None:
        """What the decoder may play behind the context x (batch, channels, samples); legacy has no copies."""
        return None if self.config.is_legacy else find_copies(x, self.config.hop)

    def decode(self, z: Tensor, length: int | None = None, copies: Copies | None = None, start: int = 0) -> Tensor:
        """Audio of latents: (batch, channels, length); by default all samples that the latents stand for. With
        `copies` of a context, z begins `start` samples behind its end."""
        return self.decode_with_levels(z, copies, start)[0][..., :length]

    def decode_with_levels(
        self, z: Tensor, copies: Copies | None = None, start: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Audio of latents (batch, channels, samples), and the levels that the head asked for above its tones, of mid
        and side: (batch, channels, bins, frames); legacy: None."""
        channels = self.config.latent_channels
        assert z.ndim == 3 and z.shape[1] == channels, f"expected (batch, {channels}, latents), got {tuple(z.shape)}"
        return self.decoder(z, copies, start)

    def reconstruct(self, x: Tensor) -> Tensor:
        """decode(encode(x)), of x's own length."""
        return self.decode(self.encode(x), x.shape[-1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both outputs for a context x: its reconstruction and the (one-step) prediction of what follows it."""
        predicted = self.predict(self.hear(x), steps=1, guidance=1.0)
        return self.reconstruct(x), self.decode(predicted, x.shape[-1], self.copies(x))

    @torch.no_grad()
    def track_latents(self, mean: Tensor, mean_square: Tensor, momentum: float = 0.02) -> None:
        """Running mean and standard deviation by channel, while stage 1 trains, from the moments of a batch
        (latent_channels,)."""
        self.latent_mean.lerp_(mean[:, None], momentum)
        self.latent_std.lerp_((mean_square - mean.square()).clamp(min=0).sqrt()[:, None], momentum)

    def standardise(self, z: Tensor) -> Tensor:
        return (z - self.latent_mean) / self.latent_std

    def destandardise(self, z: Tensor) -> Tensor:
        return z * self.latent_std + self.latent_mean

    def predict(
        self,
        context: Tensor,
        steps: int = SAMPLING_STEPS,
        guidance: float = GUIDANCE,
        seed: int = 0,
        temperature: float = 1.0,
    ) -> Tensor:
        """The latents of the next chunk (batch, latent_channels, latents), given the context of one.

        Euler steps of the rectified flow from noise (standard deviation `temperature`, drawn from `seed`) to music
        (Liu et al. 2022), with classifier-free guidance (Ho and Salimans 2022; 1 is none), `rescaled` above 1. A
        network that was trained to say the mean, and legacy, take one step from zero.
        """
        if self.config.is_legacy:
            return self.core(context)
        if self.config.objective == "mse":
            steps, guidance, temperature = 1, 1.0, 0.0
        shape = (len(context), self.config.latent_channels, self.config.chunk_latents)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(context)
        return self.sample(context, temperature * noise, steps, guidance)

    def sample(self, context: Tensor, noise: Tensor, steps: int, guidance: float) -> Tensor:
        """What `predict` makes of the noise (batch, latent_channels, latents)."""
        context, z = self.standardise(context), noise
        for step in range(steps):
            z = z + self.guided_velocity(z, context, step / steps, guidance) / steps
        return self.destandardise(z)

    def guided_velocity(self, z: Tensor, context: Tensor, time: float, guidance: float) -> Tensor:
        times = z.new_full((len(z),), time)
        if guidance == 1:
            return self.core(z, context, times)
        heard = torch.cat([torch.ones_like(times), torch.zeros_like(times)])
        both = self.core(z.repeat(2, 1, 1), context.repeat(2, 1, 1), times.repeat(2), heard)
        with_context, without = both.float().chunk(2)
        velocity = without + guidance * (with_context - without)
        if guidance < 1:
            return velocity
        left = 1 - time  # rescaled is the music that the velocity leads to at time 1
        return (rescaled(z + left * velocity, z + left * with_context) - z) / left

    @torch.no_grad()
    def generate(
        self, audio, seconds: float = 10, seed: int = 0, steps: int = SAMPLING_STEPS, guidance: float = GUIDANCE,
        temperature: float = 1.0, with_input: bool = False,
    ) -> Tensor:  # fmt: skip
        """What follows `audio` (channels, samples): (channels, round(seconds x rate)), on the CPU, at its rate.

        Only the last chunk of `audio` is heard. Beyond a chunk the core goes on from its own sound; the decoder goes
        on playing copies of `audio` itself, so that the continuation stays that song, at its level. `with_input` puts
        that last chunk in front, crossfaded over the 20 ms before the cut, as every roll is.
        """
        config = self.config
        x = torch.as_tensor(audio, dtype=torch.float32)
        if x.ndim != 2 or x.shape[0] != config.channels or x.shape[1] < config.chunk_samples:
            need = config.chunk_samples / config.sample_rate
            raise ValueError(f"expected ({config.channels}, samples) with at least {need:g} s, got {tuple(x.shape)}")
        chunk, length = config.chunk_samples, round(seconds * config.sample_rate)
        gain = gain_to_level(x[:, -chunk:])
        sound = (gain * x[:, -chunk:])[None].to(self.latent_mean.device)
        copies = self.copies(sound)
        for roll in range(-(-length // chunk)):
            heard = sound[..., -chunk:]
            context = self.hear(gain_to_level(heard) * heard)
            own = (int(seed) + roll * SEED_STRIDE) % 2**32  # other noise in every roll; torch would drop higher bits
            predicted = self.predict(context, steps, guidance, own, temperature)
            before, after = self.decode_behind(context, predicted, copies, roll * chunk)
            sound = torch.cat([crossfade(sound, before), after], dim=-1)
        return (sound[0, :, 0 if with_input else chunk : chunk + length] / gain.to(sound)).cpu()

    def decode_behind(
        self, context: Tensor, predicted: Tensor, copies: Copies | None, start: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Decode predicted latents behind the end of the context's, so that they join: the FADE_SECONDS before the
        cut, and all that the prediction stands for, (batch, channels, samples) each. The prediction begins `start`
        samples behind the sound that the copies are of."""
        config = self.config
        join = max(1, round(JOIN_SHARE * config.chunk_latents))
        end = self.parts(context)[0][..., -join:]
        cut, fade = join * config.latent_samples, round(FADE_SECONDS * config.sample_rate)
        decoded = self.decode(torch.cat([end, predicted], dim=-1), copies=copies, start=start - cut).float()
        return decoded[..., cut - fade : cut], decoded[..., cut:]


def rescaled(guided: Tensor, plain: Tensor) -> Tensor:
    """Guided latents (batch, latent_channels, latents), GUIDANCE_RESCALE of the way back to the mean and the standard
    deviation over time that each channel has in the plain ones: guidance makes both too large, and music too loud
    (after Lin et al. 2023)."""
    mean, std = guided.mean(-1, keepdim=True), guided.std(-1, keepdim=True)
    back = (guided - mean) / std.clamp(min=1e-6) * plain.std(-1, keepdim=True) + plain.mean(-1, keepdim=True)
    return guided.lerp(back, GUIDANCE_RESCALE)


def gain_to_level(x: Tensor) -> Tensor:
    """What brings audio to the level that contexts are heard at."""
    return CONTEXT_LEVEL / x.square().mean().sqrt().clamp(min=QUIETEST_RMS)


def with_overrides(preset: str, **fields) -> ModelConfig:
    """A preset's config with the fields that are not None replaced."""
    return replace(PRESETS[preset], **{name: value for name, value in fields.items() if value is not None})


# Checkpoints


def load_model(path, device="cpu") -> ContinuationModel:
    """Load a checkpoint file and build its network: see `load_checkpoint` and `build_model`."""
    return build_model(load_checkpoint(path), device)


def load_checkpoint(path) -> dict:
    """Load the checkpoint of a network, see checkpoint.load; UsageError, which names the file, for others."""
    state = checkpoint.load(path)
    check_network(path, state)
    return state


def check_network(path, state: dict) -> None:
    """Raise UsageError, naming the file, unless its network can be and it says how far that was trained."""
    checkpoint.check_network(path, state)
    try:
        config_of(state)
    except checkpoint.FOREIGN_ERRORS as error:
        raise checkpoint.misfit(path, error) from error


def build_model(state: dict, device="cpu") -> ContinuationModel:
    """Build the network of a loaded checkpoint with its EMA weights, in eval mode on `device`."""
    try:
        config = config_of(state)
        if exceeds_base(config) and checkpoint.shapes(state["ema"]) != checkpoint.shapes(
            on_meta(config).state_dict()
        ):
            raise ValueError("its weights are not those of its sizes")  # before memory is taken for them
        model = ContinuationModel(config)
        model.load_state_dict(state["ema"])
    except checkpoint.FOREIGN_ERRORS as error:
        raise checkpoint.misfit("the checkpoint", error) from error
    return model.to(device).eval()


def config_of(state: dict) -> ModelConfig:
    """The config of a checkpoint; ValueError for one of no network."""
    if unknown := state["config"].keys() - {field.name for field in fields(ModelConfig)}:
        raise ValueError(f"it has a size called {min(unknown, key=str)!r}")
    return ModelConfig(**state["config"])


def exceeds_base(config: ModelConfig) -> bool:
    """Whether a network may take much memory: only then is it worth the seconds that torch's meta device takes."""

    def largest(size) -> int:
        return max(size) if isinstance(size, tuple) else size

    return any(largest(getattr(config, name)) > largest(getattr(PRESETS["base"], name)) for name in RANGES)


# python model.py


def layer_rows(model: ContinuationModel) -> list[tuple[str, str, str, int]]:
    """(name, type, output shape, parameters) of every layer with weights, and of pooling, for one chunk of audio.

    `model` is on the meta device: shapes are computed, nothing else.
    """
    rows, hooks = [], []
    for name, module in model.named_modules():
        count = sum(p.numel() for p in module.parameters())
        is_leaf = not any(module.children()) or isinstance(module, nn.MultiheadAttention)
        if is_leaf and (count or isinstance(module, nn.MaxPool1d)) and not name.endswith("out_proj"):
            kind = type(module).__name__

            def note(_module, _inputs, output, name=name, kind=kind, count=count):
                output = output[0] if isinstance(output, tuple) else output
                rows.append((name, kind, " x ".join(str(size) for size in output.shape[1:]), count))

            hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        x = chunk_on_meta(model.config)
        model.encode(x)
        predicted = model.predict(context_on_meta(model.config), steps=1, guidance=1.0)
        model.decode(predicted, copies=model.copies(x))
    for hook in hooks:
        hook.remove()
    return rows


def on_meta(config: ModelConfig) -> ContinuationModel:
    with torch.device("meta"):
        return ContinuationModel(config).eval()


def chunk_on_meta(config: ModelConfig) -> Tensor:
    return torch.zeros(1, config.channels, config.chunk_samples, device="meta")


def context_on_meta(config: ModelConfig) -> Tensor:
    return torch.zeros(1, config.latent_channels, config.context_latents, device="meta")


def gigaflops(config: ModelConfig) -> dict[str, float]:
    """GFLOPs (2 a multiply-add) of one forward pass of each stage and of one generation of a chunk; convolutions,
    matrix products and attention are counted, FFTs and elementwise work are not."""
    from torch.utils.flop_counter import FlopCounterMode

    model = on_meta(config)
    passes = 1 if config.objective == "mse" else SAMPLING_STEPS

    def count(run) -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / 1e9

    codec = count(lambda: model.reconstruct(chunk_on_meta(config)))
    hearing = count(lambda: model.hear(chunk_on_meta(config)))
    copies = model.copies(chunk_on_meta(config))
    decoding = count(lambda: model.decode(model.parts(context_on_meta(config))[0], copies=copies))
    core = count(lambda: model.predict(context_on_meta(config), steps=1, guidance=1.0))
    return {
        "stage 1, encode and decode 10 s": codec,
        "stage 2, the core on 10 s + 10 s": core,
        "one generation of 10 s": hearing + passes * core + decoding,
    }


def print_preset(name: str) -> None:
    config = PRESETS[name]
    model = on_meta(config)
    rate, channels, latents = config.sample_rate, config.latent_channels, config.chunk_latents
    print(f"\n{name}: {rate} Hz, {config.channels} channels, latents {channels} x {latents} for 10 s")
    for layer, kind, shape, count in layer_rows(model):
        print(f"  {layer:34} {kind:32} {shape:>18} {count:12,}")
    parts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    for part, count in [*parts.items(), ("total", sum(p.numel() for p in model.parameters()))]:
        print(f"  {part:86} {count:12,} parameters")
    for what, count in gigaflops(config).items():
        print(f"  {what:86} {count:12.1f} GFLOPs")


if __name__ == "__main__":
    for preset in PRESETS:
        print_preset(preset)
