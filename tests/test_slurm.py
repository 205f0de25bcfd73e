"""The batch scripts on a real Slurm: whatever it does to a run, the run ends as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import synth
import torch
from private_slurm import PROJECT, free_ports, wait_for
from tiny import NETWORK, RATE, assert_same_network, write_dataset

import train
from continuation import checkpoint, plots

torch.set_num_threads(1)
pytestmark = pytest.mark.slow
TINY = f"--preset tiny {NETWORK} --joint_share 0.34 --device cpu"
SCHEDULE = f"{TINY} --batch_size 2 --latent_variants 2 --stage1_steps 20 --stage2_steps 60 --eval_steps 10".split()
ENDLESS = f"{TINY} --batch_size 2 --stage1_steps 1000000 --eval_steps 1000000 --checkpoint_minutes 0.01".split()
TOGETHER = f"{TINY} --core_dropout 0 --latent_variants 1 --stage1_steps 20 --stage2_steps 20 --eval_steps 5".split()
CHUNK_SECONDS = 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture
def submit(slurm, tmp_path) -> Callable[..., str]:
    """Give sbatch words and variables of the environment, in the project's folder; the job's number."""

    def sbatch(*words, **environment) -> str:
        return slurm.run("sbatch", "--parsable", f"--output={tmp_path}/%x.out", *words, **environment)

    yield sbatch
    for log in tmp_path.glob("*.out"):
        print(log.name, log.read_text(), sep="\n")  # shown where a test fails


def evaluations(folder: Path) -> list[tuple[int, int]]:
    """Stage and step of the evaluations that a run has got through."""
    path = folder / "metrics.jsonl"
    return [(line["stage"], line["step"]) for line in checkpoint.read_records(path)] if path.exists() else []


def train_losses(folder: Path) -> list[float]:
    found = (line["train_loss"] for line in checkpoint.read_records(folder / "metrics.jsonl"))
    return [loss for loss in found if loss is not None]


def saved_step(folder: Path) -> int:
    return checkpoint.load_last(folder)["step"]


# The chain


def test_chain_leads_from_songs_to_a_continuation_though_a_task_of_the_array_is_interrupted(slurm, submit, tmp_path):
    folders = [tmp_path / name for name in ("the songs", "chunks", "dataset", "checkpoints")]
    folders[0].mkdir()
    for number in range(6):
        synth.write(folders[0] / f"song {number}.wav", 0.5 * synth.song(number, 10, RATE), RATE)
    flags = {
        "PREPROCESS_FLAGS": f"--sample_rate {RATE} --chunk_seconds {CHUNK_SECONDS} --workers 1",
        "DATASET_FLAGS": "--val_fraction 0.2 --test_fraction 0.2",
        "TRAIN_FLAGS": f"{TINY} --batch_size 2 --stage1_steps 2 --stage2_steps 3",
        "GENERATE_FLAGS": f"--device cpu --steps 2 --seconds {CHUNK_SECONDS}",
    }
    output = f"--output={tmp_path}/%x-%a.out"
    lines = slurm.run("bash", "slurm/submit_all.sh", *folders, output, **flags).splitlines()
    jobs = dict(line.split(": job ") for line in lines)
    assert list(jobs) == ["preprocess", "create_dataset", "train", "generate"]
    tasks = [f"{jobs['preprocess']}_{number}" for number in range(4)]
    wait_for((folders[1] / ".manifest.3-of-4.jsonl.lock").exists)
    slurm.run("scancel", "--batch", "--signal=USR1", tasks[3])
    assert [slurm.end_of(job) for job in (*tasks, *list(jobs.values())[1:])] == ["COMPLETED"] * 7
    assert [slurm.restarts(task) for task in tasks] == [0, 0, 0, 1]
    sound, rate = soundfile.read(folders[3] / "continuation.wav")
    assert (len(sound), rate) == (2 * CHUNK_SECONDS * RATE, RATE)


def test_failure_stays_failed_and_cancels_the_rest_of_the_chain(slurm, submit, tmp_path):
    folders = [tmp_path / name for name in ("songs", "chunks", "dataset", "checkpoints")]
    folders[0].mkdir()
    output = f"--output={tmp_path}/%x-%a.out"
    lines = slurm.run("bash", "slurm/submit_all.sh", *folders, output).splitlines()
    jobs = [line.split(": job ")[1] for line in lines]
    assert [slurm.end_of(job) for job in (f"{jobs[0]}_0", *jobs[1:])] == ["FAILED", *["CANCELLED"] * 3]
    assert slurm.show(f"{jobs[0]}_0")["ExitCode"] == "1:0"
    assert slurm.restarts(f"{jobs[0]}_0") == 0


# Interruptions


def test_run_that_was_stopped_preempted_and_lost_its_node_equals_the_undisturbed_one(
    slurm, submit, dataset, tmp_path, monkeypatch
):
    folder, undisturbed = tmp_path / "ck", tmp_path / "undisturbed"
    job = submit("slurm/train.sbatch", dataset, folder, *SCHEDULE, "--num_workers", 1)
    wait_for(lambda: (1, 10) in evaluations(folder))
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: slurm.restarts(job) == 1)
    wait_for(lambda: (2, 0) in evaluations(folder))
    submit("--partition=urgent", "--exclusive", "--wrap=true")
    wait_for(lambda: slurm.restarts(job) == 2)
    reached = max(evaluations(folder))  # a node that is lost before the run goes on would prove nothing
    wait_for(lambda: max(evaluations(folder)) > reached)
    slurm.kill_node()
    wait_for(lambda: slurm.restarts(job) == 3)
    assert slurm.end_of(job) == "COMPLETED"
    monkeypatch.setattr(plots, "plot_curves", lambda path, records: None)  # for speed
    argv = ["--dataset_folder", str(dataset), "--checkpoint_folder", str(undisturbed), *SCHEDULE]
    assert train.main(train.parse_args(argv)) == 0
    for name in ("last.pt", "best.pt", "stage1.pt"):
        assert_same_network(folder / name, undisturbed / name)
    assert evaluations(folder) == evaluations(undisturbed)


def test_run_near_its_time_limit_is_requeued_and_goes_on(slurm, submit, dataset, tmp_path):
    """The limit is lowered while it runs, because Slurm counts in minutes and looks every 30 s."""
    folder = tmp_path / "ck"
    job = submit("slurm/train.sbatch", dataset, folder, *ENDLESS)
    wait_for(lambda: (1, 0) in evaluations(folder))
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    wait_for(lambda: slurm.restarts(job) == 1)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    done = saved_step(folder)
    wait_for(lambda: saved_step(folder) > done > 0)
    slurm.run("scancel", job)


def test_cancelled_run_is_saved_stays_cancelled_and_leaves_no_copy_on_the_node(slurm, submit, dataset, tmp_path):
    folder, node = tmp_path / "ck", tmp_path / "node"
    node.mkdir()
    flags = [*ENDLESS, "--num_workers", 1]
    job = submit("slurm/train.sbatch", dataset, folder, *flags, COPY_DATASET="1", TMPDIR=str(node))
    wait_for((folder / "last.pt").exists)
    (copy,) = node.glob("dataset-*")
    assert {path.name for path in copy.iterdir()} == {path.name for path in dataset.iterdir()}
    slurm.run("scancel", job)
    assert slurm.end_of(job) == "CANCELLED"
    assert slurm.restarts(job) == 0
    assert "interrupted by SIGTERM, everything is saved" in (tmp_path / "train.out").read_text()
    assert str(copy) in checkpoint.load(folder / "last.pt")["command"]
    assert not copy.exists()


@pytest.mark.parametrize(
    ("restarts", "code", "output"), [("", 0, "started\n"), ("100", 0, "started\n"), ("101", 1, "")]
)
def test_job_that_was_restarted_too_often_fails_instead_of_starting(restarts, code, output):
    words = ["bash", "-c", "source slurm/requeue.sh; run_or_requeue echo started"]
    environment = os.environ | {"SLURM_RESTART_COUNT": restarts}
    done = subprocess.run(words, env=environment, cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, output)
    assert ("restarted more than 100 times" in done.stderr) == (code != 0)


# Several processes


@pytest.fixture(scope="module")
def two_nodes(slurm, dataset, tmp_path_factory) -> Path:
    """The checkpoint folder of a run over two nodes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("two_nodes") / "ck"
    (port,) = free_ports(1)
    words = ["train.py", "--dataset_folder", dataset, "--checkpoint_folder", folder, *TOGETHER, "--batch_size", 8]
    slurm.run(
        "srun", "--partition=both", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", sys.executable, *words,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    return folder


def test_losses_of_two_nodes_are_those_of_one_process_with_twice_the_batch(two_nodes, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "plot_curves", lambda path, records: None)  # for speed
    argv = ["--dataset_folder", str(dataset), "--checkpoint_folder", str(tmp_path), *TOGETHER, "--batch_size", "16"]
    assert train.main(train.parse_args(argv)) == 0
    two, one = (train_losses(folder) for folder in (two_nodes, tmp_path))
    assert len(two) == len(one) == 8  # means over 5 steps
    assert two == pytest.approx(one, rel=1e-3)


def test_run_of_two_processes_that_was_interrupted_equals_the_undisturbed_one(
    slurm, submit, two_nodes, dataset, tmp_path
):
    flags = [*TOGETHER, "--batch_size", 8]
    job = submit("--gpus=2", "slurm/train.sbatch", dataset, tmp_path / "ck", *flags, GLOO_SOCKET_IFNAME="lo")
    wait_for(lambda: (2, 5) in evaluations(tmp_path / "ck"))
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert slurm.end_of(job) == "COMPLETED"
    assert slurm.restarts(job) == 1
    for name in ("last.pt", "best.pt", "stage1.pt"):
        assert_same_network(tmp_path / "ck" / name, two_nodes / name)


def test_every_gpu_gets_a_process_and_all_know_where_to_meet(slurm, submit, tmp_path):
    """With a python that says what it was given instead of training."""
    python, told = (
        tmp_path / "python",
        "$SLURM_PROCID $SLURM_NTASKS $SLURM_LOCALID $CUDA_VISIBLE_DEVICES $MASTER_ADDR",
    )
    python.write_text(f'#!/bin/sh\n[ "$1" = train.py ] || exec {sys.executable} "$@"\necho {told} $MASTER_PORT\n')
    python.chmod(0o755)
    job = submit("--gpus=2", "slurm/train.sbatch", "ds", "ck", PYTHON=str(python))
    assert slurm.end_of(job) == "COMPLETED"
    first, second = sorted(line.split() for line in (tmp_path / "train.out").read_text().splitlines())
    assert [first[:4], second[:4]] == [["0", "2", "0", "0,1"], ["1", "2", "1", "0,1"]]
    assert first[4:] == second[4:]
    assert len(first[4:]) == 2
