"""Continuations without a network: the loop repeats what repeats itself, and the oracle of copies knows better."""

from __future__ import annotations

import numpy as np
import pytest
import synth
from scipy import signal

from continuation import baselines, metrics

RATE = 4000
SECONDS = 10


def halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Input and true continuation, SECONDS each."""
    return x[:, : SECONDS * RATE], x[:, SECONDS * RATE : 2 * SECONDS * RATE]


def repeated(period: int, seed: int) -> np.ndarray:
    """Noise of `period` samples over and over, as long as input and continuation."""
    return np.resize(synth.noise(seed, period / RATE, RATE, channels=2).T, (2 * SECONDS * RATE, 2)).T


# The loop


@pytest.mark.parametrize("period", [5003, 12345])
def test_loop_goes_on_as_a_song_that_repeats_itself_and_says_how_exactly(period):
    context, truth = halves(repeated(period, 0))
    loop = baselines.loop(context, RATE)
    np.testing.assert_array_equal(loop.sound, truth)
    assert loop.correlation == pytest.approx(1, abs=1e-3)
    lag = loop.seams[0]
    assert lag % period == 0
    assert loop.seams == list(range(lag, SECONDS * RATE, lag))


def test_longest_loop_plays_all_of_the_bars_that_differ_where_the_loop_plays_one():
    """Bars of 2 s, alike but for a hiss of their own: at 8 s the four last bars come in their order."""
    bar, own = repeated(2 * RATE, 0), 0.1 * synth.noise(1, 2 * SECONDS, RATE, channels=2)
    context, _ = halves(bar + own)
    loop = baselines.loop(context, RATE)
    lag = loop.seams[0]
    assert lag % (2 * RATE) == 0
    np.testing.assert_array_equal(loop.longest[:, : 7 * RATE], context[:, 2 * RATE : 9 * RATE])


def test_loop_of_what_never_repeats_itself_is_its_end_and_says_so():
    context, truth = halves(synth.noise(0, 2 * SECONDS, RATE, channels=2))
    loop = baselines.loop(context, RATE)
    first = loop.seams[0] - RATE // 50  # before the seam begins
    np.testing.assert_array_equal(loop.sound[:, :first], context[:, -loop.seams[0] :][:, :first])
    assert loop.sound.shape == truth.shape
    assert loop.correlation < 0.1


@pytest.mark.parametrize("period", [5003, 12345])
def test_loop_of_music_has_no_click_at_its_seams(period):
    context, _ = halves(np.resize(synth.song(0, period / RATE, RATE).T, (2 * SECONDS * RATE, 2)).T)
    loop = baselines.loop(context + synth.noise(1, SECONDS, RATE, 2, level=0.01), RATE)
    assert metrics.click_percentiles(context, loop.sound, RATE, loop.seams).max() < 100


# Bars at the tempo


def beats(bpm: float, seconds: float) -> np.ndarray:
    x, beat = synth.noise(0, seconds, 12000, channels=2, level=1e-4), 60 / bpm
    burst = np.hanning(400)[200:] * synth.noise(1, 1 / 60, 12000, channels=2, level=0.5)
    for time in np.arange(0.1, seconds, beat):
        start = round(time * 12000)
        x[:, start : start + 200] += burst
    return x


@pytest.mark.parametrize("bpm", [120, 90])
def test_tempo_locked_loop_goes_on_in_time(bpm):
    """A steady beat continues itself, whether two bars fit or not."""
    x = beats(bpm, 6)
    loop = baselines.tempo_locked_loop(x, 12000)
    assert loop.shape == x.shape
    onsets = metrics.onset_times(metrics.Sound(np.concatenate([x, loop], axis=1), 12000))
    assert np.allclose(np.diff(onsets), 60 / bpm, atol=0.04)


def test_silence_has_no_tempo_to_loop_at():
    assert baselines.tempo_locked_loop(np.zeros((2, 48000), np.float32), 12000) is None


# The oracle of copies


def two_loops() -> np.ndarray:
    """Low sound that repeats itself at one period, and high sound that does at another."""
    low, high = (
        signal.sosfiltfilt(signal.butter(8, 600, kind, fs=RATE, output="sos"), repeated(period, seed))
        for kind, period, seed in (("lowpass", 6000, 0), ("highpass", 11003, 1))
    )
    return (low + high).astype(np.float32)


def magnitude_error(truth: np.ndarray, estimate: np.ndarray) -> float:
    """Squared error of STFT magnitudes over the truth's power."""
    magnitudes = [np.abs(signal.stft(x, RATE, nperseg=RATE // 25)[2]) for x in (truth, estimate)]
    return float(np.square(magnitudes[1] - magnitudes[0]).sum() / np.square(magnitudes[0]).sum())


@pytest.mark.parametrize("song", [two_loops(), synth.song(0, 2 * SECONDS, RATE)], ids=["two loops", "song"])
def test_oracle_of_copies_is_nearer_to_the_truth_than_the_loop(song):
    context, truth = halves(song)
    oracle = baselines.copy_oracle(context, truth, RATE)
    loop = baselines.loop(context, RATE).sound
    assert oracle.shape == truth.shape
    assert oracle.dtype == np.float32
    assert magnitude_error(truth, oracle) < 0.8 * magnitude_error(truth, loop)


def test_oracle_chooses_by_band():
    """Of sounds that repeat themselves at two periods it plays each at its own."""
    context, truth = halves(two_loops())
    oracle = baselines.copy_oracle(context, truth, RATE)
    assert np.square(oracle - truth).mean() < 0.1 * np.square(truth).mean()


@pytest.mark.parametrize("samples", [1, 39, 12345])
def test_oracle_is_as_long_as_the_truth(samples):
    context, truth = halves(synth.song(0, 2 * SECONDS, RATE))
    assert baselines.copy_oracle(context, truth[:, :samples], RATE).shape == (2, samples)
