"""Items of the training batches, by number, each a dict of arrays.

    items = CropItems(windows, noise_shape, crop_samples, seed, stage=1)
    items[17]["x"]                                          # float32 (channels, crop_samples)

Keys and shapes of a batch (batch = items a process and micro-step), all float32:

stage 1 (CropItems)     x                                   (batch, channels, samples of 1 s)
                        posterior_noise, robust_noise       (batch, latent_channels, latents of 1 s)
stage 2a (PairItems)    context, target                     (batch, latent_channels, latents of a chunk)
                        outlook                             (batch, 2 * channels * bands, 25 a second)
                        features                            (batch, channels, FEATURES, bands of 1/24 octave)
                        correction                          (batch, channels, bands of 1/24 octave)
                        flow_noise, context_noise           as target
                        time, context_share                 (batch,)
stage 2b (JointItems)   those of stage 1 and of stage 2a
legacy (FixedPairItems) x                                   (batch, channels, 2 * chunk)

Every random draw has its own generator, keyed by seed, purpose, stage and item number (rng.make_rng): an item does
not depend on the process that reads it, nor on what was read before. So the number of the next item is all that a run
needs to resume.
"""

from __future__ import annotations

import itertools

import numpy as np

from continuation.rng import make_rng
from continuation.windows import Augmentation, Windows

TIME_SHIFT = 3  # of the flow's times towards noise, where the prediction depends on the context alone


class PairSampler:
    """Mapping from item number to pair: every epoch visits all pairs once, in a new random order."""

    def __init__(self, pairs: int, seed: int, stage: int):
        self.pairs, self.seed, self.stage = pairs, seed, stage
        self.epoch, self.permutation = -1, np.empty(0, int)

    def __getitem__(self, item: int) -> int:
        epoch, position = divmod(item, self.pairs)
        if epoch != self.epoch:
            self.epoch = epoch
            self.permutation = make_rng(self.seed, "order", self.stage, epoch).permutation(self.pairs)
        return int(self.permutation[position])


def items_of_rank(first: int, batch_size: int, rank: int, processes: int):
    """Yield, without end, the numbers of the items that process `rank` reads, from `first` on: one of every
    `processes` batches."""
    for start in itertools.count(first + rank * batch_size, processes * batch_size):
        yield from range(start, start + batch_size)


class CropItems:
    """Items of stage 1, and of the joint part of stage 2, with other draws in each: x, a random crop of audio
    (channels, crop_samples), and the noise for its latents."""

    def __init__(self, windows: Windows, noise_shape: tuple[int, int], crop_samples: int, seed: int, stage: int):
        self.windows, self.noise_shape, self.crop_samples = windows, noise_shape, crop_samples
        self.seed, self.stage = seed, stage
        self.sampler = PairSampler(len(windows), seed, stage)

    def __getitem__(self, item: int) -> dict:
        rng = make_rng(self.seed, "crop", self.stage, item)
        change = Augmentation.sample(rng)
        x = self.windows.crop(self.sampler[item], self.crop_samples, change, rng.uniform())
        return {"x": x, **sample_latent_noise(rng, self.noise_shape)}


def sample_latent_noise(rng: np.random.Generator, shape: tuple[int, int]) -> dict:
    """Sample the noise of the reparametrisation, and noise of a random strength 0..1 that makes decoding robust;
    shape: (latent_channels, latents)."""
    posterior, robust = rng.standard_normal((2, *shape), dtype=np.float32)
    return {"posterior_noise": posterior, "robust_noise": robust * np.float32(rng.uniform())}


class PairItems:
    """Items of stage 2: an encoded pair from the latent cache (see ContinuationModel.encode_pair), and the random
    inputs of the flow (see `sample_flow`)."""

    def __init__(self, pairs: int, shape: tuple[int, int], variants: int, seed: int, cache):
        """shape: (latent_channels, latents) of a chunk; cache: a LatentCache."""
        self.shape, self.variants, self.seed, self.cache = shape, variants, seed, cache
        self.sampler = PairSampler(pairs, seed, stage=2)

    def __getitem__(self, item: int) -> dict:
        rng = make_rng(self.seed, "pair", item)
        variant = int(rng.integers(self.variants))
        return self.cache.read(variant, self.sampler[item]) | sample_flow(rng, self.shape)


class JointItems:
    """Items of the joint part of stage 2: a crop, as in stage 1, and an encoded pair."""

    def __init__(self, crops: CropItems, pairs: PairItems):
        self.crops, self.pairs = crops, pairs

    def __getitem__(self, item: int) -> dict:
        return self.crops[item] | self.pairs[item]


class WindowItems:
    """Augmented windows that one variant of the latent cache encodes, by pair: x (channels, 2 * chunk)."""

    def __init__(self, windows: Windows, variant: int, seed: int):
        self.windows, self.variant, self.seed = windows, variant, seed

    def __getitem__(self, pair: int) -> dict:
        change = Augmentation.sample(make_rng(self.seed, "window", self.variant, pair))
        return {"x": self.windows.window(pair, 2, change)}


class FixedPairItems:
    """Items of the legacy network: the pairs (0, 1), (2, 3), ... of every song without augmentation, x (channels, 2 *
    chunk)."""

    def __init__(self, windows: Windows, seed: int, stage: int):
        self.windows = windows
        rows = windows.split.pairs[:, 0]
        first_rows = np.array([song["first_row"] for song in windows.split.songs])[windows.song_of_pair]
        self.pairs = np.flatnonzero((rows - first_rows) % 2 == 0)
        self.sampler = PairSampler(len(self.pairs), seed, stage)

    def __getitem__(self, item: int) -> dict:
        return {"x": self.windows.pair(int(self.pairs[self.sampler[item]]))}


def sample_flow(rng: np.random.Generator, shape: tuple[int, int]) -> dict:
    """Sample the random inputs of the rectified flow for one item; shape: (latent_channels, latents).

    time: logit-normal, shifted towards noise (Esser et al. 2024), 0 in 15 % of the samples. context_share: the share
    of the context that is given, all in 70 %, only its end in 20 %, nothing in 10 %. context_noise: added to the
    context's latents, in half of the samples.
    """
    flow_noise, context_noise = rng.standard_normal((2, *shape), dtype=np.float32)
    time = 0.0 if rng.random() < 0.15 else 1 / (1 + TIME_SHIFT * np.exp(-rng.standard_normal()))
    share = rng.choice((1.0, rng.uniform(0.1, 1.0), 0.0), p=(0.7, 0.2, 0.1))
    strength = rng.uniform(0, 0.3) if rng.random() < 0.5 else 0.0
    return {
        "flow_noise": flow_noise,
        "context_noise": context_noise * np.float32(strength),
        "time": np.float32(time),
        "context_share": np.float32(share),
    }
