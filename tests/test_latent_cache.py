"""The latent cache gives back what was written, and what has changed since is made again."""

from __future__ import annotations

import numpy as np
import pytest
from fake_windows import CHUNK, SHAPE, SONG_ROWS, windows_of

from continuation.cli import UsageError
from continuation.latent_cache import LatentCache
from continuation.windows import PairItems, PairSampler


@pytest.fixture
def cache(tmp_path) -> LatentCache:
    """Two variants of 7 pairs; the latents of channel 1 are louder and off centre. Its key is "mine"."""
    cache = LatentCache(tmp_path / "latents", 2, {"context": (3, 30), "target": SHAPE}, pairs=7)
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
    items = PairItems(windows, SHAPE, variants=2, seed=0, cache=cache)
    variants = set()
    for item in range(14):
        pair = PairSampler(len(windows), 0, stage=2)[item]
        stored = [np.load(cache.folder / f"context-{v}.npy")[pair].astype(np.float32) for v in range(2)]
        variants |= {v for v in range(2) if np.array_equal(stored[v], items[item]["context"])}
    assert variants == {0, 1}


def test_items_with_and_without_audio_have_the_same_latents_and_draw_the_same_flow(cache):
    windows = windows_of(np.ones((sum(SONG_ROWS), 2, CHUNK), np.int16))
    alone = PairItems(windows, SHAPE, 2, 0, cache)[5]
    with_audio = PairItems(windows, SHAPE, 2, 0, cache, crop=(3, 4), copies=6)[5]
    assert alone.keys() == {"context", "target", "flow_noise", "context_noise", "time", "heard"}
    for key, value in alone.items():
        assert np.array_equal(value, with_audio[key]), key


def test_statistics_are_mean_and_deviation_of_all_targets_by_channel(cache):
    targets = np.concatenate([np.load(cache.folder / f"target-{v}.npy") for v in range(2)]).astype(np.float64)
    mean, std = cache.statistics()
    assert mean.shape == std.shape == (3, 1)
    assert np.allclose(mean[:, 0], targets.mean((0, 2)))
    assert np.allclose(std[:, 0], targets.std((0, 2)))


def again(cache: LatentCache, key: str = "mine") -> LatentCache:
    """The cache as another run finds it."""
    found = LatentCache(cache.folder, cache.variants, cache.shapes, cache.pairs)
    found.begin(key)
    return found


def test_variant_with_a_part_missing_is_missing_and_said(cache, capsys):
    assert cache.missing() == again(cache).missing() == []
    cache.path("target", 1).unlink()
    assert again(cache).missing() == [1]
    assert "target-1.npy is missing or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("part", LatentCache.PARTS)
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
    with pytest.raises(UsageError, match="context-0"):
        cache.read(0, 0)
