"""The latent cache gives back what was written, and what has changed since is made again."""

from __future__ import annotations

import numpy as np
import pytest
from fake_windows import SHAPE

from continuation.batches import PairItems, PairSampler
from continuation.cli import UsageError
from continuation.latent_cache import LatentCache

SHAPES = {"context": SHAPE, "outlook": (6, 5), "target": SHAPE, "features": (2, 3, 4), "correction": (2, 4)}


@pytest.fixture
def cache(tmp_path) -> LatentCache:
    """Two variants of 7 pairs; what is in row 1 is louder and off centre. Its key is "mine"."""
    cache = LatentCache(tmp_path / "latents", 2, SHAPES, pairs=7)
    cache.begin("mine")
    rng = np.random.default_rng(0)
    for variant in range(2):
        for part in cache.PARTS:
            latents = rng.standard_normal((7, *cache.shapes[part]))
            latents[:, 1] = 5 * latents[:, 1] + 2
            np.save(cache.path(part, variant), latents.astype(np.float16))
        (cache.folder / "key.json").write_text(cache.index(variant))
    return cache


def written(cache: LatentCache, part: str, variant: int) -> np.ndarray:
    return np.load(cache.folder / f"{part}-{variant}.npy")


def test_cache_gives_back_what_was_written(cache):
    found = cache.read(1, 4)
    assert found.keys() == SHAPES.keys()
    for part, value in found.items():
        assert value.dtype == np.float32
        assert value.shape == SHAPES[part]
        assert np.array_equal(value, written(cache, part, 1)[4].astype(np.float32))


def test_cached_item_is_the_pair_of_its_number_in_one_of_the_variants(cache):
    items = PairItems(7, SHAPE, variants=2, seed=0, cache=cache)
    variants = set()
    for item in range(14):
        pair = PairSampler(7, 0, stage=2)[item]
        stored = [written(cache, "context", v)[pair].astype(np.float32) for v in range(2)]
        variants |= {v for v in range(2) if np.array_equal(stored[v], items[item]["context"])}
    assert variants == {0, 1}
    assert items[0].keys() == SHAPES.keys() | {"flow_noise", "context_noise", "time", "context_share"}


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
