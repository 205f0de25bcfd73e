"""Everything that touches audio files: decode, resample, encode, and the int16 arrays they become.

    x = audio.load_audio("song.mp3", sample_rate=24000, channels=2, seconds=10)
    audio.encode_audio("copy.mp3", x, sample_rate=24000)

There is one decoding path. `Decoder` streams a file in blocks of bounded memory, `load_audio` collects
those very blocks. Arrays are float32 (channels, samples) with full scale 1 unless said otherwise.
Which decoder reads a file is decided by its content, never by its name:

    wav, flac, ogg, opus, aiff, w64, caf        soundfile
    mp3 that mpg123 reads to its end            soundfile
    mp3 headerless VBR, joined, with garbage    ffmpeg (libsndfile truncates or gives up on these)
    m4a, aac, wma, matroska                     ffmpeg
    anything else (text, playlists, pictures)   refused before a decoder sees it
"""

from __future__ import annotations

import base64
import itertools
import mmap
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import files

CHUNK_SECONDS = 10
INT16_SCALE = 32768
PEAK_LIMIT = 0.98  # louder sounds are scaled down before they are written
AUDIO_SUFFIXES = frozenset(
    {".mp3", ".wav", ".flac", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".m4a", ".aac", ".wma"}
)
BLOCK_FRAMES = 65536
READ_FRAMES = 4096
MAX_NONFINITE_SHARE = 0.01


class AudioError(Exception):
    """A file that cannot be used, said in one clear sentence."""


class FfmpegMissing(AudioError):
    """The file needs ffmpeg and there is none: it may decode on another day."""


# ---------------------------------------------------------------------------------------------------
# Sample formats and levels


def to_int16(x: np.ndarray) -> np.ndarray:
    """Round float audio of full scale 1 to int16, clipping what is louder."""
    return np.clip(np.rint(x * INT16_SCALE), -INT16_SCALE, INT16_SCALE - 1).astype(np.int16)


def from_int16(x: np.ndarray) -> np.ndarray:
    """The exact inverse of `to_int16` for values it did not clip: float32 = int16 / 32768."""
    return x.astype(np.float32) / INT16_SCALE


def rms_db(x: np.ndarray) -> float:
    """Root mean square of x in dB relative to full scale 1; digital silence is -200 dB."""
    rms = float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
    return 20 * np.log10(max(rms, 1e-10))


# ---------------------------------------------------------------------------------------------------
# Decoding


class Decoder:
    """Iterate over one file as float32 (channels, n) blocks at the wanted rate, in bounded memory.

    Resampled by soxr HQ, bit-identical to a one-shot call. Mono is doubled for stereo, stereo is averaged
    for mono, of more channels the first ones are kept. `clip_seconds` stops after so much output.
    `notes` says, after the iteration, what was found missing or damaged, one short phrase each.
    Raises AudioError (without the file's name) when the file is no audio, or is hopeless.
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
        self._judge()

    def _resampled(self) -> Iterator[np.ndarray]:
        """Blocks (n, channels) at the wanted rate."""
        import soxr

        with closing(_open_source(self.path, self.notes)) as source:
            if source.channels > max(2, self.channels):
                self.notes.append(f"{source.channels} channels, of which the first are used")
            if source.sample_rate == self.sample_rate:
                yield from self._cleaned(source)
                return
            stream = soxr.ResampleStream(
                source.sample_rate, self.sample_rate, self.channels, dtype="float32", quality="HQ"
            )
            for block in self._cleaned(source):
                yield stream.resample_chunk(block)
            yield stream.resample_chunk(np.zeros((0, self.channels), np.float32), last=True)

    def _cleaned(self, source: _SoundfileSource | _FfmpegSource) -> Iterator[np.ndarray]:
        """Blocks (n, channels) at the file's own rate, every sample finite."""
        for block in source.blocks():
            # Not only NaN and infinity: float32 files with values near 1e38 overflow in the resampler.
            bad = ~(np.abs(block) < 1e6)
            self._total += block.size
            self._nonfinite += int(bad.sum())
            yield _map_channels(np.where(bad, np.float32(0), block), self.channels)

    def _judge(self) -> None:
        if not self._total:
            raise AudioError("no audio: " + (self.notes[-1] if self.notes else "it holds no samples"))
        if self._nonfinite > MAX_NONFINITE_SHARE * self._total:
            raise AudioError(f"non-finite samples: {self._nonfinite} of {self._total}")
        if self._nonfinite:
            self.notes.append(f"{self._nonfinite} non-finite samples set to 0")


def load_audio(
    path: str | os.PathLike,
    sample_rate: int,
    channels: int,
    start_seconds: float = 0.0,
    seconds: float | None = None,
) -> np.ndarray:
    """Load a part of a file as float32 (channels, samples), sample-identical to what `Decoder` streams.

    Decodes from the beginning, since only so every sample is the same wherever one starts. Shorter than
    `seconds` where the file ends. Raises AudioError with the file's name in the sentence.
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


def _map_channels(block: np.ndarray, channels: int) -> np.ndarray:
    """(n, any) -> (n, channels)."""
    if block.shape[1] == 1:
        return np.repeat(block, channels, axis=1)
    if channels == 1:
        return block.mean(axis=1, keepdims=True, dtype=np.float32)
    return block[:, :channels]


def _open_source(path: Path, notes: list[str]) -> _SoundfileSource | _FfmpegSource:
    """Choose the decoder by the file's first bytes; what is wrong with the file goes to `notes`."""
    try:
        kind = _container(path)
        scan = scan_mp3(path) if kind == "mp3" else None
    except OSError as error:
        raise AudioError(f"unreadable: {error.strerror or error}") from error
    if scan:
        notes += scan.notes()
        kind = "ffmpeg" if scan.needs_ffmpeg else "soundfile"
    if kind == "ffmpeg":
        return _FfmpegSource(path, notes)
    return _SoundfileSource(path, notes, is_mp3=scan is not None)


def _container(path: Path) -> str:
    """'soundfile', 'ffmpeg' or 'mp3' (that is: perhaps an mp3, the frames will tell)."""
    if not path.is_file():  # a pipe or device would block for ever
        path.stat()  # raises the right error where there is nothing at all
        raise AudioError("unreadable: not a regular file")
    with open(path, "rb") as file:
        file.seek(_id3_bytes(file.read(10)))
        head = file.read(16)
    if not head:
        raise AudioError("no audio: the file is empty")
    if head[:4] in (b"RIFF", b"RF64", b"riff", b"fLaC", b"OggS", b"FORM", b"caff"):
        return "soundfile"
    is_mp4 = head[4:8] == b"ftyp"
    is_asf = head[:4] == b"\x30\x26\xb2\x75"
    is_matroska = head[:4] == b"\x1a\x45\xdf\xa3"
    is_adts = head[0] == 0xFF and head[1:2] and head[1] & 0xF6 == 0xF0
    return "ffmpeg" if is_mp4 or is_asf or is_matroska or is_adts else "mp3"


class _SoundfileSource:
    """Blocks (frames, channels) float32 of a file that libsndfile reads."""

    def __init__(self, path: Path, notes: list[str], is_mp3: bool = False):
        import soundfile

        class ForwardFile(soundfile.SoundFile):
            """SoundFile.read seeks after every read, and in a VBR mp3 that seek garbles what follows."""

            def seekable(self) -> bool:
                return False

        self._error = soundfile.LibsndfileError
        self._notes = notes
        self._is_mp3 = is_mp3
        try:
            # Bytes, because soundfile cannot encode the surrogates of a name that is not UTF-8.
            self._file = ForwardFile(os.fsencode(path) if os.name == "posix" else str(path))
        except self._error as error:
            raise AudioError(f"no audio: {error.error_string}") from error
        self.sample_rate: int = self._file.samplerate
        self.channels: int = self._file.channels

    def blocks(self) -> Iterator[np.ndarray]:
        parts = self._parts()
        while some := list(itertools.islice(parts, BLOCK_FRAMES // READ_FRAMES)):
            yield np.concatenate(some)

    def _parts(self) -> Iterator[np.ndarray]:
        """Small reads, because the read in which an error shows is lost."""
        done = 0
        while True:
            try:
                part = self._file.read(READ_FRAMES, dtype="float32", always_2d=True)
            except self._error as error:
                self._notes.append(f"damaged at {done / self.sample_rate:.2f} s: {error.error_string}")
                return
            if not len(part):
                break
            done += len(part)
            yield part
        # What an mp3 lacks was counted in its frames; `frames` of an mp3 is only an estimate.
        promised = _promised_frames(self._file)
        if not self._is_mp3 and done < promised:
            self._notes.append(_missing(done / self.sample_rate, promised / self.sample_rate))

    def close(self) -> None:
        self._file.close()


def _promised_frames(file) -> int:
    """The frames a header promises; for a wav cut short libsndfile tells it only in its log."""
    cut = re.search(r"data : (\d+) \(should be (\d+)\)", file.extra_info)
    if not cut or int(cut[1]) <= int(cut[2]):
        return file.frames
    return file.frames * int(cut[1]) // max(1, int(cut[2]))


def _missing(found_seconds: float, promised_seconds: float) -> str:
    return f"cut: {found_seconds:.2f} s of {promised_seconds:.2f} s are there"


class _FfmpegSource:
    """Blocks (frames, channels) float32 of a file that ffmpeg reads, as a Sun .au stream from a pipe.

    The whitelists keep ffmpeg from following a playlist, or a name like 'concat:a|b', to other files.
    """

    FORMATS = "mp3,wav,flac,ogg,aiff,aac,asf,matroska,mov,w64,caf"

    def __init__(self, path: Path, notes: list[str]):
        program = find_ffmpeg()
        if program is None:
            raise FfmpegMissing("needs ffmpeg: there is none on PATH")
        self._path = path
        self._notes = notes
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        command = [program, "-nostdin", "-v", "error", "-protocol_whitelist", "file"]
        command += ["-format_whitelist", self.FORMATS, "-i", f"file:{path}", "-map", "0:a:0", "-vn"]
        command += ["-c:a", "pcm_f32be", "-f", "au", "-"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors
        )
        # A minute, and ten seconds for each MB: decoding takes less than a hundredth of that.
        limit_seconds = 60 + path.stat().st_size / 1e5
        self._watchdog = threading.Timer(limit_seconds, self._process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()
        header = self._process.stdout.read(24)
        if len(header) < 24:
            message = self._last_error()
            self.close()
            raise AudioError(f"cannot be decoded: {message}")
        _magic, offset, _size, _encoding, self.sample_rate, self.channels = struct.unpack(">4s5I", header)
        self._process.stdout.read(offset - 24)

    def blocks(self) -> Iterator[np.ndarray]:
        frame_bytes = 4 * self.channels
        while data := self._process.stdout.read(BLOCK_FRAMES * frame_bytes):
            data = data[: len(data) // frame_bytes * frame_bytes]
            yield np.frombuffer(data, ">f4").astype(np.float32).reshape(-1, self.channels)
        failed = self._process.wait() != 0
        if failed or (self._has_errors() and not self._notes):
            self._notes.append(f"damaged: {self._last_error()}")

    def close(self) -> None:
        self._watchdog.cancel()
        self._process.kill()
        self._process.stdout.close()
        self._process.wait()
        self._errors.close()

    def _has_errors(self) -> bool:
        return os.fstat(self._errors.fileno()).st_size > 0

    def _last_error(self) -> str:
        if self._process.wait() < 0:
            return "ffmpeg took too long"
        size = os.fstat(self._errors.fileno()).st_size
        self._errors.seek(max(0, size - 2000))
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        # '[mov @ 0x5622a5fcc900] ' differs from run to run, and so must not reach the manifest.
        message = re.sub(r"^\[.*?\] ", "", lines[-1]) if lines else "it failed"
        return "ffmpeg: " + message.replace(f"file:{self._path}: ", "")


def find_ffmpeg() -> str | None:
    """The ffmpeg on PATH, else the one that the package imageio-ffmpeg brings, else None."""
    program = shutil.which("ffmpeg")
    if program is None:
        with suppress(ImportError, RuntimeError):
            from imageio_ffmpeg import get_ffmpeg_exe

            program = get_ffmpeg_exe()
    return program


# ---------------------------------------------------------------------------------------------------
# The frames of an mp3


@dataclass
class Mp3Scan:
    """What a walk from frame header to frame header found in an mp3, without decoding anything."""

    frames: int = 0
    seconds: float = 0.0
    info_headers: int = 0  # Xing, Info or VBRI: one for each file joined into this one
    promised_frames: int = 0  # as the first of them says; 0: it doesn't
    frame_seconds: float = 0.0
    kinds: set[tuple[int, int]] = field(default_factory=set)  # (sample rate, bit rate)
    gaps: list[tuple[float, int]] = field(default_factory=list)  # (seconds, bytes that are no frame)
    is_cut: bool = False  # the last frame is incomplete

    # mpg123 gives up after this many bytes of garbage.
    MAX_GAP_BYTES = 1024

    @property
    def needs_ffmpeg(self) -> bool:
        """Whether libsndfile would lose a part.

        It believes the first header's count of frames, and where there is none it takes the first
        frame's bit rate for the whole file: joined files and headerless VBR end too early.
        """
        if any(size > self.MAX_GAP_BYTES for _, size in self.gaps):
            return True
        if self.promised_frames:
            return self.info_headers > 1 or self.frames > self.promised_frames + 2
        return len(self.kinds) > 1

    def notes(self) -> list[str]:
        notes = [f"{size} bytes of garbage at {seconds:.2f} s" for seconds, size in self.gaps]
        if len(notes) > 3:
            notes = [*notes[:3], f"and in {len(notes) - 3} more places"]
        if self.promised_frames > self.frames + 2:
            notes.append(_missing(self.seconds, self.promised_frames * self.frame_seconds))
        elif self.is_cut:
            notes.append(f"cut: the last frame, at {self.seconds:.2f} s, is incomplete")
        return notes


def scan_mp3(path: str | os.PathLike) -> Mp3Scan:
    """Walk over all frames of an mp3. Raises AudioError when there are none (text, playlists, noise)."""
    scan = Mp3Scan()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        position, end = 0, len(data)
        while position < end:
            if frame := _mp3_frame(data, position):
                _count_frame(scan, frame, data[position : position + 64])
                position += frame.size
                scan.is_cut = position > end
            elif tag_bytes := _tag_bytes(data, position):
                position += tag_bytes
            else:
                start, position = position, _next_frame(data, position)
                # What precedes the first frame is no loss, and zeros are padding.
                if scan.frames and data[start:position].strip(b"\0"):
                    scan.gaps.append((scan.seconds, position - start))
    if scan.frames < 10:
        raise AudioError("no audio: the content is of no known audio format")
    return scan


@dataclass(frozen=True)
class _Mp3Frame:
    size: int  # bytes
    sample_rate: int
    bitrate: int  # bit/s
    samples: int
    is_mpeg1: bool


_MPEG1_KBPS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG2_KBPS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


def _mp3_frame(data: mmap.mmap, position: int) -> _Mp3Frame | None:
    """The MPEG 1, 2 or 2.5 layer III frame whose header stands at this place, if one does."""
    header = int.from_bytes(data[position : position + 4], "big")
    version, layer = header >> 19 & 3, header >> 17 & 3  # version 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    bitrate_index, rate_index = header >> 12 & 15, header >> 10 & 3
    is_frame = header >> 21 == 0x7FF and version != 1 and layer == 1
    if not is_frame or bitrate_index in (0, 15) or rate_index == 3:
        return None
    sample_rate = (44100, 48000, 32000)[rate_index] >> {3: 0, 2: 1, 0: 2}[version]
    bitrate = 1000 * (_MPEG1_KBPS if version == 3 else _MPEG2_KBPS)[bitrate_index]
    samples = 1152 if version == 3 else 576
    size = samples // 8 * bitrate // sample_rate + (header >> 9 & 1)
    return _Mp3Frame(size, sample_rate, bitrate, samples, version == 3)


def _count_frame(scan: Mp3Scan, frame: _Mp3Frame, head: bytes) -> None:
    """Add a frame, or, when it is an information header, what it says."""
    if marker := re.search(rb"Xing|Info|VBRI", head[:40]):
        scan.info_headers += 1
        if scan.info_headers == 1 and not scan.frames:
            scan.promised_frames = _promised_by_info(head, marker)
            scan.frame_seconds = frame.samples / frame.sample_rate
        return
    scan.frames += 1
    scan.seconds += frame.samples / frame.sample_rate
    scan.kinds.add((frame.sample_rate, frame.bitrate))


def _promised_by_info(head: bytes, marker: re.Match[bytes]) -> int:
    at = marker.start()
    if marker[0] == b"VBRI":
        return int.from_bytes(head[at + 14 : at + 18], "big")
    has_count = head[at + 7] & 1
    return int.from_bytes(head[at + 8 : at + 12], "big") if has_count else 0


def _next_frame(data: mmap.mmap, start: int) -> int:
    """The first place from `start` on where two frames of one kind follow each other, else the end."""
    position = start
    while (position := data.find(b"\xff", position)) >= 0:
        first = _mp3_frame(data, position)
        second = first and _mp3_frame(data, position + first.size)
        if second and (first.sample_rate, first.is_mpeg1) == (second.sample_rate, second.is_mpeg1):
            return position
        position += 1
    return len(data)


def _tag_bytes(data: mmap.mmap, position: int) -> int:
    """The size of the ID3v1, ID3v2 or APE tag that stands at this place; 0 without one."""
    head = data[position : position + 32]
    if head[:3] == b"TAG":
        return 128
    if head[:8] == b"APETAGEX":
        return 32 + int.from_bytes(head[12:16], "little")
    return _id3_bytes(head)


def _id3_bytes(head: bytes) -> int:
    """The size of the ID3v2 tag that these first ten bytes of a file open; 0 without one."""
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    has_footer = head[5] & 0x10
    size = 0
    for seven_bits in head[6:10]:
        size = size << 7 | seven_bits & 0x7F
    return size + (20 if has_footer else 10)


# ---------------------------------------------------------------------------------------------------
# Encoding

# MPEG 1, 2 and 2.5 layer III know no other rates.
MP3_SAMPLE_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
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


def encode_audio(path: str | os.PathLike, x: np.ndarray, sample_rate: int) -> None:
    """Write float32 (channels, samples) as .mp3, .wav, .flac, .ogg, or as .m4a through pydub and ffmpeg.

    mp3 gets the highest constant bit rate that its sample rate knows (320 kbit/s at 44.1 kHz, 160 at 24,
    64 at 12; below 32 kHz LAME makes it 0.45 dB quieter); wav and flac 16 bits. Samples beyond full scale
    are clipped. Raises AudioError for a sample rate that mp3 doesn't know (nothing is resampled here), and
    whenever the file cannot be written: then there is no half file.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (*_SOUNDFILE_FORMATS, ".m4a"):
        raise AudioError(f"{path}: cannot write '{suffix}', only .mp3 .wav .flac .ogg .m4a")
    if x.ndim != 2 or not np.isfinite(x).all():
        raise AudioError(f"{path}: audio must be finite and (channels, samples), this is {x.shape}")
    if suffix == ".mp3" and sample_rate not in MP3_SAMPLE_RATES:
        raise AudioError(f"{path}: mp3 cannot hold {sample_rate} Hz; write .wav or .flac instead")
    if suffix == ".m4a" and find_ffmpeg() is None:  # else pydub leaves an empty file and a bare FileNotFoundError
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
    import soundfile

    try:
        with soundfile.SoundFile(path, "w", sample_rate, x.shape[0], **options) as file:
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
    AudioSegment.converter = find_ffmpeg()
    pcm = to_int16(x).T.tobytes()
    segment = AudioSegment(pcm, sample_width=2, frame_rate=sample_rate, channels=x.shape[0])
    try:
        segment.export(path, format="ipod", codec="aac", bitrate="256k").close()
    except CouldntEncodeError as error:
        raise OSError("ffmpeg failed: " + str(error).strip().splitlines()[-1]) from error


# ---------------------------------------------------------------------------------------------------
# Fingerprints: the same music in two files

FINGERPRINTS_PER_SECOND = 4
FINGERPRINT_SECONDS = 300  # of a song's beginning
FINGERPRINT_BANDS = 32
_BAND_EDGES_HZ = np.rint(np.geomspace(250, 3000, FINGERPRINT_BANDS + 2)).astype(int)
_TIME_LAG = 2  # fingerprint frames
_SILENCE = 1e-6  # of a song's loudest frame: -60 dB
_SEGMENT_FRAMES = 30 * FINGERPRINTS_PER_SECOND
_LEAST_FRAMES = 32  # of a song of 9 s; a few frames agree with anything
# Measured on 178 songs: different ones reach 0.21 (10 s of each: 0.27); two remasters 0.43 and 0.66; copies
# at 64 kbit/s, -6 dB and with 0.3 s cut off at least 0.72, when cut off by half a fingerprint frame 0.56.
SAME_MUSIC_SIMILARITY = 0.38


class Fingerprinter:
    """The fingerprint of audio that comes in blocks: what survives an mp3 encoder, a fader and a trim.

    Every 250 ms the energy of one second in 33 bands from 250 to 3000 Hz; of these the sign of the
    difference between neighbouring bands, and between now and half a second ago, so that neither level
    nor equaliser matters (after Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System", 2002,
    with longer frames). -1, 0 or 1, where 0 is silence. Memory: the energies of the first five minutes.
    """

    def __init__(self, sample_rate: int):
        self._window = np.hanning(sample_rate).astype(np.float32)  # 1 s, so that bin k lies at k Hz
        self._hop = sample_rate // FINGERPRINTS_PER_SECOND
        self._rest = np.zeros(0, np.float32)  # mono, what the next frames need
        self._energies: list[np.ndarray] = []

    def add(self, block: np.ndarray) -> None:
        """Count a block, float32 (channels, n)."""
        if self._is_full():
            return
        self._rest = np.concatenate([self._rest, block.mean(axis=0, dtype=np.float32)])
        start, second = 0, len(self._window)
        while start + second <= len(self._rest) and not self._is_full():
            self._energies.append(self._band_energies(self._rest[start : start + second]))
            start += self._hop
        self._rest = self._rest[start:].copy()

    def result(self) -> str:
        """The compressed matrix int8 (frames, bands) as text, at most some 8 kB; see `read_fingerprint`."""
        bits = np.zeros((0, FINGERPRINT_BANDS), np.int8)
        if len(self._energies) > _TIME_LAG:
            bits = _sign_bits(np.stack(self._energies).astype(np.float64))
        return base64.b64encode(zlib.compress(bits.tobytes(), 9)).decode("ascii")

    def _is_full(self) -> bool:
        return len(self._energies) == FINGERPRINT_SECONDS * FINGERPRINTS_PER_SECOND

    def _band_energies(self, second: np.ndarray) -> np.ndarray:
        spectrum = np.fft.rfft(second * self._window)[: _BAND_EDGES_HZ[-1]]
        power = np.zeros(_BAND_EDGES_HZ[-1])  # a low sample rate has nothing in the upper bands
        power[: len(spectrum)] = np.abs(spectrum) ** 2
        return np.add.reduceat(power, _BAND_EDGES_HZ[:-1])


def _sign_bits(energies: np.ndarray) -> np.ndarray:
    """Band energies (frames, bands + 1) -> int8 (frames - lag, bands)."""
    level = np.log(energies + _SILENCE * energies.mean() + 1e-20)
    across_bands = np.diff(level, axis=1)
    bits = np.sign(across_bands[_TIME_LAG:] - across_bands[:-_TIME_LAG]).astype(np.int8)
    loudness = energies.max(axis=1)
    audible = loudness > _SILENCE * loudness.max()
    bits[~(audible[_TIME_LAG:] | audible[:-_TIME_LAG])] = 0
    return bits


def read_fingerprint(text: str) -> np.ndarray:
    """What `Fingerprinter.result` wrote, as int8 (frames, bands); '' is a song without one (no frames).

    Raises AudioError when the text is damaged.
    """
    if not text:
        return np.zeros((0, FINGERPRINT_BANDS), np.int8)
    most_bytes = FINGERPRINT_SECONDS * FINGERPRINTS_PER_SECOND * FINGERPRINT_BANDS
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), most_bytes)
        return np.frombuffer(data, np.int8).reshape(-1, FINGERPRINT_BANDS)
    except (ValueError, zlib.error) as error:
        raise AudioError(f"damaged fingerprint: {error}") from error


def find_same_music(
    fingerprints: list[np.ndarray], threshold: float = SAME_MUSIC_SIMILARITY
) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, similarity) for every two fingerprints that share a stretch of music.

    30 s of every minute of the shorter song are laid over the longer song at every lag; similarity is the
    mean product of their signs where they agree best: 1 for equal, about 0 for unrelated. A segment that is
    mostly silence, or a song shorter than 9 s, matches nothing. All lags at once by FFT, and the sum over
    bands is a matrix product at each frequency, in blocks of bounded memory. Time grows with the square of
    the number of songs: 0.25 ms of one core for two songs of five minutes.
    """
    order = sorted(range(len(fingerprints)), key=lambda i: len(fingerprints[i]))
    order = [i for i in order if len(fingerprints[i]) >= _LEAST_FRAMES]
    longest = max((len(fingerprints[i]) for i in order), default=0)
    length = -(-(longest + _SEGMENT_FRAMES) // 90) * 90  # 2 * 3**2 * 5 times a small number: a fast FFT
    for first in range(0, len(order), _QUERY_SONGS):
        queries = order[first : first + _QUERY_SONGS]
        owners, segments = _segments([fingerprints[i] for i in queries])
        if not len(segments):
            continue
        sizes = np.abs(segments).sum(axis=(1, 2))
        spectra = np.fft.rfft(segments, length, axis=1).conj().astype(np.complex64).transpose(1, 2, 0)
        for second in range(first, len(order), _LONGER_SONGS):
            others = order[second : second + _LONGER_SONGS]
            best = _best_agreement([fingerprints[i] for i in others], spectra, length) / sizes
            for k, i in enumerate(queries):
                for m, j in enumerate(others):
                    similarity = best[m, owners == k].max(initial=0.0)
                    if first + k < second + m and similarity >= threshold:
                        yield i, j, float(similarity)


_QUERY_SONGS, _LONGER_SONGS = 8, 16  # a block of their products takes some 50 MB


def _segments(fingerprints: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(owners (n), segments (n, frames, bands)): 30 s of every minute, and each song's last 30 s."""
    owners, segments = [], []
    for owner, bits in enumerate(fingerprints):
        last = max(0, len(bits) - _SEGMENT_FRAMES)
        for start in sorted({*range(0, last, 2 * _SEGMENT_FRAMES), last}):
            part = bits[start : start + _SEGMENT_FRAMES].astype(np.float32)
            if np.abs(part).mean() > 0.5:
                owners.append(owner)
                segments.append(np.pad(part, ((0, _SEGMENT_FRAMES - len(part)), (0, 0))))
    shape = (-1, _SEGMENT_FRAMES, FINGERPRINT_BANDS)
    return np.array(owners, int), np.array(segments, np.float32).reshape(shape)


def _best_agreement(fingerprints: list[np.ndarray], segments: np.ndarray, length: int) -> np.ndarray:
    """The largest sum of products over all lags, (songs, n), for segment spectra (frequency, bands, n)."""
    padded = np.zeros((len(fingerprints), length, FINGERPRINT_BANDS), np.float32)
    for row, bits in zip(padded, fingerprints, strict=True):
        row[: len(bits)] = bits
    spectra = np.fft.rfft(padded, axis=1).astype(np.complex64).transpose(1, 0, 2)
    products = spectra @ segments  # (frequency, songs, n)
    return np.fft.irfft(products, length, axis=0).max(axis=0)
