"""Training windows: every draw is a function of its key alone, a window stays in its song, speed moves the pitch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import synth

import model
from continuation import audio, data

RATE, CHUNK = 100, 1000
SONG_ROWS = (3, 2, 5)
PLAIN = {"gain": 1.0, "swap": False, "speed": 1.0}
SHAPE = (3, 10)  # of a chunk's latents


def side_of(rows: np.ndarray, song_rows: tuple[int, ...]) -> data.Side:
    songs, pairs, first = [], [], 0
    for number, count in enumerate(song_rows):
        songs.append({"id": f"song{number}", "first_row": first, "rows": count})
        pairs += [(row, row + 1) for row in range(first, first + count - 1)]
        first += count
    return data.Side("train", rows, np.array(pairs, np.int64), songs)


def windows_of(rows: np.ndarray, song_rows: tuple[int, ...] = SONG_ROWS, rate: int = RATE) -> data.Windows:
    return data.Windows(side_of(rows, song_rows), {"chunk_samples": rows.shape[2], "sample_rate": rate})


@pytest.fixture
def counting(monkeypatch) -> data.Windows:
    """Windows whose samples are their own numbers: left counts up from 0, right down. Levels are left alone."""
    monkeypatch.setattr(data, "level_gain", lambda context: 32768.0)
    left = np.arange(sum(SONG_ROWS) * CHUNK, dtype=np.int16).reshape(-1, 1, CHUNK)
    return windows_of(np.concatenate([left, -left], axis=1))


@pytest.fixture
def noisy() -> data.Windows:
    x = synth.noise(0, sum(SONG_ROWS) * CHUNK / RATE, RATE, channels=2)
    return windows_of(audio.to_int16(x).reshape(2, -1, CHUNK).transpose(1, 0, 2))


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


# ---- draws ----


def test_draws_of_one_key_are_the_same_and_those_of_any_other_key_differ():
    keys = [(0, "crop", 1, 2), (1, "crop", 1, 2), (0, "pair", 1, 2), (0, "crop", 2, 2), (0, "crop", 1, 3)]
    first = [data.draws(*key).random(4).tolist() for key in keys]
    assert first == [data.draws(*key).random(4).tolist() for key in reversed(keys)][::-1]
    assert len({tuple(values) for values in first}) == len(keys)


def test_every_stream_has_its_own_number():
    assert len(set(data.STREAMS.values())) == len(data.STREAMS)


def test_augmentation_keeps_its_ranges_and_uses_all_of_them():
    changes = [data.Augmentation.draw(data.draws(0, "crop", item)) for item in range(2000)]
    decibels = 20 * np.log10([abs(change.gain) for change in changes])
    speeds = np.array([change.speed for change in changes])
    assert min(decibels) == pytest.approx(data.GAIN_RANGE_DB[0], abs=0.1)
    assert max(decibels) == pytest.approx(data.GAIN_RANGE_DB[1], abs=0.1)
    assert speeds.min() == pytest.approx(1 - data.SPEED_RANGE, abs=1e-3)
    assert speeds.max() == pytest.approx(1 + data.SPEED_RANGE, abs=1e-3)
    for share in ((speeds == 1).mean(), np.mean([c.swap for c in changes]), np.mean([c.gain < 0 for c in changes])):
        assert share == pytest.approx(0.5, abs=0.05)


def test_decoder_must_do_without_some_copies_and_without_all():
    present = np.array([data.present_copies(data.draws(0, "pair", item), 6) for item in range(4000)])
    assert present.any(1).mean() == pytest.approx(data.ANY_COPIES, abs=0.02)
    assert present[present.any(1)].mean(0) == pytest.approx([data.PRESENT_COPY] * 6, abs=0.03)


def test_flow_draws_have_the_documented_shares():
    drawn = [data.flow_draws(data.draws(0, "pair", item), (1, 2)) for item in range(4000)]
    time = np.array([d["time"] for d in drawn])
    heard = np.array([d["heard"] for d in drawn])
    context_noise = np.array([np.abs(d["context_noise"]).sum() for d in drawn])
    assert (time == 0).mean() == pytest.approx(0.15, abs=0.02)
    assert np.median(time[time > 0]) == pytest.approx(0.25, abs=0.02)
    assert time.max() < 1
    assert (heard == 1).mean() == pytest.approx(0.7, abs=0.03)
    assert (heard == 0).mean() == pytest.approx(0.1, abs=0.02)
    assert (context_noise > 0).mean() == pytest.approx(0.5, abs=0.03)


# ---- where windows are cut ----


def test_pair_is_input_and_target_as_stored(counting):
    for pair, (first, second) in enumerate(counting.side.pairs):
        expected = np.concatenate([counting.side.rows[first], counting.side.rows[second]], axis=1)
        assert np.array_equal(counting.pair(pair), expected)


@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
def test_window_is_consecutive_samples_of_its_own_song_within_half_a_chunk_of_its_pair(counting, place):
    for pair in range(len(counting)):
        window = counting.window(pair, 2, data.Augmentation(place, **PLAIN))
        start, song = int(window[0, 0]), counting.song(pair)
        assert np.array_equal(window[0], np.arange(start, start + 2 * CHUNK))
        assert abs(start - counting.side.pairs[pair, 0] * CHUNK) <= CHUNK // 2
        assert song["first_row"] * CHUNK <= start
        assert start + 2 * CHUNK <= (song["first_row"] + song["rows"]) * CHUNK


def test_places_0_and_1_are_the_ends_of_the_room_that_a_window_has(counting):
    middle = 4  # rows 6 and 7 of a song of rows 5 to 9
    starts = [counting.window(middle, 2, data.Augmentation(place, **PLAIN))[0, 0] for place in (0.0, 1.0)]
    assert counting.side.pairs[middle].tolist() == [6, 7]
    assert starts == [5.5 * CHUNK, 6.5 * CHUNK]


@pytest.mark.parametrize("speed", [0.94, 1.0, 1.06])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_window_and_crop_never_leave_their_song_at_any_speed(noisy, place, speed, monkeypatch):
    asked = []
    read_window = data.read_window

    def note(side, song, start, length):
        asked.append((song, start, length))
        return read_window(side, song, start, length)

    monkeypatch.setattr(data, "read_window", note)
    change = data.Augmentation(place, 1.0, False, speed)
    for pair in range(len(noisy)):
        assert noisy.window(pair, 2, change).shape == (2, 2 * CHUNK)
        assert noisy.crop(pair, 200, change, place).shape == (2, 200)
        assert all(song is noisy.song(pair) for song, _, _ in asked)
        assert all(start >= 0 and start + length <= song["rows"] * CHUNK for song, start, length in asked)
        asked.clear()


@pytest.mark.parametrize("place", [0.0, 0.4, 1.0])
def test_crop_is_consecutive_samples_of_the_window_of_one_chunk(counting, place):
    change = data.Augmentation(0.5, **PLAIN)
    for pair in range(len(counting)):
        crop, whole = counting.crop(pair, 200, change, place), counting.window(pair, 1, change)
        offset = round(place * (CHUNK - 200))
        assert np.array_equal(crop, whole[:, offset : offset + 200])


def test_crop_of_a_whole_chunk_cannot_be_faster(counting):
    change = data.Augmentation(0.5, **PLAIN | {"speed": 1.05})
    crop = counting.crop(0, CHUNK, change, 0.7)
    assert np.array_equal(crop, counting.window(0, 1, data.Augmentation(0.5, **PLAIN)))


def test_elsewhere_is_a_chunk_of_a_pair_of_the_same_song_with_two_between(monkeypatch):
    monkeypatch.setattr(data, "level_gain", lambda context: 32768.0)
    rows = np.arange(19 * 10, dtype=np.int16).reshape(19, 1, 10)
    side = side_of(rows, song_rows=(16, 3))
    faded = (side.pairs[:, 1] >= 13) & (side.pairs[:, 1] < 16)  # the first song's last rows are in no pair
    windows = data.Windows(replace(side, pairs=side.pairs[~faded]), {"chunk_samples": 10, "sample_rate": RATE})
    chosen = set()
    for pair, (context, target) in enumerate(windows.side.pairs):
        x = windows.elsewhere(pair)
        if context >= 16:
            assert x is None  # three chunks have none far enough
            continue
        assert np.array_equal(x, windows.elsewhere(pair)) and x.shape == (1, 10)
        row = int(x[0, 0]) // 10
        assert row <= context - 3 or row >= target + 3
        chosen.add(row)
    assert len(chosen) > 4 and max(chosen) <= 12


# ---- level, swap, polarity ----


def test_context_has_the_level_that_generation_gives_it(noisy):
    change = data.Augmentation(0.7, -0.5, False, 1.0)
    for pair in range(len(noisy)):
        assert rms(noisy.pair(pair)[:, :CHUNK]) == pytest.approx(data.CONTEXT_LEVEL, rel=1e-4)
        assert rms(noisy.window(pair, 2, change)[:, :CHUNK]) == pytest.approx(0.5 * data.CONTEXT_LEVEL, rel=1e-4)


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
    soft = windows.crop(0, 200, data.Augmentation(0.0, **PLAIN), place=0.0)
    assert rms(soft) == pytest.approx(data.CONTEXT_LEVEL * 100 / np.sqrt((100**2 + 8000**2) / 2), rel=1e-4)


def test_training_and_generation_bring_a_context_to_the_same_level():
    assert (data.CONTEXT_LEVEL, data.QUIETEST_RMS) == (model.CONTEXT_LEVEL, model.QUIETEST_RMS)


def test_silence_stays_silence_and_near_silence_is_lifted_by_no_more_than_the_limit():
    assert data.level_gain(np.zeros((2, 100), np.float32)) == data.CONTEXT_LEVEL / data.QUIETEST_RMS
    assert data.level_gain(np.full((2, 100), 1e-5)) == data.CONTEXT_LEVEL / data.QUIETEST_RMS


def test_swap_exchanges_the_channels_and_a_negative_gain_turns_the_polarity(noisy):
    plain, swapped, turned = (
        noisy.window(0, 2, data.Augmentation(0.2, gain, swap, 1.0))
        for gain, swap in ((1.0, False), (1.0, True), (-1.0, False))
    )
    assert np.array_equal(swapped, plain[::-1])
    assert np.array_equal(turned, -plain)


# ---- speed ----


def peak_hz(x: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(x * np.hanning(len(x)), 16 * len(x)))
    return float(np.argmax(spectrum)) * rate / (16 * len(x))


def snapped(speed: float, length: int, rate: int = RATE) -> float:
    """The speed that `length` samples are really played at: one whose Fourier transform is fast."""
    length += 2 * round(data.MARGIN_SECONDS * rate)
    return data.fast_length(speed * length) / length


@pytest.mark.parametrize("length", [12000, 24000, 480000, 960000])
@pytest.mark.parametrize("speed", [0.94, 0.999, 1.06])
def test_speed_is_at_most_a_percent_above_the_one_that_is_drawn(speed, length):
    assert speed <= snapped(speed, length) <= 1.01 * speed


@pytest.mark.parametrize("speed", [0.94, 0.97, 1.06])
def test_speed_multiplies_the_pitch_and_keeps_length_and_level(speed):
    rate, seconds = 8000, 2
    x = synth.tone(1000, 4 * seconds, rate)
    windows = windows_of(audio.to_int16(x).reshape(1, 4, -1).transpose(1, 0, 2), song_rows=(4,), rate=rate)
    change = data.Augmentation(0.5, 1.0, False, speed)
    for y in (windows.window(1, 2, change), windows.crop(1, rate, change, 0.5)):
        assert peak_hz(y[0], rate) == pytest.approx(1000 * snapped(speed, y.shape[1], rate), abs=0.2)
        assert rms(y) == pytest.approx(data.CONTEXT_LEVEL, rel=0.01)
    assert windows.window(1, 2, change).shape == (1, 2 * seconds * rate)


@pytest.mark.parametrize("speed", [0.94, 1.06])
def test_click_in_a_faster_window_is_where_the_speed_puts_it(speed, monkeypatch):
    monkeypatch.setattr(data, "level_gain", lambda context: 1.0)
    rows = np.zeros((5, 1, CHUNK), np.int16)
    rows[2, 0, 300] = 32767
    windows = windows_of(rows, song_rows=(5,))
    start = 1.5 * CHUNK  # of the window of rows 2 and 3 at place 0: half a chunk before them
    window = windows.window(2, 2, data.Augmentation(0.0, 1.0, False, speed))
    place = (2300 - start) / snapped(speed, 2 * CHUNK) - windows.margin
    assert np.argmax(np.abs(window)) == pytest.approx(place, abs=1)
    crop = windows.crop(2, 400, data.Augmentation(0.0, 1.0, False, speed), place=1.0)
    start += CHUNK - data.fast_length((400 + 2 * windows.margin) * speed)
    place = (2300 - start) / snapped(speed, 400) - windows.margin
    assert np.argmax(np.abs(crop)) == pytest.approx(place, abs=1)


def test_same_length_is_left_as_it_is():
    x = synth.noise(0, 1, RATE)
    assert data.change_speed(x, x.shape[1]) is x


@pytest.mark.parametrize("speed", [0.95, 0.9713, 1.0, 1.0291, 1.06])
def test_first_chunk_of_a_window_does_not_hear_what_follows_it(speed):
    """In the song itself: whatever is there from the first sample after the cut on."""
    change = data.Augmentation(place=0.0, gain=1.0, swap=False, speed=speed)
    quiet = np.random.default_rng(0).integers(-3000, 3000, (4, 2, CHUNK)).astype(np.int16)
    loud = quiet.transpose(1, 0, 2).reshape(2, -1).copy()
    margin = 0 if speed == 1 else round(data.MARGIN_SECONDS * RATE)
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
    x = windows.window(0, 2, data.Augmentation(place=0.0, gain=1.0, swap=False, speed=speed))[0]
    frequency = 0.02 * np.pi * snapped(speed, 2 * chunk, 10 * RATE)
    error = x[2:] - 2 * np.cos(frequency) * x[1:-1] + x[:-2]  # of a sine's recursion
    assert np.abs(error[chunk - 100 : chunk + 100]).max() < 0.02 * x.max()


def test_another_song_is_never_the_same_music_in_another_file():
    assert [data.next_other("aabb", i) for i in range(4)] == [2, 2, 0, 0]
    assert data.next_other("aa", 0) is None


def test_change_of_speed_removes_what_the_new_rate_cannot_hold():
    x = synth.tone(3900, 1, 8000)
    assert rms(data.change_speed(x, 7200)) < 1e-4  # 0.9 of the samples hold 3600 Hz at most


def test_window_keeps_its_speed_where_the_song_has_no_room_for_another(counting):
    only_pair = 2  # of the song with two rows
    slow, fast = (counting.window(only_pair, 2, data.Augmentation(0.0, 1.0, False, speed)) for speed in (1.0, 1.06))
    assert np.array_equal(slow, fast)


# ---- order and items ----


def test_every_epoch_passes_over_all_pairs_in_an_order_of_its_own():
    order = data.Order(50, seed=0, stage=1)
    epochs = [[order[item] for item in range(50 * epoch, 50 * epoch + 50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_is_a_function_of_seed_stage_and_item_whatever_was_asked_before():
    items = [170, 3, 99, 3, 55]
    whole = [data.Order(50, 0, 1)[item] for item in items]
    order = data.Order(50, 0, 1)
    assert [order[item] for item in items] == whole
    for other in (data.Order(50, 1, 1), data.Order(50, 0, 2)):
        assert [other[item] for item in range(50)] != [order[item] for item in range(50)]


def items_of(kind: str, windows: data.Windows, seed: int = 0):
    if kind == "crop":
        return data.CropItems(windows, (3, 4), 200, seed)
    if kind == "fixed":
        return data.FixedPairItems(windows, seed, stage=1)
    return data.PairItems(windows, SHAPE, variants=2, seed=seed, cache=NumberedCache(), crop=(3, 4), copies=6)


class NumberedCache:
    """A cache whose latents are the numbers of variant and pair."""

    def read(self, variant: int, pair: int) -> tuple[np.ndarray, np.ndarray]:
        latents = np.float32([variant, pair, 0])[:, None].repeat(3 * SHAPE[1], 1)
        return latents, latents[:, : SHAPE[1]]


@pytest.mark.parametrize("kind", ["crop", "pair", "fixed"])
def test_item_is_a_function_of_its_number_whatever_was_read_before(noisy, kind):
    in_order = items_of(kind, noisy)
    expected = [in_order[item] for item in range(20)]
    for item in (19, 2, 11):
        alone = items_of(kind, noisy)[item]
        assert alone.keys() == expected[item].keys()
        assert all(np.array_equal(alone[key], expected[item][key]) for key in alone)


@pytest.mark.parametrize("kind", ["crop", "pair"])
def test_another_seed_draws_other_items(noisy, kind):
    first, second = (items_of(kind, noisy, seed)[0] for seed in (0, 1))
    assert not np.array_equal(first["x"], second["x"])
    assert not np.array_equal(first["posterior_noise"], second["posterior_noise"])


def test_items_are_float32_of_the_shapes_that_the_losses_read(noisy):
    crop, pair = items_of("crop", noisy)[0], items_of("pair", noisy)[0]
    assert crop["x"].shape == (2, 200)
    assert pair["x"].shape == (2, 2 * CHUNK)
    assert pair["context"].shape == (3, 30)
    assert pair["target"].shape == pair["flow_noise"].shape == pair["context_noise"].shape == SHAPE
    for item in (crop, pair):
        assert item["posterior_noise"].shape == item["robust_noise"].shape == (3, 4)
        assert all(value.dtype == np.float32 for name, value in item.items() if name != "present")
    assert (pair["present"].dtype, pair["present"].shape) == (bool, (6,))
    assert pair["place"].shape == pair["time"].shape == pair["heard"].shape == ()


def test_audio_of_a_pair_is_what_the_cached_latents_are_of(noisy):
    items = items_of("pair", noisy)
    variants = set()
    for item in range(14):
        given = items[item]
        variant, pair = given["context"][:2, 0].astype(int)
        assert np.array_equal(given["x"], data.WindowItems(noisy, int(variant), seed=0)[int(pair)]["x"])
        variants.add(int(variant))
    assert variants == {0, 1}


def test_places_of_what_is_continued_are_spread_over_the_whole(noisy):
    items = items_of("pair", noisy)
    places = np.array([items[item]["place"] for item in range(200)])
    assert np.histogram(places, bins=4, range=(0, 1))[0].min() > 30


def test_legacy_learns_the_pairs_0_1_and_2_3_of_every_song_as_they_are(counting):
    items = data.FixedPairItems(counting, seed=0, stage=1)
    first_rows = sorted(int(items[item]["x"][0, 0]) // CHUNK for item in range(4))
    assert first_rows == [0, 3, 5, 7]
    assert np.array_equal(items[0]["x"][1], -items[0]["x"][0])


# ---- the latent cache ----


@pytest.fixture
def cache(tmp_path) -> data.LatentCache:
    """Two variants of 7 pairs; the latents of channel 1 are louder and off centre. Its key is "mine"."""
    cache = data.LatentCache(tmp_path / "latents", 2, {"context": (3, 30), "target": SHAPE}, pairs=7)
    cache.begin("mine")
    rng = np.random.default_rng(0)
    for variant in range(2):
        for part in cache.PARTS:
            latents = rng.standard_normal((7, *cache.shapes[part])) * [[1.0], [5.0], [1.0]] + [[0.0], [2.0], [0.0]]
            np.save(cache.path(part, variant), latents.astype(np.float16))
        (cache.folder / "key.json").write_text(cache.index(variant))
    return cache


def test_cache_gives_back_what_was_written(cache):
    context, target = cache.read(1, 4)
    assert np.array_equal(context, np.load(cache.folder / "context-1.npy")[4].astype(np.float32))
    assert np.array_equal(target, np.load(cache.folder / "target-1.npy")[4].astype(np.float32))


def test_cached_item_is_the_pair_of_its_number_in_one_of_the_variants(cache):
    windows = windows_of(np.zeros((sum(SONG_ROWS), 2, CHUNK), np.int16))
    items = data.PairItems(windows, SHAPE, variants=2, seed=0, cache=cache)
    variants = set()
    for item in range(14):
        pair = data.Order(len(windows), 0, stage=2)[item]
        stored = [np.load(cache.folder / f"context-{v}.npy")[pair].astype(np.float32) for v in range(2)]
        variants |= {v for v in range(2) if np.array_equal(stored[v], items[item]["context"])}
    assert variants == {0, 1}


def test_items_with_and_without_audio_have_the_same_latents_and_draw_the_same_flow(cache):
    windows = windows_of(np.ones((sum(SONG_ROWS), 2, CHUNK), np.int16))
    alone = data.PairItems(windows, SHAPE, 2, 0, cache)[5]
    with_audio = data.PairItems(windows, SHAPE, 2, 0, cache, crop=(3, 4), copies=6)[5]
    assert alone.keys() == {"context", "target", "flow_noise", "context_noise", "time", "heard"}
    for key, value in alone.items():
        assert np.array_equal(value, with_audio[key]), key


def test_statistics_are_mean_and_deviation_of_all_targets_by_channel(cache):
    targets = np.concatenate([np.load(cache.folder / f"target-{v}.npy") for v in range(2)]).astype(np.float64)
    mean, std = cache.statistics()
    assert mean.shape == std.shape == (3, 1)
    assert np.allclose(mean[:, 0], targets.mean((0, 2)))
    assert np.allclose(std[:, 0], targets.std((0, 2)))


def again(cache: data.LatentCache, key: str = "mine") -> data.LatentCache:
    """The cache as another run finds it."""
    found = data.LatentCache(cache.folder, cache.variants, cache.shapes, cache.pairs)
    found.begin(key)
    return found


def test_variant_with_a_part_missing_is_missing_and_said(cache, capsys):
    assert cache.missing() == again(cache).missing() == []
    cache.path("target", 1).unlink()
    assert again(cache).missing() == [1]
    assert "target-1.npy is missing or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("part", data.LatentCache.PARTS)
def test_variant_that_has_changed_since_it_was_written_is_missing(cache, part, capsys):
    latents = np.load(cache.path(part, 0))
    latents[3, 1, 2] += 1
    np.save(cache.path(part, 0), latents)
    assert again(cache).missing() == [0]
    assert f"{part}-0.npy is missing or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"key": "other", "sha256": {}}', '{"key": "mine"}', "{}", "[]", "torn"])
def test_cache_with_another_key_or_without_checksums_is_not_used_and_is_removed(cache, text):
    (cache.folder / "key.json").write_text(text)
    assert again(cache).missing() == [0, 1]
    assert not list(cache.folder.glob("*.npy"))


def test_cache_of_another_key_is_removed(cache):
    assert again(cache, "other").missing() == [0, 1]
    assert not list(cache.folder.glob("*.npy"))


def test_damaged_cache_is_refused_by_name(cache):
    cache.path("context", 0).write_bytes(b"torn")
    with pytest.raises(data.DataError, match="context-0"):
        cache.read(0, 0)
