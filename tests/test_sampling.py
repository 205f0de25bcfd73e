"""Generation: what a prediction depends on, and that a continuation has the length, level and past asked for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_networks import CHUNK, RATE, noise, small_context, small_network, untrained_network

import model as network
from continuation.context import Context
from model import ContinuationModel

torch.set_num_threads(1)


# Prediction


def standard(model: ContinuationModel, context: Context) -> Context:
    return dataclasses.replace(context, latents=model.standardise(context.latents))


def test_guidance_1_is_the_plain_flow(model, context):
    z, velocities = noise(2, 4, 200, seed=5), []
    tokens = model.core(standard(model, context))
    for step in range(3):
        velocities.append(model.core.head(z, tokens, torch.full((2,), step / 3)))
        z = z + (velocities[0] if step == 0 else 1.5 * velocities[-1] - 0.5 * velocities[-2]) / 3
    predicted = model.predict(context, steps=3, guidance=1.0, seed=5)
    assert torch.equal(predicted, model.destandardise(z))


def test_a_flow_that_speeds_up_ends_where_it_should(model, context, monkeypatch):
    monkeypatch.setattr(model.core.head, "forward", lambda z, tokens, time: 2 * time[:, None, None].expand_as(z))
    end = model.destandardise(noise(2, 4, 200, seed=5) + 1)
    error = [(model.predict(context, steps, seed=5) - end).abs().max() for steps in (8, 16)]
    assert error[0] < 0.02 and error[1] < 0.3 * error[0]  # Euler's steps: an eighth, and half of it


@pytest.mark.parametrize(("guidance", "runs"), [(1.0, 1), (2.0, 2)])
def test_transformer_runs_once_whatever_the_steps_and_once_more_for_guidance(model, context, guidance, runs):
    ran = []
    hook = model.core.register_forward_hook(lambda *_: ran.append(1))
    model.predict(context, steps=7, guidance=guidance)
    hook.remove()
    assert len(ran) == runs


def test_guidance_0_does_not_hear_the_context_and_guidance_leads_away_from_that(model):
    first, second = small_context(seed=1, items=1), small_context(seed=2, items=1)
    unheard, plain, strong = (model.predict(first, steps=1, guidance=g) for g in (0.0, 1.0, 3.0))
    assert torch.allclose(unheard, model.predict(second, steps=1, guidance=0.0), atol=1e-5)
    assert not torch.allclose(unheard, plain, atol=0.1)
    assert torch.allclose(strong, unheard + 3 * (plain - unheard), atol=1e-3)


def test_same_seed_same_latents_and_another_seed_others(model, context):
    torch.manual_seed(1)
    first = model.predict(context, steps=2, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, model.predict(context, steps=2, seed=3))
    assert not torch.allclose(first, model.predict(context, steps=2, seed=4))


def test_temperature_0_does_not_depend_on_the_seed(model, context):
    first, second = (model.predict(context, steps=2, seed=seed, temperature=0.0) for seed in (0, 1))
    assert torch.equal(first, second)


def test_network_trained_to_say_the_mean_takes_one_step_from_zero(context):
    model, ran = small_network(objective="mse"), []
    tokens = model.core(standard(model, context))
    z = model.core.head(torch.zeros(2, 4, 200), tokens, torch.zeros(2))
    model.core.head.register_forward_hook(lambda *_: ran.append(1))
    predicted = model.predict(context, steps=9, guidance=3.0, seed=7)
    assert torch.equal(predicted, model.destandardise(z))
    assert len(ran) == 1


def test_standardised_latents_have_the_tracked_mean_and_deviation():
    model = small_network()
    z = 3 + 2 * noise(4, 4, 500)
    for _ in range(500):
        model.track_latents(z.mean((0, 2)), z.square().mean((0, 2)))
    standard = model.standardise(z)
    assert torch.allclose(standard.mean((0, 2)), torch.zeros(4), atol=1e-2)
    assert torch.allclose(standard.std((0, 2)), torch.ones(4), atol=1e-2)
    assert torch.allclose(model.destandardise(standard), z, atol=1e-4)


# From samples to samples


@pytest.mark.parametrize("seconds", [0.1, 1.2345, 2, 3.3335])
@pytest.mark.parametrize("preset", ["tiny", "legacy"])
def test_generation_has_exactly_the_length_asked_for(preset, song, seconds):
    y = small_network(preset).generate(song, seconds=seconds, steps=1)
    assert y.shape == (2, round(seconds * RATE))
    assert y.dtype == torch.float32
    assert torch.isfinite(y).all()


def test_same_seed_same_samples_and_another_seed_others(model, song, monkeypatch):
    """Where the decoder's own sound is heard."""
    monkeypatch.setattr("continuation.mixer.OWN_ERROR", 1e-9)
    first, again, other = (model.generate(song, seconds=1, seed=seed, steps=2) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


@pytest.mark.parametrize("factor", [0.25, 0.3, 2.0])
@pytest.mark.parametrize("preset", ["tiny", "legacy"])
def test_louder_song_has_the_same_continuation_louder(preset, song, factor):
    model = small_network(preset)
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
    y = untrained_network().generate(x[:, :CHUNK], seconds, steps=1, with_input=True)
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


def test_bf16_continuation_with_copies_stays_near_fp32(model, song):
    """Copies are added up in spectra, in fp32."""
    x = song[None, :, :CHUNK]
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)[1]
    full = model(x)[1]
    assert half.dtype == torch.float32
    assert (half - full).square().mean() < 0.02 * full.square().mean()
