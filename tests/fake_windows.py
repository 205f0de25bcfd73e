"""Windows of a split that is made in memory: songs of a few short rows."""

from __future__ import annotations

import numpy as np

from continuation.dataset import Split
from continuation.windows import Windows

RATE, CHUNK = 100, 1000
SONG_ROWS = (3, 2, 5)
SHAPE = (3, 10)  # of a chunk's latents


def split_of(rows: np.ndarray, song_rows: tuple[int, ...]) -> Split:
    """A split of these rows (rows, channels, samples) and all pairs of its songs."""
    songs, pairs, first = [], [], 0
    for number, count in enumerate(song_rows):
        songs.append({"id": f"song{number}", "first_row": first, "rows": count})
        pairs += [(row, row + 1) for row in range(first, first + count - 1)]
        first += count
    return Split("train", rows, np.array(pairs, np.int64), songs)


def windows_of(rows: np.ndarray, song_rows: tuple[int, ...] = SONG_ROWS, rate: int = RATE) -> Windows:
    """The windows of such a split."""
    return Windows(split_of(rows, song_rows), {"chunk_samples": rows.shape[2], "sample_rate": rate})
