"""What is trained in which order: the phases of both stages, the optimiser, and how batches are read.

Stage 1 is one phase, reconstruction. Stage 2 has two, which share steps, optimiser and schedule: prediction on cached
latents, then the full network. A phase supplies its trained parts, its items and its loss; the loop of train.py is
the same for all of them.
"""

import argparse
import math
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from continuation import distributed, losses, muon, signals
from continuation.latent_cache import LatentCache
from continuation.windows import CropItems, FixedPairItems, JointItems, PairItems, Windows, make_rng

CROP_SECONDS = 1  # of audio in one item of stage 1
WEIGHT_DECAY = 0.01
JOINT_CODEC_RATE = 0.1  # of the learning rate, for encoder and decoder in the joint part
CUDA_WORKERS = 4  # processes that read data, by default


# Phases


class Phase:
    """A part of a stage.

    name: as metrics.jsonl has it; stage: 1 or 2; reads_cache: whether its items are cached latents.
    end: the progress of its stage, 0..1, at which it ends.
    args: of the command line; seed, batch_size, accumulate and latent_variants are used.
    """

    name: str
    stage: int
    reads_cache = False

    def __init__(self, config, args: argparse.Namespace, end: float):
        self.config, self.args, self.end = config, args, end
        self.batch_size, self.accumulate = args.batch_size, args.accumulate

    def trained(self, model: nn.Module) -> list[nn.Module]:
        """The parts of the network that learn."""
        raise NotImplementedError

    def items(self, windows: Windows, cache: LatentCache | None):
        """The training items by number, each a dict of arrays; `cache` where `reads_cache` says so."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (batch,) and its parts."""
        raise NotImplementedError

    def spectral_draw(self, step: int) -> dict:
        """Window length and stereo basis of the spectral losses at this step."""
        rng = make_rng(self.args.seed, "spectral", self.stage, step)
        sizes = losses.spectral_sizes(self.config.sample_rate)
        return {
            "sample_rate": self.config.sample_rate,
            "size": int(rng.choice(sizes)),
            "in_mid_side": bool(rng.integers(2)),
        }

    def crop_noise_shape(self) -> tuple[int, int]:
        """Shape of the noise on the latents of a crop: (latent_channels, latents)."""
        return self.config.latent_channels, crop_samples(self.config) // self.config.latent_samples


class Reconstruct(Phase):
    """Stage 1: encoder and decoder learn to reconstruct."""

    name, stage = "reconstruct", 1
    mean_over_processes = staticmethod(distributed.all_reduce_mean)  # of the latents' statistics

    def trained(self, model):
        return [model.encoder, model.decoder]

    def items(self, windows, cache):
        return CropItems(windows, self.crop_noise_shape(), crop_samples(self.config), self.args.seed)

    def loss(self, model, batch, step):
        return losses.reconstruct_step(model, batch, self.spectral_draw(step), average=self.mean_over_processes)


class Predict(Phase):
    """Stage 2a: the core learns on cached latents; encoder and decoder stay frozen, or else the cache would age."""

    name, stage, reads_cache = "predict", 2, True

    def trained(self, model):
        return [model.core]

    def items(self, windows, cache):
        shape = self.config.pair_shapes["target"]
        return PairItems(len(windows), shape, self.args.latent_variants, self.args.seed, cache)

    def loss(self, model, batch, step):
        return losses.predict_step(model, batch)


class Joint(Predict):
    """Stage 2b: the full network learns, nothing frozen. Pairs are still those of the cache, which the encoder hardly
    leaves behind: encoding them anew would take half of the time."""

    name = "joint"

    def trained(self, model):
        return [model.core, model.encoder, model.decoder]

    def items(self, windows, cache):
        crops = CropItems(windows, self.crop_noise_shape(), crop_samples(self.config), self.args.seed)
        return JointItems(crops, super().items(windows, cache))

    def loss(self, model, batch, step):
        return losses.joint_step(model, batch, self.spectral_draw(step))


class Legacy(Phase):
    """Either stage of the legacy network: fixed pairs, squared error of the waveform, nothing frozen, no cache."""

    name = "legacy"

    def __init__(self, config, args, end: float, stage: int):
        super().__init__(config, args, end)
        self.stage = stage

    def trained(self, model):
        return [model.encoder, model.decoder] + ([model.core] if self.stage == 2 else [])

    def items(self, windows, cache):
        return FixedPairItems(windows, self.args.seed, self.stage)

    def loss(self, model, batch, step):
        return losses.legacy_step(model, batch, predict=self.stage == 2)


def phases_of(stage: int, config, args: argparse.Namespace) -> list[Phase]:
    """The phases of a stage, in their order."""
    if config.is_legacy:
        return [Legacy(config, args, 1.0, stage)]
    if stage == 1:
        return [Reconstruct(config, args, 1.0)]
    share = args.joint_share
    return [Predict(config, args, 1.0 - share)] * (share < 1) + [Joint(config, args, 1.0)] * (share > 0)


def crop_samples(config) -> int:
    """Samples of an item of stage 1."""
    return min(int(CROP_SECONDS * config.sample_rate), config.chunk_samples)


# What learns


def freeze_all_but(model: nn.Module, parts: list[nn.Module]) -> None:
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


def make_optimiser(model: nn.Module, stage: int, learning_rate: float) -> torch.optim.Optimizer:
    """Make the optimiser of all that the stage ever trains; frozen parameters have no gradient and stay untouched.

    The `scale` of each of its groups is that of the group's learning rate.
    """
    if model.config.is_legacy:
        return torch.optim.Adam([{"params": model.parameters(), "scale": 1.0}], lr=learning_rate)
    codec = parameters_of(model.encoder, model.decoder)
    if stage == 1:
        groups = [{"params": codec, "scale": 1.0}]
    else:
        core = parameters_of(model.core)
        groups = [{"params": core, "scale": 1.0}, {"params": codec, "scale": JOINT_CODEC_RATE}]
    return muon.Muon(groups, lr=learning_rate, weight_decay=WEIGHT_DECAY)


def parameters_of(*parts: nn.Module) -> list[nn.Parameter]:
    return [parameter for part in parts for parameter in part.parameters()]


# Batches


def make_loader(
    items, numbers: Iterable[int], batch_size: int, device: torch.device, num_workers: int | None
) -> DataLoader:
    """Make the loader of batches of the items of these numbers; num_workers None: 4 on CUDA, 0 on the CPU."""
    if num_workers is None:
        num_workers = CUDA_WORKERS if device.type == "cuda" else 0
    return DataLoader(
        items,
        batch_size=batch_size,
        sampler=numbers,
        num_workers=num_workers,
        # forked, also where that is not the default: anything else would copy the whole dataset into each
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=signals.ignore_termination,
        generator=torch.Generator(),  # or else every restart would draw a number from the global one
    )


# How much is trained


def pairs_an_epoch(args: argparse.Namespace, windows: Windows) -> int:
    """Pairs of these training windows: legacy has fixed ones, about half of them."""
    return len(FixedPairItems(windows, args.seed, 1).pairs) if args.preset == "legacy" else len(windows)


def items_a_step(args: argparse.Namespace) -> int:
    """Items of an optimiser step, over all processes."""
    return args.batch_size * args.accumulate * distributed.world_size()


def print_stages(args: argparse.Namespace, windows: Windows, first: int) -> None:
    """Print steps and epochs on these windows of the stages from `first` on."""
    joint_share = 0 if args.preset == "legacy" else args.joint_share
    before_joint = math.ceil(args.stage2_steps * (1 - joint_share))
    items = items_a_step(args)
    for stage, name, steps in (
        (1, "stage 1", args.stage1_steps),
        (2, "stage 2", before_joint),
        (2, "stage 2, joint part", args.stage2_steps - before_joint),
    ):
        if stage >= first and steps:
            epochs = steps * items / pairs_an_epoch(args, windows)
            print(f"{name}: {steps} steps of {items} items, {epochs:.1f} epochs")
