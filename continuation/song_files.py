"""Search for the songs of a folder.

sources, is_complete = find_songs(Path("songs"), skipped_folder=Path("output"))
"""

from __future__ import annotations

import os
import sys
from collections import deque
from pathlib import Path

from continuation import audio, containers

LISTED_NAMES = 10


def find_songs(folder: Path, skipped_folder: Path) -> tuple[list[str], bool]:
    """Return (sources, complete): the relative paths of all audio files, sorted; whether all folders could be read.

    Files without an audio suffix are recognised by their first bytes, and printed. Linked folders are followed after
    all real ones, and each real folder is entered once.
    """
    seen = {os.path.realpath(skipped_folder)}
    folders, links = deque([""]), deque()
    sources, by_content, is_complete = [], [], True
    while folders or links:
        here = folders.popleft() if folders else links.popleft()
        real = os.path.realpath(os.path.join(folder, here))
        if real in seen:
            continue
        seen.add(real)
        try:
            names = sorted(os.listdir(real))
        except OSError as error:
            print(f"warning: folder {here!r} is left out: {error.strerror}", file=sys.stderr)
            is_complete = False
            continue
        for name in names:
            path, source = os.path.join(folder, here, name), f"{here}/{name}".lstrip("/")
            if os.path.isdir(path):
                (links if os.path.islink(path) else folders).append(source)
            elif os.path.splitext(name)[1].lower() in audio.AUDIO_SUFFIXES:
                sources.append(source)
            elif containers.begins_as_audio(path):
                by_content.append(source)
    if by_content:
        shown = ", ".join(repr(source) for source in sorted(by_content)[:LISTED_NAMES])
        more = ", ..." if len(by_content) > LISTED_NAMES else ""
        print(f"audio by content and not by name, read too: {len(by_content)} ({shown}{more})")
    return sorted(sources + by_content), is_complete
