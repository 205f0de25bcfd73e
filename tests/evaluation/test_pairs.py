"""The evaluated pairs are spread over their songs, and the training songs are searched without a gap."""

import numpy as np
import pytest
from evaluation_helpers import CHUNK, RATE

from continuation import audio
from continuation.dataset import open_dataset
from continuation.pairs import spread, training_sounds


@pytest.mark.parametrize(
    ("count", "chosen"), [(1, [15]), (2, [12, 18]), (4, [11, 14, 16, 19]), (99, list(range(10, 21)))]
)
def test_pairs_are_spread_over_the_song(count, chosen):
    assert spread(np.arange(10, 21), count) == chosen


def test_pairs_are_those_of_the_dataset_at_the_level_of_the_context(pairs, dataset):
    _, splits = open_dataset(dataset)
    pair = next(pairs.of_song(1))
    rows = splits["test"].pairs[pair.number]
    assert pairs.songs[1]["first_row"] <= rows[0] < rows[1] < pairs.songs[1]["first_row"] + pairs.songs[1]["rows"]
    stored = audio.from_int16(np.concatenate(splits["test"].rows[rows], axis=1))
    gain = 0.1 / np.sqrt(np.mean(stored[:, :CHUNK].astype(np.float64) ** 2))
    np.testing.assert_allclose(np.concatenate([pair.context, pair.target], axis=1), gain * stored, atol=1e-5)


def test_every_passage_of_a_training_song_lies_wholly_in_one_of_the_sounds(dataset):
    meta, splits = open_dataset(dataset)
    song, passage = np.concatenate(splits["train"].rows, axis=1), 2 * RATE
    sounds = list(training_sounds(splits["train"], meta))
    for start in range(0, song.shape[1] - passage + 1, RATE // 2):
        number, offset = divmod(start, CHUNK)
        heard = sounds[number][:, offset : offset + passage]
        np.testing.assert_array_equal(audio.to_int16(heard), song[:, start : start + passage])
