"""Command-line helpers of the scripts: number types for argparse, numbers from the environment, output folders, exit
codes, and printing."""

import argparse
import functools
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

INTERRUPTED = 75  # exit code: run the same command again

LONGEST_SECONDS = 86400  # a day: no song is longer, and no number of samples overflows
LISTED_NAMES = 5

MOST_REPETITIONS = 10_000

SEEDS = 2**32  # torch's generator on the CPU drops the higher bits


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter that shows the default of every flag that has one; other help texts describe theirs."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def repetitions(text: str) -> int:
    """Parse a number of repetitions, from 1 to MOST_REPETITIONS: a typo must not keep the machine busy for years."""
    value = positive_int(text)
    if value > MOST_REPETITIONS:
        raise argparse.ArgumentTypeError(f"{text} is more than {MOST_REPETITIONS}")
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
    """Wrong usage, or an input or folder that is refused (exit code 2); the message is one clear sentence."""


class RunError(Exception):
    """What was asked for cannot be done, or not to its end (exit code 1); the message is one clear sentence."""


def environment_int(environment: Mapping[str, str], name: str, least: int = 0) -> int:
    """Read an environment variable as an integer of at least `least`; UsageError for anything else."""
    text = environment[name]
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or value < least:
        raise UsageError(f"{name}={text} in the environment is not a whole number from {least} up")
    return value


def available_cores() -> int:
    """Return the number of cores that this process may use: Slurm's, else those of its affinity mask."""
    if "SLURM_CPUS_PER_TASK" in os.environ:
        return environment_int(os.environ, "SLURM_CPUS_PER_TASK", least=1)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_folder(path: Path, flag: str) -> None:
    """Make the folder that a flag names, and its parents; UsageError where one of them is a file."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise _file_in_place(path, flag) from None


def existing_folder(path: Path, flag: str) -> Path:
    """Return the folder that a flag names, or its nearest existing parent; UsageError as in `make_folder`."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise _file_in_place(path, flag)
    return there


def _file_in_place(path: Path, flag: str) -> UsageError:
    return UsageError(f"{flag}: a file is in the place of the folder {path}, or of one above it")


def one_line(text: object) -> str:
    """Return foreign text (a file's name or content, another program's output) on one line, with backslash escapes
    for unprintable characters, as in repr: a file's name must not control the terminal or forge a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def print_note(line: str) -> None:
    """Print one line to stderr at once, with `one_line` applied."""
    print(one_line(line), file=sys.stderr, flush=True)


def add_debug_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error before its sentence")


def print_error(sentence: object, debug: bool) -> None:
    """Print the sentence of the handled exception to stderr; with `debug` its traceback first."""
    if debug:
        for line in traceback.format_exc().splitlines():
            print_note(line)
    print_note(f"error: {sentence}")


class SteadyStream:
    """Text stream for print and tqdm whose writes never fail: text that cannot be written is dropped, with one note.

    error: the first OSError of a write, or None.
    """

    def __init__(self, stream, name: str):
        self.stream, self.name, self.error = stream, name, None

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def finish(self) -> None:
        """Flush buffered text, or drop it if that fails: the interpreter's last flush must not fail either."""
        self.flush()
        if self.error is not None:
            with suppress(OSError), open(os.devnull, "wb") as nowhere:  # a stream without a number has no such flush
                os.dup2(nowhere.fileno(), self.stream.fileno())
            self._attempt(self.stream.flush)

    def _attempt(self, action, *given) -> None:
        try:
            action(*given)
        except OSError as error:
            if self.error is None:
                self.error = error
                print(f"note: {self.name} cannot be written: {error.strerror}", file=sys.stderr)

    def __getattr__(self, name: str):  # encoding, isatty, fileno ...
        return getattr(self.stream, name)


@contextmanager
def steady_output():
    """Keep every print from raising, as a context manager or as the decorator of a script's main: for a closed
    stream, a full disk, a closed pipe, or a name that is not UTF-8. The exit code is that of the work alone."""
    open_standard_files()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        SteadyStream(stream or open(os.devnull, "w"), name)  # noqa: SIM115 (for as long as anything prints)
        for stream, name in zip(before, ("stdout", "stderr"), strict=True)
    )
    steady = sys.stdout, sys.stderr
    for stream in steady:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream in steady:
            stream.finish()
        sys.stdout, sys.stderr = before


def output_code() -> int:
    """Return the exit code, inside `steady_output`, of work whose result is printed: 1 if the output was lost, 0 if
    its reader only closed the pipe."""
    sys.stdout.flush()
    return int(sys.stdout.error is not None and not isinstance(sys.stdout.error, BrokenPipeError))


def entry_point(main: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Decorate the main of a script: its output is steady, and what it raises becomes one sentence on stderr and the
    exit code: 2 of a UsageError, 1 of a RunError or OSError, INTERRUPTED of a KeyboardInterrupt."""

    @functools.wraps(main)
    @steady_output()
    def main_with_exit_code(args: argparse.Namespace) -> int:
        try:
            return main(args)
        except KeyboardInterrupt:
            print("interrupted: run the same command again", file=sys.stderr)
            return INTERRUPTED
        except UsageError as error:
            print_error(error, args.debug)
            return 2
        except (RunError, OSError) as error:
            print_error(error, args.debug)
            return 1

    return main_with_exit_code


def open_standard_files() -> None:
    """Open stdin, stdout and stderr on /dev/null where the shell closed them (`>&-`): otherwise the next file that is
    opened takes their number, and receives what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number, which is this


def listed(names: Iterable[str]) -> str:
    """Format the first of the names, quoted and sorted, and the number of the others."""
    names = sorted(names)
    more = len(names) - LISTED_NAMES
    return ", ".join(map(repr, names[:LISTED_NAMES])) + (f" and {more} more" if more > 0 else "")
