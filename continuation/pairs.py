"""The evaluated pairs of a split, and the training songs that their continuations are compared with."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from continuation import audio, metrics
from continuation.dataset import Split, read_window
from continuation.windows import Windows, next_other


@dataclass(frozen=True)
class Pair:
    """A context, its target, the true continuation, and other passages to replace the context by.

    All are float32 (channels, samples), with the context at CONTEXT_LEVEL, as in generation.
    """

    number: int  # in the split
    id: str  # of the song, and the second at which the context begins
    song: str
    title: str  # the song's file
    gain: float  # relative to the song's own level
    context: np.ndarray
    target: np.ndarray
    other_song: np.ndarray | None  # None where all songs are the same music
    other_passage: np.ndarray | None  # of the same song; None where the song is too short


class Pairs:
    """The chosen pairs of a split, song by song."""

    def __init__(self, windows: Windows, pairs_per_song: int):
        self.windows = windows
        by_song = [np.flatnonzero(windows.song_of_pair == song) for song in range(len(windows.split.songs))]
        self.chosen = [spread(pairs, pairs_per_song) for pairs in by_song if len(pairs)]
        self.songs = [windows.song(pairs[0]) for pairs in self.chosen]

    def __len__(self) -> int:
        return sum(map(len, self.chosen))

    def of_song(self, position: int) -> Iterator[Pair]:
        """Yield the chosen pairs of a song."""
        other = next_other([song["group"] for song in self.songs], position)
        for i, number in enumerate(self.chosen[position]):
            x, chunk = self.windows.pair(number), self.windows.chunk
            yield Pair(
                number,
                self.id(number),
                self.songs[position]["id"],
                self.songs[position]["source"],
                self.windows.gain(number),
                context=x[:, :chunk],
                target=x[:, chunk:],
                other_song=None if other is None else self.context(self.chosen[other][i % len(self.chosen[other])]),
                other_passage=self.windows.other_passage(number),
            )

    def context(self, number: int) -> np.ndarray:
        """Read the context of a pair."""
        return self.windows.pair(number)[:, : self.windows.chunk]

    def id(self, number: int) -> str:
        return f"{self.windows.song(number)['id']}-{self.windows.start_seconds(number):g}"

    def ids(self) -> list[str]:
        return [self.id(number) for pairs in self.chosen for number in pairs]


def spread(pairs: np.ndarray, count: int) -> list[int]:
    """Choose the middles of `count` equal parts of a song's pairs; all pairs where there are fewer."""
    count = min(count, len(pairs))
    return [int(pairs[(2 * i + 1) * len(pairs) // (2 * count)]) for i in range(count)]


def training_sounds(split: Split, meta: dict) -> Iterator[np.ndarray]:
    """Yield every chunk of a split, extended by the following seconds that a passage beginning in it needs."""
    chunk, more = meta["chunk_samples"], round(metrics.COPY_SECONDS * meta["sample_rate"])
    for song in split.songs:
        for start in range(0, song["rows"] * chunk, chunk):
            length = min(chunk + more, song["rows"] * chunk - start)
            yield audio.from_int16(read_window(split, song, start, length))
