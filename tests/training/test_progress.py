"""Progress: a line a minute without a terminal, a bar that makes room on one, and only of process 0."""

from __future__ import annotations

import io
import math
import sys
from types import SimpleNamespace

import pytest

from continuation import distributed, progress
from continuation.training_state import TrainingState

STEPS = 8000


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def state() -> SimpleNamespace:
    state = SimpleNamespace(stage=1, step=0, interval={"loss": 0.0, "steps": 0})
    state.stage_steps, state.seconds_left = lambda: STEPS, lambda steps_per_second: 1200.0
    state.progress = lambda: state.step / STEPS
    return state


def take_steps(shown: progress.Progress, clock, count: int, seconds: float) -> None:
    """Steps of a loss of 0.5."""
    for _ in range(count):
        clock.now += seconds
        shown.state.step += 1
        shown.state.interval["loss"] += 0.5
        shown.state.interval["steps"] += 1
        shown.update()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_line_comes_at_least_once_a_minute(clock, state, capsys):
    with progress.Progress(state) as shown:
        take_steps(shown, clock, 5 * 6, seconds=10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "stage 1  step 5/8000  loss 0.5000  0.1 steps/s  20 min left"
    assert len(lines) == 6  # in 5 minutes


def test_terminal_shows_a_bar_that_makes_room_for_other_lines(clock, state, monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.Progress(state) as shown:
        take_steps(shown, clock, 80, seconds=1)
        assert "1%|" in terminal.getvalue()
        assert "step 80/8000  loss 0.5000  1 steps/s  20 min left" in terminal.getvalue()
        shown.clear()
        assert terminal.getvalue().rsplit("\r", 2)[1].strip() == ""  # the line is blank again
    assert capsys.readouterr().out == ""


def test_other_processes_show_nothing(clock, state, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with progress.Progress(state) as shown:
        take_steps(shown, clock, 30, seconds=10)
    assert capsys.readouterr() == ("", "")


def test_items_are_counted_at_least_once_a_minute(clock, capsys):
    def slow_items():
        for item in range(30):
            clock.now += 10
            yield item

    assert list(progress.tracked(slow_items(), 30, "caching")) == list(range(30))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "caching  17%  4 min left"
    assert len(lines) == 6  # in 5 minutes


def test_items_are_shown_as_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.tracked(iter("abc"), 3, "caching")) == ["a", "b", "c"]
    assert "caching" in sys.stderr.getvalue()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (99, "99 s"), (2040, "34 min"), (20160, "5.6 h")])
def test_time_left_is_in_the_unit_that_one_reads(seconds, text):
    assert progress.duration(seconds) == text


@pytest.mark.parametrize(
    ("limit", "left"), [(math.inf, 50), (630, 30), (600, 0)], ids=["steps end it", "minutes end it", "over"]
)
def test_time_left_does_not_count_the_filling_of_the_cache_as_steps(limit, left):
    """10 minutes of it, then 2 steps a second."""
    state = SimpleNamespace(stage=2, step=100, seconds={2: 600.0})
    state.stage_steps, state.stage_seconds = lambda: 200, lambda: limit
    assert TrainingState.seconds_left(state, steps_per_second=2.0) == left
