"""Play the next seconds of a song.

    python generate.py --checkpoint_folder checkpoints --input song.mp3 --output next.mp3

The network hears 10 seconds of the song, by default the first ones, and writes what it thinks comes next.
Exit codes: 0 done, 1 failed, 2 wrong usage or refused input, 75 interrupted: run the same command again.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from continuation import audio, checkpoint, decoders, signals
from continuation.cli import (
    INTERRUPTED,
    HelpFormatter,
    UsageError,
    make_folder,
    not_negative_float,
    one_line,
    repetitions,
    seed_number,
    steady_output,
    up_to_a_day,
)
from model import GUIDANCE, SAMPLING_STEPS, build_model, load_checkpoint

OUTPUT_SUFFIXES = (".mp3", ".wav", ".flac", ".ogg", ".m4a")
SHORTEST_SECONDS = 0.1


# Arguments


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint_folder", required=True, type=Path, help="what train.py wrote; best.pt is used")
    files.add_argument("--input", required=True, type=Path, help="song to continue")
    files.add_argument("--output", required=True, type=Path, help="sound file: " + " ".join(OUTPUT_SUFFIXES))
    files.add_argument("--with_input", action="store_true", help="write the heard seconds before the continuation")
    files.add_argument("--plot", metavar="PNG", type=Path, help="picture of input and continuation (default: none)")
    music = parser.add_argument_group("music")
    music.add_argument(
        "--start", type=start_seconds, default=0.0, help="where the heard seconds begin, s; or 'end': the last ones"
    )
    music.add_argument("--seconds", type=length_seconds, default=10.0, help="length of the continuation, s")
    music.add_argument("--num_samples", type=repetitions, default=1, help="how many; above 1: NAME-1, NAME-2 ...")
    music.add_argument(
        "--seed", type=seed_number, default=0, help="of the first continuation, the next one's is 1 higher"
    )
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
    return parser.parse_args(argv)


def length_seconds(text: str) -> float:
    value = up_to_a_day(not_negative_float(text))
    if value < SHORTEST_SECONDS:
        raise argparse.ArgumentTypeError(f"must be at least {SHORTEST_SECONDS}")
    return value


def start_seconds(text: str) -> float | None:
    """Seconds, or None for the song's end."""
    return None if text == "end" else up_to_a_day(not_negative_float(text))


# Input


def check_files(args: argparse.Namespace) -> None:
    """Refuse what can be refused before any work."""
    suffix = args.output.suffix.lower()
    if suffix not in OUTPUT_SUFFIXES:
        raise UsageError(f"--output {args.output}: cannot write '{suffix}', only {' '.join(OUTPUT_SUFFIXES)}")
    if suffix == ".m4a" and decoders.find_ffmpeg() is None:
        raise UsageError(f"--output {args.output}: .m4a needs ffmpeg; write .mp3 or .wav instead")
    if args.plot and args.plot.suffix.lower() != ".png":
        raise UsageError(f"--plot {args.plot}: pictures are .png files")
    if not args.input.is_file():
        raise UsageError(f"{args.input}: there is no such file")
    for flag, path in (("--output", args.output), ("--plot", args.plot)):
        for number in range(1, args.num_samples + 1) if path else ():
            check_output(flag, numbered(path, number, args.num_samples), args.input)
    if not args.checkpoint_folder.is_dir():
        raise UsageError(f"there is no checkpoint folder {args.checkpoint_folder}")


def check_output(flag: str, path: Path, source: Path) -> None:
    """Refuse to write over the input, or over a folder."""
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder")
    if path.exists() and path.samefile(source):
        raise UsageError(f"{flag} {path} would overwrite the input")


def load_network(args: argparse.Namespace):
    """Return the network of best.pt on its device, and the precision to run it in."""
    path = args.checkpoint_folder / checkpoint.BEST_NAME
    device = checkpoint.choose_device(args.device)
    state = load_checkpoint(path)
    if state.get("stage") != 2:
        raise UsageError(f"{path} is still in stage 1, and only stage 2 learns to continue a song: train on")
    model = build_model(state, device)
    rate = model.config.sample_rate
    if args.output.suffix.lower() == ".mp3" and rate not in audio.MP3_SAMPLE_RATES:
        raise UsageError(f"--output {args.output}: mp3 cannot hold {rate} Hz; write .wav or .flac instead")
    what = f"{model.config.preset}, {model.config.objective}, step {state['step']}"
    print(one_line(f"{path}: {what}, on {device.type}"))
    return model, checkpoint.choose_precision(args.precision, device)


def read_context(path: Path, sample_rate: int, channels: int, samples: int, start: float | None) -> np.ndarray:
    """The `samples` samples from `start` seconds on (None: the song's last ones), float32 (channels, samples).

    The song is decoded from its beginning and rounded to int16, as preprocess.py does: at the place of a stored
    chunk this is that very chunk.
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
        print(one_line(f"note: {path}: {note}"))
    need, found = samples / sample_rate, length / sample_rate
    if length < samples:
        raise UsageError(f"{path} is {found:.2f} s long, and the network needs to hear {need:g} s")
    if length < first + samples:
        latest = math.floor(100 * (found - need)) / 100
        raise UsageError(
            f"{path} is {found:.2f} s long: --start {start:g} leaves less than the {need:g} s that the network "
            f"needs to hear, start at {latest:g} at the latest"
        )
    return audio.from_int16(audio.to_int16(last))


# Output


def continue_song(model, precision, context: np.ndarray, seed: int, args: argparse.Namespace) -> np.ndarray:
    """Return the context and what follows it, joined: float32 (channels, context + continuation)."""
    sampling = {name: getattr(args, name) for name in ("steps", "guidance", "temperature")}
    device = next(model.parameters()).device
    with torch.autocast(device.type, precision, enabled=precision is not None):
        whole = model.generate(context, args.seconds, seed, with_input=True, **sampling).float().numpy()
    if not np.isfinite(whole).all():
        raise FloatingPointError("the network's output is not finite; try --precision fp32")
    return whole


def write_sample(
    whole: np.ndarray, join: int, sample_rate: int, path: Path, plot: Path | None, with_input: bool
) -> int:
    """Write the continuation, or all of it, and the picture of both; return the number of samples written."""
    sound = whole if with_input else whole[:, join:]
    limited = audio.limit_peaks(sound, sample_rate)
    if (peak := float(np.abs(sound).max())) > audio.PEAK_LIMIT:
        print(one_line(f"{path}: peaks of up to {peak:.2f} are limited"))
    audio.encode_audio(path, limited, sample_rate)
    if plot:
        from continuation import plots

        plots.plot_continuation(plot, whole[:, :join], whole[:, join:], sample_rate, path.name)
    return sound.shape[1]


def numbered(path: Path | None, number: int, count: int) -> Path | None:
    """NAME.mp3, or NAME-1.mp3 ... where there are more than one."""
    return path if path is None or count == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def run(args: argparse.Namespace) -> None:
    check_files(args)
    model, precision = load_network(args)
    config = model.config
    context = read_context(args.input, config.sample_rate, config.channels, config.chunk_samples, args.start)
    for flag, path in (("--output", args.output), ("--plot", args.plot)):
        if path:
            make_folder(path.parent, flag)
    for number in range(1, args.num_samples + 1):
        began = time.perf_counter()
        whole = continue_song(model, precision, context, args.seed + number - 1, args)
        taken = time.perf_counter() - began
        path, plot = (numbered(name, number, args.num_samples) for name in (args.output, args.plot))
        samples = write_sample(whole, context.shape[1], config.sample_rate, path, plot, args.with_input)
        speed = (whole.shape[1] - context.shape[1]) / config.sample_rate / taken
        length = f"{samples / config.sample_rate:.2f} s"
        print(one_line(f"{path}: {length}, generated in {taken:.2f} s, {speed:.1f} x real time"))
        if plot:
            print(one_line(f"{plot}: its picture"))


@steady_output()
def main(args: argparse.Namespace) -> int:
    try:
        with signals.sigterm_as_ctrl_c():
            run(args)
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        return INTERRUPTED
    except UsageError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except (audio.AudioError, OSError, FloatingPointError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except torch.cuda.OutOfMemoryError:
        print("error: the GPU has not enough free memory: try --device cpu", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
