"""Print the tables of docs/results.md from a scorecard of evaluate.py that was committed with its run.

python scripts/results_tables.py docs/runs/90-minutes.json
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
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("card", type=Path, help="scorecard.json of evaluate.py")
    card = with_nan(json.loads(parser.parse_args().card.read_text()))
    print("\n".join(tables(card)))


def tables(card: dict) -> list[str]:
    lines = systems_table(card)
    for half, found in card["halves"].items():
        lines += ["", f"The {len(found['songs'])} songs whose input {half}:", "", *scorecard.half_table(card, found)]
    return [*lines, "", *scorecard.long_table(card["long"]), "", *scorecard.criteria_table(card["gates"])]


def systems_table(card: dict) -> list[str]:
    """Means over songs of the continuation measures, and the kernel audio distances."""
    rows = []
    for system, figures in card["figures"]["continuation"].items():
        means = [figures.get(measure, {"mean": math.nan})["mean"] for measure in MEASURES]
        rows.append([system, *map(scorecard.number, means), *scorecard.distances(card, system)])
    return scorecard.table(["system", *(f"`{measure}`" for measure in MEASURES), *scorecard.KINDS], rows)


def with_nan(value):
    """A scorecard as it was before json, which has no nan."""
    if isinstance(value, dict):
        return {key: with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_nan(item) for item in value]
    return math.nan if value is None else value


if __name__ == "__main__":
    main()
