"""Training: a stopped run equals an undisturbed one, a phase moves what it should, both stages can learn a batch."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import synth
import torch
from tiny import CHANNELS, CHUNK, NETWORK, RATE, assert_same_network, assert_same_tensors, write_dataset

import train
from continuation import (
    audio,
    checkpoint,
    distributed,
    latents,
    losses,
    memory,
    muon,
    plots,
    run_log,
    stages,
    training_state,
    validation,
)
from continuation.dataset import read_meta
from continuation.windows import WindowItems, Windows
from model import ContinuationModel, load_model

torch.set_num_threads(1)
SCHEDULE = "--batch_size 2 --stage1_steps 3 --stage2_steps 6 --joint_share 0.34 --latent_variants 2 --device cpu"
TINY = f"--preset tiny {NETWORK} {SCHEDULE}"  # stage 2: four steps of 2a, two of 2b
LEGACY = "--preset legacy --batch_size 1 --accumulate 1 --stage1_steps 1 --stage2_steps 1 --device cpu"


@pytest.fixture(scope="module", autouse=True)
def short_evaluations():
    """Pictures have tests of their own, and drawing one takes longer than a stage here; two pairs are decoded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "plot_curves", lambda path, records: None)
        patch.setattr(validation, "DECODED", 1)
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def command(dataset):
    """Run train.py's main with flags, in this process: its exit code."""

    def run(folder: Path, flags: str = TINY, more: str = "") -> int:
        argv = ["--dataset_folder", dataset, "--checkpoint_folder", folder, *flags.split(), *more.split()]
        return train.main(train.parse_args([str(word) for word in argv]))

    return run


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory) -> Path:
    """The checkpoint folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "ck"
    assert command(folder) == 0
    return folder


@pytest.fixture
def new_run(dataset, tmp_path):
    """A Run that has not begun, with flags."""

    def make(flags: str = TINY, more: str = "") -> train.Run:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        argv = ["--dataset_folder", str(dataset), "--checkpoint_folder", str(folder), *flags.split(), *more.split()]
        return train.Run(train.parse_args(argv))

    return make


class NotStopped:
    requested = False


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def snapshot(module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def moved(module, before: list[torch.Tensor]) -> bool:
    return any(not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))


# ---- what a run leaves behind ----


def test_run_leaves_all_its_files(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert {"last.pt", "best.pt", "stage1.pt", "metrics.jsonl", "samples", "tb", "latents"} <= names
    assert len(list((undisturbed / "samples").glob("*.mp3"))) == 4
    assert any((undisturbed / "tb").iterdir())


def test_latent_cache_is_as_large_as_a_dry_run_says(undisturbed):
    config = load_model(undisturbed / "best.pt").config
    foreseen = memory.cache_gigabytes(SimpleNamespace(config=config, parts=("latents",)), windows=2 * 7)
    stored = sum(np.load(path).nbytes for path in (undisturbed / "latents").glob("*.npy"))
    assert stored / 1e9 == pytest.approx(foreseen)


def test_metrics_hold_every_evaluation_with_its_figures(undisturbed):
    lines = records(undisturbed)
    assert [(line["stage"], line["step"]) for line in lines] == [(1, 0), (1, 3), (2, 0), (2, 6)]
    common = {"stage", "step", "phase", "epoch", "seconds", "train_loss", "val_loss"}
    reconstruction = {"val_waveform_mse", "val_mr_stft", "val_si_sdr_below_1000_db"}
    prediction = {"val_latent_mse", "val_context_gain", "val_context_gain_same_song", "val_decoded_mse"}
    prediction |= {"val_prediction", "val_predicted_levels", "val_continuation", "val_loop"}
    for line in lines:
        assert line.keys() >= common | (reconstruction if line["stage"] == 1 else prediction)
        assert all(np.isfinite(value) for name, value in line.items() if name.startswith("val_"))
    assert lines[1]["epoch"] == pytest.approx(3 * 2 / 7)  # 3 steps of 2 items; 7 pairs
    assert lines[0]["seconds"] <= lines[1]["seconds"] <= lines[3]["seconds"]


def test_untrained_network_is_asked_for_a_continuation_to_compare_with(undisturbed):
    assert {"val_loudness_ratio_db", "val_latent_std_ratio", "val_decoded_mse"} <= records(undisturbed)[0].keys()


def test_best_checkpoint_is_of_stage_2_and_its_network_generates(undisturbed):
    assert checkpoint.load(undisturbed / "best.pt")["stage"] == 2
    model = load_model(undisturbed / "best.pt")
    y = model.generate(synth.song(5, 3, RATE, CHANNELS), seconds=1)
    assert y.shape == (CHANNELS, RATE)
    assert torch.isfinite(y).all()


def test_checkpoint_says_where_it_comes_from(undisturbed, dataset):
    state = checkpoint.load(undisturbed / "last.pt")
    assert state["data_meta"] == read_meta(dataset, "dataset")
    assert (state["stage"], state["step"]) == (2, 6)
    assert state["settings"]["core_width"] == 16
    assert state["config"]["core_width"] == 16
    assert state["versions"]["torch"] == str(torch.__version__)


def test_same_command_after_the_end_changes_nothing_and_succeeds(undisturbed, command, monkeypatch):
    before = checkpoint.load(undisturbed / "last.pt"), (undisturbed / "metrics.jsonl").read_text()
    monkeypatch.setattr(train, "train_step", None)
    monkeypatch.setattr(train.Run, "evaluate", None)
    assert command(undisturbed) == 0
    assert_same_tensors(checkpoint.load(undisturbed / "last.pt")["weights"], before[0]["weights"])
    assert (undisturbed / "metrics.jsonl").read_text() == before[1]


def test_number_of_data_workers_changes_nothing(undisturbed, command, tmp_path):
    assert command(tmp_path / "ck", more="--num_workers 1") == 0
    assert_same_network(tmp_path / "ck" / "last.pt", undisturbed / "last.pt")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's default is kept")
def test_data_workers_are_forked_whatever_python_takes_by_default(new_run):
    run = new_run()
    for run.args.num_workers, context in ((0, None), (1, multiprocessing.get_context("fork"))):
        assert run.loader(run.phases()[0]).multiprocessing_context is context


# ---- stopping and going on ----


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


def test_run_stopped_at_every_step_equals_the_uninterrupted_one(undisturbed, command, tmp_path, stop_after):
    """In stage 1, in 2a and in 2b, and at the last step of each, which leaves an evaluation to be done."""
    stop_after(*range(1, 10))
    codes = [command(tmp_path / "ck") for _ in range(10)]
    assert codes == [train.INTERRUPTED] * 9 + [0]
    for name in ("last.pt", "best.pt", "stage1.pt"):
        assert_same_network(tmp_path / "ck" / name, undisturbed / name)
    places = [[(line["stage"], line["step"]) for line in records(f)] for f in (tmp_path / "ck", undisturbed)]
    assert places[0] == places[1]


def test_run_killed_at_random_moments_equals_the_uninterrupted_one(undisturbed, dataset, tmp_path):
    """It goes on from the last complete save; here every step is saved."""
    words = [sys.executable, str(Path(__file__).with_name("run_quietly.py")), *TINY.split()]
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


def test_sigterm_to_all_processes_of_a_run_leaves_its_data_workers_alive_until_it_has_saved(dataset, tmp_path):
    """As Slurm and service managers send it."""
    words = [sys.executable, str(Path(__file__).with_name("run_quietly.py")), *TINY.split(), "--num_workers", "1"]
    words += ["--dataset_folder", str(dataset), "--checkpoint_folder", str(tmp_path), "--stage1_steps", "100000"]
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent), "OMP_NUM_THREADS": "1"}
    words += ["--eval_steps", "5"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert any("step 5/100000" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == train.INTERRUPTED
    assert checkpoint.load(tmp_path / "last.pt")["step"] >= 5


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


# ---- what is left of a run


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


def test_run_thrown_back_into_stage_1_keeps_the_stage_1_that_it_had_finished(command, thrown_back):
    """Its best.pt is of stage 2."""
    assert command(thrown_back) == 0
    for name in ("last.pt", "best.pt", "stage1.pt"):
        assert_same_network(thrown_back / name, thrown_back.parent / "before" / name)
    assert checkpoint.load(thrown_back / "stage1.pt")["stage"] == 1


def test_best_of_another_run_is_not_believed(command, thrown_back, tmp_path, capsys):
    assert command(tmp_path / "other", more="--seed 1") == 0
    (thrown_back / "stage1.pt").unlink()
    shutil.copy(tmp_path / "other" / "stage1.pt", thrown_back / "best.pt")
    assert command(thrown_back) == 0
    assert "best of stage 1 is lost" in capsys.readouterr().out
    finished = checkpoint.load(thrown_back / "stage1.pt")
    assert (finished["stage"], finished["step"], finished["settings"]["seed"]) == (1, 3, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stage": 2}, "is of stage 2"),
        ({"data_meta": {}}, "another dataset"),
        ({"ema": {}}, "has not the weights"),
    ],
)
def test_stage1_from_a_file_that_is_no_stage_1_is_refused(undisturbed, command, tmp_path, capsys, change, words):
    (tmp_path / "from").mkdir()
    checkpoint.save(tmp_path / "from" / "stage1.pt", checkpoint.load(undisturbed / "stage1.pt") | change)
    assert command(tmp_path / "ck", more=f"--stage1_from {tmp_path / 'from'}") == 2
    assert words in capsys.readouterr().err


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
    assert steps == {1: [0, 1, 2, 3], 2: [0, 1, 2, 3, 4, 5, 6]}


# ---- the latent cache


def arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "latents").glob("*.npy")}


@pytest.fixture
def filled(new_run, monkeypatch):
    """Fill the cache of stage 2, once more or for the first time, with flags: the variants that were encoded."""

    def fill(more: str = "") -> list[int]:
        run, encoded = new_run(more=more), []
        fill_variant = latents.fill_variant

        def note(state, windows, cache, variant, *given):
            encoded.append(variant)
            fill_variant(state, windows, cache, variant, *given)

        run.state.begin_stage(2)
        with monkeypatch.context() as patch:
            patch.setattr(latents, "fill_variant", note)
            run.fill_cache(NotStopped)
        return encoded

    return fill


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def damage_zeros_behind_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:128] + bytes(path.stat().st_size - 128))


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damage_gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("part", ["context", "levels"])
@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_zeros, damage_zeros_behind_the_header, damage_bit, damage_gone]
)
def test_damaged_file_of_the_latent_cache_is_made_again(filled, tmp_path, capsys, part, damage):
    assert filled() == [0, 1]
    whole = arrays(tmp_path / "run")
    damage(tmp_path / "run" / "latents" / f"{part}-1.npy")
    assert filled() == [1]
    assert f"{part}-1.npy is missing or damaged" in capsys.readouterr().err
    assert arrays(tmp_path / "run") == whole
    assert filled() == []


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"sha256": [1]}', b"\xff"])
def test_latent_cache_with_a_damaged_index_is_made_again(filled, tmp_path, content):
    filled()
    index = tmp_path / "run" / "latents" / "key.json"
    index.unlink() if content is None else index.write_bytes(content)
    assert filled() == [0, 1]


@pytest.mark.parametrize("exists", [True, False])
def test_latent_cache_behind_a_link_holds_the_latents_of_its_own_encoder(filled, tmp_path, exists):
    """The link may point at nothing, as to a scratch disk that was cleared; what else lies there stays."""
    scratch = tmp_path / "scratch"
    if exists:
        scratch.mkdir()
        (scratch / "notes.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latents").symlink_to(scratch)
    assert filled() == [0, 1]
    first = arrays(tmp_path / "run")
    assert filled("--seed 1") == [0, 1]
    assert not set(arrays(tmp_path / "run").values()) & set(first.values())
    assert filled() == [0, 1]
    assert arrays(tmp_path / "run") == first
    assert (scratch / "notes.txt").exists() == exists


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


def test_missing_dataset_is_refused(tmp_path, capsys):
    argv = ["--dataset_folder", str(tmp_path / "none"), "--checkpoint_folder", str(tmp_path / "ck"), *TINY.split()]
    assert train.main(train.parse_args(argv)) == 2
    assert "error: " in capsys.readouterr().err


def test_checkpoint_folder_in_whose_place_a_file_is_is_refused_on_one_line(tmp_path, capsys):
    (tmp_path / "a\n\x1b").touch()
    for folder in (tmp_path / "a\n\x1b", tmp_path / "a\n\x1b" / "below"):
        argv = ["--dataset_folder", "none", "--checkpoint_folder", str(folder), *TINY.split()]
        assert train.main(train.parse_args(argv)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --checkpoint_folder: a file is in the place of the folder")
        assert error.count("\n") == 1 and "\x1b" not in error


@pytest.mark.parametrize(
    "flags",
    [
        "--stage1_steps 0",
        "--joint_share 1.5",
        "--max_minutes 0",
        "--learning_rate -1",
        "--preset huge",
        "--batch_size 0",
        "--core_heads 0",
        "--latent_channels 0",
        "--decoder_widths 8 -1",
        "--encoder_blocks -1 1",
        "--core_dropout 2",
        "--seed -1",
        "--seed 4294967296",
        "--num_workers -1",
        "--num_workers 100000",
        "--stage1_steps 1e12",
        "--stage1_steps 1000000000001",
        "--batch_size 1000000000001",
    ],
)
def test_impossible_values_are_wrong_usage(flags):
    with pytest.raises(SystemExit) as caught:
        train.parse_args(["--dataset_folder", "a", "--checkpoint_folder", "b", *flags.split()])
    assert caught.value.code == 2


# ---- phases ----


def parts_of(model: ContinuationModel) -> tuple:
    """Encoder, core and decoder."""
    return model.encoder, model.core, model.decoder


def test_frozen_parameters_do_not_move_in_2a_and_do_move_in_2b(new_run):
    run = new_run()
    run.state.begin_stage(2)
    run.fill_cache(NotStopped)
    predict, joint = run.phases()
    parts = parts_of(run.state.model)
    before, averaged = [snapshot(part) for part in parts], snapshot(run.state.ema.encoder)
    run.train_phase(predict, NotStopped)
    assert [moved(*pair) for pair in zip(parts, before, strict=True)] == [False, True, False]
    assert not moved(run.state.ema.encoder, averaged)
    before = [snapshot(part) for part in parts]
    run.train_phase(joint, NotStopped)
    assert [moved(*pair) for pair in zip(parts, before, strict=True)] == [True] * 3
    assert run.state.step == 6


@pytest.mark.parametrize("more", ["--batch_size 16", "--batch_size 2 --accumulate 8"])
def test_step_of_the_joint_part_takes_the_same_items_however_they_are_cut(new_run, more):
    run = new_run(more=more)
    run.state.begin_stage(2)
    run.fill_cache(NotStopped)
    joint = run.phases()[1]
    train.train_step(run.state, joint, distributed.loss_module(joint, run.state.model), iter(run.loader(joint)))
    assert run.state.item == 16


def test_stage_1_trains_encoder_and_decoder_and_leaves_the_core(new_run):
    run = new_run()
    parts = parts_of(run.state.model)
    before = [snapshot(part) for part in parts]
    run.train_phase(run.phases()[0], NotStopped)
    assert [moved(*pair) for pair in zip(parts, before, strict=True)] == [True, False, True]


@pytest.mark.parametrize(("share", "names"), [(0, ["predict"]), (0.5, ["predict", "joint"]), (1, ["joint"])])
def test_joint_share_says_which_phases_stage_2_has(new_run, share, names):
    run = new_run(more=f"--joint_share {share}")
    run.state.begin_stage(2)
    assert [phase.name for phase in run.phases()] == names


def test_stage_2_starts_from_the_averaged_weights_of_the_best_of_stage_1(undisturbed, new_run):
    finished = checkpoint.load(undisturbed / "stage1.pt")
    assert finished["stage"] == 1
    run = new_run()
    run.state.start_stage2(finished)
    for model in (run.state.model, run.state.ema):
        assert_same_tensors(dict(model.state_dict()), finished["ema"])


def test_finished_stage_1_is_not_held_in_memory_during_stage_2(new_run, monkeypatch):
    run, loaded = new_run(), []
    load = checkpoint.load

    def load_and_remember(path):
        state = load(path)
        loaded.extend(weakref.ref(tensor) for tensor in state["weights"].values())
        return state

    def look(self, stop):
        gc.collect()
        assert not any(tensor() is not None for tensor in loaded)
        raise train.Stopped

    monkeypatch.setattr(checkpoint, "load", load_and_remember)
    monkeypatch.setattr(train.Run, "fill_cache", look)
    run.state.step = run.state.evaluated_at = run.state.stage_steps()
    run.state.best = 0.0
    run.save("best.pt")
    with pytest.raises(train.Stopped):
        run.train(NotStopped)
    assert loaded
    assert run.state.stage == 2


def test_joint_part_moves_the_core_at_the_full_rate_and_the_codec_more_slowly(new_run):
    run = new_run()
    run.state.begin_stage(2)
    fast, slow = ({id(p) for p in group["params"]} for group in run.state.optimiser.param_groups)
    encoder, core, decoder = ({id(p) for p in part.parameters()} for part in parts_of(run.state.model))
    assert (fast, slow) == (core, encoder | decoder)
    assert [group["scale"] for group in run.state.optimiser.param_groups] == [1.0, stages.JOINT_CODEC_RATE]


def test_batch_of_the_joint_part_has_crops_and_pairs(new_run):
    run = new_run()
    run.state.begin_stage(2)
    run.fill_cache(NotStopped)
    batch = next(iter(run.loader(run.phases()[1])))
    shapes = {name: (2, *shape) for name, shape in run.state.config.pair_shapes.items()}
    assert {name: tuple(batch[name].shape) for name in shapes} == shapes
    assert batch["x"].shape == (2, CHANNELS, RATE)  # a second
    assert batch["posterior_noise"].shape == (2, 4, 100)


def test_learning_rate_warms_up_stays_and_cools_down_to_nearly_zero(new_run):
    run = new_run(more="--stage1_steps 1000 --learning_rate 0.5")
    rates = {}
    for run.state.step in (0, 49, 100, 599, 800, 999):
        rates[run.state.step] = run.state.learning_rate() / 0.5
    assert rates[0] == pytest.approx(1 / training_state.WARMUP_STEPS)
    assert rates[49] == pytest.approx(50 / training_state.WARMUP_STEPS)
    assert rates[100] == rates[599] == 1
    assert rates[800] == pytest.approx(0.5, abs=0.01)
    assert 0 < rates[999] < 0.01


def test_averaged_weights_follow_the_documented_decay(new_run):
    run = new_run()
    ours, theirs = next(run.state.ema.encoder.parameters()), next(run.state.model.encoder.parameters())
    start = ours.clone()
    theirs.data += 1.0
    run.state.step = 5
    run.state.update_ema()
    assert torch.allclose(ours, start + 1 - (1 + 5) / (10 + 5), atol=1e-6)


# ---- no future ----


def test_context_does_not_change_when_the_target_audio_is_replaced_by_noise(new_run):
    run = new_run()
    x = torch.from_numpy(run.windows["train"].pair(0))[None]
    other = torch.cat([x[..., :CHUNK], 0.1 * torch.randn(1, CHANNELS, CHUNK)], dim=-1)
    first, second = run.state.ema.encode_pair(x), run.state.ema.encode_pair(other)
    for part in ("context", "outlook"):
        assert torch.equal(first[part], second[part])
    for part in ("target", "levels"):
        assert not torch.equal(first[part], second[part])
    leaky = [run.state.ema.encode(audio)[..., : run.state.config.chunk_latents] for audio in (x, other)]
    assert not torch.equal(*leaky)  # cut out of the 20 s encoded together, they would have heard the future


def test_cached_context_does_not_change_when_the_target_audio_is_replaced_by_noise(new_run, monkeypatch):
    """Through the windows, the encoder and the cache, up to the batches that stage 2 trains on."""
    batches = []
    window = Windows.window
    for level in (0.0, 0.1):

        def noisy_future(self, pair, chunks, change, level=level):
            x = window(self, pair, chunks, change)
            x[:, CHUNK:] += synth.noise(pair, CHUNK / RATE, RATE, CHANNELS, level)
            return x

        monkeypatch.setattr(Windows, "window", noisy_future)
        run = new_run()
        run.open_cache().clear()
        run.state.begin_stage(2)
        run.fill_cache(NotStopped)
        batches.append(next(iter(run.loader(run.phases()[0]))))
    first, second = batches
    for part in ("context", "outlook"):
        assert torch.equal(first[part], second[part])
    for part in ("target", "levels"):
        assert not torch.equal(first[part], second[part])


def test_cached_pair_is_the_encoded_window_of_its_variant(new_run):
    run = new_run()
    run.state.begin_stage(2)
    run.fill_cache(NotStopped)
    for variant, pair in ((0, 0), (1, 6)):
        x = torch.from_numpy(WindowItems(run.windows["train"], variant, seed=0)[pair]["x"])[None]
        encoded = run.state.ema.encode_pair(x)
        for part, cached in run.open_cache().read(variant, pair).items():
            assert torch.allclose(torch.from_numpy(cached), encoded[part][0].float(), atol=4e-3), part


def test_both_phases_of_stage_2_read_the_same_pairs(new_run):
    run = new_run()
    run.state.begin_stage(2)
    run.fill_cache(NotStopped)
    predict, joint = (phase.items(run.windows["train"], run.open_cache()) for phase in run.phases())
    for item in (0, 5):
        assert all(np.array_equal(joint[item][name], value) for name, value in predict[item].items())


def test_validation_context_is_what_generation_would_hear(new_run, monkeypatch):
    run = new_run()
    row = run.windows["val"].split.rows[run.windows["val"].split.pairs[0, 0]]
    pair, _ = run.validation.encoded_pairs()[0]
    heard, encode_context = [], run.state.ema.encode_context

    def note(*given):
        heard.append(encode_context(*given))
        return heard[-1]

    monkeypatch.setattr(run.state.ema, "encode_context", note)
    run.state.ema.generate(audio.from_int16(row), seconds=0.1, steps=1)
    assert torch.allclose(pair["context"], heard[0].latents, atol=2e-3)
    assert torch.allclose(pair["outlook"], heard[0].outlook, atol=4e-3)


# ---- learning ----


def overfit(run: train.Run, batch: dict, loss_of, parts: list, steps: int, rate: float) -> tuple[float, float]:
    """First and last loss on one fixed batch."""
    stages.freeze_all_but(run.state.model, parts)
    optimiser = muon.Muon([p for part in parts for p in part.parameters()], lr=rate, weight_decay=0.0)
    history = []
    for _ in range(steps):
        loss = loss_of(run.state.model, batch).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    return history[0], history[-1]


def test_one_batch_can_be_overfit_in_stage_1(new_run):
    run = new_run(more="--encoder_widths 32 32 --decoder_widths 32 32 --latent_channels 16")
    phase = run.phases()[0]
    batch = next(iter(run.loader(phase)))
    draw = {"sample_rate": RATE, "size": 512, "in_mid_side": False}

    def loss_of(model, batch):
        return losses.reconstruct_step(model, batch, draw)[0]

    first, last = overfit(run, batch, loss_of, phase.trained(run.state.model), steps=320, rate=1e-2)
    assert last < first / 2


def test_one_batch_can_be_overfit_in_stage_2(new_run):
    run = new_run(more="--core_width 64 --core_layers 2 --core_dropout 0")
    run.state.begin_stage(2)
    run.fill_cache(NotStopped)
    phase = run.phases()[0]
    batch = next(iter(run.loader(phase)))
    batch["time"][:] = 0.0
    first, last = overfit(
        run,
        batch,
        lambda *given: losses.predict_step(*given)[0],
        phase.trained(run.state.model),
        steps=160,
        rate=5e-3,
    )
    assert last < first / 10


def test_checkpoint_of_an_earlier_day_generates_and_trains_on(tmp_path, monkeypatch):
    """tests/files holds a small one of every format that is still read, made by the command below in 4 steps."""
    monkeypatch.setattr("tiny.RATE", 1600)
    monkeypatch.setattr("tiny.CHUNK", 4800)
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("dataset"))
    Path("checkpoints").mkdir()
    shutil.copy(Path(__file__).parent / "files" / "checkpoint-format-9.pt", "checkpoints/last.pt")
    model = load_model("checkpoints/last.pt")
    assert torch.isfinite(model.generate(synth.song(0, 3, 1600, CHANNELS), seconds=3)).all()
    flags = (
        "--encoder_widths 8 8 --encoder_blocks 1 2 --decoder_widths 8 8 --decoder_blocks 1 2 --latent_channels 4 "
        "--core_layers 1 --core_width 16 --core_heads 2 --latents_per_token 4 --batch_size 2 --stage1_steps 3 "
        "--latent_variants 1 --joint_share 0.4 --device cpu --keep 1"
    )
    words = f"--dataset_folder dataset --checkpoint_folder checkpoints --preset tiny {flags} --stage2_steps 6"
    assert train.main(train.parse_args(words.split())) == 0
    assert checkpoint.load("checkpoints/last.pt")["step"] == 6


# ---- other ways to train ----


def test_max_minutes_ends_both_stages_with_their_cooldown(command, tmp_path, monkeypatch):
    """On a clock by which every step takes 6 s: 2 minutes are 10 steps a stage, the last 3 joint in stage 2."""
    clock, rates = SimpleNamespace(now=0.0), {"reconstruct": [], "predict": [], "joint": []}
    train_step = train.train_step

    def take_6_seconds(state, phase, *given):
        loss = train_step(state, phase, *given)
        clock.now += 6.0
        rates[phase.name].append(state.optimiser.param_groups[0]["lr"] / state.args.learning_rate)
        return loss

    monkeypatch.setattr(train, "train_step", take_6_seconds)
    for module in (train, latents):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(training_state, "WARMUP_STEPS", 1)
    assert command(tmp_path / "ck", more="--stage1_steps 100000 --stage2_steps 100000 --max_minutes 2") == 0
    cooled = [1.0] * 7 + [0.75, 0.5, 0.25]
    assert rates["reconstruct"] == pytest.approx(cooled, abs=2e-3)
    assert rates["predict"] == pytest.approx(cooled[:7], abs=2e-3)
    assert rates["joint"] == pytest.approx(cooled[7:], abs=2e-3)
    assert [(line["stage"], line["step"]) for line in records(tmp_path / "ck")] == [(1, 0), (1, 10), (2, 0), (2, 10)]


@pytest.mark.parametrize("core", ["", "--core_layers 2 --core_width 32"])
def test_stage1_from_starts_at_stage_2_with_that_encoder_and_decoder(undisturbed, command, tmp_path, core):
    assert command(tmp_path / "ck", more=f"--stage1_from {undisturbed} --joint_share 0 {core}") == 0
    state, source = (checkpoint.load(folder) for folder in (tmp_path / "ck" / "last.pt", undisturbed / "stage1.pt"))
    assert {line["stage"] for line in records(tmp_path / "ck")} == {2}
    for name, value in source["ema"].items():
        if name.startswith(("encoder.", "decoder.")):
            assert torch.equal(state["weights"][name], value), name


@pytest.mark.parametrize(
    ("more", "words"), [("--latent_channels 6", "another encoder or decoder"), ("--stage1_from nowhere", "nowhere")]
)
def test_stage1_from_a_run_that_does_not_fit_is_refused(undisturbed, command, tmp_path, capsys, more, words):
    assert command(tmp_path / "ck", more=f"--stage1_from {undisturbed} {more}") == 2
    assert words in capsys.readouterr().err
    assert not {"tb", "samples", "last.pt"} & {path.name for path in (tmp_path / "ck").iterdir()}


def test_mse_objective_learns_from_the_stage_1_of_a_flow_and_says_the_mean(undisturbed, command, tmp_path):
    assert command(tmp_path / "ck", more=f"--objective mse --stage1_from {undisturbed}") == 0
    model = load_model(tmp_path / "ck" / "best.pt")
    song = synth.song(5, 3, RATE, CHANNELS)
    assert model.config.objective == "mse"
    assert torch.equal(model.generate(song, 1, seed=0), model.generate(song, 1, seed=1))


def test_legacy_trains_both_stages_without_a_cache(command, tmp_path):
    assert command(tmp_path / "ck", LEGACY) == 0
    lines = records(tmp_path / "ck")
    assert [(line["stage"], line["step"]) for line in lines] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert all({"val_loss", "val_waveform_mse", "val_decoded_mse"} <= line.keys() for line in lines)
    assert lines[1]["epoch"] == 1 / 4  # of 4 fixed pairs
    assert not (tmp_path / "ck" / "latents").exists()
    assert checkpoint.load(tmp_path / "ck" / "best.pt")["config"]["preset"] == "legacy"


def test_legacy_freezes_nothing_in_stage_2_and_has_no_core_loss_in_stage_1(new_run):
    run = new_run(LEGACY)
    for stage, expected in ((1, [True, False, True]), (2, [True, True, True])):
        run.state.begin_stage(stage)
        parts = (run.state.model.encoder, run.state.model.core, run.state.model.decoder)
        before = [snapshot(part) for part in parts]
        run.train_phase(run.phases()[0], NotStopped)
        assert [moved(*pair) for pair in zip(parts, before, strict=True)] == expected


def test_accumulated_micro_batches_are_one_large_batch(new_run):
    """Same items, cut differently: the same loss and nearly the same step."""
    found = []
    for more in ("--batch_size 4", "--batch_size 1 --accumulate 4"):
        run = new_run(LEGACY, more)
        phase = run.phases()[0]
        stages.freeze_all_but(run.state.model, phase.trained(run.state.model))
        module = distributed.loss_module(phase, run.state.model)
        loss = train.train_step(run.state, phase, module, iter(run.loader(phase))).item()
        found.append((loss, run.state.item, snapshot(run.state.model.decoder)))
    (loss, item, weights), (other_loss, other_item, other_weights) = found
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert item == other_item == 4
    for one, other in zip(weights, other_weights, strict=True):
        assert torch.allclose(one, other, atol=2e-5)


# ---- what goes wrong ----


def test_loss_that_is_not_finite_stops_the_run_and_names_step_and_stage(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(losses, "total_loss", lambda parts: parts["waveform_mse"] * float("nan"))
    assert command(tmp_path / "ck") == 1
    error = capsys.readouterr().err
    assert "step 0" in error
    assert "stage 1" in error


def test_sigterm_while_python_ends_does_not_change_the_exit_code(tmp_path):
    """As a launcher sends it to those that end a moment later than the first."""
    end_slowly = (
        "import atexit, os, runpy, signal, sys; atexit.register(os.kill, os.getpid(), signal.SIGTERM); "
        "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [train.__file__, "--dataset_folder", str(tmp_path / "none"), "--checkpoint_folder", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", end_slowly, *words], cwd=Path(train.__file__).parent)
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (torch.cuda.OutOfMemoryError, 1, "smaller --batch_size"),
        (KeyboardInterrupt, 75, "run the same command again"),  # of a second Ctrl-C
    ],
)
def test_sudden_end_is_said_in_one_sentence(command, tmp_path, monkeypatch, capsys, error, code, words):
    def end(*_):
        raise error

    monkeypatch.setattr(train, "prepare", end)
    assert command(tmp_path / "ck") == code
    assert words in capsys.readouterr().err


def test_a_run_without_a_scaler_goes_on_with_one(new_run, monkeypatch):
    """As from bf16 on one card to fp16 on another."""
    run = new_run()
    run.state.begin_stage(1)
    run.save()
    enabled = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: enabled)
    run.resume(checkpoint.load(run.folder / "last.pt"))
    assert run.state.scaler.get_scale() == 1024


def test_overflow_in_fp16_is_skipped_with_a_lower_scale_until_it_happens_too_often(new_run, monkeypatch):
    """On the CPU, whose gradients overflow only where they are made to."""
    monkeypatch.setattr(training_state, "SKIPPED_STEPS_LIMIT", 2)
    run = new_run()
    run.state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (phase,) = run.phases()
    given = run.state, phase, distributed.loss_module(phase, run.state.model), iter(run.loader(phase))
    before = snapshot(run.state.model.decoder)
    overflow = next(run.state.model.decoder.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    train.train_step(*given)
    assert run.state.scaler.get_scale() == 512
    assert not moved(run.state.model.decoder, before)
    overflow.remove()
    train.train_step(*given)
    assert moved(run.state.model.decoder, before)
    next(run.state.model.decoder.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    train.train_step(*given)
    train.train_step(*given)
    with pytest.raises(train.TrainingError, match="last good weights"):
        train.train_step(*given)


@pytest.mark.parametrize(
    ("objective", "ratio", "words"),
    [("flow", 0.5, "larger core"), ("flow", 2.0, "--learning_rate"), ("flow", 1.0, None), ("mse", 0.5, None)],
)
def test_collapse_of_a_flow_is_said_once_with_what_to_change(new_run, capsys, objective, ratio, words):
    run = new_run(more=f"--objective {objective}")
    run.state.begin_stage(2)
    for run.state.step in (0, 3, 4):
        run.log.warn_of_collapse(run.state, {"val_latent_std_ratio": ratio})
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (words is not None)
    assert words is None or (words in said[0] and f"{ratio:.2f}" in said[0])


def test_keep_is_the_number_of_saves_on_the_disk(command, tmp_path, undisturbed):
    def saves(folder):
        return sorted(path.name for path in folder.glob("last*.pt"))

    assert saves(undisturbed) == ["last.1.pt", "last.pt"]
    assert command(tmp_path / "ck", more="--keep 1") == 0
    assert saves(tmp_path / "ck") == ["last.pt"]


def test_early_stop_ends_a_stage_when_nothing_gets_better(command, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Run, "validate", lambda self: {"val_loss": 1.0 + self.state.step})
    monkeypatch.setattr(train.Run, "write_sample", lambda self: None)
    more = "--stage1_steps 9 --stage2_steps 9 --joint_share 0 --eval_steps 2 --patience 2"
    assert command(tmp_path / "ck", more=more) == 0
    lines = [(line["stage"], line["step"]) for line in records(tmp_path / "ck")]
    assert lines == [(1, 0), (1, 2), (1, 4), (2, 0), (2, 2), (2, 4)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_refused(command, tmp_path, capsys):
    assert command(tmp_path / "ck", more="--device cuda") == 2
    assert "CUDA" in capsys.readouterr().err


def test_base_on_a_cpu_is_said_in_one_line_that_names_tiny(capsys):
    argv = ["--dataset_folder", "a", "--checkpoint_folder", "b"]
    run_log.warn_without_cuda(train.parse_args(argv), torch.device("cpu"))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert "--preset tiny" in printed[0]
