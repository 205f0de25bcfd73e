"""Validation: which songs are held against each other, what is kept, and that a loss that is not finite shows."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from small_networks import untrained_network
from tiny import CHANNELS, CHUNK, RATE, write_dataset

from continuation import losses, metrics, validation
from continuation.dataset import open_dataset
from continuation.windows import Windows

torch.set_num_threads(1)


@pytest.fixture
def checks(tmp_path) -> validation.Validation:
    """Two validation songs, of four pairs and of one."""
    model = untrained_network(sample_rate=RATE, channels=CHANNELS, chunk_samples=CHUNK)
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


def test_songs_are_different_ones_in_their_middle(checks):
    assert checks.songs(3) == [2, 4]
    assert checks.songs(1) == [2]


def test_gain_is_what_another_context_costs_more(checks, monkeypatch):
    """With a loss of 1 for a target's own context and of 1.5 for any other."""
    pairs = [pair for pair, _ in checks.encoded_pairs().values()]

    def fixed_time_losses(model, given, noise):
        is_own = any(all(torch.equal(given[part], pair[part]) for part in pair) for pair in pairs)
        return torch.tensor([1.0 if is_own else 1.5])

    monkeypatch.setattr(losses, "fixed_time_losses", fixed_time_losses)
    figures = checks.figures(2, codec_learns=False)
    assert figures["latent_mse"] == 1.0
    assert figures["loss"] == 1.0 + figures["equaliser_loss"]
    assert figures["context_gain"] == figures["context_gain_same_song"] == pytest.approx(0.5)


def test_foreign_context_is_latents_and_outlook_of_other_music_and_the_target_stays(checks, monkeypatch):
    own, seen = checks.encoded_pairs(), []
    monkeypatch.setattr(checks, "prediction_losses", lambda number, pair: seen.append(pair) or torch.zeros(1))
    first, other = own[0][0], own[4][0]
    checks.loss_with(other, 0, first)
    assert seen[0].keys() == first.keys()
    for part in ("context", "outlook"):
        assert torch.equal(seen[0][part], other[part])
    assert torch.equal(seen[0]["target"], first["target"])


def test_encoded_pair_is_rounded_as_the_cache_rounds_it(checks):
    pair, _ = checks.encoded_pairs()[0]
    exact = checks.model.encode_pair(checks.audio(0))
    assert pair.keys() == exact.keys()
    assert all(torch.equal(pair[part], exact[part].half().float()) for part in pair)


def test_latents_are_kept_until_the_encoder_learns(checks):
    def of_latents(codec_learns: bool) -> dict[str, float]:
        figures = checks.figures(2, codec_learns)
        names = ("loss", "latent_mse", "context_gain", "context_gain_same_song")
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


def test_distance_is_of_spectra_onsets_and_notes(checks):
    truth, sound = (checks.audio(pair)[..., :CHUNK] for pair in (0, 4))
    one, other = (x[0].numpy() for x in (truth, sound))
    onsets = metrics.onset_correlation(metrics.Sound(one, RATE), metrics.Sound(other, RATE))
    expected = metrics.mr_stft_distance(one, other) + (1 - onsets) + (1 - metrics.chroma_cosine(one, other, RATE))
    assert validation.continuation_distance(truth, sound, RATE) == pytest.approx(expected)
    assert validation.continuation_distance(truth, truth, RATE) == pytest.approx(0, abs=0.01)


def test_distance_of_silence_has_no_onsets_and_no_notes(checks):
    truth = checks.audio(0)[..., :CHUNK]
    silence = torch.zeros_like(truth)
    expected = metrics.mr_stft_distance(truth[0].numpy(), silence[0].numpy()) + 2
    assert validation.continuation_distance(truth, silence, RATE) == pytest.approx(expected)


def test_decoded_continuation_is_one_step(checks, monkeypatch):
    given, decode = [], checks.model.decode

    def note(z, length, copies):
        given.append(z)
        return decode(z, length, copies)

    monkeypatch.setattr(checks.model, "decode", note)
    checks.against_repetition(1)
    predicted = checks.model.predict(checks.model.encode_context(checks.audio(1)[..., :CHUNK]), steps=1)
    assert torch.equal(given[0], predicted)


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


def test_prediction_loss_that_is_not_finite_at_one_pair_is_not_left_out(checks, monkeypatch):
    scales = iter([1.0, 1.0, 1.0, math.nan])
    found = losses.fixed_time_losses

    def broken(*given):
        scale = next(scales, 1.0)
        return scale * found(*given)

    assert math.isfinite(checks.figures(2, codec_learns=False)["loss"])
    monkeypatch.setattr(losses, "fixed_time_losses", broken)
    assert not math.isfinite(checks.figures(2, codec_learns=False)["loss"])
