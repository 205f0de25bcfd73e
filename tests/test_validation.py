"""Validation: which songs are held against each other, what is kept, and that a loss that is not finite shows."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from tiny import CHANNELS, CHUNK, RATE, write_dataset

from continuation import losses, validation
from continuation.dataset import open_dataset
from continuation.windows import Windows
from model import ContinuationModel, with_overrides

torch.set_num_threads(1)
SMALL = {
    "encoder_widths": (8, 8), "encoder_blocks": (1, 1), "decoder_widths": (8, 8), "decoder_blocks": (1, 1),
    "latent_channels": 4, "core_layers": 1, "core_width": 16, "core_heads": 2,
}  # fmt: skip


@pytest.fixture
def checks(tmp_path) -> validation.Validation:
    """Two validation songs, of four pairs and of one."""
    torch.manual_seed(0)
    shape = {"sample_rate": RATE, "channels": CHANNELS, "chunk_samples": CHUNK}
    model = ContinuationModel(with_overrides("tiny", **SMALL | shape)).eval().requires_grad_(False)
    meta, splits = open_dataset(write_dataset(tmp_path / "dataset"))
    return validation.Validation(model, Windows(splits["val"], meta), seed=0, autocast=nullcontext)


def test_means_are_over_what_is_defined_but_the_loss_hides_nothing():
    means = validation.means_of([{"loss": 1.0, "gain": math.nan}, {"loss": math.inf, "gain": 2.0}])
    assert means == {"loss": math.inf, "gain": 2.0}
    assert math.isnan(validation.mean_of([math.nan]))


def test_reconstruction_loss_that_is_not_finite_at_one_window_length_is_not_left_out(checks, monkeypatch):
    shortest, parts = min(losses.spectral_sizes(RATE)), losses.reconstruction_parts

    def broken(*given):
        scale = math.nan if given[-1]["size"] == shortest else 1.0
        return {name: scale * value for name, value in parts(*given).items()}

    assert math.isfinite(checks.figures(1, codec_learns=True)["loss"])
    monkeypatch.setattr(losses, "reconstruction_parts", broken)
    assert not math.isfinite(checks.figures(1, codec_learns=True)["loss"])


def test_gain_is_what_another_context_costs_more(checks, monkeypatch):
    """With a loss of 1 for a target's own context and of 1.5 for any other."""
    pairs = [(context, target) for context, target, _ in checks.latents()]

    def fixed_time_losses(model, context, target, noise):
        is_own = any(torch.equal(context, own) and torch.equal(target, its) for own, its in pairs)
        return torch.tensor([1.0 if is_own else 1.5])

    monkeypatch.setattr(losses, "fixed_time_losses", fixed_time_losses)
    figures = checks.figures(2, codec_learns=False)
    assert figures["prediction"] == figures["latent_mse"] == 1.0
    assert figures["loss"] == pytest.approx(1.0 + figures["continuation"])
    assert figures["context_gain"] == pytest.approx(0.5)


def test_latents_are_kept_until_the_encoder_learns(checks):
    def of_latents(codec_learns: bool) -> dict[str, float]:
        figures = checks.figures(2, codec_learns)
        names = ("prediction", "latent_mse", "context_gain", "context_gain_same_song")
        return {name: figures[name] for name in names}

    first = of_latents(codec_learns=False)
    for weights in checks.model.encoder.parameters():
        weights.mul_(1.5)
    assert of_latents(codec_learns=False) == first
    assert of_latents(codec_learns=True) != first


def test_continuation_and_loop_are_distances_from_the_true_continuation(checks, monkeypatch):
    """With a decoder that plays the loop, and with one that knows the truth; the input repeated is neither."""
    chunk, pairs = CHUNK, checks.pairs(2 * validation.DECODED)
    truths = iter([checks.audio(pair)[..., chunk:] for pair in pairs])
    monkeypatch.setattr(checks.model, "decode", lambda z, length, copies: copies.play(0, length)[:, 0])
    figures = checks.figures(2, codec_learns=True)
    assert figures["continuation"] == figures["loop"] > 0.5
    assert figures["input_repeated"] > 0.5
    assert figures["input_repeated"] != figures["loop"]
    monkeypatch.setattr(checks.model, "decode", lambda z, length, copies: next(truths))
    perfect = checks.figures(2, codec_learns=True)
    assert perfect["continuation"] < 0.02
    assert [perfect[name] for name in ("loop", "input_repeated")] == [
        figures[name] for name in ("loop", "input_repeated")
    ]


def test_distance_is_the_mean_over_all_window_lengths_and_both_stereo_bases(checks, monkeypatch):
    asked, scored = [], losses.continuation_losses

    def note(truth, sound, *draw):
        asked.append(draw)
        return scored(truth, sound, *draw)

    monkeypatch.setattr(losses, "continuation_losses", note)
    truth, sound = 0.1 * torch.randn(2, 1, CHANNELS, CHUNK)
    found = checks.continuation_loss(truth, sound)
    assert set(asked) == {(RATE, size, basis) for size in losses.spectral_sizes(RATE) for basis in (False, True)}
    each = [losses.continuation_sum(scored(truth, sound, *draw)).item() for draw in asked]
    assert found == pytest.approx(sum(each) / len(each))


def test_decoded_continuation_is_one_step_from_the_pairs_own_noise(checks, monkeypatch):
    """As the joint part trains it."""
    given, decode = [], checks.model.decode
    monkeypatch.setattr(checks.model, "decode", lambda z, *rest: given.append(z) or decode(z, *rest))
    checks.against_repetition(1)
    heard = checks.audio(1)[..., :CHUNK]
    noise = checks.noise(1, given[0].shape)
    assert torch.equal(given[0], checks.model.sample(checks.model.hear(heard), noise, 1, 1.0))


def test_continuation_hears_nothing_of_the_truth(checks, monkeypatch):
    played = []
    decode, audio = checks.model.decode, checks.audio

    def note(z, length, copies):
        played.append(decode(z, length, copies))
        return played[-1]

    monkeypatch.setattr(checks.model, "decode", note)
    first = checks.against_repetition(0)
    future = 0.1 * torch.randn(1, CHANNELS, CHUNK)
    monkeypatch.setattr(checks, "audio", lambda pair: torch.cat([audio(pair)[..., :CHUNK], future], dim=-1))
    assert checks.against_repetition(0) != first
    assert torch.equal(*played)


def test_continuation_that_is_not_finite_at_one_pair_is_not_left_out_of_the_loss(checks, monkeypatch):
    scales = iter([1.0, math.nan])
    decode = checks.model.decode
    monkeypatch.setattr(checks.model, "decode", lambda z, *rest: next(scales, 1.0) * decode(z, *rest))
    assert not math.isfinite(checks.figures(2, codec_learns=True)["loss"])


def test_continuation_loss_that_is_not_finite_at_one_window_length_is_not_left_out(checks, monkeypatch):
    shortest, parts = min(losses.spectral_sizes(RATE)), losses.continuation_losses

    def broken(truth, sound, rate, size, in_mid_side):
        scale = math.nan if size == shortest else 1.0
        return {name: scale * value for name, value in parts(truth, sound, rate, size, in_mid_side).items()}

    truth, sound = 0.1 * torch.randn(2, 1, CHANNELS, CHUNK)
    assert math.isfinite(checks.continuation_loss(truth, sound))
    monkeypatch.setattr(losses, "continuation_losses", broken)
    assert not math.isfinite(checks.continuation_loss(truth, sound))
