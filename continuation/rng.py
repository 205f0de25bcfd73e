"""Generators of random draws, each keyed by seed, purpose and number: nothing depends on what was drawn before."""

import numpy as np

STREAMS = {
    "order": 0,
    "crop": 1,
    "pair": 2,
    "window": 3,
    "spectral": 4,
    "validation": 5,
    "dropout": 6,
    "other_passage": 7,
}


def make_rng(seed: int, stream: str, *key: int) -> np.random.Generator:
    """Make the generator of one random draw from its key alone, so that resuming and data workers change nothing."""
    return np.random.default_rng([seed, STREAMS[stream], *key])
