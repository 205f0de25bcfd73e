"""generate.py on several songs: a folder of continuations, and no bad song stops the others."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import synth
import torch
from generation_helpers import RATE, read

from model import ContinuationModel


@pytest.fixture
def quick(monkeypatch):
    """The input again instead of the network."""

    def again(self, audio, seconds, *args, **kwargs):
        return torch.from_numpy(np.concatenate([audio, audio[:, : round(seconds * RATE)]], axis=1))

    monkeypatch.setattr(ContinuationModel, "generate", again)


@pytest.fixture
def songs(tmp_path):
    folder = tmp_path / "songs"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("one.wav", "more/two.flac", "more/one.wav")):
        synth.write(folder / name, synth.tone(300 + number, 11, 8000), 8000)
    return folder


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_folder_of_songs_becomes_a_folder_of_continuations(tmp_path, run, quick, songs, capsys):
    out, pictures = songs / "out", tmp_path / "pictures"
    for _ in range(2):  # the second time what is in `out` is no input
        assert run(out, "--format", "wav", "--plot", pictures, "--seconds", 1, source=songs) == 0
        assert names_in(out) == ["more/one.wav", "more/two.wav", "one.wav"]
        assert names_in(pictures) == ["more/one.png", "more/two.png", "one.png"]
    assert read(out / "more" / "two.wav").shape == (2, RATE)
    assert capsys.readouterr().err == ""  # no progress where there is no terminal


def test_several_songs_by_name_are_mp3_and_numbered_unless_one_is_asked_for(tmp_path, run, quick, songs):
    inputs = (songs / "one.wav", "--input", songs / "one.wav", songs / "more" / "two.flac")
    assert run(tmp_path / "out", "--seconds", 1, "--num_samples", 2, *inputs[1:], source=inputs[0]) == 0
    assert names_in(tmp_path / "out") == ["one-1.mp3", "one-2.mp3", "two-1.mp3", "two-2.mp3"]


def test_a_bad_song_does_not_stop_the_others_and_is_named_at_the_end(tmp_path, run, quick, songs, capsys):
    (songs / "bad.mp3").write_text("no song")
    synth.write(songs / "a short one.wav", synth.tone(300, 3, 8000), 8000)
    assert run(tmp_path / "out", "--seconds", 1, source=songs) == 1
    assert names_in(tmp_path / "out") == ["more/one.mp3", "more/two.mp3", "one.mp3"]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "network needs 10 s" in errors[0] and "bad.mp3: no audio" in errors[1]
    assert errors[2].startswith("error: 2 of 5 songs are not continued: ")
    assert "a short one.wav" in errors[2] and "bad.mp3" in errors[2]


def test_no_song_is_overwritten_by_the_continuation_of_another(tmp_path, run, quick, songs, capsys):
    other = songs / "one-1.wav"
    before = Path(shutil.copy(songs / "one.wav", other)).read_bytes()
    inputs = (songs / "one.wav", "--input", songs / "one.wav", other)
    assert run(songs, "--format", "wav", "--num_samples", 2, "--seconds", 1, *inputs[1:], source=inputs[0]) == 1
    assert f"--output {other} would overwrite the input" in capsys.readouterr().err
    assert other.read_bytes() == before


def test_progress_over_the_songs_is_shown_on_a_terminal(tmp_path, run, quick, songs, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run(tmp_path / "out", "--seconds", 1, source=songs) == 0
    shown = capsys.readouterr()
    assert "3/3" in shown.err and "song/s" in shown.err
    assert shown.out.count("x real time\n") == 3


def test_songs_of_one_name_keep_their_suffix_or_are_refused(tmp_path, run, quick, songs, capsys):
    synth.write(songs / "one.flac", synth.tone(300, 11, 8000), 8000)
    assert run(tmp_path / "out", "--seconds", 1, source=songs) == 0
    assert names_in(tmp_path / "out") == ["more/one.mp3", "more/two.mp3", "one.flac.mp3", "one.wav.mp3"]
    same = ("--input", songs / "one.wav", songs / "more" / "one.wav")
    assert run(tmp_path / "other", *same) == 2
    assert "more than one song called 'one.wav'" in capsys.readouterr().err


def test_output_that_no_folder_can_be_and_a_folder_without_songs_are_refused(tmp_path, run, songs, capsys):
    (tmp_path / "file.mp3").touch()
    (tmp_path / "empty").mkdir()
    for output, source, sentence in (
        (tmp_path / "file.mp3", songs, "is a file, and of several songs it must be a folder"),
        (songs, songs, "is the folder of the input"),
        (tmp_path / "out", tmp_path / "empty", "no audio file is in this folder"),
    ):
        assert run(output, source=source) == 2
        assert sentence in capsys.readouterr().err
