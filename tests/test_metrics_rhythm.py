"""Onsets, tempo and beat on clicks at known times."""

import math

import numpy as np
import pytest
from metric_signals import RATE, SILENCE, clicks, sound

from continuation import metrics


def test_onset_f_is_one_for_equal_and_for_slightly_late_clicks():
    times = [0.5, 1.1, 1.9, 2.6, 3.3]
    assert metrics.onset_f(sound(clicks(times)), sound(clicks(times))) == 1
    assert metrics.onset_f(sound(clicks(times)), sound(clicks([t + 0.03 for t in times]))) == 1


def test_onset_f_counts_missed_and_late_clicks():
    truth = clicks([0.5, 1.1, 1.9, 2.6])
    assert metrics.onset_f(sound(truth), sound(clicks([0.5, 1.1]))) == pytest.approx(2 * 2 / (4 + 2))
    assert metrics.onset_f(sound(truth), sound(clicks([0.7, 1.3, 2.1, 2.8]))) == 0


def test_onset_f_of_silence_is_undefined_and_of_a_silent_estimate_zero():
    assert math.isnan(metrics.onset_f(sound(SILENCE), sound(clicks([1.0]))))
    assert metrics.onset_f(sound(clicks([1.0])), sound(SILENCE)) == 0


def test_onsets_are_matched_one_to_one():
    matched = metrics.match_onsets(np.array([1.0, 1.04]), np.array([1.02, 2.0]), 0.05)
    assert matched == 1
    assert metrics.match_onsets(np.array([1.0, 1.06]), np.array([0.96, 1.03]), 0.05) == 2


@pytest.mark.parametrize("bpm", [117, 119.3, 173])
def test_tempo_between_two_frames_is_found(bpm):
    """117 beats a minute are 51.3 frames of 10 ms: a whole number of them would be off by half a percent."""
    x = clicks(list(np.arange(0.1, 9.9, 60 / bpm)), 10 * RATE)
    octaves = np.log2(sound(x).tempo / bpm)
    assert octaves == pytest.approx(round(octaves), abs=0.0015)  # a tenth of a percent


def beats(bpm: float, first: float = 0.1, seconds: float = 8) -> np.ndarray:
    return clicks(list(np.arange(first, seconds - 0.1, 60 / bpm)), round(seconds * RATE))


def test_onsets_at_the_same_times_correlate_and_others_do_not():
    assert metrics.onset_correlation(sound(beats(100)), sound(0.5 * beats(100))) > 0.95
    assert metrics.onset_correlation(sound(beats(100)), sound(beats(100, first=0.4))) < 0.1


@pytest.mark.parametrize(("bpm", "deviation"), [(100, 0.0), (50, 0.0), (130, math.log2(1.3))])
def test_tempo_deviation_is_the_distance_to_the_nearest_octave(bpm, deviation):
    assert metrics.tempo_deviation(sound(beats(100)), sound(beats(bpm))) == pytest.approx(deviation, abs=0.03)


@pytest.mark.parametrize("late", [0.0, 0.15, 0.3])
def test_beat_phase_error_is_the_delay_behind_the_inputs_beat(late):
    """The input's next beat is due 0.1 s after the cut; a beat takes 0.6 s."""
    context = beats(100, first=0.1, seconds=7.8)  # 7.8 s are 13 beats
    error = metrics.beat_phase_error(sound(context), sound(beats(100, first=0.1 + late)))
    assert error == pytest.approx(late / 0.6, abs=0.06)


def test_silence_keeps_no_beat():
    context = beats(100, seconds=7.8)
    assert math.isnan(metrics.beat_phase_error(sound(context), sound(np.zeros_like(context))))


def test_beat_is_judged_only_where_the_truth_keeps_it():
    context, steady = beats(100, seconds=7.8), beats(100, seconds=7.8)
    assert metrics.beat_measures(sound(context), sound(steady), sound(steady))["beat_phase_error"] < 0.05
    for truth in (beats(130, seconds=7.8), beats(100, first=0.4, seconds=7.8), np.zeros_like(context)):
        assert math.isnan(metrics.beat_measures(sound(context), sound(truth), sound(steady))["beat_phase_error"])


def test_beat_that_goes_on_keeps_its_phase_though_it_falls_between_frames():
    x = beats(117, seconds=20)
    assert metrics.beat_phase_error(sound(x[:, : 10 * RATE]), sound(x[:, 10 * RATE :])) < 0.03
