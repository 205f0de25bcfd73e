"""A stopped run equals an undisturbed one, and goes on only with what may differ."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY, assert_same_network, records, write_dataset

import train
from continuation import checkpoint, run_log
from model import ContinuationModel

QUIET = Path(__file__).parent.parent / "run_quietly.py"


@pytest.mark.slow
def test_run_stopped_at_every_step_equals_the_uninterrupted_one(undisturbed, command, tmp_path, stop_after):
    """In stage 1, in 2a and in 2b, and at the last step of each, which leaves an evaluation to be done."""
    stop_after(*range(1, 10))
    codes = [command(tmp_path / "ck") for _ in range(10)]
    assert codes == [train.INTERRUPTED] * 9 + [0]
    for name in ("last.pt", "best.pt", "stage1.pt"):
        assert_same_network(tmp_path / "ck" / name, undisturbed / name)
    places = [[(line["stage"], line["step"]) for line in records(f)] for f in (tmp_path / "ck", undisturbed)]
    assert places[0] == places[1]


@pytest.mark.slow
def test_run_killed_at_random_moments_equals_the_uninterrupted_one(undisturbed, dataset, tmp_path):
    """It goes on from the last complete save; here every step is saved."""
    words = [sys.executable, str(QUIET), *TINY.split()]
    words += ["--dataset_folder", str(dataset), "--checkpoint_folder", str(tmp_path), "--checkpoint_minutes", "1e-9"]
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent), "OMP_NUM_THREADS": "1"}
    moments = np.random.default_rng(0).uniform(0, 3, 6)  # seconds after the first line is printed
    for moment in moments:
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(moment)
        process.kill()
        process.communicate()
    subprocess.run(words, env=environment, check=True, capture_output=True)
    assert_same_network(undisturbed / "last.pt", tmp_path / "last.pt")


@pytest.mark.slow
def test_sigterm_to_all_processes_of_a_run_leaves_its_data_workers_alive_until_it_has_saved(dataset, tmp_path):
    """As Slurm and service managers send it."""
    words = [sys.executable, str(QUIET), *TINY.split(), "--num_workers", "1"]
    words += ["--dataset_folder", str(dataset), "--checkpoint_folder", str(tmp_path), "--stage1_steps", "100000"]
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent), "OMP_NUM_THREADS": "1"}
    words += ["--eval_steps", "5"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert any("step 5/100000" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == train.INTERRUPTED
    assert checkpoint.load(tmp_path / "last.pt")["step"] >= 5


@pytest.mark.slow
def test_run_killed_before_the_first_step_of_stage_2_lists_no_evaluation_twice(
    undisturbed, command, tmp_path, monkeypatch
):
    train_step = train.train_step

    def step_or_die(state, *given):
        if state.stage == 2:
            raise KeyboardInterrupt  # nothing is saved for it
        return train_step(state, *given)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", step_or_die)
        assert command(tmp_path / "ck") == train.INTERRUPTED
    assert command(tmp_path / "ck") == 0
    places = [[(line["stage"], line["step"]) for line in records(f)] for f in (tmp_path / "ck", undisturbed)]
    assert places[0] == places[1]


@pytest.mark.slow
def test_stop_while_latents_are_cached_loses_nothing(undisturbed, command, tmp_path, monkeypatch):
    encode_pair, calls = ContinuationModel.encode_pair, iter(range(1000))

    def encode_and_signal(self, x):
        if next(calls) == 9:  # the first 8 are the continuation of the untrained network and the first variant
            os.kill(os.getpid(), signal.SIGTERM)
        return encode_pair(self, x)

    monkeypatch.setattr(ContinuationModel, "encode_pair", encode_and_signal)
    assert command(tmp_path / "ck") == train.INTERRUPTED
    spent = checkpoint.load(tmp_path / "ck" / "last.pt")["scheduler"]["seconds"]
    assert not list((tmp_path / "ck" / "latents").glob("*tmp*"))
    assert command(tmp_path / "ck") == 0
    assert_same_network(tmp_path / "ck" / "last.pt", undisturbed / "last.pt")
    in_all = checkpoint.load(tmp_path / "ck" / "last.pt")["scheduler"]["seconds"]
    assert in_all[1] == spent[1] > 0  # stage 1 was done, and its time is remembered
    assert in_all[2] > spent[2] > 0


@pytest.mark.slow
def test_stopped_run_leaves_the_checkpoint_of_the_undisturbed_one_but_for_its_times(
    undisturbed, command, tmp_path, stop_after
):
    """Bit by bit: nothing is stored that depends on where a run was stopped, or that no draw uses."""
    random.random(), np.random.random()  # as any library may
    stop_after(2, 5)
    assert [command(tmp_path / "ck") for _ in range(3)] == [train.INTERRUPTED] * 2 + [0]
    for name in ("last.pt", "best.pt", "stage1.pt"):
        one, other = (checkpoint.load(folder / name) for folder in (undisturbed, tmp_path / "ck"))
        differing = {
            key for key in one if checkpoint._checksum({key: one[key]}) != checkpoint._checksum({key: other[key]})
        }
        assert one.keys() == other.keys()
        assert differing <= {"scheduler", "command", "checksum"}


@pytest.mark.slow
def test_training_loss_of_an_interval_that_was_cut_is_that_of_the_undisturbed_run(command, tmp_path, stop_after):
    """Cut in 2a, at the end of 2a, which is within an interval too, and in stage 1."""
    more = "--stage1_steps 4 --eval_steps 3 --joint_share 0.5"
    assert command(tmp_path / "whole", more=more) == 0
    stop_after(2, 6, 7, 9)
    assert [command(tmp_path / "cut", more=more) for _ in range(5)] == [train.INTERRUPTED] * 4 + [0]
    whole, cut = ([line["train_loss"] for line in records(tmp_path / name)] for name in ("whole", "cut"))
    assert cut == whole
    assert len([loss for loss in whole if loss is not None]) == 3


@pytest.mark.parametrize(
    "damage",
    [b"\x00\xff\xfe", b"[1, 2]", b"null", b'{"stage": 1}', b'{"stage": "1", "step": [0]}', b'{"stage": 1, "st'],
)
def test_damaged_line_of_the_log_is_left_out_and_said(undisturbed, command, tmp_path, capsys, damage):
    folder = Path(shutil.copytree(undisturbed, tmp_path / "ck"))
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    (folder / "metrics.jsonl").write_bytes(b"\n".join([lines[0], damage, *lines[1:], b""]))
    assert command(folder) == 0
    assert "1 damaged lines" in capsys.readouterr().out
    assert records(folder) == records(undisturbed)


# What is left of a run


@pytest.mark.parametrize("left", ["best.pt", "stage1.pt", "metrics.jsonl"])
def test_folder_without_its_last_checkpoint_is_refused_and_stays_as_it_is(
    undisturbed, command, tmp_path, capsys, left
):
    folder = tmp_path / "ck"
    folder.mkdir()
    shutil.copy(undisturbed / left, folder)
    assert command(folder) == 2
    error = capsys.readouterr().err
    assert f"holds {left} of a run" in error
    assert "another --checkpoint_folder" in error
    assert (folder / left).read_bytes() == (undisturbed / left).read_bytes()
    assert {path.name for path in folder.iterdir()} == {left, ".lock"}


@pytest.mark.slow
def test_run_killed_at_its_first_step_goes_on(undisturbed, command, tmp_path, monkeypatch):
    """best.pt and the log are there already, and so is last.pt."""

    def die(*_):
        raise KeyboardInterrupt  # nothing is saved for it

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", die)
        assert command(tmp_path / "ck") == train.INTERRUPTED
    assert (tmp_path / "ck" / "best.pt").exists()
    assert command(tmp_path / "ck") == 0
    assert_same_network(tmp_path / "ck" / "last.pt", undisturbed / "last.pt")


@pytest.fixture
def thrown_back(command, tmp_path, stop_after, monkeypatch) -> Path:
    """A folder of a finished run whose last.pt is damaged, beside one of its stage 1. Nothing ever got better than
    the first evaluation of a stage."""
    monkeypatch.setattr(train.Run, "validate", lambda self: {"val_loss": 1.0 + self.state.step})
    stop_after(2)
    folder = tmp_path / "ck"
    assert command(folder) == train.INTERRUPTED
    early = (folder / "last.pt").read_bytes()
    assert command(folder) == 0
    shutil.copytree(folder, tmp_path / "before")
    (folder / "last.1.pt").write_bytes(early)
    (folder / "last.pt").write_bytes(b"torn")
    return folder


@pytest.mark.slow
def test_run_thrown_back_into_stage_1_keeps_the_stage_1_that_it_had_finished(command, thrown_back):
    """Its best.pt is of stage 2."""
    assert command(thrown_back) == 0
    for name in ("last.pt", "best.pt", "stage1.pt"):
        assert_same_network(thrown_back / name, thrown_back.parent / "before" / name)
    assert checkpoint.load(thrown_back / "stage1.pt")["stage"] == 1


@pytest.mark.slow
def test_best_of_another_run_is_not_believed(command, thrown_back, tmp_path, capsys):
    assert command(tmp_path / "other", more="--seed 1") == 0
    (thrown_back / "stage1.pt").unlink()
    shutil.copy(tmp_path / "other" / "stage1.pt", thrown_back / "best.pt")
    assert command(thrown_back) == 0
    assert "best of stage 1 is lost" in capsys.readouterr().out
    finished = checkpoint.load(thrown_back / "stage1.pt")
    assert (finished["stage"], finished["step"], finished["settings"]["seed"]) == (1, 3, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"optimiser": {}},
        {"optimiser": {"state": [1]}},
        {"optimiser": {"state": {0: {"momentum": torch.zeros(2, 2)}}}},
        {"optimiser": {"state": {0: {"step": "many"}}}},
        {"optimiser": {"param_groups": []}},
        {"optimiser": {"param_groups": [{"betas": ("a", "b")}, {}]}},
        {"weights": {}},
        {"weights": {"a": 1}},
        {"ema": {"a": 1}},
        {"sampler": []},
        {"sampler": {"item": "first"}},
        {"scheduler": {"seconds": 7}},
        {"scheduler": {"seconds": {1: "long", 2: 0.0}}},
        {"early_stop": {}},
        {"early_stop": {"best": "good"}},
        {"evaluated_at": [1]},
        {"interval": {"phase": 1}},
        {"interval": 3},
        {"cached_by": 1},
        {"processes": None},
        {"settings": {"stage1_steps": "many"}},
        {"settings": {"stage2_steps": None}},
        {"rng": {"torch": "random"}},
        {"rng": {"torch": torch.zeros(2)}},
        {"data_meta": {"songs": 1}},
        {"scaler": 1},
    ],
)
def test_last_checkpoint_with_strange_contents_is_refused_in_one_sentence(
    undisturbed, command, tmp_path, capsys, change
):
    state = checkpoint.load(undisturbed / "last.pt")
    change = {
        key: state[key] | value if value and isinstance(value, dict) and key not in ("weights", "ema") else value
        for key, value in change.items()
    }
    (tmp_path / "ck").mkdir()
    checkpoint.save(tmp_path / "ck" / "last.pt", state | change)
    assert command(tmp_path / "ck") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_longer_stage_1_in_stage_2_is_said_to_change_nothing(undisturbed, command, tmp_path, capsys):
    folder = Path(shutil.copytree(undisturbed, tmp_path / "ck"))
    assert command(folder, more="--stage1_steps 4") == 0
    assert "stage 1 is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_tensorboard_shows_no_step_twice_after_a_kill(command, tmp_path):
    """Without last.pt the run goes on at the beginning of stage 2; what it showed of stage 1 stays."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "ck"
    for _ in range(2):
        (folder / "last.pt").unlink(missing_ok=True)
        assert command(folder, more="--eval_steps 1") == 0
    steps = {}
    for stage in (1, 2):
        events = EventAccumulator(str(folder / "tb" / f"stage{stage}")).Reload()
        steps[stage] = [event.step for event in events.Scalars(f"stage{stage}/val_loss")]
        assert [event.step for event in events.Audio("song1/truth")] == [0]
    assert steps == {1: [0, 1, 2, 3], 2: [0, 1, 2, 3, 4, 5, 6]}


# What may differ


def test_evaluations_that_are_done_again_are_not_listed_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"stage": s, "step": k}) + "\n" for s, k in ((1, 0), (1, 9), (2, 0), (2, 5))))
    run_log.drop_later_records(path, stage=2, step=3)
    assert [(r["stage"], r["step"]) for r in records(tmp_path)] == [(1, 0), (1, 9), (2, 0)]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ("--seed 1", "--seed"),
        ("--learning_rate 0.01", "--learning_rate"),
        ("--core_width 32", "--core_width"),
        ("--objective mse", "--objective"),
        ("--joint_share 0.5", "--joint_share"),
        ("--stage2_steps 5", "--stage2_steps"),
        ("--precision bf16", "--precision"),
    ],
)
def test_changed_setting_is_refused_by_name(undisturbed, command, capsys, more, field):
    before = (undisturbed / "last.pt").read_bytes()
    assert command(undisturbed, more=more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert f"{field} (" in error
    assert error.count("--") == 2 or more.startswith("--stage")  # the field and --checkpoint_folder, nothing else
    assert (undisturbed / "last.pt").read_bytes() == before


def test_another_dataset_is_refused(undisturbed, tmp_path, capsys):
    other = write_dataset(tmp_path / "other", first_seed=50)
    argv = ["--dataset_folder", str(other), "--checkpoint_folder", str(undisturbed), *TINY.split()]
    assert train.main(train.parse_args(argv)) == 2
    assert "the dataset" in capsys.readouterr().err


@pytest.mark.slow
def test_more_steps_and_another_batch_size_go_on(undisturbed, command, tmp_path):
    folder = Path(shutil.copytree(undisturbed, tmp_path / "ck"))
    assert command(folder, more="--stage2_steps 8 --batch_size 1 --accumulate 2") == 0
    assert checkpoint.load(folder / "last.pt")["step"] == 8


def test_run_in_its_joint_part_is_not_put_back_before_it(undisturbed, command, capsys, monkeypatch):
    """The cached latents would no longer be those of its encoder. 6 steps of 10 are less than the first 66 %."""
    monkeypatch.setattr(train.Run, "train", lambda run, stop: None)
    before = (undisturbed / "last.pt").read_bytes()
    assert command(undisturbed, more="--stage2_steps 9") == 0
    assert command(undisturbed, more="--stage2_steps 10") == 2
    assert "is in the joint part" in capsys.readouterr().err
    assert (undisturbed / "last.pt").read_bytes() == before
