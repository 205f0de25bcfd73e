"""Acceptance criteria of a network, checked on a scorecard.

The thresholds are the project's own. The first criterion is similarity to real music (kernel audio distance), the
next is that the network is better than the loop, which repeats the end of the input. "Better" means that the 95 %
interval of the difference over songs excludes 0 on the right side, a context gain that its lower end is above 0; all
other criteria compare means over songs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from continuation.metrics import paired_interval
from continuation.systems import LOOP, TRUTH

LEAST, MOST = HALVES = ("repeats least", "repeats most")
BETTER_THAN_LOOP = {"onset_correlation": 1, "chroma_cosine": 1, "mr_stft": -1}  # measure -> sign of an improvement


@dataclass(frozen=True)
class Criterion:
    """One demand on one network; met: None where the scorecard lacks the figures to decide."""

    network: str
    demand: str
    found: str
    met: bool | None


def check(card: dict) -> list[Criterion]:
    """Check all criteria of all networks of a scorecard (as evaluate.py makes it) that predict by a flow."""
    flows = [name for name, facts in card["checkpoints"].items() if facts["objective"] == "flow"]
    checks = (real_music, loop, context, levels, clicks, originality, spread, combs, long_continuation)
    return [criterion for name in flows for criteria_of in checks for criterion in criteria_of(card, name)]


# Reading a card


def mean(card: dict, section: str, system: str, measure: str) -> float:
    return figure(card, section, system, measure).get("mean", math.nan)


def figure(card: dict, section: str, system: str, measure: str) -> dict:
    return card["figures"][section].get(system, {}).get(measure, {})


def within(network: str, demand: str, values: list[float], low: float, high: float) -> Criterion:
    """Make the criterion that all `values` lie from `low` to `high`."""
    found = " / ".join(f"{value:.3g}" for value in values)
    if any(math.isnan(value) for value in [*values, low, high]):
        return Criterion(network, demand, found, None)
    return Criterion(network, demand, found, all(low <= value <= high for value in values))


def difference(
    card: dict, system: str, other: str, measure: str, songs: list[str] | None = None
) -> tuple[float, float, float]:
    """Return the paired difference of two systems' continuations over songs (None: all), and its interval."""
    own, others = (figure(card, "continuation", name, measure).get("songs", {}) for name in (system, other))
    shared = [song for song in own if song in others and (songs is None or song in songs)]
    return paired_interval([own[s] for s in shared], [others[s] for s in shared], card["settings"]["seed"])


# The criteria


def real_music(card: dict, name: str) -> Iterator[Criterion]:
    for part, where, limit in ((card, "", 12), (card["halves"][LEAST], " in the half that repeats least", 25)):
        found = part["kernel_audio_distance"].get(name, {}).get("mean", math.nan)
        yield within(name, f"kernel audio distance{where} at most {limit}", [found], -math.inf, limit)


def loop(card: dict, name: str) -> Iterator[Criterion]:
    for measure, sign in BETTER_THAN_LOOP.items():
        value, low, high = difference(card, name, LOOP.name, measure)
        found = f"{value:+.3g} [{low:.3g}, {high:.3g}]"
        met = None if math.isnan(low) else min(sign * low, sign * high) > 0
        demand = f"{measure} minus the loop's: interval {'above' if sign > 0 else 'below'} 0"
        yield Criterion(name, demand, found, met)
    for measure, sign in BETTER_THAN_LOOP.items():
        value, _, _ = difference(card, name, LOOP.name, measure, card["halves"][LEAST]["songs"])
        demand = f"{measure} minus the loop's in the half that repeats least: at {'least' if sign > 0 else 'most'} 0"
        yield within(name, demand, [value], *((0, math.inf) if sign > 0 else (-math.inf, 0)))


def context(card: dict, name: str) -> Iterator[Criterion]:
    for measure, against in (("gain_another_song", "another song"), ("gain_same_song", "the same song elsewhere")):
        low = figure(card, "context", name, measure).get("low", math.nan)
        yield within(name, f"context gain against {against}, lower end above 0", [low], math.ulp(0), math.inf)


def levels(card: dict, name: str) -> Iterator[Criterion]:
    yield within(
        name,
        "loudness within 1 dB of the truth, mean over songs",
        [mean(card, "continuation", name, "loudness_db")],
        -1,
        1,
    )
    measures = [m for m in card["figures"]["continuation"].get(name, {}) if m.startswith("energy_")]
    values = [mean(card, "continuation", name, m) for m in measures]
    worst = max((v for v in values if not math.isnan(v)), key=abs, default=math.nan)
    yield within(
        name,
        "energy of every band and horizon within 2 dB of the truth, means over songs (the worst)",
        [worst],
        -2,
        2,
    )


def clicks(card: dict, name: str) -> Iterator[Criterion]:
    for place in ("join", "seam"):
        value = mean(card, "continuation", name, f"{place}_click_percentile")
        yield within(name, f"{place} click below the song's own 95th percentile", [value], 0, 95)


def originality(card: dict, name: str) -> Iterator[Criterion]:
    own, looped, true = (mean(card, "continuation", system, "copy_index") for system in (name, LOOP.name, TRUTH.name))
    yield within(name, f"copy index not above the loop's ({looped:.3g}; the truth's: {true:.3g})", [own], -1, looped)
    demand = "memorisation no higher than the held-out truth's (above it)"
    yield within(name, demand, [mean(card, "continuation", name, "memorisation")], -math.inf, 0)


def spread(card: dict, name: str) -> Iterator[Criterion]:
    median, worst = (
        mean(card, "continuation", name, f"latent_std_ratio_{which}") for which in ("median", "worst_decile")
    )
    yield within(name, "latent std ratio, median 0.9 to 1.1", [median], 0.9, 1.1)
    demand = "latent std ratio, the larger of the upper decile and 1 / the lower one, at most 1.25"
    yield within(name, demand, [worst], 1, 1.25)


def combs(card: dict, name: str) -> Iterator[Criterion]:
    for section in ("reconstruction", "continuation"):
        values = [mean(card, section, name, f"comb_{rate}_db") for rate in ("latent", "hop")]
        demand = f"{section}: comb at the latent and the hop rate at most 1 dB above the truth"
        yield within(name, demand, values, -math.inf, 1)
        worst = card["hum"][section].get(name, {}).get("db", math.nan)
        demand = f"{section}: no multiple of these rates more than 3 dB above the truth, mean over songs (the worst)"
        yield within(name, demand, [worst], -math.inf, 3)


def long_continuation(card: dict, name: str) -> Iterator[Criterion]:
    blocks = card["long"].get(name, [])
    first, last = (blocks[0], blocks[-1]) if blocks else ({}, {})
    change = last.get("loudness_db", math.nan) - first.get("loudness_db", math.nan)
    yield within(name, "60 s: loudness of the last 10 s within 2 dB of the first 10 s", [change], -2, 2)
    distances = [block.get("kernel_audio_distance_musicnn", math.nan) for block in (first, last)]
    limit = 1.5 * max(distances[0], 1)  # it may be 0 or below
    demand = f"60 s: kernel audio distance of the last 10 s at most {limit:.3g}: 1.5 times the first 10 s' or 1.5"
    yield within(name, demand, distances[1:], -math.inf, limit)
