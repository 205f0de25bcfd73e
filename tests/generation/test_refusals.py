"""generate.py refuses what cannot be with one sentence, and leaves no half file."""

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import synth
import torch
from generation_helpers import FORMAT, RATE
from small_networks import small_network, write_checkpoint

from continuation import audio, audio_decoders
from continuation.cli import one_line
from model import ContinuationModel


def test_unknown_output_suffix_is_refused_before_anything_is_looked_at(tmp_path, refuses):
    error = refuses(output="next.xyz", folder=tmp_path / "none", source=tmp_path / "none")
    assert "cannot write '.xyz', only .mp3 .wav .flac .ogg .m4a" in error


def test_missing_checkpoint_folder_is_refused(tmp_path, refuses):
    assert f"there is no checkpoint folder {tmp_path / 'none'}" in refuses(folder=tmp_path / "none")


def test_folder_without_best_is_refused(tmp_path, refuses):
    assert f"there is no checkpoint {tmp_path / 'best.pt'}" in refuses(folder=tmp_path)


def test_checkpoint_of_stage_1_is_refused(tmp_path, refuses):
    assert "is still in stage 1" in refuses(
        folder=write_checkpoint(tmp_path / "checkpoints", small_network(**FORMAT), stage=1)
    )


def test_damaged_checkpoint_is_refused(tmp_path, refuses):
    folder = write_checkpoint(tmp_path / "checkpoints", small_network(**FORMAT))
    whole = (folder / "best.pt").read_bytes()
    (folder / "best.pt").write_bytes(whole[: len(whole) // 2])
    assert "best.pt is damaged or is not a checkpoint" in refuses(folder=folder)


def test_song_shorter_than_the_context_is_refused_with_both_lengths(tmp_path, refuses):
    short = synth.write(tmp_path / "short.wav", synth.tone(440, 9.5, 44100), 44100)
    for start in ("0", "end", "3"):
        error = refuses("--start", start, source=short)
        assert "short.wav is 9.50 s long, and the network needs 10 s" in error


def test_song_with_a_sample_that_is_not_finite_is_refused(tmp_path, refuses):
    x = synth.tone(440, 11, 8000)
    x[0, 4000] = np.nan
    song = synth.write(tmp_path / "nan.wav", x, 8000, subtype="FLOAT")
    assert "nan.wav: non-finite samples: 1 of " in refuses(source=song)


@pytest.mark.parametrize("start", ["14.6", "20", "1000"])
def test_start_beyond_the_song_is_refused_with_the_latest_start(refuses, start):
    error = refuses("--start", start)
    assert f"is 24.50 s long: --start {start} leaves less than the 10 s" in error
    assert "start at 14.5 at the latest" in error


@pytest.mark.parametrize("name", ["bad.mp3", "bad.raw", "bad\n\x1b.mp3"])
@pytest.mark.parametrize(
    "content",
    [None, b"", b"#EXTM3U\nother.mp3\n", b"RIFF" + bytes(100), bytes(range(256)) * 99, 100 * b"\x01\x02\xf0\xf1"],
)
def test_unreadable_input_is_refused(tmp_path, refuses, content, name):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert f"error: {one_line(path)}: " in refuses(source=path)


def test_output_over_the_input_is_refused(song, run, capsys):
    before = song.read_bytes()
    assert run(song) == 2
    assert "would overwrite the input" in capsys.readouterr().err
    assert song.read_bytes() == before


def test_a_numbered_output_over_the_input_is_refused(tmp_path, song, run, capsys):
    numbered = Path(shutil.copy(song, tmp_path / "song-2.flac"))
    before = numbered.read_bytes()
    assert run(tmp_path / "song.flac", "--num_samples", 2, source=numbered) == 2
    assert "song-2.flac would overwrite the input" in capsys.readouterr().err
    assert numbered.read_bytes() == before


@pytest.mark.parametrize(("plot", "count"), [("song.png", 1), ("song.png", 2), ("song.PNG", 2)])
def test_picture_over_the_input_is_refused(tmp_path, song, run, capsys, plot, count):
    """A song is known by its content, and may be called anything."""
    source = tmp_path / (plot if count == 1 else plot.replace("song", "song-2"))
    before = Path(shutil.copy(song, source)).read_bytes()
    assert run(tmp_path / "next.wav", "--num_samples", count, "--plot", tmp_path / plot, source=source) == 2
    assert capsys.readouterr().err == f"error: --plot {source} would overwrite the input\n"
    assert source.read_bytes() == before


def test_other_names_of_the_input_are_refused_too(tmp_path, song, run):
    source = Path(shutil.copy(song, tmp_path / "song.flac"))
    before = source.read_bytes()
    os.link(source, tmp_path / "hard.flac")
    (tmp_path / "soft.flac").symlink_to(source)
    (tmp_path / "soft.png").symlink_to(source)
    for name in ("hard.flac", "soft.flac"):
        assert run(tmp_path / name, source=source) == 2
    assert run(tmp_path / "next.wav", "--plot", tmp_path / "soft.png", source=source) == 2
    assert source.read_bytes() == before


@pytest.mark.parametrize("flag", ["--output", "--plot"])
def test_output_that_is_a_folder_or_lies_in_a_file_is_refused(tmp_path, run, capsys, monkeypatch, flag):
    monkeypatch.setattr(ContinuationModel, "generate", None)
    suffix = {"--output": ".wav", "--plot": ".png"}[flag]
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / f"folder{suffix}", tmp_path / "file" / f"next{suffix}"):
        flags = [] if flag == "--output" else ["--plot", path]
        assert run(path if flag == "--output" else tmp_path / "next.wav", *flags) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {flag}") and error.count("\n") == 1


def test_mp3_of_a_rate_that_mp3_does_not_know_is_refused_before_generation(tmp_path, refuses, monkeypatch):
    model = small_network(sample_rate=9600, chunk_samples=96000)
    folder = write_checkpoint(tmp_path / "checkpoints", model)
    monkeypatch.setattr(ContinuationModel, "generate", None)
    assert "mp3 cannot hold 9600 Hz" in refuses(output="next.mp3", folder=folder)


def test_with_input_a_rate_that_mp3_does_not_know_is_refused_before_generation(tmp_path, refuses, monkeypatch):
    source = synth.write(tmp_path / "song.wav", synth.tone(300, 11, 96000), 96000)
    monkeypatch.setattr(ContinuationModel, "generate", None)
    assert "mp3 cannot hold 96000 Hz" in refuses("--with_input", output="next.mp3", source=source)


def test_m4a_without_ffmpeg_is_refused(refuses, monkeypatch):
    monkeypatch.setattr(audio_decoders, "find_ffmpeg", lambda: None)
    assert ".m4a needs ffmpeg" in refuses(output="next.m4a")


def test_cuda_without_a_device_is_refused(refuses, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in refuses("--device", "cuda")


def test_output_that_is_not_finite_is_a_failure(refuses, monkeypatch):
    broken = torch.full((2, 11 * RATE), float("nan"))
    monkeypatch.setattr(ContinuationModel, "generate", lambda *args, **kwargs: broken)
    assert "not finite" in refuses(code=1)


def test_gpu_whose_memory_runs_out_is_a_failure(refuses, monkeypatch):
    def too_large(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(ContinuationModel, "generate", too_large)
    assert "memory: try --device cpu" in refuses(code=1)


def test_full_disk_is_a_failure(refuses, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audio.os, "fsync", full)
    assert "No space left on device" in refuses(code=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_writing_ends_with_75_and_leaves_no_file(tmp_path, run, monkeypatch, capsys, number):
    def interrupt(*_):
        os.kill(os.getpid(), number)
        time.sleep(5)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start ignoring it

    monkeypatch.setattr(audio.os, "fsync", interrupt)  # when all is written, under a temporary name
    code = run(tmp_path / "next.wav", "--seconds", 1)
    signal.signal(signal.SIGINT, handler)
    assert code == 75
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == "interrupted: run the same command again\n"


@pytest.mark.parametrize(
    "flags",
    [("--start", "-1"), ("--start", "nan"), ("--start", "middle"), ("--start", "1e305"), ("--start", "86401"),
     ("--seconds", "1e305"), ("--seconds", "0"), ("--num_samples", "0"),
     ("--steps", "0"), ("--steps", "1000000000000"), ("--steps", "1e12"), ("--num_samples", "10001"),
     ("--temperature", "-1"), ("--variety", "-1"), ("--precision", "fp8"), ("--guidance", "nan"),
     ("--guidance", "inf"), ("--seed", "-1"), ("--seed", str(2**32))],
)  # fmt: skip
def test_impossible_values_are_wrong_usage(tmp_path, run, flags):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "next.wav", *flags)
    assert caught.value.code == 2
