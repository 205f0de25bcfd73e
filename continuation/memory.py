"""How much memory a training takes, known before it starts.

    plan = memory.Plan(config, ("stage1", "latents", "stage2", "joint"), batch_size=16, accumulate=1, ...)
    memory.peak_gigabytes(plan)       estimated anywhere, in seconds: {"stage1": 2.0, "latents": 1.7, ...}
    memory.largest_batch(plan, 15)    the plan with the largest micro-batch that the estimate lets into 15 GB
    memory.measured_gigabytes(plan)   the truth, on CUDA

Every part of the training is rehearsed with its own batches, losses, average and optimiser: on fake tensors, which
have shapes and no content, for the estimate, and on the GPU for the truth. GB are 1e9 bytes, peaks of what tensors
hold; on CUDA 1 GB is added to both for the context and the libraries' workspaces. --compile is left out of account.

The fake tensors are fake CPU tensors, since torch without CUDA cannot differentiate fake CUDA ones. So autocast's
rules are the CPU's, and dropout keeps a number an element where CUDA keeps a byte. torch's own MemTracker found the
same peaks in 2.5 times the time.
"""

import functools
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from continuation import distributed, losses, muon
from continuation.dataset import Split
from continuation.repetition import COPIES
from continuation.windows import CropItems, FixedPairItems, PairItems, Windows
from model import ContinuationModel, ModelConfig, on_meta

PARTS = ("stage1", "latents", "stage2", "joint")  # of a training, in their order
CONTEXT_GIGABYTES = 1.0  # of CUDA, with the workspaces of its libraries


@dataclass(frozen=True)
class Plan:
    """All that the memory of a training depends on."""

    config: ModelConfig
    parts: tuple[str, ...]  # of PARTS, those that the training has
    batch_size: int  # items a micro-step
    accumulate: int  # micro-steps an optimiser step
    joint_divisor: int  # of the items of a step, in the joint part
    crop_samples: int  # of an item of stage 1
    cache_batch: int  # pairs that are encoded together for the latent cache
    device: str  # cuda or cpu
    precision: torch.dtype | None  # of autocast; None: fp32

    def cut(self, batch_size: int) -> "Plan":
        """The same items a step, in micro-batches of so many."""
        return replace(self, batch_size=batch_size, accumulate=self.batch_size * self.accumulate // batch_size)


def joint_batches(batch_size: int, accumulate: int, divisor: int) -> tuple[int, int]:
    """Micro-batch and micro-steps of the joint part: a `divisor`-th of the items of a step, however they are cut."""
    items = max(1, batch_size * accumulate // divisor)
    most = max(1, batch_size // divisor)
    size = max(size for size in range(1, most + 1) if items % size == 0)
    return size, items // size


# Estimated, and measured


def peak_gigabytes(plan: Plan) -> dict[str, float]:
    """The estimated peak of each part of the plan, at its worst step, with evaluations."""
    return {part: estimate(plan, part) for part in plan.parts}


@functools.cache
def estimate(plan: Plan, part: str) -> float:
    """The estimated peak of one part in GB; nothing is computed, and no memory to speak of is taken."""
    with FakeTensorMode(), Allocations() as allocations:
        rehearse(replace(plan, device="cpu"), part)
    return allocations.peak / 1e9 + (CONTEXT_GIGABYTES if plan.device == "cuda" else 0.0)


def largest_batch(plan: Plan, limit: float) -> Plan | None:
    """The plan with the largest micro-batch whose estimate stays within `limit` GB in every part, and with the
    accumulation that keeps batch_size x accumulate what it is; None where not even single items fit."""
    fitting = (cut for cut in divisions(plan) if all(estimate(cut, part) <= limit for part in plan.parts))
    return next(fitting, None)


def measured_gigabytes(plan: Plan) -> tuple[Plan, dict[str, float]]:
    """The true peak of each part on CUDA, and the plan that it holds for: where memory runs out, in this process or
    in another, the one with the next smaller micro-batch. Raises torch.cuda.OutOfMemoryError, in all processes, when
    not even single items fit."""
    for cut in divisions(plan):
        if cut.batch_size > plan.batch_size:
            continue
        peaks = fitting_peaks(cut)
        torch.cuda.empty_cache()  # NCCL takes memory of its own
        if distributed.least(int(peaks is not None), torch.device(plan.device)):
            return cut, peaks
    raise torch.cuda.OutOfMemoryError


def fitting_peaks(plan: Plan) -> dict[str, float] | None:
    """The true peak of each part in GB, None where memory runs out."""
    try:
        return {part: measure(plan, part) for part in plan.parts}
    except torch.cuda.OutOfMemoryError:
        return None


def measure(plan: Plan, part: str) -> float:
    """The true peak of one part in GB; the GPU should hold nothing else of this process."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    rehearse(plan, part)
    return torch.cuda.max_memory_allocated() / 1e9 + CONTEXT_GIGABYTES


def divisions(plan: Plan) -> Iterator[Plan]:
    """All ways to cut the plan's batch into equal micro-batches, the largest first."""
    total = plan.batch_size * plan.accumulate
    for size in range(total, 0, -1):
        if total % size == 0:
            yield plan.cut(size)


def table(plan: Plan, limit: float, measured: dict[str, float] | None = None) -> str:
    """For people: the peak of every part, estimated and, where it was, measured; and what exceeds `limit` GB."""
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
    """Size of the latent cache: contexts and targets of so many windows in fp16; 0 where the plan needs none."""
    config = plan.config
    numbers = windows * config.latent_channels * (config.context_latents + config.chunk_latents)
    return 2 * numbers / 1e9 if "latents" in plan.parts else 0.0


def checkpoint_gigabytes(config: ModelConfig) -> float:
    """Size of the largest checkpoint: weights, their average and the optimiser's state over all of them."""
    numbers = 0
    for parameter in on_meta(config).parameters():
        state = 1 if muon.is_matrix(parameter) and not config.is_legacy else 2  # momentum, or the moments of Adam
        numbers += (2 + state) * parameter.numel()
    return 4 * numbers / 1e9


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations on tensors made while the mode was on, and that are still in use: `peak`
    is the most there were. What a kernel takes and frees within itself is not seen."""

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
    """Do once whatever the part does over and over."""
    rehearsal = Rehearsal(plan, part)
    if part == "latents":
        rehearsal.fill_cache()
        return
    rehearsal.step()
    rehearsal.evaluate()
    rehearsal.compute_gradients()  # again: now the optimiser's state lies beside the activations


class Rehearsal:
    """One part of a training on silence: what train.py holds and does in it, as far as it takes memory."""

    def __init__(self, plan: Plan, part: str):
        self.plan, self.part, self.config = plan, part, plan.config
        self.batch_size, self.accumulate = plan.batch_size, plan.accumulate
        if part == "joint":
            self.batch_size, self.accumulate = joint_batches(plan.batch_size, plan.accumulate, plan.joint_divisor)
        with torch.device(plan.device):
            self.model, self.ema = ContinuationModel(plan.config), ContinuationModel(plan.config)
        self.ema.eval().requires_grad_(False)
        self.model.requires_grad_(False)
        for module in self.trained():
            module.requires_grad_(True)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.config.is_legacy:
            self.optimiser = torch.optim.Adam(parameters, lr=0.0)
        else:
            self.optimiser = muon.Muon(parameters, lr=0.0, weight_decay=0.0)

    def trained(self) -> list[torch.nn.Module]:
        model = self.model
        if self.part == "stage1":
            return [model.encoder, model.decoder] if self.config.is_legacy else [model.encoder, *model.decoder.own()]
        return [model] if self.part == "joint" or self.config.is_legacy else [model.core]

    def step(self) -> None:
        """One optimiser step."""
        self.compute_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 0.5)

    def compute_gradients(self) -> None:
        """Of all micro-steps; from the third on they take what the second does, beside the gradients of the first."""
        for _ in range(min(self.accumulate, 2)):
            batch = self.batch()
            with self.autocast():
                loss = self.loss(batch).mean()
            loss.backward()

    def batch(self) -> dict[str, Tensor]:
        """Zeros in the shapes and types that the part's items give."""
        batch = {}
        for name, value in silent_item(self.plan, self.part).items():
            zeros = self.zeros(self.batch_size, *np.shape(value))
            batch[name] = zeros.bool() if np.asarray(value).dtype == bool else zeros
        return batch

    def loss(self, batch: dict) -> Tensor:
        """The part's loss (batch,), at the worst of the draws that a step makes."""
        if self.config.is_legacy:
            return losses.legacy_step(self.model, batch, predict=self.part == "stage2")[0]
        if self.part == "stage1":
            # without the other processes, which may have run out of memory before they came here
            return losses.reconstruct_step(self.model, batch, worst_draw(self.config))[0]
        if self.part == "stage2":
            return losses.predict_step(self.model, batch)[0]
        return losses.joint_step(self.model, batch, worst_draw(self.config))[0]

    @torch.no_grad()
    def fill_cache(self) -> None:
        """Contexts and targets, as the latent cache gets them."""
        x = self.zeros(self.plan.cache_batch, self.config.channels, 2 * self.config.chunk_samples)
        with self.autocast():
            self.ema.encode_pair(x)

    @torch.no_grad()
    def evaluate(self) -> None:
        """What takes most in an evaluation; with small batches it can be the peak."""
        config, chunk = self.config, self.config.chunk_samples
        x = self.zeros(1, config.channels, 2 * chunk)
        if config.is_legacy:
            losses.legacy_step(self.ema, {"x": x}, predict=True)
            return
        with self.autocast():
            mean, log_variance = self.ema.posterior(x[..., :chunk])
            context, target = self.ema.encode_pair(x)
            losses.fixed_time_losses(self.ema, context, target, torch.zeros_like(target))
            self.ema.generate(x[0, :, :chunk], steps=1)
        if self.part == "stage1":
            with self.autocast():
                decoded = self.ema.decode_with_levels(mean)
            losses.reconstruction_parts(self.ema, x[..., :chunk], mean, log_variance, decoded, worst_draw(config))

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.plan.device)

    def autocast(self):
        if self.plan.precision is None:
            return nullcontext()
        return torch.autocast(self.plan.device, self.plan.precision)


def silent_item(plan: Plan, part: str) -> dict:
    """What the part's data items give for one element of a batch, from a song of 20 silent seconds."""
    config = plan.config
    rows = np.zeros((2, config.channels, config.chunk_samples), np.int16)
    split = Split("train", rows, np.array([[0, 1]]), [{"id": "silence", "first_row": 0, "rows": 2}])
    windows = Windows(split, {"chunk_samples": config.chunk_samples, "sample_rate": config.sample_rate})
    crop = (config.latent_channels, plan.crop_samples // config.latent_samples)
    chunk = (config.latent_channels, config.chunk_latents)
    if config.is_legacy:
        return FixedPairItems(windows, seed=0, stage=1)[0]
    if part == "stage1":
        return CropItems(windows, crop, plan.crop_samples, seed=0)[0]
    silent, context = (np.zeros((chunk[0], length), np.float32) for length in (chunk[1], plan.config.context_latents))
    cache = SimpleNamespace(read=lambda variant, pair: (context, silent))
    return PairItems(windows, chunk, 1, 0, cache, crop if part == "joint" else None, COPIES)[0]


def worst_draw(config: ModelConfig) -> dict:
    """The draw of the spectral losses that takes most: short windows have the most bins in all, since a window needs
    one bin more than half its samples, and mid and side are made beside left and right."""
    sizes = losses.spectral_sizes(config.sample_rate)
    return {"sample_rate": config.sample_rate, "size": min(sizes), "in_mid_side": True}
