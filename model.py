"""The network: given 10 seconds of a track, it generates the next 10.

    python model.py            layer tables, parameters and FLOPs of every preset

Shapes, everywhere in this file:
    x        (batch, channels, samples)             audio in -1..1
    frames   (batch, width, frames)                 100 a second
    latents  (batch, latent_channels, latents)      one a frame (legacy: one in 40 samples)
    outlook  (batch, 2 * rows, steps)               levels expected from the copies, then their spread, 25 a second;
                                                    rows: channels times bands
    tokens   (batch, tokens, core_width)            25 a second (tiny: 12.5)

Three parts: the encoder (convolution and pooling), the core (a transformer and a flow over latents) and the decoder,
which mixes its own sound with copies of the context (repetition.py, mixer.py).
Two outputs: the reconstruction decode(encode(x)) and the decoded prediction of what follows x.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from continuation import checkpoint, model_tables
from continuation.context import Context
from continuation.encoder_stems import LongStem, Stem
from continuation.equaliser import FEATURES, Equaliser, band_count
from continuation.flow_head import FlowHead
from continuation.layers import (
    CONTEXT_LEVEL,
    FRAME_RATE_HZ,
    QUIETEST_RMS,
    WINDOW_HOPS,
    ChannelNorm,
    blocks,
    crossfade,
    without_autocast,
)
from continuation.legacy import LEGACY_HOP, LegacyCore, LegacyDecoder, LegacyEncoder
from continuation.mixer import Mixer, expected_levels
from continuation.repetition import Copies, find_copies
from continuation.spectral import STEP_FRAMES, ISTFTHead, band_edges
from continuation.transformer import RMSNorm, TransformerBlock, patchify, rotary_angles

JOIN_SHARE = 0.1  # end of the context that is decoded together with the prediction, as a share of it
FADE_SECONDS = 0.02
SEED_STRIDE = 0x9E3779B1  # between the seeds of a long continuation's chunks; odd and far from small numbers
SAMPLING_STEPS = 8
GUIDANCE = 1.0

PRESET_NAMES = ("legacy", "tiny", "base", "large")
RANGES = {  # of a config's integers, both ends included
    "sample_rate": (FRAME_RATE_HZ, 384_000), "channels": (1, 32), "chunk_samples": (1, 2**31),
    "latent_channels": (1, 4096), "encoder_widths": (1, 16384), "encoder_blocks": (0, 256),
    "decoder_widths": (1, 16384), "decoder_blocks": (0, 256),
    "core_layers": (1, 256), "core_width": (1, 16384), "core_heads": (1, 1024), "latents_per_token": (1, 4096),
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and objective of a network, saved in its checkpoint. Lengths are in samples."""

    preset: str = "base"
    sample_rate: int = 24000
    channels: int = 2
    chunk_samples: int = 240000
    objective: str = "flow"  # or mse: the same network, trained to predict the mean
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
        if not self.is_legacy and self.latents_per_token % STEP_FRAMES:
            raise ValueError(f"latents_per_token {self.latents_per_token} must be a multiple of {STEP_FRAMES}")
        if self.core_width % (2 * self.core_heads):
            raise ValueError(f"core_width {self.core_width} must be a multiple of 2 x core_heads {self.core_heads}")
        if self.objective not in ("flow", "mse"):
            raise ValueError(f"the objective is flow or mse, not {self.objective!r:.40}")

    def check_ranges(self) -> None:
        """Raise ValueError for a value of wrong type or out of range, before memory is allocated for the network."""
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
    def has_copies(self) -> bool:
        """Whether the decoder mixes copies of the context with its own sound."""
        return not self.is_legacy

    @property
    def learns_waveforms(self) -> bool:
        """Whether every loss is a squared error of the waveform: losses.legacy_step."""
        return self.is_legacy

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return self.sample_rate // FRAME_RATE_HZ

    @property
    def latent_samples(self) -> int:
        """Samples per latent."""
        return LEGACY_HOP if self.is_legacy else self.hop

    @property
    def latent_rate(self) -> float:
        """Latents per second."""
        return self.sample_rate / self.latent_samples

    @property
    def chunk_latents(self) -> int:
        """Latents per chunk."""
        return self.chunk_samples // self.latent_samples

    @property
    def level_rows(self) -> int:
        """Rows of the levels: channels times bands."""
        return self.channels * (len(band_edges(WINDOW_HOPS * self.hop // 2 + 1)) - 1)

    @property
    def pair_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of ContinuationModel.encode_pair, without the batch."""
        latents, bands = (self.latent_channels, self.chunk_latents), band_count(self.sample_rate)
        return {
            "context": latents, "outlook": (2 * self.level_rows, self.chunk_latents // STEP_FRAMES),
            "target": latents, "features": (self.channels, FEATURES, bands), "correction": (self.channels, bands),
        }  # fmt: skip


PRESETS = {
    "legacy": ModelConfig(
        preset="legacy", sample_rate=12000, chunk_samples=120000, objective="mse", core_layers=1, core_width=64,
        core_heads=4, core_dropout=0.0, latent_channels=64, latents_per_token=1,
    ),
    "tiny": ModelConfig(
        preset="tiny", sample_rate=12000, chunk_samples=120000, encoder_widths=(128, 128), encoder_blocks=(1, 2),
        decoder_widths=(128, 128), decoder_blocks=(2, 2), core_layers=3, core_width=192, core_heads=3,
        core_dropout=0.1, latents_per_token=8,
    ),
    "base": ModelConfig(),
    "large": ModelConfig(
        preset="large", sample_rate=48000, chunk_samples=480000, encoder_widths=(768, 1024), encoder_blocks=(3, 6),
        decoder_widths=(1024, 768), decoder_blocks=(6, 8), core_layers=20, core_width=1024, core_heads=16,
    ),
}  # fmt: skip


# Encoder and decoder


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
        self.beside_pool = nn.Conv1d(first, second, 1)  # keeps the phase that max pooling loses
        self.blocks_after = blocks(second, config.encoder_blocks[1])
        self.norm = ChannelNorm(second)
        self.to_posterior = nn.Conv1d(second, 2 * config.latent_channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode audio (batch, channels, samples) as mean and log-variance (batch, latent_channels, latents) each."""
        x = F.pad(x, (0, -x.shape[-1] % self.alignment))
        x = self.blocks_before(self.stem(x) + self.long_stem(x))
        x = self.pool(self.before_pool(x)) + self.beside_pool(x)
        x = self.norm(self.blocks_after(x))
        mean, log_variance = self.to_posterior(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 4)


class Decoder(nn.Module):
    """Latents, and copies of the context -> audio; without copies, the decoder's own output alone. It has no
    transposed convolutions, which cause the hum of the legacy network."""

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
        self.mixer = Mixer(self.head.bins)

    def forward(self, z: Tensor, copies: Copies | None = None, start: int = 0) -> tuple[Tensor, Tensor]:
        """Decode latents (batch, latent_channels, latents) to audio (batch, channels, samples), and return the
        magnitudes of ISTFTHead too. start: samples from the context's end to the first latent."""
        spectrum, magnitudes = self.head(self.trunk(z))
        if copies is not None:
            spectrum = self.mixer(self.sources(spectrum, copies, start), copies)
        return self.head.audio(spectrum), magnitudes

    def sources(self, own_spectrum: Tensor, copies: Copies, start: int) -> Tensor:
        """Compute the spectra to mix, the decoder's own (batch, channels, bins, frames) and the copies': (batch, 1 +
        copies, channels, bins, frames)."""
        sound = copies.play(start, own_spectrum.shape[-1] * self.head.hop)
        played = self.head.spectrum(sound.flatten(0, 1)).unflatten(0, sound.shape[:2])
        return torch.cat([own_spectrum[:, None], played], dim=1)


# The core


class Core(nn.Module):
    """Transformer that predicts the next chunk from [context latents | outlook], with neighbours stacked to tokens.
    The outlook, the levels expected from the copies, takes the target's place in the sequence; the output tokens
    there condition the flow of the latents. Beside it, `equaliser` predicts the spectrum of what is played."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, self.latents_per_token = config.core_width, config.latents_per_token
        self.steps_per_token = config.latents_per_token // STEP_FRAMES
        self.from_context = nn.Linear(config.latent_channels * config.latents_per_token, width)
        self.from_outlook = nn.Linear(2 * config.level_rows * self.steps_per_token, width)
        self.no_context = nn.Parameter(torch.randn(width) * 0.02)
        self.angle_size = width // config.core_heads
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.core_heads, config.core_layers, config.core_dropout)
            for _ in range(config.core_layers)
        )
        self.norm = RMSNorm(width, eps=1e-6)
        self.head = FlowHead(width, config.latent_channels, config.latents_per_token)
        self.equaliser = Equaliser(config.sample_rate, config.core_dropout)

    def forward(self, context: Context, context_share: Tensor | None = None) -> Tensor:
        """Compute the tokens of the next chunk: (batch, tokens, core_width). The context's latents are standardised.

        context_share (batch,), 0..1, default 1: share of the context's latents, its end, that is kept; the rest is
        replaced by the null vector. The outlook stays, a summary of the whole context; at 0 it is zeroed too: the
        prediction is unconditional.
        """
        if context_share is None:
            context_share = torch.ones_like(context.latents[:, 0, 0])
        context_tokens = self.from_context(patchify(context.latents, self.latents_per_token))
        age = torch.arange(context_tokens.shape[1], 0, -1, device=context_tokens.device) / context_tokens.shape[1]
        is_given = (age <= context_share[:, None])[:, :, None]
        context_tokens = torch.where(is_given, context_tokens, self.no_context.to(context_tokens.dtype))
        expected, spread = context.outlook.chunk(2, dim=1)
        outlook = torch.cat([expected - expected.mean(-1, keepdim=True), spread], dim=1)  # no band's loudness
        outlook = outlook * (context_share > 0)[:, None, None]
        tokens = torch.cat([context_tokens, self.from_outlook(patchify(outlook, self.steps_per_token))], dim=1)
        angles = rotary_angles(tokens.shape[1], self.angle_size, tokens.device)
        for block in self.blocks:
            tokens = block(tokens, angles)
        return self.norm(tokens[:, context_tokens.shape[1] :])


# The whole network


class ContinuationModel(nn.Module):
    """Encoder, core and decoder, with the two outputs and generation from samples to samples.

    model = load_model("checkpoints/best.pt")
    continuation = model.generate(audio, seconds=10, seed=0)
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder, self.core, self.decoder = self.make_parts()
        # Statistics of the latents by channel, estimated during stage 1 and measured at its end: the core works on
        # standardised latents.
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels, 1))
        self.register_buffer("latent_std", torch.ones(config.latent_channels, 1))

    def make_parts(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Make encoder, core and decoder."""
        return Encoder(self.config), Core(self.config), Decoder(self.config)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode x (batch, channels, samples) as mean and log-variance (legacy: None) of its latents."""
        channels = self.config.channels
        assert x.ndim == 3 and x.shape[1] == channels, f"expected (batch, {channels}, samples), got {tuple(x.shape)}"
        return self.encoder(x)

    def encode(self, x: Tensor) -> Tensor:
        """Encode x as the posterior mean of its latents: (batch, latent_channels, latents)."""
        return self.posterior(x)[0]

    def encode_context(self, x: Tensor, copies: Copies | None = None, start: int = 0) -> Context:
        """Encode the chunk x (batch, channels, samples) as the core's input, with the outlook of `copies` (default:
        of x), which begins `start` samples after the end of the audio that they copy. x is encoded without what
        follows it, as in generation, so that no future leaks into it."""
        copies = copies or self.copies(x)
        steps = self.config.pair_shapes["outlook"][-1]
        outlook = expected_levels(copies, start, steps)
        return Context(self.encode(x).float(), torch.cat(outlook, dim=1))

    def levels(self, x: Tensor) -> Tensor:
        """Compute the levels of audio x (batch, channels, frames * hop), in nepers: (batch, rows, steps)."""
        with without_autocast(x):
            return self.decoder.mixer.bands(self.decoder.head.spectrum(x))

    def encode_pair(self, x: Tensor) -> dict[str, Tensor]:
        """Encode x (batch, channels, 2 * chunk) as the tensors of stage 2, of ModelConfig.pair_shapes: the core's
        input, `context` and `outlook`, from the first chunk; its target, the latents of the second chunk, encoded
        together with the first; and the equaliser's input and target, `features` and `correction`."""
        cut, latents = self.config.chunk_samples, self.config.chunk_latents
        copies = self.copies(x[..., :cut])
        context, target = self.encode_context(copies.context, copies), self.encode(x)[..., latents : 2 * latents]
        of_equaliser = self.core.equaliser.training_pair(copies, x[..., cut:])
        encoded = (context.latents, context.outlook, target.float(), *of_equaliser)
        return dict(zip(self.config.pair_shapes, encoded, strict=True))

    def copies(self, x: Tensor) -> Copies | None:
        """Find the copies of the context x (batch, channels, samples) for the decoder to mix; legacy: None."""
        return replace(find_copies(x, self.config.hop).with_multiples(), levels=self.levels(x))

    def decode(
        self, z: Tensor, length: int | None = None, copies: Copies | None = None, start: int = 0, equalise=True
    ) -> Tensor:  # fmt: skip
        """Decode latents to audio (batch, channels, length); length None: all samples of the latents. With `copies`
        of a context, z begins `start` samples after its end; the sound is mixed with them, and equalised."""
        sound = self.decode_with_magnitudes(z, copies, start)[0][..., :length]
        return self.core.equaliser.equalise(sound, copies, start) if equalise and copies is not None else sound

    def decode_with_magnitudes(
        self, z: Tensor, copies: Copies | None = None, start: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Decode latents to audio (batch, channels, samples), and return the head's magnitudes of mid and side above
        its complex bins too: (batch, channels, bins, frames); legacy: None."""
        channels = self.config.latent_channels
        assert z.ndim == 3 and z.shape[1] == channels, f"expected (batch, {channels}, latents), got {tuple(z.shape)}"
        return self.decoder(z, copies, start)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode and decode x (batch, channels, samples): audio of the same shape."""
        return self.decode(self.encode(x), x.shape[-1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute both outputs for a context x (batch, channels, samples): its reconstruction, and the decoded
        prediction (of one step), of the same shape."""
        copies = self.copies(x)
        predicted = self.predict(self.encode_context(x, copies), steps=1)
        return self.reconstruct(x), self.decode(predicted, x.shape[-1], copies)

    @torch.no_grad()
    def track_latents(self, mean: Tensor, mean_square: Tensor, momentum: float = 0.02) -> None:
        """Update the latents' running mean and standard deviation by channel, in stage 1, from a batch's moments
        (latent_channels,)."""
        self.latent_mean.lerp_(mean[:, None], momentum)
        self.latent_std.lerp_((mean_square - mean.square()).clamp(min=0).sqrt()[:, None], momentum)

    def standardise(self, z: Tensor) -> Tensor:
        """Scale latents to mean 0 and standard deviation 1 by channel."""
        return (z - self.latent_mean) / self.latent_std

    def destandardise(self, z: Tensor) -> Tensor:
        """Invert `standardise`."""
        return z * self.latent_std + self.latent_mean

    def predict(
        self,
        context: Context,
        steps: int = SAMPLING_STEPS,
        guidance: float = GUIDANCE,
        seed: int = 0,
        temperature: float = 1.0,
    ) -> Tensor:
        """Predict the latents (batch, latent_channels, latents) of the next chunk from the context of one chunk: the
        sampler.

        They are drawn along the rectified flow from noise (standard deviation `temperature`, drawn from `seed`) to
        data (Liu et al. 2022), with classifier-free guidance (Ho and Salimans 2022; 1 is none). Steps are those of
        Adams and Bashforth, of second order and one velocity each; the first is Euler's. Networks with the mse
        objective take one step from zero.
        """
        if self.config.objective == "mse":
            steps, guidance, temperature = 1, 1.0, 0.0
        context = replace(context, latents=self.standardise(context.latents))
        tokens = self.core(context)
        unconditional = None if guidance == 1 else self.core(context, torch.zeros_like(tokens[:, 0, 0]))
        noise = torch.randn(context.latents.shape, generator=torch.Generator().manual_seed(seed))
        z, last = temperature * noise.to(context.latents), None
        for step in range(steps):
            time = z.new_full((len(z),), step / steps)
            velocity = self.core.head(z, tokens, time).float()
            if unconditional is not None:
                without = self.core.head(z, unconditional, time).float()
                velocity = without + guidance * (velocity - without)
            z = z + (velocity if last is None else 1.5 * velocity - 0.5 * last) / steps
            last = velocity
        return self.destandardise(z)

    @torch.no_grad()
    def generate(
        self, audio, seconds: float = 10, seed: int = 0, steps: int = SAMPLING_STEPS, guidance: float = GUIDANCE,
        temperature: float = 1.0, variety: float = 0.0, with_input: bool = False,
    ) -> Tensor:  # fmt: skip
        """Generate the continuation of `audio` (channels, samples): (channels, round(seconds x rate)), on the CPU.

        The context is the last chunk of `audio`; ValueError where it is shorter. From the second chunk on the core's
        context is the network's own output; the decoder still copies from `audio`, so that sound and level stay those
        of the song. With `variety` above 0 the shares of the copies depend on the seed too. `with_input` puts the
        context in front, crossfaded over the 20 ms before the cut, as every chunk.
        """
        config = self.config
        x = torch.as_tensor(audio, dtype=torch.float32)
        if x.ndim != 2 or x.shape[0] != config.channels or x.shape[1] < config.chunk_samples:
            need = config.chunk_samples / config.sample_rate
            raise ValueError(f"expected ({config.channels}, samples) with at least {need:g} s, got {tuple(x.shape)}")
        chunk, length = config.chunk_samples, round(seconds * config.sample_rate)
        gain = rms_gain(x[:, -chunk:])
        sound = (gain * x[:, -chunk:])[None].to(self.latent_mean.device)
        copies = self.copies(sound)
        if copies is not None and variety:
            copies = copies.varied(variety, int(seed))
        for roll in range(-(-length // chunk)):
            start, past = roll * chunk, sound[..., -chunk:]
            context = self.encode_context(rms_gain(past) * past, copies, start)
            chunk_seed = (int(seed) + roll * SEED_STRIDE) % 2**32  # other noise in every chunk, within 32 bits
            predicted = self.predict(context, steps, guidance, chunk_seed, temperature)
            context_tail, continuation = self.decode_continuation(context, predicted, copies, start)
            sound = torch.cat([crossfade(sound, context_tail), continuation], dim=-1)
        return (sound[0, :, 0 if with_input else chunk : chunk + length] / gain.to(sound)).cpu()

    def decode_continuation(
        self, context: Context, predicted: Tensor, copies: Copies | None, start: int = 0, equalise=True
    ) -> tuple[Tensor, Tensor]:
        """Decode a prediction together with the end of its context, so that they join: the last FADE_SECONDS of the
        context, and the continuation, (batch, channels, samples) each. The continuation begins `start` samples after
        the end of the audio that is copied."""
        config = self.config
        join = max(1, round(JOIN_SHARE * config.chunk_latents))
        cut, fade = join * config.latent_samples, round(FADE_SECONDS * config.sample_rate)
        latents = torch.cat([context.latents[..., -join:], predicted], dim=-1)
        decoded = self.decode(latents, copies=copies, start=start - cut, equalise=equalise).float()
        return decoded[..., cut - fade : cut], decoded[..., cut:]


class LegacyModel(ContinuationModel):
    """The network that this project descends from, with the same interface: without copies, and with latents
    predicted in one step."""

    def make_parts(self):
        return LegacyEncoder(self.config.channels), LegacyCore(), LegacyDecoder(self.config.channels)

    def copies(self, x: Tensor) -> None:
        return None

    def encode_context(self, x: Tensor, copies: None = None, start: int = 0) -> Context:
        return Context(self.encode(x), None)

    def encode_pair(self, x: Tensor) -> dict[str, Tensor]:
        context, target = x.split(self.config.chunk_samples, dim=-1)
        return {"context": self.encode(context), "target": self.encode(target)}

    def predict(self, context: Context, *_, **__) -> Tensor:
        return self.core(context.latents)


def make_model(config: ModelConfig) -> ContinuationModel:
    """Make a network with new weights."""
    return (LegacyModel if config.is_legacy else ContinuationModel)(config)


def rms_gain(x: Tensor) -> Tensor:
    """Compute the factor that scales a context x (1, channels, samples) to CONTEXT_LEVEL: a scalar."""
    return CONTEXT_LEVEL / x.square().mean().sqrt().clamp(min=QUIETEST_RMS)


def with_overrides(preset: str, **fields) -> ModelConfig:
    """Return a preset's config with the fields that are not None replaced."""
    return replace(PRESETS[preset], **{name: value for name, value in fields.items() if value is not None})


# Checkpoints


def load_model(path, device="cpu") -> ContinuationModel:
    """Load a checkpoint file and build its network: see `load_checkpoint` and `build_model`."""
    return build_model(load_checkpoint(path), device)


def load_checkpoint(path) -> dict:
    """Load the checkpoint of a network, see checkpoint.load. Raises UsageError, naming the file, for any other."""
    state = checkpoint.load(path)
    check_network(path, state)
    return state


def check_network(path, state: dict) -> None:
    """Raise UsageError, naming the file, unless it has a valid config, weights, stage and step."""
    checkpoint.check_network(path, state)
    try:
        config_of(state)
    except checkpoint.FOREIGN_ERRORS as error:
        raise checkpoint.misfit(path, error) from error


def build_model(state: dict, device="cpu") -> ContinuationModel:
    """Build the network of a loaded checkpoint with its EMA weights, in eval mode on `device`."""
    try:
        config = config_of(state)
        expected = on_meta(config).state_dict() if exceeds_base(config) else state["ema"]
        if checkpoint.shapes(state["ema"]) != checkpoint.shapes(expected):
            raise ValueError("its weights are not those of its sizes")  # before memory is allocated
        model = make_model(config)
        model.load_state_dict(state["ema"])
    except checkpoint.FOREIGN_ERRORS as error:
        raise checkpoint.misfit("the checkpoint", error) from error
    return model.to(device).eval()


def config_of(state: dict) -> ModelConfig:
    """Return the config of a checkpoint; ValueError for an invalid one."""
    if unknown := state["config"].keys() - {field.name for field in fields(ModelConfig)}:
        raise ValueError(f"it has a size called {min(unknown, key=str)!r}")
    return ModelConfig(**state["config"])


def exceeds_base(config: ModelConfig) -> bool:
    """Return whether a network may take much memory: only then are its shapes checked on the meta device, which takes
    seconds."""

    def largest(size) -> int:
        return max(size) if isinstance(size, tuple) else size

    return any(largest(getattr(config, name)) > largest(getattr(PRESETS["base"], name)) for name in RANGES)


def on_meta(config: ModelConfig) -> ContinuationModel:
    """Make a network without memory for its weights, for their shapes."""
    with torch.device("meta"):
        return make_model(config).eval()


if __name__ == "__main__":
    for preset, config in PRESETS.items():
        model_tables.print_tables(preset, on_meta(config))
