"""Fine-tuning: a run starts from the weights of another one, on whatever dataset that was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny import TINY, assert_same_tensors, write_dataset

import train
from continuation import checkpoint


@pytest.fixture(scope="session")
def other_dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "other", first_seed=50)


@pytest.fixture
def arguments(other_dataset, tmp_path):
    """Parsed arguments of train.py on another dataset, with flags."""

    def parse(more: str, dataset: Path = other_dataset):
        folders = ["--dataset_folder", str(dataset), "--checkpoint_folder", str(tmp_path / "ck")]
        return train.parse_args([*folders, *TINY.split(), *more.split()])

    return parse


@pytest.fixture
def prepared(arguments, tmp_path):
    """A run that has not begun, with flags."""

    def prepare(more: str) -> train.Run:
        (tmp_path / "ck").mkdir()
        return train.prepare(arguments(more))

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "best.pt"])
def test_run_starts_stage_1_from_the_averaged_weights_with_a_new_optimiser(undisturbed, prepared, capsys, name):
    run = prepared(f"--init_from {undisturbed / name}")
    weights = checkpoint.load(undisturbed / "best.pt")["ema"]
    for model in (run.state.model, run.state.ema):
        assert_same_tensors(dict(model.state_dict()), weights)
    assert (run.state.stage, run.state.step, len(run.state.optimiser.state)) == (1, 0, 0)
    assert "starting from the weights of" in capsys.readouterr().out


def test_folder_of_weights_alone_is_read_by_the_name_of_the_preset(undisturbed, prepared, tmp_path):
    shutil.copy(undisturbed / "best.pt", tmp_path / "tiny.pt")
    run = prepared(f"--init_from {tmp_path}")
    assert_same_tensors(dict(run.state.ema.state_dict()), checkpoint.load(undisturbed / "best.pt")["ema"])


@pytest.mark.slow
def test_run_trains_both_stages_from_there_and_goes_on_by_the_same_command(undisturbed, arguments, tmp_path, capsys):
    assert train.main(arguments(f"--init_from {undisturbed}")) == 0
    before, after = (
        checkpoint.load(f / name) for f, name in ((undisturbed, "best.pt"), (tmp_path / "ck", "stage1.pt"))
    )
    for name, value in before["ema"].items():
        if name.startswith("core."):
            assert torch.equal(value, after["ema"][name]), name  # which stage 1 does not train
    capsys.readouterr()
    assert train.main(arguments(f"--init_from {undisturbed}")) == 0
    printed = capsys.readouterr().out
    assert "continuing" in printed
    assert "starting from the weights" not in printed


@pytest.mark.parametrize("codec", ["", "best.pt"])
def test_stage_2_alone_takes_a_codec_of_another_dataset_and_says_so(undisturbed, prepared, capsys, codec):
    run = prepared(f"--init_from {undisturbed} --stage1_from {undisturbed / codec}")
    assert run.state.stage == 2
    assert capsys.readouterr().out.count("were trained on another dataset") == 1
    core, encoder = (checkpoint.load(undisturbed / name)["ema"] for name in ("best.pt", codec or "stage1.pt"))
    for name, value in run.state.model.state_dict().items():
        if name.startswith(("core.", "encoder.")):
            assert torch.equal(value, (core if name.startswith("core.") else encoder)[name]), name


def test_minutes_of_stage_2_do_not_depend_on_a_flag_that_a_resumed_run_may_lack(undisturbed, prepared):
    run = prepared(f"--init_from {undisturbed} --stage1_from {undisturbed} --max_minutes 2")
    run.args.stage1_from = None
    assert run.state.stage_seconds() == 120


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--latent_channels 6", "latent_channels 4 there, 6 here"),
        ("--core_width 32", "core_width 16 there, 32 here"),
        ("--init_from nowhere", "there is no checkpoint nowhere"),
    ],
)
def test_other_sizes_are_refused_in_one_sentence(undisturbed, arguments, capsys, more, words):
    assert train.main(arguments(f"--init_from {undisturbed} {more}")) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_another_sample_rate_is_refused(undisturbed, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tiny.RATE", 4000)
    dataset = write_dataset(tmp_path / "slow")
    assert train.main(arguments(f"--init_from {undisturbed}", dataset)) == 2
    assert "sample_rate 8000 there, 4000 here" in capsys.readouterr().err
