"""The scorecard says what the measures say: right systems, right values, by song, in all its files."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from evaluation_helpers import RATE

from continuation import baselines, kad, metrics, scorecard
from continuation.criteria import HALVES
from continuation.evaluator import LONG_BLOCKS
from continuation.systems import BASELINES, OTHER_PASSAGE, OTHER_SONG, REAL_AUDIO


def test_checkpoints_are_named_by_preset_and_objective_and_by_folder_where_two_coincide(card):
    assert list(card["checkpoints"]) == ["tiny-flow (flow)", "tiny-mse", "legacy-mse", "tiny-flow (young)"]


def through(network: str) -> list[str]:
    return [f"{system.name} through {network}" for system in REAL_AUDIO]


def test_every_system_has_its_row(card):
    flow = "tiny-flow (flow)"
    assert list(card["figures"]["continuation"]) == [
        *(system.name for system in BASELINES),
        *(flow + part for part in ("", ", not equalised", ", own sound", ", guidance 1", ", one step", ", ceiling")),
        *through(flow),
        "tiny-mse", "tiny-mse, not equalised", "tiny-mse, own sound", "tiny-mse, ceiling", *through("tiny-mse"),
        "legacy-mse", "legacy-mse, ceiling", *through("legacy-mse"),
        "truth",
    ]  # fmt: skip
    references = ["noise reference", "smooth reference"]
    assert list(card["figures"]["reconstruction"]) == [*references, *card["checkpoints"]]
    assert list(card["figures"]["context"]) == [flow, "tiny-mse", "legacy-mse"]


def test_what_a_pair_lacks_is_undefined_and_not_guessed(card):
    elsewhere = card["figures"]["continuation"]["same song elsewhere"]["loudness_db"]["songs"]
    assert list(elsewhere) == ["test-0"]
    gain = card["figures"]["context"]["tiny-mse"]["gain_same_song"]
    assert gain["songs"]["test-1"] is None
    assert isinstance(gain["mean"], float)


def test_truth_is_neutral_and_silence_has_no_notes(card):
    systems = card["figures"]["continuation"]
    assert systems["truth"]["loudness_db"]["mean"] == systems["truth"]["comb_300_db"]["mean"] == 0
    assert systems["truth"]["chroma_cosine"]["mean"] == pytest.approx(1)
    assert systems["silence"]["loudness_db"]["mean"] == -100
    assert systems["silence"]["chroma_cosine"] == {
        "mean": None, "low": None, "high": None, "songs": {"test-0": None, "test-1": None},
    }  # fmt: skip


def test_network_that_says_the_mean_has_still_latents_less_than_the_flow(card):
    systems = card["figures"]["continuation"]
    ratios = {name: systems[name]["latent_std_ratio_median"]["mean"] for name in ("tiny-mse", "tiny-flow (flow)")}
    assert 0 < ratios["tiny-mse"] < ratios["tiny-flow (flow)"]
    assert "latent_std_ratio_median" not in systems["tiny-mse, ceiling"]


def test_latents_of_real_audio_say_how_much_their_spread_varies_by_itself(card):
    systems = card["figures"]["continuation"]
    worst = {
        name: systems[f"{name} through tiny-mse"]["latent_std_ratio_worst_decile"]
        for name in (OTHER_SONG.name, OTHER_PASSAGE.name)
    }
    assert all(figure["mean"] > 1 for figure in worst.values())
    assert list(worst["same song elsewhere"]["songs"]) == ["test-0"]


def test_figures_are_means_over_songs_of_means_over_their_pairs(card, pairs):
    by_song = {}
    for position, song in enumerate(pairs.songs):
        chosen = list(pairs.of_song(position))
        by_song[song["id"]] = np.mean([metrics.chroma_cosine(p.target, p.context, RATE) for p in chosen])
    figure = card["figures"]["continuation"]["input repeated"]["chroma_cosine"]
    assert figure["songs"] == pytest.approx(by_song)
    assert [figure[key] for key in ("mean", "low", "high")] == pytest.approx(
        metrics.bootstrap_interval(by_song.values(), 0)
    )


def test_context_gain_is_how_much_worse_another_context_makes_it_by_song(card, network, pairs):
    judged, gains, songs = network("flow"), [], []
    with torch.inference_mode():
        for position in range(len(pairs.songs)):
            for pair in pairs.of_song(position):
                encoded, foreign = judged.encode_pair(pair), judged.encode_context(pair.other_song)
                replaced = {"context": foreign.latents, "outlook": foreign.outlook}
                own, other = (judged.loss(pair, given) for given in (encoded, encoded | replaced))
                gains.append(other - own)
                songs.append(pair.song)
    figure = card["figures"]["context"]["tiny-flow (flow)"]["gain_another_song"]
    expected = metrics.bootstrap_interval(metrics.per_song(gains, songs).values(), 0)
    assert [figure[key] for key in ("mean", "low", "high")] == pytest.approx(expected, abs=1e-6)


def test_kernel_distance_is_judged_where_its_weights_are_and_else_named_as_missing(card):
    if kad.find_weights() is None:
        assert card["kernel_audio_distance"] == {}
        assert any("musicnn" in note for note in card["notes"])
    else:
        assert card["kernel_audio_distance"]["tiny-mse"]["mean"] > card["kernel_audio_distance"]["truth"]["mean"]
        assert "silence" not in card["kernel_audio_distance"]


def test_kernel_distance_by_mel_statistics_is_always_judged(card):
    distances = card["kernel_audio_distance_mel"]
    assert set(distances) == set(card["figures"]["continuation"]) - {"silence"}
    assert distances["truth"]["mean"] < distances["tiny-mse"]["mean"]
    assert distances["truth"]["without_song"].keys() == card["songs"].keys()


def test_kernel_distance_minus_the_loops_is_paired_over_songs():
    loop = {"mean": 1.0, "low": -9.0, "high": 9.0, "without_song": {"a": -3.0, "b": 5.0}}
    own = {"mean": 3.0, "low": -9.0, "high": 9.0, "without_song": {"b": 7.5, "a": -1.5}}
    kind = {"loop": loop, "network": own}
    error = 0.5  # of the differences 1.5 and 2.5 without each song
    expected = {"mean": 2.0, "low": 2 - 1.96 * error, "high": 2 + 1.96 * error}
    assert scorecard.minus_loop(kind, "network") == pytest.approx(expected)
    assert set(scorecard.minus_loop(kind, "loop").values()) == {0.0}
    found = dict.fromkeys(scorecard.KINDS.values(), kind) | {"kernel_audio_distance": {"network": own}}
    assert scorecard.distances(found, "network")[2:] == ["-", "2 [1.02, 2.98]"]  # the first without a loop


def test_every_song_is_in_one_half_with_its_own_kernel_distances(card, pairs):
    halves = card["halves"]
    assert sorted(song for half in halves.values() for song in half["songs"]) == sorted(card["songs"])
    exact = {
        song["id"]: np.mean([baselines.loop(pair.context, RATE).correlation for pair in pairs.of_song(position)])
        for position, song in enumerate(pairs.songs)
    }
    (least,), (most,) = (halves[half]["songs"] for half in HALVES)
    assert exact[least] < exact[most]
    for half in halves.values():
        (song,) = half["songs"]
        systems = card["figures"]["continuation"].items()
        sounding = {name for name, figures in systems if song in figures["loudness_db"]["songs"]} - {"silence"}
        assert half["kernel_audio_distance_mel"].keys() == sounding
        if kad.find_weights():
            assert half["kernel_audio_distance"].keys() == sounding


def test_seams_are_judged_where_copies_are_played_and_nowhere_else(card):
    systems = card["figures"]["continuation"]
    clicks = {name: figures["seam_click_percentile"]["mean"] for name, figures in systems.items()}
    with_seams = {name for name, value in clicks.items() if value is not None}
    flow = "tiny-flow (flow)"
    unequalised = {f"{flow}, not equalised", "tiny-mse, not equalised"}
    assert with_seams == {"loop", flow, f"{flow}, guidance 1", f"{flow}, one step", "tiny-mse", *unequalised}


def test_every_network_that_continues_has_its_long_blocks(card):
    assert list(card["long"]) == ["tiny-flow (flow)", "tiny-mse", "legacy-mse"]
    assert all(len(blocks) == LONG_BLOCKS for blocks in card["long"].values())


def test_criteria_are_those_of_the_flows_and_open_where_one_does_not_continue_yet(card, scores):
    assert {each["network"] for each in card["gates"]} == {"tiny-flow (flow)", "tiny-flow (young)"}
    young = [each for each in card["gates"] if each["network"] == "tiny-flow (young)"]
    assert {each["met"] for each in young if not each["demand"].startswith("reconstruction")} == {None}
    text = (scores / "scorecard.md").read_text()
    assert all(f"| {each['demand']} |" in text for each in card["gates"])


def test_markdown_has_tables_of_likeness_of_both_halves_and_of_long_continuations(scores, card):
    sections = dict(
        part.split("\n", 1) for part in (scores / "scorecard.md").read_text().split("\n## ") if "\n" in part
    )
    for name in card["kernel_audio_distance_mel"]:
        assert f"| {name} |" in sections["Likeness to real music"]
    for half in HALVES:
        assert f"The 1 songs whose input {half}:" in sections["By half"]
    for name in card["figures"]["continuation"]:
        assert sections["By half"].count(f"| {name} |") == 2
    for name in card["long"]:
        assert sections["Long continuations"].count(f"| {name} |") == LONG_BLOCKS
        assert f"| {name} | 50-60 s |" in sections["Long continuations"]


def test_undefined_figures_are_null_in_the_json_wherever_they_are():
    card = {"long": {"a": [{"loudness_db": math.nan}]}, "ranks": {"a": {"mean": math.inf}}, "pair": (1.0, math.nan)}
    assert json.loads(scorecard.as_json(card)) == {
        "long": {"a": [{"loudness_db": None}]}, "ranks": {"a": {"mean": None}}, "pair": [1.0, None]
    }  # fmt: skip


def test_every_network_has_its_hum_and_silence_has_none(card):
    assert set(card["hum"]["reconstruction"]) == set(card["figures"]["reconstruction"])
    assert set(card["hum"]["continuation"]) == set(card["figures"]["continuation"]) - {"silence"}
    assert card["hum"]["continuation"]["truth"]["db"] == 0


def test_ranks_go_from_another_song_to_the_ceiling_where_these_differ():
    songs = {"a": 1.0, "b": 1.1, "c": 0.9}

    def system(chroma, loudness):
        values = {"chroma_cosine": chroma, "loudness_db": loudness}
        return {name: {"songs": {song: value * x for song, x in songs.items()}} for name, value in values.items()}

    figures = {"another song": system(0.2, 0.0), "tiny": system(0.5, 1.0), "tiny, ceiling": system(0.8, 0.0)}
    found = scorecard.rank(figures | {"truth": system(1.0, 0.0)}, {"tiny": "tiny, ceiling"}, seed=0)
    assert found["tiny"]["chroma_cosine"]["mean"] == pytest.approx(0.5)
    assert list(found["tiny"]) == ["chroma_cosine"]  # real audio is as loud as the ceiling: nothing to rank


def test_csv_holds_the_figures_of_the_json(scores, card):
    rows = list(csv.DictReader((scores / "scorecard.csv").read_text().splitlines()))
    assert len(rows) == sum(len(figures) for section in card["figures"].values() for figures in section.values())
    for row in rows:
        figure = card["figures"][row["section"]][row["system"]][row["measure"]]
        assert row["mean"] == ("" if figure["mean"] is None else repr(figure["mean"]))
        assert int(row["songs"]) == sum(value is not None for value in figure["songs"].values())


def test_markdown_names_every_system_and_every_measure(scores, card):
    text = (scores / "scorecard.md").read_text()
    for section, systems in card["figures"].items():
        assert f"## {section.capitalize()}\n" in text
        for system, figures in systems.items():
            assert f"| {system} |" in text
            assert all(f"| `{measure}` |" in text for measure in figures)
    widths = {line.count("|") for line in text.split("\n\n")[-1].splitlines() if line}
    assert widths == {2 + len(card["figures"]["context"])}


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        ({"mean": 1.23456, "low": 1.0, "high": 2.5, "songs": {"a": 1.0, "b": 1.4}}, "1.23 [1, 2.5]"),
        ({"mean": 3200.0, "low": 3200.0, "high": 3200.0, "songs": {"a": 3200.0, "b": 3200.0}}, "3200"),
        ({"mean": 0.5, "low": math.nan, "high": math.nan, "songs": {"a": 0.5, "b": math.nan}}, "0.5 [-, -], n 1"),
        ({"mean": math.nan, "low": math.nan, "high": math.nan, "songs": {"a": math.nan, "b": math.nan}}, "-"),
        (None, "-"),
    ],
)
def test_cell_shows_interval_and_missing_songs(figure, text):
    assert scorecard.cell(figure, 2) == text


HOSTILE = "a|b\n<script>\x1b[2J[x](http://x)\\|\udcff"
FIGURE = {"mean": 0.5, "low": 0.5, "high": 0.5, "songs": {"a": 0.5}}


def test_name_stays_in_its_cell_of_a_table_as_text():
    (_, _, row) = scorecard.table(["system", "loss"], [[HOSTILE, "1"]])
    assert row == r"| a\|b\\n\<script>\\x1b[2J[x]\(http://x)\\\|\\udcff | 1 |"


@pytest.mark.parametrize("first", "=+-@")
def test_csv_holds_no_formula(first):
    name = f'{first}HYPERLINK("x")'
    _, row = csv.reader(scorecard.as_csv({"context": {name: {"loss": FIGURE}}}).splitlines())
    assert row[1] == f"'{name}"


def test_csv_holds_a_name_on_one_line():
    _, row = csv.reader(scorecard.as_csv({"context": {"\tb\n\udcff": {"loss": FIGURE}}}).splitlines())
    assert row[1] == r"\tb\n\udcff"
