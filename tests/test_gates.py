"""The gates: every one can be met and can be missed, and none is guessed where the scorecard cannot tell."""

from __future__ import annotations

import copy
import math

import pytest

import gates

NAME = "tiny-flow"
SONGS = "abcde"
ENERGIES = [f"energy_{band}_{part}_db" for band in ("0_150", "150_400") for part in ("0_1s", "3_10s")]


def figure(value: float, low: float | None = None, spread: float = 0.0) -> dict:
    songs = {song: value + spread * (i - 2) for i, song in enumerate(SONGS)}
    return {"mean": value, "low": value if low is None else low, "high": value, "songs": songs}


def distance(value: float, spread: float = 0.0) -> dict:
    return {"mean": value, "without_song": {song: value + spread * (i - 2) for i, song in enumerate(SONGS)}}


def figures(**values: float) -> dict:
    return {measure: figure(value) for measure, value in values.items()}


def good_card() -> dict:
    """All gates are met."""
    bands = gates.LOW_BANDS + gates.HIGH_BANDS
    own = dict(mr_stft=1.0, si_sdr_below_1000_db=12.0, onset_f=0.8, comb_latent_db=0.5, comb_hop_db=0.5)
    noise = dict(mr_stft=1.4)
    for band in bands:
        own |= {f"lsd_{band}_db": 5.0, f"energy_{band}_db": -1.0, f"flatness_{band}_db": -0.2}
        own |= {f"envelope_correlation_{band}": 0.9}
        noise |= {f"lsd_{band}_db": 8.0, f"flatness_{band}_db": 0.5, f"envelope_correlation_{band}": 0.8}
    spread = dict(latent_std_ratio_median=1.0, latent_std_ratio_worst_decile=1.2)
    continued = dict(comb_latent_db=0.5, comb_hop_db=0.5, loudness_db=-1.0, join_click_percentile=60.0)
    continued |= dict(
        copy_index=0.5, memorisation=-0.1, chroma_cosine=0.9, onset_correlation=0.2, tempo_deviation=0.1
    )
    continued |= spread | dict.fromkeys(ENERGIES, -2.0)
    real = dict(chroma_cosine=0.7, onset_correlation=0.1, tempo_deviation=0.3)
    gains = dict(gain_another_song=0.1, gain_same_song=0.05)
    grown = dict(gain_another_song=(0.0, 0.1), gain_same_song=(-0.1, 0.1))
    distances = {NAME: 5.0, f"{NAME}, one step": 50.0, "tiny-mse": 40.0, "legacy-mse": 60.0}
    return {
        "checkpoints": {NAME: grown, "tiny-mse": grown, "legacy-mse": {}},
        "settings": {"seed": 0},
        "figures": {
            "reconstruction": {
                NAME: figures(**own),
                "noise reference": figures(**noise),
                "legacy-mse": figures(onset_f=0.7),
            },
            "continuation": {
                NAME: figures(**continued),
                f"{NAME}, guidance 1": figures(**spread),
                f"{NAME}, ceiling": figures(**dict.fromkeys(ENERGIES, -1.0)),
                f"another song through {NAME}": figures(**real),
                f"same song elsewhere through {NAME}": figures(**real),
                "truth": {"copy_index": figure(0.5, spread=0.1)},
            },
            "context": {NAME: figures(**gains), "tiny-mse": figures(**gains)},
        },
        "hum": {section: {NAME: {"hz": 800.0, "db": 2.0}} for section in ("reconstruction", "continuation")},
        "kernel_audio_distance": {name: distance(value) for name, value in distances.items()},
    }


def verdicts(card: dict) -> dict[str, bool | None]:
    return {gate.demand: gate.met for gate in gates.check(card)}


def test_good_network_meets_every_gate():
    found = verdicts(good_card())
    assert len(found) == 36
    assert set(found.values()) == {True}


FAULTS = [
    ("reconstruction", NAME, "comb_hop_db", 1.1, "reconstruction: comb"),
    ("continuation", NAME, "comb_latent_db", 1.1, "continuation: comb"),
    ("reconstruction", NAME, "mr_stft", 1.2, "MR-STFT"),
    ("reconstruction", NAME, "lsd_300_1000_db", 6.1, "reference's below 1 kHz"),
    ("reconstruction", NAME, "lsd_2500_6000_db", 8.1, "reference's above it"),
    ("reconstruction", NAME, "energy_1000_2500_db", -1.6, "energy above 1 kHz"),
    ("reconstruction", NAME, "flatness_1000_2500_db", -0.6, "flatness"),
    ("reconstruction", NAME, "envelope_correlation_2500_6000", 0.7, "envelope"),
    ("reconstruction", NAME, "si_sdr_below_1000_db", 10.9, "SI-SDR"),
    ("reconstruction", NAME, "onset_f", 0.6, "onset F"),
    ("context", NAME, "gain_another_song", 0.0, "gain against another song, lower end"),
    ("context", "tiny-mse", "gain_same_song", -0.1, "tiny-mse against the same song elsewhere, lower end"),
    ("continuation", NAME, "latent_std_ratio_median", 0.8, "ratio, median"),
    ("continuation", f"{NAME}, guidance 1", "latent_std_ratio_worst_decile", 1.3, "guidance 1, worst decile"),
    ("continuation", NAME, ENERGIES[3], -5.0, "within 3 dB"),
    ("continuation", NAME, "loudness_db", 2.1, "loudness"),
    ("continuation", NAME, "join_click_percentile", 96.0, "join click"),
    ("continuation", NAME, "copy_index", 0.9, "copy index"),
    ("continuation", NAME, "memorisation", 0.01, "memorisation"),
    (
        "continuation",
        f"another song through {NAME}",
        "chroma_cosine",
        0.9,
        "another song through its codec in chroma",
    ),
]


@pytest.mark.parametrize(("section", "system", "measure", "value", "words"), FAULTS)
def test_one_fault_misses_its_gate_and_no_other(section, system, measure, value, words):
    card = good_card()
    card["figures"][section][system][measure] = figure(value)
    missed = [demand for demand, met in verdicts(card).items() if met is not True]
    assert len(missed) == 1 and words in missed[0]


def missed_gates(card: dict) -> list[str]:
    return [demand for demand, met in verdicts(card).items() if met is not True]


def test_errors_of_the_reconstruction_that_cancel_over_songs_are_not_met():
    card = good_card()
    card["figures"]["reconstruction"][NAME]["energy_1000_2500_db"] = figure(0.0, spread=3.0)
    assert missed_gates(card) == ["energy above 1 kHz within 1.5 dB of the truth"]


def test_one_loud_line_that_the_mean_of_the_comb_hides_is_not_met():
    card = good_card()
    card["hum"]["reconstruction"][NAME]["db"] = 30.0
    (missed,) = missed_gates(card)
    assert missed.startswith("reconstruction: no multiple")


def test_context_gain_that_falls_in_training_is_not_met():
    card = good_card()
    card["checkpoints"]["tiny-mse"] = {"gain_another_song": (0.0, 0.1), "gain_same_song": (0.2, 0.1)}
    assert missed_gates(card) == [
        "context gain of tiny-mse against the same song elsewhere on val: growth in training"
    ]


@pytest.mark.parametrize("other", ["tiny-mse", "legacy-mse", f"{NAME}, one step"])
@pytest.mark.parametrize("figure", [distance(5.0), distance(6.0, spread=1.0)])
def test_kernel_distance_must_be_lower_than_each_other_network_beyond_chance(other, figure):
    card = good_card()
    card["kernel_audio_distance"][other] = figure
    assert missed_gates(card) == [f"KAD lower than that of {other.removeprefix(f'{NAME}, ')}"]


def test_hardest_of_several_networks_is_the_one_to_beat():
    card = good_card()
    card["checkpoints"]["legacy-mse (other)"] = {}
    card["figures"]["reconstruction"]["legacy-mse (other)"] = figures(onset_f=0.9)
    card["kernel_audio_distance"]["legacy-mse (other)"] = distance(4.0)
    assert missed_gates(card) == ["onset F minus legacy's: at least 0", "KAD lower than that of legacy-mse (other)"]


def test_one_of_onset_correlation_and_tempo_is_enough_and_both_worse_are_not():
    card = good_card()
    own = card["figures"]["continuation"][NAME]
    own["onset_correlation"] = figure(0.0)
    assert set(verdicts(card).values()) == {True}
    own["tempo_deviation"] = figure(0.5)
    assert list(verdicts(card).values()).count(False) == 2


def test_difference_within_chance_is_not_met():
    card = good_card()
    noisy = figure(0.72, spread=0.3)
    card["figures"]["continuation"][NAME]["chroma_cosine"] = noisy
    assert list(verdicts(card).values()).count(False) == 2


def test_what_the_scorecard_lacks_is_neither_met_nor_missed():
    card = good_card()
    lacking = copy.deepcopy(card)
    lacking["checkpoints"] = {NAME: card["checkpoints"][NAME]}
    lacking["kernel_audio_distance"] = {}
    lacking["figures"]["context"].pop("tiny-mse")
    unknown = [demand for demand, met in verdicts(lacking).items() if met is None]
    assert len(unknown) == 8  # onset F of legacy, two gains of mse and their growth, three distances
    assert False not in verdicts(lacking).values()
    card["figures"]["continuation"][NAME]["loudness_db"] = figure(math.nan)
    assert [demand for demand, met in verdicts(card).items() if met is None] == [
        "loudness, mean over songs, within 2 dB of the truth"
    ]


def test_networks_that_do_not_flow_have_no_gates():
    card = good_card()
    card["checkpoints"].pop(NAME)
    assert gates.check(card) == []
