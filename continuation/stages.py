"""The phases of both training stages, the optimiser, and the loader of batches.

Stage 1 is one phase, reconstruction. Stage 2 has two, which share steps, optimiser and schedule: prediction on cached
latents, then core and codec side by side. A phase supplies its trained parts, its items and its loss; the loop of
train.py is the same for all of them.
"""

import argparse
import math
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from continuation import distributed, losses, muon, signals
from continuation.batches import CropItems, FixedPairItems, JointItems, PairItems
from continuation.latent_cache import LatentCache
from continuation.rng import make_rng
from continuation.windows import Windows

CROP_SECONDS = 1  # length of an item of stage 1
WEIGHT_DECAY = 0.01
JOINT_CODEC_RATE = 0.1  # of the learning rate: that of encoder and decoder in the joint part
CUDA_WORKERS = 4  # processes that read data, by default


# Phases


class Phase:
    """A part of a stage.

    name: the `phase` of metrics.jsonl; stage: 1 or 2; reads_cache: whether its items are cached latents.
    has_constant_rate: whether its learning rate neither warms up nor cools down.
    end: progress of its stage, 0..1, at which it ends.
    args: the command line; seed, batch_size, accumulate and latent_variants are used.
    """

    name: str
    stage: int
    reads_cache = has_constant_rate = False

    def __init__(self, config, args: argparse.Namespace, end: float):
        self.config, self.args, self.end = config, args, end
        self.batch_size, self.accumulate = args.batch_size, args.accumulate

    def trained(self, model: nn.Module) -> list[nn.Module]:
        """Return the parts of the network that are trained."""
        raise NotImplementedError

    def items(self, windows: Windows, cache: LatentCache | None):
        """Make the training items by number, each a dict of arrays; cache: None unless `reads_cache`."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss (batch,) and its parts."""
        raise NotImplementedError

    def pairs_an_epoch(self, windows: Windows) -> int:
        """Return the number of pairs per epoch; windows: of the training split."""
        return len(windows)

    def stft_settings(self, step: int) -> dict:
        """Draw window length and stereo basis of the spectral losses of a step."""
        rng = make_rng(self.args.seed, "spectral", self.stage, step)
        sizes = losses.spectral_sizes(self.config.sample_rate)
        return {
            "sample_rate": self.config.sample_rate,
            "size": int(rng.choice(sizes)),
            "in_mid_side": bool(rng.integers(2)),
        }

    def crop_noise_shape(self) -> tuple[int, int]:
        """Return the shape of the noise on a crop's latents: (latent_channels, latents)."""
        return self.config.latent_channels, crop_samples(self.config) // self.config.latent_samples


class Reconstruct(Phase):
    """Stage 1: encoder and decoder are trained to reconstruct."""

    name, stage = "reconstruct", 1
    mean_over_processes = staticmethod(distributed.all_reduce_mean)  # of the latents' statistics

    def trained(self, model):
        return [model.encoder, model.decoder]

    def items(self, windows, cache):
        return CropItems(windows, self.crop_noise_shape(), crop_samples(self.config), self.args.seed, self.stage)

    def loss(self, model, batch, step):
        return losses.reconstruct_step(model, batch, self.stft_settings(step), average=self.mean_over_processes)


class Predict(Phase):
    """Stage 2a: the core is trained on cached latents, which stay valid since encoder and decoder are frozen."""

    name, stage, reads_cache = "predict", 2, True

    def trained(self, model):
        return [model.core]

    def items(self, windows, cache):
        shape = self.config.pair_shapes["target"]
        return PairItems(len(windows), shape, self.args.latent_variants, self.args.seed, cache)

    def loss(self, model, batch, step):
        return losses.predict_step(model, batch)


class Joint(Predict):
    """Stage 2b: core and codec are trained side by side, each by its own loss, with common steps, schedule and
    gradient clipping. Pairs still come from the cache, since the encoder changes little and encoding them again
    would take half of the time: so no gradient passes from the core to the encoder."""

    name = "joint"

    def trained(self, model):
        return [model.core, model.encoder, model.decoder]

    def items(self, windows, cache):
        crops = CropItems(windows, self.crop_noise_shape(), crop_samples(self.config), self.args.seed, self.stage)
        return JointItems(crops, super().items(windows, cache))

    def loss(self, model, batch, step):
        return losses.joint_step(model, batch, self.stft_settings(step))


class Legacy(Phase):
    """Either stage of the legacy network: fixed pairs, squared error of the waveform, nothing frozen, no cache."""

    name, has_constant_rate = "legacy", True

    def __init__(self, config, args, end: float, stage: int):
        super().__init__(config, args, end)
        self.stage = stage

    def trained(self, model):
        return [model.encoder, model.decoder] + ([model.core] if self.stage == 2 else [])

    def items(self, windows, cache):
        return FixedPairItems(windows, self.args.seed, self.stage)

    def loss(self, model, batch, step):
        return losses.legacy_step(model, batch, predict=self.stage == 2)

    def pairs_an_epoch(self, windows):
        return len(self.items(windows, None).pairs)  # fixed ones, about half of all


def phases_of(stage: int, config, args: argparse.Namespace) -> list[Phase]:
    """Make the phases of a stage, in order."""
    if config.is_legacy:
        return [Legacy(config, args, 1.0, stage)]
    if stage == 1:
        return [Reconstruct(config, args, 1.0)]
    share = args.joint_share
    return [Predict(config, args, 1.0 - share)] * (share < 1) + [Joint(config, args, 1.0)] * (share > 0)


def crop_samples(config) -> int:
    """Return the samples of an item of stage 1."""
    return min(int(CROP_SECONDS * config.sample_rate), config.chunk_samples)


# Trained parameters


def freeze_all_but(model: nn.Module, parts: list[nn.Module]) -> None:
    """Let only `parts` of the network have gradients."""
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


def make_optimiser(model: nn.Module, stage: int, learning_rate: float) -> torch.optim.Optimizer:
    """Make the optimiser of all parameters that the stage trains in any phase; frozen ones have no gradient and are
    not changed.

    Each group's learning rate is `scale` times the run's.
    """
    if model.config.is_legacy:
        return torch.optim.Adam([{"params": model.parameters(), "scale": 1.0}], lr=learning_rate)
    codec = parameters_of(model.encoder, model.decoder)
    if stage == 1:
        groups = [{"params": codec, "scale": 1.0}]
    else:
        core = [p for name, p in model.core.named_parameters() if not name.startswith("equaliser.")]
        groups = [{"params": core, "scale": 1.0}, {"params": codec, "scale": JOINT_CODEC_RATE}]
        groups += [{"params": parameters_of(model.core.equaliser), "scale": 1.0}]  # last: format 10 has none
    return muon.Muon(groups, lr=learning_rate, weight_decay=WEIGHT_DECAY)


def parameters_of(*parts: nn.Module) -> list[nn.Parameter]:
    """List the parameters of the parts."""
    return [parameter for part in parts for parameter in part.parameters()]


# Batches


def make_loader(
    items, numbers: Iterable[int], batch_size: int, device: torch.device, num_workers: int | None
) -> DataLoader:
    """Make the loader of the items with these numbers, in batches; num_workers None: 4 on CUDA, 0 on the CPU."""
    if num_workers is None:
        num_workers = CUDA_WORKERS if device.type == "cuda" else 0
    return DataLoader(
        items,
        batch_size=batch_size,
        sampler=numbers,
        num_workers=num_workers,
        # fork even where it is not the default: other methods would copy the whole dataset into each worker
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=signals.ignore_termination,
        generator=torch.Generator(),  # else every restart would draw from the global generator
    )


# Amount of training


def items_a_step(args: argparse.Namespace) -> int:
    """Return the items per optimiser step, of all processes."""
    return args.batch_size * args.accumulate * distributed.world_size()


def print_stages(config, args: argparse.Namespace, windows: Windows, first: int) -> None:
    """Print steps and epochs of every phase of the stages from `first` on; windows: of the training split."""
    items = items_a_step(args)
    for stage, stage_steps in ((1, args.stage1_steps), (2, args.stage2_steps))[first - 1 :]:
        begin = 0
        for phase in phases_of(stage, config, args):
            end = math.ceil(stage_steps * phase.end)
            if steps := end - begin:
                name = f"stage {stage}, joint part" if phase.name == Joint.name else f"stage {stage}"
                epochs = steps * items / phase.pairs_an_epoch(windows)
                print(f"{name}: {steps} steps of {items} items, {epochs:.1f} epochs")
            begin = end
