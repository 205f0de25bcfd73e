"""Everything that touches audio files: decode, resample, encode, and the int16 arrays they become.

    x = audio.load_audio("song.mp3", sample_rate=24000, channels=2, seconds=10)
    audio.encode_audio("copy.mp3", x, sample_rate=24000)

There is one decoding path. `Decoder` streams a file in blocks of bounded memory, `load_audio` collects
those very blocks. Arrays are float32 (channels, samples) with full scale 1 unless said otherwise.
Which decoder reads a file is decided by its content, never by its name:

    wav, flac, ogg, opus, aiff, w64, caf, au    soundfile
    mp3 that mpg123 reads to its end            soundfile
    mp3 headerless VBR, joined, with garbage    ffmpeg (libsndfile truncates or gives up on these)
    chained ogg, joined flac, wav or aiff       part by part (both decoders stop after the first, or lose some)
    m4a, aac, wma, matroska, ape, wv, tta       ffmpeg
    more than two channels                      ffmpeg (it knows what is left, centre and right)
    what soundfile refuses or breaks off        ffmpeg
    anything else (text, playlists, pictures)   refused before a decoder sees it
"""

from __future__ import annotations

import base64
import itertools
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np

from continuation import containers, files

CHUNK_SECONDS = 10
INT16_SCALE = 32768
PEAK_LIMIT = 0.98  # louder sounds are turned down before they are written
LIMITER_SECONDS = 0.02  # to each side of a peak
AUDIO_SUFFIXES = frozenset(
    {".mp3", ".mp2", ".mpga", ".wav", ".flac", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".aifc", ".w64", ".caf"}
    | {".au", ".snd", ".m4a", ".m4b", ".mp4", ".aac", ".wma", ".mka", ".webm", ".ape", ".wv", ".tta"}
)
BLOCK_FRAMES = 65536
READ_FRAMES = 4096
MAX_NONFINITE_SHARE = 0.01
LARGEST_SAMPLE = 1e10  # int32 as floats reaches 2**31
LOUDEST_PEAK = 1.5  # a lossy decoder overshoots by less: what is louder is not of full scale 1
LOUD_SHARE = 0.01  # of the time
SCALE_SECONDS = 30
LOWEST_SAMPLE_RATE = 1000
MOST_CHANNELS = 32
MOST_PARTS = 1000  # files joined into one
MIX_TO_STEREO = ("-af", "aresample=rematrix_maxval=1", "-ac", "2")
DOUBLE_MONO = ("-af", "pan=stereo|FL=FL+FC|FR=FR+FC")  # stereo, where FC is missing, stays as it is
LARGEST_LENGTH = 1 << 48  # samples: longer than a century


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

    Resampled by soxr HQ, bit-identical to a one-shot call. Mono is doubled for stereo, more than two channels
    are mixed down to stereo, stereo is averaged for mono. A file that is far louder than full scale is scaled
    down as a whole. `clip_seconds` stops after so much output.
    `notes` says, after the iteration, what was found missing, damaged or odd, one short phrase each.
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

        with closing(_open_sources(self.path, self.notes)) as sources:
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

    def _cleaned(self, source: _SoundfileSource | _FfmpegSource) -> Iterator[np.ndarray]:
        """Blocks (n, channels) at the file's own rate, every sample finite and of full scale 1."""
        gain = np.float32(_gain(source))
        if gain < 1:
            self.notes.append(f"far louder than full scale: scaled by {20 * np.log10(gain):.1f} dB")
        for block in source.blocks():
            bad = ~_is_sound(block)
            self._total += block.size
            self._nonfinite += int(bad.sum())
            yield _map_channels(np.where(bad, np.float32(0), block) * gain, self.channels)

    def _judge(self) -> None:
        if not self._total:
            raise AudioError("no audio: " + (self.notes[-1] if self.notes else "it holds no samples"))
        if self._nonfinite > MAX_NONFINITE_SHARE * self._total:
            raise AudioError(f"non-finite samples: {self._nonfinite} of {self._total}")
        if self._nonfinite:
            self.notes.append(f"{self._nonfinite} non-finite samples set to 0")


def _is_sound(x: np.ndarray) -> np.ndarray:
    """Which samples are finite; of values near 1e38 too, which overflow in the resampler, none is."""
    return np.abs(x) < LARGEST_SAMPLE


def _gain(source: _SoundfileSource | _FfmpegSource) -> float:
    """1, or less for a file whose samples are of another scale than full scale 1, int16 for example.

    The first half minute tells whether it is, the whole file by how much: so the gain is the same
    wherever one stops to read. A single burst, as a damaged mp3 has, is no scale.
    """
    if source.is_integer:
        return 1.0
    peak, loud_parts, parts = 0.0, 0, 0
    with closing(source.reopened()) as again:
        for block in again.blocks():
            x = np.where(_is_sound(block), np.abs(block), np.float32(0))
            peaks = [float(x[start : start + READ_FRAMES].max()) for start in range(0, len(x), READ_FRAMES)]
            peak, parts = max(peak, *peaks), parts + len(peaks)
            loud_parts += sum(peak > LOUDEST_PEAK for peak in peaks)
            is_scale = loud_parts > LOUD_SHARE * parts
            if not is_scale and parts * READ_FRAMES > SCALE_SECONDS * again.sample_rate:
                return 1.0
    return PEAK_LIMIT / peak if loud_parts > LOUD_SHARE * parts else 1.0


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
    """(n, 1 or 2) -> (n, channels)."""
    if block.shape[1] == channels:
        return block
    if channels == 1:
        return block.mean(axis=1, keepdims=True, dtype=np.float32)
    return np.repeat(block, channels, axis=1)


def _open_sources(path: Path, notes: list[str]) -> Iterator[_SoundfileSource | _FfmpegSource]:
    """Open a file, or one after the other the files that were joined in it; each is closed before the next.

    A joined file that cannot be read is left out, and goes to `notes`.
    """
    with _readable(path):
        parts = containers.joined_parts(path)
    if len(parts) == 1:
        with closing(_open_source(path, notes)) as source:
            yield source
        return
    if len(parts) > MOST_PARTS:
        raise AudioError(f"{len(parts)} files joined in one, more than {MOST_PARTS}")
    notes.append(f"{len(parts)} files joined in one")
    for number, (start, end) in enumerate(parts, 1):
        part_notes: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part"
            _copy_bytes(path, part, start, end)
            try:
                with closing(_open_source(part, part_notes)) as source:
                    yield source
            except FfmpegMissing:
                raise
            except AudioError as error:
                part_notes.append(str(error))
            finally:
                notes += [f"file {number}: {note}" for note in part_notes]


def _copy_bytes(path: Path, target: Path, start: int, end: int) -> None:
    with open(path, "rb") as source, open(target, "wb") as copy:
        source.seek(start)
        while data := source.read(min(1 << 20, end - source.tell())):
            copy.write(data)


def _open_source(path: Path, notes: list[str]) -> _SoundfileSource | _FfmpegSource:
    """Open a file with the decoder that reads it right; what is wrong with the file goes to `notes`.

    ffmpeg takes what libsndfile would cut short, refuses, or has no channel layout of. It also goes on
    where libsndfile breaks off, see `_SoundfileSource.blocks`.
    """
    with _readable(path):
        content = containers.inspect(path)
    if content is None:
        raise AudioError("no audio: the content is of no known audio format")
    notes += content.notes
    refusal = ""
    if not content.needs_ffmpeg:
        try:
            source = _SoundfileSource(path, notes)
        except _Undecodable as error:
            refusal = str(error)
        else:
            if source.channels <= 2:
                return source
            source.close()
    try:
        return _FfmpegSource(path, notes, DOUBLE_MONO if content.changes_channels else ())
    except FfmpegMissing as error:
        raise FfmpegMissing(f"{refusal}; ffmpeg may read it: there is none on PATH" if refusal else error) from error
    except _Undecodable as error:
        raise AudioError(refusal or str(error)) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise AudioError for a file that cannot be read, or holds nothing."""
    try:
        if not path.is_file():  # a pipe or device would block for ever
            path.stat()  # raises the right error where there is nothing at all
            raise AudioError("unreadable: not a regular file")
        if not path.stat().st_size:
            raise AudioError("no audio: the file is empty")
        yield
    except OSError as error:
        raise AudioError(f"unreadable: {error.strerror or error}") from error


class _Undecodable(AudioError):
    """One decoder does not read the file: another may."""


def _check_shape(sample_rate: int, channels: int) -> None:
    """Refuse what is no music before it takes memory: a resampler's grows with the ratio of the rates."""
    if sample_rate < LOWEST_SAMPLE_RATE:
        raise AudioError(f"no audio: a sample rate of {sample_rate} Hz, below {LOWEST_SAMPLE_RATE}")
    if channels > MOST_CHANNELS:
        raise AudioError(f"no audio: {channels} channels, more than {MOST_CHANNELS}")


class _SoundfileSource:
    """Blocks (frames, channels) float32 of a file that libsndfile reads."""

    def __init__(self, path: Path, notes: list[str]):
        import soundfile

        class ForwardFile(soundfile.SoundFile):
            """SoundFile.read seeks after every read, and in a VBR mp3 that seek garbles what follows."""

            def seekable(self) -> bool:
                return False

        self._error = soundfile.LibsndfileError
        self._path, self._notes = path, notes
        self._damage = ""
        self._frames_read = 0
        try:
            # A descriptor, because soundfile takes what is called .raw for samples without a header, whatever it
            # holds, and cannot encode a name that is not UTF-8. Windows has no descriptors that both would know.
            self._file = ForwardFile(os.open(path, os.O_RDONLY) if os.name == "posix" else str(path))
        except self._error as error:
            raise _Undecodable(f"no audio: {error.error_string}") from error
        except TypeError as error:  # the name ends in .raw: soundfile wants to be told the format
            raise _Undecodable("no audio: libsndfile reads no file whose name ends in .raw") from error
        self.sample_rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        try:
            _check_shape(self.sample_rate, self.channels)
            if not self._file.frames:
                raise _Undecodable("no audio: it holds no samples")
        except AudioError:
            self.close()
            raise

    @property
    def is_integer(self) -> bool:
        """Whether no sample can be louder than full scale."""
        return self._file.subtype.startswith("PCM")

    def reopened(self) -> _SoundfileSource:
        """The same from its beginning, without notes."""
        return _SoundfileSource(self._path, [])

    def blocks(self) -> Iterator[np.ndarray]:
        """All blocks. From a place on where libsndfile breaks off they are ffmpeg's, where it knows more."""
        parts = itertools.chain(self._parts(), self._rest())
        while some := list(itertools.islice(parts, BLOCK_FRAMES // READ_FRAMES)):
            yield np.concatenate(some)
        promised = _promised_frames(self._file)
        if self._frames_read < promised:
            lack = containers.missing(self._frames_read / self.sample_rate, promised / self.sample_rate)
            self._notes.append(f"{self._damage}, {lack}" if self._damage else lack)
        elif (
            self._damage and not promised
        ):  # or else nothing is missing: behind a tag ffmpeg may complain and read on
            self._notes.append(self._damage)

    def _parts(self) -> Iterator[np.ndarray]:
        """Small reads, because the read in which an error shows is lost."""
        while True:
            try:
                part = self._file.read(READ_FRAMES, dtype="float32", always_2d=True)
            except self._error as error:
                self._damage = f"damaged at {self._frames_read / self.sample_rate:.2f} s: {error.error_string}"
                return
            if not len(part):
                return
            self._frames_read += len(part)
            yield part

    def _rest(self) -> Iterator[np.ndarray]:
        """What ffmpeg reads behind a damaged place; there is no damage when it has no complaint."""
        if not self._damage:
            return
        complaints: list[str] = []
        try:
            source = _FfmpegSource(self._path, complaints)
        except AudioError:
            return
        with closing(source):
            if (source.sample_rate, source.channels) != (self.sample_rate, self.channels):
                return
            skip = self._frames_read
            for block in source.blocks():
                part, skip = block[skip:], max(0, skip - len(block))
                self._frames_read += len(part)
                yield from np.split(part, range(READ_FRAMES, len(part), READ_FRAMES)) if len(part) else ()
        if not complaints:
            self._damage = ""

    def close(self) -> None:
        self._file.close()


def _promised_frames(file) -> int:
    """The frames a header promises, 0 where it promises none.

    Of an mp3 libsndfile has only an estimate, and what is missing was counted in its frames. Of a wav cut
    short it tells the promise in its log. What was written to a pipe has the largest number there is as its
    length, since nobody could go back and enter the true one.
    """
    if file.subtype.startswith("MPEG") or file.frames > LARGEST_LENGTH:
        return 0
    cut = re.search(r"data : (\d+) \(should be (\d+)\)", file.extra_info)
    if not cut or int(cut[1]) <= int(cut[2]):
        return file.frames
    is_placeholder = any(abs(int(cut[1]) - largest) < 1 << 16 for largest in (1 << 31, 1 << 32))
    return 0 if is_placeholder else file.frames * int(cut[1]) // max(1, int(cut[2]))


class _FfmpegSource:
    """Blocks (frames, channels) float32 of a file that ffmpeg reads, as a Sun .au stream from a pipe.

    Mono or stereo: of more channels ffmpeg knows the places, and mixes them down with the weights of ITU-R
    BS.775 (centre and surround at -3 dB, no LFE), lowered so that nothing clips. `filters` are arguments of
    ffmpeg.
    The whitelists keep ffmpeg from following a playlist, or a name like 'concat:a|b', to other files.
    """

    FORMATS = "mp3,wav,flac,ogg,aiff,aac,asf,matroska,mov,w64,caf,au,ape,wv,tta"
    is_integer = False  # or not: the stream does not say

    def __init__(self, path: Path, notes: list[str], filters: Sequence[str] = ()):
        self._path, self._notes, self._filters = path, notes, filters
        self._is_known_damage = bool(notes)  # which the scan of an mp3 describes better
        self._start()
        if self.channels > 2:
            channels = self.channels
            self.close()
            self._filters = MIX_TO_STEREO
            try:
                self._start()
            except _Undecodable as error:
                raise AudioError(f"{channels} channels in no known layout: they cannot be mixed down") from error
            notes.append(f"{channels} channels, mixed down to stereo")

    def _start(self) -> None:
        """Start ffmpeg and read the header of its stream."""
        program = find_ffmpeg()
        if program is None:
            raise FfmpegMissing("needs ffmpeg: there is none on PATH")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        command = [program, "-nostdin", "-v", "error", "-protocol_whitelist", "file"]
        command += ["-format_whitelist", self.FORMATS, "-i", f"file:{self._path}", "-map", "0:a:0", "-vn"]
        command += [*self._filters, "-c:a", "pcm_f32be", "-f", "au", "-"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors
        )
        # A minute, and ten seconds for each MB: decoding takes less than a hundredth of that.
        limit_seconds = 60 + self._path.stat().st_size / 1e5
        self._watchdog = threading.Timer(limit_seconds, self._process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()
        header = self._process.stdout.read(24)
        try:
            if len(header) < 24:
                raise _Undecodable(f"cannot be decoded: {self._last_error()}")
            _magic, offset, _size, _encoding, self.sample_rate, self.channels = struct.unpack(">4s5I", header)
            _check_shape(self.sample_rate, self.channels)
        except AudioError:
            self.close()
            raise
        self._process.stdout.read(offset - 24)

    def reopened(self) -> _FfmpegSource:
        """The same from its beginning, without notes."""
        return _FfmpegSource(self._path, [], self._filters)

    def blocks(self) -> Iterator[np.ndarray]:
        frame_bytes = 4 * self.channels
        while data := self._process.stdout.read(BLOCK_FRAMES * frame_bytes):
            data = data[: len(data) // frame_bytes * frame_bytes]
            yield np.frombuffer(data, ">f4").astype(np.float32).reshape(-1, self.channels)
        failed = self._process.wait() != 0
        if failed or (self._has_errors() and not self._is_known_damage):
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


def limit_peaks(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Turn x (channels, samples) down around samples beyond PEAK_LIMIT, all channels alike, and leave the rest as it
    is: a lookahead limiter. One peak does not make a minute of music softer."""
    from scipy import ndimage

    size = 2 * round(LIMITER_SECONDS * sample_rate) + 1
    needed = np.minimum(1, PEAK_LIMIT / np.maximum(np.abs(x).max(axis=0), PEAK_LIMIT))
    lowest = ndimage.minimum_filter1d(needed, size, mode="nearest")
    return x * ndimage.uniform_filter1d(lowest, size, mode="nearest").astype(x.dtype)  # its window sees no higher one


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
        name = os.fsencode(path) if os.name == "posix" else str(path)  # soundfile cannot encode what is not UTF-8
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

    Every 250 ms the energy of one second in 33 bands from 250 to 3000 Hz, summed over the channels: the
    energies of a sum of channels would vanish where they are of opposite phase. Of these the sign of the
    difference between neighbouring bands, and between now and half a second ago, so that neither level
    nor equaliser matters (after Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System", 2002,
    with longer frames). -1, 0 or 1, where 0 is silence. Memory: the energies of the first five minutes.
    """

    def __init__(self, sample_rate: int):
        self._window = np.hanning(sample_rate).astype(np.float32)  # 1 s, so that bin k lies at k Hz
        self._hop = sample_rate // FINGERPRINTS_PER_SECOND
        self._rest: np.ndarray | None = None  # (channels, n), what the next frames need
        self._energies: list[np.ndarray] = []

    def add(self, block: np.ndarray) -> None:
        """Count a block, float32 (channels, n)."""
        if self._is_full():
            return
        joined = block if self._rest is None else np.concatenate([self._rest, block], axis=1)
        start, second = 0, len(self._window)
        while start + second <= joined.shape[1] and not self._is_full():
            self._energies.append(self._band_energies(joined[:, start : start + second]))
            start += self._hop
        self._rest = joined[:, start:].copy()

    def result(self) -> str:
        """The compressed matrix int8 (frames, bands) as text, at most some 8 kB; see `read_fingerprint`."""
        bits = np.zeros((0, FINGERPRINT_BANDS), np.int8)
        if len(self._energies) > _TIME_LAG:
            bits = _sign_bits(np.stack(self._energies).astype(np.float64))
        return base64.b64encode(zlib.compress(bits.tobytes(), 9)).decode("ascii")

    def _is_full(self) -> bool:
        return len(self._energies) == FINGERPRINT_SECONDS * FINGERPRINTS_PER_SECOND

    def _band_energies(self, second: np.ndarray) -> np.ndarray:
        spectrum = np.fft.rfft(second * self._window)[:, : _BAND_EDGES_HZ[-1]]
        power = np.zeros(_BAND_EDGES_HZ[-1])  # a low sample rate has nothing in the upper bands
        power[: spectrum.shape[1]] = (np.abs(spectrum) ** 2).sum(axis=0)
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
