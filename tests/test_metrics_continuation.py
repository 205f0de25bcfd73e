"""Every measure of a continuation on signals whose answer is known."""

import math

import numpy as np
import pytest
from metric_signals import RATE, SILENCE, clicks, noise, sine, sound

from continuation import metrics


def test_loudness_ratio_of_half_the_amplitude_is_minus_6_db():
    assert metrics.loudness_ratio_db(noise(0), 0.5 * noise(0)) == pytest.approx(-6.02, abs=0.01)
    assert metrics.loudness_ratio_db(noise(0), SILENCE) == -100
    assert math.isnan(metrics.loudness_ratio_db(SILENCE, noise(0)))


def test_chroma_cosine_knows_the_octave_as_the_same_note_and_another_note_as_another():
    assert metrics.chroma_cosine(sine(440), 0.1 * sine(880), RATE) == pytest.approx(1, abs=0.01)
    assert metrics.chroma_cosine(sine(440), sine(440 * 2 ** (6 / 12)), RATE) < 0.05
    assert math.isnan(metrics.chroma_cosine(sine(440), SILENCE, RATE))


def test_horizons_cover_a_continuation_without_gap_or_overlap():
    x = noise(0, 10 * RATE)
    parts = metrics.horizons(x, RATE)
    assert list(parts) == ["0_1s", "1_3s", "3_10s"]
    np.testing.assert_array_equal(np.concatenate(list(parts.values()), axis=1), x)
    assert list(metrics.horizons(noise(0, RATE), RATE)) == ["0_1s"]


def join_click(context: np.ndarray, continuation: np.ndarray, rate: int) -> float:
    (found,) = metrics.click_percentiles(context, continuation, rate)
    return found


def test_a_click_at_the_join_is_louder_than_all_of_the_input_and_an_even_join_is_not():
    x = noise(0, 8 * RATE) * 0.02 + sine(200, 8 * RATE)
    context, smooth = x[:, : 4 * RATE], x[:, 4 * RATE :]
    clicked = smooth.copy()
    clicked[:, :20] += 0.5 * np.array([1, -1] * 10, dtype=np.float32)
    assert join_click(context, clicked, RATE) == 100
    percentiles = [join_click(x[:, :cut], x[:, cut:], RATE) for cut in range(3 * RATE, 5 * RATE, 480)]
    assert np.mean(percentiles) == pytest.approx(50, abs=10)
    assert math.isnan(join_click(SILENCE, clicked, RATE))


@pytest.mark.parametrize("offset_seconds", [-0.02, -0.01, 0.0, 0.009])
def test_a_click_anywhere_in_the_crossfade_is_seen(offset_seconds):
    x = 0.02 * noise(0, 8 * RATE)
    at = 4 * RATE + round(offset_seconds * RATE)
    x[:, at : at + 4] += np.array([0.5, -0.5, 0.5, -0.5], dtype=np.float32)
    assert join_click(x[:, : 4 * RATE], x[:, 4 * RATE :], RATE) == 100


def test_clicks_are_seen_at_their_places_and_nowhere_else():
    x = 0.02 * noise(0, 8 * RATE)
    places = [0, RATE, 2 * RATE, 3 * RATE]
    x[:, 5 * RATE : 5 * RATE + 4] += np.array([0.5, -0.5, 0.5, -0.5], dtype=np.float32)
    context, continuation = x[:, : 4 * RATE], x[:, 4 * RATE :]
    found = metrics.click_percentiles(context, continuation, RATE, places)
    assert found[1] == 100
    assert (np.delete(found, 1) < 100).all()
    ends = metrics.click_percentiles(context, continuation, RATE, [4 * RATE])
    assert len(metrics.click_percentiles(context, continuation, RATE, [])) == 0
    assert ends.shape == (1,)


def test_seam_click_is_the_mean_over_the_seams_and_undefined_without_any():
    x = 0.02 * noise(0, 8 * RATE)
    x[:, 5 * RATE : 5 * RATE + 4] += np.array([0.5, -0.5, 0.5, -0.5], dtype=np.float32)
    context, continuation = x[:, : 4 * RATE], x[:, 4 * RATE :]
    seams = [RATE, 3 * RATE]
    played = sound(continuation)
    found = [
        metrics.continuation_measures(sound(context), played, played, given)["seam_click_percentile"]
        for given in (seams, ())
    ]
    assert found[0] == np.mean(metrics.click_percentiles(context, continuation, RATE, seams)) > 50
    assert math.isnan(found[1])


def test_copy_index_of_a_repeated_input_is_one_and_of_other_music_lower():
    rng = np.random.default_rng(0)
    steps = np.repeat(rng.uniform(0.05, 1, size=(2, 40)), RATE // 4, axis=1)
    context, other = noise(1, 10 * RATE) * steps[:1], noise(2, 10 * RATE) * steps[1:]
    assert metrics.copy_index(context, context, RATE) == pytest.approx(1)
    shifted = np.roll(context, -3 * RATE, axis=1)[:, : 5 * RATE]
    assert metrics.copy_index(context, shifted, RATE) > 0.95
    assert metrics.copy_index(context, other, RATE) < 0.8
    assert math.isnan(metrics.copy_index(context, SILENCE, RATE))


def test_continuation_measures_of_the_truth_are_neutral():
    context, truth = clicks([0.5, 1.5, 2.5]), clicks([0.4, 1.4, 2.4]) + sine(440, level=0.1)
    measures = metrics.continuation_measures(sound(context), sound(truth), sound(truth))
    assert measures["chroma_cosine"] == pytest.approx(1)
    assert measures["copy_index_above_truth"] == 0
    assert measures["join_click_percentile"] == measures["join_click_percentile_truth"]
    ratios = [value for name, value in measures.items() if name.endswith("_db")]
    assert len(ratios) == 2 + 3 * (1 + 6)
    assert all(value == 0 or math.isnan(value) for value in ratios)


def test_continuation_measures_see_a_band_fade_with_the_horizon():
    truth = noise(1, 10 * RATE)
    fading = truth.copy()
    fading[:, 3 * RATE :] *= 0.5
    measures = metrics.continuation_measures(sound(noise(0, 10 * RATE)), sound(truth), sound(fading))
    assert measures["energy_1000_2000_0_1s_db"] == measures["loudness_1_3s_db"] == 0
    assert measures["energy_1000_2000_3_10s_db"] == pytest.approx(-6.02, abs=0.01)


def latents(scales: np.ndarray, pairs: int = 2, length: int = 5000) -> np.ndarray:
    """Normal latents (pairs, channels, length) whose standard deviation by channel is `scales`."""
    return scales[:, None] * np.random.default_rng(0).standard_normal((pairs, len(scales), length))


def test_latent_std_ratios_are_the_factors_of_the_channels():
    factors = np.linspace(0.5, 1.5, 11)
    ratios = metrics.latent_std_ratios(latents(np.ones(11)), latents(factors))
    assert ratios["latent_std_ratio_median"] == pytest.approx(1.0, abs=1e-9)
    assert ratios["latent_std_ratio_lower_decile"] == pytest.approx(0.6, abs=1e-9)
    assert ratios["latent_std_ratio_upper_decile"] == pytest.approx(1.4, abs=1e-9)
    assert ratios["latent_std_ratio_worst_decile"] == pytest.approx(1 / 0.6, abs=1e-9)


def test_latent_std_ratios_see_collapse_in_every_pair_though_the_pairs_differ():
    truth = latents(np.ones(4))
    still = np.stack([np.full((4, 5000), -5.0), np.full((4, 5000), 5.0)])
    ratios = metrics.latent_std_ratios(truth, still)
    assert ratios["latent_std_ratio_median"] == 0
    assert ratios["latent_std_ratio_worst_decile"] == 100


def test_latent_std_ratios_leave_out_channels_in_which_the_truth_rests():
    truth, estimate = latents(np.array([1.0, 0.0])), latents(np.array([2.0, 1.0]))
    assert metrics.latent_std_ratios(truth, estimate)["latent_std_ratio_median"] == pytest.approx(2)
    assert all(math.isnan(value) for value in metrics.latent_std_ratios(0 * truth, estimate).values())


def chord(frequencies: list[float]) -> np.ndarray:
    return sum(sine(frequency, level=0.2) for frequency in frequencies)


A_MAJOR = chord([220, 277.18, 329.63, 440])
C_MINOR = chord([130.81, 155.56, 196.0, 261.63])


def test_key_of_a_triad_is_its_own():
    assert metrics.key(A_MAJOR, RATE) == 0
    assert metrics.key(C_MINOR, RATE) == 12 + 3
    assert metrics.key_agreement(A_MAJOR, 0.1 * A_MAJOR, RATE) == 1
    assert metrics.key_agreement(A_MAJOR, C_MINOR, RATE) == 0
    assert math.isnan(metrics.key_agreement(A_MAJOR, SILENCE, RATE))


def test_passage_that_was_learned_by_heart_is_found_at_any_lag():
    learned = [noise(seed, 8 * RATE) * np.repeat(1 + np.arange(8) % 3, RATE).astype(np.float32) for seed in range(3)]
    copied = 0.3 * learned[1][:, round(1.35 * RATE) : round(5.35 * RATE)]
    found = metrics.passages(copied, RATE, 1.0)
    assert metrics.nearest_similarity(found, learned, RATE).min() > 0.95
    assert metrics.nearest_similarity(found, learned[::2], RATE).max() < 0.8
    assert np.isnan(metrics.nearest_similarity(found, [SILENCE], RATE)).all()


def test_latent_diversity_is_0_for_the_same_and_1_for_independent_samples():
    a, b = np.random.default_rng(0).standard_normal((2, 8, 4000))
    assert metrics.latent_diversity(a, a) == 0
    assert metrics.latent_diversity(a, b) == pytest.approx(1, abs=0.05)
    assert metrics.latent_diversity(a, 0.8 * a + 0.6 * b) == pytest.approx(0.2, abs=0.05)
