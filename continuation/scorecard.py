"""The scorecard: statistics over songs, and their files: JSON, CSV, and Markdown for readers."""

import csv
import io
import json
import math
import re

from continuation.cli import one_line
from continuation.metrics import bootstrap_interval, jackknife_interval, paired_interval, per_song
from continuation.metrics.arithmetic import mean_of_defined
from continuation.systems import LOOP, OTHER_SONG, TRUTH

UNDEFINED = "-"

# Columns of the first tables: measure -> (heading, which is better). The tables below them show all measures.
HEADLINES = {
    "reconstruction": {
        "mr_stft": ("MR-STFT distance", "lower"),
        "lsd_whole_db": ("log-spectral distance (dB)", "lower"),
        "si_sdr_below_1000_db": ("SI-SDR below 1 kHz (dB)", "higher"),
        "onset_f": ("onset F", "higher"),
        "comb_latent_db": ("comb at the latent rate (dB above the truth)", "nearer to 0"),
        "floats_per_second": ("floats a second", "fewer"),
    },
    "continuation": {
        "onset_correlation": ("onset correlation", "higher"),
        "chroma_cosine": ("chroma cosine", "higher"),
        "mr_stft": ("MR-STFT distance from the truth", "lower"),
        "loudness_db": ("loudness (dB)", "nearer to 0"),
        "join_click_percentile": ("join click (percentile)", "lower"),
        "seam_click_percentile": ("clicks at the seams of copies (percentile)", "lower"),
        "copy_index_above_truth": ("copy index above the truth's", "nearer to 0"),
        "memorisation": ("memorisation above the truth's", "not above 0"),
        "latent_std_ratio_median": ("latent std ratio, median", "nearer to 1"),
        "latent_std_ratio_worst_decile": ("latent std ratio, worst decile", "nearer to 1"),
    },
    "context": {
        "loss": ("prediction loss", "lower, comparable within one objective only"),
        "gain_another_song": ("gain against another song", "above 0"),
        "gain_same_song": ("gain against the same song elsewhere", "above 0"),
    },
}
EXPLANATIONS = {
    "reconstruction": "decode(encode(x)) of the target chunk. Noise and smooth reference: noise under the true "
    "smoothed spectrum, and the true phases under it; they need no network, and spectral distances reward both.",
    "continuation": "Ten seconds after ten seconds of input, against the true ones. Another song and same song "
    "elsewhere are real audio at the input's level. Loop: the end of the input over and over at the lag at which it "
    "repeats itself best, exact to the sample; longest multiple: at that of its lag within nine tenths of the "
    "input. Oracle of copies: by band and 80 ms the best of 12 such copies, chosen by the truth. One step: "
    "the flow's conditional mean. Own sound: decoded without copies. Ceiling: that of the true latents in place of "
    "predicted ones.",
    "context": "Loss of the prediction with another context minus that with the true one, same target, noise and "
    "times; of legacy the squared error of the decoded waveform. An interval above 0 says that the context is used; "
    "against the same song elsewhere it says that this passage is continued, and not only its timbre met.",
}
HUM_EXPLANATION = (
    "Hum: of all multiples of the latent rate, the hop rate and 300 Hz the one that stands highest above the truth's "
    "in the mean over songs. Music's own lines lie elsewhere in every song; a line in all of them is the network's."
)
RANKS_EXPLANATION = (
    "(another song - system) / (another song - ceiling), over songs; only measures in which the ceiling differs from "
    "another song's real audio, its interval excluding 0."
)
KAD_EXPLANATION = (
    "Kernel audio distance (KAD, x 1000) of the continuations from the true ones, in the embedding of musicnn and by "
    "statistics of mel levels, so that no network is tuned to one of them; near 0, and sometimes below it, for sets "
    "that are alike. Real audio is the floor here, not an opponent. Intervals: jackknife over songs."
)
HALVES_EXPLANATION = "Songs by how exactly the end of their inputs repeats what came before it to the sample."
LONG_EXPLANATION = (
    "A continuation of 60 s of the first pair of up to ten songs, by blocks of 10 s, against the input; kernel audio "
    "distances from these songs' true continuations."
)
KINDS = {"KAD (musicnn)": "kernel_audio_distance", "KAD (mel)": "kernel_audio_distance_mel"}
KAD_HEADINGS = [*(f"{kind}: lower" for kind in KINDS), *(f"{kind} minus the loop's" for kind in KINDS)]
OF_HALVES = ("onset_correlation", "chroma_cosine", "mr_stft")
CRITERIA_EXPLANATION = (
    "What a flow must meet before it may be called good: continuation/criteria.py. Open: a figure is missing on this "
    "scorecard."
)
VERDICTS = {True: "met", False: "**not met**", None: "open"}
SECTIONS = tuple(HEADLINES)


# Figures


def summarise(rows: dict, seed: int) -> dict:
    """Return section -> system -> measure -> mean over songs, its 95 % interval, and the value of each song."""
    return {
        section: {system: summarise_system(entries, seed) for system, entries in systems.items()}
        for section, systems in rows.items()
    }


def summarise_system(entries: list[tuple[str, dict[str, float]]], seed: int) -> dict[str, dict]:
    """Summarise every measure of one system: pairs are averaged within songs, and songs have equal weights."""
    songs = [song for song, _ in entries]
    figures = {}
    for measure in dict.fromkeys(name for _, measures in entries for name in measures):
        means = per_song([measures.get(measure, math.nan) for _, measures in entries], songs)
        mean, low, high = bootstrap_interval(means.values(), seed)
        figures[measure] = {"mean": mean, "low": low, "high": high, "songs": means}
    return figures


def rank(figures: dict, ceilings: dict[str, str], seed: int) -> dict[str, dict[str, dict]]:
    """Return network -> measure -> position of its continuation between another song (0) and its ceiling (1), with an
    interval; only where the interval of the difference of these two, over songs, excludes 0.

    ceilings: network -> its ceiling system.
    """
    found = {}
    for network, ceiling in ceilings.items():
        found[network] = {}
        for measure in figures[ceiling]:
            floor, own, top = (by_song(figures, name, measure) for name in (OTHER_SONG.name, network, ceiling))
            way, low, high = paired_interval(floor, top, seed)
            if low > 0 or high < 0:
                mean, *ends = paired_interval(floor, own, seed)
                low, high = sorted(end / way for end in ends)
                found[network][measure] = {"mean": mean / way, "low": low, "high": high}
    return found


def by_song(figures: dict, system: str, measure: str) -> list[float]:
    """Return a system's values for the songs of the truth's row, nan where it has none."""
    songs = figures[TRUTH.name]["loudness_db"]["songs"]
    values = figures[system].get(measure, {"songs": {}})["songs"]
    return [values.get(song, math.nan) for song in songs]


# Files


def defined_songs(figure: dict) -> int:
    return sum(not math.isnan(value) for value in figure["songs"].values())


def without_nan(value):
    """Replace non-finite numbers by None at any depth, since JSON has no nan."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(card: dict) -> str:
    return json.dumps(without_nan(card), indent=1, allow_nan=False) + "\n"


def as_csv(figures: dict) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["section", "system", "measure", "mean", "low", "high", "songs"])
    for section, systems in figures.items():
        for system, measures in systems.items():
            for measure, figure in measures.items():
                values = [figure[key] if math.isfinite(figure[key]) else "" for key in ("mean", "low", "high")]
                writer.writerow([section, spreadsheet_text(system), measure, *values, defined_songs(figure)])
    return text.getvalue()


def spreadsheet_text(name: str) -> str:
    """Format foreign text as a cell of CSV that no spreadsheet reads as a formula."""
    text = one_line(name)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def as_markdown(card: dict) -> str:
    """Format the scorecard for readers: a few columns per section first, then every measure."""
    settings = card["settings"]
    lines = [
        "# Scorecard",
        "",
        f"Split `{settings['split']}`, {len(card['songs'])} songs, {card['pairs']} pairs; seed {settings['seed']}, "
        f"{settings['steps']} steps, guidance {settings['guidance']:g}.",
        "Every figure is a mean over songs, with its 95 % bootstrap interval over songs in brackets; n: over so many "
        "songs only; a dash: undefined. Definitions: continuation/metrics.",
        *(f"\n**Note:** {markdown(note)}." for note in card["notes"]),
        "",
        *checkpoint_table(card["checkpoints"]),
    ]
    total = len(card["songs"])
    for section, systems in card["figures"].items():
        if systems:
            lines += ["", f"## {section.capitalize()}", "", EXPLANATIONS[section], ""]
            lines += headline_table(HEADLINES[section], systems, total)
        if card["hum"].get(section):
            lines += ["", HUM_EXPLANATION, "", *hum_table(card["hum"][section])]
    if card["figures"]["continuation"]:
        lines += ["", "## Likeness to real music", "", KAD_EXPLANATION, "", *distance_table(card)]
        lines += ["", "## By half", "", HALVES_EXPLANATION]
        for half, found in card["halves"].items():
            lines += ["", f"The {len(found['songs'])} songs whose input {half}:", "", *half_table(card, found)]
    if card["long"]:
        lines += ["", "## Long continuations", "", LONG_EXPLANATION, "", *long_table(card["long"])]
    lines += ["", "## From another song (0) to the ceiling (1)", "", RANKS_EXPLANATION, ""]
    lines += rank_table(card["ranks"])
    if card["gates"]:
        lines += ["", "## Criteria", "", CRITERIA_EXPLANATION, "", *criteria_table(card["gates"])]
    for section, systems in card["figures"].items():
        if systems:
            lines += ["", f"## {section.capitalize()}: every measure", "", *full_table(systems, total)]
    return "\n".join(lines) + "\n"


def distance_table(card: dict) -> list[str]:
    systems = dict.fromkeys(name for kind in KINDS.values() for name in card[kind])
    return table(["system", *KAD_HEADINGS], [[name, *distances(card, name)] for name in systems])


def distances(found: dict, system: str) -> list[str]:
    """Format the kernel audio distances of a system, and their differences from the loop's, of the whole card or of
    one half: the cells below KAD_HEADINGS."""
    kinds = [found[kind] for kind in KINDS.values()]
    own = [interval(kind[system]) if system in kind else UNDEFINED for kind in kinds]
    return own + [
        interval(minus_loop(kind, system)) if system in kind and LOOP.name in kind else UNDEFINED for kind in kinds
    ]


def minus_loop(kind: dict[str, dict], system: str) -> dict[str, float]:
    """Compute the difference of a system's kernel audio distance from the loop's, with its interval over songs. The
    distances without each song are paired: what both share, such as the truth's own variety, cancels."""
    own, loop = kind[system], kind[LOOP.name]
    without = [value - loop["without_song"][song] for song, value in own["without_song"].items()]
    mean, low, high = jackknife_interval(own["mean"] - loop["mean"], without)
    return {"mean": mean, "low": low, "high": high}


def half_table(card: dict, half: dict) -> list[str]:
    rows = []
    for name, figures in card["figures"]["continuation"].items():
        songs_of = [figures.get(measure, {"songs": {}})["songs"] for measure in OF_HALVES]
        means = [mean_of_defined([songs.get(song, math.nan) for song in half["songs"]]) for songs in songs_of]
        rows.append([name, *map(number, means), *distances(half, name)])
    headings = [": ".join(HEADLINES["continuation"][measure]) for measure in OF_HALVES]
    return table(["system", *headings, *KAD_HEADINGS], rows)


def long_table(long: dict[str, list[dict]]) -> list[str]:
    rows = [
        [name, f"{10 * i}-{10 * i + 10} s", *(number(value) for value in block.values())]
        for name, blocks in long.items()
        for i, block in enumerate(blocks)
    ]
    measures = next(iter(long.values()))[0]
    return table(["network", "block", *(f"`{measure}`" for measure in measures)], rows)


def checkpoint_table(checkpoints: dict[str, dict]) -> list[str]:
    rows = [
        [name, facts["folder"], facts["stage"], facts["step"], f"{facts['parameters']:,}".replace(",", " ")]
        for name, facts in checkpoints.items()
    ]
    return table(["checkpoint", "folder", "stage", "step", "parameters"], rows)


def headline_table(headlines: dict[str, tuple[str, str]], systems: dict, total: int) -> list[str]:
    header = ["system", *(f"{heading}: {better}" for heading, better in headlines.values())]
    rows = [[name, *(cell(figures.get(m), total) for m in headlines)] for name, figures in systems.items()]
    return table(header, rows)


def full_table(systems: dict, total: int) -> list[str]:
    measures = dict.fromkeys(measure for figures in systems.values() for measure in figures)
    rows = [[f"`{m}`", *(cell(figures.get(m), total) for figures in systems.values())] for m in measures]
    return table(["measure", *systems], rows)


def hum_table(systems: dict[str, dict]) -> list[str]:
    rows = [[name, number(worst["db"]), f"{worst['hz']:g}"] for name, worst in systems.items()]
    return table(["system", "worst line, dB above the truth: near 0", "at Hz"], rows)


def criteria_table(criteria: list[dict]) -> list[str]:
    """Make the table of criteria, with a column per network."""
    networks = list(dict.fromkeys(each["network"] for each in criteria))
    verdicts = {(each["demand"], each["network"]): f"{each['found']}: {VERDICTS[each['met']]}" for each in criteria}
    demands = dict.fromkeys(demand for demand, _ in verdicts)
    rows = [[demand, *(verdicts.get((demand, name), UNDEFINED) for name in networks)] for demand in demands]
    return table(["criterion", *networks], rows)


def rank_table(ranks: dict[str, dict]) -> list[str]:
    measures = dict.fromkeys(measure for by_measure in ranks.values() for measure in by_measure)
    rows = [
        [f"`{m}`", *(cell({"songs": {}, **r[m]}, 0) if m in r else UNDEFINED for r in ranks.values())]
        for m in measures
    ]
    return table(["measure", *ranks], rows)


def table(header: list[str], rows: list[list]) -> list[str]:
    rows = [[markdown(entry) for entry in row] for row in [header, ["---"] * len(header), *rows]]
    return [f"| {' | '.join(row)} |" for row in rows]


def markdown(text: object) -> str:
    """Escape text that may contain foreign names, so that it stays in its cell and is neither HTML nor a link."""
    return re.sub(r"[\\|]|<(?=[a-zA-Z/!?])|(?<=\])[(\[]", r"\\\g<0>", one_line(text))


def cell(figure: dict | None, total: int) -> str:
    """Format mean [low, high]; the interval is left out where all songs agree."""
    if figure is None or math.isnan(figure["mean"]):
        return UNDEFINED
    defined = defined_songs(figure)
    return interval(figure) if defined == total else f"{interval(figure)}, n {defined}"


def interval(figure: dict) -> str:
    text = number(figure["mean"])
    if not figure["low"] == figure["mean"] == figure["high"]:
        text += f" [{number(figure['low'])}, {number(figure['high'])}]"
    return text


def number(value: float) -> str:
    if math.isnan(value):
        return UNDEFINED
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
