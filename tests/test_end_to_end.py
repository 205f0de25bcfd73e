"""The whole way through the command lines: a folder of songs in, the next seconds of one of them out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import synth
from tiny import NETWORK

import generate
from continuation import audio
from continuation.dataset import open_dataset
from continuation.windows import Windows, rms_gain

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).resolve().parent.parent
RATE = 8000
CHUNK_SECONDS = 3
SONGS = 5
FLAGS = f"--preset tiny {NETWORK} --latent_variants 1 --batch_size 2"
STEPS = "--stage1_steps 2 --stage2_steps 3 --joint_share 0.34"


def run(script: str, *flags) -> str:
    """Run a script of the project as a person would; its output, after checking that it succeeded."""
    command = [sys.executable, script, *(str(flag) for flag in flags)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """What the first three commands leave behind, from songs of two formats and another rate and channel count."""
    root = tmp_path_factory.mktemp("whole way")  # a name with a space
    names = ("songs", "chunks", "dataset", "checkpoints")
    folders = {name: root / name for name in names}
    (folders["songs"] / "album").mkdir(parents=True)
    for number in range(SONGS):
        x = synth.song(number, 12.5, 22050, channels=1 + number % 2)
        suffix = ("mp3", "wav")[number % 2]
        synth.write(folders["songs"] / "album" / f"song {number}.{suffix}", 0.5 * x, 22050)
    flags = ["--sample_rate", RATE, "--chunk_seconds", CHUNK_SECONDS, "--workers", 1]
    run("preprocess.py", "--input_folder", folders["songs"], "--output_folder", folders["chunks"], *flags)
    flags = ["--val_fraction", 0.2, "--test_fraction", 0.2]
    run("create_dataset.py", "--output_folder", folders["chunks"], "--dataset_folder", folders["dataset"], *flags)
    flags = [*FLAGS.split(), *STEPS.split(), "--device", "cpu"]
    paths = ["--dataset_folder", folders["dataset"], "--checkpoint_folder", folders["checkpoints"]]
    run("train.py", *paths, *flags)
    return folders


def test_every_stage_keeps_the_stored_format(folders):
    metas = [json.loads((folders[name] / "meta.json").read_text()) for name in ("chunks", "dataset")]
    for meta in metas:
        assert (meta["sample_rate"], meta["channels"], meta["chunk_samples"]) == (RATE, 2, CHUNK_SECONDS * RATE)


def test_every_song_reaches_one_split_of_the_dataset_with_all_its_chunks(folders):
    songs = json.loads((folders["dataset"] / "meta.json").read_text())["songs"]
    assert sorted(song["source"] for song in songs) == sorted(
        f"album/song {number}.{('mp3', 'wav')[number % 2]}" for number in range(SONGS)
    )
    assert {song["split"] for song in songs} == {"train", "val", "test"}
    assert {song["rows"] for song in songs} == {4}  # 12.5 s


def test_training_reads_sample_for_sample_what_preprocessing_stored(folders):
    meta, splits = open_dataset(folders["dataset"])
    for split in splits.values():
        windows = Windows(split, meta)
        for pair in range(len(windows)):
            row = split.pairs[pair, 0] - windows.song(pair)["first_row"]
            stored = np.load(folders["chunks"] / f"{windows.song(pair)['id']}.npy")[row : row + 2]
            expected = audio.from_int16(np.concatenate(list(stored), axis=1))
            level = rms_gain(expected[:, : meta["chunk_samples"]])
            assert np.array_equal(windows.pair(pair), expected * np.float32(level))


def test_training_leaves_curves_samples_and_finite_figures(folders):
    lines = [json.loads(line) for line in (folders["checkpoints"] / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [(1, 0), (1, 2), (2, 0), (2, 3)]
    assert all(np.isfinite(line["val_loss"]) for line in lines)
    assert (folders["checkpoints"] / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((folders["checkpoints"] / "samples").glob("*.mp3"))) == 4


def test_continuation_has_the_exact_length_and_is_some_sound(folders, tmp_path):
    paths = ["--input", folders["songs"] / "album" / "song 0.mp3", "--output", tmp_path / "next.wav"]
    run("generate.py", "--checkpoint_folder", folders["checkpoints"], *paths, "--seconds", 4.3, "--steps", 2)
    x, rate = soundfile.read(tmp_path / "next.wav", always_2d=True)
    assert rate == RATE
    assert x.shape == (round(4.3 * RATE), 2)
    assert 1e-4 < np.abs(x).max() <= 1


def test_no_sample_after_the_context_matters(folders, tmp_path):
    song = 0.5 * synth.song(0, 9, RATE)
    other = song.copy()
    other[:, CHUNK_SECONDS * RATE :] = synth.noise(0, 9 - CHUNK_SECONDS, RATE, channels=2)
    continuations = []
    for name, x in (("song", song), ("other", other)):
        source, output = synth.write(tmp_path / f"{name}.wav", x, RATE), tmp_path / f"{name}-next.wav"
        paths = ["--checkpoint_folder", folders["checkpoints"], "--input", source, "--output", output]
        assert generate.main(generate.parse_args([str(word) for word in (*paths, "--steps", 2)])) == 0
        continuations.append(soundfile.read(output)[0])
    assert np.array_equal(*continuations)
