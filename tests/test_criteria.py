"""The criteria: every one can be met and can be missed, and none is guessed where the scorecard cannot tell."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from continuation import criteria

NAME = "tiny-flow"
SONGS = "abcde"
LEAST_REPEATED = ["a", "b"]
ENERGIES = [f"energy_{band}_{part}_db" for band in ("0_150", "150_400") for part in ("0_1s", "3_10s")]
BLOCKS = 6
FLOW, MSE = {"objective": "flow"}, {"objective": "mse"}


def figure(value: float, *songs: float) -> dict:
    """The same in every song, unless each song's value is given."""
    return {"mean": value, "low": value, "high": value, "songs": dict(zip(SONGS, songs or [value] * 5, strict=True))}


def figures(**values: float) -> dict:
    return {measure: figure(value) for measure, value in values.items()}


def good_card() -> dict:
    """All criteria are met."""
    combs = dict(comb_latent_db=0.5, comb_hop_db=0.5)
    continued = dict(
        onset_correlation=0.3, chroma_cosine=0.9, mr_stft=1.0, loudness_db=-0.5, join_click_percentile=60.0,
        seam_click_percentile=70.0, copy_index=0.5, memorisation=-0.1, latent_std_ratio_median=1.0,
        latent_std_ratio_worst_decile=1.2, **combs, **dict.fromkeys(ENERGIES, -1.0),
    )  # fmt: skip
    looped = dict(onset_correlation=0.2, chroma_cosine=0.8, mr_stft=1.2, copy_index=0.7)
    return {
        "checkpoints": {NAME: FLOW, "tiny-mse": MSE, "legacy-mse": MSE},
        "settings": {"seed": 0},
        "figures": {
            "reconstruction": {NAME: figures(**combs)},
            "continuation": {
                NAME: figures(**continued), "loop": figures(**looped), "truth": figures(copy_index=0.4),
            },
            "context": {NAME: figures(gain_another_song=0.1, gain_same_song=0.05)},
        },
        "hum": {section: {NAME: {"hz": 800.0, "db": 2.0}} for section in ("reconstruction", "continuation")},
        "kernel_audio_distance": {NAME: {"mean": 10.0}},
        "halves": {
            "repeats least": {"songs": LEAST_REPEATED, "kernel_audio_distance": {NAME: {"mean": 20.0}}},
            "repeats most": {"songs": ["c", "d", "e"], "kernel_audio_distance": {NAME: {"mean": 5.0}}},
        },
        "long": {
            NAME: [{"loudness_db": -0.2 * i, "kernel_audio_distance_musicnn": 10.0 + 0.5 * i} for i in range(BLOCKS)]
        },
    }  # fmt: skip


def verdicts(card: dict) -> dict[str, bool | None]:
    return {each.demand: each.met for each in criteria.check(card)}


def missed_criteria(card: dict) -> list[str]:
    return [demand for demand, met in verdicts(card).items() if met is not True]


def test_good_network_meets_every_criterion():
    found = verdicts(good_card())
    assert len(found) == 24
    assert set(found.values()) == {True}


def with_figure(section: str, measure: str, value: float, *songs: float) -> Callable[[dict], None]:
    def change(card: dict) -> None:
        card["figures"][section][NAME][measure] = figure(value, *songs)

    return change


def with_entry(value: float, *keys: str | int) -> Callable[[dict], None]:
    def change(card: dict) -> None:
        *inner, last = keys
        for key in inner:
            card = card[key]
        card[last] = value

    return change


FAULTS = [
    (with_entry(12.1, "kernel_audio_distance", NAME, "mean"), "kernel audio distance at most"),
    (with_entry(25.1, "halves", "repeats least", "kernel_audio_distance", NAME, "mean"), "repeats least at most"),
    # worse in one song of each half, so that only chance is left over all
    (with_figure("continuation", "onset_correlation", 0.22, 0.5, 0.0, 0.3, 0.3, 0.0), "onset_correlation minus the"),
    (with_figure("continuation", "chroma_cosine", 0.83, 1.0, 0.65, 0.9, 1.0, 0.6), "chroma_cosine minus the"),
    (with_figure("continuation", "mr_stft", 1.16, 0.8, 1.5, 1.0, 1.0, 1.5), "mr_stft minus the"),
    # worse in the half that repeats least, and beyond chance better over all
    (with_figure("continuation", "onset_correlation", 0.56, 0.19, 0.19, 0.8, 0.8, 0.8), "onset_correlation minus"),
    (with_figure("continuation", "chroma_cosine", 0.89, 0.79, 0.79, 0.95, 0.95, 0.95), "chroma_cosine minus the"),
    (with_figure("continuation", "mr_stft", 0.84, 1.21, 1.21, 0.6, 0.6, 0.6), "mr_stft minus the"),
    (with_figure("context", "gain_another_song", 0.0), "another song, lower end"),
    (with_figure("context", "gain_same_song", -0.1), "the same song elsewhere, lower end"),
    (with_figure("continuation", "loudness_db", 1.1), "loudness within 1 dB"),
    (with_figure("continuation", ENERGIES[3], -2.1), "energy of every band"),
    (with_figure("continuation", "join_click_percentile", 96.0), "join click"),
    (with_figure("continuation", "seam_click_percentile", 96.0), "seam click"),
    (with_figure("continuation", "copy_index", 0.71), "copy index"),
    (with_figure("continuation", "memorisation", 0.01), "memorisation"),
    (with_figure("continuation", "latent_std_ratio_median", 0.8), "ratio, median"),
    (with_figure("continuation", "latent_std_ratio_worst_decile", 1.3), "ratio, the larger"),
    (with_figure("reconstruction", "comb_hop_db", 1.1), "reconstruction: comb"),
    (with_figure("continuation", "comb_latent_db", 1.1), "continuation: comb"),
    (with_entry(3.1, "hum", "reconstruction", NAME, "db"), "reconstruction: no multiple"),
    (with_entry(3.1, "hum", "continuation", NAME, "db"), "continuation: no multiple"),
    (with_entry(-2.1, "long", NAME, BLOCKS - 1, "loudness_db"), "60 s: loudness"),
    (with_entry(15.1, "long", NAME, BLOCKS - 1, "kernel_audio_distance_musicnn"), "60 s: kernel audio distance"),
]


@pytest.mark.parametrize(("spoil", "words"), FAULTS)
def test_one_fault_misses_its_criterion_and_no_other(spoil, words):
    card = good_card()
    spoil(card)
    (missed,) = missed_criteria(card)
    assert words in missed
    assert verdicts(card)[missed] is False


def test_every_criterion_is_missed_by_one_of_these_faults():
    missed = set()
    for spoil, _ in FAULTS:
        card = good_card()
        spoil(card)
        missed.update(missed_criteria(card))
    assert missed == verdicts(good_card()).keys()


@pytest.mark.parametrize("measure", criteria.BETTER_THAN_LOOP)
def test_network_that_plays_the_loop_is_not_better_than_it(measure):
    card = good_card()
    systems = card["figures"]["continuation"]
    systems[NAME][measure] = systems["loop"][measure]
    (missed,) = missed_criteria(card)
    assert missed.startswith(f"{measure} minus the loop's: interval")


def test_middle_of_a_long_continuation_is_not_its_end():
    card = good_card()
    card["long"][NAME][2] = {"loudness_db": 20.0, "kernel_audio_distance_musicnn": 90.0}
    assert missed_criteria(card) == []


@pytest.mark.parametrize(
    ("empty", "unknown"),
    [
        (("kernel_audio_distance",), 1),
        (("halves", "repeats least", "kernel_audio_distance"), 1),
        (("figures", "reconstruction"), 1),
        (("figures", "context"), 2),
        (("figures", "continuation"), 15),
        (("hum", "continuation"), 1),
        (("long",), 2),
    ],
)
def test_what_the_scorecard_lacks_is_neither_met_nor_missed(empty, unknown):
    card = good_card()
    with_entry({}, *empty)(card)
    found = list(verdicts(card).values())
    assert found.count(None) == unknown
    assert False not in found


def test_measure_that_is_undefined_is_neither_met_nor_missed():
    card = good_card()
    card["figures"]["continuation"][NAME]["loudness_db"] = figure(math.nan)
    assert {demand: met for demand, met in verdicts(card).items() if met is not True} == {
        "loudness within 1 dB of the truth, mean over songs": None
    }


def test_every_flow_has_criteria_of_its_own_and_other_networks_have_none():
    card = good_card()
    card["checkpoints"]["large-flow (other)"] = FLOW
    assert {each.network for each in criteria.check(card)} == {NAME, "large-flow (other)"}
    assert len(criteria.check(card)) == 48
    card["checkpoints"] = {"tiny-mse": MSE, "legacy-mse": MSE}
    assert criteria.check(card) == []
