"""Combs and single tones that a decoder adds are measured, music's own are not."""

import math

import numpy as np
import pytest
from metric_signals import RATE, noise, sine, sound

from continuation import metrics


def test_comb_of_added_50_hz_multiples_stands_above_the_truth_at_50_hz_alone():
    samples = 10 * RATE
    x = noise(1, samples, level=0.1)
    hum = sum(sine(frequency, samples, level=0.01) for frequency in range(150, 6000, 50))
    own = metrics.comb(sound(x), 50)
    assert 1 < own < 4
    # A sine of amplitude a has the Welch density a^2/2 / (1.5 * rate / n), the noise 2 level^2 / rate.
    expected = 10 * math.log10(0.01**2 / 2 / (1.5 * RATE / 32768) / (2 * 0.1**2 / RATE))
    assert metrics.comb(sound(x + hum), 50) == pytest.approx(expected, abs=1.5)
    assert metrics.comb(sound(x + hum), 100) == pytest.approx(expected, abs=1.5)
    assert abs(metrics.comb(sound(x + hum), 70) - own) < 6  # of its multiples only one in five is hit


def test_hum_finds_the_one_line_that_the_mean_over_all_multiples_hides():
    truth = noise(3, 10 * RATE, level=0.1)
    hums = truth + sine(800, level=0.05, samples=10 * RATE)
    frequencies, heights = metrics.hum(sound(truth), sound(hums), 100, 100)
    assert frequencies[np.argmax(heights)] == 800
    assert heights.max() > 20
    assert metrics.combs_above_truth(sound(truth), sound(hums), 100, 100)["comb_latent_db"] < 1
    assert len(metrics.hum(sound(truth), sound(np.zeros_like(truth)), 100, 100)[1]) == 0


def test_comb_of_silence_and_of_short_signals_is_undefined():
    assert math.isnan(metrics.comb(sound(np.zeros((2, 10 * RATE))), 50))
    assert math.isnan(metrics.comb(sound(noise(0, 30000)), 50))


def test_combs_above_truth_are_the_differences_of_the_single_combs():
    truth, hum = noise(0), noise(0) + sine(300, level=0.1) + sine(600, level=0.1)
    combs = metrics.combs_above_truth(sound(truth), sound(hum), 50, 100)
    assert list(combs) == ["comb_latent_db", "comb_hop_db", "comb_300_db"]
    for name, spacing in (("latent", 50), ("hop", 100), ("300", 300)):
        own = metrics.comb(sound(truth), spacing)
        assert combs[f"comb_{name}_db"] == metrics.comb(sound(hum), spacing) - own
    assert combs["comb_300_db"] > combs["comb_hop_db"] > combs["comb_latent_db"] > 0
