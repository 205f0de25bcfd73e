"""What the scripts have in common at the shell: types of numbers for argparse, which makes wrong usage of their
complaints, numbers from the environment, folders for output, the exit code of an interrupted run, what interrupts it,
and what is printed."""

import argparse
import math
import signal
import sys
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED = 75  # exit code: run me again

LONGEST_SECONDS = 86400  # a day: no song is longer, and no number of samples overflows
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


def up_to_a_day(seconds: float) -> float:
    if seconds > LONGEST_SECONDS:
        raise argparse.ArgumentTypeError(f"{seconds:g} s is more than a day, {LONGEST_SECONDS} s")
    return seconds


def seed_number(text: str) -> int:
    value = int(text)
    if not 0 <= value < SEEDS:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {SEEDS - 1}")
    return value


class UsageError(Exception):
    """The command does not fit its folders or its input; the message is one clear sentence."""


def environment_int(environment: Mapping[str, str], name: str, least: int = 0) -> int:
    """Read the whole number from `least` up that a variable of the environment holds; UsageError for all else."""
    text = environment[name]
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or value < least:
        raise UsageError(f"{name}={text} in the environment is not a whole number from {least} up")
    return value


def make_folder(path: Path, flag: str) -> None:
    """Make the folder that a flag names, and those above it; UsageError where a file stands in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{flag}: a file is in the place of the folder {path}, or of one above it") from None


def one_line(text: object) -> str:
    """Return foreign text (a file's name, what a file or another program says) as it may be shown: on one line, with
    what does not print as backslash escapes, as in repr. A name could else command a terminal or forge a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


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
