"""The evaluator finds what is put into continuations: learned songs, fading, hum."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_helpers import CHUNK, CHUNK_SECONDS, FORMAT, RATE
from small_networks import small_config

from continuation import audio, metrics
from continuation.dataset import open_dataset, read_window
from continuation.evaluator import Evaluator, worst_hum
from continuation.pairs import training_sounds


def test_memorisation_is_likeness_to_the_training_songs_beyond_the_truths(network, dataset, pairs, tmp_path):
    """Who plays a training song is caught; the truth itself is the zero."""
    meta, splits = open_dataset(dataset)
    evaluator = Evaluator([network("flow")], [], RATE, seed=0)
    pair = next(pairs.of_song(1))
    learned = read_window(splits["train"], splits["train"].songs[0], CHUNK - RATE, 2 * RATE)
    for name, sound in {"truth": pair.target, "copyist": audio.from_int16(learned)}.items():
        evaluator.passages.append((name, pair.song, pair.number, metrics.passages(sound, RATE, 1.0)))
    evaluator.measure_memorisation(training_sounds(splits["train"], meta))
    ((_, truth),), ((_, copyist),) = (evaluator.rows["continuation"][name] for name in ("truth", "copyist"))
    assert truth["memorisation"] == 0
    assert copyist["memorisation"] > 0.3
    assert not evaluator.passages


def test_halves_are_the_songs_that_repeat_themselves_least_and_most(dataset, checkpoints, network, tmp_path):
    evaluator = Evaluator([network("flow")], [], RATE, seed=0)
    evaluator.correlations = {"a": [0.9, 0.7], "b": [0.1, 0.2], "c": [0.6], "d": [0.5], "e": [0.4, 0.7]}
    assert evaluator.halves() == {"repeats least": ["b", "d", "e"], "repeats most": ["c", "a"]}


@pytest.mark.slow
def test_long_continuation_is_what_generate_plays_in_blocks_of_a_chunk(network, dataset, pairs, tmp_path):
    judged, pair = network("flow"), next(pairs.of_song(0))
    evaluator = Evaluator([judged], [], RATE, seed=0)
    with torch.inference_mode():
        evaluator.continue_long(pair)
        ((kept, blocks),) = evaluator.long["tiny-flow"]
        seed = int(judged.rng(pair, 1).integers(2**31))
        whole = judged.model.generate(pair.context, 6 * CHUNK_SECONDS, seed=seed, steps=2, guidance=2).numpy()
    assert kept is pair
    assert [block.shape for block in blocks] == [(2, CHUNK)] * 6
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), whole)


@pytest.mark.slow
def test_blocks_of_a_long_continuation_are_judged_one_by_one(network, dataset, pairs, tmp_path):
    """Of one that fades by 6 dB a block, in two songs."""
    fading = SimpleNamespace(
        name="fading", continues=True, config=small_config(**FORMAT), comb_rates=lambda: (100, 100),
        generate=lambda pair, seconds: np.concatenate([0.5**i * pair.context for i in range(6)], axis=1),
    )  # fmt: skip
    evaluator = Evaluator([fading], [], RATE, seed=0)
    for position in range(len(pairs.songs)):
        evaluator.continue_long(next(pairs.of_song(position)))
    blocks = evaluator.long_measures()["fading"]
    assert [block["loudness_db"] for block in blocks] == pytest.approx([-6.0206 * i for i in range(6)], abs=1e-3)
    assert [block["energy_400_1000_db"] for block in blocks] == pytest.approx(
        [-6.0206 * i for i in range(6)], abs=1e-2
    )
    assert [block["chroma_cosine"] for block in blocks] == pytest.approx([1.0] * 6)
    distances = [block["kernel_audio_distance_mel"] for block in blocks]
    assert distances[0] < distances[-1]


def test_hum_is_the_multiple_that_stands_highest_over_all_songs():
    frequencies = np.array([200.0, 300.0, 400.0])
    songs = {"a": [np.array([9.0, 5.0, 0.0]), np.array([1.0, 5.0, 0.0])], "b": [np.array([0.0, 6.0, 0.0])]}
    assert worst_hum(frequencies, songs) == {"hz": 300, "db": 5.5}
