"""The fingerprint finds the same music in two files, and only that."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import synth

from continuation import audio
from continuation.cli import UsageError
from continuation.fingerprint import (
    FINGERPRINT_SECONDS,
    FINGERPRINTS_PER_SECOND,
    SAME_MUSIC_SIMILARITY,
    Fingerprinter,
    find_same_music,
    read_fingerprint,
)

RATE = 12000
SECONDS = 45


def fingerprint(x: np.ndarray, sample_rate: int = RATE, block: int = 50_000) -> str:
    printer = Fingerprinter(sample_rate)
    for start in range(0, x.shape[1], block):
        printer.add(x[:, start : start + block])
    return printer.result()


def matches(*fingerprints: str, threshold: float = SAME_MUSIC_SIMILARITY) -> dict:
    bits = [read_fingerprint(text) for text in fingerprints]
    return {frozenset((i, j)): similarity for i, j, similarity in find_same_music(bits, threshold)}


@functools.cache
def song(seed: int, seconds: float = SECONDS) -> np.ndarray:
    return 0.5 * synth.song(seed, seconds, RATE)


@functools.cache
def song_print(seed: int) -> str:
    return fingerprint(song(seed))


def test_reencoded_quieter_trimmed_copy_is_the_same_music(tmp_path):
    import soundfile

    path = tmp_path / "copy.mp3"
    options = {"bitrate_mode": "CONSTANT", "compression_level": 0.8}
    soundfile.write(path, 0.5 * song(0)[:, round(0.3 * RATE) :].T, RATE, **options)
    assert 8 * path.stat().st_size < 64_000 * SECONDS
    assert matches(song_print(0), fingerprint(audio.load_audio(path, RATE, 2)))


def wide(seed: int) -> np.ndarray:
    """A song whose chords are of opposite phase left and right: in a sum of the channels only drums are left."""
    x = song(seed).copy()
    x[1] -= 2 * chords_of(x)[1]
    return x


@pytest.mark.parametrize("original", [song, wide])
@pytest.mark.parametrize(
    "copy",
    [
        lambda x: x * np.float32([[1], [-1]]),
        lambda x: -x,
        lambda x: x[::-1],
        lambda x: x.mean(axis=0, keepdims=True),
        lambda x: x[:1],
        lambda x: x[:1] * np.float32([[1], [-1]]),
    ],
    ids=["one channel inverted", "both inverted", "swapped", "mono", "left", "left and its inverse"],
)
def test_copy_with_its_channels_changed_is_the_same_music(original, copy):
    assert matches(fingerprint(original(0)), fingerprint(copy(original(0))))


def test_songs_of_opposite_channels_are_not_joined():
    mono = [song(seed).mean(axis=0, keepdims=True) for seed in range(6)]
    assert not matches(*(fingerprint(x * np.float32([[1], [-1]])) for x in mono))


@pytest.mark.parametrize("sample_rate", [8000, 24000, 44100])
def test_copy_at_another_sample_rate_in_mono_is_the_same_music(sample_rate, tmp_path):
    import soxr

    mono = song(1).mean(axis=0, keepdims=True)
    path = synth.write(tmp_path / "copy.wav", soxr.resample(mono.T, RATE, sample_rate).T, sample_rate)
    assert matches(song_print(1), fingerprint(audio.load_audio(path, RATE, 2)))


def test_similarity_does_not_depend_on_the_rate_of_the_fingerprint():
    import soxr

    doubled = soxr.resample(song(2).T, RATE, 2 * RATE).T
    (similarity,) = matches(song_print(2), fingerprint(doubled, 2 * RATE)).values()
    assert similarity > 0.95


def test_excerpt_is_found_anywhere_in_a_long_song():
    excerpt = song(3)[:, 7 * RATE : 30 * RATE]
    mix = np.concatenate([song(4), song(5), song(3), song(6)], axis=1)
    assert matches(fingerprint(excerpt), fingerprint(mix))


def test_different_songs_are_not_joined():
    assert not matches(*(song_print(seed) for seed in range(12)))


def test_songs_with_the_same_drums_and_different_chords_are_not_joined():
    drums = song(0) - chords_of(song(0))
    assert not matches(*(fingerprint(drums + chords_of(song(seed))) for seed in (1, 2, 3)))


def chords_of(x: np.ndarray) -> np.ndarray:
    """What lies between 100 Hz and 2 kHz."""
    spectrum = np.fft.rfft(x, axis=1)
    hertz = np.fft.rfftfreq(x.shape[1], 1 / RATE)
    return np.fft.irfft(spectrum * ((hertz > 100) & (hertz < 2000)), x.shape[1], axis=1).astype(np.float32)


def test_silence_and_missing_fingerprints_match_nothing():
    silence = fingerprint(np.zeros((2, SECONDS * RATE), np.float32))
    assert not matches(silence, silence, "", "", song_print(0))


def test_song_too_short_to_tell_matches_nothing_and_10_s_are_enough():
    eight_seconds, ten_seconds = (fingerprint(song(0)[:, : seconds * RATE]) for seconds in (8, 10))
    assert not matches(eight_seconds, song_print(0))
    assert matches(ten_seconds, song_print(0))


def test_all_pairs_are_compared_across_the_blocks():
    texts = [song_print(i % 12) for i in range(40)]
    expected = {frozenset((i, j)) for i in range(40) for j in range(i) if (i - j) % 12 == 0}
    assert matches(*texts).keys() == expected


def test_blocks_do_not_change_the_fingerprint():
    x = song(7)[:, : 20 * RATE]
    assert fingerprint(x, block=777) == fingerprint(x, block=x.shape[1])


def test_fingerprint_of_any_length_stays_small():
    printer = Fingerprinter(1000)
    noise = synth.noise(0, 400, 1000)
    for start in range(0, noise.shape[1], 1000):
        printer.add(noise[:, start : start + 1000])
    text = printer.result()
    assert len(text) < 10_000
    assert len(read_fingerprint(text)) <= FINGERPRINT_SECONDS * FINGERPRINTS_PER_SECOND
    assert printer._rest.size < 3000


@pytest.mark.parametrize("text", ["no base64!", "AAAA", "ü"])
def test_damaged_fingerprint_is_refused(text):
    with pytest.raises(UsageError, match="damaged fingerprint"):
        read_fingerprint(text)
