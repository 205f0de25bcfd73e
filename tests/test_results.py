"""The scorecards of finished runs in docs/runs, and the script that prints the tables of docs/results.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import results_tables

RUNS = sorted((Path(__file__).parent.parent / "docs" / "runs").glob("*.json"))
CARDS = [path for path in RUNS if "gates" in json.loads(path.read_text())]


@pytest.mark.parametrize("card", CARDS, ids=[path.stem for path in CARDS])
def test_tables_of_a_scorecard_name_all_its_systems_and_criteria(card, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["results_tables.py", str(card)])
    results_tables.main()
    printed = capsys.readouterr().out
    found = json.loads(card.read_text())
    assert all(f"| {system} |" in printed for system in found["figures"]["continuation"])
    assert all(criterion["demand"] in printed for criterion in found["gates"])
