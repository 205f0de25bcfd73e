"""Signals that stop a run, and what becomes of them.

with signals.StopSignals() as stop:
    while not stop.requested: ...
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from continuation.cli import print_note


class Stopped(Exception):
    """A stop signal came, and what had been done is saved."""


def hangup() -> tuple[int, ...]:
    """Return SIGHUP, which a terminal sends when it is closed; nothing on Windows, or where whoever started this
    process lets it ignore SIGHUP, as nohup does."""
    number = getattr(signal, "SIGHUP", None)
    return () if number is None or signal.getsignal(number) is signal.SIG_IGN else (number,)


class StopSignals:
    """Context manager: SIGINT, SIGTERM, SIGUSR1 and SIGHUP only set a flag, for the run to stop at a good place.

    `requested` tells whether one came, `name` which ("SIGTERM"). A second SIGINT raises KeyboardInterrupt at once,
    unless `second_interrupt` is False. Windows has no SIGUSR1: it is left out there; a SIGHUP that is ignored, as
    under nohup, stays so. Enter it in the main thread.
    """

    SIGNALS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n))

    def __init__(self, *more: str, second_interrupt: bool = True):
        """more: names of further signals, where the system has them."""
        self.name: str | None = None
        self._more = [getattr(signal, name) for name in more if hasattr(signal, name)]
        self._second_interrupt = second_interrupt
        self._interrupts = 0
        self._before = {}

    @property
    def requested(self) -> bool:
        return self.name is not None

    def __enter__(self) -> StopSignals:
        if not hasattr(signal, "SIGUSR1"):
            print_note("note: this system has no SIGUSR1, stop a run by SIGINT or SIGTERM")
        numbers = (*self.SIGNALS, *hangup(), *self._more)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        self.name = signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._second_interrupt and self._interrupts > 1:
            raise KeyboardInterrupt


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP where it is not ignored, raise KeyboardInterrupt too."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, *hangup())}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore(*names: str) -> None:
    """Ignore the named signals from now on, where the system has them."""
    for name in names:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def ignore_termination(_worker: int) -> None:
    """Ignore SIGTERM and SIGHUP in a process that reads data (`worker_init_fn`): whoever stops a job, or closes its
    terminal, signals all its processes, and a run needs its readers until it has saved."""
    ignore("SIGTERM", "SIGHUP")


def exit_on_sigterm() -> None:
    """Let SIGTERM raise SystemExit(1), so that temporary files are removed on the way out."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
