"""Progress of long work: a bar on a terminal, otherwise a line at least once a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from continuation import distributed
from continuation.training_state import TrainingState

BAR_SECONDS = 0.5  # between two updates of the bar
LINE_SECONDS = 50  # between two lines, plus the rest of a step


class Progress:
    """Context manager around a phase of training; only process 0 shows stage, step, mean loss since the last
    evaluation, speed and time left."""

    def __init__(self, state: TrainingState):
        self.state = state
        self.is_terminal = sys.stderr.isatty()
        is_shown = distributed.is_main() and self.is_terminal
        self.bar = tqdm(total=1.0, leave=False, bar_format="{percentage:3.0f}%|{bar}| {desc}", disable=not is_shown)
        self.first = self.shown = (state.step, time.monotonic())  # begun with, and last shown

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def clear(self) -> None:
        """Remove the bar for other output; the next `update` shows it again."""
        self.bar.clear()

    def update(self) -> None:
        """Show the progress after a step, if it is due."""
        now = time.monotonic()
        is_due = now - self.shown[1] >= (BAR_SECONDS if self.is_terminal else LINE_SECONDS)
        if not distributed.is_main() or not is_due:
            return
        line = progress_line(self.state, self.pace(self.shown), self.state.seconds_left(self.pace(self.first)))
        if self.is_terminal:
            self.bar.n = self.state.progress()
            self.bar.set_description_str(line)
        else:
            print(line, flush=True)
        self.shown = (self.state.step, now)

    def pace(self, since: tuple[int, float]) -> float:
        """Compute the steps per second since a step and its time."""
        return (self.state.step - since[0]) / (time.monotonic() - since[1])


def tracked(items: Iterable, total: int, title: str) -> Iterator:
    """Yield the `total` items, and show how many have been worked on, and the time left."""
    if sys.stderr.isatty():
        yield from tqdm(items, title, total, leave=False)
        return
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            print(f"{title}  {done / total:.0%}  {duration((now - started) * (total / done - 1))} left", flush=True)
            last = now


def progress_line(state: TrainingState, steps_per_second: float, seconds_left: float) -> str:
    """Format the progress of the stage; a step of the interval must be done."""
    loss = state.interval["loss"] / state.interval["steps"]
    return (
        f"stage {state.stage}  step {state.step}/{state.stage_steps()}  loss {loss:.4f}  "
        f"{steps_per_second:.2g} steps/s  {duration(seconds_left)} left"
    )


def duration(seconds: float) -> str:
    """Format a duration: 12 s, 34 min or 5.6 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
