"""Means and intervals over songs are those of the textbooks."""

import math

import numpy as np
import pytest

from continuation import metrics


def test_bootstrap_interval_has_the_width_of_the_normal_one():
    values = np.random.default_rng(0).standard_normal(400) + 3
    mean, low, high = metrics.bootstrap_interval(values)
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    assert metrics.bootstrap_interval(values) == (mean, low, high)


def test_jackknife_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).standard_normal(50)
    without = [np.delete(values, i).mean() for i in range(50)]
    value, low, high = metrics.jackknife_interval(values.mean(), without)
    assert value == values.mean()
    assert (high - low) / 2 == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(50))
    assert (high + low) / 2 == pytest.approx(value)
    assert math.isnan(metrics.jackknife_interval(1.0, [1.0])[1])


def test_bootstrap_interval_leaves_out_undefined_songs_and_needs_two():
    assert metrics.bootstrap_interval([1.0, float("nan"), 1.0]) == (1, 1, 1)
    mean, low, high = metrics.bootstrap_interval([2.0, float("nan")])
    assert mean == 2 and math.isnan(low) and math.isnan(high)


def test_paired_interval_is_narrow_where_songs_differ_more_than_systems():
    songs = 10 * np.random.default_rng(0).standard_normal(20)
    mean, low, high = metrics.paired_interval(songs + 0.5, songs)
    assert (mean, low, high) == pytest.approx((0.5, 0.5, 0.5))


def test_per_song_is_the_mean_of_what_is_defined():
    assert metrics.per_song([1.0, 2.0, float("nan"), 3.0], ["a", "b", "b", "a"]) == {"a": 2.0, "b": 2.0}
