"""audio.py against signals with a known answer, and against files that are not what they seem."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import synth

from continuation import audio, audio_decoders, mp3_scan

RATE = 12000


def level_db(x: np.ndarray, frequency: float, rate: int) -> float:
    """The level of one partial, as dB of its peak, by projection; the edges are left out."""
    x = x[0, rate // 10 : -rate // 10]
    window = np.hanning(len(x))
    phases = np.exp(-2j * np.pi * frequency * np.arange(len(x)) / rate)
    return 20 * np.log10(max(abs(2 * np.sum(x * window * phases) / window.sum()), 1e-10))


# Decoding


@pytest.mark.parametrize("rate", [44100, 48000])
def test_a_tone_below_half_the_new_rate_passes_and_one_above_it_vanishes(tmp_path, rate):
    passes = synth.write(tmp_path / "low.wav", synth.tone(4000, 1, rate), rate, subtype="FLOAT")
    vanishes = synth.write(tmp_path / "high.wav", synth.tone(8000, 1, rate), rate, subtype="FLOAT")
    assert level_db(audio.load_audio(passes, RATE, 1), 4000, RATE) == pytest.approx(-6.02, abs=0.01)
    assert audio.rms_db(audio.load_audio(vanishes, RATE, 1)[:, 1000:-1000]) < -100


@pytest.mark.parametrize(("rate", "new_rate"), [(44100, 12000), (48000, 44100), (8000, 24000), (24000, 24000)])
def test_ten_seconds_stay_exactly_ten_seconds(tmp_path, rate, new_rate):
    path = synth.write(tmp_path / "x.flac", synth.song(0, 10, rate), rate)
    assert audio.load_audio(path, new_rate, 2).shape == (2, 10 * new_rate)


def test_the_stream_equals_one_shot_resampling_bit_for_bit(tmp_path):
    x = synth.song(3, 7, 44100)
    path = synth.write(tmp_path / "x.wav", x, 44100, subtype="FLOAT")
    blocks = list(audio.Decoder(path, RATE, 2))
    assert len(blocks) > 3
    np.testing.assert_array_equal(np.concatenate(blocks, 1), soxr.resample(x.T, 44100, RATE, quality="HQ").T)


@pytest.mark.parametrize("bitrate_mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_read_in_blocks_equals_one_read(tmp_path, bitrate_mode):
    path = tmp_path / "x.mp3"
    synth.mp3_bytes(path, seconds=5, bitrate_mode=bitrate_mode)
    once = soundfile.read(path, dtype="float32")[0].T
    np.testing.assert_array_equal(audio.load_audio(path, 44100, 2), once)


def test_a_part_is_the_same_samples_as_the_whole(tmp_path):
    path = tmp_path / "x.mp3"
    synth.mp3_bytes(path)
    whole = audio.load_audio(path, RATE, 2)
    np.testing.assert_array_equal(audio.load_audio(path, RATE, 2, 2.5, 3), whole[:, 30000:66000])
    np.testing.assert_array_equal(audio.load_audio(path, RATE, 2, 9.0, 3), whole[:, 108000:])
    np.testing.assert_array_equal(audio.load_audio(path, RATE, 2, seconds=4), whole[:, :48000])


def test_mono_is_doubled_and_stereo_averaged(tmp_path):
    mono = synth.write(tmp_path / "mono.wav", synth.tone(440, 1, RATE), RATE, subtype="FLOAT")
    doubled = audio.load_audio(mono, RATE, 2)
    np.testing.assert_array_equal(doubled, np.repeat(synth.tone(440, 1, RATE), 2, axis=0))
    opposite = synth.tone(440, 1, RATE, 2) * np.float32([[1], [-1]])
    stereo = synth.write(tmp_path / "stereo.wav", opposite, RATE, subtype="FLOAT")
    assert np.abs(audio.load_audio(stereo, RATE, 1)).max() == 0


@pytest.mark.parametrize(
    ("name", "rate", "options"),
    [
        ("x.wav", 8000, {"subtype": "PCM_U8"}),
        ("x.flac", 96000, {"subtype": "PCM_24"}),
        ("x.aiff", 44100, {}),
        ("x.ogg", 44100, {}),
        ("x.opus", 48000, {"format": "OGG", "subtype": "OPUS"}),
        ("x.mp3", 44100, {"bitrate_mode": "VARIABLE"}),
    ],
)
def test_every_format_is_read_at_full_length_with_its_tone(tmp_path, name, rate, options):
    path = synth.write(tmp_path / name, synth.tone(1000, 3, rate, 2), rate, **options)
    decoder = audio.Decoder(path, RATE, 2)
    x = np.concatenate(list(decoder), 1)
    assert x.shape == (2, 3 * RATE)
    assert decoder.notes == []
    assert level_db(x, 1000, RATE) == pytest.approx(-6.0, abs=0.7)  # LAME lowers VBR by 0.65 dB


@pytest.mark.parametrize("name", ["x.m4a", "x.aac", "x.wma"])
def test_what_soundfile_cannot_read_comes_through_ffmpeg(tmp_path, needs_ffmpeg, name):
    wav = synth.write(tmp_path / "x.wav", synth.tone(1000, 3, 44100, 2), 44100)
    synth.convert(wav, "-b:a", "128k", tmp_path / name)
    x = audio.load_audio(tmp_path / name, RATE, 2)
    assert x.shape[1] == pytest.approx(3 * RATE, abs=0.1 * RATE)
    assert level_db(x, 1000, RATE) == pytest.approx(-6.0, abs=0.5)


def test_the_name_does_not_decide_about_the_decoder(tmp_path):
    wav = synth.write(tmp_path / "x.wav", synth.tone(1000, 1, RATE), RATE, subtype="FLOAT")
    wav.rename(tmp_path / "x.mp3")
    np.testing.assert_array_equal(audio.load_audio(tmp_path / "x.mp3", RATE, 1), synth.tone(1000, 1, RATE))


def test_a_name_that_is_not_utf8_can_be_decoded(tmp_path):
    wav = synth.write(tmp_path / "x.wav", synth.tone(1000, 1, RATE), RATE)
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 'n\n.wav")
    os.rename(wav, odd)
    assert audio.load_audio(odd, RATE, 1).shape == (1, RATE)


# What is refused


def test_text_playlists_and_noise_reach_no_decoder(tmp_path, monkeypatch):
    other = synth.write(tmp_path / "other.wav", synth.tone(440, 20, RATE), RATE)
    contents = {
        "text": b"It was a dark and stormy night.\n" * 500,
        "m3u": b"#EXTM3U\n#EXTINF:20,x\n" + os.fsencode(other) + b"\n",
        "hls": b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:20,\nfile:" + os.fsencode(other) + b"\n#EXT-X-ENDLIST\n",
        "concat": b"ffconcat version 1.0\nfile other.wav\n",
        "noise": np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8).tobytes(),
    }
    for decoder in ("SoundfileSource", "FfmpegSource"):
        monkeypatch.setattr(audio_decoders, decoder, lambda *_, **__: pytest.fail("a decoder saw it"))
    for name, content in contents.items():
        for suffix in (".mp3", ".m4a"):
            path = tmp_path / (name + suffix)
            path.write_bytes(content)
            with pytest.raises(audio.AudioError, match="no audio: the content is of no known audio format"):
                audio.load_audio(path, RATE, 1)


def test_ffmpeg_would_not_follow_a_playlist_either(tmp_path, needs_ffmpeg):
    synth.write(tmp_path / "other.wav", synth.tone(440, 20, RATE), RATE)
    playlist = tmp_path / "x.m4a"
    playlist.write_text("ffconcat version 1.0\nfile other.wav\n")
    with pytest.raises(audio.AudioError, match="cannot be decoded: ffmpeg"):
        audio_decoders.FfmpegSource(playlist, [])


def test_an_empty_file_a_missing_one_and_a_pipe_are_refused_with_their_reason(tmp_path):
    (tmp_path / "empty.mp3").write_bytes(b"")
    (tmp_path / "header.wav").write_bytes(b"RIFF\x00\x00")
    os.mkfifo(tmp_path / "pipe.mp3")
    for name, reason in [
        ("empty.mp3", "empty"),
        ("missing.mp3", "No such file"),
        ("pipe.mp3", "not a regular file"),
        ("header.wav", "no audio"),
    ]:
        with pytest.raises(audio.AudioError, match=f"{name}.*{reason}"):
            audio.load_audio(tmp_path / name, RATE, 1)


def test_without_ffmpeg_a_file_that_needs_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(audio_decoders, "find_ffmpeg", lambda: None)
    (tmp_path / "x.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    with pytest.raises(audio.FfmpegMissing, match="needs ffmpeg"):
        audio.load_audio(tmp_path / "x.m4a", RATE, 1)


@pytest.mark.parametrize(("value", "count"), [(np.nan, 1), (np.inf, 1), (-np.inf, 320), (np.nan, 12000), (1e38, 1)])
def test_a_single_sample_that_is_not_finite_is_refused(tmp_path, value, count):
    x = synth.tone(440, 2, RATE)
    x[0, 100 : 100 + count] = value
    path = synth.write(tmp_path / "x.wav", x, RATE, subtype="FLOAT")
    with pytest.raises(audio.AudioError, match=f"non-finite samples: {count} of 24000"):
        audio.load_audio(path, RATE, 1)


# Sample formats


def test_int16_survives_the_way_to_float_and_back():
    every = np.arange(-32768, 32768).astype(np.int16)
    np.testing.assert_array_equal(audio.to_int16(audio.from_int16(every)), every)
    np.testing.assert_array_equal(audio.to_int16(np.float32([2, -2, 0.49 / 32768])), [32767, -32768, 0])


def test_rms_of_a_full_scale_sine_is_minus_three_db():
    assert audio.rms_db(synth.tone(100, 1, RATE, level=1.0)) == pytest.approx(-3.01, abs=0.001)
    assert audio.rms_db(np.zeros((1, 10), np.float32)) == -200


# Encoding


@pytest.mark.parametrize("suffix", [".mp3", ".wav", ".flac", ".ogg"])
@pytest.mark.parametrize("rate", [12000, 24000, 44100])
def test_encoding_keeps_every_sample_and_the_tone(tmp_path, suffix, rate):
    x = synth.tone(1000, 3, rate, 2)
    audio.encode_audio(tmp_path / f"x{suffix}", x, rate)
    y = audio.load_audio(tmp_path / f"x{suffix}", rate, 2)
    assert y.shape == x.shape
    lowered_db = 0.45 if suffix == ".mp3" and rate < 32000 else 0  # by LAME itself
    assert level_db(y, 1000, rate) == pytest.approx(-6.02 - lowered_db, abs=0.1)
    assert audio.rms_db(y * 10 ** (lowered_db / 20) - x) < -40
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]


def test_mp3_has_a_high_constant_bit_rate(tmp_path):
    for rate, bitrate in [(44100, 320_000), (24000, 160_000), (12000, 64_000)]:
        audio.encode_audio(tmp_path / "x.mp3", synth.song(0, 3, rate), rate)
        assert mp3_scan.scan_file(tmp_path / "x.mp3").kinds == {(rate, bitrate)}


def test_minutes_of_ogg_do_not_crash_the_encoder(tmp_path):
    audio.encode_audio(tmp_path / "x.ogg", synth.noise(0, 120, 24000, 2), 24000)
    assert soundfile.info(tmp_path / "x.ogg").frames == 120 * 24000


def test_m4a_is_written_through_ffmpeg(tmp_path, needs_ffmpeg):
    audio.encode_audio(tmp_path / "x.m4a", synth.tone(1000, 3, 24000, 2), 24000)
    y = audio.load_audio(tmp_path / "x.m4a", 24000, 2)
    assert y.shape[1] == pytest.approx(72000, abs=2400)
    assert level_db(y, 1000, 24000) == pytest.approx(-6.02, abs=0.2)


def test_what_cannot_be_encoded_is_refused_in_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    x = synth.tone(1000, 1, 24000)
    with pytest.raises(audio.AudioError, match="mp3 cannot hold 10000 Hz"):
        audio.encode_audio(tmp_path / "x.mp3", x, 10000)
    with pytest.raises(audio.AudioError, match=r"cannot write '\.txt'"):
        audio.encode_audio(tmp_path / "x.txt", x, 24000)
    with pytest.raises(audio.AudioError, match="finite"):
        audio.encode_audio(tmp_path / "x.wav", x * np.nan, 24000)
    with pytest.raises(audio.AudioError, match="cannot be written"):
        audio.encode_audio(tmp_path / "missing" / "x.wav", x, 24000)
    monkeypatch.setattr(audio_decoders, "find_ffmpeg", lambda: None)
    with pytest.raises(audio.AudioError, match=r"\.m4a needs ffmpeg"):
        audio.encode_audio(tmp_path / "x.m4a", x, 24000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit is not on PATH")
@pytest.mark.parametrize("suffix", [".mp3", ".wav", ".flac", ".ogg"])
def test_a_file_that_grows_too_large_is_an_error_and_leaves_nothing(tmp_path, suffix):
    script = (
        f"import synth; from continuation import audio; audio.encode_audio({str(tmp_path / 'x') + suffix!r}, "
        "synth.noise(0, 30, 24000, 2), 24000)"
    )
    tests = Path(__file__).resolve().parent
    result = subprocess.run(
        ["prlimit", "--fsize=20000", os.sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [tests, tests.parent]))},
        capture_output=True,
        text=True,
    )
    assert "AudioError" in result.stderr and "cannot be written" in result.stderr
    assert list(tmp_path.iterdir()) == []


# Limiter


def test_limiter_leaves_what_is_soft_enough_as_it_is():
    x = np.random.default_rng(0).uniform(-0.97, 0.97, (2, RATE)).astype(np.float32)
    np.testing.assert_array_equal(audio.limit_peaks(x, RATE), x)


def test_limiter_brings_every_peak_to_the_limit_without_a_step():
    """A tone with peaks of 3 at three places: none above 0.98 is left, and the gain changes by less than 1 % from
    sample to sample."""
    x = (0.5 * synth.tone(440, 1, RATE)).astype(np.float32)
    for place in (100, RATE // 2, RATE // 2 + 60):
        x[:, place] = 3
    y = audio.limit_peaks(x, RATE)
    assert np.abs(y).max() <= 0.98 + 1e-6
    gain = y[0] / np.where(x[0] == 0, 1, x[0])
    assert np.abs(np.diff(gain[x[0] != 0])).max() < 0.01
    np.testing.assert_array_equal(y[:, RATE // 4 : RATE // 3], x[:, RATE // 4 : RATE // 3])
