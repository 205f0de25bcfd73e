"""Every measure on signals whose answer is known."""

import math
from itertools import pairwise

import numpy as np
import pytest

from continuation import metrics

RATE = 12000
SAMPLES = 4 * RATE


def noise(seed: int, samples: int = SAMPLES, level: float = 0.1) -> np.ndarray:
    return (level * np.random.default_rng(seed).standard_normal((2, samples))).astype(np.float32)


def sine(frequency: float, samples: int = SAMPLES, level: float = 0.5) -> np.ndarray:
    wave = level * np.sin(2 * np.pi * frequency * np.arange(samples) / RATE)
    return np.stack([wave, wave]).astype(np.float32)


def clicks(times: list[float], samples: int = SAMPLES) -> np.ndarray:
    x = 1e-4 * noise(9, samples)
    burst = np.hanning(400)[None, 200:] * noise(8, 200, level=0.5)
    for time in times:
        start = round(time * RATE)
        x[:, start : start + 200] += burst
    return x


SILENCE = np.zeros((2, SAMPLES), dtype=np.float32)


# Samples


def test_waveform_mse_of_a_constant_offset_is_its_square():
    assert metrics.waveform_mse(noise(0), noise(0) + 0.25) == pytest.approx(0.0625, rel=1e-5)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        metrics.waveform_mse(noise(0), noise(0)[:, 1:])


@pytest.mark.parametrize("snr_db", [-20.0, 0.0, 12.5])
def test_si_sdr_is_the_snr_of_orthogonal_noise_at_any_scale(snr_db):
    signal, distortion = sine(200, level=0.5), sine(300, level=0.5 * 10 ** (-snr_db / 20))
    assert metrics.si_sdr(signal, 3.0 * (signal + distortion), RATE) == pytest.approx(snr_db, abs=0.01)


def test_si_sdr_below_1000_hz_ignores_what_is_above():
    signal, low, high = sine(200), sine(300, level=0.05), sine(1500, level=5.0)
    assert metrics.si_sdr(signal, signal + low + high, RATE) == pytest.approx(-20, abs=0.05)
    assert metrics.si_sdr(signal, signal + low + high, RATE, below_hz=1000) == pytest.approx(20, abs=0.05)


def test_si_sdr_is_limited_when_equal_and_undefined_for_silence():
    assert metrics.si_sdr(noise(0), noise(0), RATE) == 100
    assert math.isnan(metrics.si_sdr(SILENCE, noise(0), RATE))
    assert math.isnan(metrics.si_sdr(noise(0), SILENCE, RATE))


def test_a_silent_channel_does_not_hide_the_other():
    one_sided = sine(200) * np.array([[1], [0]], dtype=np.float32)
    distorted = one_sided + sine(300, level=0.05)
    assert metrics.si_sdr(one_sided, distorted, RATE) == pytest.approx(20, abs=0.01)


# Onsets


def test_onset_f_is_one_for_equal_and_for_slightly_late_clicks():
    times = [0.5, 1.1, 1.9, 2.6, 3.3]
    assert metrics.onset_f(clicks(times), clicks(times), RATE) == 1
    assert metrics.onset_f(clicks(times), clicks([t + 0.03 for t in times]), RATE) == 1


def test_onset_f_counts_missed_and_late_clicks():
    truth = clicks([0.5, 1.1, 1.9, 2.6])
    assert metrics.onset_f(truth, clicks([0.5, 1.1]), RATE) == pytest.approx(2 * 2 / (4 + 2))
    assert metrics.onset_f(truth, clicks([0.7, 1.3, 2.1, 2.8]), RATE) == 0


def test_onset_f_of_silence_is_undefined_and_of_a_silent_estimate_zero():
    assert math.isnan(metrics.onset_f(SILENCE, clicks([1.0]), RATE))
    assert metrics.onset_f(clicks([1.0]), SILENCE, RATE) == 0


def test_onsets_are_matched_one_to_one():
    matched = metrics.match_onsets(np.array([1.0, 1.04]), np.array([1.02, 2.0]), 0.05)
    assert matched == 1
    assert metrics.match_onsets(np.array([1.0, 1.06]), np.array([0.96, 1.03]), 0.05) == 2


# Spectra


def test_mr_stft_distance_of_equal_signals_is_zero_and_of_doubled_ones_known():
    x = noise(1, level=0.3)
    assert metrics.mr_stft_distance(x, x) == 0
    assert metrics.mr_stft_distance(x, 2 * x) == pytest.approx(math.log(2) + 1, abs=0.01)


def test_mr_stft_distance_of_what_lies_under_the_floor_is_zero():
    assert metrics.mr_stft_distance(SILENCE, SILENCE) == 0


def test_log_spectral_distance_of_a_doubled_signal_is_6_02_db_in_every_band():
    distance = metrics.log_spectral_distance(noise(1), 2 * noise(1), RATE)
    assert set(distance) == {"whole", "0_300", "300_1000", "1000_2500", "2500_6000"}
    for value in distance.values():
        assert value == pytest.approx(20 * math.log10(2), abs=0.02)


def test_log_spectral_distance_has_its_floor_60_db_under_the_maximum():
    x = noise(1)
    distance = metrics.log_spectral_distance(x, SILENCE, RATE)["whole"]
    assert 30 < distance < 60
    assert metrics.log_spectral_distance(x, 1e-9 * x, RATE)["whole"] == distance


def test_log_spectral_distance_finds_the_band_that_changed():
    x = noise(1)
    high = metrics._band_pass(x, RATE, 2500, 6000)
    distance = metrics.log_spectral_distance(x, (x + high).astype(np.float32), RATE)
    assert distance["0_300"] < 0.1 and distance["1000_2500"] < 1
    assert distance["2500_6000"] == pytest.approx(6.02, abs=0.3)


def test_log_spectral_distance_to_silence_is_undefined():
    assert all(math.isnan(v) for v in metrics.log_spectral_distance(SILENCE, noise(0), RATE).values())


def test_mid_side_ratio_of_a_side_made_twice_as_loud_is_6_db():
    left, right = noise(2)
    mid, side = (left + right) / 2, (left - right) / 2
    wider = np.stack([mid + 2 * side, mid - 2 * side])
    assert metrics.mid_side_energy_ratio_db(np.stack([left, right]), wider) == pytest.approx(6.02, abs=0.01)
    assert math.isnan(metrics.mid_side_energy_ratio_db(sine(200), noise(2)))
    assert math.isnan(metrics.mid_side_energy_ratio_db(noise(2)[:1], noise(2)[:1]))


def test_noise_is_flatter_than_a_tone_and_scale_does_not_matter():
    tone = sine(2000) + noise(3, level=0.05)
    ratio = metrics.spectral_flatness_ratio_db(tone, noise(4), RATE)
    assert ratio["1000_2500"] > 10
    assert ratio["2500_6000"] == pytest.approx(0, abs=0.5)
    same = metrics.spectral_flatness_ratio_db(noise(4), 0.5 * noise(4), RATE)
    assert all(abs(value) < 0.05 for value in same.values())


def test_flatness_of_silence_is_undefined():
    assert all(math.isnan(v) for v in metrics.spectral_flatness_ratio_db(SILENCE, noise(0), RATE).values())
    assert all(math.isnan(v) for v in metrics.spectral_flatness_ratio_db(noise(0), SILENCE, RATE).values())


def test_envelope_correlation_knows_the_beat_from_the_off_beat():
    beat = 1 + np.sin(2 * np.pi * 4 * np.arange(SAMPLES) / RATE)
    on, on_again, off = noise(5) * beat, noise(6) * beat, noise(7) * (2 - beat)
    assert metrics.envelope_correlation(on, on, RATE)["1000_2500"] == pytest.approx(1)
    assert metrics.envelope_correlation(on, on_again, RATE)["2500_6000"] > 0.9
    assert metrics.envelope_correlation(on, off, RATE)["2500_6000"] < -0.9
    assert math.isnan(metrics.envelope_correlation(SILENCE, on, RATE)["0_300"])


def test_band_energy_ratio_is_that_of_the_scaled_band_alone():
    low, high = sine(200), sine(3000)
    ratios = metrics.band_energy_ratios_db(low + high, low + 0.5 * high, RATE)
    assert ratios["150_400"] == pytest.approx(0, abs=0.01)
    assert ratios["2000_3500"] == pytest.approx(-6.02, abs=0.01)
    assert math.isnan(ratios["400_1000"])


def test_band_passes_of_a_partition_add_up_to_the_signal():
    x, edges = noise(1), metrics.RECONSTRUCTION_BANDS_HZ
    bands = [metrics._band_pass(x, RATE, low, high) for low, high in pairwise(edges)]
    np.testing.assert_allclose(sum(bands), x, atol=1e-6)


def test_a_band_above_the_nyquist_frequency_is_left_out():
    assert list(metrics.band_energy_ratios_db(noise(1), noise(1), 6000)) == [
        "0_150",
        "150_400",
        "400_1000",
        "1000_2000",
        "2000_3500",
    ]


# Comb


def test_comb_of_added_50_hz_multiples_stands_above_the_truth_at_50_hz_alone():
    samples = 10 * RATE
    x = noise(1, samples, level=0.1)
    hum = sum(sine(frequency, samples, level=0.01) for frequency in range(150, 6000, 50))
    own = metrics.comb(x, RATE, 50)
    assert 1 < own < 4
    # A sine of amplitude a has the Welch density a^2/2 / (1.5 * rate / n), the noise 2 level^2 / rate.
    expected = 10 * math.log10(0.01**2 / 2 / (1.5 * RATE / 32768) / (2 * 0.1**2 / RATE))
    assert metrics.comb(x + hum, RATE, 50) == pytest.approx(expected, abs=1.5)
    assert metrics.comb(x + hum, RATE, 100) == pytest.approx(expected, abs=1.5)
    assert abs(metrics.comb(x + hum, RATE, 70) - own) < 6  # of its multiples only one in five is hit


def test_hum_finds_the_one_line_that_the_mean_over_all_multiples_hides():
    truth = noise(3, 10 * RATE, level=0.1)
    hums = truth + sine(800, level=0.05, samples=10 * RATE)
    frequencies, heights = metrics.hum(truth, hums, RATE, 100, 100)
    assert frequencies[np.argmax(heights)] == 800
    assert heights.max() > 20
    assert metrics.combs_above_truth(truth, hums, RATE, 100, 100)["comb_latent_db"] < 1
    assert len(metrics.hum(truth, np.zeros_like(truth), RATE, 100, 100)[1]) == 0


def test_comb_of_silence_and_of_short_signals_is_undefined():
    assert math.isnan(metrics.comb(np.zeros((2, 10 * RATE)), RATE, 50))
    assert math.isnan(metrics.comb(noise(0, 30000), RATE, 50))


# References


def test_noise_reference_keeps_band_energies_and_nothing_of_the_waveform():
    x = noise(1) * (1 + np.sin(2 * np.pi * 3 * np.arange(SAMPLES) / RATE)) + sine(440)
    reference = metrics.noise_reference(x, RATE, seed=0)
    assert reference.shape == x.shape and reference.dtype == np.float32
    for ratio in metrics.band_energy_ratios_db(x, reference, RATE, metrics.RECONSTRUCTION_BANDS_HZ).values():
        assert abs(ratio) < 1
    assert metrics.si_sdr(x, reference, RATE) < -15
    assert metrics.envelope_correlation(x, reference, RATE)["2500_6000"] > 0.9


def test_noise_reference_repeats_with_its_seed():
    x = noise(1)
    np.testing.assert_array_equal(metrics.noise_reference(x, RATE, 0), metrics.noise_reference(x, RATE, 0))
    assert metrics.si_sdr(metrics.noise_reference(x, RATE, 0), metrics.noise_reference(x, RATE, 1), RATE) < -15


def test_smooth_reference_is_nearer_than_noise_in_spectrum_and_waveform():
    x = noise(1) + sine(440)
    smooth, shaped = metrics.smooth_reference(x, RATE), metrics.noise_reference(x, RATE, 0)
    assert metrics.si_sdr(x, smooth, RATE) > 5
    assert metrics.mr_stft_distance(x, smooth) < 0.6 * metrics.mr_stft_distance(x, shaped)


def test_references_of_silence_are_silent():
    assert not metrics.noise_reference(SILENCE, RATE, 0).any()
    assert not metrics.smooth_reference(SILENCE, RATE).any()


# The bundle


def test_measures_of_a_perfect_reconstruction_are_perfect():
    x = clicks([0.5, 1.1, 1.9, 2.6, 3.3]) + noise(1, level=0.003)
    measures = metrics.reconstruction_measures(x, x, RATE, latent_rate=50, hop_rate=100)
    assert measures["onset_f"] == 1 and measures["si_sdr_below_1000_db"] == 100
    for name, value in measures.items():
        if name.startswith("envelope_correlation"):
            assert value == pytest.approx(1)
        elif name not in ("onset_f", "si_sdr_db", "si_sdr_below_1000_db"):
            assert value == 0, name


def test_measures_of_silence_are_zero_or_undefined_without_a_warning(recwarn):
    measures = metrics.reconstruction_measures(SILENCE, SILENCE, RATE, latent_rate=50, hop_rate=100)
    assert measures.pop("waveform_mse") == 0 and measures.pop("mr_stft") == 0
    assert all(math.isnan(value) for value in measures.values())
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


# Intervals


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


def test_loudness_ratio_of_half_the_amplitude_is_minus_6_db():
    assert metrics.loudness_ratio_db(noise(0), 0.5 * noise(0)) == pytest.approx(-6.02, abs=0.01)
    assert metrics.loudness_ratio_db(noise(0), SILENCE) == -100
    assert math.isnan(metrics.loudness_ratio_db(SILENCE, noise(0)))


# Continuation


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
    found = [
        metrics.continuation_measures(context, continuation, continuation, RATE, given)["seam_click_percentile"]
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
    measures = metrics.continuation_measures(context, truth, truth, RATE)
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
    measures = metrics.continuation_measures(noise(0, 10 * RATE), truth, fading, RATE)
    assert measures["energy_1000_2000_0_1s_db"] == measures["loudness_1_3s_db"] == 0
    assert measures["energy_1000_2000_3_10s_db"] == pytest.approx(-6.02, abs=0.01)


def test_combs_above_truth_are_the_differences_of_the_single_combs():
    truth, hum = noise(0), noise(0) + sine(300, level=0.1) + sine(600, level=0.1)
    combs = metrics.combs_above_truth(truth, hum, RATE, 50, 100)
    assert list(combs) == ["comb_latent_db", "comb_hop_db", "comb_300_db"]
    for name, spacing in (("latent", 50), ("hop", 100), ("300", 300)):
        own = metrics.comb(truth, RATE, spacing)
        assert combs[f"comb_{name}_db"] == metrics.comb(hum, RATE, spacing) - own
    assert combs["comb_300_db"] > combs["comb_hop_db"] > combs["comb_latent_db"] > 0


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


@pytest.mark.parametrize("bpm", [117, 119.3, 173])
def test_tempo_between_two_frames_is_found(bpm):
    """117 beats a minute are 51.3 frames of 10 ms: a whole number of them would be off by half a percent."""
    x = clicks(list(np.arange(0.1, 9.9, 60 / bpm)), 10 * RATE)
    octaves = np.log2(metrics.tempo(x, RATE) / bpm)
    assert octaves == pytest.approx(round(octaves), abs=0.0015)  # a tenth of a percent


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


def beats(bpm: float, first: float = 0.1, seconds: float = 8) -> np.ndarray:
    return clicks(list(np.arange(first, seconds - 0.1, 60 / bpm)), round(seconds * RATE))


def test_onsets_at_the_same_times_correlate_and_others_do_not():
    assert metrics.onset_correlation(beats(100), 0.5 * beats(100), RATE) > 0.95
    assert metrics.onset_correlation(beats(100), beats(100, first=0.4), RATE) < 0.1


@pytest.mark.parametrize(("bpm", "deviation"), [(100, 0.0), (50, 0.0), (130, math.log2(1.3))])
def test_tempo_deviation_is_the_distance_to_the_nearest_octave(bpm, deviation):
    assert metrics.tempo_deviation(beats(100), beats(bpm), RATE) == pytest.approx(deviation, abs=0.03)


@pytest.mark.parametrize("late", [0.0, 0.15, 0.3])
def test_beat_phase_error_is_the_delay_behind_the_inputs_beat(late):
    """The input's next beat is due 0.1 s after the cut; a beat takes 0.6 s."""
    context = beats(100, first=0.1, seconds=7.8)  # 7.8 s are 13 beats
    error = metrics.beat_phase_error(context, beats(100, first=0.1 + late), RATE)
    assert error == pytest.approx(late / 0.6, abs=0.06)


def test_silence_keeps_no_beat():
    context = beats(100, seconds=7.8)
    assert math.isnan(metrics.beat_phase_error(context, np.zeros_like(context), RATE))


def test_beat_is_judged_only_where_the_truth_keeps_it():
    context, steady = beats(100, seconds=7.8), beats(100, seconds=7.8)
    assert metrics.beat_measures(context, steady, steady, RATE)["beat_phase_error"] < 0.05
    for truth in (beats(130, seconds=7.8), beats(100, first=0.4, seconds=7.8), np.zeros_like(context)):
        assert math.isnan(metrics.beat_measures(context, truth, steady, RATE)["beat_phase_error"])


def test_beat_that_goes_on_keeps_its_phase_though_it_falls_between_frames():
    x = beats(117, seconds=20)
    assert metrics.beat_phase_error(x[:, : 10 * RATE], x[:, 10 * RATE :], RATE) < 0.03


def test_passage_that_was_learned_by_heart_is_found_at_any_lag():
    learned = [noise(seed, 8 * RATE) * np.repeat(1 + np.arange(8) % 3, RATE).astype(np.float32) for seed in range(3)]
    copied = 0.3 * learned[1][:, round(1.35 * RATE) : round(5.35 * RATE)]
    found = metrics.passages(copied, RATE, 1.0)
    assert metrics.nearest_likeness(found, learned, RATE).min() > 0.95
    assert metrics.nearest_likeness(found, learned[::2], RATE).max() < 0.8
    assert np.isnan(metrics.nearest_likeness(found, [SILENCE], RATE)).all()


def test_latent_diversity_is_0_for_the_same_and_1_for_independent_samples():
    a, b = np.random.default_rng(0).standard_normal((2, 8, 4000))
    assert metrics.latent_diversity(a, a) == 0
    assert metrics.latent_diversity(a, b) == pytest.approx(1, abs=0.05)
    assert metrics.latent_diversity(a, 0.8 * a + 0.6 * b) == pytest.approx(0.2, abs=0.05)
