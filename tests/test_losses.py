"""Losses with known answers; a batch's loss is that of its items one by one; the target is never heard as context."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import synth
import torch

from continuation import losses, metrics, spectral
from model import CONTEXT_LEVEL, ContinuationModel, with_overrides

torch.set_num_threads(1)
RATE = 2000
CHUNK = 2 * RATE
CROP_LATENTS = 100
SMALL = {
    "sample_rate": RATE, "chunk_samples": CHUNK, "encoder_widths": (8, 8), "encoder_blocks": (1, 1),
    "decoder_widths": (8, 8), "decoder_blocks": (1, 1), "latent_channels": 4, "core_layers": 1, "core_width": 16,
    "core_heads": 2, "core_dropout": 0.0,
}  # fmt: skip
DRAW = {"sample_rate": RATE, "size": 256, "in_mid_side": True}


def small(**fields) -> ContinuationModel:
    torch.manual_seed(0)
    model = ContinuationModel(with_overrides("tiny", **SMALL | fields))
    for weights in (*model.core.parameters(), model.decoder.mixer.to_logits.weight):
        torch.nn.init.normal_(weights, 0, 0.3)
    torch.nn.init.zeros_(model.decoder.mixer.prior)  # all sources are heard
    return model


def legacy() -> ContinuationModel:
    torch.manual_seed(0)
    return ContinuationModel(with_overrides("legacy", sample_rate=RATE, chunk_samples=CHUNK))


def noise(*shape: int, seed: int = 0, level: float = 1.0) -> torch.Tensor:
    return level * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tone(frequency: float, seconds: float = 1.0, rate: int = 12000, channels: int = 2) -> torch.Tensor:
    return torch.from_numpy(synth.tone(frequency, seconds, rate, channels, level=0.2))[None]


def pair_batch(items: int, times=(0.0, 0.8, 0.4)) -> dict[str, torch.Tensor]:
    """What PairItems gives: 4 s of audio, latents, all noise, the copies that may be played, and the place of what is
    continued."""
    shape, crop = (items, 4, 200), (items, 4, CROP_LATENTS)
    return {
        "x": noise(items, 2, 2 * CHUNK, seed=1, level=0.1),
        "context": noise(items, 4, 600, seed=2), "target": noise(*shape, seed=3), "flow_noise": noise(*shape, seed=4),
        "context_noise": noise(*shape, seed=5, level=0.1), "posterior_noise": noise(*crop, seed=6),
        "robust_noise": noise(*crop, seed=7, level=0.5), "time": torch.tensor(times[:items]),
        "heard": torch.tensor([1.0, 0.5, 0.0])[:items],
        "present": torch.tensor([[True] * 6, [True, False, True] * 2, [False] * 6])[:items],
        "place": torch.full((items,), 0.5),
    }  # fmt: skip


def items_of(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    count = len(batch["x"])
    return [{name: value[i : i + 1] for name, value in batch.items()} for i in range(count)]


# ---- every loss is one value an item ----

STEPS = {
    "joint": lambda model, batch: losses.joint_step(model, batch, DRAW),
    "predict": losses.predict_step,
    "legacy stage 1": lambda model, batch: losses.legacy_step(model, batch, predict=False),
    "legacy stage 2": lambda model, batch: losses.legacy_step(model, batch, predict=True),
}


@pytest.mark.parametrize("step", STEPS)
def test_loss_of_a_batch_is_the_losses_of_its_items_one_by_one(step):
    model = legacy() if "legacy" in step else small()
    batch = pair_batch(3)
    with torch.no_grad():
        loss, parts = STEPS[step](model, batch)
        alone = [STEPS[step](model, item) for item in items_of(batch)]
    assert loss.shape == (3,)
    assert torch.allclose(loss, torch.cat([item[0] for item in alone]), rtol=1e-4)
    for name, part in parts.items():
        assert torch.allclose(part, torch.cat([item[1][name] for item in alone]), rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("in_mid_side", [False, True])
@pytest.mark.parametrize("size", [64, 512])
def test_reconstruction_loss_of_a_batch_is_those_of_its_items(size, in_mid_side):
    x, y = noise(3, 2, RATE, seed=1), noise(3, 2, RATE, seed=2)
    y[1] *= 0.01
    parts = losses.reconstruction_losses(x, y, RATE, size, in_mid_side)
    for i in range(3):
        alone = losses.reconstruction_losses(x[i : i + 1], y[i : i + 1], RATE, size, in_mid_side)
        for name, part in parts.items():
            assert part[i].item() == pytest.approx(alone[name].item(), rel=1e-4), name


@pytest.mark.parametrize("latents", [31, 50])
def test_stage_1_takes_any_number_of_latents(latents):
    batch = pair_batch(2) | {"x": noise(2, 2, 20 * latents, level=0.1)}
    batch |= {name: noise(2, 4, latents) for name in ("posterior_noise", "robust_noise")}
    assert torch.isfinite(losses.reconstruct_step(small(), batch, DRAW)[0]).all()


def test_stage_1_step_tracks_the_latents_and_gives_one_loss_an_item():
    model = small()
    batch = pair_batch(2) | {"x": noise(2, 2, RATE, level=0.1)}
    before = model.latent_std.clone()
    loss, parts = losses.reconstruct_step(model, batch, DRAW)
    assert loss.shape == (2,)
    assert torch.allclose(loss, losses.total_loss(parts))
    assert not torch.equal(before, model.latent_std)


# ---- spectra ----


@pytest.mark.parametrize("rate", [12000, 24000, 48000])
def test_windows_keep_their_lengths_in_seconds_at_every_rate(rate):
    sizes = losses.spectral_sizes(rate)
    assert len(sizes) == losses.SPECTRAL_SIZES
    assert sizes[0] / rate == pytest.approx(losses.SPECTRAL_SECONDS)
    assert all(large == 2 * small for large, small in pairwise(sizes))


def test_window_length_at_44100_hz_is_the_nearest_power_of_two():
    assert losses.spectral_sizes(44100)[0] == 8192


def test_stft_equals_torchs():
    x = noise(2, 2, 1000)
    ours = torch.view_as_complex(losses.spectrum(x, 128)[0])
    theirs = torch.stft(
        x.flatten(0, 1), 128, 32, window=torch.hann_window(128), center=False, return_complex=True
    )  # (batch x channels, bins, frames)
    assert torch.allclose(ours.flatten(0, 1).transpose(1, 2), theirs, atol=1e-4)


def test_mid_and_side_of_equal_channels_are_the_channel_and_silence():
    x = noise(1, 1, 100).expand(1, 2, 100)
    mid, side = spectral.mid_side(x).unbind(1)
    assert torch.equal(mid, x[:, 0])
    assert torch.equal(side, torch.zeros_like(side))
    mono = noise(1, 1, 100)
    assert spectral.mid_side(mono) is mono


def test_perfect_reconstruction_costs_nothing():
    x = noise(2, 2, RATE)
    for name, part in losses.reconstruction_losses(x, x.clone(), RATE, 128, True).items():
        assert part.abs().max() < 0.02, name


def test_doubled_magnitudes_are_ln_2_away_by_bin_and_by_band_and_their_error_is_as_large_as_the_reference():
    magnitude = 100 + 900 * torch.rand(2, 2, 20, 65, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        losses.spectral_distance(magnitude, 2 * magnitude), torch.tensor(3.5 * math.log(2) + 1), atol=1e-3
    )


def test_level_of_a_band_is_that_of_its_power_however_it_is_spread():
    """One loud bin and even noise of the same power are equally loud: a single bin's distance cannot say that."""
    even = torch.full((1, 1, 1, 513), 100.0)
    peak = torch.zeros(1, 1, 1, 513)
    peak[..., 1::16] = 100.0 * math.sqrt(16)
    assert torch.allclose(losses.band_power(even), losses.band_power(peak))
    assert torch.allclose(losses.band_power(even), torch.tensor(100.0**2))


def test_loud_frames_that_are_too_soft_count_though_most_frames_have_the_right_level():
    right = torch.full((1, 1, 10, 65), 10.0)
    right[:, :, 0] = 1000.0
    soft = right.clone()
    soft[:, :, 0] = 500.0
    by_frame = math.log(2) / 10
    whole = math.log((1000**2 + 9 * 10**2) / (500**2 + 9 * 10**2)) / 2
    convergence = 500 / math.sqrt(1000**2 + 9 * 10**2)
    expected = 3 * by_frame + 0.5 * whole + convergence
    assert torch.allclose(losses.spectral_distance(right, soft), torch.tensor(expected), atol=1e-2)


def phase_distance(x: torch.Tensor, y: torch.Tensor, rate: int = 12000, size: int = 512) -> float:
    return losses.phase_distance(losses.spectrum(x, size), losses.spectrum(y, size), rate).item()


def test_phases_count_where_they_are_asked_for_and_not_above():
    low, high = tone(0.6 * spectral.TONES_HZ[0]), tone(1.2 * losses.PHASES_HZ[1])
    assert phase_distance(low, -low) > 1
    assert phase_distance(low + high, low - high) < 0.05


def test_phases_that_fade_out_count_in_part():
    whole, gone = spectral.TONES_HZ
    wrong = [
        phase_distance(tone(300) + tone(f), tone(300) - tone(f))
        for f in (0.9 * whole, (whole + gone) / 2, 1.2 * gone)
    ]
    assert wrong[0] > 1.3 * wrong[1]
    assert wrong[1] > 3 * wrong[2]


def test_waveform_mse_of_a_constant_offset_is_its_square():
    x = noise(2, 2, 100)
    assert torch.allclose(
        losses.waveform_mse(x, x + torch.tensor([0.5, 2.0])[:, None, None]), torch.tensor([0.25, 4.0])
    )


@pytest.mark.parametrize(
    ("mean", "log_variance", "expected"), [(0.0, 0.0, 0.0), (1.0, 0.0, 0.5), (0.0, 1.0, (math.e - 2) / 2)]
)
def test_kl_divergence_from_a_standard_normal_is_the_known_one(mean, log_variance, expected):
    shape = (2, 4, 10)
    found = losses.kl_divergence(torch.full(shape, mean), torch.full(shape, log_variance))
    assert torch.allclose(found, torch.full((2,), expected), atol=1e-6)


# ---- levels ----


def test_level_divergence_is_least_at_the_mean_power_of_noise():
    """Of the levels of normal noise a mean of |ln ratio| would say 1.6 dB less."""
    reference = torch.randn(1, 1, 100, 100, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).abs()
    decibels = torch.arange(-4, 4.1, 0.25)
    levels = (torch.full_like(reference, 10 ** (d / 20)) for d in decibels)
    found = torch.cat([losses.level_divergence(reference, level) for level in levels])
    assert abs(decibels[found.argmin()]) <= 0.5
    logarithms = (reference[..., None].log() - decibels * math.log(10) / 20).abs().mean((0, 1, 2, 3))
    assert decibels[logarithms.argmin()] == pytest.approx(-1.6, abs=0.3)


def test_level_divergence_is_zero_for_equal_levels_and_one_value_an_item():
    reference, estimate = noise(3, 2, 10, 20, seed=1).abs(), noise(3, 2, 10, 20, seed=2).abs()
    assert losses.level_divergence(reference, reference).abs().max() < 1e-5
    found = losses.level_divergence(reference, estimate)
    assert torch.allclose(found[1:2], losses.level_divergence(reference[1:2], estimate[1:2]))
    assert (found > 0.1).all()


def test_level_divergence_does_not_explode_where_a_level_is_far_too_low():
    quiet = torch.full((1, 1, 1, 1), 1e-3, requires_grad=True)
    divergences = [losses.level_divergence(torch.full((1, 1, 1, 1), level), quiet).item() for level in (1.0, 10.0)]
    twenty_decibels = math.log(100) * (losses.LINEAR_FROM_RATIO - 1)
    assert divergences[1] - divergences[0] == pytest.approx(twenty_decibels, rel=0.01)
    losses.level_divergence(torch.full((1, 1, 1, 1), 10.0), quiet).sum().backward()
    assert torch.isfinite(quiet.grad).all()


def test_below_1800_hz_all_bins_have_tones_and_the_loss_is_finite():
    model = small(sample_rate=1600, chunk_samples=3200)
    batch = pair_batch(2) | {"x": noise(2, 2, 1600, level=0.1)}
    loss, parts = losses.reconstruct_step(model, batch, DRAW | {"sample_rate": 1600})
    loss.mean().backward()
    assert parts["levels"].tolist() == [0.0, 0.0]
    trained = (weights for part in model.decoder.own() for weights in part.parameters())
    assert all(torch.isfinite(weights.grad).all() for weights in trained)


@pytest.mark.parametrize("level", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("size", [16, 256])
def test_gradients_are_finite_on_silence_and_at_a_perfect_reconstruction(size, level):
    x = noise(1, 2, RATE, level=level)
    for start in (torch.zeros_like(x), x):
        y = start.clone().requires_grad_()
        parts = losses.reconstruction_losses(x, y, RATE, size, in_mid_side=True)
        losses.total_loss(parts | {"levels": torch.zeros(1), "kl": torch.zeros(1)}).sum().backward()
        assert torch.isfinite(y.grad).all()


def test_networks_gradients_are_finite_on_silence():
    model = small()
    batch = pair_batch(2) | {"x": torch.zeros(2, 2, 2 * CHUNK)}
    losses.joint_step(model, batch, DRAW)[0].mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# ---- the flow ----


def test_flow_loss_is_the_error_of_the_prediction_over_1_minus_t_squared():
    target, start = noise(3, 4, 100, seed=1), noise(3, 4, 100, seed=2)
    time = torch.tensor([0.0, 0.5, 0.9])
    loss, predicted = losses.flow_loss(lambda noisy: torch.sin(3 * noisy), target, start, time)
    error = (predicted - target).square().mean((1, 2))
    assert torch.allclose(loss, error / (1 - time) ** 2, rtol=1e-4)


def test_true_velocity_has_no_loss_and_predicts_the_target():
    target, start = noise(2, 4, 100, seed=1), noise(2, 4, 100, seed=2)
    loss, predicted = losses.flow_loss(lambda noisy: target - start, target, start, torch.tensor([0.0, 0.7]))
    assert torch.equal(loss, torch.zeros(2))
    assert torch.allclose(predicted, target, atol=1e-6)


def test_flow_hears_noise_at_time_0_and_music_towards_time_1():
    target, start = noise(2, 4, 100, seed=1), noise(2, 4, 100, seed=2)
    heard = []
    losses.flow_loss(lambda noisy: heard.append(noisy) or noisy, target, start, torch.tensor([0.0, 0.999]))
    assert torch.equal(heard[0][0], start[0])
    assert torch.allclose(heard[0][1], target[1], atol=0.01)


def test_mse_objective_is_plain_regression_from_zero():
    model, batch = small(objective="mse"), pair_batch(2)
    with torch.no_grad():
        loss, predicted = losses.prediction_loss(model, batch["context"], batch["target"], batch)
        context = model.standardise(batch["context"])
        context[..., :200] += batch["context_noise"]
        said = model.core(torch.zeros_like(batch["target"]), context, torch.zeros(2), batch["heard"])
    assert torch.allclose(predicted, said, atol=1e-6)
    assert torch.allclose(loss, (said - model.standardise(batch["target"])).square().mean((1, 2)), rtol=1e-4)


def test_prediction_works_on_standardised_latents():
    """Latents of another mean and deviation, with statistics that say so, give the same loss."""
    model, batch = small(), pair_batch(2)
    with torch.no_grad():
        plain = losses.predict_step(model, batch)[0]
        model.latent_mean.fill_(3.0)
        model.latent_std.fill_(0.2)
        moved = batch | {name: 0.2 * batch[name] + 3.0 for name in ("context", "target")}
        assert torch.allclose(losses.predict_step(model, moved)[0], plain, rtol=1e-3)


# ---- the joint part ----


def test_full_level_is_that_of_every_context():
    assert pytest.approx(CONTEXT_LEVEL**2) == losses.FULL_LEVEL_POWER


def test_joint_loss_is_reconstruction_plus_prediction_plus_continuation():
    with torch.no_grad():
        loss, parts = losses.joint_step(small(), pair_batch(2), DRAW)
    reconstruction, continuation = losses.total_loss(parts), losses.continuation_sum(parts)
    assert torch.allclose(loss, reconstruction + parts["prediction"] + continuation, rtol=1e-5)
    beat, notes = losses.ONSET_WEIGHT * parts["continued_onsets"], losses.NOTE_WEIGHT * parts["continued_notes"]
    assert torch.allclose(continuation, parts["continued_spectral"] + beat + notes)


def parts_of(model: ContinuationModel) -> dict[str, torch.nn.Module]:
    decoder = model.decoder
    return {
        "encoder": model.encoder, "core": model.core, "trunk": decoder.trunk, "head": decoder.head,
        "mixer": decoder.mixer,
    }  # fmt: skip


def test_joint_step_trains_encoder_core_trunk_head_and_mixer():
    model = small()
    losses.joint_step(model, pair_batch(2), DRAW)[0].mean().backward()
    for name, part in parts_of(model).items():
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters()), name


@pytest.mark.parametrize(
    ("loss", "trained"),
    [
        ("spectral", {"encoder", "trunk", "head"}),
        ("prediction", {"core"}),
        ("continued_spectral", {"core", "trunk", "head", "mixer"}),
        ("continued_onsets", {"core", "trunk", "head", "mixer"}),
        ("continued_notes", {"core", "trunk", "head", "mixer"}),
    ],
)
def test_each_part_of_the_joint_loss_trains_what_it_is_for(loss, trained):
    """The core learns to say what helps the decoder, and the encoder is not taught to be easily predicted."""
    model = small()
    losses.joint_step(model, pair_batch(2), DRAW)[1][loss].sum().backward()
    moved = {
        name
        for name, part in parts_of(model).items()
        if any(p.grad is not None and p.grad.any() for p in part.parameters())
    }
    assert moved == trained


def test_stage_1_does_not_train_the_mixer():
    model = small()
    batch = pair_batch(2) | {"x": noise(2, 2, RATE, level=0.1)}
    losses.reconstruct_step(model, batch, DRAW)[0].mean().backward()
    assert all(p.grad is None for p in model.decoder.mixer.parameters())
    assert all(p.grad is not None for part in model.decoder.own() for p in part.parameters())


def test_encoder_hears_the_end_of_the_context_and_nothing_else(monkeypatch):
    """So it is taught by its reconstruction alone, and neither target nor context moves."""
    model, batch, heard = small(), pair_batch(2), []
    posterior = model.posterior
    monkeypatch.setattr(model, "posterior", lambda x: heard.append(x) or posterior(x))
    losses.joint_step(model, batch, DRAW)
    samples = CROP_LATENTS * model.config.latent_samples
    assert len(heard) == 1
    assert torch.equal(heard[0], batch["x"][..., CHUNK - samples : CHUNK])


def test_joint_part_predicts_the_cached_target_from_the_cached_context(monkeypatch):
    model, batch, given = small().eval(), pair_batch(2), []
    prediction_loss = losses.prediction_loss
    monkeypatch.setattr(losses, "prediction_loss", lambda *args: given.append(args) or prediction_loss(*args))
    with torch.no_grad():
        prediction = losses.joint_step(model, batch, DRAW)[1]["prediction"]
        assert torch.equal(prediction, losses.predict_step(model, batch)[0])
    _, context, target, _ = given[0]
    assert torch.equal(context, batch["context"])
    assert torch.equal(target, batch["target"])


def what_is_told(model: ContinuationModel, batch: dict, monkeypatch) -> dict:
    """All that a joint step tells the core and the decoder of what was heard, and the continuation they make."""
    core, decode, told = model.core.forward, model.decode, {}

    def note_core(noisy, context, *more):
        told[f"context {len(told)}"] = context
        return core(noisy, context, *more)

    def note_decode(z, length, copies, start):
        told["continuation"] = decode(z, length, copies, start)
        told.update({"latents": z, "heard sound": copies.context, "lags": copies.lags, "present": copies.present})
        told.update({"similarity": copies.similarity, "copies": copies.play(start, length)})
        told["start"] = start
        return told["continuation"]

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(model.core, "forward", note_core)
        patch.setattr(model, "decode", note_decode)
        losses.joint_step(model, batch, DRAW)
    return told


def test_core_and_decoder_are_told_the_same_whatever_the_target_is(monkeypatch):
    model, batch = small().eval(), pair_batch(3)
    other = batch | {
        "x": torch.cat([batch["x"][..., :CHUNK], noise(3, 2, CHUNK, seed=9)], dim=-1),
        "target": noise(3, 4, 200, seed=10),
    }
    told, again = (what_is_told(model, given, monkeypatch) for given in (batch, other))
    assert (
        len([name for name in told if name.startswith("context")]) == 2
    )  # for the prediction, and for what is decoded
    assert told.keys() == again.keys()
    for name, value in told.items():
        assert torch.equal(value, again[name]), name


def test_decoder_plays_the_copies_that_are_present_and_no_others(monkeypatch):
    model, batch = small().eval(), pair_batch(3)
    with torch.no_grad():
        told = what_is_told(model, batch, monkeypatch)
        own = model.decode(told["latents"])
    assert torch.equal(told["present"], batch["present"])
    errors = (told["continuation"] - own).square().mean((1, 2)) / own.square().mean((1, 2))
    assert errors[2] < 1e-6  # the third item has no copies
    assert (errors[:2] > 0.1).all()


def test_decoded_latents_are_the_cores_in_one_step_from_noise(monkeypatch):
    model, batch = small().eval(), pair_batch(2)
    with torch.no_grad():
        sampled = model.sample(batch["context"], batch["flow_noise"], 1, 1.0)
    assert torch.allclose(what_is_told(model, batch, monkeypatch)["latents"], sampled, atol=1e-5)


def test_network_that_says_the_mean_is_decoded_from_what_it_says(monkeypatch):
    model, batch = small(objective="mse").eval(), pair_batch(2)
    with torch.no_grad():
        said = model.predict(batch["context"])
    assert torch.allclose(what_is_told(model, batch, monkeypatch)["latents"], said, atol=1e-5)


@pytest.mark.parametrize(("place", "first"), [(0.0, 0), (0.5, 50), (1.0, 100)])
def test_decoded_part_is_the_one_at_its_place(monkeypatch, place, first):
    """1 s of the 2 s that the core says."""
    monkeypatch.setattr(losses, "CONTINUED_SECONDS", 1)
    model, batch = small().eval(), pair_batch(2) | {"place": torch.tensor([place, 0.3])}
    told = what_is_told(model, batch, monkeypatch)
    with torch.no_grad():
        whole = model.sample(batch["context"], batch["flow_noise"], 1, 1.0)
    assert torch.allclose(told["latents"], whole[..., first : first + 100], atol=1e-5)
    assert told["start"] == 20 * first
    assert told["copies"].shape[-1] == told["continuation"].shape[-1] == RATE


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_continuation_is_compared_with_the_same_part_of_the_second_half(monkeypatch, place):
    """With a decoder that is perfect by definition."""
    monkeypatch.setattr(losses, "CONTINUED_SECONDS", 1)
    model, batch = small(), pair_batch(2) | {"place": torch.full((2,), place)}
    first, second = batch["x"].split(CHUNK, dim=-1)
    found = {}
    for name, sound in (("first", first), ("second", second)):
        monkeypatch.setattr(model, "decode", lambda z, length, copies, start, x=sound: x[..., start : start + length])
        with torch.no_grad():
            found[name] = losses.joint_step(model, batch, DRAW)[1]
    for part, least in (("continued_spectral", 0.5), ("continued_onsets", 0.5), ("continued_notes", 1e-3)):
        assert found["second"][part].abs().max() < 0.01, part
        assert found["first"][part].min() > least, part


@pytest.mark.parametrize("in_mid_side", [False, True])
def test_phases_of_a_continuation_cost_nothing_and_its_level_does(in_mid_side):
    x = noise(2, 2, RATE, level=0.1)
    turned = losses.continuation_losses(x, -x, RATE, 128, in_mid_side)
    assert all(part.max() < 0.02 for part in turned.values())
    softer = losses.continuation_losses(x, 0.5 * x, RATE, 128, in_mid_side)
    assert softer["continued_spectral"].min() > 1
    assert softer["continued_onsets"].max() < 0.02
    assert softer["continued_notes"].max() < 0.02


@pytest.mark.parametrize("in_mid_side", [False, True])
def test_continuation_losses_of_a_batch_are_those_of_its_items(in_mid_side):
    x, y = noise(3, 2, RATE, seed=1, level=0.1), noise(3, 2, RATE, seed=2, level=0.1)
    y[1] *= 0.01
    parts = losses.continuation_losses(x, y, RATE, 128, in_mid_side)
    for i in range(3):
        alone = losses.continuation_losses(x[i : i + 1], y[i : i + 1], RATE, 128, in_mid_side)
        for name, part in parts.items():
            assert part[i].item() == pytest.approx(alone[name].item(), rel=1e-4), name


@pytest.mark.parametrize("level", [0.0, 1e-6, 0.1])
def test_gradients_of_a_continuation_are_finite_on_silence_and_where_it_is_perfect(level):
    x = noise(1, 2, RATE, level=level)
    for start in (torch.zeros_like(x), x):
        y = start.clone().requires_grad_()
        losses.continuation_sum(losses.continuation_losses(x, y, RATE, 128, in_mid_side=True)).sum().backward()
        assert torch.isfinite(y.grad).all()


# ---- onsets and notes ----


def clicks(first: int, every: int = 3000, rate: int = 12000, seconds: int = 4) -> torch.Tensor:
    """Short bursts of noise over soft noise: (1, 2, samples)."""
    x = noise(1, 2, seconds * rate, seed=1, level=0.001)
    for start in range(first, x.shape[-1] - 300, every):
        x[..., start : start + 300] += noise(1, 2, 300, seed=start, level=0.3)
    return x


def test_onset_distance_is_0_where_the_beat_is_kept_and_about_1_where_it_is_not():
    x, rate = clicks(1500), 12000
    assert losses.onset_distance(x, x, rate).item() == pytest.approx(0, abs=1e-3)
    other_sound = torch.flip(x, [1]) * 0.3
    assert losses.onset_distance(x, other_sound, rate).item() < 0.05
    near, far = (losses.onset_distance(x, clicks(1500 + late), rate).item() for late in (180, 1500))
    assert near < 0.6  # 15 ms late, of the 50 ms over which onsets are smoothed
    assert 0.9 < far < 1.5
    assert near < far - 0.4


@pytest.mark.parametrize("rate", [12000, 24000, 48000])
def test_chroma_distance_is_that_of_the_figure(rate):
    songs = [torch.from_numpy(synth.song(seed, 4, rate, 2))[None].float() for seed in (0, 1)]
    found = losses.chroma_distance(*songs, rate).item()
    assert found == pytest.approx(1 - metrics.chroma_cosine(*(x[0].numpy() for x in songs), rate), abs=1e-4)
    assert found > 0.01
    assert losses.chroma_distance(songs[0], songs[0], rate).item() == pytest.approx(0, abs=1e-5)


def test_notes_are_the_same_an_octave_higher_and_none_of_them_a_tritone_higher():
    low, octave, tritone = (tone(440 * 2 ** (semitones / 12), 2) for semitones in (0, 12, 6))
    assert losses.chroma_distance(low, octave, 12000).item() < 0.01
    assert losses.chroma_distance(low, tritone, 12000).item() > 0.95


def test_sound_that_is_too_short_to_tell_notes_has_no_distance():
    assert losses.chroma_distance(tone(440, 0.1), tone(620, 0.1), 12000).item() == pytest.approx(0, abs=1e-6)


def test_reconstruction_in_the_joint_part_is_that_of_the_contexts_end():
    """With a decoder that is perfect by definition, only the end of the context can give zero error."""
    model, batch = small(), pair_batch(2)
    samples = CROP_LATENTS * model.config.latent_samples
    end, decode = batch["x"][..., CHUNK - samples : CHUNK], model.decode_with_levels
    perfect = end, model.decoder.head.levels(end)
    model.decode_with_levels = lambda z, copies=None, start=0: decode(z, copies, start) if copies else perfect
    with torch.no_grad():
        parts = losses.joint_step(model, batch, DRAW)[1]
    assert parts["waveform_mse"].tolist() == [0.0, 0.0]
    assert parts["levels"].abs().max() < 1e-5


# ---- noise on the latents ----


def test_latent_noise_is_the_posteriors_plus_a_share_of_each_channels_deviation():
    model = small()
    model.latent_std[:] = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    mean, log_variance = noise(2, 4, 100), torch.full((2, 4, 100), 2 * math.log(0.5))
    batch = {"posterior_noise": torch.ones(2, 4, 100), "robust_noise": torch.ones(2, 4, 100)}
    z = losses.latent_noise(model, mean, log_variance, batch)
    expected = 0.5 + losses.ROBUST_NOISE * np.array([1, 2, 3, 4])
    assert np.allclose((z - mean).mean((0, 2)), expected, atol=1e-5)


# ---- legacy ----


def test_legacy_losses_are_the_squared_errors_of_both_outputs():
    model, batch = legacy().eval(), pair_batch(2)
    with torch.no_grad():
        reconstruction, prediction = model(batch["x"][..., :CHUNK])
        loss, parts = losses.legacy_step(model, batch, predict=True)
        first = losses.legacy_step(model, batch, predict=False)[0]
    heard, following = batch["x"].split(CHUNK, dim=-1)
    assert torch.allclose(parts["waveform_mse"], (heard - reconstruction).square().mean((1, 2)), rtol=1e-4)
    assert torch.allclose(parts["decoded_mse"], (following - prediction).square().mean((1, 2)), rtol=1e-4)
    assert torch.allclose(loss, parts["waveform_mse"] + parts["decoded_mse"])
    assert torch.allclose(first, parts["waveform_mse"])
