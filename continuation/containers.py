"""What a music file is, told by its bytes before a decoder sees it.

    content = containers.inspect("song.mp3")  # Content, or None: no audio

A decoder that is given the wrong file often reads a part of it without a word. So the parts are looked for
here: the links of a chained Ogg file, files joined into one, and every frame of an mp3.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import re
from dataclasses import dataclass, field

import numpy as np

# What libsndfile reads; after 'RIFF' and 'FORM' the kind is told, which may be a film or a picture.
_SOUNDFILE_MAGIC = re.compile(
    rb"RIF[FX]....WAVE|RF64....WAVE|riff\x2e\x91\xcf\x11|FORM....AIF[FC]|fLaC|OggS|caff|\.snd", re.DOTALL
)
# MP4 (but no HEIF or AVIF picture), ASF, Matroska and WebM, Monkey's Audio, WavPack, True Audio.
_FFMPEG_MAGIC = re.compile(
    rb"....ftyp(?!hei|hev|mif|msf|avi)|\x30\x26\xb2\x75|\x1a\x45\xdf\xa3|MAC |wvpk|TTA1", re.DOTALL
)
_ADTS_MAGIC = re.compile(rb"\xff[\xf0\xf1\xf8\xf9]")
_HEAD_BYTES = 16


@dataclass
class Content:
    """How a file is to be decoded."""

    needs_ffmpeg: bool  # else libsndfile reads it, or at least a part
    changes_channels: bool = False  # between mono and stereo, on the way
    notes: list[str] = field(default_factory=list)  # what is missing or odd in an mp3, a short phrase each


def inspect(path: str | os.PathLike) -> Content | None:
    """What a file that is not empty holds; None when it is of no known audio format. Raises OSError."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = id3_bytes(data[:10])
        head = data[start : start + _HEAD_BYTES]
        if _FFMPEG_MAGIC.match(head) or _ADTS_MAGIC.match(head):
            return Content(needs_ffmpeg=True)
        if _SOUNDFILE_MAGIC.match(head):
            return Content(needs_ffmpeg=False)
        scan = _scan_mp3(data)
    if scan.frames < Mp3Scan.LEAST_FRAMES:
        return None
    return Content(scan.needs_ffmpeg, scan.channels_change_at is not None, scan.notes())


def begins_as_audio(path: str | os.PathLike) -> bool:
    """Whether the first bytes of a regular file are those of a known audio format; no error is raised.

    Raw AAC is not told: two bytes are all that its frames begin with.
    """
    try:
        if not os.path.isfile(path):  # opening a pipe would block for ever
            return False
        with open(path, "rb") as file:
            file.seek(id3_bytes(file.read(10)))
            head = file.read(2 * _LARGEST_FRAME_BYTES)
    except OSError:
        return False
    return bool(_SOUNDFILE_MAGIC.match(head) or _FFMPEG_MAGIC.match(head) or _is_frame_start(head))


# ---------------------------------------------------------------------------------------------------
# Files joined into one


def joined_parts(path: str | os.PathLike) -> list[tuple[int, int]]:
    """(start, end) in bytes of every file that `cat` joined into this one, which is not empty; raises OSError.

    Of Ogg (a chained stream), FLAC, wav and aiff, of which a decoder reads the first alone. Joined mp3s, whose
    frames go on, are one part.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = id3_bytes(data[:10])
        magic = data[start : start + 4]
        if magic == b"OggS":
            starts = _ogg_starts(data, start)
        elif magic == b"fLaC":
            starts = [match.start() for match in re.finditer(rb"fLaC[\x00\x80]\x00\x00\x22", data)]
        elif magic in (b"RIFF", b"RIFX", b"FORM"):
            starts = _chunk_starts(data, start)
        else:
            starts = []
        return list(itertools.pairwise([0, *starts[1:], len(data)]))


def _ogg_starts(data: mmap.mmap, position: int) -> list[int]:
    """The page at which each link of a chained Ogg file begins; of sound and pictures several begin together."""
    starts, was_beginning = [], False
    while (position := data.find(b"OggS", position)) >= 0 and position + 27 <= len(data):
        is_beginning = bool(data[position + 5] & 2)
        if is_beginning and not was_beginning:
            starts.append(position)
        was_beginning = is_beginning
        body = position + 27 + data[position + 26]
        position = body + sum(data[position + 27 : body])
    return starts


def _chunk_starts(data: mmap.mmap, position: int) -> list[int]:
    """Where each of the wav or aiff files begins that stand behind one another."""
    magic = data[position : position + 4]
    order = "little" if magic == b"RIFF" else "big"
    starts = []
    while data[position : position + 4] == magic:
        starts.append(position)
        size = int.from_bytes(data[position + 4 : position + 8], order)
        position += 8 + size
        if data[position : position + 4] != magic:
            position += size & 1  # a byte of padding, which not every writer adds
    return starts


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
    channels: int = 0  # of the first frame
    channels_change_at: float | None = None  # seconds
    lead_bytes: int = 0  # before the first frame, tags left out
    gaps: list[tuple[float, int]] = field(default_factory=list)  # (seconds, bytes that are no frame)
    is_cut: bool = False  # the last frame is incomplete

    # mpg123 gives up after this many bytes of garbage, before the first frame and later.
    MAX_LEAD_BYTES = 65536
    MAX_GAP_BYTES = 1024
    LEAST_FRAMES = 10  # fewer are found in any noise

    @property
    def needs_ffmpeg(self) -> bool:
        """Whether libsndfile would lose a part.

        It believes the first header's count of frames, and where there is none it takes the first
        frame's bit rate for the whole file: joined files and headerless VBR end too early. So does a
        file at the place where mono follows stereo.
        """
        if self.lead_bytes > self.MAX_LEAD_BYTES or any(size > self.MAX_GAP_BYTES for _, size in self.gaps):
            return True
        if self.channels_change_at is not None:
            return True
        if self.promised_frames:
            return self.info_headers > 1 or self.frames > self.promised_frames + 2
        return len(self.kinds) > 1

    def notes(self) -> list[str]:
        notes = [f"{size} bytes of garbage at {seconds:.2f} s" for seconds, size in self.gaps[:3]]
        if len(self.gaps) > 3:
            notes.append(f"and in {len(self.gaps) - 3} more places")
        if self.channels_change_at is not None:
            change = "stereo to mono" if self.channels == 2 else "mono to stereo"
            notes.append(f"changes from {change} at {self.channels_change_at:.2f} s")
        if self.promised_frames > self.frames + 2:
            notes.append(missing(self.seconds, self.promised_frames * self.frame_seconds))
        elif self.is_cut:
            notes.append(f"cut: the last frame, at {self.seconds:.2f} s, is incomplete")
        return notes


def missing(found_seconds: float, promised_seconds: float) -> str:
    """The note on a file that ends too early."""
    return f"cut: {found_seconds:.2f} s of {promised_seconds:.2f} s are there"


def scan_mp3(path: str | os.PathLike) -> Mp3Scan:
    """Walk over all frames of an mp3 file, in a time that grows with its size whatever it holds."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _scan_mp3(data)


def _scan_mp3(data: mmap.mmap) -> Mp3Scan:
    scan, search = Mp3Scan(), _FrameSearch(data)
    position, end = 0, len(data)
    while position < end:
        if frame := _frame_at(data[position : position + 4]):
            _count_frame(scan, frame, data[position : position + 64])
            position += frame.size
            scan.is_cut = position > end
        elif tag_bytes := _tag_bytes(data[position : position + 32]):
            position += tag_bytes
        else:
            start, position = position, search.next(position)
            # What precedes the first frame is no loss, and zeros are padding.
            if not scan.frames:
                scan.lead_bytes += position - start
            elif data[start:position].strip(b"\0"):
                scan.gaps.append((scan.seconds, position - start))
    return scan


@dataclass(frozen=True)
class _Frame:
    """A frame of MPEG 1, 2 or 2.5, layer I, II or III."""

    size: int  # bytes
    sample_rate: int
    bitrate: int  # bit/s
    samples: int


_KBPS = {  # by (is MPEG 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_LARGEST_FRAME_BYTES = 2881  # MPEG 2.5, layer II, 160 kbit/s at 8 kHz
_SAME_KIND = 0xFE0C  # of the second and third byte of a header: version, layer and sample rate


@functools.cache
def _frame(second: int, third: int) -> _Frame | None:
    """The frame whose header has these bytes after its first, 0xFF; None when they are no header."""
    version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)  # version 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    bitrate_index, rate_index, padding = third >> 4, third >> 2 & 3, third >> 1 & 1
    if second < 0xE0 or version == 1 or layer == 4 or bitrate_index in (0, 15) or rate_index == 3:
        return None
    sample_rate = (44100, 48000, 32000)[rate_index] >> {3: 0, 2: 1, 0: 2}[version]
    bitrate = 1000 * _KBPS[version == 3, layer][bitrate_index - 1]
    samples = {1: 384, 2: 1152, 3: 1152 if version == 3 else 576}[layer]
    slot = 4 if layer == 1 else 1  # bytes that a frame is a multiple of
    size = slot * (samples // (8 * slot) * bitrate // sample_rate + padding)
    return _Frame(size, sample_rate, bitrate, samples)


def _frame_at(header: bytes) -> _Frame | None:
    """The frame whose four bytes of header these are, if they are one."""
    return _frame(header[1], header[2]) if len(header) == 4 and header[0] == 0xFF else None


def _is_frame_start(data: bytes) -> bool:
    """Whether two frames of one kind stand at the beginning."""
    return len(_frame_starts(data[: 2 * _LARGEST_FRAME_BYTES], 1)) > 0


def _frame_starts(data: bytes, count: int) -> np.ndarray:
    """The first `count` places, those at which a frame is followed by another of its kind, as int64."""
    x = np.frombuffer(data, np.uint8)
    places = np.flatnonzero((x[:-2] == 0xFF) & (x[1:-1] >= 0xE0))
    places = places[places < count]
    headers = _headers(x, places)
    sizes = _frame_sizes()[headers]
    followers = places + sizes
    is_inside = (sizes > 0) & (followers + 2 < len(x))
    places, headers, followers = places[is_inside], headers[is_inside], followers[is_inside]
    next_headers = _headers(x, followers)
    is_same = (x[followers] == 0xFF) & ((headers ^ next_headers) & _SAME_KIND == 0)
    return places[is_same & (_frame_sizes()[next_headers] > 0)]


def _headers(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The second and third byte at these places as one number each."""
    return x[places + 1].astype(np.int64) << 8 | x[places + 2]


@functools.cache
def _frame_sizes() -> np.ndarray:
    """(65536): bytes of the frame by the second and third byte of its header; 0 for what is no header."""
    frames = (_frame(header >> 8, header & 0xFF) for header in range(1 << 16))
    return np.array([frame.size if frame else 0 for frame in frames])


class _FrameSearch:
    """Finds the next frame behind garbage. Every byte is looked at once, whatever the file holds."""

    WINDOW_BYTES = 1 << 20

    def __init__(self, data: mmap.mmap):
        self._data = data
        self._starts = np.zeros(0, np.int64)  # found in the last window
        self._end = 0  # of that window

    def next(self, position: int) -> int:
        """The first place from `position` on where two frames of one kind follow each other, else the end.

        Positions must not go back from call to call.
        """
        while True:
            found = self._starts[np.searchsorted(self._starts, position) :]
            if len(found):
                return int(found[0])
            begin = max(position, self._end)
            if begin >= len(self._data):
                return len(self._data)
            self._end = begin + self.WINDOW_BYTES
            window = self._data[begin : self._end + _LARGEST_FRAME_BYTES + 2]
            self._starts = begin + _frame_starts(window, self.WINDOW_BYTES)


def _count_frame(scan: Mp3Scan, frame: _Frame, head: bytes) -> None:
    """Add a frame, or, when it is an information header, what it says."""
    if marker := re.search(rb"Xing|Info|VBRI", head[:40]):
        scan.info_headers += 1
        if scan.info_headers == 1 and not scan.frames:
            scan.promised_frames = _promised_by_info(head, marker)
            scan.frame_seconds = frame.samples / frame.sample_rate
        return
    channels = 1 if head[3] >> 6 == 3 else 2
    scan.channels = scan.channels or channels
    if channels != scan.channels and scan.channels_change_at is None:
        scan.channels_change_at = scan.seconds
    scan.frames += 1
    scan.seconds += frame.samples / frame.sample_rate
    scan.kinds.add((frame.sample_rate, frame.bitrate))


def _promised_by_info(head: bytes, marker: re.Match[bytes]) -> int:
    at = marker.start()
    if marker[0] == b"VBRI":
        return int.from_bytes(head[at + 14 : at + 18], "big")
    has_count = head[at + 7] & 1
    return int.from_bytes(head[at + 8 : at + 12], "big") if has_count else 0


def _tag_bytes(head: bytes) -> int:
    """The size of the ID3v1, ID3v2 or APE tag that these bytes open; 0 without one."""
    if head[:3] == b"TAG":
        return 128
    if head[:8] == b"APETAGEX":
        return 32 + int.from_bytes(head[12:16], "little")
    return id3_bytes(head)


def id3_bytes(head: bytes) -> int:
    """The size of the ID3v2 tag that these first ten bytes of a file open; 0 without one."""
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    has_footer = head[5] & 0x10
    size = 0
    for seven_bits in head[6:10]:
        size = size << 7 | seven_bits & 0x7F
    return size + (20 if has_footer else 10)
