"""Fixtures of the tests of training: one dataset, one undisturbed run, and runs that have not begun."""

from __future__ import annotations

import functools
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import TINY, write_dataset

import train
from continuation import plots, validation


@contextmanager
def shortened():
    """Pictures have tests of their own, and drawing one takes longer than a stage here; two pairs are decoded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "plot_curves", lambda path, records: None)
        patch.setattr(validation, "DECODED", 1)
        yield


@pytest.fixture(scope="module", autouse=True)
def short_evaluations():
    torch.set_num_threads(1)
    with shortened():
        yield


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="session")
def command(dataset):
    """Run train.py's main with flags, in this process: its exit code."""

    def run(folder: Path, flags: str = TINY, more: str = "") -> int:
        argv = ["--dataset_folder", dataset, "--checkpoint_folder", folder, *flags.split(), *more.split()]
        return train.main(train.parse_args([str(word) for word in argv]))

    return run


@pytest.fixture(scope="session")
def undisturbed(command, tmp_path_factory) -> Path:
    """The checkpoint folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "ck"
    with shortened():
        assert command(folder) == 0
    return folder


@pytest.fixture(scope="session")
def begin(dataset):
    """A Run that has not begun, in a folder, with flags."""

    def make(folder: Path, flags: str = TINY, more: str = "") -> train.Run:
        folder.mkdir(exist_ok=True)
        argv = ["--dataset_folder", str(dataset), "--checkpoint_folder", str(folder), *flags.split(), *more.split()]
        return train.Run(train.parse_args(argv))

    return make


@pytest.fixture
def new_run(begin, tmp_path):
    """The same in a folder of the test's own."""
    return functools.partial(begin, tmp_path / "run")


@pytest.fixture
def stop_after(monkeypatch):
    """Let a SIGTERM come in the midst of the given training steps, counted over all stages and restarts."""

    def arrange(*steps: int) -> None:
        taken = iter(range(1, 1000))
        train_step = train.train_step

        def step_and_signal(*given):
            if next(taken) in steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(*given)

        monkeypatch.setattr(train, "train_step", step_and_signal)

    return arrange
