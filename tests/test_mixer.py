"""The mixer: at first it plays the loop, it plays only what is there, it leads levels to what the copies expect, and
what it mixes keeps its power."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from continuation.mixer import PULL, STEP_FRAMES, Mixer, band_edges, interpolation, pooling
from continuation.repetition import Copies, find_copies
from model import ContinuationModel, with_overrides

HOP, LENGTH = 120, 36000  # 3 s at 12 kHz
BINS = 241


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> ContinuationModel:
    torch.manual_seed(0)
    return ContinuationModel(with_overrides("tiny", chunk_samples=LENGTH)).eval()


@pytest.fixture
def trained(model) -> ContinuationModel:
    """With shares that differ from source to source and from frame to frame."""
    logits = model.decoder.mixer.to_logits
    torch.nn.init.normal_(logits.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    yield model
    torch.nn.init.zeros_(logits.weight)


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


@torch.no_grad()
def test_untrained_mixer_plays_what_repeats_itself_as_it_was(model):
    song = 0.1 * noise(1, 2, 7001).repeat(1, 1, 12)[..., : 2 * LENGTH]
    played = model.decode(noise(1, 32, 300, seed=1), copies=model.copies(song[..., :LENGTH]))
    error = (played - song[..., LENGTH:])[..., 500:-500].square().mean()  # the very ends have half a window
    assert error < 1e-3 * song.square().mean()


@torch.no_grad()
def test_untrained_mixer_plays_own_sound_where_there_are_no_copies(model):
    z, copies = noise(2, 32, 300, seed=1), model.copies(0.1 * noise(2, 2, LENGTH))
    absent = replace(copies, present=torch.zeros_like(copies.present))
    assert torch.allclose(model.decode(z, copies=absent), model.decode(z), atol=1e-5)


@torch.no_grad()
def test_absent_copy_is_not_heard(trained):
    z, copies = noise(1, 32, 300, seed=1), trained.copies(0.1 * noise(1, 2, LENGTH))
    present = torch.tensor([[True, False, False, False, False, False]])
    alone = replace(copies, present=present)
    shares = shares_of(trained, z, alone)
    assert shares[:, 2:].abs().max() == 0
    assert torch.allclose(shares[:, :2].sum(1), torch.ones(()))


def shares_of(model: ContinuationModel, z: torch.Tensor, copies) -> torch.Tensor:
    decoder, mixer = model.decoder, model.decoder.mixer
    hidden = decoder.trunk(z)
    sources, context = decoder.sources(decoder.head(hidden)[0], copies, 0)
    features = mixer.features(mixer.levels(sources), mixer.levels(context), copies, 0)
    return mixer.shares(features, hidden, torch.nn.functional.pad(copies.present, (1, 0), value=True))


@torch.no_grad()
def test_copies_that_cancel_are_given_back_their_power():
    """Of a copy and half of its opposite at equal shares a quarter is left; it gets the power that both have in the
    mean, as far as a neper leads."""
    mixer, copies = Mixer(1, BINS, 8), copies_of([[0.5, 0.5], [0.5, 0.5]])
    copy = torch.complex(noise(1, 1, 1, BINS, 40), noise(1, 1, 1, BINS, 40, seed=1)) * mixer.typical_power.sqrt()
    sources = torch.cat([torch.zeros_like(copy), copy, -0.5 * copy], dim=1)
    shares = torch.zeros(1, 3, len(band_edges(BINS)) - 1, 10)
    shares[:, 1:] = 0.5
    mixed = (sources * mixer.to_bins(shares, 40)).sum(1)
    again = mixed * mixer.power_correction(sources, mixed, copies)
    wanted = 0.5 * copy.abs().square().mean() * (1 + 0.25)
    assert mixed.abs().square().mean() < 0.15 * wanted
    most = math.e**2 * mixed.abs().square().mean().item()
    assert again.abs().square().mean().item() == pytest.approx(min(wanted.item(), most), rel=0.1)


def copies_of(similarity: list[list[float]], present: tuple[bool, ...] | None = None) -> Copies:
    """Of one silent context, as similar as is said."""
    count = len(similarity)
    present = torch.tensor([present or (True,) * count])
    lags = 6000 + 1000 * torch.arange(count)[None]
    return Copies(torch.zeros(1, 1, LENGTH), lags, torch.tensor([similarity]), present, HOP)


@torch.no_grad()
def test_songs_of_a_batch_do_not_hear_each_other(trained):
    z, songs = noise(2, 32, 300, seed=1), 0.1 * noise(2, 2, LENGTH)
    both = trained.decode(z, copies=trained.copies(songs))
    alone = trained.decode(z[1:], copies=trained.copies(songs[1:]))
    assert torch.allclose(both[1:], alone, atol=1e-5)


@pytest.mark.parametrize("latents", [100, 101, 299])
def test_any_number_of_latents_is_decoded_with_copies(model, latents):
    copies = find_copies(0.1 * noise(1, 2, LENGTH), HOP)
    assert model.decode(noise(1, 32, latents), copies=copies, start=-HOP).shape == (1, 2, latents * HOP)


# ---- levels are led to what the copies expect together ----

STEPS = 100


def test_what_is_expected_is_the_mean_of_the_copies_that_are_present_weighted_by_their_similarity():
    mixer = Mixer(1, BINS, 8)
    levels = noise(1, 4, len(band_edges(BINS)) - 1, STEPS)
    copies = copies_of([[0.9, 0.6], [0.2, 0.3], [1.0, 1.0]], (True, True, False))
    trust = torch.tensor([math.exp(2 * 0.6) / (1.02 - 0.9**2), math.exp(2 * 0.3) / (1.02 - 0.2**2)])
    weights = trust / trust.sum()
    assert weights[0] > 0.8  # that is, by far more than a mean
    expected = weights[0] * levels[:, 1] + weights[1] * levels[:, 2]
    assert torch.allclose(mixer.expected(levels, copies)[:, 0], expected, atol=1e-5)


def test_without_copies_own_sound_expects_itself():
    levels = noise(1, 3, len(band_edges(BINS)) - 1, STEPS)
    copies = copies_of([[1.0, 1.0], [1.0, 1.0]], (False, False))
    assert torch.equal(Mixer(1, BINS, 8).expected(levels, copies), levels[:, :1])


def with_levels(mixer: Mixer, *nepers: torch.Tensor) -> torch.Tensor:
    """Spectra of noise-like phases, whose magnitudes follow `nepers` (steps,) in all bins."""
    phases = torch.exp(6.28j * torch.rand(BINS, 1, generator=torch.Generator().manual_seed(0)))
    swell = torch.stack([level.exp().repeat_interleave(STEP_FRAMES) for level in nepers])[:, None, None]
    return (swell * phases * mixer.typical_power.sqrt())[None]


def played(mixer: Mixer, sources: torch.Tensor, copies: Copies, chosen: int) -> torch.Tensor:
    """Levels of what a mixer plays that has chosen one of the sources: (bands, steps)."""
    shares = torch.zeros(1, sources.shape[1], len(band_edges(BINS)) - 1, STEPS)
    shares[:, chosen] = 1
    mixer.shares = lambda *given: shares
    with torch.no_grad():
        mixed = mixer(sources, torch.zeros(1, 1, BINS, LENGTH // HOP, dtype=torch.cfloat), None, copies, 0)
    return mixer.levels(mixed)[0]


@pytest.mark.parametrize("chosen", [0, 3], ids=["own sound", "copy that disagrees"])
def test_level_of_a_source_is_led_to_that_of_copies_that_agree(chosen):
    """Step by step by a share of the way, PULL at first; over the whole it gets all of the copies' power."""
    mixer = Mixer(1, BINS, 8)
    swell = 0.3 * torch.sin(torch.arange(STEPS) / STEPS * 6.2832)
    sources = with_levels(mixer, -0.5 - swell, swell, swell, -0.5 - swell)
    copies = copies_of([[0.9, 0.9], [0.9, 0.9], [0.0, 0.0]])
    before, after = mixer.levels(sources)[0, chosen], played(mixer, sources, copies, chosen)
    assert torch.allclose(mixer.expected(mixer.levels(sources), copies)[0, 0, 0], swell, atol=0.02)
    change = (after - before)[:, 2:-2]
    change = change - change.mean(1, keepdim=True)
    assert torch.allclose(change, PULL * 2 * swell[2:-2].expand_as(change), atol=0.03)
    assert after.mul(2).exp().mean().item() == pytest.approx(swell.mul(2).exp().mean().item(), rel=0.05)


@pytest.mark.parametrize("present", [(False, False), (True, True)], ids=["no copies", "copies of the same level"])
def test_nothing_is_led_anywhere_without_copies_or_where_they_agree_with_the_source(present):
    mixer = Mixer(1, BINS, 8)
    swell = 0.3 * torch.sin(torch.arange(STEPS) / STEPS * 6.2832)
    other = swell if any(present) else -swell
    sources = with_levels(mixer, swell, other, other)
    copies = copies_of([[0.9, 0.9], [0.9, 0.9]], present)
    assert torch.allclose(played(mixer, sources, copies, 0), mixer.levels(sources)[0, 0], atol=1e-3)


@torch.no_grad()
def test_pull_is_trained_and_is_of_each_band(model):
    assert model.decoder.mixer.pull.requires_grad
    assert model.decoder.mixer.pull.shape == (2 * (len(band_edges(BINS)) - 1), 1)
