"""The networks of the tests: so small that a test of one takes milliseconds, and their checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from continuation import checkpoint
from continuation.context import Context
from model import ContinuationModel, ModelConfig, make_model, with_overrides

RATE = 2000
CHUNK = 2 * RATE
SIZES = {
    "encoder_widths": (8, 8), "encoder_blocks": (1, 1), "decoder_widths": (8, 8), "decoder_blocks": (1, 1),
    "latent_channels": 4, "core_layers": 1, "core_width": 16, "core_heads": 2, "latents_per_token": 4,
}  # fmt: skip


def small_config(preset: str = "tiny", **fields) -> ModelConfig:
    """Small sizes of `tiny`, or `legacy`, which has no others; chunks of 2 s, unless `fields` say otherwise."""
    sizes = {} if preset == "legacy" else SIZES
    return with_overrides(preset, **sizes | {"sample_rate": RATE, "chunk_samples": CHUNK} | fields)


def untrained_network(preset: str = "tiny", **fields) -> ContinuationModel:
    """A network as it is made, in eval mode and without gradients."""
    torch.manual_seed(0)
    return make_model(small_config(preset, **fields)).eval().requires_grad_(False)


def small_network(preset: str = "tiny", **fields) -> ContinuationModel:
    """The same with random weights in the core: as it is made, it predicts zero whatever the context is."""
    model = untrained_network(preset, **fields)
    torch.manual_seed(0)
    for weights in model.core.parameters():
        nn.init.normal_(weights, 0, 0.3)
    return model


def write_checkpoint(folder: Path, model: ContinuationModel, stage: int = 2, trained_on=()) -> Path:
    """A folder with the best.pt of a network that was trained on songs of these ids."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"config": dataclasses.asdict(model.config), "ema": model.state_dict(), "stage": stage, "step": 5}
    songs = [{"id": name, "split": "train"} for name in trained_on]
    checkpoint.save(folder / "best.pt", state | {"data_meta": {"songs": songs}})
    return folder


def noise(*shape: int, seed: int = 0, level: float = 1.0) -> torch.Tensor:
    return level * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_context(seed: int = 1, items: int = 2) -> Context:
    """Latents and an outlook that have nothing to do with each other."""
    shapes = small_config().pair_shapes
    return Context(noise(items, *shapes["context"], seed=seed), noise(items, *shapes["outlook"], seed=seed + 100))
