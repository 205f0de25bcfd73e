"""Records and printed lines of a training run; only process 0 writes them.

metrics.jsonl: a line an evaluation; tb/: the same for TensorBoard, and how SONGS validation songs sound and look;
curves.png; samples/: a validation song as it sounds at each evaluation.
"""

import json
import math
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from continuation import audio, checkpoint, distributed, files, plots, stages
from continuation.training_state import TrainingState

HEALTHY_STD_RATIO = (0.7, 1.4)  # of sampled over true latents
COLLAPSE_GRACE = 0.1  # share of stage 2 before its samples are checked
SONGS = 3  # in TensorBoard


class RunLog:
    """The records of one run in its checkpoint folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.metrics = folder / "metrics.jsonl"
        self.board = None
        self.has_warned = False  # of collapse

    def open_board(self, state: TrainingState) -> None:
        """Open TensorBoard's events of the stage, in a folder of their own: a resumed run takes back those that it
        will write again, and what is taken back are the later steps of all that a folder holds."""
        if distributed.is_main():
            first = state.step + (state.evaluated_at == state.step)
            self.board = SummaryWriter(self.folder / "tb" / f"stage{state.stage}", purge_step=first)

    def write(self, record: dict) -> None:
        """Add a record to metrics.jsonl, TensorBoard and curves.png."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            defined = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}
            file.write(json.dumps(defined) + "\n")
        for name, value in record.items():
            if isinstance(value, float):
                self.board.add_scalar(f"stage{record['stage']}/{name}", value, record["step"])
        self.board.flush()
        plots.plot_curves(self.folder / "curves.png", checkpoint.read_records(self.metrics))

    def show_song(self, state: TrainingState, number: int, x: np.ndarray) -> None:
        """Add to TensorBoard how a validation pair x (channels, 2 * chunk) sounds now: mono, with spectrograms."""
        rate = state.config.sample_rate
        for name, sound in sounds_of(state, x).items():
            mono = audio.limit_peaks(sound.mean(axis=0, keepdims=True), rate)
            image = plots.spectrogram_image(mono, rate)
            self.board.add_audio(f"song{number}/{name}", mono, state.step, rate)
            # Under a tag of its own: TensorBoard takes one kind of data a tag.
            self.board.add_image(f"song{number}_spectrogram/{name}", image, state.step, dataformats="HWC")
        self.board.flush()

    def drop_later(self, state: TrainingState) -> None:
        """Remove the evaluations from metrics.jsonl that a resumed run will repeat."""
        if distributed.is_main():
            evaluated = state.step if state.evaluated_at == state.step else state.step - 1
            drop_later_records(self.metrics, state.stage, evaluated)

    def warn_of_collapse(self, state: TrainingState, record: dict) -> None:
        """Warn once if a flow's samples spread far less or more than true latents (a mean always spreads less)."""
        ratio = record.get("val_latent_std_ratio", 1.0)
        low, high = HEALTHY_STD_RATIO
        is_due = state.stage == 2 and state.config.objective == "flow" and state.progress() > COLLAPSE_GRACE
        if is_due and not self.has_warned and not low <= ratio <= high:
            self.has_warned = True
            change = "more steps or a larger core" if ratio < low else "a lower --learning_rate"
            print(
                f"warning: sampled latents spread {ratio:.2f} times as much as music's (healthy: {low} to {high}): "
                f"{change} may help",
                file=sys.stderr,
            )


def drop_later_records(path: Path, stage: int, step: int) -> None:
    """Rewrite metrics.jsonl without evaluations after this step, and without damaged lines."""
    if path.is_file():
        records = checkpoint.read_records(path)
        if damaged := len(path.read_bytes().splitlines()) - len(records):
            print(f"note: {path} has {damaged} damaged lines, they are left out")
        kept = [r for r in records if (r["stage"], r["step"]) <= (stage, step)]
        files.write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))


@torch.no_grad()
def write_sample(folder: Path, state: TrainingState, x: np.ndarray) -> None:
    """Write the reconstruction (stage 1) or the continuation (stage 2) of a validation song x (channels, samples)."""
    rate = state.config.sample_rate
    with state.autocast():
        if state.stage == 1:
            y = state.ema.reconstruct(torch.from_numpy(x)[None].to(state.device))[0]
        else:
            y = state.ema.generate(x, with_input=True)
    suffix = "mp3" if rate in audio.MP3_SAMPLE_RATES else "wav"
    path = folder / "samples" / f"stage{state.stage}-step{state.step:07d}.{suffix}"
    audio.encode_audio(path, audio.limit_peaks(y.float().cpu().numpy(), rate), rate)


@torch.no_grad()
def sounds_of(state: TrainingState, x: np.ndarray) -> dict[str, np.ndarray]:
    """Compute how a validation pair x (channels, 2 * chunk) sounds now: its second chunk, the truth, reconstructed,
    and in stage 2 its first one, the context, continued. Both themselves are there at the stage's step 0 alone."""
    context, truth = torch.from_numpy(x).chunk(2, dim=-1)
    sounds = {"context": context, "truth": truth} if state.step == 0 else {}
    with state.autocast():
        sounds["reconstruction"] = state.ema.reconstruct(truth[None].to(state.device))[0]
        if state.stage == 2:
            sounds["continuation"] = state.ema.generate(context, truth.shape[-1] / state.config.sample_rate)
    return {name: sound.float().cpu().numpy() for name, sound in sounds.items()}


def line_of(state: TrainingState, record: dict, is_best: bool) -> str:
    """Format an evaluation as a line to print."""
    shown = {"train": record["train_loss"], "val": record["val_loss"]}
    shown |= {"mr_stft": record.get("val_mr_stft"), "context gain": record.get("val_context_gain")}
    shown |= {"continuation": record.get("val_continuation"), "loop": record.get("val_loop")}
    defined = {name: value for name, value in shown.items() if value is not None and math.isfinite(value)}
    figures = "  ".join(f"{name} {value:.4f}" for name, value in defined.items())
    return (
        f"stage {state.stage}  step {state.step}/{state.stage_steps()} (epoch {record['epoch']:.1f})  {figures}"
        f"{' *' if is_best else ''}  {record['seconds'] / 60:.1f} min"
    )


def announce(state: TrainingState, windows: dict) -> None:
    """Print network, device, pairs and stages before training; windows: by split."""
    args, model = state.args, state.model
    print(f"{state.config.preset}, {state.config.objective}: {parameter_counts(model)} parameters on "
          f"{state.device.type}, {str(state.precision or 'fp32').removeprefix('torch.')}")  # fmt: skip
    print("pairs: " + ", ".join(f"{name} {len(own)}" for name, own in windows.items()))
    stages.print_stages(state.config, args, windows["train"], first=state.stage)
    if args.max_minutes:
        print(f"at most {args.max_minutes:g} minutes in all, {sum(state.seconds.values()) / 60:.1f} spent")


def parameter_counts(model: nn.Module) -> str:
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    return ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in counts.items())


def summarise(state: TrainingState, folder: Path) -> None:
    """Print the result of the run, and the next command."""
    spent = sum(state.seconds.values()) / 60
    if state.step == 0:
        print("warning: --max_minutes left no time for a step of stage 2 after its latents were cached")
    print(f"done: {spent:.1f} minutes of training, best validation loss of stage 2 {state.best:.4f}")
    print(f"next: python generate.py --checkpoint_folder {shlex.quote(str(folder))} "
          f"--input song.mp3 --output next.mp3")  # fmt: skip


def warn_without_cuda(args, device: torch.device) -> None:
    if device.type == "cpu" and args.preset in ("base", "large"):
        print(f"no CUDA device: --preset {args.preset} is slow on the CPU, --preset tiny is made for it")
