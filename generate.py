"""Generate the next seconds of a song.

    python generate.py --input song.mp3 --output next.mp3
    python generate.py --input songs --output continuations --checkpoint_folder checkpoints

The context is 10 seconds of the song, by default the first ones; the network generates what follows. Of several
songs, those that cannot be continued are left out and listed at the end; then the exit code is 1.
Exit codes: 0 done, 1 failed, 2 wrong usage or refused input, 75 interrupted: run the same command again.
"""

import argparse
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from continuation import audio, audio_decoders, checkpoint, plots, signals
from continuation.cli import (
    HelpFormatter,
    RunError,
    UsageError,
    add_debug_flag,
    entry_point,
    listed,
    make_folder,
    not_negative_float,
    one_line,
    print_error,
    repetitions,
    seed_number,
    up_to_a_day,
)
from continuation.layers import crossfade
from continuation.song_files import find_songs
from model import FADE_SECONDS, GUIDANCE, SAMPLING_STEPS, build_model, load_checkpoint

PRETRAINED = Path(__file__).resolve().parent / "pretrained" / "tiny.pt"
OUTPUT_SUFFIXES = (".mp3", ".wav", ".flac", ".ogg", ".m4a")
SHORTEST_SECONDS = 0.1
SONG_ERRORS = (UsageError, RunError, OSError)  # of one song; the next may succeed


# Arguments


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--checkpoint_folder", type=Path,
        help="what train.py wrote; best.pt is used (default: pretrained/tiny.pt, which comes with this program)",
    )  # fmt: skip
    files.add_argument(
        "--input", required=True, type=Path, nargs="+", metavar="SONG",
        help="song to continue; or several, or a folder with its subfolders",
    )  # fmt: skip
    files.add_argument(
        "--output", required=True, type=Path,
        help="sound file: " + " ".join(OUTPUT_SUFFIXES) + "; of several songs or a folder: a folder",
    )  # fmt: skip
    files.add_argument(
        "--format", choices=[suffix[1:] for suffix in OUTPUT_SUFFIXES], default="mp3",
        help="of the sound files where --output is a folder",
    )  # fmt: skip
    files.add_argument(
        "--with_input", action="store_true",
        help="write the input before the continuation, all at the song's own sample rate and channels",
    )  # fmt: skip
    files.add_argument(
        "--plot", metavar="PNG", type=Path,
        help="picture of input and continuation; of several songs: a folder (default: none)",
    )  # fmt: skip
    music = parser.add_argument_group("music")
    music.add_argument(
        "--start", type=start_seconds, default=0.0, help="where the input begins, s; or 'end': its last seconds"
    )
    music.add_argument("--seconds", type=length_seconds, default=10.0, help="length of the continuation, s")
    music.add_argument("--num_samples", type=repetitions, default=1, help="how many; above 1: NAME-1, NAME-2 ...")
    music.add_argument(
        "--seed", type=seed_number, default=0, help="of the first continuation, the next one's is 1 higher"
    )
    music.add_argument(
        "--variety", type=not_negative_float, default=0.0,
        help="how much other seeds change which parts of the input are played: 0 hardly, 2 much",
    )  # fmt: skip
    sampling = parser.add_argument_group("sampling, of flow networks")
    sampling.add_argument(
        "--steps", type=repetitions, default=SAMPLING_STEPS,
        help="steps from noise to music: more is finer and slower",
    )  # fmt: skip
    sampling.add_argument(
        "--guidance", type=not_negative_float, default=GUIDANCE,
        help="how strongly the song is followed; 1: as trained",
    )  # fmt: skip
    sampling.add_argument(
        "--temperature", type=not_negative_float, default=1.0, help="level of the noise that it starts from"
    )
    hardware = parser.add_argument_group("hardware")
    hardware.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    hardware.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 or else fp16 on CUDA, fp32 on the CPU",
    )  # fmt: skip
    add_debug_flag(parser)
    return parser.parse_args(argv)


def length_seconds(text: str) -> float:
    value = up_to_a_day(not_negative_float(text))
    if value < SHORTEST_SECONDS:
        raise argparse.ArgumentTypeError(f"must be at least {SHORTEST_SECONDS}")
    return value


def start_seconds(text: str) -> float | None:
    """Parse seconds, or None for the song's end."""
    return None if text == "end" else up_to_a_day(not_negative_float(text))


# Files


@dataclass(frozen=True)
class Task:
    """A song and the paths of its continuation and its picture, without numbers."""

    source: Path
    output: Path
    plot: Path | None


def is_batch(args: argparse.Namespace) -> bool:
    return len(args.input) > 1 or args.input[0].is_dir()


def make_tasks(args: argparse.Namespace) -> list[Task]:
    """List the songs to continue. Raises UsageError for anything that can be refused before work begins."""
    if not is_batch(args):
        task = Task(args.input[0], args.output, args.plot)
        check_task(task, args, file_ids(args.input))
        return [task]
    check_suffix(f"--format {args.format}", f".{args.format}")
    for flag, folder in (("--output", args.output), ("--plot", args.plot)):
        if folder and folder.exists() and not folder.is_dir():
            raise UsageError(f"{flag} {folder} is a file, and of several songs it must be a folder")
    sources = find_sources(args)
    return [
        Task(source, args.output / f"{name}.{args.format}", args.plot and args.plot / f"{name}.png")
        for source, name in zip(sources, names_of(sources, args), strict=True)
    ]


def find_sources(args: argparse.Namespace) -> list[Path]:
    """List all songs of --input, in its order, each once. Raises UsageError where a folder holds none."""
    sources = []
    for path in args.input:
        if not path.is_dir():
            sources.append(path)
            continue
        if path.resolve() == args.output.resolve():
            raise UsageError(f"--output {args.output} is the folder of the input: take another one")
        found, _ = find_songs(path, skipped_folder=args.output)
        if not found:
            raise UsageError(f"--input {path}: no audio file is in this folder")
        sources += [path / source for source in found]
    return list(dict.fromkeys(sources))


def names_of(sources: list[Path], args: argparse.Namespace) -> list[str]:
    """Return the names of the outputs without suffix: those of the songs, with subfolders of an input folder, and
    with the songs' own suffixes where two names are equal. Raises UsageError where they still are."""
    folders = {folder for folder in args.input if folder.is_dir()}

    def below(source: Path) -> Path:
        folder = next((folder for folder in source.parents if folder in folders), source.parent)
        return source.relative_to(folder)

    short = [str(below(source).with_suffix("")) for source in sources]
    count = Counter(short)
    names = [str(below(source)) if count[name] > 1 else name for source, name in zip(sources, short, strict=True)]
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise UsageError(f"--input has more than one song called {listed(twice)}: continue them one by one")
    return names


def file_ids(paths: list[Path]) -> set[tuple[int, int]]:
    """Return what identifies files independently of their names, for those that exist."""
    return {(status.st_dev, status.st_ino) for status in (path.stat() for path in paths if path.exists())}


def check_task(task: Task, args: argparse.Namespace, inputs: set[tuple[int, int]]) -> None:
    """Raise UsageError for anything that can be refused before work begins; inputs: `file_ids` that must not be
    overwritten."""
    check_suffix(f"--output {task.output}", task.output.suffix.lower())
    if task.plot and task.plot.suffix.lower() != ".png":
        raise UsageError(f"--plot {task.plot}: pictures are .png files")
    if not task.source.is_file():
        raise UsageError(f"{task.source}: there is no such file")
    for flag, path in (("--output", task.output), ("--plot", task.plot)):
        for number in range(1, args.num_samples + 1) if path else ():
            check_output(flag, numbered(path, number, args.num_samples), inputs)


def check_suffix(flag: str, suffix: str) -> None:
    if suffix not in OUTPUT_SUFFIXES:
        raise UsageError(f"{flag}: cannot write '{suffix}', only {' '.join(OUTPUT_SUFFIXES)}")
    if suffix == ".m4a" and audio_decoders.find_ffmpeg() is None:
        raise UsageError(f"{flag}: .m4a needs ffmpeg; write .mp3 or .wav instead")


def check_output(flag: str, path: Path, inputs: set[tuple[int, int]]) -> None:
    """Raise UsageError for an output that is an input or a folder."""
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder")
    if file_ids([path]) & inputs:
        raise UsageError(f"{flag} {path} would overwrite the input")


def check_rate(path: Path, rate: int) -> None:
    if path.suffix.lower() == ".mp3" and rate not in audio.MP3_SAMPLE_RATES:
        raise UsageError(f"--output {path}: mp3 cannot hold {rate} Hz; write .wav or .flac instead")


# Input


def find_weights(folder: Path | None) -> Path:
    """Return the checkpoint file: best.pt of the folder, or the weights shipped with this program."""
    if folder is None:
        if not PRETRAINED.is_file():
            raise UsageError(f"{PRETRAINED} is missing: give the --checkpoint_folder of a training")
        return PRETRAINED
    if not folder.is_dir():
        raise UsageError(f"there is no checkpoint folder {folder}")
    return folder / checkpoint.BEST_NAME


def load_network(args: argparse.Namespace):
    """Load the network onto its device; return it and its precision."""
    path = find_weights(args.checkpoint_folder)
    device = checkpoint.choose_device(args.device)
    state = load_checkpoint(path)
    if state.get("stage") != 2:
        raise UsageError(f"{path} is still in stage 1, and only stage 2 learns to continue a song: train on")
    model = build_model(state, device)
    what = f"{model.config.preset}, {model.config.objective}, step {state['step']}"
    print(one_line(f"{path}: {what}, on {device.type}"))
    return model, checkpoint.choose_precision(args.precision, device)


def read_context(
    path: Path, sample_rate: int, channels: int, samples: int, start: float | None
) -> tuple[np.ndarray, float]:
    """Read the `samples` samples from `start` seconds on (None: the song's last ones), float32 (channels, samples),
    and return their start in seconds too.

    The song is decoded from its beginning and rounded to int16, as in preprocess.py, so that at the position of a
    chunk of a dataset the samples are the same.
    """
    first = 0 if start is None else round(start * sample_rate)
    clip_seconds = None if start is None else (first + samples) / sample_rate
    decoder = audio.Decoder(path, sample_rate, channels, clip_seconds)
    last, length = np.zeros((channels, 0), np.float32), 0
    try:
        for block in decoder:
            last = np.concatenate([last, block], axis=1)[:, -samples:]
            length += block.shape[1]
    except audio.AudioError as error:
        raise UsageError(f"{path}: {error}") from error
    for note in decoder.notes:
        say(f"note: {path}: {note}")
    need, found = samples / sample_rate, length / sample_rate
    if length < samples:
        raise UsageError(f"{path} is {found:.2f} s long, and the network needs {need:g} s")
    if length < first + samples:
        latest = math.floor(100 * (found - need)) / 100
        raise UsageError(
            f"{path} is {found:.2f} s long: --start {start:g} leaves less than the {need:g} s that the network "
            f"needs, start at {latest:g} at the latest"
        )
    begin = length - samples if start is None else first
    return audio.from_int16(audio.to_int16(last)), begin / sample_rate


# Output


def say(line: str) -> None:
    """Print a line, above the progress bar where there is one."""
    tqdm.write(one_line(line))


def continue_song(model, precision, context: np.ndarray, seed: int, args: argparse.Namespace) -> np.ndarray:
    """Generate a continuation; return context and continuation, joined: float32 (channels, samples)."""
    sampling = {name: getattr(args, name) for name in ("steps", "guidance", "temperature", "variety")}
    device = next(model.parameters()).device
    with torch.autocast(device.type, precision, enabled=precision is not None):
        whole = model.generate(context, args.seconds, seed, with_input=True, **sampling).float().numpy()
    if not np.isfinite(whole).all():
        raise RunError("the network's output is not finite; try --precision fp32")
    return whole


def join(original: np.ndarray, rate: int, whole: np.ndarray, whole_rate: int) -> np.ndarray:
    """Join the context, at the song's own rate and channels, and its continuation.

    original: the context, float32 (channels, samples); whole: the network's output, context and continuation.
    The two are crossfaded over the FADE_SECONDS before the cut, where `whole` already fades to the network's output.
    """
    whole = audio.resample(whole, whole_rate, rate, channels=len(original))
    cut, fade = original.shape[1], round(FADE_SECONDS * rate)
    faded = crossfade(torch.from_numpy(original), torch.from_numpy(whole[:, cut - fade : cut])).numpy()
    return np.concatenate([faded, whole[:, cut:]], axis=1)


def write_sound(path: Path, sound: np.ndarray, sample_rate: int) -> None:
    """Write a sound (channels, samples), its peaks limited, and say so where they were."""
    limited = audio.limit_peaks(sound, sample_rate)
    if (peak := float(np.abs(sound).max())) > audio.PEAK_LIMIT:
        say(f"{path}: peaks of up to {peak:.2f} are limited")
    audio.encode_audio(path, limited, sample_rate)


def numbered(path: Path | None, number: int, count: int) -> Path | None:
    """Return NAME.mp3, or NAME-1.mp3 ... if there are several."""
    return path if path is None or count == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


# The run


def continue_task(task: Task, model, precision, args: argparse.Namespace) -> None:
    """Write all continuations of one song, and their pictures."""
    config = model.config
    context, begin = read_context(task.source, config.sample_rate, config.channels, config.chunk_samples, args.start)
    cut, rate, original = context.shape[1], config.sample_rate, None
    if args.with_input:
        rate, channels = audio.native_format(task.source)
        original = audio.load_audio(task.source, rate, channels, begin, cut / config.sample_rate)
    check_rate(task.output, rate)
    for flag, path in (("--output", task.output), ("--plot", task.plot)):
        if path:
            make_folder(path.parent, flag)
    for number in range(1, args.num_samples + 1):
        began = time.perf_counter()
        whole = continue_song(model, precision, context, args.seed + number - 1, args)
        taken = time.perf_counter() - began
        path, plot = (numbered(name, number, args.num_samples) for name in (task.output, task.plot))
        sound = whole[:, cut:] if original is None else join(original, rate, whole, config.sample_rate)
        write_sound(path, sound, rate)
        speed = (whole.shape[1] - cut) / config.sample_rate / taken
        length = f"{sound.shape[1] / rate:.2f} s"
        say(f"{path}: {length}, generated in {taken:.2f} s, {speed:.1f} x real time")
        if plot:
            plots.plot_continuation(plot, whole[:, :cut], whole[:, cut:], config.sample_rate, path.name)
            say(f"{plot}: its picture")


def continue_all(tasks: list[Task], model, precision, args: argparse.Namespace) -> int:
    """Continue one song after another, and list at the end those that failed. Return the exit code."""
    failed, inputs = [], file_ids([task.source for task in tasks])
    for task in tqdm(tasks, unit="song", disable=None):  # None: only on a terminal
        try:
            check_task(task, args, inputs)
            continue_task(task, model, precision, args)
        except SONG_ERRORS as error:
            with tqdm.external_write_mode():
                print_error(error, args.debug)
            failed.append(str(task.source))
    if failed:
        print(f"error: {len(failed)} of {len(tasks)} songs are not continued: {listed(failed)}", file=sys.stderr)
    return int(bool(failed))


def run(args: argparse.Namespace) -> int:
    tasks = make_tasks(args)
    model, precision = load_network(args)
    if is_batch(args):
        return continue_all(tasks, model, precision, args)
    continue_task(tasks[0], model, precision, args)
    return 0


@entry_point
def main(args: argparse.Namespace) -> int:
    try:
        with signals.sigterm_as_ctrl_c():
            return run(args)
    except torch.cuda.OutOfMemoryError as error:
        raise RunError("the GPU has not enough free memory: try --device cpu") from error


if __name__ == "__main__":
    sys.exit(main(parse_args()))
