"""The equaliser: bands of 1/24 octave, the expected spectrum, and the filter."""

from __future__ import annotations

import dataclasses

import pytest
import synth
import torch
from small_networks import CHUNK, RATE, noise, small_network, untrained_network
from torch import nn

from continuation import equaliser
from continuation.equaliser import BANDS_PER_OCTAVE, FEATURES, LARGEST_GAIN, LOWEST_HZ, Equaliser, LogBands
from continuation.repetition import Copies, find_copies

LARGEST_DB = 20 * LARGEST_GAIN / 2.302585


def tone(frequency: float, rate: int = RATE, seconds: float = 2, level: float = 0.1) -> torch.Tensor:
    return torch.from_numpy(synth.tone(frequency, seconds, rate, 2, level))[None]


def band_of(frequency: float) -> int:
    """The band in whose middle a note of this frequency lies."""
    return int(BANDS_PER_OCTAVE * torch.tensor(frequency / LOWEST_HZ).log2())


def copies_of(x: torch.Tensor, model) -> Copies:
    """Copies of x, with levels."""
    return dataclasses.replace(find_copies(x, model.config.hop).with_multiples(), levels=model.levels(x))


# Bands


@pytest.mark.parametrize("rate", [2000, 12000, 24000, 48000])
def test_bands_reach_from_the_lowest_note_to_half_the_sample_rate_and_weigh_all_their_bins_alike(rate):
    bands, count = LogBands(rate), equaliser.band_count(rate)
    assert bands.pool.shape[0] == count
    assert band_of(rate / 2 * 0.999) in (count - 1, count)
    assert torch.allclose(bands.pool.sum(1), torch.ones(count))


@pytest.mark.parametrize("frequency", [110.0, 220.0, 440.0, 880.0])
def test_note_is_loudest_in_its_own_band_and_a_semitone_away_it_is_softer(frequency):
    """By 10 dB at least from 220 Hz on."""
    spectrum = LogBands(12000)(tone(frequency, 12000)).mean(-1).log()[0, 0]
    own = band_of(frequency)
    assert abs(int(spectrum.argmax()) - own) <= 1
    if frequency >= 220:
        assert spectrum[own] - spectrum[[own - 2, own + 3]].max() > 2.3


def test_side_alone_has_no_power_in_mid():
    x = tone(300.0) * torch.tensor([1.0, -1.0])[:, None]
    mid, side = LogBands(RATE)(x).mean((2, 3))[0]
    assert mid < 1e-6 * side


# The filter


@pytest.mark.parametrize("length", [CHUNK, CHUNK + 321])
def test_filter_without_gains_changes_nothing_at_the_edges_neither(length):
    x = noise(2, 2, length, level=0.1)
    assert torch.allclose(LogBands(RATE).filter(x, torch.zeros(2, 2, equaliser.band_count(RATE))), x, atol=1e-6)


def test_filter_lifts_one_note_and_leaves_another():
    bands = LogBands(RATE)
    first, second = tone(200.0), tone(500.0)
    gains = torch.zeros(1, 2, equaliser.band_count(RATE))
    gains[..., band_of(350.0) :] = 0.5
    before, after = (bands(x).mean(-1)[0, 0] for x in (first + second, bands.filter(first + second, gains)))
    change_db = 10 * (after / before).log10()
    assert change_db[band_of(500.0)] == pytest.approx(0.5 * 20 / 2.302585, abs=0.1)
    assert change_db[band_of(200.0)] == pytest.approx(0, abs=0.1)


def test_silence_stays_silent():
    silence = torch.zeros(1, 2, CHUNK)
    assert torch.equal(LogBands(RATE).filter(silence, noise(1, 2, equaliser.band_count(RATE))), silence)


# Features and correction


def test_what_repeats_exactly_needs_no_correction():
    """The expected spectrum of a song that goes on as it was is the true one."""
    model = untrained_network()
    period = noise(1, 2, CHUNK // 4, level=0.1)
    song = period.repeat(1, 1, 8)
    _, correction = model.core.equaliser.training_pair(copies_of(song[..., :CHUNK], model), song[..., CHUNK:])
    assert correction.abs().mean() < 0.1


def test_correction_says_which_notes_come_and_which_go():
    """A song of one note is followed by another note."""
    model = untrained_network()
    past, future = tone(200.0) + noise(1, 2, CHUNK, level=1e-3), tone(500.0) + noise(1, 2, CHUNK, level=1e-3)
    features, correction = model.core.equaliser.training_pair(copies_of(past, model), future)
    assert features.shape[1:] == model.config.pair_shapes["features"] == (2, FEATURES, correction.shape[-1])
    assert correction.shape[1:] == model.config.pair_shapes["correction"]
    assert correction[0, 0, band_of(500.0)] > 3
    assert correction[0, 0, band_of(200.0)] < -3


def test_features_do_not_depend_on_loudness_nor_on_the_target():
    model = untrained_network()
    past = noise(1, 2, CHUNK, level=0.1)
    first, _ = model.core.equaliser.training_pair(copies_of(past, model), noise(1, 2, CHUNK, seed=1))
    second, _ = model.core.equaliser.training_pair(copies_of(past, model), noise(1, 2, CHUNK, seed=2))
    assert torch.equal(first, second)
    softer, _ = model.core.equaliser.features(copies_of(0.5 * past, model), CHUNK)
    assert torch.allclose(softer, first, atol=0.05)


def test_features_are_exact_under_autocast():
    model = untrained_network()
    past, future = noise(1, 2, CHUNK, level=0.1), noise(1, 2, CHUNK, seed=1, level=0.1)
    exact = model.core.equaliser.training_pair(copies_of(past, model), future)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.core.equaliser.training_pair(copies_of(past, model), future)
    assert all(torch.equal(a, b) for a, b in zip(exact, found, strict=True))


def test_features_of_a_batch_are_those_of_its_items():
    model = untrained_network()
    x = torch.cat([noise(1, 2, CHUNK, level=0.1), tone(200.0) + noise(1, 2, CHUNK, seed=3, level=0.01)])
    both, _ = model.core.equaliser.features(copies_of(x, model), CHUNK)
    alone, _ = model.core.equaliser.features(copies_of(x[1:], model), CHUNK)
    assert torch.allclose(both[1:], alone, atol=1e-3)


@pytest.mark.parametrize("x", [torch.zeros(1, 2, CHUNK), 1e-6 * torch.ones(1, 2, CHUNK)])
def test_features_of_silence_are_finite(x):
    model = untrained_network()
    features, correction = model.core.equaliser.training_pair(copies_of(x, model), x)
    assert torch.isfinite(features).all()
    assert torch.isfinite(correction).all()


# The network


def test_untrained_equaliser_leaves_the_sound_as_it_is():
    model = untrained_network()
    x = noise(1, 2, CHUNK, level=0.1)
    copies = copies_of(x, model)
    assert torch.allclose(model.core.equaliser.equalise(x, copies), x, atol=1e-6)


def test_continuation_is_mixed_and_then_equalised():
    model = small_network()
    x = noise(1, 2, CHUNK, level=0.1)
    copies, z = copies_of(x, model), model.encode(x)
    mixed = model.decode_with_magnitudes(z, copies)[0]
    assert torch.equal(model.decode(z, copies=copies), model.core.equaliser.equalise(mixed, copies))
    assert not torch.allclose(model.decode(z, copies=copies), mixed, atol=1e-3)


def test_gains_are_limited():
    """With corrections of 100 nepers, up and down, for every second octave."""
    model = untrained_network()
    bands = equaliser.band_count(RATE)
    wanted = 100.0 * (torch.arange(bands) // BANDS_PER_OCTAVE % 2 * 2 - 1).expand(1, 2, -1)
    eq = model.core.equaliser
    eq.forward = lambda features: wanted
    x = tone(75.0) + tone(140.0)
    y = eq.equalise(x, copies_of(x, model))
    levels = [LogBands(RATE)(sound).mean(-1)[0, 0, [band_of(75.0), band_of(140.0)]].log10() for sound in (x, y)]
    change = 10 * (levels[1] - levels[0])
    assert abs(change[1] - change[0]) == pytest.approx(2 * LARGEST_DB, abs=1)


def test_equaliser_learns_that_high_notes_come():
    """From songs whose treble is always louder than before by 6 dB."""
    torch.manual_seed(0)
    eq = Equaliser(RATE, dropout=0.1)
    bands = equaliser.band_count(RATE)
    true = (1.4 * (torch.arange(bands) > bands // 2)).expand(4, 2, -1)
    optimiser = torch.optim.AdamW(eq.parameters(), 1e-2)
    for step in range(60):
        features = noise(4, 2, FEATURES, bands, seed=step)
        features[:, :, -1] = torch.linspace(-1, 1, bands)
        loss = nn.functional.l1_loss(eq(features), true)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.3 * true.mean()
