"""What repeats itself goes on as it would have; what does not says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_networks import noise

from continuation.layers import crossfade
from continuation.repetition import COPIES, LOOP_BIAS, find_copies, onset_strength, tile_tail

HOP = 20


def loop(song: torch.Tensor, hop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What follows songs by their loop, as long as they are, and its correlation: (batch,)."""
    copies = find_copies(song, hop, count=1)
    return copies.play(0, song.shape[-1])[:, 0], copies.similarity[:, 0, 0]


def loop_lag(song: torch.Tensor, hop: int) -> tuple[torch.Tensor, torch.Tensor]:
    copies = find_copies(song, hop, count=1)
    return copies.lags[:, 0], copies.similarity[:, 0, 0]


# Of sound


@pytest.mark.parametrize("length", [20000, 20001, 20004])
@pytest.mark.parametrize("period", [2001, 5003, 15997])
def test_sound_that_repeats_itself_is_continued_to_the_sample(period, length):
    song = noise(2, 2, period).repeat(1, 1, 22)[..., : 2 * length]
    repeated, correlation = loop(song[..., :length], HOP)
    assert torch.equal(repeated, song[..., length:])
    assert torch.allclose(correlation, torch.ones(2), atol=1e-4)


def test_correlation_is_the_share_of_the_sound_that_repeats_itself():
    """Under as much noise as there is repetition, half of the power is shared."""
    song = noise(3, 2, 5003).repeat(1, 1, 4)[..., :20000] + noise(3, 2, 20000, seed=1)
    _, correlation = loop(song, HOP)
    assert torch.allclose(correlation, torch.full((3,), 0.5), atol=0.05)


def test_sound_that_never_repeats_itself_is_not_trusted():
    assert loop(noise(3, 2, 20000), HOP)[1].max() < 0.1


def test_silence_is_repeated_as_silence_and_not_trusted():
    repeated, correlation = loop(torch.zeros(2, 1, 20000), HOP)
    assert not repeated.any()
    assert not correlation.any()


@pytest.mark.parametrize("level", [1e-3, 1.0, 10.0])
def test_level_does_not_matter(level):
    song = noise(1, 2, 5003).repeat(1, 1, 4)[..., :20000] + 0.5 * noise(1, 2, 20000, seed=1)
    plain, scaled = loop(song, HOP), loop(level * song, HOP)
    assert torch.allclose(scaled[0], level * plain[0])
    assert torch.allclose(scaled[1], plain[1], atol=1e-3)


def test_much_softer_passage_is_no_match():
    song = noise(1, 2, 20000)
    song[..., :6000] = 0.03 * song[..., -6000:]
    assert loop(song, HOP)[1] < 0.4


def test_sides_in_antiphase_do_not_cancel():
    song = noise(1, 1, 5003).repeat(1, 1, 4)[..., :20000]
    assert loop(torch.cat([song, -song], dim=1), HOP)[1] > 0.99


def test_songs_of_a_batch_do_not_hear_each_other():
    songs = torch.cat([noise(1, 2, period).repeat(1, 1, 10)[..., :20000] for period in (3001, 4999)])
    both, alone = loop(songs, HOP), loop(songs[1:], HOP)
    assert torch.equal(both[0][1:], alone[0])


def beats(length: int, *periods: int) -> torch.Tensor:
    """Bursts of noise that is never the same, one after each period and then all over again: (1, 2, length)."""
    song, place, beat = 0.01 * noise(1, 2, length), 0, 0
    while place < length:
        song[..., place : place + 200] += noise(1, 2, 200, seed=beat + 1)[..., : length - place]
        place, beat = place + periods[beat % len(periods)], beat + 1
    return song


@pytest.mark.parametrize("periods", [(4000,), (1000, 2500), (2000, 1000, 3300)])
def test_beat_that_repeats_itself_is_found_where_no_sound_does(periods):
    """In a song of 20 000 samples the lag is a whole number of bars, to the hop."""
    lag, correlation = loop_lag(beats(20000, *periods), HOP)
    bar = sum(periods)
    assert abs(lag.item() - bar * round(lag.item() / bar)) <= HOP
    assert correlation < 0.3


def test_of_many_repetitions_the_longest_is_taken():
    lag, _ = loop_lag(noise(1, 2, 2500).repeat(1, 1, 8)[..., :20000], HOP)
    assert lag == 6 * 2500


def test_sound_decides_between_beats_that_are_alike():
    """Every bar of 4000 samples has the same beat, every third the same sound."""
    bars = torch.cat([beats(4000, 4000) + 0.3 * noise(1, 2, 4000, seed=seed) for seed in (7, 8, 9)], dim=-1)
    lag, correlation = loop_lag(bars.repeat(1, 1, 2)[..., :20000], HOP)
    assert lag == 12000
    assert correlation > 0.99


def test_onset_strength_rises_where_a_sound_begins_and_in_its_band():
    length, start = 20000, 8000
    tone = torch.sin(2 * torch.pi * 0.4 * torch.arange(length)) * (torch.arange(length) >= start)
    strength = onset_strength(tone[None, None], HOP)[0]
    band, frame = divmod(int(strength.argmax()), strength.shape[1])
    assert band == strength.shape[0] - 1  # of 8, the last from 0.31 of the sample rate on
    assert abs(frame - start // HOP) <= 2


# Copies


def test_lags_of_copies_are_apart_and_the_first_is_the_loop():
    song = noise(2, 2, 20000)
    copies = find_copies(song, HOP)
    assert copies.lags.shape == (2, COPIES)
    distances = (copies.lags[:, :, None] - copies.lags[:, None]).abs() + 20000 * torch.eye(COPIES, dtype=torch.long)
    assert distances.min() >= 0.01 * 20000
    assert torch.equal(copies.play(0, 20000)[:, 0], loop(song, HOP)[0])


def test_copy_leads_up_to_the_cut_and_over_it_as_the_sound_did_a_lag_before():
    song = noise(1, 2, 20000)
    lag = torch.tensor([3001])
    assert torch.equal(tile_tail(song, lag, -500, 2500, seam=40), song[..., 20000 - 3001 - 500 : 20000 - 3001 + 2000])


def test_copy_may_be_played_in_parts():
    song, lag = noise(1, 2, 20000), torch.tensor([3001])
    whole = tile_tail(song, lag, 0, 20000, seam=40)
    assert torch.equal(tile_tail(song, lag, 7000, 5000, seam=40), whole[..., 7000:12000])


def test_seam_of_a_copy_is_no_step():
    """A ramp that starts anew at every seam falls back over the whole fade, not from one sample to the next."""
    ramp = torch.arange(20000.0)[None, None] / 20000
    plain, faded = (tile_tail(ramp, torch.tensor([3000]), 0, 20000, seam).diff().abs().max() for seam in (0, 40))
    assert plain > 0.14
    assert faded < 0.005


def test_copies_of_a_batch_do_not_hear_each_other():
    songs = torch.cat([noise(1, 2, period).repeat(1, 1, 10)[..., :20000] for period in (3001, 4999)])
    both, alone = find_copies(songs, HOP), find_copies(songs[1:], HOP)
    assert torch.equal(both.lags[1:], alone.lags)
    assert torch.equal(both.play(0, 9000)[1:], alone.play(0, 9000))


def test_multiples_of_the_first_lags_are_copies_too():
    """As long as the context allows; a lag that has none within it gets no weight."""
    song = noise(1, 2, 20000)
    copies = find_copies(song, HOP, count=5)
    found = torch.tensor([[3000, 10000, 4000, 9000, 2000]])
    more = replace(copies, lags=found, base_lags=found).with_multiples()
    assert more.lags.tolist() == [[3000, 10000, 4000, 9000, 2000, 18000, 10000, 16000, 18000]]
    assert more.base_lags.tolist() == [[3000, 10000, 4000, 9000, 2000, 3000, 10000, 4000, 9000]]
    assert torch.equal(more.similarity[:, 5:], copies.similarity[:, :4])
    assert more.bias.tolist() == [[LOOP_BIAS, 0, 0, 0, 0, LOOP_BIAS, -torch.inf, 0, 0]]
    assert torch.equal(more.play(0, 9000)[:, 5], song[..., 2000:11000])


def test_seams_are_where_copies_begin_anew():
    song = noise(1, 1, 5003).repeat(1, 1, 4)[..., :20000]
    copies = find_copies(song, HOP, count=1)
    lag = copies.lags.item()
    assert copies.seams(20000) == list(range(lag, 20000, lag))


def test_crossfade_is_a_straight_line_from_one_sound_to_the_other():
    faded = crossfade(torch.zeros(1, 2, 100), torch.ones(1, 2, 11))
    assert faded.shape == (1, 2, 100)
    assert not faded[..., :89].any()
    assert torch.allclose(faded[..., 89:], torch.linspace(0, 1, 11).expand(1, 2, 11))


def test_variety_changes_which_copy_is_preferred_with_the_seed():
    copies = find_copies(0.1 * noise(1, 2, 24000), 120)
    assert copies.bias[0].tolist() == [LOOP_BIAS] + (len(copies.lags[0]) - 1) * [0.0]
    assert torch.equal(copies.varied(0.0, 1).bias, copies.bias)
    preferred = [copies.varied(2.0, seed).bias.argmax().item() for seed in range(20)]
    assert len(set(preferred)) > 4
    assert preferred == [copies.varied(2.0, seed).bias.argmax().item() for seed in range(20)]
