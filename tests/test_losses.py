"""Losses with known answers; a batch's loss is that of its items one by one; the target is never heard as context."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import synth
import torch
from small_networks import CHUNK, RATE, noise, small_config, small_network, untrained_network

from continuation import losses, spectral
from continuation.context import Context
from continuation.equaliser import QUIETEST_LEVEL
from model import CONTEXT_LEVEL, ContinuationModel, LegacyModel

torch.set_num_threads(1)
CROP_LATENTS = 100
DRAW = {"sample_rate": RATE, "size": 256, "in_mid_side": True}


def small(**fields) -> ContinuationModel:
    """In training mode, with gradients; without dropout, so that two passes give the same."""
    return small_network(core_dropout=0.0, **fields).train().requires_grad_()


def legacy() -> LegacyModel:
    return untrained_network("legacy").train().requires_grad_()


def tone(frequency: float, seconds: float = 1.0, rate: int = 12000, channels: int = 2) -> torch.Tensor:
    return torch.from_numpy(synth.tone(frequency, seconds, rate, channels, level=0.2))[None]


def pair_batch(items: int, times=(0.0, 0.8, 0.4)) -> dict[str, torch.Tensor]:
    """What JointItems gives: a second of audio, a pair's latents and outlook, and all noise."""
    shape, crop = (items, 4, 200), (items, 4, CROP_LATENTS)
    return {
        "x": noise(items, 2, RATE, seed=1, level=0.1),
        "context": noise(*shape, seed=2), "target": noise(*shape, seed=3), "flow_noise": noise(*shape, seed=4),
        "context_noise": noise(*shape, seed=5, level=0.1), "posterior_noise": noise(*crop, seed=6),
        "robust_noise": noise(*crop, seed=7, level=0.5), "time": torch.tensor(times[:items]),
        "context_share": torch.tensor([1.0, 0.5, 0.0])[:items],
        "outlook": noise(items, *small_config().pair_shapes["outlook"], seed=8),
        "features": noise(items, *small_config().pair_shapes["features"], seed=9),
        "correction": noise(items, *small_config().pair_shapes["correction"], seed=10),
    }  # fmt: skip


def legacy_batch(items: int) -> dict[str, torch.Tensor]:
    """What FixedPairItems gives: 4 s of audio."""
    return {"x": noise(items, 2, 2 * CHUNK, seed=1, level=0.1)}


def items_of(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    count = len(batch["x"])
    return [{name: value[i : i + 1] for name, value in batch.items()} for i in range(count)]


# Every loss is one value an item

STEPS = {
    "joint": lambda model, batch: losses.joint_step(model, batch, DRAW),
    "predict": losses.predict_step,
    "legacy stage 1": lambda model, batch: losses.legacy_step(model, batch, predict=False),
    "legacy stage 2": lambda model, batch: losses.legacy_step(model, batch, predict=True),
}


@pytest.mark.parametrize("step", STEPS)
def test_loss_of_a_batch_is_the_losses_of_its_items_one_by_one(step):
    model, batch = (legacy(), legacy_batch(3)) if "legacy" in step else (small(), pair_batch(3))
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


def test_stage_1_step_gives_one_loss_an_item():
    with torch.no_grad():
        loss, parts = losses.reconstruct_step(small(), pair_batch(2), DRAW)
    assert loss.shape == (2,)
    assert torch.allclose(loss, losses.total_loss(parts))


def test_latents_are_tracked_where_stage_1_averages_them_and_nowhere_else():
    model, batch = small(), pair_batch(2)
    before, averaged = model.latent_std.clone(), []
    losses.reconstruct_step(model, batch, DRAW)
    losses.joint_step(model, batch, DRAW)
    assert torch.equal(before, model.latent_std)
    losses.reconstruct_step(model, batch, DRAW, average=lambda own: averaged.append(own) or own)
    assert not torch.equal(before, model.latent_std)
    mean = model.encode(batch["x"])
    assert torch.allclose(averaged[0], torch.stack([mean.mean((0, 2)), mean.square().mean((0, 2))]), atol=1e-5)


# Spectra


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
    low, high = tone(0.6 * spectral.COMPLEX_HZ[0]), tone(1.2 * spectral.COMPLEX_HZ[1])
    assert phase_distance(low, -low) > 1
    assert phase_distance(low + high, low - high) < 0.05


def test_phases_that_fade_out_count_in_part():
    whole, gone = spectral.COMPLEX_HZ
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


# Levels


def test_magnitude_divergence_is_least_at_the_mean_power_of_noise():
    """Of the levels of normal noise a mean of |ln ratio| would say 1.6 dB less."""
    reference = torch.randn(1, 1, 100, 100, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).abs()
    decibels = torch.arange(-4, 4.1, 0.25)
    levels = (torch.full_like(reference, 10 ** (d / 20)) for d in decibels)
    found = torch.cat([losses.magnitude_divergence(reference, level) for level in levels])
    assert abs(decibels[found.argmin()]) <= 0.5
    logarithms = (reference[..., None].log() - decibels * math.log(10) / 20).abs().mean((0, 1, 2, 3))
    assert decibels[logarithms.argmin()] == pytest.approx(-1.6, abs=0.3)


def test_magnitude_divergence_is_zero_for_equal_levels_and_one_value_an_item():
    reference, estimate = noise(3, 2, 10, 20, seed=1).abs(), noise(3, 2, 10, 20, seed=2).abs()
    assert losses.magnitude_divergence(reference, reference).abs().max() < 1e-5
    found = losses.magnitude_divergence(reference, estimate)
    assert torch.allclose(found[1:2], losses.magnitude_divergence(reference[1:2], estimate[1:2]))
    assert (found > 0.1).all()


def test_magnitude_divergence_does_not_explode_where_a_level_is_far_too_low():
    quiet = torch.full((1, 1, 1, 1), 1e-3, requires_grad=True)
    reference = [torch.full((1, 1, 1, 1), magnitude) for magnitude in (1.0, 10.0)]
    divergences = [losses.magnitude_divergence(x, quiet).item() for x in reference]
    twenty_decibels = math.log(100) * (losses.LINEAR_FROM_RATIO - 1)
    assert divergences[1] - divergences[0] == pytest.approx(twenty_decibels, rel=0.01)
    losses.magnitude_divergence(torch.full((1, 1, 1, 1), 10.0), quiet).sum().backward()
    assert torch.isfinite(quiet.grad).all()


def test_below_1800_hz_all_bins_have_tones_and_the_loss_is_finite():
    model = small(sample_rate=1600, chunk_samples=3200)
    batch = pair_batch(2) | {"x": noise(2, 2, 1600, level=0.1)}
    loss, parts = losses.reconstruct_step(model, batch, DRAW | {"sample_rate": 1600})
    loss.mean().backward()
    assert parts["magnitudes"].tolist() == [0.0, 0.0]
    assert all(torch.isfinite(weights.grad).all() for weights in model.decoder.parameters())


@pytest.mark.parametrize("level", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("size", [16, 256])
def test_gradients_are_finite_on_silence_and_at_a_perfect_reconstruction(size, level):
    x = noise(1, 2, RATE, level=level)
    for start in (torch.zeros_like(x), x):
        y = start.clone().requires_grad_()
        parts = losses.reconstruction_losses(x, y, RATE, size, in_mid_side=True)
        losses.total_loss(parts | {"magnitudes": torch.zeros(1), "kl": torch.zeros(1)}).sum().backward()
        assert torch.isfinite(y.grad).all()


def test_networks_gradients_are_finite_on_silence():
    model = small()
    batch = pair_batch(2) | {"x": torch.zeros(2, 2, RATE)}
    losses.joint_step(model, batch, DRAW)[0].mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# The flow


def test_flow_loss_is_the_squared_error_of_the_velocity():
    target, start = noise(3, 4, 100, seed=1), noise(3, 4, 100, seed=2)
    offset = torch.tensor([0.0, 0.5, 2.0])[:, None, None]
    loss = losses.flow_loss(lambda noisy: target - start + offset, target, start, torch.tensor([0.0, 0.5, 0.9]))
    assert torch.allclose(loss, offset.flatten().square(), atol=1e-6)


def test_flow_hears_noise_at_time_0_and_music_towards_time_1():
    target, start = noise(2, 4, 100, seed=1), noise(2, 4, 100, seed=2)
    heard = []
    losses.flow_loss(lambda noisy: heard.append(noisy) or noisy, target, start, torch.tensor([0.0, 0.999]))
    assert torch.equal(heard[0][0], start[0])
    assert torch.allclose(heard[0][1], target[1], atol=0.01)


def told(model: ContinuationModel, batch: dict[str, torch.Tensor]) -> Context:
    """What the core is told of a batch."""
    return Context(model.standardise(batch["context"]) + batch["context_noise"], batch["outlook"])


@torch.no_grad()
def test_prediction_is_the_flow_behind_the_tokens_of_the_noisy_context():
    model, batch = small(), pair_batch(3)
    loss, parts = losses.predict_step(model, batch)
    tokens, t = model.core(told(model, batch), batch["context_share"]), batch["time"][:, None, None]
    noisy = (1 - t) * batch["flow_noise"] + t * batch["target"]
    error = model.core.head(noisy, tokens, batch["time"]) - (batch["target"] - batch["flow_noise"])
    assert torch.allclose(parts["prediction"], error.square().mean((1, 2)), rtol=1e-4)
    assert torch.equal(loss, parts["prediction"] + parts["equaliser"])


@torch.no_grad()
def test_mse_objective_is_plain_regression_from_zero():
    model, batch = small(objective="mse"), pair_batch(3)
    loss, parts = losses.predict_step(model, batch)
    tokens = model.core(told(model, batch), batch["context_share"])
    said = model.core.head(torch.zeros_like(batch["target"]), tokens, torch.zeros(3))
    assert torch.allclose(parts["prediction"], (said - batch["target"]).square().mean((1, 2)), rtol=1e-4)
    other = batch | {"flow_noise": noise(3, 4, 200, seed=9), "time": torch.full((3,), 0.3)}
    assert torch.equal(losses.predict_step(model, other)[0], loss)


def test_prediction_works_on_standardised_latents():
    """Latents of another mean and deviation, with statistics that say so, give the same loss."""
    model, batch = small(), pair_batch(2)
    with torch.no_grad():
        plain = losses.predict_step(model, batch)[0]
        model.latent_mean.fill_(3.0)
        model.latent_std.fill_(0.2)
        moved = batch | {name: 0.2 * batch[name] + 3.0 for name in ("context", "target")}
        assert torch.allclose(losses.predict_step(model, moved)[0], plain, rtol=1e-3)


@pytest.mark.parametrize(("objective", "times"), [("flow", losses.FIXED_TIMES), ("mse", (0.0,))])
@torch.no_grad()
def test_fixed_time_losses_are_those_of_training_at_the_fixed_times_with_the_whole_context(objective, times):
    model, batch = small(objective=objective), pair_batch(1)
    pair = {name: batch[name] for name in ("context", "outlook", "target")}
    found = losses.fixed_time_losses(model, pair, batch["flow_noise"])
    silent = {"context_noise": torch.zeros(1, 4, 200), "context_share": torch.ones(1)}
    for i, time in enumerate(times):
        loss = losses.prediction_loss(model, batch | silent | {"time": torch.tensor([time])})
        assert found.shape == (len(times),)
        assert torch.allclose(found[i], loss[0], rtol=1e-4)


@torch.no_grad()
def test_equalisers_loss_is_the_mean_distance_and_loud_bands_count_more():
    """With corrections that are off by 1 in the upper half of the bands, first at equal levels, then where the upper
    half is expected to be as quiet as can be."""
    model, batch = untrained_network(), pair_batch(2)
    batch["features"] = torch.zeros_like(batch["features"])
    batch["correction"] = torch.zeros_like(batch["correction"])
    half = batch["correction"].shape[-1] // 2
    batch["correction"][..., -half:] = 1.0
    share = half / batch["correction"].shape[-1]
    assert torch.allclose(losses.equaliser_loss(model, batch), torch.full((2,), share))
    batch["features"][:, :, 0, -half:] = QUIETEST_LEVEL
    assert torch.equal(losses.equaliser_loss(model, batch), torch.zeros(2))


# The joint part


def test_full_level_is_that_of_every_context():
    assert pytest.approx(CONTEXT_LEVEL**2) == losses.FULL_LEVEL_POWER


@torch.no_grad()
def test_joint_loss_is_reconstruction_plus_prediction():
    model, batch = small(), pair_batch(3)
    loss, parts = losses.joint_step(model, batch, DRAW)
    reconstruction, of_sound = losses.reconstruct_step(model, batch, DRAW)
    prediction, of_latents = losses.predict_step(model, batch)
    assert torch.allclose(loss, reconstruction + prediction)
    assert parts.keys() == of_sound.keys() | of_latents.keys()
    assert all(torch.equal(part, (of_sound | of_latents)[name]) for name, part in parts.items())


def parts_of(model: ContinuationModel) -> dict[str, torch.nn.Module]:
    return {"encoder": model.encoder, "core": model.core, "decoder": model.decoder}


def test_joint_step_trains_encoder_core_and_decoder():
    model = small()
    losses.joint_step(model, pair_batch(2), DRAW)[0].mean().backward()
    for name, part in parts_of(model).items():
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters()), name


@pytest.mark.parametrize(
    ("loss", "trained"),
    [("spectral", {"encoder", "decoder"}), ("prediction", {"core"}), ("equaliser", {"core"})],
)
def test_each_part_of_the_joint_loss_trains_what_it_is_for(loss, trained):
    """The encoder is not taught to be easily predicted."""
    model = small()
    losses.joint_step(model, pair_batch(2), DRAW)[1][loss].sum().backward()
    moved = {
        name
        for name, part in parts_of(model).items()
        if any(p.grad is not None and p.grad.any() for p in part.parameters())
    }
    assert moved == trained


@torch.no_grad()
def test_tokens_are_the_same_whatever_the_target_is(monkeypatch):
    model, batch, found = small().eval(), pair_batch(3), []
    head = model.core.head.forward
    monkeypatch.setattr(
        model.core.head, "forward", lambda noisy, tokens, time: found.append(tokens) or head(noisy, tokens, time)
    )
    other = {"target": noise(3, 4, 200, seed=10)}
    first, second = (losses.predict_step(model, given)[0] for given in (batch, batch | other))
    assert torch.equal(*found)
    assert not torch.allclose(first, second)


# Noise on the latents


def test_latent_noise_is_the_posteriors_plus_a_share_of_each_channels_deviation():
    model = small()
    model.latent_std[:] = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    mean, log_variance = noise(2, 4, 100), torch.full((2, 4, 100), 2 * math.log(0.5))
    batch = {"posterior_noise": torch.ones(2, 4, 100), "robust_noise": torch.ones(2, 4, 100)}
    z = losses.latent_noise(model, mean, log_variance, batch)
    expected = 0.5 + losses.ROBUST_NOISE * np.array([1, 2, 3, 4])
    assert np.allclose((z - mean).mean((0, 2)), expected, atol=1e-5)


# Legacy


def test_legacy_losses_are_the_squared_errors_of_both_outputs():
    model, batch = legacy().eval(), legacy_batch(2)
    with torch.no_grad():
        reconstruction, prediction = model(batch["x"][..., :CHUNK])
        loss, parts = losses.legacy_step(model, batch, predict=True)
        first = losses.legacy_step(model, batch, predict=False)[0]
    heard, following = batch["x"].split(CHUNK, dim=-1)
    assert torch.allclose(parts["waveform_mse"], (heard - reconstruction).square().mean((1, 2)), rtol=1e-4)
    assert torch.allclose(parts["decoded_mse"], (following - prediction).square().mean((1, 2)), rtol=1e-4)
    assert torch.allclose(loss, parts["waveform_mse"] + parts["decoded_mse"])
    assert torch.allclose(first, parts["waveform_mse"])
