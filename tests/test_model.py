"""The network: lengths are exact, filters and overlap-add are what they claim, nothing hears what it may not."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import synth
import torch
import torch.nn.functional as F
from torch import nn

import model as network
from continuation import model_tables, transformer
from continuation.context import Context
from continuation.layers import typical_magnitude
from continuation.mixer import agreement, expectation, past_error
from continuation.spectral import STEADY_HZ, TONES_HZ, ISTFTHead, stft
from continuation.stems import Stem
from continuation.transformer import patchify, unpatchify
from model import PRESETS, ContinuationModel, LegacyModel, ModelConfig, make_model, on_meta, with_overrides

torch.set_num_threads(1)
RATE = 2000
CHUNK = 2 * RATE
SMALL = {
    "encoder_widths": (8, 8), "encoder_blocks": (1, 1), "decoder_widths": (8, 8), "decoder_blocks": (1, 1),
    "latent_channels": 4, "core_layers": 2, "core_width": 16, "core_heads": 2, "latents_per_token": 4,
}  # fmt: skip


def small(channels: int = 2, **fields) -> ContinuationModel:
    """A small network whose core says something: as it is made, it says zero whatever it hears."""
    model = untrained(channels, **fields)
    torch.manual_seed(0)
    for weights in model.core.parameters():
        nn.init.normal_(weights, 0, 0.3)
    return model


def untrained(channels: int = 2, **fields) -> ContinuationModel:
    torch.manual_seed(0)
    shape = {"sample_rate": RATE, "channels": channels, "chunk_samples": CHUNK}
    return make_model(with_overrides("tiny", **SMALL | shape | fields)).eval().requires_grad_(False)


def legacy(channels: int = 2) -> LegacyModel:
    torch.manual_seed(0)
    config = with_overrides("legacy", channels=channels, chunk_samples=CHUNK, sample_rate=RATE)
    return make_model(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> ContinuationModel:
    return small()


@pytest.fixture(scope="module")
def song() -> torch.Tensor:
    return torch.from_numpy(synth.song(0, 5, RATE))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- presets and lengths ----


@pytest.mark.parametrize("sample_rate", [12000, 16000, 24000, 44100, 48000])
def test_ten_seconds_are_exactly_1000_latents_at_every_rate(sample_rate):
    shape = {"sample_rate": sample_rate, "channels": 1, "chunk_samples": 10 * sample_rate}
    config = with_overrides("tiny", **SMALL | shape)
    with torch.device("meta"):
        model = make_model(config)
        z = model.encode(torch.zeros(1, 1, 10 * sample_rate))
        y = model.decode(z)
    assert z.shape == (1, 4, 1000)
    assert y.shape == (1, 1, 10 * sample_rate)
    assert (config.chunk_latents, config.latent_rate) == (1000, 100)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_convolves_with_trainable_weights_and_pools_by_the_maximum(preset):
    with torch.device("meta"):
        model = make_model(PRESETS[preset])
        used = []
        for module in model.modules():
            module.register_forward_hook(lambda module, *_: used.append(module))
        model.reconstruct(torch.zeros(1, 2, PRESETS[preset].chunk_samples))
    convolutions = [module for module in used if isinstance(module, nn.Conv1d)]
    assert convolutions
    assert all(module.weight.requires_grad for module in convolutions)
    assert any(isinstance(module, nn.MaxPool1d) for module in used)


@pytest.mark.parametrize("preset", ["tiny", "base", "large"])
def test_no_preset_but_legacy_uses_a_transposed_convolution(preset):
    with torch.device("meta"):
        model = make_model(PRESETS[preset])
    assert not any(isinstance(module, nn.ConvTranspose1d) for module in model.modules())


@pytest.mark.parametrize("samples", [1, 19, 81, 1999, 2001])
@pytest.mark.parametrize("make", [small, legacy])
@pytest.mark.parametrize("channels", [1, 2])
def test_reconstruction_has_the_length_of_the_input(make, channels, samples):
    x = 0.1 * noise(2, channels, samples)
    y = make(channels).reconstruct(x)
    assert y.shape == x.shape
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("make", [small, legacy])
def test_both_outputs_have_the_length_of_the_context(make):
    reconstruction, prediction = make()(0.1 * noise(2, 2, CHUNK))
    assert reconstruction.shape == prediction.shape == (2, 2, CHUNK)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sample_rate": 22050}, "multiple of 100"),
        ({"chunk_samples": CHUNK + 1}, "chunk"),
        ({"core_heads": 3}, "core_width"),
        ({"latents_per_token": 10}, "multiple of 4"),
        ({"objective": "hope"}, "hope"),
    ],
)
def test_config_that_cannot_work_is_refused_with_the_reason(fields, words):
    with pytest.raises(ValueError, match=words):
        with_overrides("tiny", **{"chunk_samples": CHUNK, "sample_rate": RATE} | SMALL | fields)


def test_overrides_change_their_fields_and_none_keeps_the_presets_value():
    config = with_overrides("tiny", core_layers=7, core_width=None)
    assert config == dataclasses.replace(PRESETS["tiny"], core_layers=7)


def test_config_survives_plain_types():
    plain = dataclasses.asdict(PRESETS["large"])
    assert ModelConfig(**plain) == PRESETS["large"]
    assert json.loads(json.dumps(plain))["core_layers"] == 20


@pytest.mark.parametrize("shape", [(2, CHUNK), (1, 3, CHUNK)])
def test_audio_of_another_shape_is_refused_with_both_shapes(model, shape):
    with pytest.raises(AssertionError, match=r"expected \(batch, 2, samples\)"):
        model.encode(torch.zeros(shape))


# ---- legacy ----


class PlainLegacy(nn.Module):
    """The layer list of the original, in plain torch.nn."""

    def __init__(self, channels: int):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(channels, 128, kernel_size=9, stride=2, padding=4),
            nn.MaxPool1d(2),
            nn.Conv1d(128, 64, kernel_size=7, stride=2, padding=3),
        )
        self.transformer = nn.TransformerEncoderLayer(
            d_model=64, nhead=4, dim_feedforward=256, dropout=0.0, activation="relu", batch_first=True
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose1d(64, 128, kernel_size=7, stride=2, padding=3, output_padding=1),
            nn.ConvTranspose1d(128, 128, kernel_size=2, stride=2),
            nn.ConvTranspose1d(128, 128, kernel_size=3, stride=5, padding=1, output_padding=4),
            nn.ConvTranspose1d(128, channels, kernel_size=9, stride=2, padding=4, output_padding=1),
        )

    def forward(self, x):
        padded = F.pad(x, (0, -x.shape[-1] % 40))
        z = nn.AdaptiveAvgPool1d(padded.shape[-1] // 40)(self.encoder(padded))
        predicted = self.transformer(z.transpose(1, 2)).transpose(1, 2)
        return z, self.decoder(z)[..., : x.shape[-1]], self.decoder(predicted)[..., : x.shape[-1]]


@pytest.mark.parametrize("samples", [4000, 1234, 39])
@pytest.mark.parametrize("channels", [1, 2])
def test_legacy_equals_a_plain_rebuild_with_its_weights(channels, samples):
    model, plain = legacy(channels), PlainLegacy(channels).eval()
    for mine, theirs in zip(plain.parameters(), model.parameters(), strict=True):
        mine.data.copy_(theirs)
    x = noise(2, channels, samples)
    z, reconstruction, prediction = plain(x)
    assert torch.equal(model.encode(x), z)
    for mine, theirs in zip(model(x), (reconstruction, prediction), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize(("channels", "count"), [(2, 251_778), (1, 249_473)])
def test_legacy_has_the_originals_number_of_parameters(channels, count):
    assert sum(p.numel() for p in legacy(channels).parameters()) == count


# ---- filters in, overlap-add out ----


@pytest.mark.parametrize("hop", [20, 21])
def test_stem_starts_as_a_windowed_dft(hop):
    size = 4 * hop
    stem = Stem(channels=1, hop=hop, width=8)
    x = noise(2, 1, 20 * hop)
    ours = stem.filters(x)
    theirs = torch.stft(x[:, 0], size, hop, window=torch.hann_window(size), center=False, return_complex=True)
    about_the_middle = (-1.0) ** torch.arange(size // 2 + 1)[:, None]  # phases count from the window's middle
    theirs = theirs * about_the_middle
    assert torch.allclose(ours, torch.cat([theirs.real, theirs.imag], dim=1), atol=1e-4)


def test_full_scale_sine_is_measured_by_what_is_typical_of_its_bin():
    hop, k = 25, 8
    sine = torch.sin(2 * math.pi * k * torch.arange(400) / (4 * hop))
    stem = Stem(channels=1, hop=hop, width=8)
    real, imaginary = (stem.filters(sine[None, None]) * stem.scale).chunk(2, dim=1)
    magnitude = (real**2 + imaginary**2).sqrt()[0, k] * typical_magnitude(2 * hop + 1)[k]
    assert torch.allclose(magnitude, torch.ones(()), atol=1e-4)


def test_loudness_of_quiet_bins_is_an_input_but_gives_the_filters_no_gradient():
    """The steep logarithm of quiet bins made training diverge; the filters learn through the other inputs."""
    stem = Stem(channels=1, hop=20, width=8)
    bins = stem.scale.shape[0] // 2
    with torch.no_grad():
        stem.mix.weight[:, : 2 * bins] = 0
    quiet, loud = (stem(level * noise(1, 1, 400)) for level in (0.001, 0.01))
    assert not torch.allclose(quiet, loud, atol=0.1)
    loud.sum().backward()
    assert stem.filters.weight.grad.abs().max() == 0


def test_frame_hears_its_own_four_hops_and_no_more():
    """Frame j of the stem is centred on hop j: a click reaches exactly the frames whose windows contain it."""
    hop, frames = 20, 40
    stem = Stem(channels=1, hop=hop, width=8)
    silence = torch.zeros(1, 1, frames * hop)
    click = silence.clone()
    click[..., 20 * hop + 5] = 1.0
    changed = (stem(click) != stem(silence)).any(dim=1)[0].nonzero()[:, 0].tolist()
    assert changed == [18, 19, 20, 21]  # 30 samples before each hop begins to 30 after it ends


@pytest.mark.parametrize(("hop", "left", "right"), [(441, 661, 662), (240, 360, 360)])
def test_stem_pads_one_and_a_half_hops_on_either_side(hop, left, right):
    stem, x, heard = Stem(channels=1, hop=hop, width=8), noise(1, 1, 4 * hop), []
    stem.filters.register_forward_hook(lambda _module, inputs, _output: heard.append(inputs[0]))
    stem(x)
    assert torch.equal(heard[0], F.pad(x, (left, right)))


def clicks(*shape: int) -> torch.Tensor:
    """One at each end."""
    x = torch.zeros(shape)
    x[..., [0, -1]] = 1.0
    return x


@pytest.mark.parametrize("signal", [torch.ones, noise, clicks])
@pytest.mark.parametrize("hop", [20, 21])
def test_overlap_add_is_perfect_up_to_both_edges(hop, signal):
    """The spectra of a signal give that signal: no ripple at the frame rate, no fade at the edges."""
    head = ISTFTHead(width=8, channels=2, hop=hop)
    x = signal(1, 2, 40 * hop)
    padded = F.pad(x, (head.before, 3 * hop - head.before))
    y = head.istft(stft(padded, 4 * hop, hop).transpose(2, 3))
    assert torch.allclose(y[..., head.before : head.before + 40 * hop], x, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2])
@torch.no_grad()
def test_sound_above_the_tones_has_the_power_asked_for(monkeypatch, channels):
    head = ISTFTHead(width=8, channels=channels, hop=120)
    monkeypatch.setattr(head, "magnitude_activation", torch.ones_like)
    spectrum, asked = head(torch.zeros(1, 8, 200))
    found = head.magnitudes(head.audio(spectrum))[..., 4:-4]
    decibels = 10 * (found.square().mean((0, 2, 3)) / asked.square().mean((0, 2, 3))).log10()
    assert decibels.abs().max() < 0.3


@torch.no_grad()
def tone_power(frames: torch.Tensor, above_hz: float) -> float:
    """Share of the power above a frequency in what the tones change of a head's sound, at 12 kHz."""
    torch.manual_seed(0)
    head = ISTFTHead(width=8, channels=1, hop=120)
    whole = head.audio(head(frames)[0])
    head.project.weight[: 2 * head.tones] = 0
    head.project.bias[: 2 * head.tones] = 0
    x = (whole - head.audio(head(frames)[0]))[0, 0]
    power = torch.fft.rfft(x * torch.hann_window(len(x))).abs().square()
    return float(power[round(above_hz * len(x) / 12000) :].sum() / power.sum())


@torch.no_grad()
def test_magnitudes_are_those_of_half_the_sum_and_half_the_difference_of_the_sides():
    one, two = (ISTFTHead(width=8, channels=channels, hop=120) for channels in (1, 2))
    x, y = noise(2, 1, 1, 2400)
    mid, side = one.magnitudes(x), one.magnitudes(y)
    found = two.magnitudes(torch.cat([x + y, x - y], dim=1))
    assert torch.allclose(found, torch.cat([mid, side], dim=1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2])
@torch.no_grad()
def test_audio_of_a_spectrum_of_sound_is_that_sound(channels):
    head = ISTFTHead(width=8, channels=channels, hop=20)
    x = noise(2, channels, 800)
    assert torch.allclose(head.audio(head.spectrum(x)), x, atol=1e-5)


def test_head_has_no_tones_where_phases_cannot_be_known():
    frames = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 8, 200), dtype=np.float32))
    assert tone_power(frames, 1.1 * TONES_HZ[1]) < 1e-6
    assert tone_power(frames, TONES_HZ[0]) > 1e-3


def test_head_cannot_hum():
    """The same at every frame, it would sound at multiples of the frame rate, whatever the music."""
    assert tone_power(torch.ones(1, 8, 200), STEADY_HZ + 50) < 1e-6
    assert tone_power(torch.ones(1, 8, 200), STEADY_HZ - 100) > 1e-3


def test_head_is_heard_where_its_frame_is():
    """A frame unlike the others changes the four hops around its own, and others by its share in their mean alone."""
    hop = 20
    head = ISTFTHead(width=8, channels=1, hop=hop)
    frames = torch.zeros(1, 8, 40)
    other = frames.clone()
    other[..., 20] = 1.0
    with torch.no_grad():
        change = head.audio(head(frames)[0] - head(other)[0]).abs()[0, 0]
    own = slice(round((20 - 1.5) * hop), round((21 + 1.5) * hop))
    elsewhere = torch.cat([change[: own.start], change[own.stop :]])
    assert elsewhere.max() < 0.1 * change[own].max()
    assert (change[own] > 1e-7).sum() > 3 * hop


def test_sound_of_latents_does_not_depend_on_what_else_is_in_the_batch(model):
    z = noise(3, 4, 100)
    assert torch.allclose(model.decode(z)[1:2], model.decode(z[1:2]), atol=1e-5)


def test_decoding_twice_gives_the_same_samples(model):
    z = noise(1, 4, 100)
    assert torch.equal(model.decode(z), model.decode(z))


# ---- the core ----


def context_of(seed: int = 1, items: int = 2, model: ContinuationModel | None = None) -> Context:
    """Latents and an outlook that have nothing to do with each other."""
    shapes = (model or untrained()).config.pair_shapes
    return Context(noise(items, *shapes["context"], seed=seed), noise(items, *shapes["outlook"], seed=seed + 100))


def agreed(context: Context) -> torch.Tensor:
    """The half of the outlook that is levels."""
    return context.outlook.chunk(2, dim=1)[0]


@pytest.fixture(scope="module")
def context() -> Context:
    return context_of()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_patches_are_neighbours_and_are_put_back_in_their_places(count):
    x = noise(2, 3, 8)
    tokens = patchify(x, count)
    assert tokens.shape == (2, 8 // count, 3 * count)
    assert torch.equal(tokens[:, 1].unflatten(-1, (count, 3)), x[..., count : 2 * count].transpose(1, 2))
    assert torch.equal(unpatchify(tokens, count), x)


def reordered(context: Context) -> Context:
    """The context's tokens (four latents each) in reverse order."""
    return dataclasses.replace(context, latents=context.latents.unflatten(-1, (-1, 4)).flip(2).flatten(2))


def test_attention_sees_the_order_of_the_context(model, context):
    plain, changed = model.core(context), model.core(reordered(context))
    assert (plain - changed).abs().mean() > 0.003 * plain.abs().mean()


def test_order_is_seen_through_rotary_positions_alone(model, context, monkeypatch):
    monkeypatch.setattr(transformer, "rotate", lambda x, angles: x)
    assert torch.allclose(model.core(context), model.core(reordered(context)), atol=1e-4)


def test_rotation_keeps_lengths_and_its_products_depend_on_the_distance_alone():
    angles = transformer.rotary_angles(12, 8, "cpu")
    query, key = noise(8, seed=1), noise(8, seed=2)
    queries, keys = (transformer.rotate(x.expand(12, 8), angles) for x in (query, key))
    products = queries @ keys.T
    assert torch.allclose(queries.norm(dim=1), query.norm().expand(12), atol=1e-5)
    for distance in (0, 1, 5):
        along = products.diagonal(distance)
        assert torch.allclose(along, along[0].expand_as(along), atol=1e-4)
    assert not torch.isclose(products[0, 1], products[0, 5], atol=1e-2)


def test_every_token_of_the_target_is_one(model, context):
    assert model.core(context).shape == (2, 50, 16)


def test_without_context_neither_its_latents_nor_its_outlook_matter(model, context):
    unheard = torch.zeros(2)
    assert torch.equal(model.core(context, unheard), model.core(context_of(seed=9), unheard))
    assert not torch.allclose(model.core(context, unheard), model.core(context), atol=1e-2)


def test_shorter_context_is_its_near_end(model, context):
    heard = torch.full((2,), 0.4)
    plain = model.core(context, heard)
    far, near = context.latents.clone(), context.latents.clone()
    far[..., :120] = 0.0
    near[..., 120:124] = 0.0
    assert torch.equal(plain, model.core(dataclasses.replace(context, latents=far), heard))
    assert not torch.allclose(plain, model.core(dataclasses.replace(context, latents=near), heard))


def test_whole_context_heard_is_the_plain_pass(model, context):
    assert torch.equal(model.core(context), model.core(context, torch.ones(2)))


@pytest.mark.parametrize("half", [0, 1], ids=["agreed", "spread"])
def test_outlook_is_heard_in_its_place(model, context, half):
    """What is in the last token's place moves the last token more than the first ones."""
    outlook = context.outlook.clone()
    outlook.chunk(2, dim=1)[half][..., -1:] += 1
    difference = (model.core(dataclasses.replace(context, outlook=outlook)) - model.core(context)).abs().mean((0, 2))
    assert difference[-1] > 3 * difference[:25].mean()


def test_louder_outlook_leaves_the_tokens_and_is_the_level_that_follows(model, context):
    """In every band: what the core says is by how much levels will differ."""
    offset = noise(2, agreed(context).shape[1], 1)
    louder = dataclasses.replace(context, outlook=context.outlook + F.pad(offset, (0, 0, 0, offset.shape[1])))
    tokens = model.core(context)
    assert torch.allclose(model.core(louder), tokens, atol=1e-4)
    levels = model.core.levels(tokens, context)
    assert torch.allclose(model.core.levels(tokens, louder), levels + offset, atol=1e-5)


def test_spread_of_the_copies_is_heard_as_it_is_and_is_no_level(model, context):
    """Also one that all steps have."""
    offset = torch.ones(2, agreed(context).shape[1], 1)
    unsure = dataclasses.replace(context, outlook=context.outlook + F.pad(offset, (0, 0, offset.shape[1], 0)))
    tokens = model.core(context)
    assert not torch.allclose(model.core(unsure), tokens, atol=0.1)
    assert torch.equal(model.core.levels(tokens, unsure), model.core.levels(tokens, context))


def test_items_of_a_batch_do_not_hear_each_other(model, context):
    heard = torch.tensor([1.0, 0.3])
    second = Context(context.latents[1:], context.outlook[1:])
    assert torch.allclose(model.core(context, heard)[1:], model.core(second, heard[1:]), atol=1e-5)


def test_levels_of_an_untrained_core_are_those_that_the_copies_agree_on(context):
    core = untrained().core
    assert torch.equal(core.levels(core(context), context), agreed(context))


def test_levels_of_a_token_are_those_of_its_own_steps(context):
    model = small(latents_per_token=8)
    tokens = noise(2, 25, 16)
    changed = tokens.clone()
    changed[:, 7] += 1
    difference = model.core.levels(changed, context) - model.core.levels(tokens, context)
    assert difference.abs().sum((0, 1)).nonzero().flatten().tolist() == [14, 15]


# ---- the head of the flow ----

REACH = 15  # latents to either side: two kernels of 7, the second dilated by 4


@pytest.fixture
def head_inputs() -> dict[str, torch.Tensor]:
    """In double precision: what reaches the outermost latent is small."""
    shapes = {"noisy": (2, 4, 100), "tokens": (2, 25, 16)}
    inputs = {name: noise(*shape, seed=i).double() for i, (name, shape) in enumerate(shapes.items())}
    return inputs | {"time": torch.tensor([0.2, 0.7]).double()}


@pytest.fixture
def head(model) -> nn.Module:
    return copy.deepcopy(model.core.head).double()


@pytest.mark.parametrize("name", ["noisy", "tokens", "time"])
def test_velocity_depends_on_the_noisy_latents_the_tokens_and_the_time(head, head_inputs, name):
    velocity, changed = head(**head_inputs), head(**head_inputs | {name: head_inputs[name] + 0.1})
    assert velocity.shape == (2, 4, 100)
    assert (velocity - changed).abs().mean() > 1e-3 * velocity.abs().mean()


def changed_places(head, inputs: dict, name: str, place: tuple) -> list[int]:
    """Latents whose velocity changes with a part of the head's inputs."""
    changed = inputs[name].clone()
    changed[place] += 1
    return (head(**inputs | {name: changed}) - head(**inputs)).abs().sum((0, 1)).nonzero().flatten().tolist()


def test_head_sees_each_latent_and_its_neighbours_to_both_sides(head, head_inputs):
    found = changed_places(head, head_inputs, "noisy", (..., 50))
    assert found == list(range(50 - REACH, 51 + REACH))


def test_token_speaks_for_its_own_latents_and_their_neighbours(head, head_inputs):
    found = changed_places(head, head_inputs, "tokens", (slice(None), 12))
    assert found == list(range(48 - REACH, 52 + REACH))


def test_untrained_head_leaves_the_noise_as_it_is(context):
    model = untrained()
    latents = model.predict(context, steps=3, seed=5).latents
    assert torch.equal(latents, noise(2, 4, 200, seed=5))


# ---- what is heard ----


def test_copies_agree_on_the_levels_that_follow_where_the_song_repeats_itself(model, song):
    x = song[None, :, :1237].repeat(1, 1, 8)
    outlook = model.encode_context(x[..., :CHUNK]).outlook
    truth = model.levels(x[..., CHUNK : 2 * CHUNK])
    assert outlook.shape == (1, *model.config.pair_shapes["outlook"])
    levels, spread = outlook.chunk(2, dim=1)
    assert levels.shape == spread.shape == truth.shape
    assert (levels - truth).abs().mean() < 0.05
    assert spread.mean() < 0.05
    assert truth.std() > 0.5


def test_copies_disagree_where_nothing_repeats_itself(model):
    _, spread = model.encode_context(noise(1, 2, CHUNK)).outlook.chunk(2, dim=1)
    assert spread.mean() > 0.1


def test_level_of_all_bands_rises_by_a_neper_where_the_sound_is_e_times_as_loud(model, song):
    x = song[None, :, :CHUNK]
    rise = model.levels(math.e * x) - model.levels(x)
    loud = model.levels(x) > -1.5  # of the quietest levels none matters
    assert rise[loud].mean().item() == pytest.approx(1, abs=0.05)


def test_context_and_outlook_are_the_same_whatever_the_target_is(model, song):
    x = torch.cat([song[None, :, :CHUNK], 0.1 * noise(1, 2, CHUNK)], dim=-1)
    pair, other = model.encode_pair(song[None, :, : 2 * CHUNK]), model.encode_pair(x)
    assert {name: part.shape[1:] for name, part in pair.items()} == model.config.pair_shapes
    for name in ("context", "outlook"):
        assert torch.equal(pair[name], other[name])
    for name in ("target", "levels"):
        assert not torch.allclose(pair[name], other[name], atol=0.1)


@torch.no_grad()
def test_parts_of_a_pair_are_what_is_told_of_its_first_half_and_what_the_second_is(model, song):
    x = song[None, :, : 2 * CHUNK]
    pair, context = model.encode_pair(x), model.encode_context(x[..., :CHUNK])
    assert torch.equal(pair["context"], context.latents)
    assert torch.equal(pair["outlook"], context.outlook)
    assert torch.equal(pair["target"], model.encode(x)[..., 200:])
    assert torch.equal(pair["levels"], model.levels(x[..., CHUNK:]))


def test_further_on_the_copies_are_heard_further_on(model, song):
    """From a start behind the cut on, and trusted as in their own sound, whatever the own sound is by then."""
    x, own = song[None, :, :CHUNK], 0.1 * noise(1, 2, CHUNK)
    copies = model.copies(x)
    context = model.encode_context(own, copies, start=CHUNK)
    assert torch.equal(context.latents, model.encode(own))
    levels = torch.stack([model.levels(played) for played in copies.play(CHUNK, CHUNK).unbind(1)], dim=1)
    expected = expectation(levels, agreement(past_error(model.levels(x), copies)))
    assert torch.allclose(context.outlook, torch.cat(expected, dim=1), atol=1e-5)
    assert not torch.allclose(context.outlook, model.encode_context(own, copies).outlook, atol=0.1)


def test_batch_hears_what_its_songs_hear_alone(model):
    songs = noise(2, 2, CHUNK)
    both, alone = model.encode_context(songs), model.encode_context(songs[1:])
    assert torch.allclose(both.latents[1:], alone.latents, atol=1e-5)
    assert torch.allclose(both.outlook[1:], alone.outlook, atol=1e-4)


def test_legacy_hears_its_latents_and_no_repetition(song):
    model, x = legacy(), song[None, :, : 2 * CHUNK]
    heard, following = x.split(CHUNK, dim=-1)
    context = model.encode_context(heard, model.copies(heard), start=0)
    assert torch.equal(context.latents, model.encode(heard))
    assert context.outlook is None
    latents, levels = model.predict(context, 8, 1.0, 0, 1.0)
    assert torch.equal(latents, model.core(context.latents))
    assert levels is None
    pair = model.encode_pair(x)
    assert torch.equal(pair["context"], context.latents)
    assert torch.equal(pair["target"], model.encode(following))


# ---- prediction ----


def standard(model: ContinuationModel, context: Context) -> Context:
    return dataclasses.replace(context, latents=model.standardise(context.latents))


def test_guidance_1_is_the_plain_flow(model, context):
    z = noise(2, 4, 200, seed=5)
    tokens = model.core(standard(model, context))
    for step in range(3):
        z = z + model.core.head(z, tokens, torch.full((2,), step / 3)) / 3
    predicted = model.predict(context, steps=3, guidance=1.0, seed=5)
    assert torch.equal(predicted.latents, model.destandardise(z))
    assert torch.equal(predicted.levels, model.core.levels(tokens, context))


@pytest.mark.parametrize(("guidance", "runs"), [(1.0, 1), (2.0, 2)])
def test_transformer_runs_once_whatever_the_steps_and_once_more_for_guidance(model, context, guidance, runs):
    ran = []
    hook = model.core.register_forward_hook(lambda *_: ran.append(1))
    model.predict(context, steps=7, guidance=guidance)
    hook.remove()
    assert len(ran) == runs


def test_guidance_0_does_not_hear_the_context_and_guidance_leads_away_from_that(model):
    first, second = context_of(seed=1, items=1), context_of(seed=2, items=1)
    unheard, plain, strong = (model.predict(first, steps=1, guidance=g).latents for g in (0.0, 1.0, 3.0))
    assert torch.allclose(unheard, model.predict(second, steps=1, guidance=0.0).latents, atol=1e-5)
    assert not torch.allclose(unheard, plain, atol=0.1)
    assert torch.allclose(strong, unheard + 3 * (plain - unheard), atol=1e-3)


def test_levels_do_not_depend_on_how_the_latents_are_sampled(model, context):
    levels = model.predict(context, steps=1).levels
    assert torch.equal(levels, model.predict(context, steps=3, guidance=2.0, seed=7, temperature=0.5).levels)


def test_same_seed_same_latents_and_another_seed_others(model, context):
    torch.manual_seed(1)
    first = model.predict(context, steps=2, seed=3).latents
    torch.manual_seed(2)
    assert torch.equal(first, model.predict(context, steps=2, seed=3).latents)
    assert not torch.allclose(first, model.predict(context, steps=2, seed=4).latents)


def test_temperature_0_does_not_depend_on_the_seed(model, context):
    first, second = (model.predict(context, steps=2, seed=seed, temperature=0.0).latents for seed in (0, 1))
    assert torch.equal(first, second)


def test_network_trained_to_say_the_mean_takes_one_step_from_zero(context):
    model, ran = small(objective="mse"), []
    tokens = model.core(standard(model, context))
    z = model.core.head(torch.zeros(2, 4, 200), tokens, torch.zeros(2))
    model.core.head.register_forward_hook(lambda *_: ran.append(1))
    predicted = model.predict(context, steps=9, guidance=3.0, seed=7)
    assert torch.equal(predicted.latents, model.destandardise(z))
    assert len(ran) == 1


def test_standardised_latents_have_the_tracked_mean_and_deviation():
    model = small()
    z = 3 + 2 * noise(4, 4, 500)
    for _ in range(500):
        model.track_latents(z.mean((0, 2)), z.square().mean((0, 2)))
    standard = model.standardise(z)
    assert torch.allclose(standard.mean((0, 2)), torch.zeros(4), atol=1e-2)
    assert torch.allclose(standard.std((0, 2)), torch.ones(4), atol=1e-2)
    assert torch.allclose(model.destandardise(standard), z, atol=1e-4)


# ---- from samples to samples ----


@pytest.mark.parametrize("seconds", [0.1, 1.2345, 2, 3.3335])
@pytest.mark.parametrize("make", [small, legacy])
def test_generation_has_exactly_the_length_asked_for(make, song, seconds):
    y = make().generate(song, seconds=seconds, steps=1)
    assert y.shape == (2, round(seconds * RATE))
    assert y.dtype == torch.float32
    assert torch.isfinite(y).all()


def test_same_seed_same_samples_and_another_seed_others(model, song, monkeypatch):
    """Where the decoder's own sound is heard."""
    monkeypatch.setattr("continuation.mixer.OWN_LOGIT", 64.0)
    first, again, other = (model.generate(song, seconds=1, seed=seed, steps=2) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


@pytest.mark.parametrize("factor", [0.25, 0.3, 2.0])
@pytest.mark.parametrize("make", [small, legacy])
def test_louder_song_has_the_same_continuation_louder(make, song, factor):
    model = make()
    plain, scaled = (model.generate(x, seconds=1, steps=2) for x in (song, factor * song))
    assert torch.allclose(scaled, factor * plain, atol=1e-3 * plain.abs().max().item())


def test_silence_is_continued_by_something_finite(model):
    assert torch.isfinite(model.generate(torch.zeros(2, CHUNK), seconds=1, steps=1)).all()


def test_numpy_and_tensor_give_the_same_samples(model, song):
    assert torch.equal(model.generate(song.numpy(), 1, steps=1), model.generate(song, 1, steps=1))


@pytest.mark.parametrize("seconds", [1, 5])
def test_untrained_network_goes_on_as_a_song_that_repeats_itself_would(song, seconds):
    """To the sample, over every cut of a longer continuation: so much is learned before the first step."""
    period = 1237
    x = song[:, :period].repeat(1, 12)
    y = untrained().generate(x[:, :CHUNK], seconds, steps=1, with_input=True)
    error = (y - x[:, : y.shape[1]])[:, : CHUNK + seconds * RATE - 100]
    assert error.square().mean() < 1e-3 * x.square().mean()


def test_only_the_last_chunk_is_heard(model, song):
    other_past = torch.cat([noise(2, song.shape[1] - CHUNK), song[:, -CHUNK:]], dim=1)
    assert torch.equal(model.generate(song, 1, steps=1), model.generate(other_past, 1, steps=1))


def test_crossfade_touches_nothing_but_the_last_20_ms_of_the_context(model, song):
    fade = RATE // 50
    whole = model.generate(song, seconds=1, steps=1, with_input=True)
    assert whole.shape == (2, CHUNK + RATE)
    assert torch.allclose(whole[:, : CHUNK - fade], song[:, -CHUNK:-fade], atol=1e-6)
    assert not torch.allclose(whole[:, CHUNK - fade : CHUNK], song[:, -fade:], atol=1e-3)
    assert torch.equal(whole[:, CHUNK:], model.generate(song, seconds=1, steps=1))


def test_crossfade_runs_from_the_song_to_what_the_network_decodes(model, song, monkeypatch):
    """With a decoder that says one constant, the fade is a straight line from the song to that constant."""
    monkeypatch.setattr(model, "decode", lambda z, **_: torch.full((1, 2, z.shape[-1] * 2 * RATE // 100), 1.0))
    fade = RATE // 50
    tail = model.generate(song, seconds=1, steps=1, with_input=True)[:, CHUNK - fade : CHUNK]
    gain = 0.1 / song[:, -CHUNK:].square().mean().sqrt()
    weight = torch.linspace(0, 1, fade)
    assert torch.allclose(tail, (1 - weight) * song[:, -fade:] + weight / gain, atol=1e-5)


def test_longer_generation_hears_its_own_sound_and_plays_copies_of_the_song(model, song, monkeypatch):
    heard, starts, copied, encode_context, copies = [], [], [], model.encode_context, model.copies

    def note(x, its_copies, start):
        heard.append(x[0])
        starts.append(start)
        return encode_context(x, its_copies, start)

    monkeypatch.setattr(model, "encode_context", note)
    monkeypatch.setattr(model, "copies", lambda x: copied.append(x[0]) or copies(x))
    fade = RATE // 50
    whole = model.generate(song, seconds=4, steps=1)
    assert len(copied) == 1
    assert starts == [0, CHUNK]
    assert torch.allclose(at_level(copied[0]), at_level(song[:, -CHUNK:]), atol=1e-5)
    second = at_level(heard[1])[:, :-fade]
    assert torch.allclose(
        second, (whole[:, :CHUNK] * second.norm() / whole[:, : CHUNK - fade].norm())[:, :-fade], atol=1e-5
    )
    first = model.generate(song, seconds=2, steps=1)
    assert torch.equal(whole[:, : CHUNK - fade], first[:, :-fade])


def at_level(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean().sqrt()


def test_every_roll_draws_noise_of_its_own(model, song, monkeypatch):
    seeds, predict = [], model.predict
    monkeypatch.setattr(model, "predict", lambda z, *args: seeds.append(args[2]) or predict(z, *args))
    model.generate(song, seconds=6, seed=3, steps=1)
    assert seeds == [(3 + roll * network.SEED_STRIDE) % 2**32 for roll in range(3)]


def test_errors_in_level_do_not_add_up(model, song, monkeypatch):
    """A decoder at half the level of what is heard gives half the level of the song, after any number of rolls."""
    half = 0.5 * network.CONTEXT_LEVEL
    monkeypatch.setattr(model, "decode", lambda z, **_: torch.full((1, 2, z.shape[-1] * RATE // 100), half))
    sound = model.generate(song, seconds=12, steps=1)
    ends = [sound[:, end - CHUNK // 2 : end].square().mean().sqrt() for end in range(CHUNK, 7 * CHUNK, CHUNK)]
    expected = 0.5 * song[:, -CHUNK:].square().mean().sqrt()
    assert torch.allclose(torch.stack(ends), expected, rtol=1e-2)


def test_every_context_is_heard_at_the_same_level(model, song, monkeypatch):
    levels, encode_context = [], model.encode_context

    def note(x, *more):
        levels.append(x.square().mean().sqrt().item())
        return encode_context(x, *more)

    monkeypatch.setattr(model, "encode_context", note)
    model.generate(song, seconds=5, steps=1)
    assert levels == pytest.approx([network.CONTEXT_LEVEL] * 3, rel=1e-3)


@pytest.mark.parametrize("shape", [(2, CHUNK - 1), (1, CHUNK), (CHUNK,)])
def test_too_little_audio_is_refused_with_what_is_needed(model, shape):
    with pytest.raises(ValueError, match=r"expected \(2, samples\) with at least 2 s"):
        model.generate(torch.zeros(shape))


# ---- numerics and the table ----


def test_bf16_reconstruction_stays_near_fp32(model, song):
    x = song[None]
    with torch.autocast("cpu", torch.bfloat16):
        half = model.decode(model.encode(x), x.shape[-1])
    full = model.reconstruct(x)
    assert half.dtype == torch.float32
    assert (half - full).square().mean() < 0.02 * full.square().mean()


def test_bf16_continuation_with_copies_stays_near_fp32(model, song):
    """Of levels and of copies that are added up in spectra, both in fp32."""
    x = song[None, :, :CHUNK]
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)[1]
    full = model(x)[1]
    assert half.dtype == torch.float32
    assert (half - full).square().mean() < 0.02 * full.square().mean()


def test_table_of_legacy_names_its_layers_parameters_and_flops(capsys):
    model_tables.print_tables("legacy", on_meta(PRESETS["legacy"]))
    printed = capsys.readouterr().out
    assert "legacy: 12000 Hz, 2 channels, latents 64 x 3000 for 10 s" in printed
    assert "251,778 parameters" in printed
    for module in ("encoder.first", "encoder.pool", "core.layer.linear1", "decoder.3"):
        assert f"  {module} " in printed


def test_counted_flops_of_legacys_reconstruction_are_those_counted_by_hand():
    encoder = 60000 * 128 * 2 * 9 + 15000 * 64 * 128 * 7
    decoder = 3000 * 64 * 128 * 7 + 6000 * 128 * 128 * 2 + 12000 * 128 * 128 * 3 + 60000 * 128 * 2 * 9
    counted = model_tables.gigaflops(on_meta(PRESETS["legacy"]))
    assert next(iter(counted.values())) == pytest.approx(2 * (encoder + decoder) / 1e9)


def test_rows_of_the_table_hold_all_convolutions_and_linear_layers():
    model = on_meta(with_overrides("tiny", **SMALL))
    rows = model_tables.layer_rows(model)
    expected = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Linear))]
    counted = sum(count for _, kind, _, count in rows if kind in ("Conv1d", "Linear"))
    assert counted == sum(p.numel() for module in expected for p in module.parameters())
    assert ("encoder.pool", "MaxPool1d", "8 x 1000", 0) in rows
