"""Training from its command line: what a run leaves behind, what it refuses, and how it ends."""

from __future__ import annotations

import io
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import synth
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import CHANNELS, LEGACY, RATE, TINY, assert_same_network, assert_same_tensors, records, write_dataset

import train
from continuation import checkpoint, latent_encoding, losses, memory, run_log, training_state
from continuation.dataset import read_meta
from continuation.layers import CONTEXT_LEVEL
from model import load_model

# What a run leaves behind


def test_run_leaves_all_its_files(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert {"last.pt", "best.pt", "stage1.pt", "metrics.jsonl", "samples", "tb", "latents"} <= names
    assert len(list((undisturbed / "samples").glob("*.mp3"))) == 4
    assert any((undisturbed / "tb").iterdir())


def shown_sounds(folder: Path, stage: int) -> dict:
    """What TensorBoard plays of a stage, by tag; every sound has a picture of the same step."""
    events = EventAccumulator(str(folder / "tb" / f"stage{stage}")).Reload()
    sounds = {tag: events.Audio(tag) for tag in events.Tags()["audio"]}
    steps = {tag.replace("/", "_spectrogram/"): [sound.step for sound in own] for tag, own in sounds.items()}
    assert steps == {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    return sounds


def test_tensorboard_plays_the_truth_once_and_what_the_network_makes_of_it_at_every_evaluation(undisturbed):
    """Of two songs, all that the validation split has."""
    stage1 = {"context": [0], "truth": [0], "reconstruction": [0, 3]}
    stage2 = {"context": [0], "truth": [0], "reconstruction": [0, 6], "continuation": [0, 6]}
    for stage, expected in ((1, stage1), (2, stage2)):
        steps = {tag: [sound.step for sound in own] for tag, own in shown_sounds(undisturbed, stage).items()}
        assert steps == {f"song{song}/{name}": own for song in (1, 2) for name, own in expected.items()}


def test_tensorboard_plays_the_true_sound(undisturbed, dataset):
    """The middle pair of the first song are its rows 2 and 3, brought to the level at which the first is heard."""
    rows = np.load(dataset / "val.npy").astype(float)
    level = CONTEXT_LEVEL / rows[2].std()
    sounds = shown_sounds(undisturbed, stage=1)
    for name, row in (("context", 2), ("truth", 3)):
        x, rate = soundfile.read(io.BytesIO(sounds[f"song1/{name}"][0].encoded_audio_string))
        assert rate == RATE
        np.testing.assert_allclose(x, level * rows[row, 0], atol=1e-3)


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
    prediction |= {"val_continuation", "val_loop"}
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


@pytest.mark.slow
def test_number_of_data_workers_changes_nothing(undisturbed, command, tmp_path):
    assert command(tmp_path / "ck", more="--num_workers 1") == 0
    assert_same_network(tmp_path / "ck" / "last.pt", undisturbed / "last.pt")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's default is kept")
def test_data_workers_are_forked_whatever_python_takes_by_default(new_run):
    run = new_run()
    for run.args.num_workers, context in ((0, None), (1, multiprocessing.get_context("fork"))):
        assert run.loader(run.state.phases()[0]).multiprocessing_context is context


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


# What is refused


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


# Other ways to train


@pytest.mark.slow
@pytest.mark.parametrize("number", range(checkpoint.OLDEST_FORMAT, checkpoint.FORMAT_VERSION + 1))
def test_checkpoint_of_an_earlier_day_generates_and_trains_on(tmp_path, monkeypatch, number):
    """tests/files holds a small one of every format that is still read, made by the command below in 4 steps."""
    monkeypatch.setattr("tiny.RATE", 1600)
    monkeypatch.setattr("tiny.CHUNK", 4800)
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("dataset"))
    Path("checkpoints").mkdir()
    file = f"checkpoint-format-{number}.pt"
    shutil.copy(Path(__file__).parent.parent / "files" / file, "checkpoints/last.pt")
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


@pytest.mark.slow
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
    for module in (train, latent_encoding):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(training_state, "WARMUP_STEPS", 1)
    assert command(tmp_path / "ck", more="--stage1_steps 100000 --stage2_steps 100000 --max_minutes 2") == 0
    cooled = [1.0] * 7 + [0.75, 0.5, 0.25]
    assert rates["reconstruct"] == pytest.approx(cooled, abs=2e-3)
    assert rates["predict"] == pytest.approx(cooled[:7], abs=2e-3)
    assert rates["joint"] == pytest.approx(cooled[7:], abs=2e-3)
    assert [(line["stage"], line["step"]) for line in records(tmp_path / "ck")] == [(1, 0), (1, 10), (2, 0), (2, 10)]


def test_minutes_that_end_before_stage_2_begins_are_warned_of(undisturbed, command, tmp_path, capsys):
    assert command(tmp_path / "ck", more=f"--stage1_from {undisturbed} --max_minutes 1e-6") == 0
    assert "no time for a step of stage 2" in capsys.readouterr().out


@pytest.mark.slow
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


@pytest.mark.slow
def test_mse_objective_learns_from_the_stage_1_of_a_flow_and_says_the_mean(undisturbed, command, tmp_path):
    assert command(tmp_path / "ck", more=f"--objective mse --stage1_from {undisturbed}") == 0
    model = load_model(tmp_path / "ck" / "best.pt")
    song = synth.song(5, 3, RATE, CHANNELS)
    assert model.config.objective == "mse"
    assert torch.equal(model.generate(song, 1, seed=0), model.generate(song, 1, seed=1))


@pytest.mark.slow
def test_legacy_trains_both_stages_without_a_cache(command, tmp_path):
    assert command(tmp_path / "ck", LEGACY) == 0
    lines = records(tmp_path / "ck")
    assert [(line["stage"], line["step"]) for line in lines] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert all({"val_loss", "val_waveform_mse", "val_decoded_mse"} <= line.keys() for line in lines)
    assert lines[1]["epoch"] == 1 / 4  # of 4 fixed pairs
    assert len(shown_sounds(tmp_path / "ck", stage=2)) == 2 * 4
    assert not (tmp_path / "ck" / "latents").exists()
    assert checkpoint.load(tmp_path / "ck" / "best.pt")["config"]["preset"] == "legacy"


# What goes wrong


def test_loss_that_is_not_finite_stops_the_run_and_names_step_and_stage(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(losses, "total_loss", lambda parts: parts["waveform_mse"] * float("nan"))
    assert command(tmp_path / "ck") == 1
    error = capsys.readouterr().err
    assert "step 0" in error
    assert "stage 1" in error


@pytest.mark.slow
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


@pytest.mark.slow
def test_keep_is_the_number_of_saves_on_the_disk(command, tmp_path, undisturbed):
    def saves(folder):
        return sorted(path.name for path in folder.glob("last*.pt"))

    assert saves(undisturbed) == ["last.1.pt", "last.pt"]
    assert command(tmp_path / "ck", more="--keep 1") == 0
    assert saves(tmp_path / "ck") == ["last.pt"]


@pytest.mark.slow
def test_early_stop_ends_a_stage_when_nothing_gets_better(command, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Run, "validate", lambda self: {"val_loss": 1.0 + self.state.step})
    monkeypatch.setattr(train.Run, "write_sample", lambda self: None)
    more = "--stage1_steps 9 --stage2_steps 9 --joint_share 0 --eval_steps 2 --patience 2"
    assert command(tmp_path / "ck", more=more) == 0
    lines = [(line["stage"], line["step"]) for line in records(tmp_path / "ck")]
    assert lines == [(1, 0), (1, 2), (1, 4), (2, 0), (2, 2), (2, 4)]
    shutil.rmtree(tmp_path / "ck" / "latents")
    assert command(tmp_path / "ck", more=more) == 0
    assert len(records(tmp_path / "ck")) == len(lines)
    assert not (tmp_path / "ck" / "latents").exists()  # nothing is left to do: nothing is encoded again


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
