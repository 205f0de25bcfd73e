"""generate.py hears exactly what training heard, and writes exactly what was asked for."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synth
import torch
from generation_helpers import FORMAT, PROJECT, RATE, SONG_SECONDS, read
from small_networks import small_network, write_checkpoint

import generate
from continuation import audio
from model import ContinuationModel, load_model


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


# What it hears


@pytest.mark.slow
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


def test_song_is_read_by_what_it_holds_whatever_it_is_called(tmp_path, song, hears):
    assert np.array_equal(hears(source=shutil.copy(song, tmp_path / "song.raw")), hears())


# What it writes


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


def test_variety_makes_seeds_differ_where_copies_are_played(tmp_path, run):
    for variety in (0, 2):
        for seed in (1, 2):
            name = tmp_path / f"{variety}-{seed}.wav"
            assert run(name, "--variety", variety, "--seed", seed, "--seconds", 2) == 0
    alike, varied = (
        np.abs(read(tmp_path / f"{variety}-1.wav") - read(tmp_path / f"{variety}-2.wav")).mean() for variety in (0, 2)
    )
    assert varied > 10 * alike


@pytest.mark.slow
def test_sampling_flags_reach_the_network(tmp_path, run, own_sound_is_heard):
    assert run(tmp_path / "a.wav", "--seconds", 1) == 0
    for flags in (("--steps", 3), ("--guidance", 4), ("--temperature", 0.5), ("--variety", 2)):
        assert run(tmp_path / "b.wav", "--seconds", 1, *flags) == 0
        assert not np.array_equal(read(tmp_path / "a.wav"), read(tmp_path / "b.wav")), flags


@pytest.mark.slow
def test_several_samples_are_numbered_and_the_second_is_that_of_the_next_seed(tmp_path, run, capsys):
    assert run(tmp_path / "next.wav", "--num_samples", 3, "--seconds", 1, "--seed", 4) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["next-1.wav", "next-2.wav", "next-3.wav"]
    lines = re.findall(r"next-(\d)\.wav: 1\.00 s, generated in [\d.]+ s, [\d.]+ x real time", capsys.readouterr().out)
    assert lines == ["1", "2", "3"]
    assert run(tmp_path / "one.wav", "--seconds", 1, "--seed", 5) == 0
    assert np.array_equal(read(tmp_path / "next-2.wav"), read(tmp_path / "one.wav"))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["legacy", "tiny"])
def test_networks_that_say_the_mean_ignore_the_seed(tmp_path, run, preset):
    model = small_network(preset, **FORMAT, objective="mse")
    folder = write_checkpoint(tmp_path / "checkpoints", model)
    for seed in (1, 2):
        assert run(tmp_path / f"{seed}.wav", "--seed", seed, "--seconds", 1, folder=folder) == 0
    assert np.array_equal(read(tmp_path / "1.wav"), read(tmp_path / "2.wav"))


@pytest.mark.slow
def test_bf16_gives_nearly_the_same_sound_as_fp32(tmp_path, run, own_sound_is_heard):
    for precision in ("fp32", "bf16"):
        assert run(tmp_path / f"{precision}.flac", "--seconds", 1, "--precision", precision) == 0
    one, other = read(tmp_path / "fp32.flac"), read(tmp_path / "bf16.flac")
    assert not np.array_equal(one, other)
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.9


# The heard seconds before it


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


# The pretrained weights


def test_without_a_checkpoint_folder_the_pretrained_weights_are_used(
    tmp_path, checkpoints, song, monkeypatch, capsys
):
    monkeypatch.setattr(generate, "PRETRAINED", tmp_path / "tiny.pt")
    flags = ["--input", str(song), "--output", str(tmp_path / "next.wav"), "--seconds", "1", "--steps", "1"]
    assert generate.main(generate.parse_args(flags)) == 2
    assert f"{tmp_path / 'tiny.pt'} is missing: give the --checkpoint_folder" in capsys.readouterr().err
    shutil.copy(checkpoints / "best.pt", tmp_path / "tiny.pt")
    assert generate.main(generate.parse_args(flags)) == 0
    assert read(tmp_path / "next.wav").shape == (2, RATE)


# Formats


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_every_output_format_can_be_read_again(tmp_path, run, suffix):
    assert run(tmp_path / f"next.{suffix}", "--seconds", 2) == 0
    assert read(tmp_path / f"next.{suffix}").shape == (2, 2 * RATE)


def test_m4a_is_written_where_ffmpeg_is(tmp_path, run, needs_ffmpeg):
    assert run(tmp_path / "next.m4a", "--seconds", 2) == 0
    assert audio.load_audio(tmp_path / "next.m4a", RATE, 2).shape[1] == pytest.approx(2 * RATE, abs=2500)


@pytest.mark.slow
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


@pytest.mark.slow
def test_plot_writes_a_picture_for_each_sample(tmp_path, run):
    assert run(tmp_path / "next.wav", "--seconds", 1, "--num_samples", 2, "--plot", tmp_path / "p" / "next.png") == 0
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["next-1.png", "next-2.png"]
    assert (tmp_path / "p" / "next-1.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["wav", "mp3", "m4a"])
def test_name_that_is_not_utf8_is_read_written_and_drawn(tmp_path, run, song, suffix, needs_ffmpeg):
    source = shutil.copy(song, tmp_path / "in\udcff.flac")
    output, picture = tmp_path / f"out\udcff.{suffix}", tmp_path / "out\udcff.png"
    assert run(output, "--seconds", 1, "--plot", picture, source=source) == 0
    assert audio.load_audio(output, RATE, 2).shape[1] == pytest.approx(RATE, abs=2500)  # m4a is padded
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["next.wav.tmp", ".next.wav.tmp", "next.wav.part"])
def test_an_input_that_is_named_like_a_temporary_file_of_the_output_is_not_touched(tmp_path, song, run, name):
    source = Path(shutil.copy(song, tmp_path / name))
    before = source.read_bytes()
    assert run(tmp_path / "next.wav", "--seconds", 1, source=source) == 0
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "next.wav"])


# The command line, and three lines of Python


@pytest.mark.slow
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
    x = audio.from_int16(audio.to_int16(audio.load_audio(song, RATE, 2, seconds=10)))  # rounded as in a dataset
    audio.encode_audio(tmp_path / "python.wav", model.generate(x, seconds=10, seed=0, steps=2).numpy(), RATE)
    assert run(tmp_path / "script.wav") == 0
    assert np.array_equal(read(tmp_path / "python.wav"), read(tmp_path / "script.wav"))
