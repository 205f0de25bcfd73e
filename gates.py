"""What a scorecard has to show before its network may be called good: every gate, met or not met.

The thresholds are the project's own. "Better than" another system is met when the 95 % interval of the difference
over songs lies on the right side of 0, a context gain when its lower end is above 0; all else goes by the means over
songs. Energy and flatness of a reconstruction are judged by the mean of each song's distance from the truth, in which
opposite errors of two songs do not cancel; of a continuation, which may differ from the truth, the mean over songs
itself has to be right.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

import metrics

LOW_BANDS, HIGH_BANDS = ("0_300", "300_1000"), ("1000_2500", "2500_6000")  # of reconstruction, in Hz
ONE_STEP = ", one step"
CEILING = ", ceiling"  # what evaluate.py adds to a network's name


@dataclass(frozen=True)
class Gate:
    """One demand on one network. `met` is None where the scorecard lacks what it takes to tell."""

    network: str
    demand: str
    found: str
    met: bool | None


def check(card: dict) -> list[Gate]:
    """All gates of all networks of a scorecard (as evaluate.py makes it) that predict by a flow."""
    flows = [name for name in card["checkpoints"] if name.split(" ")[0].endswith("-flow")]
    checks = (combs, reconstruction, context, spread, against_networks, against_real_audio, originality)
    return [gate for name in flows for gates_of in checks for gate in gates_of(card, name)]


# Reading a card


def mean(card: dict, section: str, system: str, measure: str) -> float:
    return figure(card, section, system, measure).get("mean", math.nan)


def mean_distance(card: dict, section: str, system: str, measure: str) -> float:
    """Mean over songs of the absolute value."""
    songs = figure(card, section, system, measure).get("songs", {}).values()
    return float(np.nanmean(np.abs([*songs]))) if any(not math.isnan(value) for value in songs) else math.nan


def figure(card: dict, section: str, system: str, measure: str) -> dict:
    return card["figures"][section].get(system, {}).get(measure, {})


def within(network: str, demand: str, values: list[float], low: float, high: float) -> Gate:
    """All `values` lie from `low` to `high`."""
    found = " / ".join(f"{value:.3g}" for value in values)
    if any(math.isnan(value) for value in [*values, low, high]):
        return Gate(network, demand, found, None)
    return Gate(network, demand, found, all(low <= value <= high for value in values))


def difference(card: dict, system: str, other: str, measure: str) -> tuple[float, float, float]:
    """Paired difference of two systems' continuations over songs, and its interval."""
    own, others = (figure(card, "continuation", name, measure).get("songs", {}) for name in (system, other))
    shared = [song for song in own if song in others]
    return metrics.paired_interval([own[s] for s in shared], [others[s] for s in shared], card["settings"]["seed"])


# The gates


def combs(card: dict, name: str) -> Iterator[Gate]:
    for section in ("reconstruction", "continuation"):
        values = [mean(card, section, name, f"comb_{rate}_db") for rate in ("latent", "hop")]
        demand = f"{section}: comb at the latent and the hop rate at most 1 dB above the truth"
        yield within(name, demand, values, -math.inf, 1)
        worst = card["hum"][section].get(name, {}).get("db", math.nan)
        demand = f"{section}: no multiple of these rates more than 3 dB above the truth, mean over songs (the worst)"
        yield within(name, demand, [worst], -math.inf, 3)


def reconstruction(card: dict, name: str) -> Iterator[Gate]:
    def own(measure: str) -> float:
        return mean(card, "reconstruction", name, measure)

    def noise(measure: str) -> float:
        return mean(card, "reconstruction", "noise reference", measure)

    share = own("mr_stft") / noise("mr_stft")
    yield within(name, "MR-STFT distance over the noise reference's: at most 0.8", [share], 0, 0.8)
    for bands, limit in ((LOW_BANDS, 0.75), (HIGH_BANDS, 1)):
        shares = [own(f"lsd_{band}_db") / noise(f"lsd_{band}_db") for band in bands]
        edges = "below 1 kHz" if bands is LOW_BANDS else "above it"
        yield within(name, f"LSD over the noise reference's {edges}: at most {limit}", shares, 0, limit)
    energies = [mean_distance(card, "reconstruction", name, f"energy_{band}_db") for band in HIGH_BANDS]
    yield within(name, "energy above 1 kHz within 1.5 dB of the truth", energies, 0, 1.5)
    flatness = [
        mean_distance(card, "reconstruction", name, f"flatness_{band}_db")
        - mean_distance(card, "reconstruction", "noise reference", f"flatness_{band}_db")
        for band in HIGH_BANDS
    ]
    demand = "spectral flatness above 1 kHz no farther from the truth than the noise reference's (dB farther)"
    yield within(name, demand, flatness, -math.inf, 0)
    envelope = [own(f"envelope_correlation_{b}") - noise(f"envelope_correlation_{b}") for b in HIGH_BANDS]
    demand = "envelope correlation above 1 kHz minus the noise reference's: at least 0"
    yield within(name, demand, envelope, 0, math.inf)
    yield within(name, "SI-SDR below 1 kHz at least 11 dB", [own("si_sdr_below_1000_db")], 11, math.inf)
    legacy = [mean(card, "reconstruction", other, "onset_f") for other in other_networks(card, "legacy")]
    lead = own("onset_f") - max(legacy, default=math.nan)
    yield within(name, "onset F minus legacy's: at least 0", [lead], 0, math.inf)


def context(card: dict, name: str) -> Iterator[Gate]:
    for network in (name, *(other_networks(card, "mse") or ["mse"])):
        whose = "" if network == name else f"of {network} "
        for measure, against in (
            ("gain_another_song", "another song"),
            ("gain_same_song", "the same song elsewhere"),
        ):
            low = figure(card, "context", network, measure).get("low", math.nan)
            demand = f"context gain {whose}against {against}, lower end above 0"
            yield within(name, demand, [low], math.ulp(0), math.inf)
            first, last = card["checkpoints"].get(network, {}).get(measure, (math.nan, math.nan))
            demand = f"context gain {whose}against {against} on val: growth in training"
            yield within(name, demand, [last - first], math.ulp(0), math.inf)


def spread(card: dict, name: str) -> Iterator[Gate]:
    def own(measure: str, system: str = name) -> float:
        return mean(card, "continuation", system, measure)

    for suffix in ("", ", guidance 1"):
        median = own("latent_std_ratio_median", name + suffix)
        worst = own("latent_std_ratio_worst_decile", name + suffix)
        yield within(name, f"latent std ratio{suffix}, median 0.9 to 1.1", [median], 0.9, 1.1)
        yield within(name, f"latent std ratio{suffix}, worst decile 0.8 to 1.25", [worst], 1, 1.25)
    measures = [m for m in card["figures"]["continuation"].get(name, {}) if m.startswith("energy_")]
    gaps = [abs(own(m) - own(m, name + CEILING)) for m in measures]
    defined = [gap for gap in gaps if not math.isnan(gap)]
    worst = max(defined, default=math.nan)
    yield within(
        name, "energy of every band and horizon, mean over songs, within 3 dB of the ceiling's (worst)", [worst], 0, 3
    )
    yield within(name, "loudness, mean over songs, within 2 dB of the truth", [own("loudness_db")], -2, 2)
    demand = "join click below the song's own 95th percentile"
    yield within(name, demand, [own("join_click_percentile")], 0, 95)


def against_networks(card: dict, name: str) -> Iterator[Gate]:
    mse, legacy = (other_networks(card, word) or [word] for word in ("mse", "legacy"))
    for other in (name + ONE_STEP, *mse, *legacy):
        lead, low, high = distance_lead(card["kernel_audio_distance"], name, other)
        met = None if math.isnan(low) else low > 0
        yield Gate(
            name,
            f"KAD lower than that of {other.removeprefix(name + ', ')}",
            f"by {lead:.3g} [{low:.3g}, {high:.3g}]",
            met,
        )


def distance_lead(distances: dict[str, dict], name: str, other: str) -> tuple[float, float, float]:
    """By how much the kernel audio distance is lower than the other's, and its interval over songs."""
    if name not in distances or other not in distances:
        return math.nan, math.nan, math.nan
    own, others = distances[name], distances[other]
    without = [others["without_song"][song] - value for song, value in own["without_song"].items()]
    return metrics.jackknife_interval(others["mean"] - own["mean"], without)


def against_real_audio(card: dict, name: str) -> Iterator[Gate]:
    for other in ("another song", "same song elsewhere"):
        coded = f"{other} through {name}"
        yield better(card, name, coded, ["chroma_cosine"])
        yield better(card, name, coded, ["onset_correlation", "tempo_deviation"])


def better(card: dict, name: str, other: str, measures: list[str]) -> Gate:
    """One of the measures is better than the other system's; a deviation is better where it is smaller."""
    found, verdicts = [], []
    for measure in measures:
        sign = -1 if measure.endswith("deviation") else 1
        value, low, high = difference(card, name, other, measure)
        low, high = sorted((sign * low, sign * high))
        found.append(f"{measure} {sign * value:+.3g} [{low:.3g}, {high:.3g}]")
        verdicts.append(None if math.isnan(low) else low > 0)
    met = True if True in verdicts else None if None in verdicts else False
    demand = f"better than {other.removesuffix(name)}its codec in {' or '.join(measures)}"
    return Gate(name, demand, "; ".join(found), met)


def originality(card: dict, name: str) -> Iterator[Gate]:
    of_truth = list(figure(card, "continuation", "truth", "copy_index").get("songs", {}).values())
    low, high = np.nanpercentile(of_truth, (5, 95)) if of_truth else (math.nan, math.nan)
    demand = f"copy index within the central 90 % of the truth's songs ({low:.3g} to {high:.3g})"
    yield within(name, demand, [mean(card, "continuation", name, "copy_index")], low, high)
    demand = "memorisation no higher than the held-out truth's (above it)"
    yield within(name, demand, [mean(card, "continuation", name, "memorisation")], -math.inf, 0)


def other_networks(card: dict, word: str) -> list[str]:
    """The networks of the card that are legacy, or that are no legacy and say the mean."""
    kinds = {name: name.split(" ")[0] for name in card["checkpoints"]}
    if word == "legacy":
        return [name for name, kind in kinds.items() if kind.startswith("legacy")]
    return [name for name, kind in kinds.items() if kind.endswith("-mse") and not kind.startswith("legacy")]
