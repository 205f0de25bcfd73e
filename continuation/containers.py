"""Containers of music files, recognised by their bytes before decoding.

    content = containers.inspect("song.mp3")  # Content, or None: no audio

A decoder often reads only a part of a file that it does not support, without an error. So the parts are found here:
the links of a chained Ogg file, files joined into one, and (in mp3_scan.py) every frame of an mp3.
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
from dataclasses import dataclass, field

from continuation import mp3_scan

# Formats that libsndfile reads; the type after 'RIFF' and 'FORM' is checked, since it may be a film or a picture.
_SOUNDFILE_MAGIC = re.compile(
    rb"RIF[FX]....WAVE|(?:RF64|BW64)....WAVE|riff\x2e\x91\xcf\x11|FORM....AIF[FC]|fLaC|OggS|caff|\.snd", re.DOTALL
)
# MP4 (but no HEIF or AVIF picture), ASF, Matroska and WebM; Monkey's Audio, WavPack, True Audio, TAK, Musepack; DSF
# and DSDIFF; DTS in its four encodings; AC-3 and E-AC-3 by the fields after their two bytes.
_FFMPEG_MAGIC = re.compile(
    rb"....ftyp(?!hei|hev|mif|msf|avi)|\x30\x26\xb2\x75|\x1a\x45\xdf\xa3"
    rb"|MAC |wvpk|TTA1|tBaK|MP\+|MPCK"
    rb"|DSD \x1c\0\0\0\0\0\0\0|FRM8.{8}DSD "
    rb"|\x7f\xfe\x80\x01|\xfe\x7f\x01\x80|\x1f\xff\xe8\x00|\xff\x1f\x00\xe8"
    rb"|\x0b\x77(?:..[\x00-\x25\x40-\x65\x80-\xa5][\x00-\x57]|...[\x58-\x87])",
    re.DOTALL,
)
# The length of the samples, in the header of a wav beyond 4 GB; a recorder that crashed left zeros.
_NO_LENGTH = re.compile(rb"(?:RF64|BW64)....WAVEds64.{12}\0{8}", re.DOTALL)
_ADTS_MAGIC = re.compile(rb"\xff[\xf0\xf1\xf8\xf9]")
_HEAD_BYTES = 36


@dataclass
class Content:
    """Properties of a file that decide how it is decoded."""

    needs_ffmpeg: bool  # else libsndfile reads it, or at least a part
    changes_channels: bool = False  # between mono and stereo, within the file
    notes: list[str] = field(default_factory=list)  # what is missing or unusual in an mp3, a short phrase each
    has_no_length: bool = False  # a wav whose header was never finished


def inspect(path: str | os.PathLike) -> Content | None:
    """Inspect a file that is not empty; None when it has no known audio format. Raises OSError."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = mp3_scan.id3_bytes(data[:10])
        head = data[start : start + _HEAD_BYTES]
        if _NO_LENGTH.match(head):
            return Content(needs_ffmpeg=True, has_no_length=True)
        if _FFMPEG_MAGIC.match(head) or _ADTS_MAGIC.match(head):
            return Content(needs_ffmpeg=True)
        if _SOUNDFILE_MAGIC.match(head):
            return Content(needs_ffmpeg=False)
        scan = mp3_scan.scan(data)
    if scan.frames < mp3_scan.Mp3Scan.LEAST_FRAMES:
        return None
    return Content(scan.needs_ffmpeg, scan.channels_change_at is not None, scan.notes())


def begins_as_audio(path: str | os.PathLike) -> bool:
    """Return whether the first bytes of a regular file are those of a known audio format; no error is raised.

    Raw AAC is not recognised: its frames begin with two fixed bytes only.
    """
    try:
        if not os.path.isfile(path):  # opening a pipe would block
            return False
        with open(path, "rb") as file:
            file.seek(mp3_scan.id3_bytes(file.read(10)))
            head = file.read(2 * mp3_scan.LARGEST_FRAME_BYTES)
    except OSError:
        return False
    return bool(_SOUNDFILE_MAGIC.match(head) or _FFMPEG_MAGIC.match(head) or mp3_scan.is_frame_start(head))


# Files joined into one


def joined_parts(path: str | os.PathLike) -> list[tuple[int, int]]:
    """Return (start, end) in bytes of every file that was joined into this one, as by `cat`. Raises OSError.

    Ogg (as a chained stream), FLAC, wav and aiff are split, since a decoder reads the first file only. Joined mp3s
    are one part, a sequence of frames. The file must not be empty.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = mp3_scan.id3_bytes(data[:10])
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
    """Return the page at which each link of a chained Ogg file begins; several streams may begin together."""
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
    """Return where each of several wav or aiff files in a row begins."""
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
