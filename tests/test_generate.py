"""generate.py writes exactly what was asked for, hears exactly what training heard, and refuses the rest."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import synth
import torch

import generate
from continuation import audio, checkpoint, decoders
from continuation.cli import one_line
from model import PRESETS, ContinuationModel, load_model, make_model

PROJECT = Path(generate.__file__).parent
RATE = 12000
SONG_SECONDS = 24.5
SMALL = dataclasses.replace(
    PRESETS["tiny"], encoder_widths=(16, 16), encoder_blocks=(1, 1), decoder_widths=(16, 16), decoder_blocks=(1, 1),
    core_layers=1, core_width=32, core_heads=2,
)  # fmt: skip


def write_checkpoint(folder, config=SMALL, stage=2):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = make_model(config)
    for weights in model.core.parameters():
        torch.nn.init.normal_(weights, 0, 0.1)  # an untrained core says zero whatever it hears
    state = {"config": dataclasses.asdict(config), "ema": model.state_dict(), "stage": stage, "step": 5}
    checkpoint.save(folder / "best.pt", state)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints")


@pytest.fixture
def own_sound_is_heard(monkeypatch):
    """Let the mixer play the decoder's own sound; beside good copies it plays next to nothing of it."""
    monkeypatch.setattr("continuation.mixer.OWN_LOGIT", 64.0)


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    """Of another rate than the network's, so that all is resampled; soft, so that no peak is scaled down."""
    path = tmp_path_factory.mktemp("songs") / "song.flac"
    return synth.write(path, 0.1 * synth.song(1, SONG_SECONDS, 44100), 44100)


@pytest.fixture
def run(checkpoints, song):
    """Run the script in this process with the given flags: its exit code."""

    def run_main(output, *flags, folder=checkpoints, source=song):
        fixed = ["--checkpoint_folder", folder, "--input", source, "--output", output, "--steps", 2]
        return generate.main(generate.parse_args([str(flag) for flag in (*fixed, *flags)]))

    return run_main


def read(path, expected_rate=RATE):
    x, rate = soundfile.read(path, dtype="float32", always_2d=True)
    assert rate == expected_rate
    return x.T


class Heard(Exception):
    """Carries the array that the network was given."""


@pytest.fixture
def hears(run, monkeypatch, tmp_path):
    """What the network hears for the given flags."""

    def listen(self, audio, *args, **kwargs):
        raise Heard(audio)

    def run_and_catch(*flags, **options):
        monkeypatch.setattr(ContinuationModel, "generate", listen)
        with pytest.raises(Heard) as caught:
            run(tmp_path / "unheard.wav", *flags, **options)
        return caught.value.args[0]

    return run_and_catch


# ---- what it hears ----


def test_network_hears_the_very_array_that_preprocess_stored(tmp_path, hears):
    songs, chunks = tmp_path / "songs", tmp_path / "chunks"
    songs.mkdir()
    path = synth.write(songs / "a.mp3", synth.song(3, 33, 44100), 44100)
    command = [sys.executable, "preprocess.py", "--input_folder", songs, "--output_folder", chunks]
    subprocess.run([*command, "--sample_rate", str(RATE), "--workers", "1"], cwd=PROJECT, check=True)
    name = json.loads((chunks / "manifest.jsonl").read_text())["id"]
    stored = np.load(chunks / f"{name}.npy")
    assert len(stored) == 3
    for number, chunk in enumerate(stored):
        heard = hears("--start", 10 * number, source=path)
        assert np.array_equal(heard, audio.from_int16(chunk))


def test_end_is_the_last_ten_seconds_of_the_song(hears):
    from_end = hears("--start", "end")
    from_number = hears("--start", SONG_SECONDS - 10)
    assert from_end.shape == (2, 10 * RATE)
    assert np.array_equal(from_end, from_number)


def test_mono_song_is_doubled_for_a_stereo_network(tmp_path, hears):
    path = synth.write(tmp_path / "mono.wav", synth.tone(440, 11, 8000), 8000)
    heard = hears(source=path)
    assert heard.shape == (2, 10 * RATE)
    assert np.array_equal(heard[0], heard[1])
    assert np.abs(heard).max() == pytest.approx(0.5, abs=0.03)


def test_song_of_another_scale_is_heard_at_full_scale_and_said(tmp_path, hears, capsys):
    x = np.concatenate([synth.tone(440, 11, 8000, level=9000), synth.tone(440, 5, 8000, level=32767)], axis=1)
    path = synth.write(tmp_path / "loud.wav", x, 8000, subtype="FLOAT")
    heard = hears(source=path)
    assert np.abs(heard).max() == pytest.approx(0.98 * 9000 / 32767, abs=0.01)
    assert f"note: {path}: far louder than full scale: scaled by -90.5 dB" in capsys.readouterr().out


def test_name_of_the_song_does_not_matter(tmp_path, hears, song, needs_ffmpeg):
    raw = tmp_path / "song.raw"
    raw.write_bytes(song.read_bytes())
    assert np.array_equal(hears(source=raw), hears(source=song))


# ---- what it writes ----


@pytest.mark.parametrize("seconds", ["0.1", "3.21", "10", "12.34567"])
def test_output_has_exactly_the_length_asked_for(tmp_path, run, seconds):
    assert run(tmp_path / "next.wav", "--seconds", seconds) == 0
    assert read(tmp_path / "next.wav").shape == (2, round(float(seconds) * RATE))


def test_same_seed_same_samples_and_another_seed_others(tmp_path, run, own_sound_is_heard):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(tmp_path / f"{name}.wav", "--seed", seed, "--seconds", 2) == 0
    a, b, c = (read(tmp_path / f"{name}.wav") for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("flags", [("--steps", 3), ("--guidance", 4), ("--temperature", 0.5)])
def test_sampling_flags_reach_the_network(tmp_path, run, own_sound_is_heard, flags):
    assert run(tmp_path / "a.wav", "--seconds", 1) == 0
    assert run(tmp_path / "b.wav", "--seconds", 1, *flags) == 0
    assert not np.array_equal(read(tmp_path / "a.wav"), read(tmp_path / "b.wav"))


def test_several_samples_are_numbered_and_the_second_is_that_of_the_next_seed(tmp_path, run, capsys):
    assert run(tmp_path / "next.wav", "--num_samples", 3, "--seconds", 1, "--seed", 4) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["next-1.wav", "next-2.wav", "next-3.wav"]
    lines = re.findall(r"next-(\d)\.wav: 1\.00 s, generated in [\d.]+ s, [\d.]+ x real time", capsys.readouterr().out)
    assert lines == ["1", "2", "3"]
    assert run(tmp_path / "one.wav", "--seconds", 1, "--seed", 5) == 0
    assert np.array_equal(read(tmp_path / "next-2.wav"), read(tmp_path / "one.wav"))


# ---- the heard seconds before it ----


def test_with_input_the_song_comes_first_at_its_own_rate_and_the_same_continuation_after_it(tmp_path, run, song):
    assert run(tmp_path / "next.wav", "--seconds", 2) == 0
    assert run(tmp_path / "both.wav", "--seconds", 2, "--with_input") == 0
    both, heard = read(tmp_path / "both.wav", 44100), read(song, 44100)
    assert both.shape == (2, 12 * 44100)
    fade = round(0.02 * 44100)  # the only part of the input that the network may touch
    assert np.abs(both[:, : 10 * 44100 - fade] - heard[:, : 10 * 44100 - fade]).max() < 1e-4
    alone = audio.resample(read(tmp_path / "next.wav"), RATE, 44100, 2)
    assert np.abs(both[:, 10 * 44100 + 99 :] - alone[:, 99:])[:, :-99].max() < 1e-3  # but for the resampler's edges


@pytest.mark.parametrize("start", ["0", "2.345", "end"])
@pytest.mark.parametrize(("rate", "channels"), [(44100, 2), (48000, 1), (8000, 2)])
def test_sine_joins_its_continuation_without_a_step(tmp_path, run, monkeypatch, rate, channels, start):
    def go_on(self, audio, seconds, *args, **kwargs):
        first = audio[0, :400]  # of the context, whose phase depends on the start
        time = 2 * np.pi * 300 * np.arange(round((10 + seconds) * RATE)) / RATE
        basis = np.stack([np.sin(time[:400]), np.cos(time[:400])])
        sine, cosine = np.linalg.lstsq(basis.T, first, rcond=None)[0]
        return torch.from_numpy((sine * np.sin(time) + cosine * np.cos(time))[None].repeat(2, 0)).float()

    monkeypatch.setattr(ContinuationModel, "generate", go_on)
    source = synth.write(tmp_path / "sine.wav", synth.tone(300, 13.7, rate, channels), rate)
    assert run(tmp_path / "both.wav", "--with_input", "--seconds", 1, "--start", start, source=source) == 0
    both = read(tmp_path / "both.wav", rate)
    assert both.shape == (channels, pytest.approx(11 * rate, abs=2))
    around = both[:, 10 * rate - rate // 20 : 10 * rate + rate // 20]
    curvature = around[:, 2:] - 2 * np.cos(2 * np.pi * 300 / rate) * around[:, 1:-1] + around[:, :-2]  # 0 for a sine
    assert np.abs(curvature).max() < 2e-3
    assert np.abs(around).max() == pytest.approx(0.5, abs=0.005)


def test_with_input_a_rate_that_mp3_does_not_know_is_refused_before_generation(tmp_path, refuses, monkeypatch):
    source = synth.write(tmp_path / "song.wav", synth.tone(300, 11, 96000), 96000)
    monkeypatch.setattr(ContinuationModel, "generate", None)
    assert "mp3 cannot hold 96000 Hz" in refuses("--with_input", output="next.mp3", source=source)


# ---- several songs ----


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
    assert "network needs to hear 10 s" in errors[0] and "bad.mp3: no audio" in errors[1]
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


# ---- the weights in the box ----


def test_without_a_checkpoint_folder_the_weights_in_the_box_are_used(
    tmp_path, checkpoints, song, monkeypatch, capsys
):
    monkeypatch.setattr(generate, "PRETRAINED", tmp_path / "tiny.pt")
    flags = ["--input", str(song), "--output", str(tmp_path / "next.wav"), "--seconds", "1", "--steps", "1"]
    assert generate.main(generate.parse_args(flags)) == 2
    assert f"{tmp_path / 'tiny.pt'} is missing: give the --checkpoint_folder" in capsys.readouterr().err
    shutil.copy(checkpoints / "best.pt", tmp_path / "tiny.pt")
    assert generate.main(generate.parse_args(flags)) == 0
    assert read(tmp_path / "next.wav").shape == (2, RATE)


# ---- formats ----


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_every_output_format_can_be_read_again(tmp_path, run, suffix):
    assert run(tmp_path / f"next.{suffix}", "--seconds", 2) == 0
    assert read(tmp_path / f"next.{suffix}").shape == (2, 2 * RATE)


def test_m4a_is_written_where_ffmpeg_is(tmp_path, run, needs_ffmpeg):
    assert run(tmp_path / "next.m4a", "--seconds", 2) == 0
    assert audio.load_audio(tmp_path / "next.m4a", RATE, 2).shape[1] == pytest.approx(2 * RATE, abs=2500)


def test_output_folder_is_made_and_an_old_file_replaced_without_rests(tmp_path, run):
    folder = tmp_path / "new" / "folder"
    for seconds in (2, 1):
        assert run(folder / "next.wav", "--seconds", seconds) == 0
    assert [path.name for path in folder.iterdir()] == ["next.wav"]
    assert read(folder / "next.wav").shape == (2, RATE)


def test_peak_above_the_limit_is_turned_down_alone_and_is_said(tmp_path, run, monkeypatch, capsys):
    loud = torch.full((2, 11 * RATE), 0.5)
    loud[0, -1] = -1.96
    monkeypatch.setattr(ContinuationModel, "generate", lambda *args, **kwargs: loud)
    assert run(tmp_path / "next.wav", "--seconds", 1) == 0
    assert "peaks of up to 1.96 are limited" in capsys.readouterr().out
    written = read(tmp_path / "next.wav")
    assert written[0, -1] == pytest.approx(-0.98, abs=1e-4)
    assert written[1, -1] == pytest.approx(0.25, abs=1e-4)
    assert np.abs(written[:, : -RATE // 10] - 0.5).max() < 1e-4


def test_plot_writes_a_picture_for_each_sample(tmp_path, run):
    assert run(tmp_path / "next.wav", "--seconds", 1, "--num_samples", 2, "--plot", tmp_path / "p" / "next.png") == 0
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["next-1.png", "next-2.png"]
    assert (tmp_path / "p" / "next-1.png").read_bytes().startswith(b"\x89PNG")


def test_bf16_gives_nearly_the_same_sound_as_fp32(tmp_path, run, own_sound_is_heard):
    for precision in ("fp32", "bf16"):
        assert run(tmp_path / f"{precision}.flac", "--seconds", 1, "--precision", precision) == 0
    one, other = read(tmp_path / "fp32.flac"), read(tmp_path / "bf16.flac")
    assert not np.array_equal(one, other)
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("preset", ["legacy", "tiny"])
def test_networks_that_say_the_mean_ignore_the_seed(tmp_path, run, preset):
    config = PRESETS["legacy"] if preset == "legacy" else dataclasses.replace(SMALL, objective="mse")
    folder = write_checkpoint(tmp_path / "checkpoints", config)
    for seed in (1, 2):
        assert run(tmp_path / f"{seed}.wav", "--seed", seed, "--seconds", 1, folder=folder) == 0
    assert np.array_equal(read(tmp_path / "1.wav"), read(tmp_path / "2.wav"))


# ---- what it refuses ----


@pytest.fixture
def refuses(run, capsys, tmp_path):
    """Run with the given flags, expect one line on stderr and the exit code, and no output: that line."""

    def run_and_read(*flags, output="next.wav", code=2, **options):
        assert run(tmp_path / "out" / output, *flags, **options) == code
        assert not (tmp_path / "out" / output).exists()
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    return run_and_read


def test_unknown_output_suffix_is_refused_before_anything_is_looked_at(tmp_path, refuses):
    error = refuses(output="next.xyz", folder=tmp_path / "none", source=tmp_path / "none")
    assert "cannot write '.xyz', only .mp3 .wav .flac .ogg .m4a" in error


def test_missing_checkpoint_folder_is_refused(tmp_path, refuses):
    assert f"there is no checkpoint folder {tmp_path / 'none'}" in refuses(folder=tmp_path / "none")


def test_folder_without_best_is_refused(tmp_path, refuses):
    assert f"there is no checkpoint {tmp_path / 'best.pt'}" in refuses(folder=tmp_path)


def test_checkpoint_of_stage_1_is_refused(tmp_path, refuses):
    assert "is still in stage 1" in refuses(folder=write_checkpoint(tmp_path / "checkpoints", stage=1))


def test_damaged_checkpoint_is_refused(tmp_path, refuses):
    folder = write_checkpoint(tmp_path / "checkpoints")
    whole = (folder / "best.pt").read_bytes()
    (folder / "best.pt").write_bytes(whole[: len(whole) // 2])
    assert "best.pt is damaged or is not a checkpoint" in refuses(folder=folder)


def test_song_shorter_than_the_context_is_refused_with_both_lengths(tmp_path, refuses):
    short = synth.write(tmp_path / "short.wav", synth.tone(440, 9.5, 44100), 44100)
    for start in ("0", "end", "3"):
        error = refuses("--start", start, source=short)
        assert "short.wav is 9.50 s long, and the network needs to hear 10 s" in error


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


def test_song_is_read_by_what_it_holds_whatever_it_is_called(tmp_path, song, hears):
    assert np.array_equal(hears(source=shutil.copy(song, tmp_path / "song.raw")), hears())


@pytest.mark.parametrize("suffix", ["wav", "mp3", "m4a"])
def test_name_that_is_not_utf8_is_read_written_and_drawn(tmp_path, run, song, suffix, needs_ffmpeg):
    source = shutil.copy(song, tmp_path / "in\udcff.flac")
    output, picture = tmp_path / f"out\udcff.{suffix}", tmp_path / "out\udcff.png"
    assert run(output, "--seconds", 1, "--plot", picture, source=source) == 0
    assert audio.load_audio(output, RATE, 2).shape[1] == pytest.approx(RATE, abs=2500)  # m4a is padded
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_output_over_the_input_is_refused(song, run, capsys):
    before = song.read_bytes()
    assert run(song) == 2
    assert "would overwrite the input" in capsys.readouterr().err
    assert song.read_bytes() == before


@pytest.mark.parametrize("count", [1, 2])
def test_a_picture_over_the_input_is_refused(tmp_path, song, run, capsys, count):
    source = Path(shutil.copy(song, tmp_path / ("song.png" if count == 1 else "song-2.png")))
    before = source.read_bytes()
    assert run(tmp_path / "next.wav", "--plot", tmp_path / "song.png", "--num_samples", count, source=source) == 2
    assert f"--plot {source} would overwrite the input" in capsys.readouterr().err
    assert source.read_bytes() == before


@pytest.mark.parametrize("name", ["next.wav.tmp", ".next.wav.tmp", "next.wav.part"])
def test_an_input_that_is_named_like_a_temporary_file_of_the_output_is_not_touched(tmp_path, song, run, name):
    source = Path(shutil.copy(song, tmp_path / name))
    before = source.read_bytes()
    assert run(tmp_path / "next.wav", "--seconds", 1, source=source) == 0
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "next.wav"])


def test_a_numbered_output_over_the_input_is_refused(tmp_path, song, run, capsys):
    numbered = Path(shutil.copy(song, tmp_path / "song-2.flac"))
    before = numbered.read_bytes()
    assert run(tmp_path / "song.flac", "--num_samples", 2, source=numbered) == 2
    assert "song-2.flac would overwrite the input" in capsys.readouterr().err
    assert numbered.read_bytes() == before


@pytest.mark.parametrize(("plot", "count"), [("song.png", 1), ("song.PNG", 2)])
def test_picture_over_the_input_is_refused(tmp_path, song, run, capsys, plot, count):
    """A song is known by its content, and may be called anything."""
    source = tmp_path / ("song.png" if count == 1 else "song-2.PNG")
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
    config = dataclasses.replace(SMALL, sample_rate=9600, chunk_samples=96000)
    folder = write_checkpoint(tmp_path / "checkpoints", config)
    monkeypatch.setattr(ContinuationModel, "generate", None)
    assert "mp3 cannot hold 9600 Hz" in refuses(output="next.mp3", folder=folder)


def test_m4a_without_ffmpeg_is_refused(refuses, monkeypatch):
    monkeypatch.setattr(decoders, "find_ffmpeg", lambda: None)
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
     ("--temperature", "-1"), ("--precision", "fp8"), ("--guidance", "nan"), ("--guidance", "inf"),
     ("--seed", "-1"), ("--seed", str(2**32))],
)  # fmt: skip
def test_impossible_values_are_wrong_usage(tmp_path, run, flags):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "next.wav", *flags)
    assert caught.value.code == 2


# ---- the command line, and three lines of Python ----


def test_command_line_reports_its_exit_codes_and_lines(tmp_path, checkpoints, song):
    def command(source):
        flags = ["--checkpoint_folder", checkpoints, "--input", source, "--output", tmp_path / "next.mp3"]
        line = [sys.executable, "generate.py", *flags, "--seconds", "3.21", "--steps", "1"]
        return subprocess.run(line, cwd=PROJECT, capture_output=True, text=True)

    done = command(song)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"next\.mp3: 3\.21 s, generated in [\d.]+ s, [\d.]+ x real time\n$", done.stdout)
    assert read(tmp_path / "next.mp3").shape == (2, 38520)
    refused = command(tmp_path / "none.mp3")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


def test_three_lines_of_python_give_what_the_script_gives(tmp_path, checkpoints, song, run):
    model = load_model(checkpoints / "best.pt")
    continuation = model.generate(audio.load_audio(song, RATE, 2, seconds=10), seconds=10, seed=0, steps=2)
    audio.encode_audio(tmp_path / "python.wav", continuation.numpy(), RATE)
    assert run(tmp_path / "script.wav") == 0
    difference = np.abs(read(tmp_path / "python.wav") - read(tmp_path / "script.wav"))
    assert difference.max() < 1e-3  # the script rounds its input to int16, as training does
