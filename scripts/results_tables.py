"""Print the tables of docs/results.md from the rows that were committed with the runs.

python scripts/results_tables.py                                short trials of stage 1: docs/runs/trial-*.json
python scripts/results_tables.py docs/runs/90-minutes.json      a scorecard of evaluate.py
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scorecard

RUNS = Path(__file__).resolve().parent.parent / "docs" / "runs"
RECONSTRUCTION = {
    "MR-STFT": ["mr_stft"],
    "LSD dB 0-300 / 300-1000 / 1000-2500 / 2500-6000 Hz": [
        "lsd_0_300_db", "lsd_300_1000_db", "lsd_1000_2500_db", "lsd_2500_6000_db",
    ],
    "SI-SDR < 1 kHz, dB": ["si_sdr_below_1000_db"],
    "onset F": ["onset_f"],
    "energy above 1 kHz, dB (two bands)": ["energy_1000_2500_db", "energy_2500_6000_db"],
    "comb at the latent rate / 100 / 300 Hz, dB": ["comb_latent_db", "comb_hop_db", "comb_300_db"],
}  # fmt: skip
CONTINUATION = {
    "loudness, dB": ["loudness_db"],
    "chroma cosine": ["chroma_cosine"],
    "onset correlation": ["onset_correlation"],
    "tempo deviation": ["tempo_deviation"],
    "beat-phase error": ["beat_phase_error"],
    "join click, percentile": ["join_click_percentile"],
    "copy index": ["copy_index"],
    "memorisation": ["memorisation"],
    "latent std ratio, median / worst decile": ["latent_std_ratio_median", "latent_std_ratio_worst_decile"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("card", nargs="?", type=Path, help="scorecard.json of evaluate.py; without it, the trials")
    args = parser.parse_args()
    print("\n".join(trial_table() if args.card is None else card_tables(json.loads(args.card.read_text()))))


def trial_table() -> list[str]:
    trials = sorted((json.loads(path.read_text()) for path in RUNS.glob("trial-*.json")), key=lambda t: t["order"])
    rows = []
    for trial in trials:
        size = f"{trial['params'] / 1e6:.2f}M" if "params" in trial else ""
        row = [trial["name"], trial.get("minutes", ""), trial.get("steps", ""), size]
        rows.append(row + [numbers(trial, measures) for measures in RECONSTRUCTION.values()])
    return scorecard.table(["", "CPU minutes", "steps", "parameters", *RECONSTRUCTION], rows)


def card_tables(card: dict) -> list[str]:
    figures = with_nan(card["figures"])
    lines = section_table(figures["reconstruction"], RECONSTRUCTION, len(card["songs"]))
    measures, songs = ("loss", "gain_another_song", "gain_same_song"), len(card["songs"])
    rows = [
        [system, *(scorecard.cell(found.get(measure), songs) for measure in measures)]
        for system, found in figures["context"].items()
    ]
    header = ["", "validation loss", "gain against another song", "gain against the same song elsewhere"]
    lines += ["", *scorecard.table(header, rows), "", *section_table(figures["continuation"], CONTINUATION, songs)]
    for section, systems in card.get("hum", {}).items():
        lines += ["", f"Hum, {section}:", "", *scorecard.hum_table(systems)]
    if card.get("kernel_audio_distance"):
        rows = [
            [system, scorecard.interval(found)] for system, found in with_nan(card["kernel_audio_distance"]).items()
        ]
        lines += ["", *scorecard.table(["", "KAD"], rows)]
    if card.get("gates"):
        lines += ["", *scorecard.gate_table(card["gates"])]
    return lines


def section_table(systems: dict, columns: dict[str, list[str]], songs: int) -> list[str]:
    """Means over songs; n: over so many of them only."""
    rows = []
    for system, found in systems.items():
        means = {measure: figure["mean"] for measure, figure in found.items()}
        rows.append([system])
        for measures in columns.values():
            defined = min((scorecard.defined_songs(found[m]) for m in measures if m in found), default=0)
            rows[-1].append(numbers(means, measures) + (f", n {defined}" if 0 < defined < songs else ""))
    return scorecard.table(["", *columns], rows)


def numbers(means: dict, measures: list[str]) -> str:
    return " / ".join(number(means.get(measure, math.nan), measure) for measure in measures)


def number(value: float, measure: str) -> str:
    if math.isnan(value):
        return scorecard.UNDEFINED
    digits = 0 if measure.endswith("percentile") else 1 if measure.endswith("_db") else 2
    return f"{value:.{digits}f}"


def with_nan(value):
    """A scorecard as it was before json, which has no nan."""
    if isinstance(value, dict):
        return {key: with_nan(item) for key, item in value.items()}
    return math.nan if value is None else value


if __name__ == "__main__":
    main()
