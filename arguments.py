"""What the scripts have in common at the shell: types of numbers for argparse, which makes wrong usage of their
complaints, the exit code of an interrupted run, what interrupts it, and what is printed."""

import argparse
import math
import signal
import sys
from collections.abc import Iterable
from contextlib import contextmanager

INTERRUPTED = 75  # exit code: run me again

LISTED_NAMES = 5

SEEDS = 2**32  # torch's generator on the CPU drops the higher bits


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def not_negative_float(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return value


def seed_number(text: str) -> int:
    value = int(text)
    if not 0 <= value < SEEDS:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {SEEDS - 1}")
    return value


class UsageError(Exception):
    """The command does not fit its folders or its input; the message is one clear sentence."""


def print_any_name() -> None:
    """Names of files need not be valid UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


def listed(names: Iterable[str]) -> str:
    """The first of the names, quoted and sorted, and how many more there are."""
    names = sorted(names)
    more = len(names) - LISTED_NAMES
    return ", ".join(map(repr, names[:LISTED_NAMES])) + (f" and {more} more" if more > 0 else "")


@contextmanager
def sigterm_as_ctrl_c():
    """SIGTERM raises KeyboardInterrupt too."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
