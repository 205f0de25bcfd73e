"""The items of a batch: each a function of its number."""

from __future__ import annotations

import numpy as np
import pytest
from fake_windows import CHUNK, SHAPE

from continuation.batches import (
    CropItems,
    FixedPairItems,
    JointItems,
    PairItems,
    PairSampler,
    WindowItems,
    sample_flow,
)
from continuation.rng import make_rng
from continuation.windows import Windows


def test_every_epoch_passes_over_all_pairs_in_an_order_of_its_own():
    order = PairSampler(50, seed=0, stage=1)
    epochs = [[order[item] for item in range(50 * epoch, 50 * epoch + 50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_is_a_function_of_seed_stage_and_item_whatever_was_asked_before():
    items = [170, 3, 99, 3, 55]
    whole = [PairSampler(50, 0, 1)[item] for item in items]
    order = PairSampler(50, 0, 1)
    assert [order[item] for item in items] == whole
    for other in (PairSampler(50, 1, 1), PairSampler(50, 0, 2)):
        assert [other[item] for item in range(50)] != [order[item] for item in range(50)]


def items_of(kind: str, windows: Windows, seed: int = 0):
    crops = CropItems(windows, (3, 4), 200, seed, stage=2 if kind == "joint" else 1)
    pairs = PairItems(len(windows), SHAPE, variants=2, seed=seed, cache=NumberedCache())
    fixed = FixedPairItems(windows, seed, stage=1)
    return {"crop": crops, "pair": pairs, "joint": JointItems(crops, pairs), "fixed": fixed}[kind]


def test_the_joint_part_draws_other_crops_and_noise_than_stage_1(noisy):
    first, joint = items_of("crop", noisy), items_of("joint", noisy)
    assert not any(np.array_equal(first[item][key], joint[item][key]) for item in range(20) for key in first[item])


class NumberedCache:
    """A cache whose latents are the numbers of variant and pair."""

    def read(self, variant: int, pair: int) -> dict[str, np.ndarray]:
        latents = np.float32([variant, pair, 0])[:, None].repeat(SHAPE[1], 1)
        return {"context": latents, "outlook": np.zeros((10, 2), np.float32), "target": latents}


@pytest.mark.parametrize("kind", ["crop", "pair", "joint", "fixed"])
def test_item_is_a_function_of_its_number_whatever_was_read_before(noisy, kind):
    in_order = items_of(kind, noisy)
    expected = [in_order[item] for item in range(20)]
    for item in (19, 2, 11):
        alone = items_of(kind, noisy)[item]
        assert alone.keys() == expected[item].keys()
        assert all(np.array_equal(alone[key], expected[item][key]) for key in alone)


@pytest.mark.parametrize(("kind", "drawn"), [("crop", "x"), ("crop", "posterior_noise"), ("pair", "flow_noise")])
def test_another_seed_draws_other_items(noisy, kind, drawn):
    first, second = (items_of(kind, noisy, seed)[0] for seed in (0, 1))
    assert not np.array_equal(first[drawn], second[drawn])


def test_items_are_float32_of_the_shapes_that_the_losses_read(noisy):
    crop, pair = items_of("crop", noisy)[0], items_of("pair", noisy)[0]
    assert crop["x"].shape == (2, 200)
    assert crop["posterior_noise"].shape == crop["robust_noise"].shape == (3, 4)
    assert pair["flow_noise"].shape == pair["context_noise"].shape == SHAPE
    assert pair["time"].shape == pair["context_share"].shape == ()
    for item in (crop, pair):
        assert all(value.dtype == np.float32 for value in item.values())


def test_item_of_a_pair_is_what_the_cache_has_of_it_in_one_of_the_variants(noisy):
    items, sampler = items_of("pair", noisy), PairSampler(len(noisy), seed=0, stage=2)
    variants = set()
    for item in range(14):
        variant, pair = items[item]["context"][:2, 0].astype(int)
        assert pair == sampler[item]
        cached = NumberedCache().read(variant, pair)
        assert all(np.array_equal(items[item][part], cached[part]) for part in cached)
        variants.add(int(variant))
    assert variants == {0, 1}


def test_item_of_the_joint_part_is_a_crop_and_an_encoded_pair(noisy):
    joint, pair = (items_of(kind, noisy) for kind in ("joint", "pair"))
    crop = joint.crops
    for item in range(5):
        assert not crop[item].keys() & pair[item].keys()
        assert joint[item].keys() == crop[item].keys() | pair[item].keys()
        assert all(np.array_equal(joint[item][key], value) for key, value in (crop[item] | pair[item]).items())


def test_what_a_variant_encodes_is_a_window_of_two_chunks_of_its_own(noisy):
    found = [WindowItems(noisy, variant, seed)[3]["x"] for variant, seed in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert found[0].shape == (2, 2 * CHUNK)
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[3])


def test_legacy_learns_the_pairs_0_1_and_2_3_of_every_song_as_they_are(counting):
    items = FixedPairItems(counting, seed=0, stage=1)
    first_rows = sorted(int(items[item]["x"][0, 0]) // CHUNK for item in range(4))
    assert first_rows == [0, 3, 5, 7]
    assert np.array_equal(items[0]["x"][1], -items[0]["x"][0])


def test_flow_samples_have_the_documented_shares():
    drawn = [sample_flow(make_rng(0, "pair", item), (1, 2)) for item in range(4000)]
    time = np.array([d["time"] for d in drawn])
    heard = np.array([d["context_share"] for d in drawn])
    context_noise = np.array([np.abs(d["context_noise"]).sum() for d in drawn])
    assert (time == 0).mean() == pytest.approx(0.15, abs=0.02)
    assert np.median(time[time > 0]) == pytest.approx(0.25, abs=0.02)
    assert time.max() < 1
    assert (heard == 1).mean() == pytest.approx(0.7, abs=0.03)
    assert (heard == 0).mean() == pytest.approx(0.1, abs=0.02)
    assert (context_noise > 0).mean() == pytest.approx(0.5, abs=0.03)
