"""Print the tables of one committed scorecard of evaluate.py: systems, halves, 60 seconds, criteria.

python scripts/results_tables.py docs/runs/seed0-scorecard.json
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from continuation import scorecard

MEASURES = ("onset_correlation", "chroma_cosine", "mr_stft", "loudness_db", "copy_index", "seam_click_percentile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("card", type=Path, help="scorecard.json of evaluate.py")
    card = with_nan(json.loads(parser.parse_args().card.read_text()))
    print("\n".join(tables(card)))


def tables(card: dict) -> list[str]:
    """Make the lines of all tables: systems, halves, long continuations, criteria."""
    lines = systems_table(card)
    for half, found in card["halves"].items():
        lines += ["", f"The {len(found['songs'])} songs whose input {half}:", "", *scorecard.half_table(card, found)]
    return [*lines, "", *scorecard.long_table(card["long"]), "", *scorecard.criteria_table(card["gates"])]


def systems_table(card: dict) -> list[str]:
    """Make the table of all systems: means over songs of the continuation measures, and kernel audio distances."""
    rows = []
    for system, figures in card["figures"]["continuation"].items():
        means = [figures.get(measure, {"mean": math.nan})["mean"] for measure in MEASURES]
        rows.append([system, *map(scorecard.number, means), *scorecard.distances(card, system)])
    return scorecard.table(["system", *(f"`{measure}`" for measure in MEASURES), *scorecard.KAD_HEADINGS], rows)


def with_nan(value):
    """Replace null by nan at any depth, since JSON has no nan."""
    if isinstance(value, dict):
        return {key: with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_nan(item) for item in value]
    return math.nan if value is None else value


if __name__ == "__main__":
    main()
