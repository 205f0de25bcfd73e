"""Fixtures of the tests of the evaluation: one dataset, a checkpoint of every kind, and one whole evaluation."""

import pytest
import torch
from evaluation_helpers import FORMAT, arguments, read_card, write_dataset
from small_networks import small_network, write_checkpoint

import evaluate
from continuation.dataset import open_dataset
from continuation.pairs import Pairs
from continuation.windows import Windows


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A checkpoint of every kind, and one that is still in stage 1."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return [
        write_checkpoint(folder / "flow", small_network(**FORMAT)),
        write_checkpoint(folder / "mse", small_network(objective="mse", **FORMAT), trained_on=["test-0"]),
        write_checkpoint(folder / "legacy", small_network("legacy", **FORMAT)),
        write_checkpoint(folder / "young", small_network(**FORMAT), stage=1),
    ]


@pytest.fixture(scope="session")
def scores(dataset, checkpoints, tmp_path_factory):
    """The output folder of a whole evaluation, made once."""
    folder = tmp_path_factory.mktemp("scores") / "scores"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "SHOWN_SONGS", 1)
        patch.setattr(evaluate, "LONG_SONGS", 1)
        assert evaluate.main(arguments(dataset, checkpoints, folder)) == 0
    return folder


@pytest.fixture
def briefly(monkeypatch):
    monkeypatch.setattr(evaluate, "SHOWN_SONGS", 0)
    monkeypatch.setattr(evaluate, "LONG_SONGS", 0)


@pytest.fixture(scope="session")
def card(scores):
    return read_card(scores)


@pytest.fixture(scope="session")
def pairs(dataset):
    meta, splits = open_dataset(dataset)
    return Pairs(Windows(splits["test"], meta), 2)


@pytest.fixture
def network(dataset, checkpoints):
    """Load a checkpoint of the fixture by its folder's name."""

    def load(name):
        meta, _ = open_dataset(dataset)
        folder = next(folder for folder in checkpoints if folder.name == name)
        return evaluate.load_networks(arguments(dataset, [folder], "unused"), meta)[0]

    return load
