"""Songs as encoders, recorders and `cat` leave them: each is read whole and right, or its note says what is not.

Lengths and levels are those of the synthesised song, and those of an independent decode by ffmpeg.
"""

from __future__ import annotations

import os
import shutil
import struct
import tracemalloc

import numpy as np
import pytest
import synth

from continuation import audio, audio_decoders, containers, mp3_scan

RATE = 44100
TONES = (440, 550, 660)  # left, centre, right
CONTAINERS = {
    "x.ogg": ("-c:a", "libvorbis", "-q:a", "6"),
    "x.opus": ("-c:a", "libopus", "-mapping_family", "1", "-b:a", "256k"),
    "x.flac": ("-c:a", "flac"),
    "x.wav": ("-c:a", "pcm_s16le"),
    "x.m4a": ("-c:a", "aac", "-b:a", "256k"),
    "x.mka": ("-c:a", "flac"),
    "x.wv": ("-c:a", "wavpack"),
}


def read(path, rate: int = RATE, channels: int = 2) -> tuple[np.ndarray, list[str]]:
    """(float32 (channels, samples), notes)"""
    decoder = audio.Decoder(path, rate, channels)
    return np.concatenate(list(decoder), axis=1), decoder.notes


def levels(x: np.ndarray, rate: int = RATE) -> np.ndarray:
    """The peak levels of TONES in every channel, (channels, tones), over the second half of the sound."""
    x = x[:, x.shape[1] // 2 :]
    window = np.hanning(x.shape[1])
    times = np.arange(x.shape[1]) / rate
    return np.array([[2 * abs(np.sum(c * window * np.exp(-2j * np.pi * f * times))) for f in TONES] for c in x]) / (
        window.sum()
    )


def append(path, *parts) -> object:
    """Write files, or bytes, one behind another."""
    path.write_bytes(b"".join(part if isinstance(part, bytes) else part.read_bytes() for part in parts))
    return path


# More than two channels


@pytest.fixture(scope="module")
def three_tones() -> np.ndarray:
    """3.0: left, right, centre, as wav and ffmpeg order them."""
    return np.concatenate([synth.tone(TONES[i], 3, RATE, level=0.2) for i in (0, 2, 1)])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTAINERS)
def test_surround_is_mixed_down_the_same_in_every_container(tmp_path, needs_ffmpeg, three_tones, name):
    path = synth.encode(tmp_path / name, three_tones, RATE, "-af", "channelmap=0-FL|1-FR|2-FC:3.0", *CONTAINERS[name])
    x, notes = read(path)
    assert notes == ["3 channels, mixed down to stereo"]
    assert x.shape[1] == pytest.approx(three_tones.shape[1], abs=1024)  # an AAC frame of padding
    side, centre = 0.2 / (1 + 0.5**0.5), 0.2 / (1 + 2**0.5)  # ITU-R BS.775: 1 and 0.71, with a sum of 1
    np.testing.assert_allclose(levels(x), [[side, centre, 0], [0, centre, side]], atol=0.004)
    mono, notes = read(path, channels=1)
    assert notes == ["3 channels, mixed down to stereo"]
    np.testing.assert_allclose(levels(mono), [[side / 2, centre, side / 2]], atol=0.004)


def test_loud_surround_does_not_clip(tmp_path, needs_ffmpeg):
    path = synth.write(tmp_path / "x.flac", synth.tone(440, 1, RATE, 6, level=0.99), RATE)
    x, notes = read(path)
    assert notes == ["6 channels, mixed down to stereo"]
    assert np.abs(x).max() == pytest.approx(0.99, abs=0.01)


@pytest.mark.parametrize(
    ("rate", "channels", "sentence"),
    [
        (1, 1, "no audio: a sample rate of 1 Hz, below 1000"),
        (999, 2, "no audio: a sample rate of 999 Hz, below 1000"),
        (RATE, 33, "no audio: 33 channels, more than 32"),
        (RATE, 1024, "no audio: 1024 channels, more than 32"),
    ],
)
def test_what_is_no_music_is_refused_before_it_takes_memory(tmp_path, rate, channels, sentence):
    path = synth.write(tmp_path / "x.wav", synth.noise(0, 8192 / rate, rate, channels), rate)
    tracemalloc.start()
    with pytest.raises(audio.AudioError, match=sentence):
        read(path, 24000)
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()


def test_channels_whose_places_nobody_tells_are_refused(tmp_path, needs_ffmpeg):
    path = synth.write(tmp_path / "x.wav", synth.noise(0, 1, RATE, 10), RATE)
    with pytest.raises(audio.AudioError, match="10 channels in no known layout: they cannot be mixed down"):
        read(path)


def test_surround_without_ffmpeg_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(audio_decoders, "find_ffmpeg", lambda: None)
    with pytest.raises(audio.FfmpegMissing):
        read(synth.write(tmp_path / "x.wav", synth.noise(0, 1, RATE, 6), RATE))


# Files joined into one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("x.ogg", ("-c:a", "libvorbis")),
        ("x.opus", ("-c:a", "libopus")),
        ("x.oga", ("-c:a", "flac")),
        ("x.flac", ()),
        ("x.wav", ()),
        ("x.aiff", ()),
    ],
)
def test_files_joined_into_one_are_read_one_behind_the_other(tmp_path, needs_ffmpeg, name, arguments):
    tones = [synth.tone(tone, 3, 48000, 2) for tone in TONES]
    parts = [synth.encode(tmp_path / f"{i}-{name}", x, 48000, *arguments) for i, x in enumerate(tones)]
    x, notes = read(append(tmp_path / name, *parts), 48000)
    assert notes == ["3 files joined in one"]
    np.testing.assert_array_equal(x, np.concatenate([read(part, 48000)[0] for part in parts], axis=1))
    assert x.shape[1] == sum(synth.decode(part, 48000, 2).shape[1] for part in parts) == 9 * 48000


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_links_of_another_rate_and_number_of_channels_are_read_in_stereo(tmp_path, order):
    stereo = synth.write(tmp_path / "s.ogg", synth.tone(440, 3, RATE, 2), RATE)
    mono = synth.write(tmp_path / "m.ogg", synth.tone(440, 3, 22050), 22050)
    x, notes = read(append(tmp_path / "x.ogg", *((stereo, mono)[i] for i in order)))
    assert notes == ["2 files joined in one"]
    assert x.shape[1] == 6 * RATE
    for start in (RATE // 2, 7 * RATE // 2):
        np.testing.assert_allclose(levels(x[:, start : start + 2 * RATE])[:, 0], 0.5, atol=0.01)


def test_tags_between_joined_flacs_cost_nothing(tmp_path, needs_ffmpeg):
    x = synth.tone(440, 3.02, RATE, 2)
    part = append(tmp_path / "tagged.flac", synth.write(tmp_path / "x.flac", x, RATE), b"TAG" + bytes(125))
    y, _ = read(append(tmp_path / "joined.flac", part, part))
    np.testing.assert_allclose(y, np.concatenate([x, x], axis=1), atol=1e-4)


@pytest.mark.parametrize("padding", [b"", b"\0"])
def test_wav_of_odd_size_is_found_before_another_with_and_without_its_padding(tmp_path, padding):
    wav = b"RIFF" + (45).to_bytes(4, "little") + b"WAVE" + bytes(41)
    path = append(tmp_path / "x.wav", wav, padding, wav)
    second = len(wav) + len(padding)
    assert containers.joined_parts(path) == [(0, second), (second, second + len(wav))]


def test_a_damaged_file_among_joined_ones_costs_itself_only(tmp_path, needs_ffmpeg):
    x = synth.tone(440, 3, RATE, 2)
    good = synth.write(tmp_path / "x.flac", x, RATE)
    y, notes = read(append(tmp_path / "joined.flac", good, good.read_bytes()[:42], good))
    np.testing.assert_allclose(y, np.concatenate([x, x], axis=1), atol=1e-4)
    assert notes[0] == "3 files joined in one"
    assert len(notes) == 2 and notes[1].startswith("file 2: ")


def test_thousands_of_joined_files_are_refused(tmp_path):
    good = synth.write(tmp_path / "x.flac", synth.tone(440, 1, RATE), RATE).read_bytes()
    with pytest.raises(audio.AudioError, match="1001 files joined in one, more than 1000"):
        read(append(tmp_path / "joined.flac", 1001 * good[:42]))


def headerless_mp3(path, channels: int) -> bytes:
    x = synth.tone(440, 3, RATE, channels, level=0.5)
    options = ("-c:a", "libmp3lame", "-b:a", "128k", "-write_xing", "0", "-id3v2_version", "0")
    return synth.encode(path, x, RATE, *options).read_bytes()


@pytest.mark.parametrize(("first", "change"), [(2, "stereo to mono"), (1, "mono to stereo")])
def test_mp3_that_changes_its_channels_is_read_to_its_end(tmp_path, needs_ffmpeg, first, change):
    parts = [headerless_mp3(tmp_path / "x.mp3", channels) for channels in (first, 3 - first)]
    path = append(tmp_path / "x.mp3", *parts)
    x, notes = read(path)
    assert notes == [f"changes from {change} at 3.03 s"]
    assert x.shape == synth.decode(path, RATE, 2).shape
    assert x.shape[1] == pytest.approx(6.1 * RATE, abs=0.05 * RATE)
    for second in (x[:, RATE : 2 * RATE], x[:, -2 * RATE : -RATE]):
        assert audio.rms_db(second) == pytest.approx(-9.5, abs=0.1)  # LAME makes it 0.5 dB quieter


def test_joint_and_plain_stereo_in_one_mp3_are_no_change(tmp_path, needs_ffmpeg):
    wide = synth.encode(tmp_path / "w.mp3", synth.noise(0, 3, RATE, 2), RATE, "-b:a", "320k", "-joint_stereo", "0")
    assert mp3_scan.scan_file(wide).channels_change_at is None
    narrow = headerless_mp3(tmp_path / "n.mp3", 2)
    assert mp3_scan.scan_file(append(tmp_path / "x.mp3", wide, narrow)).channels_change_at is None


# Far beyond full scale


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("x.wav", ("-c:a", "pcm_f32le")),
        ("x.aiff", ("-c:a", "pcm_f32be")),
        ("x.caf", ("-c:a", "pcm_f32le")),
        ("x.w64", ("-c:a", "pcm_f64le")),
        ("x.wv", ("-c:a", "wavpack", "-sample_fmt", "fltp")),
    ],
)
@pytest.mark.parametrize("scale", [32767, 2.0**31])
def test_samples_of_another_scale_are_brought_to_full_scale(tmp_path, needs_ffmpeg, name, arguments, scale):
    x = np.concatenate([synth.tone(440, 2, RATE, 2, level=0.25), synth.tone(440, 2, RATE, 2, level=1)], axis=1)
    path = synth.encode(tmp_path / name, scale * x, RATE, *arguments)
    y, (note,) = read(path)
    assert note.startswith("far louder than full scale: scaled by -")
    np.testing.assert_allclose(levels(y)[:, 0], 0.98, atol=1e-4)
    np.testing.assert_allclose(levels(y[:, : 2 * RATE])[:, 0], 0.98 / 4, atol=1e-4)
    part = audio.load_audio(path, RATE, 2, seconds=1)  # of the quiet beginning
    np.testing.assert_array_equal(part, y[:, :RATE])


@pytest.mark.parametrize(("name", "codec"), [("x.ogg", "libvorbis"), ("x.mp3", "libmp3lame"), ("x.m4a", "aac")])
def test_a_lossy_encoder_that_was_given_another_scale_is_noted_too(tmp_path, needs_ffmpeg, name, codec):
    path = synth.encode(tmp_path / name, 32767 * synth.tone(440, 2, RATE, 2), RATE, "-c:a", codec)
    x, (note,) = read(path)
    assert note.startswith("far louder than full scale: scaled by -")
    assert 0.9 < np.abs(x).max() <= 1


def test_a_burst_in_a_song_of_full_scale_does_not_make_it_quiet(tmp_path):
    x = synth.tone(440, 20, RATE, level=0.5)
    x[:, 5000:5500] = 20
    y, notes = read(synth.write(tmp_path / "x.wav", x, RATE, subtype="FLOAT"), channels=1)
    np.testing.assert_array_equal(y, x)
    assert notes == []


def test_a_loud_master_is_left_as_it_is(tmp_path):
    x = synth.tone(440, 1, RATE, level=1.4)
    y, notes = read(synth.write(tmp_path / "x.wav", x, RATE, subtype="FLOAT"), channels=1)
    np.testing.assert_array_equal(y, x)
    assert notes == []


def test_a_file_of_infinities_is_refused_and_not_scaled(tmp_path):
    x = np.full((1, RATE), np.inf, np.float32)
    with pytest.raises(audio.AudioError, match="non-finite samples: 44100 of 44100"):
        read(synth.write(tmp_path / "x.wav", x, RATE, subtype="FLOAT"))


# What one decoder refuses or cuts short, and the other reads


@pytest.mark.parametrize("rate", [44100, 22050])
def test_layer_ii_in_an_mp3_is_read(tmp_path, needs_ffmpeg, rate):
    path = synth.encode(tmp_path / "x.mp3", synth.tone(440, 3, rate, 2), rate, "-c:a", "mp2", "-f", "mp2")
    x, notes = read(path, rate)
    assert notes == []
    assert x.shape == synth.decode(path, rate, 2).shape
    assert x.shape[1] == pytest.approx(3 * rate, abs=2 * 1152)


@pytest.mark.parametrize("zeros", [1000, 70_000, 300_000])
def test_zeros_before_the_first_mp3_frame_cost_nothing(tmp_path, needs_ffmpeg, capfd, zeros):
    x, notes = read(append(tmp_path / "x.mp3", bytes(zeros), headerless_mp3(tmp_path / "y.mp3", 2)))
    assert notes == []
    assert x.shape[1] == pytest.approx(3 * RATE, abs=3 * 1152)
    assert capfd.readouterr().err == ""  # where mpg123 complains


@pytest.mark.parametrize("extension", ["oga", "ogg", "flac"])
def test_flac_in_ogg_is_read(tmp_path, needs_ffmpeg, extension):
    x = synth.tone(440, 3, RATE, 2)
    y, notes = read(synth.encode(tmp_path / f"x.{extension}", x, RATE, "-c:a", "flac", "-f", "ogg"))
    assert notes == []
    np.testing.assert_allclose(y, x, atol=1e-4)


@pytest.mark.parametrize("name", ["x.wav", "x.aiff", "x.w64", "x.caf", "x.au", "x.flac", "x.mka", "x.wv"])
def test_what_was_written_to_a_pipe_is_read_whole_and_not_called_cut(tmp_path, needs_ffmpeg, name):
    """Nobody could go back and write the length into the header."""
    x = synth.tone(440, 3, RATE, 2)
    whole = synth.encode(tmp_path / name, x, RATE)
    form = {"x.mka": "matroska"}.get(name, whole.suffix[1:])
    piped = append(tmp_path / f"piped-{name}", piped_bytes(x, form))
    y, notes = read(piped)
    assert notes == []
    assert y.shape[1] == pytest.approx(3 * RATE, abs=0 if name != "x.mka" else 1152)
    assert synth.decode(whole, RATE, 2).shape[1] == pytest.approx(y.shape[1], abs=1152)


def piped_bytes(x: np.ndarray, form: str) -> bytes:
    import subprocess

    command = ["ffmpeg", "-v", "error", "-f", "f32le", "-ar", str(RATE), "-ac", "2", "-i", "-", "-f", form, "-"]
    return subprocess.run(command, input=x.T.tobytes(), stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize("length", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x24\0\0\x80"])
def test_wav_without_a_length_is_read_to_its_end(tmp_path, needs_ffmpeg, length):
    """A crashed recorder leaves 0, others enter the largest number there is."""
    x = synth.tone(440, 3, RATE, 2)
    data = synth.write(tmp_path / "x.wav", x, RATE).read_bytes()
    place = data.index(b"data") + 4
    y, notes = read(append(tmp_path / "x.wav", data[:place], length, data[place + 4 :]))
    assert notes == []
    np.testing.assert_allclose(y, x, atol=1e-4)


def test_a_cut_wav_and_flac_say_what_is_missing(tmp_path):
    for name in ("x.wav", "x.flac"):
        data = synth.write(tmp_path / name, synth.noise(0, 10, RATE), RATE).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        x, notes = read(tmp_path / name, channels=1)
        assert x.shape[1] / RATE == pytest.approx(5, abs=0.7)  # less than two flac frames of 0.09 s are lost
        assert len(notes) == 1
        assert "cut" in notes[0] or "damaged" in notes[0]


def test_wav_whose_header_is_wrong_by_minutes_is_still_called_cut(tmp_path):
    data = synth.write(tmp_path / "x.wav", synth.tone(440, 6, RATE), RATE).read_bytes()
    assert read(append(tmp_path / "x.wav", data[: len(data) // 2]))[1] == ["cut: 3.00 s of 6.00 s are there"]


def test_flac_with_an_id3v1_tag_behind_it_keeps_its_last_block(tmp_path, needs_ffmpeg):
    x = synth.tone(440, 3.02, RATE, 2)
    flac = synth.write(tmp_path / "x.flac", x, RATE)
    y, notes = read(append(tmp_path / "tagged.flac", flac, b"TAG" + bytes(125)))
    assert notes == []
    np.testing.assert_allclose(y, x, atol=1e-4)


def test_damage_in_a_flac_costs_the_damaged_place_only(tmp_path, needs_ffmpeg):
    x = synth.noise(0, 10, RATE)
    data = bytearray(synth.write(tmp_path / "x.flac", x, RATE).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    y, (note,) = read(append(tmp_path / "x.flac", bytes(data)), channels=1)
    assert note.startswith("damaged at 4.") or note.startswith("damaged at 5.")
    assert y.shape[1] == pytest.approx(10 * RATE, abs=RATE)
    np.testing.assert_allclose(y[:, -RATE:], x[:, -RATE:], atol=1e-4)


@pytest.mark.parametrize("name", ["x.webm", "x.mp4", "x.m4b", "x.wv", "x.mka", "x.tta", "x.au", "x.caf", "x.w64"])
def test_containers_are_read_and_known_by_their_content(tmp_path, needs_ffmpeg, name):
    form = {"x.webm": ("-c:a", "libopus"), "x.m4b": ("-c:a", "aac", "-f", "ipod")}.get(name, ())
    path = synth.encode(tmp_path / name, synth.tone(440, 3, 48000, 2), 48000, *form)
    x, notes = read(path, 48000)
    assert notes == []
    assert x.shape == synth.decode(path, 48000, 2).shape
    assert x.shape[1] == pytest.approx(3 * 48000, abs=1024)
    shutil.copy(path, tmp_path / "nameless")
    assert containers.begins_as_audio(tmp_path / "nameless")


@pytest.mark.parametrize("name", ["x.ac3", "x.eac3", "x.dts"])
def test_bare_surround_streams_are_read_and_known_by_their_content(tmp_path, needs_ffmpeg, name):
    path = synth.encode(tmp_path / name, synth.tone(440, 3, 48000, 2), 48000, "-strict", "-2")
    x, notes = read(path, 48000)
    assert notes == []
    assert x.shape == synth.decode(path, 48000, 2).shape
    assert x.shape[1] == pytest.approx(3 * 48000, abs=2 * 1536)
    shutil.copy(path, tmp_path / "nameless")
    assert containers.begins_as_audio(tmp_path / "nameless")


def dsf(x: np.ndarray) -> bytes:
    """A DSF file of one channel at 2.8 MHz, of samples in -1..1 that a modulator of first order turns into bits."""
    bits = np.diff(np.floor(np.cumsum((x + 1) / 2)), prepend=0).astype(np.uint8)
    size = 4096  # of a block
    samples = np.packbits(bits, bitorder="little").tobytes()
    samples += bytes(-len(samples) % size)
    form = struct.pack("<4sQIIIIIIQII", b"fmt ", 52, 1, 0, 1, 1, 2822400, 1, len(bits), size, 0)
    header = struct.pack("<4sQQQ", b"DSD ", 28, 28 + 52 + 12 + len(samples), 0)
    return header + form + struct.pack("<4sQ", b"data", 12 + len(samples)) + samples


def test_one_bit_audio_is_read(tmp_path, needs_ffmpeg):
    path = append(tmp_path / "nameless", dsf(synth.tone(440, 1, 2822400)[0]))
    x, notes = read(path, 352800, channels=1)
    assert notes == []
    assert x.shape[1] == pytest.approx(352800, abs=4096)
    whole = x[:, : 352800 // 8 * 8]
    spectrum = np.abs(np.fft.rfft(whole[0] * np.hanning(whole.shape[1])))
    assert spectrum.argmax() * 352800 / whole.shape[1] == pytest.approx(440, abs=2)
    assert containers.begins_as_audio(path)


@pytest.mark.slow
@pytest.mark.parametrize("magic", [b"RF64", b"BW64"])
@pytest.mark.parametrize("zeroed", ["nothing", "ds64", "ds64 and data"])
def test_wav_beyond_4_gb_is_read_whose_lengths_are_zero_too(tmp_path, needs_ffmpeg, magic, zeroed):
    x = synth.tone(440, 3, RATE, 2)
    data = bytearray(synth.write(tmp_path / "x.wav", x, RATE, format="RF64").read_bytes())
    data[:4] = magic
    if zeroed != "nothing":
        data[20:44] = bytes(24)
    if zeroed == "ds64 and data":
        place = data.index(b"data")
        data[4:8] = data[place + 4 : place + 8] = bytes(4)
    y, notes = read(append(tmp_path / "x.wav", bytes(data)))
    assert notes == []
    np.testing.assert_allclose(y, x, atol=1e-4)


@pytest.mark.parametrize(
    ("content", "is_audio"),
    [
        (b"MAC \x96\x0f" + bytes(100), True),  # Monkey's Audio
        (b"MP+\x07" + bytes(100), True),  # Musepack, of stream version 7 and 8
        (b"MPCKSH" + bytes(100), True),
        (b"tBaK" + bytes(100), True),
        (b"FRM8\0\0\0\0\0\1\0\0DSD FVER" + bytes(100), True),
        (b"DSD is a format" + bytes(100), False),
        (b"\x0b\x77" + bytes([0, 0, 0xFF, 0x40]) + bytes(100), False),
        (b"\0\0\0\x20ftypheic" + bytes(100), False),
        (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(100), False),
        (b"RIFF\x10\0\0\0AVI LIST" + bytes(100), False),
        (b"\xff\xfb\x90\x64" + bytes(413) + b"\xff\xfb\x90\x64" + bytes(413), True),
        (b"\xff\xfb\x90\x64" + bytes(500), False),
        (b"\xff\xfe" + "text".encode("utf-16-le"), False),
        (b"It was a dark and stormy night.", False),
        (b"", False),
    ],
)
def test_first_bytes_tell_audio_from_pictures_films_and_text(tmp_path, content, is_audio):
    assert containers.begins_as_audio(append(tmp_path / "x", content)) == is_audio


def test_first_bytes_of_what_cannot_be_read_are_those_of_no_audio(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert not any(containers.begins_as_audio(tmp_path / name) for name in ("pipe", "missing", "."))


def test_a_file_that_neither_decoder_reads_is_refused_with_the_reason_of_the_first(tmp_path):
    with pytest.raises(audio.AudioError, match="no audio: "):
        read(append(tmp_path / "x.wav", b"RIFF\x24\0\0\0WAVEfmt " + bytes(100)))
    with pytest.raises(audio.AudioError):
        read(append(tmp_path / "x.ape", b"MAC \x96\x0f" + bytes(100)))


def test_the_name_of_a_raw_file_does_not_matter(tmp_path, needs_ffmpeg):
    x = synth.tone(440, 1, RATE, 2)
    synth.write(tmp_path / "x.wav", x, RATE).rename(tmp_path / "x.raw")
    np.testing.assert_allclose(read(tmp_path / "x.raw")[0], x, atol=1e-4)
    with pytest.raises(audio.AudioError, match="of no known audio format"):
        read(append(tmp_path / "y.raw", np.arange(-9999, 9999, dtype=np.int16).tobytes()))
