"""The two decoders of audio files, libsndfile and ffmpeg, and which of them reads what.

    with closing(audio_decoders.open_sources(path, notes)) as sources:
        for source in sources:
            for block in source.blocks(): ...   # float32 (frames, channels) at source.sample_rate

The decoder is chosen by a file's content, never by its name:

    wav, flac, ogg, opus, aiff, w64, caf, au    soundfile
    mp3 that mpg123 reads to its end            soundfile
    mp3 headerless VBR, joined, with garbage    ffmpeg (libsndfile truncates or gives up on these)
    chained ogg, joined flac, wav or aiff       part by part (both decoders stop after the first, or lose some)
    m4a, aac, wma, matroska, ape, wv, tta, tak  ffmpeg
    mpc, dsf, dff, ac3, eac3, dts               ffmpeg
    more than two channels                      ffmpeg (it knows the channel layout)
    files where soundfile fails                 ffmpeg
    anything else (text, playlists, pictures)   refused before decoding
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import soundfile

from continuation import containers, mp3_scan
from continuation.cli import RunError

BLOCK_FRAMES = 65536
READ_FRAMES = 4096
LOWEST_SAMPLE_RATE = 1000
MOST_CHANNELS = 32
MOST_PARTS = 1000  # files joined into one
MIX_TO_STEREO = ("-af", "aresample=rematrix_maxval=1", "-ac", "2")
DOUBLE_MONO = ("-af", "pan=stereo|FL=FL+FC|FR=FR+FC")  # stereo, where FC is missing, stays as it is
LARGEST_LENGTH = 1 << 48  # samples: longer than a century


class AudioError(RunError):
    """An audio file that cannot be read or written; the message is one clear sentence."""


class FfmpegMissing(AudioError):
    """The file needs ffmpeg and there is none: it may decode on another day."""


class _Undecodable(AudioError):
    """One decoder does not read the file: the other may."""


# Choice of the decoder


def open_sources(path: Path, notes: list[str]) -> Iterator[SoundfileSource | FfmpegSource]:
    """Yield the opened file, or one after the other the files that were joined in it; each is closed before the next.

    A joined file that cannot be read is left out, with a note in `notes`. Raises AudioError, without the file's name,
    where no decoder reads the file, FfmpegMissing where ffmpeg might.
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


def _open_source(path: Path, notes: list[str]) -> SoundfileSource | FfmpegSource:
    """Open a file with the decoder that reads it correctly; `notes` receives what is wrong with the file.

    ffmpeg reads files that libsndfile would cut short or refuse, or whose channel layout it does not know. It also
    continues where libsndfile stops, see `SoundfileSource.blocks`.
    """
    with _readable(path):
        content = containers.inspect(path)
    if content is None:
        raise AudioError("no audio: the content is of no known audio format")
    notes += content.notes
    refusal = ""
    if not content.needs_ffmpeg:
        try:
            source = SoundfileSource(path, notes)
        except _Undecodable as error:
            refusal = str(error)
        else:
            if source.channels <= 2:
                return source
            source.close()
    try:
        options = ("-ignore_length", "1") if content.has_no_length else ()
        return FfmpegSource(path, notes, DOUBLE_MONO if content.changes_channels else (), options)
    except FfmpegMissing as error:
        raise FfmpegMissing(f"{refusal}; ffmpeg may read it: there is none on PATH" if refusal else error) from error
    except _Undecodable as error:
        raise AudioError(refusal or str(error)) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise AudioError for a file that is empty or cannot be read."""
    try:
        if not path.is_file():  # a pipe or device would block
            path.stat()  # raises the right error for a missing file
            raise AudioError("unreadable: not a regular file")
        if not path.stat().st_size:
            raise AudioError("no audio: the file is empty")
        yield
    except OSError as error:
        raise AudioError(f"unreadable: {error.strerror or error}") from error


def _check_shape(sample_rate: int, channels: int) -> None:
    """Refuse implausible rates and channels before memory is allocated: a resampler's grows with the rates' ratio."""
    if sample_rate < LOWEST_SAMPLE_RATE:
        raise AudioError(f"no audio: a sample rate of {sample_rate} Hz, below {LOWEST_SAMPLE_RATE}")
    if channels > MOST_CHANNELS:
        raise AudioError(f"no audio: {channels} channels, more than {MOST_CHANNELS}")


# libsndfile


class _ForwardFile(soundfile.SoundFile):
    """SoundFile that never seeks: its `read` seeks after every block, which garbles the rest of a VBR mp3."""

    def seekable(self) -> bool:
        return False


class SoundfileSource:
    """Blocks (frames, channels) float32 of a file that libsndfile reads."""

    def __init__(self, path: Path, notes: list[str]):
        self._path, self._notes = path, notes
        self._damage = ""
        self._frames_read = 0
        try:
            # A descriptor, because soundfile reads any file named .raw as samples without a header, and cannot encode
            # a name that is not UTF-8. Windows has no descriptors that both know.
            self._file = _ForwardFile(os.open(path, os.O_RDONLY) if os.name == "posix" else str(path))
        except soundfile.LibsndfileError as error:
            raise _Undecodable(f"no audio: {error.error_string}") from error
        except TypeError as error:  # the name ends in .raw: soundfile requires the format
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
        """Whether samples are integers, so that none can exceed full scale."""
        return self._file.subtype.startswith("PCM")

    @property
    def stated_seconds(self) -> float | None:
        """Length in the header in seconds, of an mp3 without one an estimate; None where there is none."""
        frames = self._file.frames
        return frames / self.sample_rate if frames < LARGEST_LENGTH else None

    def reopened(self) -> SoundfileSource:
        """Open the file again from its beginning, without notes."""
        return SoundfileSource(self._path, [])

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all blocks; from where libsndfile stops, those of ffmpeg, if it reads further."""
        for block in itertools.chain(self._parts(), self._rest()):
            self._frames_read += len(block)
            yield block
        promised = _promised_frames(self._file)
        if self._frames_read < promised:
            lack = mp3_scan.cut_note(self._frames_read / self.sample_rate, promised / self.sample_rate)
            self._notes.append(f"{self._damage}, {lack}" if self._damage else lack)
        elif self._damage and not promised:  # else nothing is missing: ffmpeg may report errors after a tag
            self._notes.append(self._damage)

    def _parts(self) -> Iterator[np.ndarray]:
        """Yield the blocks up to the first error. The block in which it occurs is lost: there they are small."""
        try:
            yield from self._read(BLOCK_FRAMES)
            return
        except soundfile.LibsndfileError:
            known = self._frames_read // READ_FRAMES
        with closing(self.reopened()) as again:
            try:
                yield from itertools.islice(again._read(READ_FRAMES), known, None)
            except soundfile.LibsndfileError as error:
                self._damage = f"damaged at {self._frames_read / self.sample_rate:.2f} s: {error.error_string}"

    def _read(self, frames: int) -> Iterator[np.ndarray]:
        while len(block := self._file.read(frames, dtype="float32", always_2d=True)):
            yield block

    def _rest(self) -> Iterator[np.ndarray]:
        """Yield the blocks of ffmpeg after a damaged place. Where ffmpeg reports no error, nothing is damaged."""
        if not self._damage:
            return
        complaints: list[str] = []
        try:
            source = FfmpegSource(self._path, complaints)
        except AudioError:
            return
        with closing(source):
            if (source.sample_rate, source.channels) != (self.sample_rate, self.channels):
                return
            skip = self._frames_read
            for block in source.blocks():
                part, skip = block[skip:], max(0, skip - len(block))
                if len(part):
                    yield part
        if not complaints:
            self._damage = ""

    def close(self) -> None:
        self._file.close()


def stated_seconds(path: Path) -> float | None:
    """Return the length in a file's header in seconds, which may be wrong; None where libsndfile reads none."""
    if not path.is_file():
        return None
    try:
        with closing(SoundfileSource(path, [])) as source:
            return source.stated_seconds
    except (AudioError, OSError):
        return None


def _promised_frames(file) -> int:
    """Return the number of frames in the header, 0 where it has none.

    For an mp3 libsndfile only estimates it, and mp3_scan has counted its frames. For a truncated wav libsndfile
    writes the header's length to its log. A file written to a pipe has the largest possible number, since the writer
    could not go back to enter the true length.
    """
    if file.subtype.startswith("MPEG") or file.frames > LARGEST_LENGTH:
        return 0
    cut = re.search(r"data : (\d+) \(should be (\d+)\)", file.extra_info)
    if not cut or int(cut[1]) <= int(cut[2]):
        return file.frames
    is_placeholder = any(abs(int(cut[1]) - largest) < 1 << 16 for largest in (1 << 31, 1 << 32))
    return 0 if is_placeholder else file.frames * int(cut[1]) // max(1, int(cut[2]))


# ffmpeg


class FfmpegSource:
    """Blocks (frames, channels) float32 of a file that ffmpeg reads, as a Sun .au stream from a pipe.

    Mono or stereo: ffmpeg knows the positions of more channels, and mixes them down with the weights of ITU-R
    BS.775 (centre and surround at -3 dB, no LFE), lowered so that nothing clips. filters, options: arguments of
    ffmpeg for its output and its input.
    The whitelists keep ffmpeg from following a playlist, or a name like 'concat:a|b', to other files.
    """

    FORMATS = "mp3,wav,flac,ogg,aiff,aac,asf,matroska,mov,w64,caf,au,ape,wv,tta,tak,mpc,mpc8,dsf,iff,ac3,eac3,dts"
    is_integer = False  # unknown from the stream

    def __init__(self, path: Path, notes: list[str], filters: Sequence[str] = (), options: Sequence[str] = ()):
        self._path, self._notes, self._filters, self._options = path, notes, filters, options
        self._is_known_damage = bool(notes)  # described better by the scan of an mp3
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
        command += ["-format_whitelist", self.FORMATS, *self._options, "-i", f"file:{self._path}"]
        command += ["-map", "0:a:0", "-vn", *self._filters, "-c:a", "pcm_f32be", "-f", "au", "-"]
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

    def reopened(self) -> FfmpegSource:
        """Open the file again from its beginning, without notes."""
        return FfmpegSource(self._path, [], self._filters, self._options)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all blocks."""
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
        # '[mov @ 0x5622a5fcc900] ' differs between runs, so it must not be in the manifest.
        message = re.sub(r"^\[.*?\] ", "", lines[-1]) if lines else "it failed"
        return "ffmpeg: " + message.replace(f"file:{self._path}: ", "")


def find_ffmpeg() -> str | None:
    """Return the ffmpeg on PATH, else the one of the package imageio-ffmpeg, else None."""
    program = shutil.which("ffmpeg")
    if program is None:
        with suppress(ImportError, RuntimeError):
            from imageio_ffmpeg import get_ffmpeg_exe

            program = get_ffmpeg_exe()
    return program
