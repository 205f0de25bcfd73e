"""The exported file holds the network alone, is small, and plays what best.pt plays."""

from __future__ import annotations

import dataclasses

import export_weights
import numpy as np
import pytest
import soundfile
import synth
import torch

import generate
from continuation import checkpoint
from model import PRESETS, ContinuationModel, load_model

CONFIG = PRESETS["tiny"]
SONGS = [{"id": "a", "source": "a.mp3", "split": "train", "sha256": "0", "fingerprint": ""}]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with the best.pt of an untrained tiny network, whose core says something."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model = ContinuationModel(CONFIG)
    for weights in model.core.parameters():
        torch.nn.init.normal_(weights, 0, 0.02)
    state = {"config": dataclasses.asdict(CONFIG), "ema": model.state_dict(), "stage": 2, "step": 5}
    state |= {"weights": model.state_dict(), "optimiser": {"state": {}}, "command": "python train.py"}
    checkpoint.save(folder / "best.pt", state | {"data_meta": {"songs": SONGS}, "versions": checkpoint.versions()})
    return folder


def export(folder, target) -> int:
    return export_weights.main(export_weights.parse_args([str(folder), str(target)]))


def test_exported_file_holds_the_network_alone_in_half_precision(checkpoints, tmp_path, capsys):
    path = tmp_path / "pretrained" / "tiny.pt"
    assert export(checkpoints, path) == 0
    assert path.stat().st_size < 10e6
    assert f"{path}: {path.stat().st_size / 1e6:.2f} MB" in capsys.readouterr().out
    state = checkpoint.load(path)
    assert state.keys() == {"format", "checksum", "config", "ema", "stage", "step", "data_meta", "versions"}
    assert {weights.dtype for weights in state["ema"].values()} == {torch.float16}
    assert {weights.dtype for weights in load_model(path).state_dict().values()} == {torch.float32}


@pytest.mark.slow
def test_exported_file_plays_what_best_plays(checkpoints, tmp_path, monkeypatch):
    song = synth.write(tmp_path / "song.wav", 0.3 * synth.song(1, 11, CONFIG.sample_rate), CONFIG.sample_rate)
    assert export(checkpoints, tmp_path / "tiny.pt") == 0
    monkeypatch.setattr(generate, "PRETRAINED", tmp_path / "tiny.pt")
    sounds = []
    for name, flags in (("best", ["--checkpoint_folder", str(checkpoints)]), ("tiny", [])):
        output = tmp_path / f"{name}.wav"
        flags += ["--input", str(song), "--output", str(output), "--seconds", "2", "--steps", "2"]
        assert generate.main(generate.parse_args(flags)) == 0
        sounds.append(soundfile.read(output)[0])
    difference, level = (np.sqrt(np.mean(np.square(x))) for x in (sounds[0] - sounds[1], sounds[0]))
    assert difference < 0.01 * level


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"stage": 1}, "is still in stage 1"), ({"ema": {"a": torch.tensor([1e6])}}, "half precision cannot hold")],
)
def test_what_cannot_be_exported_is_refused(checkpoints, tmp_path, capsys, change, sentence):
    checkpoint.save(tmp_path / "best.pt", checkpoint.load(checkpoints / "best.pt") | change)
    assert export(tmp_path, tmp_path / "tiny.pt") == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "tiny.pt").exists()


def test_names_that_no_file_can_have_are_refused(checkpoints, tmp_path):
    assert export(tmp_path, tmp_path / "tiny.pt") == 2
    assert export(checkpoints, tmp_path / "tiny") == 2
