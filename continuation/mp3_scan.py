"""The frames of an mp3, found by their headers without decoding anything.

    scan = mp3_scan.scan_file("song.mp3")
    scan.needs_ffmpeg, scan.notes()

libsndfile cuts some mp3s short without an error: the scan finds which, and what is missing in a file.
"""

from __future__ import annotations

import functools
import mmap
import os
import re
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Mp3Scan:
    """Result of a scan from frame header to frame header."""

    frames: int = 0
    seconds: float = 0.0
    info_headers: int = 0  # Xing, Info or VBRI: one for each file joined into this one
    promised_frames: int = 0  # in the first of them; 0: none
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

        It trusts the first header's number of frames, and without one it assumes the first frame's bit rate for the
        whole file: joined files and headerless VBR end too early. So does a file in which mono follows stereo.
        """
        if self.lead_bytes > self.MAX_LEAD_BYTES or any(size > self.MAX_GAP_BYTES for _, size in self.gaps):
            return True
        if self.channels_change_at is not None:
            return True
        if self.promised_frames:
            return self.info_headers > 1 or self.frames > self.promised_frames + 2
        return len(self.kinds) > 1

    def notes(self) -> list[str]:
        """List what is damaged, missing or unusual, a short phrase each."""
        notes = [f"{size} bytes of garbage at {seconds:.2f} s" for seconds, size in self.gaps[:3]]
        if len(self.gaps) > 3:
            notes.append(f"and in {len(self.gaps) - 3} more places")
        if self.channels_change_at is not None:
            change = "stereo to mono" if self.channels == 2 else "mono to stereo"
            notes.append(f"changes from {change} at {self.channels_change_at:.2f} s")
        if self.promised_frames > self.frames + 2:
            notes.append(cut_note(self.seconds, self.promised_frames * self.frame_seconds))
        elif self.is_cut:
            notes.append(f"cut: the last frame, at {self.seconds:.2f} s, is incomplete")
        return notes


def cut_note(found_seconds: float, promised_seconds: float) -> str:
    """Format the note on a file that ends too early."""
    return f"cut: {found_seconds:.2f} s of {promised_seconds:.2f} s are there"


def scan_file(path: str | os.PathLike) -> Mp3Scan:
    """Scan all frames of an mp3 file, in linear time for any content."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return scan(data)


def scan(data: mmap.mmap) -> Mp3Scan:
    """Scan all frames of a mapped file, as `scan_file` does."""
    found, search = Mp3Scan(), _FrameSearch(data)
    position, end = 0, len(data)
    while position < end:
        if frame := _frame_at(data[position : position + 4]):
            _count_frame(found, frame, data[position : position + 64])
            position += frame.size
            found.is_cut = position > end
        elif tag_bytes := _tag_bytes(data[position : position + 32]):
            position += tag_bytes
        else:
            start, position = position, search.next(position)
            # Bytes before the first frame are no loss, and zeros are padding.
            if not found.frames:
                found.lead_bytes += position - start
            elif data[start:position].strip(b"\0"):
                found.gaps.append((found.seconds, position - start))
    return found


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
LARGEST_FRAME_BYTES = 2881  # MPEG 2.5, layer II, 160 kbit/s at 8 kHz
_INFO_HEADER = re.compile(rb"Xing|Info|VBRI")
_SAME_KIND = 0xFE0C  # of the second and third byte of a header: version, layer and sample rate


@functools.cache
def _frame(second: int, third: int) -> _Frame | None:
    """Return the frame whose header has these bytes after its first, 0xFF; None when they are no header."""
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
    """Return the frame whose header these four bytes are, None when they are no header."""
    return _frame(header[1], header[2]) if len(header) == 4 and header[0] == 0xFF else None


def is_frame_start(data: bytes) -> bool:
    """Return whether these bytes begin with two frames of one kind."""
    return len(_frame_starts(data[: 2 * LARGEST_FRAME_BYTES], 1)) > 0


def _frame_starts(data: bytes, count: int) -> np.ndarray:
    """Return the places, among the first `count`, at which a frame is followed by another of its kind, int64."""
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
    """Return the second and third byte at these places as one number each."""
    return x[places + 1].astype(np.int64) << 8 | x[places + 2]


@functools.cache
def _frame_sizes() -> np.ndarray:
    """Return the bytes of a frame by the second and third byte of its header, (65536,); 0 for no header."""
    frames = (_frame(header >> 8, header & 0xFF) for header in range(1 << 16))
    return np.array([frame.size if frame else 0 for frame in frames])


class _FrameSearch:
    """Search for the next frame after garbage. Every byte is read once, so that the time is linear for any file."""

    WINDOW_BYTES = 1 << 20

    def __init__(self, data: mmap.mmap):
        self._data = data
        self._starts = np.zeros(0, np.int64)  # found in the last window
        self._end = 0  # of that window

    def next(self, position: int) -> int:
        """Return the first position from `position` on at which two frames of one kind follow each other, else the
        end. Positions must not decrease from call to call."""
        while True:
            found = self._starts[np.searchsorted(self._starts, position) :]
            if len(found):
                return int(found[0])
            begin = max(position, self._end)
            if begin >= len(self._data):
                return len(self._data)
            self._end = begin + self.WINDOW_BYTES
            window = self._data[begin : self._end + LARGEST_FRAME_BYTES + 2]
            self._starts = begin + _frame_starts(window, self.WINDOW_BYTES)


def _count_frame(scan: Mp3Scan, frame: _Frame, head: bytes) -> None:
    """Count a frame, or read it when it is an information header."""
    if marker := _INFO_HEADER.search(head, 0, 40):
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
    """Return the size of the ID3v1, ID3v2 or APE tag at the start of these bytes; 0 without one."""
    if head[:3] == b"TAG":
        return 128
    if head[:8] == b"APETAGEX":
        return 32 + int.from_bytes(head[12:16], "little")
    return id3_bytes(head)


def id3_bytes(head: bytes) -> int:
    """Return the size of the ID3v2 tag whose header these first ten bytes of a file are; 0 without one."""
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    has_footer = head[5] & 0x10
    size = 0
    for seven_bits in head[6:10]:
        size = size << 7 | seven_bits & 0x7F
    return size + (20 if has_footer else 10)
