"""preprocess.py reads odd songs, rejects bad ones with a reason, and stops for neither."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import synth
from preprocessing import (
    RATE,
    make_songs,
    manifest,
    preprocess_cli,
    preprocess_here,
    process,
)

from continuation import audio, audio_decoders
from continuation.fingerprint import find_same_music, read_fingerprint

# One folder with everything that can be wrong with an input, and what is merely odd

REJECTED = {
    "empty.mp3": "no audio: the file is empty",
    "text.mp3": "no audio: the content is of no known audio format",
    "playlist.mp3": "no audio: the content is of no known audio format",
    "short.wav": "shorter than one chunk: 0.50 s",
    "silent.wav": "silent: never above -60 dBFS",
    "dangling.mp3": "unreadable: No such file or directory",
    "pipe.mp3": "unreadable: not a regular file",
    "nonfinite.wav": "non-finite samples: 800 of 24000",
    "one nonfinite.wav": "non-finite samples: 1 of 24000",
}
ACCEPTED = {
    "good.mp3": "",
    "mono.wav": "",
    "8 kHz 8 bit.wav": "",
    "96 kHz 24 bit.flac": "",
    "one chunk.wav": "shorter than two chunks: gives no pair",
    "cut.mp3": "shorter than two chunks: gives no pair; cut: 1.52 s of 3.03 s are there",
    "CAPITALS.WAV": "",
    'it\'s "quoted"\nand broken.wav': "",
    "ünïcødé 音楽.wav": "",
    os.fsdecode(b"latin caf\xe9.wav"): "",
    "one/same name.wav": "",
    "two/same name.wav": "",
    "linked/inside.wav": "",
}


def fill_with_everything(folder: Path, elsewhere: Path) -> None:
    song = synth.song(0, 3, RATE)
    for name in ("one", "two", "self"):
        (folder / name).mkdir(parents=True)
    elsewhere.mkdir()
    for name in [name for name, reason in ACCEPTED.items() if not reason and name.lower().endswith(".wav")]:
        target = elsewhere / "inside.wav" if name.startswith("linked") else folder / name
        synth.write(folder / "x", song, RATE, format="WAV").rename(target)  # soundfile writes no such names
    synth.write(folder / "mono.wav", song[:1], RATE)
    synth.write(folder / "8 kHz 8 bit.wav", song, 8000, subtype="PCM_U8")
    synth.write(folder / "96 kHz 24 bit.flac", synth.song(0, 3, 96000), 96000, subtype="PCM_24")
    synth.write(folder / "one chunk.wav", song[:, : RATE + 10], RATE)
    synth.write(folder / "short.wav", song[:, : RATE // 2], RATE)
    synth.write(folder / "silent.wav", song * 1e-4, RATE, subtype="FLOAT")
    for name, count in (("one nonfinite.wav", 1), ("nonfinite.wav", 800)):
        broken = song[:1].copy()
        broken[0, :count] = np.nan
        synth.write(folder / name, broken, RATE, subtype="FLOAT")
    options = {"bitrate_mode": "CONSTANT", "compression_level": 0.5}
    data = synth.write(folder / "good.mp3", synth.song(0, 3, 44100), 44100, **options).read_bytes()
    (folder / "cut.mp3").write_bytes(data[: len(data) // 2])
    (folder / "empty.mp3").write_bytes(b"")
    (folder / "text.mp3").write_text("It was a dark and stormy night.\n" * 500)
    (folder / "playlist.mp3").write_text(f"#EXTM3U\n{folder / 'mono.wav'}\n")
    (folder / "notes.txt").write_text("no song, no line")
    (folder / "dangling.mp3").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.mp3")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "linked again").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (folder / "self" / "loop.mp3").symlink_to(folder / "self")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """(result of the command, the folder of songs, its output, which lies inside)"""
    base = tmp_path_factory.mktemp("everything")
    folder, out = base / "songs", base / "songs" / "out"
    fill_with_everything(folder, base / "elsewhere")
    return preprocess_cli(folder, out, "--workers", "2"), folder, out


def test_every_input_gets_one_line_and_a_bad_one_stops_nothing(everything):
    result, _, out = everything
    assert result.returncode == 0, result.stderr
    assert manifest(out).keys() == REJECTED.keys() | ACCEPTED.keys()
    assert f"{len(REJECTED)} rejected: " in result.stdout


@pytest.mark.parametrize("name", REJECTED)
def test_a_bad_file_is_rejected_with_its_reason_and_has_no_array(everything, name):
    line = manifest(everything[2])[name]
    assert (line["status"], line["reason"], line["chunks"]) == ("rejected", REJECTED[name], 0)
    assert not (everything[2] / f"{line['id']}.npy").exists()


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_odd_file_is_ok_and_its_array_whole(everything, name):
    line = manifest(everything[2])[name]
    assert (line["status"], line["reason"]) == ("ok", ACCEPTED[name])
    chunks = np.load(everything[2] / f"{line['id']}.npy", allow_pickle=False)
    assert chunks.shape == (1 if name in ("cut.mp3", "one chunk.wav") else 3, 2, RATE)
    assert line["chunks"] == len(chunks)
    assert len(line["sha256"]) == 64
    assert line["fingerprint"]


def test_nothing_but_arrays_manifest_meta_and_lock_is_left_in_the_output(everything):
    _, _, out = everything
    arrays = {f"{line['id']}.npy" for line in manifest(out).values() if line["status"] == "ok"}
    assert {path.name for path in out.iterdir()} == arrays | {
        "manifest.jsonl",
        "meta.json",
        ".manifest.jsonl.lock",
    }


def test_the_manifest_is_sorted_and_meta_says_how_the_arrays_were_made(everything):
    _, _, out = everything
    sources = [json.loads(line)["source"] for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert sources == sorted(sources)
    assert json.loads((out / "meta.json").read_text()) == {
        "format": 1,
        "kind": "chunks",
        "sample_rate": RATE,
        "channels": 2,
        "chunk_samples": RATE,
        "dtype": "int16",
        "settings": {"chunk_seconds": 1.0, "clip_seconds": None},
    }


def test_audio_under_another_name_is_read_counted_and_named(tmp_path, no_workers, capsys):
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    (folder / "song 0.wav").rename(folder / "nameless")
    (folder / "sub").mkdir()
    (folder / "song 1.wav").rename(folder / "sub" / "song.wav.bak")
    synth.write(folder / "good.wav", synth.song(2, 2.5, RATE), RATE)
    (folder / "cover.jpg").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(1000))
    (folder / "notes.txt").write_text("no song")
    os.mkfifo(folder / "pipe")
    assert preprocess_here(folder, out) == 0
    lines = manifest(out)
    assert lines.keys() == {"good.wav", "nameless", "sub/song.wav.bak"}
    assert [line["status"] for line in lines.values()] == ["ok", "ok", "ok"]
    said = capsys.readouterr().out
    assert "audio by content and not by name, read too: 2 ('nameless', 'sub/song.wav.bak')" in said


@pytest.mark.parametrize("name", ["x.webm", "x.mp4", "x.m4b", "x.wv", "x.mka"])
def test_containers_that_ffmpeg_reads_are_songs(tmp_path, needs_ffmpeg, no_workers, name):
    (tmp_path / "songs").mkdir()
    form = {"x.webm": ("-c:a", "libopus"), "x.m4b": ("-c:a", "aac", "-f", "ipod")}.get(name, ())
    synth.encode(tmp_path / "songs" / name, synth.song(0, 3, 48000), 48000, *form)
    assert preprocess_here(tmp_path / "songs", tmp_path / "out") == 0
    (line,) = manifest(tmp_path / "out").values()
    assert (line["source"], line["status"], line["chunks"], line["reason"]) == (name, "ok", 3, "")


def test_inverted_copy_of_a_mono_song_has_its_fingerprint(tmp_path):
    mono = synth.song(0, 30, RATE, 1)
    lines = [
        process(synth.write(tmp_path / f"{name}.wav", x, RATE))
        for name, x in {"mono": mono, "inverted": mono * np.float32([[1], [-1]])}.items()
    ]
    prints = [read_fingerprint(line["fingerprint"]) for line in lines]
    assert [(i, j) for i, j, _ in find_same_music(prints)] == [(0, 1)]


def test_files_that_need_ffmpeg_are_rejected_without_it_and_tried_again_with_it(
    tmp_path, needs_ffmpeg, monkeypatch, no_workers
):
    folder = tmp_path / "songs"
    wav = synth.write(tmp_path / "x.wav", synth.song(0, 3, 44100), 44100)
    folder.mkdir()
    convert = ["ffmpeg", "-nostdin", "-v", "error", "-i", str(wav)]
    subprocess.run([*convert, folder / "x.m4a"], check=True)
    subprocess.run([*convert, "-write_xing", "0", "-q:a", "4", folder / "vbr.mp3"], check=True)
    with monkeypatch.context() as patch:
        patch.setattr(audio_decoders, "find_ffmpeg", lambda: None)
        assert preprocess_here(folder, tmp_path / "out") == 1
    for line in manifest(tmp_path / "out").values():
        assert (line["status"], line["reason"]) == ("rejected", "needs ffmpeg: there is none on PATH")
    assert preprocess_here(folder, tmp_path / "out") == 0
    assert [line["chunks"] for line in manifest(tmp_path / "out").values()] == [3, 3]


def test_a_bug_in_a_decoder_rejects_the_song_and_goes_on(tmp_path, monkeypatch):
    path = synth.write(tmp_path / "x.wav", synth.song(0, 3, RATE), RATE)
    monkeypatch.setattr(audio.Decoder, "_check_totals", lambda self: 1 / 0)
    line = process(path)
    assert line["status"] == "rejected"
    assert line["reason"] == "decoder failed: ZeroDivisionError: division by zero"
    assert [item.name for item in tmp_path.iterdir()] == ["x.wav"]
