"""preprocess.py: what it stores, what it refuses, and that no interruption loses anything."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import synth

import preprocess
from continuation import audio, files, plots
from continuation.signals import StopSignals

RATE = 8000
SETTINGS = preprocess.Settings(sample_rate=RATE, channels=2, chunk_seconds=1.0, clip_seconds=None)
SMALL = ("--sample_rate", str(RATE), "--chunk_seconds", "1", "--workers", "1")


def command(folder: Path, out: Path, *arguments: str) -> list[str]:
    script = str(Path(preprocess.__file__))
    return [
        *(sys.executable, script, "--input_folder", str(folder), "--output_folder", str(out)),
        *SMALL,
        *arguments,
    ]


def preprocess_cli(folder: Path, out: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(folder, out, *arguments), capture_output=True, text=True, **options)


def preprocess_here(folder: Path, out: Path, *arguments: str) -> int:
    """In this process, and without worker processes; see `no_workers`."""
    return preprocess.main(preprocess.parse_args(command(folder, out, *arguments)[2:]))


@pytest.fixture
def no_workers(monkeypatch):
    """Let the songs be done in this process, which saves a second a run. Returns the sources done."""
    done = []

    def run_workers(songs, settings, count, stop):
        for song in songs:
            done.append(song.source)
            yield song, preprocess.process_song(song, settings)

    monkeypatch.setattr(preprocess, "run_workers", run_workers)
    return done


def manifest(out: Path, name: str = "manifest.jsonl") -> dict[str, dict]:
    lines = [json.loads(line) for line in (out / name).read_text().splitlines()]
    return {line["source"]: line for line in lines}


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".npy", ".jsonl")}


def make_songs(folder: Path, count: int, seconds: float = 2.5) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        synth.write(folder / f"song {number}.wav", synth.song(number, seconds, RATE), RATE)
    return folder


def process(path: Path, settings: preprocess.Settings = SETTINGS) -> dict:
    return preprocess.process_song(preprocess.Song(path.name, str(path), path.with_suffix(".npy")), settings)


# --- what is stored ---


def test_the_array_holds_the_decoded_song_in_whole_chunks_and_drops_the_rest(tmp_path):
    path = synth.write(tmp_path / "x.flac", synth.song(0, 3.7, 44100), 44100)
    line = process(path)
    chunks = np.load(tmp_path / "x.npy", allow_pickle=False)
    whole = audio.to_int16(audio.load_audio(path, RATE, 2))
    assert chunks.shape == (3, 2, RATE)
    assert chunks.dtype == np.int16
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), whole[:, : 3 * RATE])
    assert (line["status"], line["chunks"], line["seconds"]) == ("ok", 3, 3.7)


def test_peak_rms_and_silent_share_are_those_of_the_signal(tmp_path):
    x = np.concatenate([synth.tone(500, 3, RATE, 2, level=0.5), np.zeros((2, RATE), np.float32)], axis=1)
    line = process(synth.write(tmp_path / "x.wav", x, RATE, subtype="FLOAT"))
    assert line["peak"] == pytest.approx(0.5, abs=1e-3)
    assert line["rms"] == pytest.approx(0.5 * (0.5 * 3 / 4) ** 0.5, abs=1e-4)
    assert line["silent_share"] == 0.25


def test_clip_seconds_takes_the_beginning_only(tmp_path):
    path = synth.write(tmp_path / "x.wav", synth.song(0, 5, RATE), RATE)
    whole = process(path)
    all_chunks = np.load(tmp_path / "x.npy")
    clipped = process(path, preprocess.Settings(RATE, 2, 1.0, clip_seconds=2.5))
    assert (whole["seconds"], clipped["seconds"], clipped["chunks"]) == (5.0, 2.5, 2)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), all_chunks[:2])


def test_a_long_song_needs_no_more_memory_than_a_short_one(tmp_path):
    path = synth.write(tmp_path / "x.wav", synth.tone(300, 600, RATE), RATE, subtype="PCM_U8")
    process(synth.write(tmp_path / "warm_up.wav", synth.tone(300, 2, RATE), RATE))
    tracemalloc.start()
    line = process(path, preprocess.Settings(12000, 2, 10.0, None))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    float_bytes = 600 * 12000 * 2 * 4
    assert line["chunks"] == 60
    assert peak_bytes < float_bytes / 4


def test_ids_are_readable_and_differ_for_one_name_in_two_folders():
    assert preprocess.song_id("a/Für Elise (live).mp3").startswith("fur-elise-live-")
    assert preprocess.song_id("a/x.mp3") != preprocess.song_id("b/x.mp3")
    assert preprocess.song_id("日本.mp3").startswith("song-")
    assert preprocess.song_id(os.fsdecode(b"caf\xe9.mp3")).startswith("caf-")
    assert len(preprocess.song_id("x" * 300 + ".mp3")) == 40 + 1 + 10


# --- one folder with everything that can be wrong with an input, and what is merely odd ---

REJECTED = {
    "empty.mp3": "no audio: the file is empty",
    "text.mp3": "no audio: the content is of no known audio format",
    "playlist.mp3": "no audio: the content is of no known audio format",
    "short.wav": "shorter than one chunk: 0.50 s",
    "silent.wav": "silent: never above -60 dBFS",
    "dangling.mp3": "unreadable: No such file or directory",
    "pipe.mp3": "unreadable: not a regular file",
    "nonfinite.wav": "non-finite samples: 800 of 24000",
}
ACCEPTED = {
    "good.mp3": "",
    "mono.wav": "",
    "8 kHz 8 bit.wav": "",
    "96 kHz 24 bit.flac": "",
    "few nonfinite.wav": "100 non-finite samples set to 0",
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
    for name, count in (("few nonfinite.wav", 100), ("nonfinite.wav", 800)):
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
    prints = [audio.read_fingerprint(line["fingerprint"]) for line in lines]
    assert [(i, j) for i, j, _ in audio.find_same_music(prints)] == [(0, 1)]


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
        patch.setattr(audio, "find_ffmpeg", lambda: None)
        assert preprocess_here(folder, tmp_path / "out") == 1
    for line in manifest(tmp_path / "out").values():
        assert (line["status"], line["reason"]) == ("rejected", "needs ffmpeg: there is none on PATH")
    assert preprocess_here(folder, tmp_path / "out") == 0
    assert [line["chunks"] for line in manifest(tmp_path / "out").values()] == [3, 3]


def test_a_bug_in_a_decoder_rejects_the_song_and_goes_on(tmp_path, monkeypatch):
    path = synth.write(tmp_path / "x.wav", synth.song(0, 3, RATE), RATE)
    monkeypatch.setattr(audio.Decoder, "_judge", lambda self: 1 / 0)
    line = process(path)
    assert line["status"] == "rejected"
    assert line["reason"] == "decoder failed: ZeroDivisionError: division by zero"
    assert [item.name for item in tmp_path.iterdir()] == ["x.wav"]


# --- running again ---


def test_a_second_run_does_nothing_twice(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 3), tmp_path / "out"
    (folder / "bad.mp3").write_text("text")
    assert preprocess_here(folder, out) == 0
    before = contents(out)
    assert len(no_workers) == 4
    assert preprocess_here(folder, out) == 0
    assert len(no_workers) == 4
    assert contents(out) == before


def test_only_new_changed_and_damaged_songs_are_done_again_and_gone_ones_dropped(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 5), tmp_path / "out"
    preprocess_here(folder, out)
    lines = manifest(out)
    no_workers.clear()
    synth.write(folder / "song 0.wav", synth.song(9, 3.5, RATE), RATE)
    (folder / "song 1.wav").write_text("it is no song any more")
    os.truncate(out / f"{lines['song 2.wav']['id']}.npy", 1000)
    (folder / "song 3.wav").unlink()
    synth.write(folder / "song 5.wav", synth.song(5, 2.5, RATE), RATE)
    assert preprocess_here(folder, out) == 0
    assert no_workers == ["song 0.wav", "song 1.wav", "song 2.wav", "song 5.wav"]
    assert [line["chunks"] for line in manifest(out).values()] == [3, 0, 2, 2, 2]
    assert "song 3.wav" not in manifest(out)
    arrays = {f"{line['id']}.npy" for line in manifest(out).values() if line["status"] == "ok"}
    assert {path.name for path in out.glob("*.npy")} == arrays


def test_the_input_folder_may_move(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    preprocess_here(folder, out)
    shutil.move(folder, tmp_path / "moved")
    no_workers.clear()
    assert preprocess_here(tmp_path / "moved", out) == 0
    assert no_workers == []


def test_other_settings_in_the_same_output_are_refused_and_named(tmp_path, no_workers, capsys):
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    preprocess_here(folder, out)
    before = contents(out)
    assert preprocess_here(folder, out, "--sample_rate", "12000") == 2
    assert "sample_rate 8000, not 12000" in capsys.readouterr().err
    assert preprocess_here(folder, out, "--clip_seconds", "2") == 2
    assert "clip_seconds None, not 2.0" in capsys.readouterr().err
    assert contents(out) == before


def test_a_damaged_meta_is_refused(tmp_path, no_workers, capsys):
    folder, out = make_songs(tmp_path / "songs", 1), tmp_path / "out"
    out.mkdir()
    for damaged in ("{", "[]", '{"settings": 3}'):
        (out / "meta.json").write_text(damaged)
        assert preprocess_here(folder, out) == 2
        assert "meta.json is damaged" in capsys.readouterr().err


def test_max_files_takes_the_first_and_a_later_run_the_others(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 4), tmp_path / "out"
    assert preprocess_here(folder, out, "--max_files", "2") == 0
    assert list(manifest(out)) == ["song 0.wav", "song 1.wav"]
    assert preprocess_here(folder, out) == 0
    assert no_workers == [f"song {number}.wav" for number in range(4)]


def changed_bytes(path: Path, start: int, count: int) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(bytes(count))


def test_an_array_with_a_damaged_header_is_done_again(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 3), tmp_path / "out"
    preprocess_here(folder, out)
    before = contents(out)
    ids = [line["id"] for line in manifest(out).values()]
    size = (out / f"{ids[0]}.npy").stat().st_size
    changed_bytes(out / f"{ids[0]}.npy", 0, size)  # what a file system leaves after a power cut
    with files.ArrayWriter(out / f"{ids[1]}.npy", np.int16, (RATE, 2)) as writer:  # as large, of another shape
        writer.append(np.ones((2, RATE, 2), np.int16))
    no_workers.clear()
    assert preprocess_here(folder, out) == 0
    assert no_workers == ["song 0.wav", "song 1.wav"]
    assert contents(out) == before


def test_verify_finds_damage_within_an_array_and_mends_it(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    preprocess_here(folder, out)
    before = contents(out)
    line = manifest(out)["song 1.wav"]
    assert line["array_sha256"] == hashlib.sha256(np.load(out / f"{line['id']}.npy").tobytes()).hexdigest()
    changed_bytes(out / f"{line['id']}.npy", 9000, 2)
    no_workers.clear()
    assert preprocess_here(folder, out) == 0
    assert no_workers == []
    assert preprocess_here(folder, out, "--verify") == 0
    assert no_workers == ["song 1.wav"]
    assert contents(out) == before


def test_lines_without_a_checksum_are_kept_and_to_verify_done_again(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    preprocess_here(folder, out)
    lines = manifest(out)
    for line in lines.values():
        del line["array_sha256"], line["input_folder"]  # as an earlier version wrote them
    preprocess.rewrite_lines(out / "manifest.jsonl", lines)
    no_workers.clear()
    assert preprocess_here(folder, out) == 0
    assert no_workers == []
    assert preprocess_here(folder, out, "--verify") == 0
    assert no_workers == ["song 0.wav", "song 1.wav"]


# --- the input folder ---


@pytest.fixture
def of_two_folders(tmp_path, no_workers):
    """(what was made of a folder of 3 songs, another folder with one of the names and other music)"""
    out = tmp_path / "out"
    assert preprocess_here(make_songs(tmp_path / "songs", 3), out) == 0
    other = tmp_path / "other"
    other.mkdir()
    synth.write(other / "song 1.wav", synth.song(7, 2.5, RATE), RATE)
    no_workers.clear()
    return out, other


@pytest.mark.parametrize("missing", [True, False], ids=["songs are missing", "songs are others"])
def test_another_input_folder_is_refused(tmp_path, of_two_folders, no_workers, capsys, missing):
    out, other = of_two_folders
    if not missing:
        for name in ("song 0.wav", "song 2.wav"):
            shutil.copy2(tmp_path / "songs" / name, other)
    before = contents(out)
    assert preprocess_here(other, out) == 2
    said = capsys.readouterr().err
    assert f"was made of {tmp_path / 'songs'}, and {3 if missing else 1} of its songs are not in {other}" in said
    assert contents(out) == before
    assert no_workers == []


def test_another_input_folder_that_is_asked_for_replaces_the_songs_and_names_them(of_two_folders, no_workers, capsys):
    out, other = of_two_folders
    assert preprocess_here(other, out, "--other_input_folder") == 0
    assert "2 songs are no longer in the input folder and were removed: 'song 0.wav', 'song 2.wav'" in (
        capsys.readouterr().out
    )
    assert no_workers == list(manifest(out)) == ["song 1.wav"]
    assert len(list(out.glob("*.npy"))) == 1
    assert preprocess_here(other, out) == 0


def test_a_copy_of_the_input_folder_is_no_other_folder(tmp_path, of_two_folders, no_workers):
    out, _ = of_two_folders
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (tmp_path / "songs").iterdir():
        shutil.copy(path, copy)
        os.utime(copy / path.name, (1, 1))
    synth.write(copy / "song 3.wav", synth.song(3, 2.5, RATE), RATE)
    assert preprocess_here(copy, out) == 0
    assert len(manifest(out)) == 4
    (copy / "song 0.wav").unlink()
    assert preprocess_here(copy, out) == 0  # it is the folder of this output now
    assert len(manifest(out)) == 3


def test_songs_that_are_gone_are_counted_and_named(tmp_path, no_workers, capsys):
    folder, out = make_songs(tmp_path / "songs", 9), tmp_path / "out"
    preprocess_here(folder, out)
    for number in range(8):
        (folder / f"song {number}.wav").unlink()
    capsys.readouterr()
    assert preprocess_here(folder, out) == 0
    names = ", ".join(f"'song {number}.wav'" for number in range(5))
    assert f"8 songs are no longer in the input folder and were removed: {names} and 3 more\n" in (
        capsys.readouterr().out
    )


# --- interruptions ---


def test_a_torn_last_line_costs_one_song(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 3), tmp_path / "out"
    preprocess_here(folder, out)
    before = contents(out)
    os.truncate(out / "manifest.jsonl", len(before["manifest.jsonl"]) - 30)
    no_workers.clear()
    assert preprocess_here(folder, out) == 0
    assert no_workers == ["song 2.wav"]
    assert contents(out) == before


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(folder of songs, what a run makes of them)"""
    base = tmp_path_factory.mktemp("uninterrupted")
    folder = make_songs(base / "songs", 9, seconds=40)
    # The last takes so long that a run is caught before its end by a busy machine too.
    synth.write(folder / "the last.wav", synth.noise(0, 1200, RATE), RATE, subtype="PCM_U8")
    assert preprocess_cli(folder, base / "out").returncode == 0
    return folder, contents(base / "out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, uninterrupted, number, no_workers):
    folder, expected = uninterrupted
    out = tmp_path / "out"
    running = subprocess.Popen(
        command(folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(lambda: (out / "manifest.jsonl").exists() and manifest(out))
    if number in (signal.SIGINT, signal.SIGUSR1):
        os.killpg(running.pid, number)  # as Ctrl-C and Slurm do
    else:
        running.send_signal(number)
    assert running.wait(timeout=120) == (-number if number == signal.SIGKILL else preprocess.INTERRUPTED)
    # An orphaned worker ends itself, and removes what it was writing.
    wait_for(lambda: number != signal.SIGKILL or not list(out.glob("*.tmp")))
    assert not list(out.glob("*.tmp"))
    done = set(manifest(out))
    assert 0 < len(done) < 10
    assert (out / "manifest.jsonl.unfinished").exists()
    assert preprocess_here(folder, out) == 0
    assert not done & set(no_workers)
    assert contents(out) == expected


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


class Poison(preprocess.Song):
    """A song that kills the worker process that touches it, by a crash."""

    signal = signal.SIGSEGV

    @property
    def id(self) -> str:
        if multiprocessing.parent_process():
            os.kill(os.getpid(), self.signal)
        return super().id


def test_a_file_that_kills_its_worker_twice_is_rejected_and_the_others_are_done(tmp_path):
    folder = make_songs(tmp_path / "songs", 2)
    names = ["song 0.wav", "poison.wav", "song 1.wav"]
    kinds = [preprocess.Song, Poison, preprocess.Song]
    songs = [
        kind(name, str(folder / name), tmp_path / f"{name}.npy") for kind, name in zip(kinds, names, strict=True)
    ]
    done = preprocess.run_workers(songs, SETTINGS, 1, StopSignals())
    reasons = {song.source: (line["status"], line["reason"]) for song, line in done}
    assert reasons == {
        "song 0.wav": ("ok", ""),
        "song 1.wav": ("ok", ""),
        "poison.wav": ("rejected", "decoder crashed: signal 11"),
    }


class Victim(Poison):
    """A song whose worker process is killed from outside."""

    signal = signal.SIGKILL


def test_a_song_whose_worker_is_killed_from_outside_is_not_rejected_but_tried_again(tmp_path, monkeypatch, capsys):
    folder, out = make_songs(tmp_path / "songs", 3), tmp_path / "out"
    run_workers = preprocess.run_workers

    def with_a_victim(songs, *rest):
        kinds = [Victim if song.source == "song 1.wav" else preprocess.Song for song in songs]
        victims = [kind(song.source, song.path, song.array) for kind, song in zip(kinds, songs, strict=True)]
        return run_workers(victims, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "run_workers", with_a_victim)
        assert preprocess_here(folder, out) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "1 files are not done, for their worker process was killed: 'song 1.wav' ('signal 9'" in said
    assert list(manifest(out)) == ["song 0.wav", "song 2.wav"]
    assert (out / "manifest.jsonl.unfinished").exists()
    assert preprocess_here(folder, out) == 0
    assert [line["status"] for line in manifest(out).values()] == ["ok"] * 3
    assert not (out / "manifest.jsonl.unfinished").exists()


def test_a_worker_without_memory_tells_nothing_about_its_song(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(preprocess, "store_song", fail)
    with pytest.raises(MemoryError):
        process(synth.write(tmp_path / "x.wav", synth.song(0, 3, RATE), RATE))


@pytest.fixture
def orphan(tmp_path):
    """(folder, its output, process id of a worker in the middle of a song, whose parent was killed while it slept)"""
    if not Path("/proc/self/task").exists():
        pytest.skip("this system has no /proc")
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    synth.write(folder / "long.wav", synth.noise(0, 1200, RATE), RATE, subtype="PCM_U8")
    running = subprocess.Popen(command(folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: any(size > 10**5 for size in sizes(out.glob(".*.tmp"))))
    [worker] = workers_of(running.pid)
    os.kill(worker, signal.SIGSTOP)
    running.kill()
    running.wait()
    yield folder, out, worker
    if is_running(worker):
        os.kill(worker, signal.SIGKILL)


def sizes(paths: Iterable[Path]) -> Iterator[int]:
    """Of those that are still there: a temporary file may go at any moment."""
    for path in paths:
        with suppress(FileNotFoundError):
            yield path.stat().st_size


def test_an_orphaned_worker_ends_at_once_and_leaves_nothing(orphan):
    _, out, worker = orphan
    os.kill(worker, signal.SIGCONT)
    wait_for(lambda: not is_running(worker))
    assert not [path for path in out.iterdir() if path.suffix in (".npy", ".tmp")]


def test_an_orphaned_worker_that_outlives_the_next_run_changes_nothing(orphan, no_workers):
    folder, out, worker = orphan
    assert preprocess_here(folder, out) == 0
    done = contents(out)
    assert len(done) == 4
    os.kill(worker, signal.SIGCONT)
    wait_for(lambda: not is_running(worker))
    assert contents(out) == done


def test_what_a_killed_worker_was_writing_is_removed_by_the_next_run(orphan, no_workers):
    folder, out, worker = orphan
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not is_running(worker))
    assert list(out.glob(".*.tmp"))
    assert preprocess_here(folder, out) == 0
    assert not list(out.glob(".*.tmp"))


def workers_of(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


# --- shards ---


def test_shards_started_at_once_share_the_work_and_equal_one_run(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 5), tmp_path / "out"
    started = [
        subprocess.Popen(command(folder, out, "--shard", f"{index}/2"), stdout=subprocess.DEVNULL)
        for index in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert preprocess_here(folder, tmp_path / "whole") == 0
    first, second = (manifest(out, f"manifest.{index}-of-2.jsonl") for index in range(2))
    assert list(first) == ["song 0.wav", "song 2.wav", "song 4.wav"]
    assert first | second == manifest(tmp_path / "whole")
    for path in (tmp_path / "whole").glob("*.npy"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_song_that_moves_to_another_shard_is_not_done_again_and_gone_ones_leave(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 4), tmp_path / "out"
    shards = ("0/2", "1/2")
    for shard in shards:
        preprocess_here(folder, out, "--shard", shard)
    (folder / "song 1.wav").unlink()  # songs 2 and 3 change places
    no_workers.clear()
    for shard in reversed(shards):
        assert preprocess_here(folder, out, "--shard", shard) == 0
    assert list(manifest(out, "manifest.0-of-2.jsonl")) == ["song 0.wav", "song 3.wav"]
    assert list(manifest(out, "manifest.1-of-2.jsonl")) == ["song 2.wav"]
    assert len(list(out.glob("*.npy"))) == 3
    assert set(no_workers) <= {"song 3.wav"}  # its old shard had let it go already


def test_another_number_of_shards_in_the_same_output_is_refused(tmp_path, no_workers, capsys):
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    preprocess_here(folder, out, "--shard", "0/2")
    for arguments in ((), ("--shard", "0/3")):
        assert preprocess_here(folder, out, *arguments) == 2
        assert "manifest.0-of-2.jsonl comes from a run with other shards" in capsys.readouterr().err


def test_a_shard_without_files_is_done_at_once(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 1), tmp_path / "out"
    assert preprocess_here(folder, out, "--shard", "1/2") == 0
    assert manifest(out, "manifest.1-of-2.jsonl") == {}


def test_a_shard_without_a_usable_file_is_done_too(tmp_path, no_workers, capsys):
    folder, out = make_songs(tmp_path / "songs", 1), tmp_path / "out"
    (folder / "torn.mp3").write_bytes(b"no music")
    assert preprocess_here(folder, out, "--shard", "1/2") == 0
    assert "no usable audio file" in capsys.readouterr().out
    assert manifest(out, "manifest.1-of-2.jsonl")["torn.mp3"]["status"] != "ok"


@pytest.mark.parametrize("others", [(), ("other.mp3",)], ids=["empty", "another"])
@pytest.mark.parametrize("shard", [(), ("--shard", "0/2")])
def test_nothing_is_deleted_when_the_input_folder_has_none_of_the_songs(tmp_path, no_workers, capsys, shard, others):
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    preprocess_here(folder, out, *shard)
    before = {path: path.read_bytes() for path in out.iterdir() if path.suffix in (".npy", ".jsonl")}
    assert len(before) > 1
    (tmp_path / "wrong").mkdir()
    for name in others:
        (tmp_path / "wrong" / name).write_bytes(b"another song")
    assert preprocess_here(tmp_path / "wrong", out, *shard) == 2
    assert "is it the right folder, and mounted?" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_a_slurm_array_task_finds_its_shard_and_says_so(tmp_path, no_workers, monkeypatch, capsys):
    folder, out = make_songs(tmp_path / "songs", 3), tmp_path / "out"
    for name, value in {"ID": 14, "MIN": 10, "STEP": 2, "COUNT": 3}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert preprocess_here(folder, out) == 0
    assert "shard 2/3, from the Slurm array\n" in capsys.readouterr().out
    assert list(manifest(out, "manifest.2-of-3.jsonl")) == ["song 2.wav"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "13")
    assert preprocess_here(folder, out) == 2


# --- the command line, and the disk ---


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--sample_rate", "22050"), "22050 Hz is no multiple of 100 Hz: take 24000 (or 12000)"),
        (("--sample_rate", "11025"), "take 24000 (or 12000)"),
        (("--chunk_seconds", "0.03"), "no whole number of latents"),
        (("--shard", "2/2"), "is not I/N"),
        (("--workers", "0"), "0 is not above 0"),
        (("--clip_seconds", "nan"), "nan is not above 0"),
        (("--clip_seconds", "1e305"), "1e+305 s is more than a day"),
        (("--chunk_seconds", "1e305"), "1e+305 s is more than a day"),
    ],
)
def test_a_senseless_flag_is_refused_in_a_sentence(tmp_path, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stopped:
        preprocess_here(tmp_path, tmp_path / "out", *arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [("CPUS_PER_TASK", "abc"), ("CPUS_PER_TASK", "0"), ("CPUS_PER_TASK", ""), ("CPUS_PER_TASK", "-1"),
     ("ARRAY_TASK_ID", "abc"), ("ARRAY_TASK_STEP", "0"), ("ARRAY_TASK_COUNT", "4.5")],
)  # fmt: skip
def test_slurm_variables_that_are_no_numbers_are_refused_before_anything_is_written(
    tmp_path, no_workers, monkeypatch, capsys, name, value
):
    for part in ("ID", "MIN", "STEP", "COUNT"):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{part}", "1")
    monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "in").mkdir()
    flags = ["--input_folder", str(tmp_path / "in"), "--output_folder", str(tmp_path / "out")]
    assert preprocess.main(preprocess.parse_args(flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: SLURM_{name}={value} in the environment is not a whole number")
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_folders_that_make_no_sense_exit_2_and_a_folder_without_songs_exits_1(tmp_path, no_workers):
    (tmp_path / "songs").mkdir()
    assert preprocess_here(tmp_path / "missing", tmp_path / "out") == 2
    assert preprocess_here(tmp_path / "songs", tmp_path / "songs") == 2
    assert preprocess_here(tmp_path / "songs", tmp_path / "out") == 1
    (tmp_path / "songs" / "text.mp3").write_text("text")
    assert preprocess_here(tmp_path / "songs", tmp_path / "out") == 1


def test_a_folder_in_use_is_refused(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 1), tmp_path / "out"
    out.mkdir()
    with files.locked(out / ".manifest.jsonl.lock"):
        assert preprocess_here(folder, out) == 2
    assert preprocess_here(folder, out) == 0


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit is not on PATH")
def test_a_full_disk_is_a_clear_error_without_half_files_and_can_be_continued(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    limited = ["prlimit", "--fsize=40000", *command(folder, out)]
    result = subprocess.run(limited, capture_output=True, text=True)
    assert result.returncode == 1
    assert "error: " in result.stderr and "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        ".manifest.jsonl.lock",
        "manifest.jsonl",
        "manifest.jsonl.unfinished",
        "meta.json",
    ]
    assert preprocess_here(folder, out) == 0
    assert len(manifest(out)) == 2


def test_a_line_that_cannot_be_written_leaves_the_manifest_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "manifest.jsonl"
    preprocess.append_line(path, {"source": "a"})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        preprocess.append_line(path, {"source": "b"})
    assert path.read_text() == '{"source": "a"}\n'


def test_plot_hands_over_the_songs_as_float(tmp_path, no_workers, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "plot_waveforms", lambda *arguments: drawn.append(arguments))
    folder, out = make_songs(tmp_path / "songs", 6), tmp_path / "out"
    assert preprocess_here(folder, out, "--plot") == 0
    [(path, items, sample_rate)] = drawn
    assert (path, sample_rate) == (out / "waveforms.png", RATE)
    assert [title for title, _ in items] == ["song 0.wav", "song 2.wav", "song 4.wav"]
    song = audio.load_audio(folder / "song 0.wav", RATE, 2)
    np.testing.assert_allclose(items[0][1], song[:, : 2 * RATE], atol=1 / 32768)


def test_importing_the_script_loads_no_heavy_library():
    heavy = ["torch", "librosa", "matplotlib", "soundfile", "soxr", "tqdm", "pydub"]
    code = f"import sys, preprocess; print([name for name in {heavy} if name in sys.modules])"
    folder = Path(preprocess.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.stdout == "[]\n"
