"""Systems play what generate.py plays, from nothing but the context; somebody's files are read or refused."""

import dataclasses
import json
import shutil
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import synth
import torch
from evaluation_helpers import CHUNK, CHUNK_SECONDS, RATE, arguments

import evaluate
from continuation import checkpoint, losses, systems
from continuation.cli import UsageError
from continuation.context import Context
from continuation.dataset import open_dataset
from continuation.fingerprint import Fingerprinter
from continuation.systems import PREDICTIONS, Sampling, System, file_name, load_prediction, play_predictions
from model import GUIDANCE


def test_guidance_1_is_not_evaluated_twice(dataset, checkpoints):
    args = arguments(dataset, checkpoints[:1], "unused", "--guidance", 1)
    (flow,) = evaluate.load_networks(args, open_dataset(dataset)[0])
    assert list(flow.other_samplings()) == ["one step"]


def test_trained_songs_are_told_by_their_content_and_not_by_their_names(tmp_path, checkpoints, dataset, capsys):
    """Two songs of the test side: the first was trained on under another name; the second's name was another's."""
    told = tmp_path / "dataset"
    shutil.copytree(dataset, told)
    meta = json.loads((told / "meta.json").read_text())
    for song in meta["songs"]:
        song |= {"sha256": f"file of {song['id']}", "fingerprint": Fingerprinter(RATE).result()}
    (told / "meta.json").write_text(json.dumps(meta))
    first, second = (song for song in meta["songs"] if song["split"] == "test")
    state = checkpoint.load(checkpoints[0] / "best.pt")
    trained = [first | {"id": "elsewhere", "split": "train"}, second | {"sha256": "another", "split": "train"}]
    (tmp_path / "ck").mkdir()
    checkpoint.save(tmp_path / "ck" / "best.pt", state | {"data_meta": {"songs": trained}})
    network = evaluate.load_networks(arguments(told, [tmp_path / "ck"], "unused"), open_dataset(told)[0])[0]
    assert network.facts([first, second])["songs_trained_on"] == [first["id"]]


def test_damaged_sound_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "a-0.wav").write_bytes(b"no sound")
    pair = SimpleNamespace(id="a-0", target=np.zeros((2, 10)), gain=1.0)
    with pytest.raises(UsageError, match=r"a-0\.wav"):
        play_predictions(System("a", PREDICTIONS, folder=tmp_path), pair, 12000)


def test_gains_in_training_are_those_of_the_first_evaluation_and_of_the_checkpoints_own(tmp_path):
    records = [
        {"stage": stage, "step": step, "val_context_gain": gain, "val_context_gain_same_song": None}
        for stage, step, gain in ((1, 0, 0.9), (1, 5, 0.8), (2, 0, 0.1), (2, 5, 0.2), (2, 10, 0.3))
    ]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"stage": 2, "st')  # torn by a crash
    assert systems.gains_in_training(log, 5) == {"gain_another_song": (0.1, 0.2)}
    assert systems.gains_in_training(log, 7) == {}


def test_prediction_of_three_hours_is_read_as_far_as_it_is_judged(tmp_path):
    path = synth.write(tmp_path / "long.wav", synth.tone(440, CHUNK_SECONDS, RATE, 2), RATE, subtype="PCM_16")
    size = path.stat().st_size - 44 + 3 * 3600 * RATE * 4  # bytes of samples behind the header
    with open(path, "r+b") as file:
        for place, value in ((4, size + 36), (40, size)):
            file.seek(place)
            file.write(value.to_bytes(4, "little"))
        file.truncate(44 + size)
    tracemalloc.start()
    try:
        x = load_prediction(path, RATE, 2, CHUNK)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert x.shape == (2, CHUNK)
    assert np.abs(x).max() == pytest.approx(0.5, abs=1e-3)
    assert peak < 10 * x.nbytes


def test_files_of_a_system_with_a_long_name_have_short_names_of_their_own():
    one, other = (file_name("夜" * 200 + end) for end in ("a", "b"))
    assert one != other
    assert max(len(one.encode()), len(other.encode())) <= systems.LONGEST_FILE_NAME


@pytest.mark.parametrize("name", ["flow", "mse", "legacy"])
def test_continuation_is_what_generate_plays(network, pairs, name):
    judged, pair = network(name), next(pairs.of_song(0))
    with torch.inference_mode():
        context = judged.encode_context(pair.context)
        played = judged.play(pair, context, judged.predict(pair, context, judged.sampling))
        seed = int(judged.rng(pair, 1).integers(2**31))
        whole = judged.model.generate(pair.context, seed=seed, steps=2, guidance=2, with_input=True).numpy()
    np.testing.assert_allclose(np.concatenate([played.context, played.sound], axis=1), whole, atol=1e-5)


@pytest.mark.parametrize("name", ["flow", "mse"])
def test_loss_of_a_pair_is_that_of_the_fixed_times_with_its_own_noise(network, pairs, name):
    judged, pair = network(name), next(pairs.of_song(0))
    with torch.inference_mode():
        encoded = judged.encode_pair(pair)
        model, context = judged.model, Context(judged.model.standardise(encoded["context"]), encoded["outlook"])
        target, tokens = model.standardise(encoded["target"]), model.core(context)
        noise = judged.rng(pair, systems.LOSS_NOISE).standard_normal(target.shape, dtype="float32")
        noise = torch.from_numpy(noise) * (name == "flow")
        times = losses.FIXED_TIMES if name == "flow" else (0.0,)
        errors = [
            model.core.head((1 - time) * noise + time * target, tokens, torch.tensor([time])) - (target - noise)
            for time in times
        ]
        expected = torch.stack(errors).square().mean()
    assert judged.loss(pair, encoded) == pytest.approx(expected.item(), rel=1e-4)


def test_prediction_never_hears_the_target(network, pairs):
    judged, pair = network("flow"), next(pairs.of_song(0))
    other = dataclasses.replace(pair, target=synth.noise(0, CHUNK_SECONDS, RATE, 2))
    with torch.inference_mode():
        first, second = judged.encode_pair(pair), judged.encode_pair(other)
        sampling, played = Sampling(2, GUIDANCE), []
        for each, encoded in ((pair, first), (other, second)):
            context = Context(encoded["context"], encoded["outlook"])
            played.append(judged.play(each, context, judged.predict(each, context, sampling)))
    assert all(torch.equal(first[part], second[part]) for part in ("context", "outlook"))
    assert not torch.equal(first["target"], second["target"])
    assert np.array_equal(played[0].sound, played[1].sound)
    assert played[0].seams == played[1].seams


def test_own_sound_is_what_the_decoder_plays_without_copies(network, pairs):
    judged, pair = network("flow"), next(pairs.of_song(0))
    with torch.inference_mode():
        encoded = judged.encode_pair(pair)
        context, target = Context(encoded["context"], encoded["outlook"]), encoded["target"]
        mixed, own = (judged.play(pair, context, target, with_copies=copies) for copies in (True, False))
        decoded = judged.model.decode(torch.cat([context.latents[..., -100:], target], dim=-1))[0, :, RATE:].numpy()
    np.testing.assert_allclose(own.sound, decoded, atol=1e-6)
    assert not np.allclose(own.sound, mixed.sound, atol=1e-3)
    assert list(own.seams) == []
    assert list(mixed.seams) == judged.model.copies(judged.batch(pair.context)).seams(CHUNK) != []


def test_not_equalised_is_the_mix_that_the_equaliser_filters(network, pairs):
    judged, pair = network("flow"), next(pairs.of_song(0))
    with torch.inference_mode():
        encoded = judged.encode_pair(pair)
        context, target = Context(encoded["context"], encoded["outlook"]), encoded["target"]
        heard, mixed = (judged.play(pair, context, target, equalise=equalise) for equalise in (True, False))
        assert not np.allclose(heard.sound, mixed.sound, atol=1e-3)
        torch.nn.init.zeros_(judged.model.core.equaliser.to_correction.weight)
        torch.nn.init.zeros_(judged.model.core.equaliser.to_correction.bias)
        unchanged = judged.play(pair, context, target)
    np.testing.assert_allclose(unchanged.sound, mixed.sound, atol=1e-6)


def test_gain_of_the_true_context_against_itself_is_zero_and_depends_on_the_context(network, pairs):
    judged, pair = network("flow"), next(pairs.of_song(0))
    with torch.inference_mode():
        own = dataclasses.replace(pair, other_song=pair.context)
        measures = judged.context_gain(own, judged.encode_pair(pair))
    assert measures["gain_another_song"] == 0
    assert measures["gain_same_song"] != 0
