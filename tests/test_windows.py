"""Training windows: random decisions depend on their key alone, a window stays in its song, speed moves the pitch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import synth
from fake_windows import CHUNK, RATE, split_of, windows_of

import model
from continuation import audio
from continuation.dataset import read_window
from continuation.rng import STREAMS, make_rng
from continuation.windows import (
    CONTEXT_LEVEL,
    GAIN_RANGE_DB,
    MARGIN_SECONDS,
    QUIETEST_RMS,
    SPEED_RANGE,
    Augmentation,
    Windows,
    change_speed,
    fast_length,
    next_other,
    rms_gain,
)

PLAIN = {"gain": 1.0, "swap": False, "speed": 1.0}


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


# Random decisions


def test_generators_of_one_key_are_the_same_and_those_of_any_other_key_differ():
    keys = [(0, "crop", 1, 2), (1, "crop", 1, 2), (0, "pair", 1, 2), (0, "crop", 2, 2), (0, "crop", 1, 3)]
    first = [make_rng(*key).random(4).tolist() for key in keys]
    assert first == [make_rng(*key).random(4).tolist() for key in reversed(keys)][::-1]
    assert len({tuple(values) for values in first}) == len(keys)


def test_every_stream_has_its_own_number():
    assert len(set(STREAMS.values())) == len(STREAMS)


def test_augmentation_keeps_its_ranges_and_uses_all_of_them():
    changes = [Augmentation.sample(make_rng(0, "crop", item)) for item in range(2000)]
    decibels = 20 * np.log10([abs(change.gain) for change in changes])
    speeds = np.array([change.speed for change in changes])
    assert min(decibels) == pytest.approx(GAIN_RANGE_DB[0], abs=0.1)
    assert max(decibels) == pytest.approx(GAIN_RANGE_DB[1], abs=0.1)
    assert speeds.min() == pytest.approx(1 - SPEED_RANGE, abs=1e-3)
    assert speeds.max() == pytest.approx(1 + SPEED_RANGE, abs=1e-3)
    for share in ((speeds == 1).mean(), np.mean([c.swap for c in changes]), np.mean([c.gain < 0 for c in changes])):
        assert share == pytest.approx(0.5, abs=0.05)


# Where windows are cut


def test_pair_is_input_and_target_as_stored(counting):
    for pair, (first, second) in enumerate(counting.split.pairs):
        expected = np.concatenate([counting.split.rows[first], counting.split.rows[second]], axis=1)
        assert np.array_equal(counting.pair(pair), expected)


@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
def test_window_is_consecutive_samples_of_its_own_song_within_half_a_chunk_of_its_pair(counting, place):
    for pair in range(len(counting)):
        window = counting.window(pair, 2, Augmentation(place, **PLAIN))
        start, song = int(window[0, 0]), counting.song(pair)
        assert np.array_equal(window[0], np.arange(start, start + 2 * CHUNK))
        assert abs(start - counting.split.pairs[pair, 0] * CHUNK) <= CHUNK // 2
        assert song["first_row"] * CHUNK <= start
        assert start + 2 * CHUNK <= (song["first_row"] + song["rows"]) * CHUNK


def test_places_0_and_1_are_the_ends_of_the_room_that_a_window_has(counting):
    middle = 4  # rows 6 and 7 of a song of rows 5 to 9
    starts = [counting.window(middle, 2, Augmentation(place, **PLAIN))[0, 0] for place in (0.0, 1.0)]
    assert counting.split.pairs[middle].tolist() == [6, 7]
    assert starts == [5.5 * CHUNK, 6.5 * CHUNK]


@pytest.mark.parametrize("speed", [0.94, 1.0, 1.06])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_window_and_crop_never_leave_their_song_at_any_speed(noisy, place, speed, monkeypatch):
    asked = []

    def note(split, song, start, length):
        asked.append((song, start, length))
        return read_window(split, song, start, length)

    monkeypatch.setattr("continuation.windows.read_window", note)
    change = Augmentation(place, 1.0, False, speed)
    for pair in range(len(noisy)):
        assert noisy.window(pair, 2, change).shape == (2, 2 * CHUNK)
        assert noisy.crop(pair, 200, change, place).shape == (2, 200)
        assert all(song is noisy.song(pair) for song, _, _ in asked)
        assert all(start >= 0 and start + length <= song["rows"] * CHUNK for song, start, length in asked)
        asked.clear()


@pytest.mark.parametrize("place", [0.0, 0.4, 1.0])
def test_crop_is_consecutive_samples_of_the_window_of_one_chunk(counting, place):
    change = Augmentation(0.5, **PLAIN)
    for pair in range(len(counting)):
        crop, whole = counting.crop(pair, 200, change, place), counting.window(pair, 1, change)
        offset = round(place * (CHUNK - 200))
        assert np.array_equal(crop, whole[:, offset : offset + 200])


def test_crop_of_a_whole_chunk_cannot_be_faster(counting):
    change = Augmentation(0.5, **PLAIN | {"speed": 1.05})
    crop = counting.crop(0, CHUNK, change, 0.7)
    assert np.array_equal(crop, counting.window(0, 1, Augmentation(0.5, **PLAIN)))


def test_other_passage_is_a_chunk_of_a_pair_of_the_same_song_with_two_between(monkeypatch):
    monkeypatch.setattr("continuation.windows.rms_gain", lambda context: 32768.0)
    rows = np.arange(19 * 10, dtype=np.int16).reshape(19, 1, 10)
    split = split_of(rows, song_rows=(16, 3))
    faded = (split.pairs[:, 1] >= 13) & (split.pairs[:, 1] < 16)  # the first song's last rows are in no pair
    windows = Windows(replace(split, pairs=split.pairs[~faded]), {"chunk_samples": 10, "sample_rate": RATE})
    chosen = set()
    for pair, (context, target) in enumerate(windows.split.pairs):
        x = windows.other_passage(pair)
        if context >= 16:
            assert x is None  # three chunks have none far enough
            continue
        assert np.array_equal(x, windows.other_passage(pair)) and x.shape == (1, 10)
        row = int(x[0, 0]) // 10
        assert row <= context - 3 or row >= target + 3
        chosen.add(row)
    assert len(chosen) > 4 and max(chosen) <= 12


# Level, swap, polarity


def test_context_has_the_level_that_generation_gives_it(noisy):
    change = Augmentation(0.7, -0.5, False, 1.0)
    for pair in range(len(noisy)):
        assert rms(noisy.pair(pair)[:, :CHUNK]) == pytest.approx(CONTEXT_LEVEL, rel=1e-4)
        assert rms(noisy.window(pair, 2, change)[:, :CHUNK]) == pytest.approx(0.5 * CONTEXT_LEVEL, rel=1e-4)


def test_level_is_set_by_the_context_alone():
    rows = audio.to_int16(synth.noise(1, 2 * CHUNK / RATE, RATE)).reshape(1, 2, CHUNK).transpose(1, 0, 2)
    louder_target = rows.copy()
    louder_target[1] *= 2
    plain, changed = (windows_of(x, song_rows=(2,)).pair(0) for x in (rows, louder_target))
    assert np.array_equal(plain[:, :CHUNK], changed[:, :CHUNK])
    assert np.allclose(2 * plain[:, CHUNK:], changed[:, CHUNK:])


def test_level_of_a_crop_is_that_of_its_window_so_that_soft_places_stay_soft():
    rows = np.concatenate([np.full((2, 1, CHUNK // 2), 100), np.full((2, 1, CHUNK // 2), 8000)], axis=2)
    windows = windows_of(rows.astype(np.int16), song_rows=(2,))
    soft = windows.crop(0, 200, Augmentation(0.0, **PLAIN), place=0.0)
    assert rms(soft) == pytest.approx(CONTEXT_LEVEL * 100 / np.sqrt((100**2 + 8000**2) / 2), rel=1e-4)


def test_training_and_generation_bring_a_context_to_the_same_level():
    assert (CONTEXT_LEVEL, QUIETEST_RMS) == (model.CONTEXT_LEVEL, model.QUIETEST_RMS)


def test_silence_stays_silence_and_near_silence_is_lifted_by_no_more_than_the_limit():
    assert rms_gain(np.zeros((2, 100), np.float32)) == CONTEXT_LEVEL / QUIETEST_RMS
    assert rms_gain(np.full((2, 100), 1e-5)) == CONTEXT_LEVEL / QUIETEST_RMS


def test_swap_exchanges_the_channels_and_a_negative_gain_turns_the_polarity(noisy):
    plain, swapped, turned = (
        noisy.window(0, 2, Augmentation(0.2, gain, swap, 1.0))
        for gain, swap in ((1.0, False), (1.0, True), (-1.0, False))
    )
    assert np.array_equal(swapped, plain[::-1])
    assert np.array_equal(turned, -plain)


# Speed


def peak_hz(x: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(x * np.hanning(len(x)), 16 * len(x)))
    return float(np.argmax(spectrum)) * rate / (16 * len(x))


def snapped(speed: float, length: int, rate: int = RATE) -> float:
    """The speed that `length` samples are really played at: one whose Fourier transform is fast."""
    length += 2 * round(MARGIN_SECONDS * rate)
    return fast_length(speed * length) / length


@pytest.mark.parametrize("length", [12000, 24000, 480000, 960000])
@pytest.mark.parametrize("speed", [0.94, 0.999, 1.06])
def test_speed_is_at_most_a_percent_above_the_one_that_is_drawn(speed, length):
    assert speed <= snapped(speed, length) <= 1.01 * speed


@pytest.mark.parametrize("speed", [0.94, 0.97, 1.06])
def test_speed_multiplies_the_pitch_and_keeps_length_and_level(speed):
    rate, seconds = 8000, 2
    x = synth.tone(1000, 4 * seconds, rate)
    windows = windows_of(audio.to_int16(x).reshape(1, 4, -1).transpose(1, 0, 2), song_rows=(4,), rate=rate)
    change = Augmentation(0.5, 1.0, False, speed)
    for y in (windows.window(1, 2, change), windows.crop(1, rate, change, 0.5)):
        assert peak_hz(y[0], rate) == pytest.approx(1000 * snapped(speed, y.shape[1], rate), abs=0.2)
        assert rms(y) == pytest.approx(CONTEXT_LEVEL, rel=0.01)
    assert windows.window(1, 2, change).shape == (1, 2 * seconds * rate)


@pytest.mark.parametrize("speed", [0.94, 1.06])
def test_click_in_a_faster_window_is_where_the_speed_puts_it(speed, monkeypatch):
    monkeypatch.setattr("continuation.windows.rms_gain", lambda context: 1.0)
    rows = np.zeros((5, 1, CHUNK), np.int16)
    rows[2, 0, 300] = 32767
    windows = windows_of(rows, song_rows=(5,))
    start = 1.5 * CHUNK  # of the window of rows 2 and 3 at place 0: half a chunk before them
    window = windows.window(2, 2, Augmentation(0.0, 1.0, False, speed))
    place = (2300 - start) / snapped(speed, 2 * CHUNK) - windows.margin
    assert np.argmax(np.abs(window)) == pytest.approx(place, abs=1)
    crop = windows.crop(2, 400, Augmentation(0.0, 1.0, False, speed), place=1.0)
    start += CHUNK - fast_length((400 + 2 * windows.margin) * speed)
    place = (2300 - start) / snapped(speed, 400) - windows.margin
    assert np.argmax(np.abs(crop)) == pytest.approx(place, abs=1)


def test_same_length_is_left_as_it_is():
    x = synth.noise(0, 1, RATE)
    assert change_speed(x, x.shape[1]) is x


@pytest.mark.parametrize("speed", [0.95, 0.9713, 1.0, 1.0291, 1.06])
def test_first_chunk_of_a_window_does_not_hear_what_follows_it(speed):
    """In the song itself: whatever is there from the first sample after the cut on."""
    change = Augmentation(place=0.0, gain=1.0, swap=False, speed=speed)
    quiet = np.random.default_rng(0).integers(-3000, 3000, (4, 2, CHUNK)).astype(np.int16)
    loud = quiet.transpose(1, 0, 2).reshape(2, -1).copy()
    margin = 0 if speed == 1 else round(MARGIN_SECONDS * RATE)
    played = 1 if speed == 1 else snapped(speed, 2 * CHUNK)
    loud[:, int((margin + CHUNK) * played) + 1 :] = 30000
    loud = loud.reshape(2, 4, CHUNK).transpose(1, 0, 2)
    first, second = (windows_of(rows, (4,)).window(0, 2, change) for rows in (quiet, loud))
    assert np.array_equal(first[:, :CHUNK], second[:, :CHUNK])
    assert not np.array_equal(first[:, CHUNK:], second[:, CHUNK:])


@pytest.mark.parametrize("speed", [0.95, 1.05])
def test_window_at_another_speed_is_continuous_at_the_cut(speed):
    """A slow sine, resampled in two parts, is one sine."""
    chunk = 10 * CHUNK
    sine = (10000 * np.sin(0.02 * np.pi * np.arange(4 * chunk))).astype(np.int16).reshape(4, chunk)
    windows = windows_of(np.stack([sine, sine], axis=1), (4,), rate=10 * RATE)
    x = windows.window(0, 2, Augmentation(place=0.0, gain=1.0, swap=False, speed=speed))[0]
    frequency = 0.02 * np.pi * snapped(speed, 2 * chunk, 10 * RATE)
    error = x[2:] - 2 * np.cos(frequency) * x[1:-1] + x[:-2]  # of a sine's recursion
    assert np.abs(error[chunk - 100 : chunk + 100]).max() < 0.02 * x.max()


def test_another_song_is_never_the_same_music_in_another_file():
    assert [next_other("aabb", i) for i in range(4)] == [2, 2, 0, 0]
    assert next_other("aa", 0) is None


def test_change_of_speed_removes_what_the_new_rate_cannot_hold():
    x = synth.tone(3900, 1, 8000)
    assert rms(change_speed(x, 7200)) < 1e-4  # 0.9 of the samples hold 3600 Hz at most


def test_window_keeps_its_speed_where_the_song_has_no_room_for_another(counting):
    only_pair = 2  # of the song with two rows
    slow, fast = (counting.window(only_pair, 2, Augmentation(0.0, 1.0, False, speed)) for speed in (1.0, 1.06))
    assert np.array_equal(slow, fast)
