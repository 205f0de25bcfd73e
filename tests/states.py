"""A training state that is quickly saved, and what makes two states the same."""

from __future__ import annotations

import torch

from continuation import checkpoint


def small_state(step=1):
    generator = torch.Generator().manual_seed(step)
    return {
        "stage": 1,
        "step": step,
        "weights": {
            "a": torch.randn(3, 5, generator=generator),
            "b": torch.tensor(2.5, dtype=torch.bfloat16),
        },
        "optimiser": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]},
        "early_stop": {"best": float("inf"), "bad": 0, "on": True, "note": None},
        "rng": checkpoint.rng_state(),
        "command": ["train.py", "--dataset_folder", "Ä b"],
    }


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other
