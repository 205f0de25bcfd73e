"""The scan of an mp3's frames: what libsndfile would cut short is found, in linear time."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import synth

from continuation import audio, audio_decoders, mp3_scan

RATE = 12000


def decode(path) -> tuple[float, list[str]]:
    """(seconds, notes)"""
    decoder = audio.Decoder(path, RATE, 1)
    return sum(block.shape[1] for block in decoder) / RATE, decoder.notes


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# Mp3s that libsndfile would cut short


def test_headerless_vbr_is_decoded_at_full_length(tmp_path, needs_ffmpeg):
    x = synth.tone(440, 20, 44100)
    x[:, x.shape[1] // 2 :] += synth.noise(0, 10, 44100)
    wav = synth.write(tmp_path / "x.wav", x, 44100)
    synth.convert(wav, "-write_xing", "0", "-q:a", "4", tmp_path / "x.mp3")
    truncated = soundfile.read(tmp_path / "x.mp3")[0]
    assert len(truncated) < 0.9 * x.shape[1]  # the reason for all this
    seconds, notes = decode(tmp_path / "x.mp3")
    assert seconds == pytest.approx(20, abs=0.1)
    assert notes == []


def test_headerless_cbr_needs_no_ffmpeg(tmp_path, needs_ffmpeg, monkeypatch):
    wav = synth.write(tmp_path / "x.wav", synth.song(0, 10, 44100), 44100)
    synth.convert(wav, "-write_xing", "0", "-b:a", "128k", tmp_path / "x.mp3")
    monkeypatch.setattr(audio_decoders, "find_ffmpeg", lambda: None)
    assert decode(tmp_path / "x.mp3")[0] == pytest.approx(10, abs=0.1)


def test_two_joined_mp3s_are_decoded_at_full_length(tmp_path, needs_ffmpeg):
    data = synth.mp3_bytes(tmp_path / "x.mp3")
    tag = b"TAG" + bytes(125)
    (tmp_path / "joined.mp3").write_bytes(data + tag + data)
    seconds, notes = decode(tmp_path / "joined.mp3")
    assert seconds == pytest.approx(20, abs=0.15)
    assert notes == []


def test_an_mp3_cut_in_the_middle_gives_what_is_there_and_says_what_is_missing(tmp_path):
    data = synth.mp3_bytes(tmp_path / "x.mp3")
    (tmp_path / "cut.mp3").write_bytes(data[: len(data) // 2])
    seconds, notes = decode(tmp_path / "cut.mp3")
    assert seconds == pytest.approx(5, abs=0.15)
    assert len(notes) == 1
    assert notes[0].startswith("cut: 5.0") and notes[0].endswith(" s of 10.03 s are there")


def test_garbage_in_an_mp3_costs_only_the_garbage_and_is_noted(tmp_path, needs_ffmpeg):
    data = synth.mp3_bytes(tmp_path / "x.mp3")
    garbage = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8).tobytes()
    (tmp_path / "bad.mp3").write_bytes(data[: len(data) // 2] + garbage + data[len(data) // 2 :])
    seconds, notes = decode(tmp_path / "bad.mp3")
    assert seconds == pytest.approx(10, abs=0.3)
    assert len(notes) == 1
    assert "bytes of garbage at 5.0" in notes[0]


def test_tags_before_and_after_the_audio_are_no_garbage(tmp_path):
    id3v2 = b"ID3\x04\x00\x00" + bytes([0, 0, 2, 16]) + bytes(2 * 128 + 16)
    ape = b"APETAGEX" + (2000).to_bytes(4, "little") + (40).to_bytes(4, "little") + bytes(16 + 40)
    data = synth.mp3_bytes(tmp_path / "x.mp3")
    (tmp_path / "tagged.mp3").write_bytes(id3v2 + data + ape + b"TAG" + bytes(125))
    scan = mp3_scan.scan_file(tmp_path / "tagged.mp3")
    assert scan.gaps == []
    assert not scan.is_cut
    assert scan.frames == scan.promised_frames == 384  # 10 s of 1152 samples, and the encoder's delay
    assert decode(tmp_path / "tagged.mp3") == (10.0, [])


def test_layer_i_frames_are_counted(tmp_path):
    frame = b"\xff\xff\xc0\x04" + bytes(12 * 384000 // 44100 * 4 - 4)  # MPEG 1, 384 kbit/s, 44.1 kHz: silence
    scan = mp3_scan.scan_file(write(tmp_path / "x.mp3", 100 * frame))
    assert (scan.frames, scan.gaps, scan.is_cut) == (100, [], False)
    assert scan.seconds == pytest.approx(100 * 384 / 44100)


# The scan takes linear time


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "frames"),
    [
        (b"\xff", 0),
        (b"\x00\xff\xfb\x90", 0),  # a header everywhere, but none where the frame before it ends
        (2 * (b"\xff\xf3\x10\xc4" + bytes(22)) + b"x", 2),  # the smallest frames, and garbage behind every two
    ],
    ids=["ones", "headers", "frames"],
)
def test_twenty_megabytes_of_anything_are_scanned_in_seconds(tmp_path, pattern, frames):
    count = 20_000_000 // len(pattern)
    path = write(tmp_path / "x.mp3", pattern * count)
    before = time.process_time()
    assert mp3_scan.scan_file(path).frames == frames * count
    assert time.process_time() - before < 10


def test_the_search_finds_every_frame_that_a_slow_one_finds(monkeypatch):
    monkeypatch.setattr(mp3_scan._FrameSearch, "WINDOW_BYTES", 997)
    frame = b"\xff\xfb\x90\x64" + bytes(413)
    rng = np.random.default_rng(0)
    data, starts = b"", []
    for size in rng.integers(1, 3000, 20):
        data += rng.integers(0, 250, size, np.uint8).tobytes()  # without 0xFF
        starts.append(len(data))
        data += 2 * frame
    search = mp3_scan._FrameSearch(data)
    position, found = 0, []
    while (position := search.next(position)) < len(data):
        found.append(position)
        position += 2 * len(frame)
    assert found == starts
