"""The rows of finished runs in docs/runs, and the scripts that make tables and a picture of them."""

from __future__ import annotations

import json
from pathlib import Path

import plot_scaling
import pytest
import results_tables

RUNS = sorted((Path(__file__).parent.parent / "docs" / "runs").glob("*.json"))
CARDS = [path for path in RUNS if "figures" in json.loads(path.read_text())]


def test_table_of_the_trials_has_a_row_for_each(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["results_tables.py"])
    results_tables.main()
    trials = [path for path in RUNS if path.stem.startswith("trial-")]
    assert len(capsys.readouterr().out.splitlines()) == len(trials) + 2


@pytest.mark.parametrize("card", CARDS, ids=[path.stem for path in CARDS])
def test_tables_of_a_scorecard_name_all_its_systems(card, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["results_tables.py", str(card)])
    results_tables.main()
    printed = capsys.readouterr().out
    systems = json.loads(card.read_text())["figures"]["continuation"]
    assert all(f"| {system} |" in printed for system in systems)


def test_scaling_is_drawn_and_its_extrapolation_named_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plot_scaling, "PICTURE", tmp_path / "scaling.png")
    plot_scaling.main()
    assert capsys.readouterr().out.startswith("extrapolated from ")
    assert (tmp_path / "scaling.png").stat().st_size > 10000
