"""Estimate and measurement of a training's memory before it starts.

    plan = memory.Plan(config, ("stage1", "latents", "stage2", "joint"), batch_size=16, accumulate=1, ...)
    memory.peak_gigabytes(plan)       estimated anywhere, in seconds: {"stage1": 2.1, "latents": 1.8, ...}
    memory.largest_batch(plan, 15)    the plan with the largest micro-batch whose estimate fits into 15 GB
    memory.measured_gigabytes(plan)   measured, on CUDA

Every part of the training is rehearsed: train.py's own step runs on fake tensors, which have shapes and no content,
for the estimate, and on the GPU for the measurement. GB are 1e9 bytes, peaks of the tensors' memory; on CUDA 1 GB is
added to both for the context and the libraries' workspaces. --compile is not considered.

The fake tensors are on the CPU, since torch without CUDA cannot differentiate fake CUDA ones. So autocast has the
CPU's rules, and dropout stores a float per element where CUDA stores a byte.
"""

import argparse
import functools
import itertools
import json
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from continuation import distributed, latent_encoding, losses, muon, stages
from continuation.cli import RunError, UsageError
from continuation.dataset import Split
from continuation.training_state import TrainingState
from continuation.windows import Windows

PARTS = ("stage1", "latents", "stage2", "joint")  # of a training, in order
CONTEXT_GIGABYTES = 1.0  # of CUDA, with the workspaces of its libraries
SOUND_BYTES = 16  # an evaluation, by sample of a chunk: 12 of three songs' two sounds, the rest spectrograms and mp3


@dataclass(frozen=True)
class Plan:
    """Settings that the memory of a training depends on."""

    config: object  # of the network
    parts: tuple[str, ...]  # of PARTS, those that the training has
    batch_size: int  # items per micro-step
    accumulate: int  # micro-steps per optimiser step
    device: str  # cuda or cpu
    precision: torch.dtype | None  # of autocast; None: fp32
    network: Callable[[object], nn.Module]  # makes the network of a config
    train_step: Callable  # of train.py

    def cut(self, batch_size: int) -> "Plan":
        """Return the plan with the items of a step split into micro-batches of `batch_size`."""
        return replace(self, batch_size=batch_size, accumulate=self.batch_size * self.accumulate // batch_size)


def parts_of(config, args: argparse.Namespace) -> tuple[str, ...]:
    """Return the parts of the training that the flags ask for."""
    phases = stages.phases_of(2, config, args)
    parts = ["stage1"] * (args.stage1_from is None)
    parts += ["latents"] * any(phase.reads_cache for phase in phases)
    return (*parts, *("joint" if phase.name == stages.Joint.name else "stage2" for phase in phases))


# Estimate and measurement


def peak_gigabytes(plan: Plan) -> dict[str, float]:
    """Estimate the peak of each part of the plan in GB, at its largest step, with evaluations."""
    return {part: estimate(plan, part) for part in plan.parts}


@functools.cache
def estimate(plan: Plan, part: str) -> float:
    """Estimate the peak of one part in GB on fake tensors, without computing and with hardly any memory."""
    with FakeTensorMode(), Allocations() as allocations:
        rehearse(replace(plan, device="cpu"), part)
    return allocations.peak / 1e9 + (CONTEXT_GIGABYTES if plan.device == "cuda" else 0.0)


def largest_batch(plan: Plan, limit: float) -> Plan | None:
    """Find the plan with the largest micro-batch whose estimate stays within `limit` GB in every part, and with the
    same batch_size x accumulate; None where not even single items fit."""
    fitting = (cut for cut in divisions(plan) if all(estimate(cut, part) <= limit for part in plan.parts))
    return next(fitting, None)


def measured_gigabytes(plan: Plan) -> tuple[Plan, dict[str, float]]:
    """Measure the peak of each part in GB on CUDA, and return it with the measured plan: where memory runs out, in
    this process or another, that with the next smaller micro-batch. Raises torch.cuda.OutOfMemoryError, in all
    processes, when not even single items fit."""
    for cut in divisions(plan):
        if cut.batch_size > plan.batch_size:
            continue
        peaks = fitting_peaks(cut)
        torch.cuda.empty_cache()  # NCCL takes memory of its own
        if distributed.all_reduce_min(int(peaks is not None), torch.device(plan.device)):
            return cut, peaks
    raise torch.cuda.OutOfMemoryError


def fitting_peaks(plan: Plan) -> dict[str, float] | None:
    """Measure the peak of each part in GB; None where memory runs out."""
    try:
        return {part: measure(plan, part) for part in plan.parts}
    except torch.cuda.OutOfMemoryError:
        return None


def measure(plan: Plan, part: str) -> float:
    """Measure the peak of one part in GB; the GPU should hold nothing else of this process."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    rehearse(plan, part)
    return torch.cuda.max_memory_allocated() / 1e9 + CONTEXT_GIGABYTES


def divisions(plan: Plan) -> Iterator[Plan]:
    """Yield the plans with all possible equal micro-batches, the largest first."""
    total = plan.batch_size * plan.accumulate
    for size in range(total, 0, -1):
        if total % size == 0:
            yield plan.cut(size)


def table(plan: Plan, limit: float, measured: dict[str, float] | None = None) -> str:
    """Format the peak of every part, estimated and where given measured; parts that exceed `limit` GB are marked."""
    precision = f"{plan.precision} (float16 and bfloat16 take the same)" if plan.precision else "fp32"
    lines = [
        f"peak memory on {plan.device} in {precision.removeprefix('torch.')}, with --batch_size {plan.batch_size} "
        f"--accumulate {plan.accumulate}:"
    ]
    for part, estimated in peak_gigabytes(plan).items():
        truth = f", measured {measured[part]:.2f} GB" if measured else ""
        excess = f", more than {limit:g} GB" if estimated > limit else ""
        lines.append(f"  {part:8} estimated {estimated:.2f} GB{truth}{excess}")
    return "\n".join(lines)


def cache_gigabytes(plan: Plan, windows: int) -> float:
    """Compute the size of the latent cache in GB, of `windows` windows in fp16; 0 where the plan needs none."""
    config = plan.config
    numbers = windows * sum(math.prod(shape) for shape in config.pair_shapes.values())
    return 2 * numbers / 1e9 if "latents" in plan.parts else 0.0


def checkpoint_gigabytes(plan: Plan) -> float:
    """Compute the size of the largest checkpoint in GB: weights, their average and the full optimiser state."""
    numbers = 0
    with torch.device("meta"):
        model = plan.network(plan.config)
    has_muon = isinstance(stages.make_optimiser(model, stage=2, learning_rate=0.0), muon.Muon)
    for parameter in model.parameters():
        state = 1 if has_muon and muon.is_matrix(parameter) else 2  # momentum, or Adam's moments
        numbers += (2 + state) * parameter.numel()
    return 4 * numbers / 1e9


class Allocations(TorchDispatchMode):
    """Counter of the bytes in storages that tensor operations allocate while the mode is on; peak: the maximum.
    Memory that a kernel takes and frees internally is not counted."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        size = self.known[storage] = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.bytes -= size


# The rehearsal


def rehearse(plan: Plan, part: str) -> None:
    """Run once what the part repeats."""
    rehearsal = Rehearsal(plan, part)
    if part == "latents":
        rehearsal.fill_cache()
        return
    rehearsal.step()
    rehearsal.evaluate()
    rehearsal.step()  # again: now with the optimiser's state beside the activations


class SilentState(TrainingState):
    """State of a training on silence that takes every step, whatever its gradients."""

    def begin_stage(self, stage: int) -> None:
        super().begin_stage(stage)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)  # else it would skip overflowing steps

    def check_finite(self, loss: Tensor, gradient_norm: Tensor) -> None:
        """Accept everything: fake tensors have no values."""


class Rehearsal:
    """One part of a training on silence."""

    def __init__(self, plan: Plan, part: str):
        self.plan, self.part, self.config = plan, part, plan.config
        args = SimpleNamespace(
            batch_size=plan.batch_size, accumulate=plan.accumulate, latent_variants=1, seed=0, learning_rate=0.0,
            stage1_steps=2, stage2_steps=2, max_minutes=None, compile=False,
            joint_share=float(part == "joint"),  # all of stage 2, or nothing
        )  # fmt: skip
        device = torch.device(plan.device)
        with device:
            model, ema = plan.network(plan.config), plan.network(plan.config)
        self.state = SilentState(model, ema, args, {}, device, plan.precision)
        self.phase = rehearsed_phase(plan, part, args)
        self.phase.accumulate = min(self.phase.accumulate, 2)  # a third one takes no more than the second
        self.state.begin_stage(self.phase.stage)
        stages.freeze_all_but(model, self.phase.trained(model))

    def step(self) -> None:
        """Take one optimiser step."""
        loss_module = distributed.PhaseLoss(self.phase, self.state.model)
        batches = (self.batch() for _ in itertools.count())
        self.plan.train_step(self.state, self.phase, loss_module, batches)

    def batch(self) -> dict[str, Tensor]:
        """Make a batch of zeros with the shapes of the phase's items."""
        item = silent_item(self.phase)
        return {name: self.zeros(self.phase.batch_size, *np.shape(value)) for name, value in item.items()}

    @torch.no_grad()
    def fill_cache(self) -> None:
        """Encode contexts and targets, as for the latent cache."""
        x = self.zeros(latent_encoding.CACHE_BATCH, self.config.channels, 2 * self.config.chunk_samples)
        with self.state.autocast():
            self.state.ema.encode_pair(x)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Run the part of an evaluation that takes the most memory; with small batches it can be the peak."""
        config, chunk, ema = self.config, self.config.chunk_samples, self.state.ema
        x = self.zeros(1, config.channels, 2 * chunk)
        if config.learns_waveforms:
            losses.legacy_step(ema, {"x": x}, predict=True)
            return
        with self.state.autocast():
            mean, log_variance = ema.posterior(x[..., :chunk])
            pair = ema.encode_pair(x)
            losses.fixed_time_losses(ema, pair, torch.zeros_like(pair["target"]))
            ema.generate(x[0, :, :chunk], steps=1)
        if self.part == "stage1":
            with self.state.autocast():
                decoded = ema.decode_with_magnitudes(mean)
            losses.reconstruction_parts(ema, x[..., :chunk], mean, log_variance, decoded, worst_stft_settings(config))

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.plan.device)


def rehearsed_phase(plan: Plan, part: str, args) -> stages.Phase:
    """Make the phase of a part, with the random draw that takes most memory, and without communication, since other
    processes may have run out of memory before."""
    (phase,) = stages.phases_of(1 if part == "stage1" else 2, plan.config, args)
    phase.stft_settings = lambda step: worst_stft_settings(plan.config)
    phase.mean_over_processes = lambda own: own
    return phase


def silent_item(phase: stages.Phase) -> dict:
    """Return one item of the phase, from a song of two silent chunks."""
    config = phase.config
    rows = np.zeros((2, config.channels, config.chunk_samples), np.int16)
    split = Split("train", rows, np.array([[0, 1]]), [{"id": "silence", "first_row": 0, "rows": 2}])
    windows = Windows(split, {"chunk_samples": config.chunk_samples, "sample_rate": config.sample_rate})
    pair = {part: np.zeros(shape, np.float32) for part, shape in config.pair_shapes.items()}
    return phase.items(windows, SimpleNamespace(read=lambda variant, number: pair))[0]


def worst_stft_settings(config) -> dict:
    """Return the draw of the spectral losses that takes most memory: the shortest windows have the most bins in all
    (each has one more than half its samples), and mid and side are computed in addition to left and right."""
    sizes = losses.spectral_sizes(config.sample_rate)
    return {"sample_rate": config.sample_rate, "size": min(sizes), "in_mid_side": True}


# For train.py


def fitting_plan(plan: Plan, args: argparse.Namespace) -> Plan:
    """Choose the batch of --batch_size auto by the estimate, and on CUDA measure the largest step of every part, with
    a smaller batch where memory runs out. Raises UsageError or RunError where nothing fits."""
    if args.batch_size == "auto":
        plan = largest_batch(plan, args.memory_limit)
        if plan is None:
            raise UsageError(f"not even one item at a time fits into {args.memory_limit:g} GB: --dry_run says why")
        print(f"batch size auto: --batch_size {plan.batch_size} --accumulate {plan.accumulate}")
    if plan.device == "cuda":
        asked = plan.batch_size
        try:
            plan, measured = measured_gigabytes(plan)
        except torch.cuda.OutOfMemoryError as error:
            raise RunError("not even one item at a time fits on this GPU: try a smaller --preset") from error
        if plan.batch_size < asked:
            print(f"out of memory at --batch_size {asked}: going on with --batch_size {plan.batch_size} "
                  f"--accumulate {plan.accumulate}")  # fmt: skip
        print(table(plan, args.memory_limit, measured))
    return plan


def print_plan(plan: Plan, args: argparse.Namespace, meta: dict, splits: dict[str, Split]) -> None:
    """Print the memory and disk space of a training as a table, then in a line of JSON, with the batch of
    --batch_size auto."""
    largest = largest_batch(plan, args.memory_limit)
    if args.batch_size == "auto":
        plan = largest or plan
    args.batch_size, args.accumulate = plan.batch_size, plan.accumulate
    for name, split in splits.items():
        hours = len(split.rows) * meta["chunk_samples"] / meta["sample_rate"] / 3600
        print(f"{name}: {len(split.songs)} songs, {len(split.pairs)} pairs, {hours:.2f} hours")
    windows = Windows(splits["train"], meta)
    stages.print_stages(plan.config, args, windows, first=2 if args.stage1_from else 1)
    cache = cache_gigabytes(plan, args.latent_variants * len(windows))
    one = checkpoint_gigabytes(plan)
    print(f"latent cache: {cache:.3f} GB")
    checkpoints = args.keep + 3  # best.pt, stage1.pt, and the file being written
    print(f"disk: {cache + checkpoints * one:.3f} GB, the cache and {checkpoints} checkpoints "
          f"of up to {one:.3f} GB; samples/ and tb/ come on top, about "
          f"{SOUND_BYTES * plan.config.chunk_samples / 1e6:.1f} MB an evaluation")  # fmt: skip
    print(table(plan, args.memory_limit))
    peaks = peak_gigabytes(plan)
    found = {f"{part}_gb": round(peaks.get(part, 0.0), 3) for part in PARTS}
    found |= {"limit_gb": args.memory_limit}
    found |= {name: getattr(largest, name, None) for name in ("batch_size", "accumulate")}
    print(json.dumps(found))
