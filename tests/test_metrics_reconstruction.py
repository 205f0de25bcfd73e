"""Every measure of a reconstruction, and its reference sounds, on signals whose answer is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
from metric_signals import RATE, SAMPLES, SILENCE, clicks, noise, sine, sound

from continuation import metrics
from continuation.metrics.spectra import band_pass


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
    high = band_pass(x, RATE, 2500, 6000)
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
    bands = [band_pass(x, RATE, low, high) for low, high in pairwise(edges)]
    np.testing.assert_allclose(sum(bands), x, atol=1e-6)


def test_a_band_above_the_nyquist_frequency_is_left_out():
    assert list(metrics.band_energy_ratios_db(noise(1), noise(1), 6000)) == [
        "0_150",
        "150_400",
        "400_1000",
        "1000_2000",
        "2000_3500",
    ]


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


def test_measures_of_a_perfect_reconstruction_are_perfect():
    x = clicks([0.5, 1.1, 1.9, 2.6, 3.3]) + noise(1, level=0.003)
    measures = metrics.reconstruction_measures(sound(x), sound(x), latent_rate=50, hop_rate=100)
    assert measures["onset_f"] == 1 and measures["si_sdr_below_1000_db"] == 100
    for name, value in measures.items():
        if name.startswith("envelope_correlation"):
            assert value == pytest.approx(1)
        elif name not in ("onset_f", "si_sdr_db", "si_sdr_below_1000_db"):
            assert value == 0, name


def test_measures_of_silence_are_zero_or_undefined_without_a_warning(recwarn):
    measures = metrics.reconstruction_measures(sound(SILENCE), sound(SILENCE), latent_rate=50, hop_rate=100)
    assert measures.pop("waveform_mse") == 0 and measures.pop("mr_stft") == 0
    assert all(math.isnan(value) for value in measures.values())
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
