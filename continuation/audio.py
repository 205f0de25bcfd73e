"""Audio files to arrays and back: decode, resample, encode.

    x = audio.load_audio("song.mp3", sample_rate=24000, channels=2, seconds=10)
    audio.encode_audio("copy.mp3", x, sample_rate=24000)

There is one decoding path: `Decoder` streams a file in blocks of bounded memory, `load_audio` collects these blocks.
Arrays are float32 (channels, samples) with full scale 1 unless said otherwise. audio_decoders.py reads files, by
libsndfile and, where that cannot, by ffmpeg.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import soundfile
import soxr

from continuation import audio_decoders, files
from continuation.audio_decoders import (
    BLOCK_FRAMES,
    READ_FRAMES,
    AudioError,
    FfmpegMissing,
    FfmpegSource,
    SoundfileSource,
)

CHUNK_SECONDS = 10
INT16_SCALE = 32768
PEAK_LIMIT = 0.98  # louder audio is limited before it is written
LIMITER_SECONDS = 0.02  # to each side of a peak
AUDIO_SUFFIXES = frozenset(
    {".mp3", ".mp2", ".mpga", ".wav", ".flac", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".aifc", ".w64", ".caf"}
    | {".au", ".snd", ".m4a", ".m4b", ".mp4", ".aac", ".wma", ".mka", ".webm", ".ape", ".wv", ".tta"}
    | {".tak", ".mpc", ".dsf", ".dff", ".ac3", ".eac3", ".dts"}
)
LARGEST_SAMPLE = 1e10  # int32 as floats reaches 2**31
LOUDEST_PEAK = 1.5  # a lossy decoder overshoots by less: louder samples are not of full scale 1
LOUD_SHARE = 0.01  # of the time
SCALE_SECONDS = 30
MOST_KEPT_FRAMES = SCALE_SECONDS * 96000  # 23 MB in stereo; beyond it the beginning is decoded twice
# MPEG 1, 2 and 2.5 layer III know no other rates.
MP3_SAMPLE_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


# Sample formats and levels


def to_int16(x: np.ndarray) -> np.ndarray:
    """Round float audio of full scale 1 to int16, clipping louder samples."""
    return np.clip(np.rint(x * INT16_SCALE), -INT16_SCALE, INT16_SCALE - 1).astype(np.int16)


def from_int16(x: np.ndarray) -> np.ndarray:
    """Invert `to_int16`, exactly for values it did not clip: float32 = int16 / 32768."""
    return x * np.float32(1 / INT16_SCALE)  # exact, as the scale is a power of two


def rms_db(x: np.ndarray) -> float:
    """Return the root mean square of x in dB relative to full scale 1; digital silence is -200 dB."""
    rms = float(np.linalg.norm(x)) / math.sqrt(x.size)  # a dot product, without a copy in float64
    return 20 * math.log10(max(rms, 1e-10))


# Decoding


class Decoder:
    """Iterable over one file in float32 blocks (channels, n) at a given sample rate, in bounded memory.

    Resampled by soxr HQ, bit-identical to a one-shot call. Mono is doubled for stereo, more than two channels are
    mixed down to stereo, stereo is averaged for mono. A file that is far louder than full scale is scaled down as a
    whole. clip_seconds: length of the output at most. After the iteration, `notes` lists what was missing, damaged or
    unusual, one short phrase each. Raises AudioError (without the file's name) when the file is no audio, has NaN or
    infinities, or is too damaged to use.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        sample_rate: int,
        channels: int,
        clip_seconds: float | None = None,
    ):
        self.path = Path(path)
        self.sample_rate = sample_rate
        self.channels = channels
        self.clip_samples = None if clip_seconds is None else round(clip_seconds * sample_rate)
        self.notes: list[str] = []
        self._total = self._nonfinite = 0  # samples read so far

    def __iter__(self) -> Iterator[np.ndarray]:
        left = self.clip_samples
        with closing(self._resampled()) as blocks:
            for block in blocks:
                if left is not None:
                    block = block[:left]
                    left -= len(block)
                if len(block):
                    yield np.ascontiguousarray(block.T)  # (channels, n)
                if left == 0:
                    break
        self._check_totals()

    def _resampled(self) -> Iterator[np.ndarray]:
        """Yield blocks (n, channels) at the output's sample rate."""
        with closing(audio_decoders.open_sources(self.path, self.notes)) as sources:
            for source in sources:
                if source.sample_rate == self.sample_rate:
                    yield from self._cleaned(source)
                    continue
                stream = soxr.ResampleStream(
                    source.sample_rate, self.sample_rate, self.channels, dtype="float32", quality="HQ"
                )
                for block in self._cleaned(source):
                    yield stream.resample_chunk(block)
                yield stream.resample_chunk(np.zeros((0, self.channels), np.float32), last=True)

    def _cleaned(self, source: SoundfileSource | FfmpegSource) -> Iterator[np.ndarray]:
        """Yield blocks (n, channels) at the file's rate, of full scale 1; count and zero non-finite samples."""
        blocks, known = source.blocks(), len(self.notes)
        beginning = _beginning(source, blocks)
        notes_at_end, self.notes[known:] = self.notes[known:], []  # of a short file: a clip may not get there
        gain = np.float32(_scale_gain(source, beginning))
        if gain < 1:
            self.notes.append(f"far louder than full scale: scaled by {20 * np.log10(gain):.1f} dB")
        for block in itertools.chain(beginning, blocks):
            self._total += block.size
            if not _all_finite(block):
                bad = ~_is_finite(block)
                self._nonfinite += int(bad.sum())
                block = np.where(bad, np.float32(0), block)
            yield _map_channels(block * gain if gain < 1 else block, self.channels)
        self.notes += notes_at_end

    def _check_totals(self) -> None:
        if not self._total:
            raise AudioError("no audio: " + (self.notes[-1] if self.notes else "it holds no samples"))
        if self._nonfinite:
            raise AudioError(f"non-finite samples: {self._nonfinite} of {self._total}")


def _is_finite(x: np.ndarray) -> np.ndarray:
    """Return which samples are finite and below the values near 1e38 that overflow in the resampler."""
    return np.abs(x) < LARGEST_SAMPLE


def _all_finite(x: np.ndarray) -> bool:
    """Return whether all samples are finite as `_is_finite` says, without a copy; NaN compares as false."""
    return bool(x.max(initial=0) < LARGEST_SAMPLE and x.min(initial=0) > -LARGEST_SAMPLE)


def _beginning(source: SoundfileSource | FfmpegSource, blocks: Iterator[np.ndarray]) -> list[np.ndarray]:
    """Take from `blocks` those whose scale is checked, where they are not too large to keep."""
    frames = SCALE_SECONDS * source.sample_rate
    beginning: list[np.ndarray] = []
    if source.is_integer or frames > MOST_KEPT_FRAMES:
        return beginning
    while frames >= 0 and (block := next(blocks, None)) is not None:
        beginning.append(block)
        frames -= len(block)
    return beginning


def _scale_gain(source: SoundfileSource | FfmpegSource, beginning: list[np.ndarray]) -> float:
    """Return the gain that scales a file to full scale 1: below 1 for samples of another scale, such as int16.

    The first half minute, `beginning` where it was kept, decides whether the scale is another one, the peak of the
    whole file which, so that the gain does not depend on where reading stops. A single burst, as in a damaged mp3, is
    no other scale.
    """
    if source.is_integer or (beginning and not _peak_of_other_scale(beginning, source.sample_rate)):
        return 1.0
    with closing(source.reopened()) as again:
        peak = _peak_of_other_scale(again.blocks(), again.sample_rate)
    return PEAK_LIMIT / peak if peak else 1.0


def _peak_of_other_scale(blocks: Iterable[np.ndarray], sample_rate: int) -> float:
    """Return the peak of blocks (n, channels) of another scale, 0 where half a minute, or all, is of full scale 1."""
    peak, loud_parts, parts = 0.0, 0, 0
    for block in blocks:
        x = np.where(_is_finite(block), np.abs(block), np.float32(0)).ravel()
        peaks = np.maximum.reduceat(x, np.arange(0, len(x), READ_FRAMES * block.shape[1]))
        peak, parts = max(peak, float(peaks.max())), parts + len(peaks)
        loud_parts += int((peaks > LOUDEST_PEAK).sum())
        if loud_parts <= LOUD_SHARE * parts and parts * READ_FRAMES > SCALE_SECONDS * sample_rate:
            return 0.0
    return peak if loud_parts > LOUD_SHARE * parts else 0.0


def load_audio(
    path: str | os.PathLike,
    sample_rate: int,
    channels: int,
    start_seconds: float = 0.0,
    seconds: float | None = None,
) -> np.ndarray:
    """Load a part of a file as float32 (channels, samples), sample-identical to what `Decoder` streams.

    It decodes from the file's beginning, so that samples do not depend on the start. The result is shorter than
    `seconds` where the file ends. Raises AudioError, naming the file.
    """
    start = round(start_seconds * sample_rate)
    length = None if seconds is None else round(seconds * sample_rate)
    clip_seconds = None if length is None else (start + length) / sample_rate
    parts, skip = [np.zeros((channels, 0), np.float32)], start
    try:
        for block in Decoder(path, sample_rate, channels, clip_seconds):
            parts.append(block[:, skip:].copy())
            skip = max(0, skip - block.shape[1])
    except AudioError as error:
        raise type(error)(f"{path}: {error}") from error
    return np.concatenate(parts, axis=1)


def native_format(path: str | os.PathLike) -> tuple[int, int]:
    """Return sample rate and channels (1, or 2 for more) of a file, or of the first of several joined in it.

    Raises AudioError, naming the file.
    """
    try:
        with closing(audio_decoders.open_sources(Path(path), [])) as sources:
            source = next(sources)
            return source.sample_rate, min(source.channels, 2)
    except AudioError as error:
        raise type(error)(f"{path}: {error}") from error


def resample(x: np.ndarray, sample_rate: int, new_rate: int, channels: int) -> np.ndarray:
    """Resample float32 (n, samples) by soxr HQ, as files are, and map it to `channels` channels: (channels,
    samples)."""
    return _map_channels(soxr.resample(x.T, sample_rate, new_rate, quality="HQ"), channels).T


def _map_channels(block: np.ndarray, channels: int) -> np.ndarray:
    """Map a block (n, 1 or 2) to (n, channels)."""
    if block.shape[1] == channels:
        return block
    if channels == 1:
        return block.mean(axis=1, keepdims=True, dtype=np.float32)
    return np.repeat(block, channels, axis=1)


# Encoding

_SOUNDFILE_FORMATS = {
    ".mp3": {
        "format": "MP3",
        "subtype": "MPEG_LAYER_III",
        "bitrate_mode": "CONSTANT",
        "compression_level": 0,
    },
    ".wav": {"format": "WAV", "subtype": "PCM_16"},
    ".flac": {"format": "FLAC", "subtype": "PCM_16"},
    ".ogg": {"format": "OGG", "subtype": "VORBIS", "compression_level": 0.1},
}


def limit_peaks(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Limit the peaks of x (channels, samples) to PEAK_LIMIT: a lookahead limiter, the same gain in all channels.

    The gain is 1 except within LIMITER_SECONDS of a peak, so that one peak does not make a minute softer.
    """
    from scipy import ndimage  # here, because the workers of preprocess.py start faster without it

    size = 2 * round(LIMITER_SECONDS * sample_rate) + 1
    needed = np.minimum(1, PEAK_LIMIT / np.maximum(np.abs(x).max(axis=0), PEAK_LIMIT))
    lowest = ndimage.minimum_filter1d(needed, size, mode="nearest")
    return x * ndimage.uniform_filter1d(lowest, size, mode="nearest").astype(x.dtype)  # its window sees no higher one


def encode_audio(path: str | os.PathLike, x: np.ndarray, sample_rate: int) -> None:
    """Write float32 (channels, samples) as .mp3, .wav, .flac, .ogg, or as .m4a through pydub and ffmpeg.

    mp3 gets the highest constant bit rate of its sample rate (320 kbit/s at 44.1 kHz, 160 at 24, 64 at 12; below
    32 kHz LAME makes it 0.45 dB quieter), wav and flac 16 bits. Samples beyond full scale are clipped, nothing is
    resampled. Raises AudioError for a sample rate that mp3 does not support, and when the file cannot be written: no
    part of it is left then.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (*_SOUNDFILE_FORMATS, ".m4a"):
        raise AudioError(f"{path}: cannot write '{suffix}', only .mp3 .wav .flac .ogg .m4a")
    if x.ndim != 2 or not np.isfinite(x).all():
        raise AudioError(f"{path}: audio must be finite and (channels, samples), this is {x.shape}")
    if suffix == ".mp3" and sample_rate not in MP3_SAMPLE_RATES:
        raise AudioError(f"{path}: mp3 cannot hold {sample_rate} Hz; write .wav or .flac instead")
    if suffix == ".m4a" and audio_decoders.find_ffmpeg() is None:  # pydub would raise a bare FileNotFoundError
        raise FfmpegMissing(f"{path}: .m4a needs ffmpeg; write .mp3 or .wav instead")
    try:
        with files.replacing(path) as file:
            if suffix == ".m4a":
                _write_m4a(file.name, x, sample_rate)
            else:
                _write_soundfile(file.name, np.clip(x, -1, 1), sample_rate, _SOUNDFILE_FORMATS[suffix])
    except OSError as error:
        raise AudioError(f"{path}: cannot be written: {error.strerror or error}") from error


def _write_soundfile(path: str | os.PathLike, x: np.ndarray, sample_rate: int, options: dict) -> None:
    try:
        name = os.fsencode(path) if os.name == "posix" else str(path)  # soundfile encodes UTF-8 names alone
        with soundfile.SoundFile(name, "w", sample_rate, x.shape[0], **options) as file:
            # In blocks, because libsndfile's vorbis encoder overflows the stack on a long write.
            for start in range(0, x.shape[1], BLOCK_FRAMES):
                file.write(x[:, start : start + BLOCK_FRAMES].T)
    except soundfile.LibsndfileError as error:
        raise OSError(error.error_string) from error


def _write_m4a(path: str | os.PathLike, x: np.ndarray, sample_rate: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydub warns at import when ffmpeg is not on PATH
        from pydub import AudioSegment
        from pydub.exceptions import CouldntEncodeError
    AudioSegment.converter = audio_decoders.find_ffmpeg()
    pcm = to_int16(x).T.tobytes()
    segment = AudioSegment(pcm, sample_width=2, frame_rate=sample_rate, channels=x.shape[0])
    try:
        segment.export(path, format="ipod", codec="aac", bitrate="256k").close()
    except CouldntEncodeError as error:
        raise OSError("ffmpeg failed: " + str(error).strip().splitlines()[-1]) from error
