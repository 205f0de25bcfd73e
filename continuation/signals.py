"""Handling of the signals that stop a run.

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
    """Return SIGHUP, which a closing terminal sends; empty on Windows, and where this process was started with SIGHUP
    ignored, as by nohup."""
    number = getattr(signal, "SIGHUP", None)
    return () if number is None or signal.getsignal(number) is signal.SIG_IGN else (number,)


class StopSignals:
    """Context manager in which SIGINT, SIGTERM, SIGUSR1 and SIGHUP only set a flag, so that the run stops where it
    can be continued.

    requested: whether a signal came; name: which ("SIGTERM"). A second SIGINT raises KeyboardInterrupt at once,
    unless `second_interrupt` is False. SIGUSR1 is left out on Windows; an ignored SIGHUP, as under nohup, stays
    ignored. It must be entered in the main thread.
    """

    SIGNALS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n))

    def __init__(self, *more: str, second_interrupt: bool = True):
        """more: names of further signals, as far as the system has them."""
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
    """Make SIGTERM, and SIGHUP unless it is ignored, raise KeyboardInterrupt."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, *hangup())}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore(*names: str) -> None:
    """Ignore the named signals from now on, as far as the system has them."""
    for name in names:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def ignore_termination(_worker: int) -> None:
    """Ignore SIGTERM and SIGHUP in a data worker (as `worker_init_fn`): stopping a job or closing its terminal
    signals all its processes, and a run needs its workers until it has saved."""
    ignore("SIGTERM", "SIGHUP")


def exit_on_sigterm() -> None:
    """Make SIGTERM raise SystemExit(1), so that temporary files are removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
