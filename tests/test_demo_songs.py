"""The demo's songs and the report at its end."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import demo_report
import make_demo_songs
import numpy as np
import pytest
from make_demo_songs import synthesise

SAMPLE_RATE = 12000
SECONDS = 12


@pytest.fixture(scope="module")
def songs() -> list[np.ndarray]:
    return [synthesise([0, index], SECONDS, SAMPLE_RATE) for index in range(4)]


def melodic_spectrum(song: np.ndarray) -> np.ndarray:
    """Power from 200 Hz, above kick and bass, to 2 kHz in bands of 10 Hz; of norm 1."""
    power = np.abs(np.fft.rfft(song.mean(axis=0))) ** 2
    bands = power[200 * SECONDS : 2000 * SECONDS].reshape(-1, 10 * SECONDS).sum(axis=1)
    return bands / np.linalg.norm(bands)


def test_song_is_stereo_of_the_exact_length_and_never_clips(songs):
    for song in songs:
        assert song.shape == (2, SECONDS * SAMPLE_RATE)
        assert song.dtype == np.float32
        assert np.isfinite(song).all()
        assert 0.3 < np.abs(song).max() <= 0.9
        assert np.abs(song[0] - song[1]).max() > 0.05


def test_same_seed_gives_the_same_song(songs):
    np.testing.assert_array_equal(songs[1], synthesise([0, 1], SECONDS, SAMPLE_RATE))


def test_songs_of_different_seeds_differ(songs):
    spectra = [melodic_spectrum(song) for song in songs]
    likeness = [a @ b for i, a in enumerate(spectra) for b in spectra[:i]]
    assert max(likeness) < 0.9


def test_no_second_of_a_song_is_silent(songs):
    for song in songs:
        rms = np.sqrt(np.mean(song.reshape(2, SECONDS, SAMPLE_RATE) ** 2, axis=(0, 2)))
        assert rms.min() > 0.03


def test_notes_begin_and_end_without_a_click():
    timbres = make_demo_songs.choose_timbres(np.random.default_rng(0))
    for timbre in timbres.values():
        sound = make_demo_songs.pitched_sound(timbre, 60, 0.3, SAMPLE_RATE)
        assert np.abs(sound[:, 0]).max() == 0
        assert np.abs(sound[:, -1]).max() < 1e-3
        assert np.abs(sound).max() > 0.3


def test_note_sounds_at_its_pitch():
    timbre = make_demo_songs.Timbre(1.0, 1.0, 3000, 0.0, 1.0, 0.01, 1.0, 1.0, 0.05)
    sound = make_demo_songs.pitched_sound(timbre, 69, 1.0, SAMPLE_RATE)[0, :SAMPLE_RATE]
    power = np.abs(np.fft.rfft(sound * np.hanning(SAMPLE_RATE))) ** 2
    assert np.argmax(power) == 440  # Hz: the transform's bins are 1 Hz apart
    between_harmonics = np.abs((np.arange(len(power)) + 220) % 440 - 220) > 20
    assert power[between_harmonics].max() < 1e-6 * power.max()  # nothing aliases


def test_command_line_writes_the_songs_as_mp3(tmp_path):
    import soundfile

    args = ["--output_folder", str(tmp_path), "--songs", "2", "--seconds", "2", "--sample_rate", "24000"]
    assert make_demo_songs.main(make_demo_songs.parse_args(args)) == 0
    for name in ("demo-00.mp3", "demo-01.mp3"):
        info = soundfile.info(tmp_path / name)
        assert (info.format, info.channels, info.samplerate) == ("MP3", 2, 24000)
        assert info.frames == 48000


def write_metrics(folder: Path, untrained: float, trained: float | None, loop: float, repeated: float) -> None:
    others = {"val_loop": loop, "val_input_repeated": repeated}
    lines = [
        {"stage": 1, "step": 0, "val_mr_stft": 4.0},
        {"stage": 2, "step": 0, "val_loss": 1.5, "val_continuation": untrained, **others},
        {"stage": 2, "step": 100, "loss": 1.0},
        {"stage": 2, "step": 200, "val_loss": 1.2, "val_continuation": trained, **others},
        {"stage": 2, "step": 300, "val_loss": 1.3, "val_continuation": 9.0, **others},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def report(*arguments: str | Path) -> int:
    return demo_report.main(demo_report.parse_args([str(argument) for argument in arguments]))


@pytest.mark.parametrize(("trained", "verdict"), [(3.5, "nearer to the truth"), (3.7, "no nearer to the truth")])
def test_report_says_which_is_nearer_to_the_truth_the_network_or_the_loop(tmp_path, capsys, trained, verdict):
    write_metrics(tmp_path, untrained=3.65, trained=trained, loop=3.6, repeated=4.5)
    assert report("figures", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:5]] == ["4.5000", "3.6000", "3.6500", f"{trained:.4f}"]
    assert lines[5] == f"The network is {verdict} than the loop."


@pytest.mark.parametrize("trained", [4.5, 5.0, float("nan"), None])
def test_report_fails_when_the_network_is_no_nearer_than_the_input_repeated(tmp_path, capsys, trained):
    write_metrics(tmp_path, untrained=3.65, trained=trained, loop=3.6, repeated=4.5)
    assert report("figures", tmp_path) == 1
    assert "than the input repeated" in capsys.readouterr().err


def test_report_fails_when_a_figure_is_missing(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"stage": 1, "step": 0, "val_mr_stft": 4.0}\n')
    assert report("figures", tmp_path) == 1
    assert "than the input repeated" in capsys.readouterr().err


def test_report_says_when_training_has_lowered_no_loss(tmp_path, capsys):
    record = {"val_loop": 3.6, "val_input_repeated": 4.5, "val_continuation": 3.5}
    lines = [record | {"stage": 2, "step": step, "val_loss": loss} for step, loss in ((0, 1.2), (50, 1.3))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report("figures", tmp_path) == 0
    assert "best.pt holds the weights that it started from" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sub/c.mp3", "no UTF-8 \udcff.mp3", "two\nlines.mp3"])
def test_demo_song_is_the_longest_of_the_test_side_byte_for_byte(tmp_path, capfdbinary, name):
    songs = [
        {"source": "a.mp3", "split": "train", "rows": 9},
        {"source": "b.mp3", "split": "test", "rows": 3},
        {"source": name, "split": "test", "rows": 5},
    ]
    (tmp_path / "meta.json").write_text(json.dumps({"songs": songs}))
    assert report("song", tmp_path) == 0
    sys.stdout.flush()
    assert capfdbinary.readouterr().out == os.fsencode(name) + b"\n"
