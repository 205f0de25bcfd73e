"""The core: what its tokens and its head depend on, and its condition."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from small_networks import CHUNK, noise, small_context, untrained_network
from torch import nn

from continuation import transformer
from continuation.context import Context
from continuation.mixer import copy_weights, expectation
from continuation.transformer import patchify, unpatchify

torch.set_num_threads(1)


# Tokens


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
    assert torch.equal(model.core(context, unheard), model.core(small_context(seed=9), unheard))
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


def test_louder_outlook_leaves_the_tokens(model, context):
    offset = noise(2, model.config.level_rows, 1)
    louder = dataclasses.replace(context, outlook=context.outlook + F.pad(offset, (0, 0, 0, offset.shape[1])))
    assert torch.allclose(model.core(louder), model.core(context), atol=1e-4)


def test_spread_of_the_copies_counts_as_it_is(model, context):
    """Also one that all steps have."""
    offset = torch.ones(2, model.config.level_rows, 1)
    unsure = dataclasses.replace(context, outlook=context.outlook + F.pad(offset, (0, 0, offset.shape[1], 0)))
    assert not torch.allclose(model.core(unsure), model.core(context), atol=0.1)


def test_items_of_a_batch_do_not_hear_each_other(model, context):
    heard = torch.tensor([1.0, 0.3])
    second = Context(context.latents[1:], context.outlook[1:])
    assert torch.allclose(model.core(context, heard)[1:], model.core(second, heard[1:]), atol=1e-5)


# The head of the flow

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
    model = untrained_network()
    latents = model.predict(context, steps=3, seed=5)
    assert torch.equal(latents, noise(2, 4, 200, seed=5))


# The context


def test_copies_agree_on_the_levels_that_follow_where_the_song_repeats_itself(model, song):
    x = song[None, :, :1240].repeat(1, 1, 8)  # half a step beside whole steps
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
    assert not torch.allclose(pair["target"], other["target"], atol=0.1)


@torch.no_grad()
def test_parts_of_a_pair_are_what_is_told_of_its_first_half_and_what_the_second_is(model, song):
    x = song[None, :, : 2 * CHUNK]
    pair, context = model.encode_pair(x), model.encode_context(x[..., :CHUNK])
    assert torch.equal(pair["context"], context.latents)
    assert torch.equal(pair["outlook"], context.outlook)
    assert torch.equal(pair["target"], model.encode(x)[..., 200:])


def test_further_on_the_copies_are_heard_further_on(model, song):
    """From a start behind the cut on, to the nearest step, and trusted as in their own sound, whatever the own sound
    is by then."""
    x, own = song[None, :, :CHUNK], 0.1 * noise(1, 2, CHUNK)
    copies = model.copies(x)
    context, at_once = model.encode_context(own, copies, start=CHUNK), model.encode_context(own, copies).outlook
    assert torch.equal(context.latents, model.encode(own))
    levels = torch.stack([model.levels(played) for played in copies.play(CHUNK, CHUNK).unbind(1)], dim=1)
    expected = torch.cat(expectation(levels, copy_weights(copies)), dim=1)
    assert (context.outlook - expected).abs().mean() < 0.3 * (at_once - expected).abs().mean()


def test_batch_hears_what_its_songs_hear_alone(model):
    songs = noise(2, 2, CHUNK)
    both, alone = model.encode_context(songs), model.encode_context(songs[1:])
    assert torch.allclose(both.latents[1:], alone.latents, atol=1e-5)
    assert torch.allclose(both.outlook[1:], alone.outlook, atol=1e-4)


def test_legacy_hears_its_latents_and_no_repetition(song):
    model, x = untrained_network("legacy"), song[None, :, : 2 * CHUNK]
    heard, following = x.split(CHUNK, dim=-1)
    context = model.encode_context(heard, model.copies(heard), start=0)
    assert torch.equal(context.latents, model.encode(heard))
    assert context.outlook is None
    assert torch.equal(model.predict(context, 8, 1.0, 0, 1.0), model.core(context.latents))
    pair = model.encode_pair(x)
    assert torch.equal(pair["context"], context.latents)
    assert torch.equal(pair["target"], model.encode(following))
