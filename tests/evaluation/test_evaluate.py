"""evaluate.py is repeatable, refuses what does not fit with one sentence, and names what a reader must know."""

import json
import math
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
import torch
from evaluation_helpers import (
    CHUNK,
    FORMAT,
    PROJECT,
    RATE,
    arguments,
    read_card,
    write_dataset,
)
from small_networks import small_network, write_checkpoint

import evaluate
from continuation import files, signals
from continuation.systems import file_name
from model import GUIDANCE, SAMPLING_STEPS, ContinuationModel


def test_folders_of_one_name_are_told_apart_by_their_paths():
    config = {"preset": "tiny", "objective": "flow"}
    names = evaluate.names_of([Path("a/ck"), Path("b/ck"), Path("c")], [config] * 3)
    assert names == ["tiny-flow (a/ck)", "tiny-flow (b/ck)", "tiny-flow (c)"]


@pytest.mark.slow
def test_stage_1_checkpoint_is_reconstructed_only_and_that_is_said(checkpoints, tmp_path, capsys, briefly):
    dataset = write_dataset(tmp_path / "dataset", (2,))
    assert evaluate.main(arguments(dataset, checkpoints[3:], tmp_path / "scores")) == 0
    note = "tiny-flow is still in stage 1: its reconstruction only"
    assert capsys.readouterr().out.count(f"note: {note}\n") == 1
    card = read_card(tmp_path / "scores")
    assert card["notes"][:2] == [note, "missing, for want of a checkpoint: tiny-mse, legacy-mse"]
    assert "tiny-flow" in card["figures"]["reconstruction"]
    assert card["figures"]["continuation"] == card["figures"]["context"] == {}
    assert "## Continuation" not in (tmp_path / "scores" / "scorecard.md").read_text()


def test_songs_that_a_checkpoint_was_trained_on_are_told(card):
    assert card["checkpoints"]["tiny-mse"]["songs_trained_on"] == ["test-0"]
    assert "tiny-mse was trained on 1 of these 2 songs: not held out" in card["notes"]


def test_a_second_run_in_the_same_folder_is_refused(dataset, checkpoints, tmp_path, capsys):
    (tmp_path / "scores").mkdir()
    running = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "scores",), daemon=True)
    running.start()
    while not (tmp_path / "scores" / "held").exists():
        assert running.is_alive()
        time.sleep(0.02)
    try:
        assert evaluate.main(arguments(dataset, checkpoints[3:], tmp_path / "scores")) == 2
    finally:
        running.kill()
    assert "folder in use: another run is working in" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == [".lock", "held"]


def hold(folder: Path) -> None:
    with files.locked(folder / ".lock"):
        (folder / "held").touch()
        time.sleep(600)


def test_networks_are_sampled_as_generate_samples_them():
    flags = ["--dataset_folder", "ds", "--checkpoint_folder", "ck", "--output_folder", "ev"]
    args = evaluate.parse_args(flags)
    assert (args.steps, args.guidance) == (SAMPLING_STEPS, GUIDANCE)


@pytest.mark.slow
def test_continuations_looked_for_in_parts_are_judged_alike(dataset, checkpoints, tmp_path, briefly, monkeypatch):
    for name, at_once in (("whole", evaluate.PASSAGES_AT_ONCE), ("parts", 0)):
        monkeypatch.setattr(evaluate, "PASSAGES_AT_ONCE", at_once)
        assert evaluate.main(arguments(dataset, checkpoints[1:2], tmp_path / name)) == 0
    whole, parts = (read_card(tmp_path / name)["figures"]["continuation"] for name in ("whole", "parts"))
    assert whole["tiny-mse"]["memorisation"]["mean"] == pytest.approx(parts["tiny-mse"]["memorisation"]["mean"])
    assert whole.keys() == parts.keys()


@pytest.fixture
def somebody(dataset, pairs, tmp_path):
    """Somebody's continuations, who knew the truth: at the songs' own level, named by pair ids."""
    folder = tmp_path / "somebody"
    folder.mkdir()
    for position in range(len(pairs.songs)):
        for pair in pairs.of_song(position):
            soundfile.write(folder / f"{pair.id}.wav", (pair.target / pair.gain).T, RATE, subtype="FLOAT")
    return folder


@pytest.mark.slow
def test_anybodys_predictions_are_judged_like_the_rest(dataset, checkpoints, somebody, card, tmp_path, briefly):
    args = arguments(dataset, checkpoints[:1], tmp_path / "scores", "--predictions", f"perfect={somebody}")
    assert evaluate.main(args) == 0
    systems = read_card(tmp_path / "scores")["figures"]["continuation"]
    for measure in ("loudness_db", "chroma_cosine", "copy_index_above_truth"):
        assert systems["perfect"][measure]["mean"] == pytest.approx(systems["truth"][measure]["mean"], abs=1e-3)
    assert sorted(card["pair_ids"]) == sorted(path.stem for path in somebody.iterdir())


@pytest.mark.parametrize("name", ["truth", "another song", "tiny-flow", "mine, ceiling", "mine", "another-song"])
def test_predictions_under_the_name_of_another_system_are_refused(
    dataset, checkpoints, somebody, tmp_path, capsys, name
):
    more = ("--predictions", f"mine={somebody}", "--predictions", f"{name}={somebody}")
    assert evaluate.main(arguments(dataset, checkpoints[:1], tmp_path / "scores", *more)) == 2
    assert f"--predictions {name}={somebody}: the name is taken" in capsys.readouterr().err


def test_missing_and_short_predictions_are_refused(dataset, checkpoints, somebody, tmp_path, capsys):
    args = arguments(dataset, checkpoints[:1], tmp_path / "scores", "--predictions", f"somebody={somebody}")
    last = sorted(somebody.iterdir())[-1]
    soundfile.write(last, np.zeros((100, 2)), RATE)
    assert evaluate.main(args) == 2
    assert f"{last} is too short" in capsys.readouterr().err
    last.unlink()
    assert evaluate.main(args) == 2
    assert f"{last} is missing" in capsys.readouterr().err


def test_prediction_with_a_sample_that_is_no_number_is_refused_before_any_work(
    dataset, checkpoints, somebody, tmp_path, capsys
):
    last = sorted(somebody.iterdir())[-1]
    x, _ = soundfile.read(last)
    x[7, 0] = math.nan
    soundfile.write(last, x, RATE, subtype="FLOAT")
    args = arguments(dataset, checkpoints[:1], tmp_path / "scores", "--predictions", f"somebody={somebody}")
    assert evaluate.main(args) == 2
    assert f"error: {last}: non-finite samples: 1 of {x.size}" in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()


def test_prediction_of_another_scale_is_refused_before_any_work(dataset, checkpoints, somebody, tmp_path, capsys):
    last = sorted(somebody.iterdir())[-1]
    x, _ = soundfile.read(last)
    soundfile.write(last, 32767 * x, RATE, subtype="FLOAT")
    args = arguments(dataset, checkpoints[:1], tmp_path / "scores", "--predictions", f"somebody={somebody}")
    assert evaluate.main(args) == 2
    assert f"error: {last} cannot be judged as it is: far louder than full scale" in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize("name", ["!!!", "..", "-", "\n", "\udcff", "_"])
def test_name_that_no_file_can_bear_is_wrong_usage(dataset, checkpoints, name):
    with pytest.raises(SystemExit) as caught:
        arguments(dataset, checkpoints, "scores", "--predictions", f"{name}=somewhere")
    assert caught.value.code == 2


def test_output_that_is_not_finite_is_a_failure(dataset, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ContinuationModel, "decode", lambda self, z, *_, **__: torch.full((1, 2, CHUNK), math.nan))
    assert evaluate.main(arguments(dataset, checkpoints[:1], tmp_path / "scores")) == 1
    assert "error: tiny-flow: the network's output is not finite" in capsys.readouterr().err
    assert not (tmp_path / "scores" / "scorecard.json").exists()


@pytest.mark.slow
def test_checkpoint_folders_of_any_name_are_judged(checkpoints, tmp_path, capsys, briefly):
    dataset, names = write_dataset(tmp_path / "dataset", (2,)), ("<!--|\n\x1b=\udcff", "b" * 120)
    folders = [Path(shutil.copytree(checkpoints[3], tmp_path / name)) for name in names]
    assert evaluate.main(arguments(dataset, folders, tmp_path / "scores")) == 0
    printed = "".join(capsys.readouterr())
    assert "\x1b" not in printed and r"tiny-flow (<!--|\n\x1b=\udcff) is still in stage 1" in printed
    assert all(name in read_card(tmp_path / "scores")["figures"]["reconstruction"]
               for name in (f"tiny-flow ({folder.name})" for folder in folders))  # fmt: skip
    lines = (tmp_path / "scores" / "scorecard.md").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith(r"| tiny-flow (\<!--\|\\n\\x1b=\\udcff) |") for line in lines)


def test_pictures_and_sounds_of_the_first_songs_are_written(scores, card):
    pictures = {path.name for path in (scores / "pictures").glob("*.png")}
    assert pictures == {"test-0-reconstruction.png", "test-0-continuation.png"}
    sounds = {path.stem for path in (scores / "sounds" / "test-0").iterdir()}
    assert sounds == {file_name(system) for system in card["figures"]["continuation"]}
    x, rate = soundfile.read(scores / "sounds" / "test-0" / "truth.wav")  # mp3 knows no 4 kHz
    assert rate == RATE and len(x) == 2 * CHUNK


def test_listening_page_plays_every_continuation_with_its_picture(scores, card):
    page = (scores / "listen.html").read_text(encoding="utf-8")
    (song,) = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    assert song["title"] == "test-0.mp3"  # the file, not the id made of it
    assert [system["name"] for system in song["systems"]] == list(card["figures"]["continuation"])
    for system in song["systems"]:
        for kind in ("sound", "picture"):
            assert (scores / unquote(system[kind])).is_file()


@pytest.mark.slow
def test_same_command_gives_the_same_scorecard_bit_for_bit(checkpoints, tmp_path, briefly):
    dataset = write_dataset(tmp_path / "dataset", (2, 2))
    for name in ("a", "b"):
        assert evaluate.main(arguments(dataset, checkpoints[:1], tmp_path / name)) == 0
    for suffix in ("json", "csv", "md"):
        one, other = (tmp_path / name / f"scorecard.{suffix}" for name in ("a", "b"))
        assert one.read_bytes() == other.read_bytes()


@pytest.fixture
def refuses(dataset, checkpoints, tmp_path, capsys):
    """Run, expect exit code 2 and one line on stderr, and no output folder: that line."""

    def run(*flags, folders=checkpoints[:1], source=dataset):
        assert evaluate.main(arguments(source, folders, tmp_path / "scores", *flags)) == 2
        assert not (tmp_path / "scores").exists()
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    return run


def test_missing_checkpoint_is_refused(refuses, tmp_path):
    assert f"there is no checkpoint {tmp_path / 'none' / 'best.pt'}" in refuses(folders=[tmp_path / "none"])


def test_missing_dataset_is_refused(refuses, tmp_path):
    assert "create_dataset.py has not finished" in refuses(source=tmp_path / "none")


def test_checkpoint_of_another_sample_rate_is_refused(refuses, tmp_path):
    folder = write_checkpoint(tmp_path / "ck", small_network(sample_rate=8000, chunk_samples=80000))
    assert f"{folder} was trained at 8000 Hz, and the dataset has 4000 Hz" in refuses(folders=[folder])


def test_mono_checkpoint_is_refused_for_a_stereo_dataset(refuses, tmp_path):
    folder = write_checkpoint(tmp_path / "ck", small_network(channels=1, **FORMAT))
    assert "was trained at 1 channels, and the dataset has 2 channels" in refuses(folders=[folder])


@pytest.mark.parametrize("id", ["../../outside", "/outside", "a\n"])
def test_dataset_whose_ids_lead_outside_is_refused(refuses, tmp_path, id):
    folder = write_dataset(tmp_path / "dataset")
    meta = json.loads((folder / "meta.json").read_text())
    meta["songs"][-1]["id"] = id
    (folder / "meta.json").write_text(json.dumps(meta))
    assert f"meta.json is damaged: id {id!r}" in refuses(source=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset"]


def test_output_folder_in_whose_place_a_file_is_is_refused(dataset, checkpoints, tmp_path, capsys):
    (tmp_path / "scores").touch()
    for folder in (tmp_path / "scores", tmp_path / "scores" / "below"):
        assert evaluate.main(arguments(dataset, checkpoints[:1], folder)) == 2
        error = capsys.readouterr().err
        assert error == f"error: --output_folder: a file is in the place of the folder {folder}, or of one above it\n"


def test_same_folder_twice_is_refused(refuses, checkpoints):
    assert "names the same folder twice" in refuses(folders=[checkpoints[0], checkpoints[0]])


@pytest.mark.parametrize(
    "flags",
    [
        ("--split", "trial"),
        ("--pairs_per_song", 0),
        ("--steps", 0),
        ("--steps", 10**12),
        ("--seed", -1),
        ("--guidance", "nan"),
    ],
)
def test_wrong_flag_is_wrong_usage(dataset, checkpoints, flags):
    with pytest.raises(SystemExit) as caught:
        arguments(dataset, checkpoints, "scores", *flags)
    assert caught.value.code == 2


def test_stop_signal_ends_it_with_the_code_for_run_me_again(dataset, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signals.StopSignals, "requested", True)
    assert evaluate.main(arguments(dataset, checkpoints[:1], tmp_path / "scores")) == 75
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.slow
def test_command_line_reports_its_exit_code_in_one_line(tmp_path, checkpoints):
    flags = [
        "--dataset_folder",
        tmp_path / "none",
        "--checkpoint_folder",
        checkpoints[0],
        "--output_folder",
        tmp_path,
    ]
    done = subprocess.run([sys.executable, "evaluate.py", *flags], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
