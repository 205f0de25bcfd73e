"""Train the network on a paired dataset, in two stages: reconstruction, then prediction.

    python train.py --dataset_folder dataset --checkpoint_folder checkpoints

The same command continues a run that was stopped. Writes last.pt, best.pt, stage1.pt, metrics.jsonl, curves.png,
samples/, tb/ (TensorBoard) and latents/ (the cache of stage 2) into the checkpoint folder.
Exit codes: 0 done, 1 failed, 2 wrong usage or refused input, 75 interrupted: run the same command again.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import shlex
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from continuation import files, signals
from continuation.cli import (
    INTERRUPTED,
    UsageError,
    make_folder,
    one_line,
    output_code,
    seed_number,
    steady_output,
)
from continuation.dataset import is_same_dataset, open_dataset
from continuation.latent_cache import LatentCache
from continuation.windows import CropItems, FixedPairItems, JointItems, PairItems, WindowItems, Windows, items_of_rank, make_rng

CROP_SECONDS = 1  # of audio in one item of stage 1
COOLDOWN_SHARE = 0.4  # of a stage, its end, while the learning rate falls to zero
WARMUP_STEPS = 100
GRADIENT_NORM = 1.0
WEIGHT_DECAY = 0.01
HEALTHY_STD_RATIO = (0.7, 1.4)  # of sampled latents over true ones
COLLAPSE_GRACE = 0.1  # of stage 2, before its samples are judged
SKIPPED_STEPS_LIMIT = 50  # steps in a row that fp16 may skip for overflow
JOINT_CODEC_RATE = 0.1  # of the learning rate, for encoder and decoder in the joint part
CACHE_BATCH = 4
FREE_ON_RESTART = {
    "stage1_from", "max_minutes", "stage1_steps", "stage2_steps", "device",
    "compile", "batch_size", "accumulate", "num_workers", "checkpoint_minutes", "keep", "dry_run", "memory_limit",
}  # fmt: skip
CODEC_FLAGS = ("latent_channels", "encoder_widths", "encoder_blocks", "decoder_widths", "decoder_blocks")
CORE_FLAGS = ("core_layers", "core_width", "core_heads", "core_dropout", "latents_per_token")
ARCHITECTURE_FLAGS = CODEC_FLAGS + CORE_FLAGS
CORE_FIELDS = ("objective", *CORE_FLAGS)  # in which a stage 2 may differ from the stage 1 that it starts from


@dataclass(frozen=True)
class Schedule:
    """What a preset trains with unless a flag says otherwise."""

    stage1_steps: int
    stage2_steps: int
    batch_size: int
    accumulate: int
    learning_rate: float
    latent_variants: int


SCHEDULES = {
    "legacy": Schedule(1500, 1500, 16, 4, 5e-5, 1),
    "tiny": Schedule(8000, 8000, 8, 1, 2e-3, 1),  # encoding one took 4 to 7 of 40 minutes on a CPU core
    # an estimate: about an hour at 6.5 TFLOP/s, a tenth of a T4's fp16 peak (240 and 1570 GFLOPs a step); on an H200
    # stage 1 would take 50 minutes, at 74 ms a step
    "base": Schedule(40000, 8000, 16, 1, 5e-4, 4),
    "large": Schedule(100000, 100000, 16, 1, 3e-4, 4),
}


class Stopped(Exception):
    """A stop signal came; everything is saved."""


class TrainingError(Exception):
    """Training cannot go on; the message is one clear sentence."""


# Arguments


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_folder_arguments(parser.add_argument_group("folders"))
    add_network_arguments(parser.add_argument_group("network (by default what the preset says)"))
    add_schedule_arguments(parser.add_argument_group("schedule"))
    add_hardware_arguments(parser.add_argument_group("hardware"))
    add_memory_arguments(parser.add_argument_group("memory"))
    args = parser.parse_args(argv)
    for field, value in asdict(SCHEDULES[args.preset]).items():
        if getattr(args, field) is None:
            setattr(args, field, value)
    if args.preset == "legacy":
        args.objective = "mse"
    check_ranges(parser, args)
    return args


def add_folder_arguments(group) -> None:
    group.add_argument("--dataset_folder", required=True, help="what create_dataset.py wrote")
    group.add_argument("--checkpoint_folder", required=True, help="where everything is written, and resumed from")
    group.add_argument(
        "--stage1_from", metavar="CK", help="start at stage 2, from the finished stage 1 of this checkpoint folder"
    )


def add_network_arguments(group) -> None:
    group.add_argument("--preset", choices=SCHEDULES, default="base", help="size of the network")
    group.add_argument(
        "--objective", choices=("flow", "mse"), default="flow",
        help="stage 2: a rectified flow that samples continuations, or their mean by squared error",
    )  # fmt: skip
    for side in ("encoder", "decoder"):
        for what in ("widths", "blocks"):
            help_text = f"{what} of the {side}, in the order of its layers"
            group.add_argument(f"--{side}_{what}", type=int, nargs=2, metavar="N", help=help_text)
    group.add_argument("--latent_channels", type=int, help="floats a latent; 100 latents a second")
    group.add_argument("--core_layers", type=int, help="transformer layers")
    group.add_argument("--core_width", type=int, help="width of the transformer, twice that of its head")
    group.add_argument("--core_heads", type=int, help="attention heads")
    group.add_argument("--core_dropout", type=float, help="dropout of the transformer, 0..1")
    group.add_argument("--latents_per_token", type=int, help="neighbouring latents stacked into one token")


def add_schedule_arguments(group) -> None:
    group.add_argument("--stage1_steps", type=int, help="optimiser steps of stage 1 (default: the preset's)")
    group.add_argument("--stage2_steps", type=int, help="optimiser steps of stage 2 (default: the preset's)")
    group.add_argument(
        "--joint_share", type=float, default=0.75, help="last share of stage 2 that trains the full network, 0..1"
    )
    group.add_argument(
        "--max_minutes", type=float,
        help="training time over all restarts, shared out to the stages in proportion to their steps",
    )  # fmt: skip
    group.add_argument(
        "--batch_size", type=batch_size,
        help="items a process and micro-step (default: the preset's); the joint part takes a quarter of a step's "
        "items; auto: the most that fit --memory_limit of the preset's batch x --accumulate, and as many micro-steps "
        "as make it up",
    )  # fmt: skip
    group.add_argument("--accumulate", type=int, help="micro-steps an optimiser step (default: the preset's)")
    group.add_argument("--learning_rate", type=float, help="peak learning rate (default: the preset's)")
    group.add_argument(
        "--latent_variants", type=int, help="augmented versions of each pair in the cache (default: the preset's)"
    )
    group.add_argument("--eval_steps", type=int, default=250, help="steps between evaluations")
    group.add_argument(
        "--patience",
        type=int,
        default=20,
        help="evaluations without a better one that end a stage early, cooldown and joint part included; 0: never",
    )
    group.add_argument("--checkpoint_minutes", type=float, default=10.0, help="minutes between saves of last.pt")
    group.add_argument("--keep", type=int, default=2, help="saves to keep: last.pt, last.1.pt and so on")
    group.add_argument("--seed", type=seed_number, default=0, help="of everything that is drawn")


def add_hardware_arguments(group) -> None:
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    group.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 or else fp16 on CUDA, fp32 on the CPU",
    )  # fmt: skip
    group.add_argument("--num_workers", type=int, help="processes that read data (default: 4 on CUDA, 0 on the CPU)")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")


def add_memory_arguments(group) -> None:
    group.add_argument(
        "--memory_limit", type=float, default=15.0, help="GB (1e9 bytes) for --batch_size auto and --dry_run"
    )
    group.add_argument(
        "--dry_run", action="store_true",
        help="print what this training takes: steps, disk, and memory, on a GPU unless --device cpu; write nothing",
    )  # fmt: skip


def batch_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def check_ranges(parser, args) -> None:
    for name in ("stage1_steps", "stage2_steps", "batch_size", "accumulate", "latent_variants", "eval_steps", "keep"):
        if getattr(args, name) != "auto" and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for name in ("max_minutes", "learning_rate", "checkpoint_minutes", "memory_limit"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} must be above 0")
    if args.preset == "legacy" and any(getattr(args, name) is not None for name in ARCHITECTURE_FLAGS):
        parser.error("--preset legacy is the original, layer for layer: its sizes cannot be changed")
    for name in (name for name in ARCHITECTURE_FLAGS if name != "core_dropout" and getattr(args, name) is not None):
        sizes, least = getattr(args, name), 0 if name.endswith("_blocks") else 1
        if min(sizes if isinstance(sizes, list) else [sizes]) < least:
            parser.error(f"--{name} must be at least {least}")
    for name in ("joint_share", "core_dropout"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} must be from 0 to 1")
    if args.num_workers is not None and args.num_workers < 0:
        parser.error("--num_workers must not be negative")


def warn_without_cuda(args, device) -> None:
    if device.type == "cpu" and args.preset in ("base", "large"):
        print(f"no CUDA device: --preset {args.preset} is slow on the CPU, --preset tiny is made for it")


# Phases: a phase supplies its trainable parts, its items and its loss; the loop is the same for all of them.
# Stage 2 has two, which share steps, optimiser and schedule: the core alone, then the full network.


class Phase:
    """`end`: the progress of its stage, 0..1, at which it ends."""

    def __init__(self, run: "Run", end: float):
        self.run, self.end = run, end
        self.batch_size, self.accumulate = run.args.batch_size, run.args.accumulate


class Reconstruct(Phase):
    """Stage 1: encoder and decoder learn to reconstruct."""

    name, stage, reads_cache = "reconstruct", 1, False

    def trained(self, model) -> list:
        return [model.encoder, model.decoder]

    def items(self):
        run = self.run
        return CropItems(run.windows["train"], run.crop_shape, run.crop_samples, run.args.seed)

    def loss(self, model, batch: dict, step: int) -> tuple:
        return self.run.losses.reconstruct_step(
            model, batch, self.run.spectral_draw(step), average=self.run.distributed.mean
        )


class Predict(Phase):
    """Stage 2a: the core learns on cached latents; encoder and decoder stay frozen, or else the cache would age."""

    name, stage, reads_cache = "predict", 2, True

    def trained(self, model) -> list:
        return [model.core]

    def items(self):
        run = self.run
        pairs = len(run.windows["train"])
        return PairItems(pairs, run.latent_shape, run.args.latent_variants, run.args.seed, run.open_cache())

    def loss(self, model, batch: dict, step: int) -> tuple:
        return self.run.losses.predict_step(model, batch)


class Joint(Predict):
    """Stage 2b: the full network learns, nothing frozen. Pairs are still those of the cache, which the encoder hardly
    leaves behind: encoding them anew would take half of the time."""

    name = "joint"

    def trained(self, model) -> list:
        return [model.core, model.encoder, model.decoder]

    def items(self):
        return JointItems(Reconstruct.items(self), super().items())

    def loss(self, model, batch: dict, step: int) -> tuple:
        return self.run.losses.joint_step(model, batch, self.run.spectral_draw(step))


class Legacy(Phase):
    """Either stage of the legacy network: fixed pairs, squared error of the waveform, nothing frozen, no cache."""

    name, reads_cache = "legacy", False

    def __init__(self, run: "Run", end: float, stage: int):
        super().__init__(run, end)
        self.stage = stage

    def trained(self, model) -> list:
        return [model.encoder, model.decoder] + ([model.core] if self.stage == 2 else [])

    def items(self):
        return FixedPairItems(self.run.windows["train"], self.run.args.seed, self.stage)

    def loss(self, model, batch: dict, step: int) -> tuple:
        return self.run.losses.legacy_step(model, batch, predict=self.stage == 2)


# What it will take


def make_config(args, meta: dict):
    """The network that the flags and the dataset ask for. Raises UsageError for one that cannot be."""
    from model import with_overrides

    overrides = {name: getattr(args, name) for name in ARCHITECTURE_FLAGS}
    overrides |= {name: tuple(value) for name, value in overrides.items() if isinstance(value, list)}
    shape = {name: meta[name] for name in ("sample_rate", "channels", "chunk_samples")}
    try:
        return with_overrides(args.preset, objective=args.objective, **overrides, **shape)
    except ValueError as error:
        raise UsageError(str(error)) from error


def crop_samples(config) -> int:
    """Of an item of stage 1."""
    return min(CROP_SECONDS * config.sample_rate, config.chunk_samples)


def make_plan(args, meta: dict, device):
    """What the memory of this training depends on; --batch_size auto is the preset's batch until it is settled."""
    from continuation import checkpoint, memory

    config = make_config(args, meta)
    parts = ["stage1"] * (args.stage1_from is None)
    if config.is_legacy:
        parts += ["stage2"]
    else:
        parts += ["latents"] + ["stage2"] * (args.joint_share < 1) + ["joint"] * (args.joint_share > 0)
    return memory.Plan(
        config=config,
        parts=tuple(parts),
        batch_size=SCHEDULES[args.preset].batch_size if args.batch_size == "auto" else args.batch_size,
        accumulate=args.accumulate,
        joint_divisor=JOINT_BATCH_DIVISOR,
        crop_samples=crop_samples(config),
        cache_batch=CACHE_BATCH,
        device=device.type,
        precision=checkpoint.choose_precision(args.precision, device),
    )


def fit_batch(args, device) -> None:
    """Settle batch_size and accumulate before anything is trained: what auto is, by the estimate, and on CUDA what
    the worst step of every part really takes; where memory runs out there, the batch is lowered."""
    if args.batch_size != "auto" and device.type == "cpu":
        return
    import torch

    from continuation import memory

    meta, _ = open_dataset(args.dataset_folder)
    plan = make_plan(args, meta, device)
    if args.batch_size == "auto":
        plan = memory.largest_batch(plan, args.memory_limit)
        if plan is None:
            raise UsageError(f"not even one item at a time fits into {args.memory_limit:g} GB: --dry_run says why")
        print(f"batch size auto: --batch_size {plan.batch_size} --accumulate {plan.accumulate}")
    if plan.device == "cuda":
        asked = plan.batch_size
        try:
            plan, measured = memory.measured_gigabytes(plan)
        except torch.cuda.OutOfMemoryError as error:
            raise TrainingError("not even one item at a time fits on this GPU: try a smaller --preset") from error
        if plan.batch_size < asked:
            print(f"out of memory at --batch_size {asked}: going on with --batch_size {plan.batch_size} "
                  f"--accumulate {plan.accumulate}")  # fmt: skip
        print(memory.table(plan, args.memory_limit, measured))
    args.batch_size, args.accumulate = plan.batch_size, plan.accumulate


def dry_run(args) -> None:
    """Print what the training would take, its memory on a GPU even where there is none; write nothing."""
    import torch

    from continuation import memory

    meta, splits = open_dataset(args.dataset_folder)
    plan = make_plan(args, meta, torch.device("cpu" if args.device == "cpu" else "cuda"))
    largest = memory.largest_batch(plan, args.memory_limit)
    if args.batch_size == "auto":
        plan = largest or plan
    args.batch_size, args.accumulate = plan.batch_size, plan.accumulate
    for name, split in splits.items():
        hours = len(split.rows) * meta["chunk_samples"] / meta["sample_rate"] / 3600
        print(f"{name}: {len(split.songs)} songs, {len(split.pairs)} pairs, {hours:.2f} hours")
    windows = Windows(splits["train"], meta)
    print_stages(args, windows, first=2 if args.stage1_from else 1)
    cache = memory.cache_gigabytes(plan, args.latent_variants * len(windows))
    one = memory.checkpoint_gigabytes(plan.config)
    print(f"latent cache: {cache:.3f} GB")
    checkpoints = args.keep + 3  # best.pt, stage1.pt, and one that is being written
    print(f"disk: {cache + checkpoints * one:.3f} GB, the cache and {checkpoints} checkpoints "
          f"of up to {one:.3f} GB; a sample an evaluation comes on top")  # fmt: skip
    print(memory.table(plan, args.memory_limit))
    peaks = memory.peak_gigabytes(plan)
    found = {f"{part}_gb": round(peaks.get(part, 0.0), 3) for part in memory.PARTS}
    found |= {"limit_gb": args.memory_limit}
    found |= {name: getattr(largest, name, None) for name in ("batch_size", "accumulate")}
    print(json.dumps(found))


def items_a_step(args) -> int:
    """Items of an optimiser step, over all processes."""
    from continuation import distributed

    return args.batch_size * args.accumulate * distributed.count()


def pairs_an_epoch(args, windows) -> int:
    """Of these training windows: legacy has fixed pairs, about half of them."""
    return len(FixedPairItems(windows, args.seed, 1).pairs) if args.preset == "legacy" else len(windows)


def print_stages(args, windows, first: int) -> None:
    """Steps and epochs on these windows of the stages from `first` on."""
    from continuation import distributed

    joint_share = 0 if args.preset == "legacy" else args.joint_share
    before_joint = math.ceil(args.stage2_steps * (1 - joint_share))
    joint_items = math.prod(joint_batches(args)) * distributed.count()
    for stage, name, steps, items in (
        (1, "stage 1", args.stage1_steps, items_a_step(args)),
        (2, "stage 2", before_joint, items_a_step(args)),
        (2, "stage 2, joint part", args.stage2_steps - before_joint, joint_items),
    ):
        if stage >= first and steps:
            epochs = steps * items / pairs_an_epoch(args, windows)
            print(f"{name}: {steps} steps of {items} items, {epochs:.1f} epochs")


# The run


class Run:
    """One training run in one checkpoint folder: what it is, where it stands, and how it goes on."""

    def __init__(self, args: argparse.Namespace):
        import torch

        from continuation import checkpoint, distributed, losses, muon, repetition, validation
        from model import ContinuationModel

        self.args, self.torch, self.losses, self.muon = args, torch, losses, muon
        self.distributed, self.repetition = distributed, repetition
        self.checkpoint = checkpoint
        self.folder = Path(args.checkpoint_folder)
        self.meta, splits = open_dataset(args.dataset_folder)
        self.windows = {name: Windows(split, self.meta) for name, split in splits.items()}
        self.device = checkpoint.choose_device(args.device)
        warn_without_cuda(args, self.device)
        self.precision = checkpoint.choose_precision(args.precision, self.device)
        self.config = make_config(args, self.meta)
        self.crop_samples = crop_samples(self.config)
        self.crop_shape = (self.config.latent_channels, self.crop_samples // self.config.latent_samples)
        self.latent_shape = (self.config.latent_channels, self.config.chunk_latents)
        torch.manual_seed(args.seed)
        self.model = ContinuationModel(self.config).to(self.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.validation = validation.Validation(self.ema, self.windows["val"], args.seed, self.autocast)
        self.settings = {k: v for k, v in vars(args).items() if k not in ("dataset_folder", "checkpoint_folder")}
        self.seconds = {1: 0.0, 2: 0.0}  # spent in each stage, over all restarts
        self.evaluated_at = None
        self.warned = False  # of collapse
        self.cached_by = None  # key of the encoder that the latent cache is of
        self.begin_stage(1)

    # stages and phases

    def begin_stage(self, stage: int) -> None:
        self.stage, self.step, self.item, self.evaluated_at = stage, 0, 0, None
        self.best, self.evaluations_since_best, self.skipped = math.inf, 0, 0
        self.interval = {"phase": "", "loss": 0.0, "steps": 0}  # trained since the last evaluation, loss summed up
        self.optimiser = self.make_optimiser()
        self.scaler = self.torch.amp.GradScaler(
            self.device.type, enabled=self.precision == self.torch.float16 and self.device.type == "cuda"
        )
        if self.args.compile:
            for part in (self.model.encoder, self.model.core, self.model.decoder):
                part.compile()

    def make_optimiser(self):
        """Over all that the stage ever trains; frozen parameters have no gradient and stay untouched."""
        model, rate = self.model, self.args.learning_rate
        if self.config.is_legacy:
            return self.torch.optim.Adam([{"params": model.parameters(), "scale": 1.0}], lr=rate)
        codec = parameters_of(model.encoder, *model.decoder.own())
        if self.stage == 1:
            groups = [{"params": codec, "scale": 1.0}]
        else:
            new = parameters_of(model.core, model.decoder.mixer)
            groups = [{"params": new, "scale": 1.0}, {"params": codec, "scale": JOINT_CODEC_RATE}]
        return self.muon.Muon(groups, lr=rate, weight_decay=WEIGHT_DECAY)

    def phases(self) -> list:
        """The phases of the stage, each with the progress at which it ends."""
        if self.config.is_legacy:
            return [Legacy(self, 1.0, self.stage)]
        if self.stage == 1:
            return [Reconstruct(self, 1.0)]
        share = self.args.joint_share
        return [Predict(self, 1.0 - share)] * (share < 1) + [Joint(self, 1.0)] * (share > 0)

    def stage_steps(self) -> int:
        return self.args.stage1_steps if self.stage == 1 else self.args.stage2_steps

    def stage_seconds(self) -> float:
        """The stage's share of --max_minutes."""
        if self.args.max_minutes is None:
            return math.inf
        total = self.args.stage2_steps + (0 if self.args.stage1_from else self.args.stage1_steps)
        return 60 * self.args.max_minutes * self.stage_steps() / total

    def progress(self) -> float:
        """How much of the stage is done, 0..1, by steps or by time, whichever is further."""
        return min(1.0, max(self.step / self.stage_steps(), self.seconds[self.stage] / self.stage_seconds()))

    def learning_rate(self) -> float:
        """Warm-up, constant, and a linear cooldown to zero at the end of the stage; legacy: constant."""
        if self.config.is_legacy:
            return self.args.learning_rate
        warm = min(1.0, (self.step + 1) / WARMUP_STEPS)
        return self.args.learning_rate * warm * min(1.0, (1 - self.progress()) / COOLDOWN_SHARE + 1e-3)

    # training

    def train(self, stop) -> None:
        """Go through all stages and phases from where the run stands. Raises Stopped at a stop signal."""
        if self.distributed.is_first():
            (self.folder / "samples").mkdir(exist_ok=True)
        while not (self.stage == 2 and self.progress() >= 1 and self.evaluated_at == self.step):
            self.open_board()
            if any(phase.reads_cache for phase in self.phases()):
                self.fill_cache(stop)
            if self.best == math.inf:
                self.distributed.wait_for_all()  # all have looked for last.pt
                self.save()  # first: a folder with a best.pt and without a last.pt is refused
                self.evaluate()
            for phase in self.phases():
                self.train_phase(phase, stop)
            if self.evaluated_at != self.step:
                self.evaluate()
            if self.stage == 2:
                break
            self.finish_stage1()
        self.save()

    def train_phase(self, phase, stop) -> None:
        if self.progress() >= phase.end or self.exhausted():
            return
        freeze_all_but(self.model, phase.trained(self.model))
        self.model.train()
        loss_of = self.distributed.loss_module(phase, self.model)
        batches = iter(self.loader(phase))
        started, saved = time.monotonic(), time.monotonic()
        if self.interval["phase"] != phase.name:  # or else the run goes on in the midst of it
            self.begin_interval(phase.name)
        while self.progress() < phase.end and not self.exhausted():
            loss = self.train_step(phase, loss_of, batches)
            now = time.monotonic()
            loss, seconds, stop_requested = self.agree(loss, now - started, stop)
            self.interval["loss"] += loss
            self.interval["steps"] += 1
            self.seconds[self.stage] += seconds
            started = now
            if self.step % self.args.eval_steps == 0:
                self.evaluate(self.interval["loss"] / self.interval["steps"], phase.name)
                self.begin_interval(phase.name)
            if stop_requested:
                self.save_and_stop()
            if time.monotonic() - saved > 60 * self.args.checkpoint_minutes:
                self.save()
                saved = time.monotonic()

    def begin_interval(self, phase: str) -> None:
        self.interval = {"phase": phase, "loss": 0.0, "steps": 0}

    def save_and_stop(self) -> None:
        """Raise Stopped in all processes together: launchers end the others as soon as one has left, and process 0
        may still be writing."""
        self.save()
        self.distributed.wait_for_all()
        raise Stopped

    def exhausted(self) -> bool:
        """Whether the validation loss has not improved for so long that the stage should end."""
        return 0 < self.args.patience <= self.evaluations_since_best

    def agree(self, loss: float, seconds: float, stop) -> tuple[float, float, bool]:
        """The processes' mean loss, the time that process 0 took, and whether any of them was asked to stop: what
        follows from these must be the same everywhere."""
        own = [loss, seconds if self.distributed.is_first() else 0.0, float(stop.requested)]
        count = self.distributed.count()
        loss, seconds, stopped = self.distributed.mean(self.tensor(own)).tolist()
        return loss, seconds * count, stopped > 0

    def tensor(self, values: list[float]):
        return self.torch.tensor(values, dtype=self.torch.float64, device=self.device)

    def loader(self, phase):
        """Batches of the phase from the run's next item on, without end; of all processes' items this one's."""
        own = items_of_rank(self.item, phase.batch_size, self.distributed.rank(), self.distributed.count())
        return self.batches(phase.items(), phase.batch_size, own)

    def batches(self, items, batch_size: int, numbers):
        """Batches of the items of these numbers, made by --num_workers processes."""
        workers = self.args.num_workers
        if workers is None:
            workers = 4 if self.device.type == "cuda" else 0
        return self.torch.utils.data.DataLoader(
            items,
            batch_size=batch_size,
            sampler=numbers,
            num_workers=workers,
            # forked, also where that is not the default: anything else would copy the whole dataset into each
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=signals.ignore_termination,
            generator=self.torch.Generator(),  # or else every restart would draw a number from the global one
        )

    def train_step(self, phase, loss_of, batches) -> float:
        """One optimiser step over the phase's micro-batches; returns this process's mean loss."""
        torch, total = self.torch, 0.0
        rng = make_rng(self.args.seed, "dropout", self.stage, self.step, self.distributed.rank())
        torch.manual_seed(int(rng.integers(2**62)))
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate() * group["scale"]
        for micro_step in range(phase.accumulate):
            batch = {k: v.to(self.device, non_blocking=True) for k, v in next(batches).items()}
            is_last = micro_step == phase.accumulate - 1
            with nullcontext() if is_last or self.distributed.count() == 1 else loss_of.no_sync():
                with self.autocast():
                    loss = loss_of(batch, self.step) / phase.accumulate
                self.scaler.scale(loss).backward()
            total += loss.item()
            self.item += phase.batch_size * self.distributed.count()
        if not math.isfinite(total):
            raise TrainingError(f"the loss is {total} at step {self.step} of stage {self.stage}")
        self.scaler.unscale_(self.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM).item()
        self.check_gradient(norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.update_ema()
        return total

    def check_gradient(self, norm: float) -> None:
        """fp16 skips a step that overflowed and lowers its scale; anything else that is not finite stops the run."""
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped > (SKIPPED_STEPS_LIMIT if self.scaler.is_enabled() else 0):
            raise TrainingError(
                f"the gradients are not finite at step {self.step} of stage {self.stage}; "
                f"last.pt and best.pt hold the last good weights: try a lower --learning_rate"
            )

    def update_ema(self) -> None:
        torch = self.torch
        decay = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
            for mine, theirs in zip(self.ema.buffers(), self.model.buffers(), strict=True):
                mine.copy_(theirs)

    def autocast(self):
        if self.precision is None:
            return nullcontext()
        return self.torch.autocast(self.device.type, self.precision)

    def spectral_draw(self, step: int) -> dict:
        """Window length and stereo basis of the spectral losses at this step."""
        rng = make_rng(self.args.seed, "spectral", self.stage, step)
        sizes = self.losses.spectral_sizes(self.config.sample_rate)
        return {
            "sample_rate": self.config.sample_rate,
            "size": int(rng.choice(sizes)),
            "in_mid_side": bool(rng.integers(2)),
        }

    # from stage 1 to stage 2

    def finish_stage1(self) -> None:
        """Keep the best of stage 1 as stage1.pt, and start stage 2 from it."""
        self.distributed.wait_for_all()
        finished = self.best_of_stage1()
        if finished is None:
            print("warning: the best of stage 1 is lost, going on from its last weights")
            self.save("best.pt")
            self.distributed.wait_for_all()
            finished = self.best_of_stage1()
        if self.distributed.is_first():
            self.checkpoint.save(self.folder / "stage1.pt", finished)
        self.start_stage2(finished)
        self.save()

    def best_of_stage1(self) -> dict | None:
        """best.pt, or stage1.pt where a stage 2 whose last.pt is lost has replaced it; None where neither is of
        stage 1 of just this run."""
        for name in ("best.pt", "stage1.pt"):
            with suppress(self.checkpoint.CheckpointError):
                state = self.checkpoint.load_network(self.folder / name)
                if state["stage"] == 1 and not self.differences(state):
                    return state
        return None

    def start_stage2(self, finished: dict) -> None:
        """Start stage 2 from the EMA weights of a finished stage 1, this run's or another's, whatever its core is."""
        if finished["stage"] != 1:
            raise UsageError("that stage1.pt is of stage 2")
        if not is_same_dataset(finished.get("data_meta"), self.meta):
            raise UsageError("that stage 1 was trained on another dataset")
        if codec_fields(finished["config"]) != codec_fields(asdict(self.config)):
            raise UsageError("that stage 1 has another encoder or decoder: give the same --preset and sizes")
        codec = codec_weights(finished["ema"])
        if self.checkpoint.shapes(codec) != self.checkpoint.shapes(codec_weights(self.ema.state_dict())):
            raise UsageError("that stage1.pt has not the weights of its encoder and decoder")
        for model in (self.model, self.ema):
            model.load_state_dict(codec, strict=False)
        self.begin_stage(2)

    def cache_key(self) -> str:
        """What the cached latents depend on: encoder, dataset, the windows drawn and what a context is."""
        key = [self.meta, self.args.seed, self.checkpoint.FORMAT_VERSION]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
        for tensor in self.model.encoder.state_dict().values():
            digest.update(tensor.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def open_cache(self):
        pairs, shapes = len(self.windows["train"]), self.config.pair_shapes
        return LatentCache(self.folder / "latents", self.args.latent_variants, shapes, pairs)

    def fill_cache(self, stop) -> None:
        """Encode all training windows once; variants that are there already for the same key are kept."""
        from continuation import files

        cache, missing = self.open_cache(), []
        if self.distributed.is_first():
            cache.begin(self.cached_by or self.cache_key())
            missing = cache.missing()
            if missing and self.cached_by:
                print("warning: the latent cache is not as this run left it: latents are encoded anew, and the run "
                      "will not be bit-identical to an undisturbed one", file=sys.stderr)  # fmt: skip
                cache.begin(self.cache_key())
                missing = cache.missing()
            self.cached_by = cache.key
        is_missing = self.tensor([float(variant in missing) for variant in range(self.args.latent_variants)])
        started = time.monotonic()
        for variant in self.distributed.from_first(is_missing).nonzero().flatten().tolist():
            print(f"stage 2  caching latents, variant {variant + 1} of {self.args.latent_variants}", flush=True)
            self.fill_variant(cache, variant, files.ArrayWriter, stop)
            if self.distributed.is_first():
                files.write_atomic(cache.folder / "key.json", cache.index(variant))
            now = time.monotonic()
            self.seconds[2] += self.distributed.from_first(self.tensor([now - started])).item()
            started = now
        self.distributed.wait_for_all()
        for name, value in zip(("latent_mean", "latent_std"), cache.statistics(), strict=True):
            for model in (self.model, self.ema):
                getattr(model, name).copy_(self.torch.from_numpy(value))

    def fill_variant(self, cache, variant: int, writer, stop) -> None:
        """All processes encode, process 0 writes."""
        import numpy as np

        blocks = self.encoded_blocks(variant, stop)
        if not self.distributed.is_first():
            for _ in blocks:
                pass
            return

        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(writer(cache.path(name, variant), np.float16, cache.shapes[name]))
                for name in cache.PARTS
            }
            for block in blocks:
                for name, part in block.items():
                    writers[name].append(part.cpu().numpy())

    def encoded_blocks(self, variant: int, stop):
        """All training windows, encoded, in order; every process encodes its share of a block, and the last pair
        again where the last block is not full."""
        windows, size = self.windows["train"], CACHE_BATCH * self.distributed.count()
        starts = range(0, len(windows), size)
        mine = [first + CACHE_BATCH * self.distributed.rank() + i for first in starts for i in range(CACHE_BATCH)]
        items = WindowItems(windows, variant, self.args.seed)
        batches = self.batches(items, CACHE_BATCH, [min(pair, len(windows) - 1) for pair in mine])
        for first, batch in zip(starts, batches, strict=True):
            with self.torch.no_grad(), self.autocast():
                parts = self.ema.encode_pair(batch["x"].to(self.device))
            left = len(windows) - first
            yield {name: self.distributed.gather(part.half())[:left] for name, part in parts.items()}
            if self.agree(0.0, 0.0, stop)[2]:
                self.save_and_stop()

    # evaluation

    def evaluate(self, train_loss: float | None = None, phase: str = "") -> None:
        """Validate the EMA weights on fixed pairs and fixed noise, log a line, keep the best: process 0 does, and
        tells the others."""
        self.evaluated_at = self.step
        if self.distributed.is_first():
            self.evaluate_here(train_loss, phase)
        standing = self.distributed.from_first(self.tensor([self.best, self.evaluations_since_best])).tolist()
        self.best, self.evaluations_since_best = standing[0], int(standing[1])

    def evaluate_here(self, train_loss: float | None, phase: str) -> None:
        record = {
            "stage": self.stage, "step": self.step, "phase": phase,
            "epoch": self.item / pairs_an_epoch(self.args, self.windows["train"]),
            "seconds": sum(self.seconds.values()), "train_loss": train_loss,
        }  # fmt: skip
        record |= self.validate()
        if not math.isfinite(record["val_loss"]):
            raise TrainingError(f"the validation loss is not finite at step {self.step} of stage {self.stage}")
        is_best = record["val_loss"] < self.best
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        if is_best:
            self.best = record["val_loss"]
            self.save("best.pt")
        self.log(record, is_best)
        self.warn_of_collapse(record)

    def warn_of_collapse(self, record: dict) -> None:
        """Once, when a flow's samples spread far less or far more than music does. A mean always spreads less."""
        ratio = record.get("val_latent_std_ratio", 1.0)
        low, high = HEALTHY_STD_RATIO
        is_due = self.stage == 2 and self.config.objective == "flow" and self.progress() > COLLAPSE_GRACE
        if is_due and not self.warned and not low <= ratio <= high:
            self.warned = True
            change = "more steps or a larger core" if ratio < low else "a lower --learning_rate"
            print(
                f"warning: sampled latents spread {ratio:.2f} times as much as music's (healthy: {low} to {high}): "
                f"{change} may help",
                file=sys.stderr,
            )

    def validate(self) -> dict:
        """val_* figures of the EMA weights; the untrained network is asked for a continuation too."""
        codec_learns = self.stage == 1 or self.progress() >= 1 - self.args.joint_share
        figures = self.validation.figures(self.stage, codec_learns)
        if self.stage == 2 or self.step == 0:
            figures = self.validation.continuation() | figures  # over more pairs, where both say it
        return {f"val_{name}": value for name, value in figures.items()}

    # what is written

    def open_board(self) -> None:
        """TensorBoard's events of the stage, in a folder of their own: a resumed run takes back those that it will
        write again, and what is taken back are the later steps of all that a folder holds."""
        if self.distributed.is_first():
            from torch.utils.tensorboard import SummaryWriter

            first = self.step + (self.evaluated_at == self.step)
            self.board = SummaryWriter(self.folder / "tb" / f"stage{self.stage}", purge_step=first)

    def log(self, record: dict, is_best: bool) -> None:
        from continuation import plots

        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            defined = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}
            file.write(json.dumps(defined) + "\n")
        for name, value in record.items():
            if isinstance(value, float):
                self.board.add_scalar(f"stage{self.stage}/{name}", value, self.step)
        self.board.flush()
        plots.plot_curves(self.folder / "curves.png", self.checkpoint.read_records(self.folder / "metrics.jsonl"))
        self.write_sample()
        print(self.line(record, is_best), flush=True)

    def line(self, record: dict, is_best: bool) -> str:
        shown = {"train": record["train_loss"], "val": record["val_loss"]}
        shown |= {"mr_stft": record.get("val_mr_stft"), "context gain": record.get("val_context_gain")}
        shown |= {"continuation": record.get("val_continuation"), "loop": record.get("val_loop")}
        defined = {name: value for name, value in shown.items() if value is not None and math.isfinite(value)}
        figures = "  ".join(f"{name} {value:.4f}" for name, value in defined.items())
        done = self.progress()
        left = self.seconds[self.stage] * (1 - done) / done / 60 if done else math.nan
        return (
            f"stage {self.stage}  step {self.step}/{self.stage_steps()} (epoch {record['epoch']:.1f})  {figures}"
            f"{' *' if is_best else ''}  {record['seconds'] / 60:.1f} min" + (f", {left:.0f} left" if done else "")
        )

    def write_sample(self) -> None:
        """What a validation song sounds like now: reconstructed, or continued."""
        from continuation import audio

        x = self.windows["val"].pair(0)[:, : self.config.chunk_samples]
        with self.torch.no_grad(), self.autocast():
            if self.stage == 1:
                y = self.ema.reconstruct(self.torch.from_numpy(x)[None].to(self.device))[0]
            else:
                y = self.ema.generate(x, with_input=True)
        suffix = "mp3" if self.config.sample_rate in audio.MP3_SAMPLE_RATES else "wav"
        path = self.folder / "samples" / f"stage{self.stage}-step{self.step:07d}.{suffix}"
        rate = self.config.sample_rate
        audio.encode_audio(path, audio.limit_peaks(y.float().cpu().numpy(), rate), rate)

    def save(self, name: str = "last.pt") -> None:
        if not self.distributed.is_first():
            return
        state = {
            "config": asdict(self.config),
            "weights": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scheduler": {"seconds": self.seconds},
            "scaler": self.scaler.state_dict(),
            "stage": self.stage,
            "step": self.step,
            "rng": self.checkpoint.rng_state(),
            "sampler": {"item": self.item},
            "early_stop": {"best": self.best, "since": self.evaluations_since_best, "skipped": self.skipped},
            "evaluated_at": self.evaluated_at,
            "interval": self.interval,
            "cached_by": self.cached_by if self.joint_has_begun() else None,
            "data_meta": self.meta,
            "settings": self.settings,
            "processes": self.distributed.count(),
            "command": sys.argv,
            "versions": self.checkpoint.versions(),
        }
        if name == "last.pt":
            self.checkpoint.save_last(self.folder, state, self.args.keep)
        else:
            self.checkpoint.save(self.folder / name, state)

    def differences(self, state: dict) -> list[str]:
        """What of a saved state is of another run than this one."""
        settings = state.get("settings", {})
        differing = [
            f"--{name} ({settings.get(name)} then, {value} now)"
            for name, value in self.settings.items()
            if name not in FREE_ON_RESTART and settings.get(name) != value
        ]
        if not is_same_dataset(state.get("data_meta"), self.meta):
            differing.append("the dataset")
        if not differing and state["config"] != asdict(self.config):
            differing.append(f"the sizes that --preset {self.config.preset} stands for, which have changed since")
        return differing

    def resume(self, state: dict) -> None:
        """Continue from a saved state, after comparing what may not differ."""
        differing = self.differences(state)
        for name in ("stage1_steps", "stage2_steps"):
            if self.settings[name] < state["settings"][name]:
                differing.append(f"--{name} (may only grow: {state['settings'][name]} then)")
        if differing:
            raise UsageError(
                f"{self.folder} holds a run that differs in: {', '.join(differing)}; "
                f"use the same settings to continue it, or another --checkpoint_folder"
            )
        self.stage = state["stage"]
        self.model.load_state_dict(state["weights"])
        self.ema.load_state_dict(state["ema"])
        self.begin_stage(state["stage"])
        self.optimiser.load_state_dict(state["optimiser"])
        if state["scaler"]:  # empty of a run that needed none, on another device
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.item = state["step"], state["sampler"]["item"]
        self.seconds = dict(state["scheduler"]["seconds"])
        if self.joint_has_begun() and self.progress() < 1 - self.args.joint_share:
            raise UsageError(
                f"{self.folder} is in the joint part, and this --stage2_steps or --max_minutes would put it back "
                f"before that: take less, or train stage 2 anew in another folder, with --stage1_from"
            )
        early = state["early_stop"]
        self.best, self.evaluations_since_best, self.skipped = early["best"], early["since"], early["skipped"]
        self.evaluated_at, self.cached_by = state["evaluated_at"], state.get("cached_by")
        self.interval = dict(state.get("interval", self.interval))  # older files have none
        self.checkpoint.set_rng_state(state["rng"])
        if self.distributed.is_first():
            evaluated = self.step if self.evaluated_at == self.step else self.step - 1
            drop_later_records(self.folder / "metrics.jsonl", self.stage, evaluated)
        if state["processes"] != self.distributed.count():
            print(f"{self.distributed.count()} processes now, {state['processes']} before: "
                  f"{items_a_step(self.args)} items a step")  # fmt: skip
        if self.stage == 2 and self.settings["stage1_steps"] > state["settings"]["stage1_steps"]:
            print("note: stage 1 is finished, more --stage1_steps do not continue it")
        print(f"continuing {self.folder} at stage {self.stage}, step {self.step}")

    def joint_has_begun(self) -> bool:
        """Whether stage 2 has moved encoder and decoder: cached latents would no longer be theirs."""
        codec = self.model.encoder.parameters()
        return self.stage == 2 and not self.config.is_legacy and any(p in self.optimiser.state for p in codec)

    def announce(self) -> None:
        """What is about to be done."""
        count = {name: sum(p.numel() for p in part.parameters()) for name, part in self.model.named_children()}
        parts = ", ".join(f"{name} {n / 1e6:.2f}M" for name, n in count.items())
        print(f"{self.config.preset}, {self.config.objective}: {parts} parameters on {self.device.type}, "
              f"{str(self.precision or 'fp32').removeprefix('torch.')}")  # fmt: skip
        print("pairs: " + ", ".join(f"{name} {len(windows)}" for name, windows in self.windows.items()))
        print_stages(self.args, self.windows["train"], first=self.stage)
        if self.args.max_minutes:
            print(f"at most {self.args.max_minutes:g} minutes in all, {sum(self.seconds.values()) / 60:.1f} spent")

    def summarise(self) -> None:
        spent = sum(self.seconds.values()) / 60
        print(f"done: {spent:.1f} minutes of training, best validation loss of stage 2 {self.best:.4f}")
        print(f"next: python generate.py --checkpoint_folder {shlex.quote(str(self.folder))} "
              f"--input song.mp3 --output next.mp3")  # fmt: skip


# Small helpers


def codec_fields(config: dict) -> dict:
    """What of a config decides the shape of encoder and decoder."""
    return {name: value for name, value in config.items() if name not in CORE_FIELDS}


def codec_weights(weights: dict) -> dict:
    """What of a network's weights stage 1 trains."""
    return {name: value for name, value in weights.items() if not name.startswith(("core.", "decoder.mixer."))}


def parameters_of(*parts) -> list:
    return [parameter for part in parts for parameter in part.parameters()]


def freeze_all_but(model, parts: list) -> None:
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


def drop_later_records(path: Path, stage: int, step: int) -> None:
    """Forget the evaluations that the resumed run will do again."""
    from continuation import checkpoint, files

    if path.is_file():
        records = checkpoint.read_records(path)
        if damaged := len(path.read_bytes().splitlines()) - len(records):
            print(f"note: {path} has {damaged} damaged lines, they are left out")
        kept = [r for r in records if (r["stage"], r["step"]) <= (stage, step)]
        files.write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))


# Main


@steady_output()
def main(args: argparse.Namespace) -> int:
    import torch

    from continuation import audio, checkpoint, distributed

    checkpoint.versions()  # of the code that runs, whatever is checked out before it ends
    folder = Path(args.checkpoint_folder)
    try:
        if args.dry_run:
            dry_run(args)
            return output_code()
        make_folder(folder, "--checkpoint_folder")
        device = checkpoint.choose_device(args.device)
        with (
            signals.StopSignals("SIGPIPE") as stop,
            distributed.joined(device),
            distributed.first_alone(files.locked(folder / ".lock", wait_seconds=60)),
        ):
            fit_batch(args, device)  # before the run takes memory of its own
            run = prepare(args, checkpoint, distributed)
            run.train(stop)
            run.summarise()
    except Stopped:
        by = stop.name or "a signal to another process"
        print(f"interrupted by {by}, everything is saved: run the same command again to continue", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:  # a second Ctrl-C, which does not wait for the end of the step
        print("interrupted at once: run the same command again to continue from the last save", file=sys.stderr)
        return INTERRUPTED
    except (
        UsageError,
        checkpoint.CheckpointError,
        checkpoint.DeviceError,
        distributed.LaunchError,
    ) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except (TrainingError, distributed.LostPeerError, OSError, audio.AudioError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except torch.cuda.OutOfMemoryError:
        print("error: the GPU's memory ran out: run the same command with a smaller --batch_size", file=sys.stderr)
        return 1
    return 0


def refuse_remains(folder: Path) -> None:
    """Raise UsageError for a folder of a run whose last.pt is gone: a new run would write over what is left of it."""
    if left := [name for name in ("best.pt", "stage1.pt", "metrics.jsonl") if os.path.lexists(folder / name)]:
        raise UsageError(
            f"{folder} holds {', '.join(left)} of a run, but no last.pt to continue it from: put its last.pt back, "
            f"or train into another --checkpoint_folder, where --stage1_from takes over a stage1.pt"
        )


def prepare(args: argparse.Namespace, checkpoint, distributed) -> "Run":
    """The run of this folder: continued, or new."""
    run = Run(args)
    with distributed.first_goes_ahead():
        last = checkpoint.load_last(run.folder)
        if last is None:
            refuse_remains(run.folder)
    if last is not None:
        checkpoint.check_network(f"the last checkpoint of {run.folder}", last)
        try:
            run.resume(last)
        except checkpoint.FOREIGN_ERRORS as error:
            raise checkpoint.misfit(f"the last checkpoint of {run.folder}", error) from error
    elif args.stage1_from:
        run.start_stage2(checkpoint.load_network(Path(args.stage1_from) / "stage1.pt"))
    run.announce()
    return run


if __name__ == "__main__":
    code = main(parse_args())
    from continuation import distributed

    distributed.leave(code)
