"""The mixer: it plays the copies that repeat best, with the power of its sources."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_networks import noise, untrained_network

from continuation.mixer import (
    ERROR_LOGIT,
    LEAST_ERROR,
    Mixer,
    copy_logits,
    copy_weights,
    expectation,
    expected_levels,
    past_error,
)
from continuation.repetition import LOOP_BIAS, Copies
from continuation.spectral import STEP_FRAMES, BandLevels, band_edges, interpolation, pooling
from model import ContinuationModel

HOP, LENGTH = 120, 36000  # 3 s at 12 kHz
BINS, STEPS = 241, 75
BANDS = len(band_edges(BINS)) - 1


@pytest.fixture(scope="module")
def model() -> ContinuationModel:
    return untrained_network(sample_rate=12000, chunk_samples=24000)


@pytest.fixture(scope="module")
def mixer() -> Mixer:
    return Mixer(BINS)


LAGS = (12, 15, 17)  # in steps


def copies_of(
    *similarity: tuple[float, float], lags: tuple[int, ...] = LAGS, past: torch.Tensor | None = None
) -> Copies:
    """Of one context, whose sound is not told, as similar as is said, in sound and in onsets; past: its levels, by
    default the same at every lag."""
    past = torch.zeros(1, BANDS, STEPS) if past is None else past
    samples = STEP_FRAMES * HOP * torch.tensor([lags[: len(similarity)]])
    bias = LOOP_BIAS * (torch.arange(len(similarity)) == 0)[None].float()
    return Copies(torch.zeros(1, 1, LENGTH), samples, samples, torch.tensor([similarity]), bias, HOP, past)


# Bands


@pytest.mark.parametrize("bins", [21, 161, 241, 481, 961])
def test_bands_cover_every_bin_once(bins):
    edges = band_edges(bins)
    assert edges[0] == 0
    assert edges[-1] == bins
    assert torch.equal(pooling(bins).gt(0).sum(0), torch.ones(bins, dtype=torch.long))
    assert torch.allclose(pooling(bins).sum(1), torch.ones(len(edges) - 1))


@pytest.mark.parametrize("bins", [21, 241, 961])
def test_interpolation_keeps_what_is_linear(bins):
    weights = interpolation(bins)
    assert torch.allclose(weights.sum(1), torch.ones(bins), atol=1e-5)
    assert weights.gt(0).sum(1).max() <= 2
    edges = torch.tensor(band_edges(bins), dtype=torch.float)
    middles = (edges[:-1] + edges[1:] - 1) / 2
    inner = torch.arange(int(middles[0].ceil()), int(middles[-1]))
    assert torch.allclose((weights @ middles)[inner], inner.float(), atol=1e-3)


def spectra(*nepers: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Sources with the same phases, whose magnitudes follow `nepers` (steps,) in all bins: (1, sources, 1, bins,
    frames)."""
    phases = torch.exp(6.28j * torch.rand(BINS, 1, generator=torch.Generator().manual_seed(seed)))
    swell = torch.stack([level.exp().repeat_interleave(STEP_FRAMES) for level in nepers])[:, None, None]
    return (swell * phases * BandLevels(BINS).typical_power.sqrt())[None]


def test_levels_are_the_logarithms_of_magnitudes_relative_to_what_is_typical():
    swell = 0.3 * torch.sin(torch.arange(STEPS) / 10)
    levels = BandLevels(BINS)(spectra(swell, swell - 1))
    assert levels.shape == (1, 2, BANDS, STEPS)
    assert torch.allclose(levels[0, 0], swell.expand(BANDS, -1), atol=1e-3)
    assert torch.allclose(levels[0, 1], swell.expand(BANDS, -1) - 1, atol=1e-2)


def test_bands_of_mid_and_side_are_rows_of_their_own():
    mid, side = spectra(torch.zeros(STEPS)), spectra(torch.full((STEPS,), -1.0))
    levels = BandLevels(BINS)(torch.cat([mid, side], dim=2))
    assert levels.shape == (1, 1, 2 * BANDS, STEPS)
    assert torch.allclose(levels[0, 0, :BANDS], torch.zeros(()), atol=1e-2)
    assert torch.allclose(levels[0, 0, BANDS:], torch.tensor(-1.0), atol=1e-2)


def test_gains_are_interpolated_between_the_bands_and_the_last_step_may_be_short():
    bands = BandLevels(BINS)
    found = bands.to_bins(torch.linspace(0, 1, BANDS).expand(1, 2, BANDS))
    assert found.shape == (1, 2, BINS, 1)
    assert found[0, 0, :, 0].diff().min() >= 0
    assert (found.min().item(), found.max().item()) == (0, 1)
    for frames in (300, 299, 297):
        assert bands(torch.zeros(1, 1, 1, BINS, frames, dtype=torch.cfloat)).shape[-1] == STEPS


# Which sources are played


def periodic(x: torch.Tensor, steps: int) -> torch.Tensor:
    """The beginning of x (..., steps) over and over."""
    return x[..., torch.arange(x.shape[-1]) % steps]


EQUAL = copies_of((0.5, 0.5), (0.5, 0.5), (0.5, 0.5))


@pytest.mark.parametrize("copy", [0, 1, 2])
def test_past_error_is_the_least_at_the_lag_of_a_context_that_repeats_itself(copy):
    error = past_error(periodic(noise(1, BANDS, STEPS), LAGS[copy]), EQUAL.lags, HOP)
    assert error.shape == (1, 3, BANDS)
    assert torch.equal(error[:, copy], torch.full((1, BANDS), LEAST_ERROR))
    others = [other for other in range(3) if other != copy]
    assert error[:, others].min() > 10 * LEAST_ERROR


@pytest.mark.parametrize("lag", [12, 15, 17, 50, 60])
def test_past_error_is_the_mean_distance_of_levels_from_those_a_lag_before(lag):
    """Over the last 60 of 75 steps, as far as there is something a lag before."""
    past, first = noise(1, BANDS, STEPS), max(15, lag)
    expected = (past[..., first:] - past[..., first - lag : STEPS - lag]).abs().mean(-1)
    lags = torch.tensor([[lag * STEP_FRAMES * HOP]])
    assert torch.allclose(past_error(past, lags, HOP)[:, 0], expected)


def test_copies_are_weighed_by_a_power_of_their_error_and_weights_add_up_to_1():
    past = noise(2, BANDS, STEPS)
    copies = copies_of((0.2, 0.2), (0.5, 0.5), (0.5, 0.5), past=past)
    weights, error = copy_weights(copies), past_error(past, copies.lags, HOP)
    assert torch.allclose(weights.sum(1), torch.ones(2, BANDS))
    assert torch.allclose(weights[:, 1] / weights[:, 2], (error[:, 2] / error[:, 1]) ** ERROR_LOGIT, rtol=1e-2)


def test_every_band_trusts_the_copy_at_whose_lag_it_has_repeated_itself():
    low, high = BANDS // 3, BANDS - BANDS // 3
    past = torch.cat([periodic(noise(1, low, STEPS), LAGS[1]), periodic(noise(1, high, STEPS), LAGS[2])], dim=1)
    weights = copy_weights(replace(EQUAL, levels=past))
    assert weights[:, 1, :low].min() > 0.999
    assert weights[:, 2, low:].min() > 0.999


def test_outlook_is_the_weighted_mean_of_the_copies_levels_and_the_mean_distance_from_it():
    levels, weights = torch.tensor([1.0, 2.0, 4.0]).expand(BANDS, STEPS, 3).movedim(-1, 0), torch.empty(3, BANDS)
    weights[:, 0], weights[:, 1:] = torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.2, 0.8, 0.0])[:, None]
    mean, spread = expectation(levels[None], weights[None])
    assert mean.shape == spread.shape == (1, BANDS, STEPS)
    assert torch.allclose(mean[0, :, 0], torch.tensor([3.0] + (BANDS - 1) * [1.8]))
    assert torch.allclose(spread[0, :, 0], torch.tensor([1.0] + (BANDS - 1) * [0.32]))


@pytest.mark.parametrize("start", [0, 30])
def test_expected_levels_of_a_context_that_repeats_itself_are_what_follows(start):
    """From any step behind the context's end on, and no copy disagrees that has a weight."""
    song = periodic(noise(1, BANDS, 3 * STEPS), LAGS[1])
    past, begin = song[..., :STEPS], STEPS + start
    levels, spread = expected_levels(replace(EQUAL, levels=past), start * STEP_FRAMES * HOP, 40)
    assert torch.allclose(levels, song[..., begin : begin + 40], atol=1e-4)
    assert spread.max() < 1e-4


def test_copies_that_are_alike_agree():
    levels = noise(1, 1, BANDS, STEPS)
    mean, spread = expectation(
        levels.expand(1, 3, -1, -1), copy_weights(replace(EQUAL, levels=noise(1, BANDS, STEPS, seed=1)))
    )
    assert torch.allclose(mean, levels[:, 0], atol=1e-5)
    assert spread.abs().max() < 1e-5


def test_logits_grow_with_similarity_and_most_for_the_loop():
    """In a context that is the same at every lag."""
    logits = copy_logits(copies_of((0.5, 0.5), (0.5, 0.5), (0.3, 0.5)))
    assert logits.shape == (1, 3, BANDS)
    loop, twin, worse = logits[0, :, 0].tolist()
    assert loop > twin > worse
    assert torch.equal(logits, logits[..., :1].expand_as(logits))


def test_error_of_a_multiple_is_the_mean_of_its_own_and_that_of_its_base_lag():
    past = noise(1, BANDS, STEPS)
    lags, base_lags = (STEP_FRAMES * HOP * torch.tensor([steps]) for steps in ([12, 36], [12, 12]))
    copies = copies_of((0.5, 0.5), (0.5, 0.5), past=past)
    copies = replace(copies, lags=lags, base_lags=base_lags, bias=torch.zeros(1, 2))
    base, multiple = past_error(past, lags, HOP).unbind(1)
    found = copy_logits(copies)
    assert torch.allclose(found[:, 1] - found[:, 0], -ERROR_LOGIT * ((base + multiple) / 2 / base).log(), atol=1e-4)


def test_mixer_has_no_weights(mixer):
    assert not list(mixer.parameters())
    assert not mixer.state_dict()


@torch.no_grad()
def test_what_repeats_itself_is_played_as_it_was(model):
    """A lone perfect copy is as sharp as the song, whatever the latents are."""
    song = 0.1 * noise(1, 2, 7001).repeat(1, 1, 12)[..., : 2 * LENGTH]
    for seed in (1, 2):
        played = model.decode(noise(1, 4, 300, seed=seed), copies=model.copies(song[..., :LENGTH]))
        error = (played - song[..., LENGTH:])[..., 500:-500].square().mean()  # the very ends have half a window
        assert error < 1e-3 * song.square().mean()


@torch.no_grad()
def test_lone_perfect_copy_among_poor_ones_is_played_to_the_bin(mixer):
    sources, past = mixer_noise(4), mixer.bands(periodic_spectrum(LAGS[0]))
    mixed = mixer(sources, copies_of((1.0, 1.0), (0.1, 0.1), (0.1, 0.1), past=past))
    error = (mixed - sources[:, 1]).abs().square().mean()
    assert error < 1e-3 * sources[:, 1].abs().square().mean()


@torch.no_grad()
def test_bands_that_repeat_themselves_at_different_lags_each_play_their_copy(mixer):
    """Copies that are equally similar on the whole: the loop is played where nothing speaks for another."""
    sources, middle = mixer_noise(4), band_edges(BINS)[BANDS // 2]
    past = torch.cat([periodic_spectrum(LAGS[1])[:, :, :middle], periodic_spectrum(LAGS[2])[:, :, middle:]], dim=2)
    mixed = mixer(sources, replace(EQUAL, levels=mixer.bands(past)))
    for copy, bins in ((2, slice(0, middle - 10)), (3, slice(middle + 10, None))):
        played = sources[:, copy, :, bins]
        assert (mixed[:, :, bins] - played).abs().square().mean() < 0.02 * played.abs().square().mean()


def periodic_spectrum(steps: int) -> torch.Tensor:
    """Spectrum of a context of noise that repeats itself after so many steps: (1, 1, bins, frames)."""
    return periodic(mixer_noise(1)[:, 0], steps * STEP_FRAMES)


def mixer_noise(sources: int, seed: int = 0) -> torch.Tensor:
    """Independent noises of typical power: (1, sources, 1, bins, frames)."""
    real, imaginary = noise(2, 1, sources, 1, BINS, STEPS * STEP_FRAMES, seed=seed) / math.sqrt(2)
    return torch.complex(real, imaginary) * BandLevels(BINS).typical_power.sqrt()


ALIKE = copies_of((0.9, 0.9), (0.9, 0.9))


@torch.no_grad()
def test_copies_that_are_alike_are_played_as_they_are(mixer):
    swell = 0.3 * torch.sin(torch.arange(STEPS) / STEPS * 6.2832)
    sources = spectra(swell, swell, swell)
    assert torch.allclose(mixer(sources, ALIKE), sources[:, 1], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_own_sound_is_played_where_the_context_does_not_repeat_itself_and_nowhere_else(mixer):
    changing = mixer.bands(spectra(3 * noise(STEPS))[:, 0])  # by more than OWN_ERROR from step to step
    sources = mixer_noise(3)
    for past, own in ((changing, True), (None, False)):
        mixed = mixer(sources, copies_of((0.0, 0.0), (0.0, 0.0), past=past))
        error = (mixed - sources[:, 0]).abs().square().mean() / sources[:, 0].abs().square().mean()
        assert (error < 0.02) == own


# Power


@torch.no_grad()
def test_every_band_gets_the_power_that_the_copies_have(mixer):
    """Copies that differ cancel in part when they are added up; own sound has next to no share."""
    sources, tilt = mixer_noise(4), torch.linspace(1, 0.3, BINS)[:, None]
    sources = torch.cat([5 * sources[:, :1], tilt * sources[:, 1:]], dim=1)
    copies = copies_of((0.6, 0.6), (0.6, 0.6), (0.6, 0.6))
    power = (mixer.bands.power(x).mean(-1) for x in (mixer(sources, copies), sources[:, 1:].mean(1), sources[:, 1:]))
    mixed, added, each = power
    assert torch.allclose(mixed[0], each[0].mean(0), rtol=0.1)
    assert (added < 0.5 * each.mean(1)).all()


@torch.no_grad()
def test_power_of_a_band_is_that_of_its_sources(mixer):
    sources, shares = mixer_noise(3), torch.zeros(1, 3, 1, BANDS)
    sources = sources * torch.tensor([1.0, 0.5, 2.0])[:, None, None, None]
    shares[:, 1, :, : BANDS // 2], shares[:, 2, :, BANDS // 2 :] = 1, 1
    mixed = mixer_noise(1, seed=1)[:, 0]
    power = mixer.bands.power(mixed * mixer.power_correction(sources, mixed, shares)).mean(-1)[0, 0]
    assert torch.allclose(power[: BANDS // 2 - 2], torch.tensor(0.25), rtol=0.2)
    assert torch.allclose(power[BANDS // 2 + 2 :], torch.tensor(4.0), rtol=0.2)


@torch.no_grad()
def test_power_is_corrected_by_no_more_than_a_neper(mixer):
    """Of a copy and its opposite next to nothing is left, and what is left is not made loud."""
    copy = mixer_noise(1)
    sources = torch.cat([torch.zeros_like(copy), copy, -0.9 * copy], dim=1)
    mixed = 0.05 * copy[:, 0]
    again = mixed * mixer.power_correction(
        sources, mixed, torch.tensor([0.0, 0.5, 0.5])[None, :, None, None].expand(-1, -1, 1, BANDS)
    )
    assert torch.allclose(again, math.e * mixed, rtol=1e-3)


# Shapes


@torch.no_grad()
def test_songs_of_a_batch_do_not_hear_each_other(model):
    z, songs = noise(2, 4, 200, seed=1), 0.1 * noise(2, 2, 24000)
    both = model.decode(z, copies=model.copies(songs))
    alone = model.decode(z[1:], copies=model.copies(songs[1:]))
    assert torch.allclose(both[1:], alone, atol=1e-5)


@pytest.mark.parametrize("latents", [100, 101, 299])
@torch.no_grad()
def test_any_number_of_latents_is_decoded_with_copies(model, latents):
    copies = model.copies(0.1 * noise(1, 2, LENGTH))
    assert model.decode(noise(1, 4, latents), copies=copies, start=-HOP).shape == (1, 2, latents * HOP)
