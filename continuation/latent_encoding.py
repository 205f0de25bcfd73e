"""Encoding of all training windows before stage 2, by all processes, into the latent cache (latent_cache.py)."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from continuation import checkpoint, distributed, files, stages
from continuation.batches import WindowItems
from continuation.latent_cache import LatentCache
from continuation.progress import tracked
from continuation.training_state import TrainingState
from continuation.windows import Windows

CACHE_BATCH = 4  # windows per batch and process
CACHE_VERSION = 3  # raised when windows, copies, outlook or the equaliser's features change


def cache_key(state: TrainingState) -> str:
    """Hash everything that the cached latents depend on: encoder, dataset, seed of the windows, and versions."""
    key = [state.meta, state.args.seed, checkpoint.FORMAT_VERSION, CACHE_VERSION]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
    for tensor in state.ema.encoder.state_dict().values():
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def fill_cache(state: TrainingState, windows: Windows, cache: LatentCache, after_batch: Callable[[], None]) -> None:
    """Encode the variants that the cache lacks, and set the mean and standard deviation by which the models
    standardise latents. after_batch: called after every batch; it may raise to end the run."""
    missing = missing_variants(state, cache) if distributed.is_main() else []
    is_missing = torch.tensor([float(v in missing) for v in range(cache.variants)], device=state.device)
    started = time.monotonic()
    for variant in distributed.broadcast(is_missing).nonzero().flatten().tolist():
        fill_variant(state, windows, cache, variant, after_batch)
        if distributed.is_main():
            files.write_atomic(cache.folder / "key.json", cache.index(variant))
        now = time.monotonic()
        seconds = torch.tensor(now - started, dtype=torch.float64, device=state.device)
        state.seconds[2] += distributed.broadcast(seconds).item()
        started = now
    distributed.barrier()
    for name, value in zip(("latent_mean", "latent_std"), cache.statistics(), strict=True):
        for model in (state.model, state.ema):
            getattr(model, name).copy_(torch.from_numpy(value))


def missing_variants(state: TrainingState, cache: LatentCache) -> list[int]:
    """Open the cache for this run's encoder, and return the variants to encode."""
    cache.begin(state.cached_by or cache_key(state))
    missing = cache.missing()
    if missing and state.cached_by:
        print("warning: the latent cache is not as this run left it: latents are encoded anew, and the run "
              "will not be bit-identical to an undisturbed one", file=sys.stderr)  # fmt: skip
        cache.begin(cache_key(state))
        missing = cache.missing()
    state.cached_by = cache.key
    return missing


def fill_variant(
    state: TrainingState,
    windows: Windows,
    cache: LatentCache,
    variant: int,
    after_batch: Callable[[], None],
) -> None:
    """Encode one variant on all processes; process 0 writes it."""
    title = f"stage 2  caching latents, variant {variant + 1} of {cache.variants}"
    print(title, flush=True)
    starts = range(0, len(windows), CACHE_BATCH * distributed.world_size())
    batches = encoded_batches(state, windows, variant, starts)
    if not distributed.is_main():
        for _ in batches:
            after_batch()
        return

    with ExitStack() as stack:
        writers = {
            part: stack.enter_context(files.ArrayWriter(cache.path(part, variant), np.float16, cache.shapes[part]))
            for part in cache.PARTS
        }
        for batch in tracked(batches, len(starts), title):
            for part, encoded in batch.items():
                writers[part].append(encoded.cpu().numpy())
            after_batch()


def encoded_batches(
    state: TrainingState, windows: Windows, variant: int, starts: range
) -> Iterator[dict[str, Tensor]]:
    """Yield the encoded training windows in order, part -> fp16 (windows, ...); starts: first pair of each batch.
    Every process encodes its share of a batch; the last batch is filled up with the last pair, which is cut off
    again."""
    own = [first + CACHE_BATCH * distributed.rank() + i for first in starts for i in range(CACHE_BATCH)]
    numbers = [min(pair, len(windows) - 1) for pair in own]
    items = WindowItems(windows, variant, state.args.seed)
    loader = stages.make_loader(items, numbers, CACHE_BATCH, state.device, state.args.num_workers)
    for first, batch in zip(starts, loader, strict=True):
        with torch.no_grad(), state.autocast():
            parts = state.ema.encode_pair(batch["x"].to(state.device))
        yield {name: distributed.all_gather(z.half())[: len(windows) - first] for name, z in parts.items()}
