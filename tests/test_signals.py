"""A stop signal sets a flag for the run to stop at a good place, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from continuation.signals import StopSignals

PROJECT = Path(__file__).resolve().parent.parent
unix_only = pytest.mark.skipif(os.name == "nt", reason="needs kill")


@unix_only
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_stop_signal_only_sets_a_flag(name):
    with StopSignals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.requested
        assert stop.name == name


@unix_only
def test_second_interrupt_stops_at_once():
    with StopSignals() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_restored_after_the_block():
    numbers = StopSignals.SIGNALS
    before = [signal.getsignal(number) for number in numbers]
    with StopSignals():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_without_sigusr1_it_is_left_out_with_one_line(capsys):
    code = (
        "import signal; del signal.SIGUSR1; from continuation import signals\n"
        "with signals.StopSignals() as stop: signal.raise_signal(signal.SIGTERM); print(stop.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout == "SIGTERM\n"
    assert done.stderr.count("SIGUSR1") == 1


@unix_only
def test_second_interrupt_may_be_only_noted_too():
    with StopSignals(second_interrupt=False) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.name == "SIGINT"
