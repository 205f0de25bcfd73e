"""Measure the speed of every step, and of other programs that do the same work.

    python scripts/bench.py --quick                    under 3 minutes on two cores
    python scripts/bench.py --output docs/bench.md     everything, up to an hour and a half

Writes Markdown tables and a picture. Everything is measured through the command lines, on synthesised audio; compared
programs run in turn, and the tables show their medians. Parts that do not fit into the time are left out, with a
note. Exit codes: 0 done, 1 a command failed, 2 wrong usage, 75 interrupted.
"""

import argparse
import os
import platform
import pstats
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from continuation import audio, audio_decoders, checkpoint, files, signals
from continuation.cli import (
    RunError,
    UsageError,
    add_debug_flag,
    entry_point,
    make_folder,
    one_line,
    print_note,
)
from continuation.fingerprint import Fingerprinter

ROOT = Path(__file__).resolve().parent.parent
RATE, CHANNELS = 12000, 2  # of the tiny preset
SONG_RATE = 44100
PROCESSES = 2
SHORT_SONG_SECONDS, SHORT_SONG_RATE = 12, 8000  # a fingerprint takes 9 s
LIBROSA = "import sys, librosa\nfor path in sys.argv[2:]: librosa.load(path, sr=int(sys.argv[1]), mono=False)"
START_ALONE = "its start and imports alone (--help)"
NEVER = 10**9  # steps between evaluations


@dataclass(frozen=True)
class Sizes:
    """Amount of work of a benchmark."""

    seconds: float  # limit of the whole
    songs: int
    song_seconds: int
    rounds: int
    song_counts: tuple[int, ...]
    training_steps: int
    profiled_steps: int  # of each stage; many, since data workers take a second to start
    sampling_steps: tuple[int, ...]
    samples: int  # generated at each number of steps; the first is a warm-up
    variants: bool  # bf16, and two processes


QUICK = Sizes(165, 6, 40, 2, (10, 100), 6, 6, (1, 4, 16), 3, variants=False)
FULL = Sizes(5400, 20, 180, 3, (10, 100, 1000, 10_000), 40, 200, (1, 2, 4, 8, 16), 6, variants=True)


@dataclass
class Table:
    """A table of the result; bars: drawn, by name."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple] = field(default_factory=list)
    bars: dict[str, float] = field(default_factory=dict)

    def markdown(self) -> str:
        rows = [self.header, ("---",) * len(self.header), *self.rows]
        return "\n".join([f"### {self.title}", "", *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


# Running


class Bench:
    """Runner of commands under one time limit, in one working folder."""

    def __init__(self, folder: Path, sizes: Sizes):
        self.folder, self.sizes = folder, sizes
        self.end = self.deadline = time.monotonic() + sizes.seconds

    def share_out(self, parts: int) -> None:
        """Limit the next part to at most twice its equal share of the remaining time, with `parts` parts left."""
        now = time.monotonic()
        self.deadline = now + (self.end - now) * min(1.0, 2 / parts)

    def run(self, *command: object) -> tuple[float, str]:
        """Run a command in the project's folder; return its seconds and its output.

        Raises RunError where it fails, and subprocess.TimeoutExpired, after killing it, where it takes too long.
        """
        began = time.perf_counter()
        with subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="backslashreplace", start_new_session=True,
        ) as process:  # fmt: skip
            try:
                printed, errors = process.communicate(timeout=max(0.0, self.deadline - time.monotonic()))
            except BaseException:
                kill(process)
                raise
        taken = time.perf_counter() - began
        if process.returncode:
            reason = (errors.strip().splitlines() or ["it says nothing"])[-1]
            name = next((part for part in map(str, command) if part.endswith(".py")), command[0])
            raise RunError(f"{name} ended with {process.returncode}: {reason}")
        return taken, printed

    def script(self, name: str, **flags) -> tuple[float, str]:
        """Run one of the project's scripts."""
        return self.run(sys.executable, f"{name}.py", *as_flags(flags))

    def alternate(self, rivals: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
        """Run the compared programs in turn; return their measurements by round, fewer where the time is up."""
        measured = {name: [] for name in rivals}
        for number in range(self.sizes.rounds):
            order = list(rivals) if number % 2 == 0 else list(rivals)[::-1]
            try:
                for name in order:
                    measured[name].append(rivals[name]())
            except subprocess.TimeoutExpired:
                if number == 0:
                    raise
                break
        return measured


def kill(process: subprocess.Popen) -> None:
    """Kill a command and all of its child processes."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def as_flags(flags: dict) -> list[str]:
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def rival_rows(measured: dict[str, list[float]]) -> list[tuple]:
    """Format each program's median, range, and ratio to the first."""
    first = statistics.median(next(iter(measured.values())))
    return [
        (name, f"{statistics.median(m):.2f}", f"{min(m):.2f} .. {max(m):.2f}", f"{statistics.median(m) / first:.2f}")
        for name, m in measured.items()
    ]


RIVAL_HEADER = ("", "seconds, median", "range", "times the first")


def medians(measured: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(m) for name, m in measured.items()}


# Songs


def synthesise(seed: int, seconds: float, sample_rate: int) -> np.ndarray:
    """Synthesise a different song for every seed, float32 (2, samples): new random chords every half second, and
    noise."""
    rng = np.random.default_rng(seed)
    step = sample_rate // 2
    time_in_step = np.arange(step) / sample_rate
    steps = []
    for _ in range(-(-round(seconds * sample_rate) // step)):
        notes = 110 * 2 ** (rng.integers(0, 48, 5) / 12)
        sound = np.sin(2 * np.pi * notes[:, None] * time_in_step).sum(axis=0) * np.exp(-2 * time_in_step)
        steps.append(rng.uniform(0.04, 0.1, (2, 1)) * sound + 0.01 * rng.standard_normal((2, step)))
    return np.concatenate(steps, axis=1)[:, : round(seconds * sample_rate)].astype(np.float32)


def write_songs(folder: Path, count: int, seconds: float, rate: int, suffix: str) -> list[Path]:
    """Synthesise the songs that do not exist yet; return all files."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:04}{suffix}" for number in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            soundfile.write(path, synthesise(number, seconds, rate).T, rate)
    return paths


def songs(bench: Bench) -> list[Path]:
    return write_songs(bench.folder / "songs", bench.sizes.songs, bench.sizes.song_seconds, SONG_RATE, ".mp3")


# Measurements


def preprocess(bench: Bench, source: Path, target: Path, **flags) -> float:
    flags = {"sample_rate": RATE, "workers": PROCESSES} | flags
    with fresh(target) as folder:
        return bench.script("preprocess", input_folder=source, output_folder=folder, **flags)[0]


def create_dataset(bench: Bench, source: Path, target: Path) -> float:
    with fresh(target) as folder:
        return bench.script("create_dataset", output_folder=source, dataset_folder=folder)[0]


@contextmanager
def fresh(target: Path) -> Iterator[Path]:
    """Yield the path of a folder to be made, which is renamed to `target` when the block ends without an error."""
    folder = target.with_name(f"{target.name}-unfinished")
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)


def measure_preprocess(bench: Bench) -> Table:
    """Measure preprocess.py against ffmpeg and librosa."""
    paths, raw = songs(bench), bench.folder / "raw"
    raw.mkdir()

    def with_ffmpeg() -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(PROCESSES) as pool:
            list(pool.map(decode, paths))
        return time.perf_counter() - began

    def decode(path: Path) -> None:
        arguments = ("-map", "0:a:0", "-ar", RATE, "-ac", CHANNELS, "-f", "f32le", raw / path.stem)
        bench.run(audio_decoders.find_ffmpeg(), "-nostdin", "-v", "error", "-y", "-i", path, *arguments)

    rivals = {f"preprocess.py, {PROCESSES} processes": lambda: preprocess(bench, paths[0].parent, chunks_of(bench))}
    rivals[START_ALONE] = lambda: bench.run(sys.executable, "preprocess.py", "--help")[0]
    if audio_decoders.find_ffmpeg():
        rivals[f"ffmpeg to raw floats, {PROCESSES} processes"] = with_ffmpeg
    rivals["librosa.load, file by file"] = lambda: bench.run(sys.executable, "-c", LIBROSA, RATE, *paths)[0]
    measured = bench.alternate(rivals)
    minutes = len(paths) * bench.sizes.song_seconds / 60
    table = Table(f"preprocess.py, {minutes:g} minutes of mp3 to {RATE} Hz", RIVAL_HEADER, bars=medians(measured))
    fingerprint = fingerprint_seconds(paths[0]) * len(paths)
    table.rows = [*rival_rows(measured), ("of it the fingerprint, in one process", f"{fingerprint:.2f}", "", "")]
    return table


def fingerprint_seconds(path: Path) -> float:
    """Measure the seconds of one song's fingerprint, without decoding; the first of two is a warm-up."""
    blocks = list(audio.Decoder(path, RATE, CHANNELS))
    for _ in range(2):
        began = time.perf_counter()
        fingerprinter = Fingerprinter(RATE)
        for block in blocks:
            fingerprinter.add(block)
        fingerprinter.result()
    return time.perf_counter() - began


def chunks_of(bench: Bench) -> Path:
    return bench.folder / "chunks"


def dataset_of(bench: Bench) -> Path:
    return bench.folder / "dataset"


def measure_create_dataset(bench: Bench) -> Table:
    """Measure create_dataset.py against cp."""
    copy = bench.folder / "copy"

    def with_cp() -> float:
        shutil.rmtree(copy, ignore_errors=True)
        return bench.run("cp", "-r", chunks_of(bench), copy)[0]

    rivals = {
        "create_dataset.py": lambda: create_dataset(bench, chunks_of(bench), dataset_of(bench)),
        START_ALONE: lambda: bench.run(sys.executable, "create_dataset.py", "--help")[0],
        "cp -r": with_cp,
    }
    measured = bench.alternate(rivals)
    size = sum(path.stat().st_size for path in chunks_of(bench).glob("*.npy"))
    title = f"create_dataset.py, {size / 1e6:.0f} MB of chunks"
    return Table(title, RIVAL_HEADER, rival_rows(measured), medians(measured))


def measure_cost_per_song(bench: Bench) -> Table:
    """Measure preprocess.py and create_dataset.py on growing numbers of short songs: the cost per song should be
    constant."""
    source, chunks = bench.folder / "short", bench.folder / "short-chunks"
    small = {"sample_rate": SHORT_SONG_RATE, "channels": 1, "chunk_seconds": 1}
    table = Table(
        f"cost per song, different songs of {SHORT_SONG_SECONDS} s",
        ("songs", "preprocess.py, s", "a song more, ms", "create_dataset.py, s", "a song more, ms"),
    )
    counts, times, datasets = [], [], []
    for count in bench.sizes.song_counts:
        write_songs(source, count, SHORT_SONG_SECONDS, SHORT_SONG_RATE, ".wav")
        counts.append(count)
        times.append(preprocess(bench, source, chunks, **small))
        datasets.append(create_dataset(bench, chunks, bench.folder / "short-dataset"))
        more = a_song_more(counts, times), a_song_more(counts, datasets)
        table.rows.append((count, f"{times[-1]:.2f}", more[0], f"{datasets[-1]:.2f}", more[1]))
    return table


def a_song_more(counts: list[int], seconds: list[float]) -> str:
    """Format the milliseconds per additional song between the last two counts; '' for the first."""
    return f"{1000 * (seconds[-1] - seconds[-2]) / (counts[-1] - counts[-2]):.1f}" if len(counts) > 1 else ""


def train(bench: Bench, name: str, *launcher: object, **flags) -> Path:
    """Train a tiny network without evaluations in between; return its checkpoint folder."""
    folder = bench.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    flags = {"preset": "tiny", "eval_steps": NEVER, "device": "cpu"} | flags
    flags |= {"dataset_folder": dataset_of(bench), "checkpoint_folder": folder}
    bench.run(*(launcher or (sys.executable,)), "train.py", *as_flags(flags))
    return folder


def step_seconds(folder: Path, stage: int) -> float:
    """Read the seconds per step of a stage from metrics.jsonl."""
    records = [r for r in checkpoint.read_records(folder / "metrics.jsonl") if r["stage"] == stage]
    return (records[-1]["seconds"] - records[0]["seconds"]) / (records[-1]["step"] - records[0]["step"])


def waiting_share(profile: Path) -> float:
    """Read from a profile of train.py the share of train_step that waits for the next batch."""
    stats = pstats.Stats(str(profile)).stats  # by function: calls, calls, own time, whole time, callers
    step = next(key for key in stats if key[2] == "train_step")
    callers = next(value[4] for key, value in stats.items() if key[2] == "<built-in method builtins.next>")
    return callers[step][3] / stats[step][3]


def networks_of(bench: Bench) -> Path:
    return bench.folder / "stage2"


def measure_training(bench: Bench) -> Table:
    """Measure a step of each stage under the profiler, its overhead included. The waiting share of stage 1 includes
    one step of stage 2, without which no training ends."""
    steps = bench.sizes.profiled_steps
    table = Table(
        f"train.py, tiny, {steps} steps of each stage, profiled", ("", "seconds a step", "of it waiting for data")
    )
    for stage, flags in (
        (1, {"stage1_steps": steps, "stage2_steps": 1}),
        (2, {"stage1_from": bench.folder / "stage1", "stage2_steps": steps}),
    ):
        profile = bench.folder / f"stage{stage}.profile"
        folder = train(bench, f"stage{stage}", sys.executable, "-m", "cProfile", "-o", profile, **flags)
        seconds = step_seconds(folder, stage)
        table.rows.append((f"stage {stage}", f"{seconds:.3f}", f"{100 * waiting_share(profile):.2f} %"))
        table.bars[f"stage {stage}"] = seconds
    return table


def measure_variants(bench: Bench) -> Table:
    """Measure the steps per second of stage 1 in bf16 and on two processes."""
    steps = bench.sizes.training_steps
    launcher = (Path(sys.executable).with_name("torchrun"), "--standalone", f"--nproc-per-node={PROCESSES}")

    def speed(name: str, *launcher, **flags) -> Callable[[], float]:
        flags |= {"stage1_steps": steps, "stage2_steps": 1, "latent_variants": 1}  # stage 2 as short as it can be
        return lambda: 1 / step_seconds(train(bench, name, *launcher, **flags), 1)

    rivals = {"fp32, 1 process": speed("plain", precision="fp32")}
    if has_bf16():
        rivals["bf16, 1 process"] = speed("bf16", precision="bf16")
    rivals[f"fp32, {PROCESSES} processes, as many items each"] = speed("processes", *launcher, precision="fp32")
    measured = bench.alternate(rivals)
    header = ("", "steps a second, median", *RIVAL_HEADER[2:])
    return Table("train.py, tiny, stage 1", header, rival_rows(measured), medians(measured))


def has_bf16() -> bool:
    """Return whether Linux reports bf16 units of this CPU."""
    path = Path("/proc/cpuinfo")
    words = set(path.read_text(errors="replace").split()) if path.is_file() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def measure_generate(bench: Bench) -> Table:
    """Measure the generation of 10 seconds by increasing numbers of sampling steps; the first is a warm-up."""
    table = Table("generate.py, tiny, 10 s of sound, warm", ("", "seconds, median", "x real time"))
    runs = [(f"--steps {steps}", {"steps": steps}) for steps in bench.sizes.sampling_steps]
    if bench.sizes.variants and has_bf16():
        runs.append(("--steps 8, bf16", {"steps": 8, "precision": "bf16"}))
    for name, flags in runs:
        flags |= {"checkpoint_folder": networks_of(bench), "input": songs(bench)[0], "device": "cpu"}
        flags |= {"output": bench.folder / "next.wav", "num_samples": bench.sizes.samples}
        seconds = statistics.median(generation_seconds(bench.script("generate", **flags)[1])[1:])
        table.rows.append((name, f"{seconds:.2f}", f"{10 / seconds:.1f}"))
        table.bars[name] = seconds
    return table


def generation_seconds(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"generated in ([\d.]+) s", printed)]


# Result


def measure(bench: Bench) -> tuple[list[Table], list[str]]:
    """Return all tables, and a sentence for each missing one."""
    sections = [
        measure_preprocess, measure_create_dataset, measure_training, measure_generate, measure_cost_per_song,
        *([measure_variants] if bench.sizes.variants else []),
    ]  # fmt: skip
    tables, missing = [], []
    for position, section in enumerate(sections):
        bench.share_out(len(sections) - position)
        began = time.monotonic()
        try:
            tables.append(section(bench))
        except subprocess.TimeoutExpired:
            missing.append(f"{section.__name__}: the time was up")
        except (RunError, FileNotFoundError) as error:  # of an earlier part that is missing too
            missing.append(f"{section.__name__}: {error}")
        print_note(f"{section.__name__}: {time.monotonic() - began:.0f} s")
    return tables, missing


def machine() -> str:
    """Describe this machine in one line."""
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    versions = checkpoint.versions()
    what = f"Python {versions['python']}, torch {versions['torch']}, commit {versions['commit'][:12]}"
    return f"{processor()}, {os.cpu_count()} cores{load}; {what}"


def processor() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text(errors="replace")) if path.is_file() else None
    return found[1] if found else platform.machine()


def as_markdown(where: str, tables: list[Table], missing: list[str]) -> str:
    parts = [f"Measured by `scripts/bench.py` on {where}.", *(table.markdown() for table in tables)]
    if missing:
        parts.append("Left out:\n\n" + "\n".join(f"- {one_line(sentence)}" for sentence in missing))
    return "\n\n".join(parts) + "\n"


def draw(path: Path, tables: list[Table]) -> None:
    """Draw the bars of all tables that have any."""
    from matplotlib.figure import Figure

    drawn = [table for table in tables if table.bars]
    figure = Figure(figsize=(8, 0.6 + 1.7 * len(drawn)), layout="constrained")
    for axes, table in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn, strict=True):
        axes.barh(list(table.bars), list(table.bars.values()), color="#4c72b0")
        axes.invert_yaxis()
        axes.set_title(f"{table.title} ({table.header[1]})", fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


# Main


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter songs, steps and rounds")
    parser.add_argument(
        "--output", type=Path, default=Path("bench.md"),
        help="markdown file; the picture is beside it, as .png (default: bench.md)",
    )  # fmt: skip
    add_debug_flag(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    if args.output.suffix != ".md" or args.output.is_dir():
        raise UsageError(f"--output {args.output} is not the name of a .md file")
    make_folder(args.output.parent, "--output")
    where = machine()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        tables, missing = measure(Bench(Path(folder), QUICK if args.quick else FULL))
    text = as_markdown(where, tables, missing)
    files.write_atomic(args.output, text)
    print(text)
    if any(table.bars for table in tables):
        draw(args.output.with_suffix(".png"), tables)
    print(one_line(f"done: {args.output}"))
    return int(any("the time was up" not in sentence for sentence in missing))


@entry_point
def main(args: argparse.Namespace) -> int:
    with signals.sigterm_as_ctrl_c():
        return run(args)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
