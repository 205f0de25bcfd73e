"""The scorecard says what the measures say: right systems, right values, by song, repeatable; it refuses the rest."""

import csv
import dataclasses
import json
import math
import multiprocessing
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
import synth
import torch

import evaluate
from continuation import audio, baselines, checkpoint, files, kad, losses, metrics, scorecard, signals
from continuation.dataset import open_dataset, read_window
from continuation.fingerprint import Fingerprinter
from continuation.windows import Windows
from model import GUIDANCE, PRESETS, SAMPLING_STEPS, ContinuationModel

PROJECT = Path(evaluate.__file__).parent
RATE, CHUNK_SECONDS = 4000, 10
CHUNK = CHUNK_SECONDS * RATE
SONG_ROWS = (6, 2)  # the last song is too short for another passage
SMALL = dataclasses.replace(
    PRESETS["tiny"], sample_rate=RATE, chunk_samples=CHUNK, encoder_widths=(8, 8), encoder_blocks=(1, 1),
    decoder_widths=(8, 8), decoder_blocks=(1, 1), latent_channels=4, core_layers=1, core_width=16, core_heads=2,
)  # fmt: skip
REAL = ("another song", "same song elsewhere")
MSE = dataclasses.replace(SMALL, objective="mse")
LEGACY = dataclasses.replace(PRESETS["legacy"], sample_rate=RATE, chunk_samples=CHUNK)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_dataset(folder: Path, song_rows=SONG_ROWS) -> Path:
    """A dataset whose test split has these songs; train and val have a short one each."""
    folder.mkdir(parents=True)
    songs = []
    for split, rows in {"train": (2,), "val": (2,), "test": song_rows}.items():
        sounds, pairs, first_row = [], [], 0
        for number, count in enumerate(rows):
            x = audio.to_int16(0.3 * synth.song(number, count * CHUNK_SECONDS, RATE))
            sounds.append(x.reshape(2, count, CHUNK).transpose(1, 0, 2))
            name = f"{split}-{number}"
            songs.append({"id": name, "source": f"{name}.mp3", "split": split, "group": name})
            songs[-1] |= {"first_row": first_row, "rows": count}
            pairs += [(row, row + 1) for row in range(first_row, first_row + count - 1)]
            first_row += count
        np.save(folder / f"{split}.npy", np.concatenate(sounds))
        np.save(folder / f"{split}_pairs.npy", np.array(pairs, np.int64))
    meta = {"format": 1, "kind": "dataset", "sample_rate": RATE, "channels": 2, "chunk_samples": CHUNK}
    (folder / "meta.json").write_text(json.dumps({**meta, "dtype": "int16", "settings": {}, "songs": songs}))
    return folder


def write_checkpoint(folder: Path, config=SMALL, stage=2, trained_on=()) -> Path:
    """A network whose core's output layer is not zero, and whose mixer plays all sources, so that contexts and seeds
    matter."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = ContinuationModel(config)
    if not config.is_legacy:
        torch.nn.init.normal_(model.core.head.to_velocity.weight, std=0.1)
        torch.nn.init.normal_(model.core.from_time[-1].bias, std=0.1)
        torch.nn.init.zeros_(model.decoder.mixer.prior)
    songs = [{"id": name, "split": "train"} for name in trained_on]
    state = {"config": dataclasses.asdict(config), "ema": model.state_dict(), "stage": stage, "step": 5}
    checkpoint.save(folder / "best.pt", {**state, "data_meta": {"songs": songs}})
    return folder


def arguments(dataset, checkpoints, output, *flags):
    line = ["--dataset_folder", dataset, "--checkpoint_folder", *checkpoints, "--output_folder", output]
    return evaluate.parse_args(
        [str(flag) for flag in (*line, "--steps", 2, "--guidance", 2, "--pairs_per_song", 2, *flags)]
    )


def read_card(folder: Path) -> dict:
    return json.loads((folder / "scorecard.json").read_text())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint of every kind, and one that is still in stage 1."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return [
        write_checkpoint(folder / "flow"),
        write_checkpoint(folder / "mse", MSE, trained_on=["test-0"]),
        write_checkpoint(folder / "legacy", LEGACY),
        write_checkpoint(folder / "young", stage=1),
    ]


@pytest.fixture(scope="module")
def scores(dataset, checkpoints, tmp_path_factory):
    """The output folder of a whole evaluation, made once."""
    folder = tmp_path_factory.mktemp("scores") / "scores"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "SHOWN_SONGS", 1)
        patch.setattr(evaluate, "LONG_SONGS", 1)
        assert evaluate.main(arguments(dataset, checkpoints, folder)) == 0
    return folder


@pytest.fixture
def briefly(monkeypatch):
    monkeypatch.setattr(evaluate, "SHOWN_SONGS", 0)
    monkeypatch.setattr(evaluate, "LONG_SONGS", 0)


@pytest.fixture(scope="module")
def card(scores):
    return read_card(scores)


@pytest.fixture(scope="module")
def pairs(dataset):
    meta, splits = open_dataset(dataset)
    return evaluate.Pairs(Windows(splits["test"], meta), 2)


@pytest.fixture
def network(dataset, checkpoints):
    """Load a checkpoint of the fixture by its folder's name."""

    def load(name):
        meta, _ = open_dataset(dataset)
        folder = next(folder for folder in checkpoints if folder.name == name)
        return evaluate.load_networks(arguments(dataset, [folder], "unused"), meta)[0]

    return load


# ---- who is judged ----


def test_checkpoints_are_named_by_preset_and_objective_and_by_folder_where_two_coincide(card):
    assert list(card["checkpoints"]) == ["tiny-flow (flow)", "tiny-mse", "legacy-mse", "tiny-flow (young)"]


def test_folders_of_one_name_are_told_apart_by_their_paths():
    config = {"preset": "tiny", "objective": "flow"}
    names = evaluate.names_of([Path("a/ck"), Path("b/ck"), Path("c")], [config] * 3)
    assert names == ["tiny-flow (a/ck)", "tiny-flow (b/ck)", "tiny-flow (c)"]


def through(network: str) -> list[str]:
    return [f"{name} through {network}" for name in evaluate.REAL_AUDIO]


def test_every_system_has_its_row(card):
    flow = "tiny-flow (flow)"
    assert list(card["figures"]["continuation"]) == [
        *evaluate.WITHOUT_NETWORK,
        flow, f"{flow}, own sound", f"{flow}, guidance 1", f"{flow}, one step", f"{flow}, ceiling", *through(flow),
        "tiny-mse", "tiny-mse, own sound", "tiny-mse, ceiling", *through("tiny-mse"),
        "legacy-mse", "legacy-mse, ceiling", *through("legacy-mse"),
        "truth",
    ]  # fmt: skip
    references = ["noise reference", "smooth reference"]
    assert list(card["figures"]["reconstruction"]) == [*references, *card["checkpoints"]]
    assert list(card["figures"]["context"]) == [flow, "tiny-mse", "legacy-mse"]


def test_guidance_1_is_not_judged_twice():
    args = SimpleNamespace(steps=2, guidance=1.0)
    assert list(evaluate.samplings(SMALL, args)) == ["", ", one step"]


def test_stage_1_checkpoint_is_reconstructed_only_and_that_is_said(checkpoints, tmp_path, capsys, briefly):
    dataset = write_dataset(tmp_path / "dataset", (2,))
    assert evaluate.main(arguments(dataset, checkpoints[3:], tmp_path / "scores")) == 0
    note = "tiny-flow is still in stage 1: its reconstruction only"
    assert capsys.readouterr().out.count(f"note: {note}\n") == 1
    card = read_card(tmp_path / "scores")
    assert card["notes"][:2] == [note, "missing, for want of a checkpoint: tiny-mse, legacy-mse"]
    assert "tiny-flow" in card["figures"]["reconstruction"]
    assert card["figures"]["continuation"] == card["figures"]["context"] == {}
    assert "## Continuation" not in (tmp_path / "scores" / "scorecard.md").read_text()


def test_songs_that_a_checkpoint_was_trained_on_are_told(card):
    assert card["checkpoints"]["tiny-mse"]["songs_trained_on"] == ["test-0"]
    assert "tiny-mse was trained on 1 of these 2 songs: not held out" in card["notes"]


def test_trained_songs_are_told_by_their_content_and_not_by_their_names(tmp_path, checkpoints, dataset, capsys):
    """Two songs of the test split: the first was trained on under another name; the second's name was another's."""
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


def test_a_second_run_in_the_same_folder_is_refused(dataset, checkpoints, tmp_path, capsys):
    (tmp_path / "scores").mkdir()
    running = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "scores",), daemon=True)
    running.start()
    while not (tmp_path / "scores" / "held").exists():
        assert running.is_alive()
        time.sleep(0.02)
    try:
        assert evaluate.main(arguments(dataset, checkpoints[3:], tmp_path / "scores")) == 2
    finally:
        running.kill()
    assert "folder in use: another run is working in" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == [".lock", "held"]


def hold(folder: Path) -> None:
    with files.locked(folder / ".lock"):
        (folder / "held").touch()
        time.sleep(600)


# ---- what they are judged on ----


@pytest.mark.parametrize(
    ("count", "chosen"), [(1, [15]), (2, [12, 18]), (4, [11, 14, 16, 19]), (99, list(range(10, 21)))]
)
def test_pairs_are_spread_over_the_song(count, chosen):
    assert evaluate.spread(np.arange(10, 21), count) == chosen


def test_pairs_are_those_of_the_dataset_at_the_level_of_the_context(pairs, dataset):
    _, splits = open_dataset(dataset)
    pair = next(pairs.of_song(1))
    rows = splits["test"].pairs[pair.number]
    assert pairs.songs[1]["first_row"] <= rows[0] < rows[1] < pairs.songs[1]["first_row"] + pairs.songs[1]["rows"]
    stored = audio.from_int16(np.concatenate(splits["test"].rows[rows], axis=1))
    gain = 0.1 / np.sqrt(np.mean(stored[:, :CHUNK].astype(np.float64) ** 2))
    np.testing.assert_allclose(np.concatenate([pair.context, pair.target], axis=1), gain * stored, atol=1e-5)


def test_networks_are_sampled_as_generate_samples_them():
    flags = ["--dataset_folder", "ds", "--checkpoint_folder", "ck", "--output_folder", "ev"]
    args = evaluate.parse_args(flags)
    assert (args.steps, args.guidance) == (SAMPLING_STEPS, GUIDANCE)


def test_damaged_sound_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "a-0.wav").write_bytes(b"no sound")
    pair = SimpleNamespace(id="a-0", target=np.zeros((2, 10)), gain=1.0)
    with pytest.raises(evaluate.UsageError, match=r"a-0\.wav"):
        evaluate.read_prediction(tmp_path, pair, 12000)


def test_what_a_pair_lacks_is_undefined_and_not_guessed(card):
    elsewhere = card["figures"]["continuation"]["same song elsewhere"]["loudness_db"]["songs"]
    assert list(elsewhere) == ["test-0"]
    gain = card["figures"]["context"]["tiny-mse"]["gain_same_song"]
    assert gain["songs"]["test-1"] is None
    assert isinstance(gain["mean"], float)


def test_memorisation_is_likeness_to_the_training_songs_beyond_the_truths(network, dataset, pairs, tmp_path):
    """Who plays a training song is caught; the truth itself is the zero."""
    meta, splits = open_dataset(dataset)
    judge = evaluate.Judge([network("flow")], {}, RATE, arguments(dataset, ["unused"], tmp_path))
    pair = next(pairs.of_song(1))
    learned = read_window(splits["train"], splits["train"].songs[0], CHUNK - RATE, 2 * RATE)
    for name, sound in {"truth": pair.target, "copyist": audio.from_int16(learned)}.items():
        judge.passages.append((name, pair.song, pair.number, metrics.passages(sound, RATE, 1.0)))
    judge.judge_memory(evaluate.training_sounds(splits["train"], meta))
    ((_, truth),), ((_, copyist),) = (judge.rows["continuation"][name] for name in ("truth", "copyist"))
    assert truth["memorisation"] == 0
    assert copyist["memorisation"] > 0.3
    assert not judge.passages


def test_every_passage_of_a_training_song_lies_wholly_in_one_of_the_sounds(dataset):
    meta, splits = open_dataset(dataset)
    song, passage = np.concatenate(splits["train"].rows, axis=1), 2 * RATE
    sounds = list(evaluate.training_sounds(splits["train"], meta))
    for start in range(0, song.shape[1] - passage + 1, RATE // 2):
        number, offset = divmod(start, CHUNK)
        heard = sounds[number][:, offset : offset + passage]
        np.testing.assert_array_equal(audio.to_int16(heard), song[:, start : start + passage])


def test_continuations_looked_for_in_parts_are_judged_alike(dataset, checkpoints, tmp_path, briefly, monkeypatch):
    for name, at_once in (("whole", evaluate.PASSAGES_AT_ONCE), ("parts", 0)):
        monkeypatch.setattr(evaluate, "PASSAGES_AT_ONCE", at_once)
        assert evaluate.main(arguments(dataset, checkpoints[1:2], tmp_path / name)) == 0
    whole, parts = (read_card(tmp_path / name)["figures"]["continuation"] for name in ("whole", "parts"))
    assert whole["tiny-mse"]["memorisation"]["mean"] == pytest.approx(parts["tiny-mse"]["memorisation"]["mean"])
    assert whole.keys() == parts.keys()


def test_gains_in_training_are_those_of_the_first_evaluation_and_of_the_checkpoints_own(tmp_path):
    records = [
        {"stage": stage, "step": step, "val_context_gain": gain, "val_context_gain_same_song": None}
        for stage, step, gain in ((1, 0, 0.9), (1, 5, 0.8), (2, 0, 0.1), (2, 5, 0.2), (2, 10, 0.3))
    ]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"stage": 2, "st')  # torn by a crash
    assert evaluate.gains_in_training(log, 5) == {"gain_another_song": (0.1, 0.2)}
    assert evaluate.gains_in_training(log, 7) == {}


@pytest.fixture
def somebody(dataset, pairs, tmp_path):
    """Somebody's continuations, who knew the truth: at the songs' own level, named by pair ids."""
    folder = tmp_path / "somebody"
    folder.mkdir()
    for position in range(len(pairs.songs)):
        for pair in pairs.of_song(position):
            soundfile.write(folder / f"{pair.id}.wav", (pair.target / pair.gain).T, RATE, subtype="FLOAT")
    return folder


def test_anybodys_predictions_are_judged_like_the_rest(dataset, checkpoints, somebody, card, tmp_path, briefly):
    args = arguments(dataset, checkpoints[:1], tmp_path / "scores", "--predictions", f"perfect={somebody}")
    assert evaluate.main(args) == 0
    systems = read_card(tmp_path / "scores")["figures"]["continuation"]
    for measure in ("loudness_db", "chroma_cosine", "copy_index_above_truth"):
        assert systems["perfect"][measure]["mean"] == pytest.approx(systems["truth"][measure]["mean"], abs=1e-3)
    assert sorted(card["pair_ids"]) == sorted(path.stem for path in somebody.iterdir())


@pytest.mark.parametrize("name", ["truth", "another song", "tiny-flow", "mine, ceiling", "mine", "another-song"])
def test_predictions_under_the_name_of_another_system_are_refused(
    dataset, checkpoints, somebody, tmp_path, capsys, name
):
    more = ("--predictions", f"mine={somebody}", "--predictions", f"{name}={somebody}")
    assert evaluate.main(arguments(dataset, checkpoints[:1], tmp_path / "scores", *more)) == 2
    assert f"--predictions {name}={somebody}: the name is taken" in capsys.readouterr().err


def test_missing_and_short_predictions_are_refused(dataset, checkpoints, somebody, tmp_path, capsys):
    args = arguments(dataset, checkpoints[:1], tmp_path / "scores", "--predictions", f"somebody={somebody}")
    last = sorted(somebody.iterdir())[-1]
    soundfile.write(last, np.zeros((100, 2)), RATE)
    assert evaluate.main(args) == 2
    assert f"{last} is too short" in capsys.readouterr().err
    last.unlink()
    assert evaluate.main(args) == 2
    assert f"{last} is missing" in capsys.readouterr().err


def test_prediction_with_a_sample_that_is_no_number_is_refused_before_any_work(
    dataset, checkpoints, somebody, tmp_path, capsys
):
    last = sorted(somebody.iterdir())[-1]
    x, _ = soundfile.read(last)
    x[7, 0] = math.nan
    soundfile.write(last, x, RATE, subtype="FLOAT")
    args = arguments(dataset, checkpoints[:1], tmp_path / "scores", "--predictions", f"somebody={somebody}")
    assert evaluate.main(args) == 2
    assert f"error: {last} cannot be judged as it is: 1 non-finite samples" in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()


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
        x = evaluate.load_prediction(path, RATE, 2, CHUNK)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert x.shape == (2, CHUNK)
    assert np.abs(x).max() == pytest.approx(0.5, abs=1e-3)
    assert peak < 10 * x.nbytes


@pytest.mark.parametrize("name", ["!!!", "..", "-", "\n", "\udcff", "_"])
def test_name_that_no_file_can_bear_is_wrong_usage(dataset, checkpoints, name):
    with pytest.raises(SystemExit) as caught:
        arguments(dataset, checkpoints, "scores", "--predictions", f"{name}=somewhere")
    assert caught.value.code == 2


def test_files_of_a_system_with_a_long_name_have_short_names_of_their_own():
    one, other = (evaluate.file_name("夜" * 200 + end) for end in ("a", "b"))
    assert one != other
    assert max(len(one.encode()), len(other.encode())) <= evaluate.LONGEST_FILE_NAME


# ---- what a network does ----


@pytest.mark.parametrize("name", ["flow", "mse", "legacy"])
def test_continuation_is_what_generate_plays(network, pairs, name):
    judged, pair = network(name), next(pairs.of_song(0))
    with torch.inference_mode():
        context, _ = judged.latents(pair)
        played = judged.play(pair, context, judged.predict(pair, context, judged.samplings[""]))
        seed = int(judged.draw(pair, 1).integers(2**31))
        whole = judged.model.generate(pair.context, seed=seed, steps=2, guidance=2, with_input=True).numpy()
    np.testing.assert_allclose(np.concatenate([played.context, played.sound], axis=1), whole, atol=1e-5)


@pytest.mark.parametrize("name", ["flow", "mse"])
def test_fixed_losses_are_the_squared_error_of_the_velocity(network, pairs, name):
    judged, pair = network(name), next(pairs.of_song(0))
    with torch.inference_mode():
        context, target = judged.latents(pair)
        noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
        found = losses.fixed_time_losses(judged.model, context, target, noise)
        context, target = judged.model.standardise(context), judged.model.standardise(target)
        noise = noise if name == "flow" else torch.zeros_like(noise)
        expected = []
        for time in losses.FIXED_TIMES if name == "flow" else (0.0,):
            velocity = judged.model.core((1 - time) * noise + time * target, context, torch.tensor([time]))
            expected.append((velocity - (target - noise)).square().mean())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_prediction_never_hears_the_target(network, pairs):
    judged, pair = network("flow"), next(pairs.of_song(0))
    other = dataclasses.replace(pair, target=synth.noise(0, CHUNK_SECONDS, RATE, 2))
    with torch.inference_mode():
        (context, target), (same, changed) = judged.latents(pair), judged.latents(other)
        played = [judged.play(each, context, judged.predict(each, context, {"steps": 2})) for each in (pair, other)]
    assert torch.equal(context, same)
    assert not torch.equal(target, changed)
    assert np.array_equal(played[0].sound, played[1].sound)
    assert played[0].seams == played[1].seams


def test_own_sound_is_what_the_decoder_plays_without_copies(network, pairs):
    judged, pair = network("flow"), next(pairs.of_song(0))
    with torch.inference_mode():
        context, target = judged.latents(pair)
        mixed, own = (judged.play(pair, context, target, with_copies=copies) for copies in (True, False))
        join = judged.model.parts(context)[0][..., -100:]
        decoded = judged.model.decode(torch.cat([join, target], dim=-1))[0, :, RATE:].numpy()
    np.testing.assert_allclose(own.sound, decoded, atol=1e-6)
    assert not np.allclose(own.sound, mixed.sound, atol=1e-3)
    assert list(own.seams) == []
    assert list(mixed.seams) == judged.model.copies(judged.batch(pair.context)).seams(CHUNK) != []


def test_gain_of_the_true_context_against_itself_is_zero_and_depends_on_the_context(network, pairs):
    judged, pair = network("flow"), next(pairs.of_song(0))
    with torch.inference_mode():
        measures = judged.context_gain(dataclasses.replace(pair, another=pair.context), *judged.latents(pair))
    assert measures["gain_another_song"] == 0
    assert measures["gain_same_song"] != 0


def test_output_that_is_not_finite_is_a_failure(dataset, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ContinuationModel, "decode", lambda self, z, *_, **__: torch.full((1, 2, CHUNK), math.nan))
    assert evaluate.main(arguments(dataset, checkpoints[:1], tmp_path / "scores")) == 1
    assert "error: tiny-flow: the network's output is not finite" in capsys.readouterr().err
    assert not (tmp_path / "scores" / "scorecard.json").exists()


# ---- what the scorecard says ----


def test_truth_is_neutral_and_silence_has_no_notes(card):
    systems = card["figures"]["continuation"]
    assert systems["truth"]["loudness_db"]["mean"] == systems["truth"]["comb_300_db"]["mean"] == 0
    assert systems["truth"]["chroma_cosine"]["mean"] == pytest.approx(1)
    assert systems["silence"]["loudness_db"]["mean"] == -100
    assert systems["silence"]["chroma_cosine"] == {
        "mean": None, "low": None, "high": None, "songs": {"test-0": None, "test-1": None},
    }  # fmt: skip


def test_network_that_says_the_mean_has_still_latents_less_than_the_flow(card):
    systems = card["figures"]["continuation"]
    ratios = {name: systems[name]["latent_std_ratio_median"]["mean"] for name in ("tiny-mse", "tiny-flow (flow)")}
    assert 0 < ratios["tiny-mse"] < ratios["tiny-flow (flow)"]
    assert "latent_std_ratio_median" not in systems["tiny-mse, ceiling"]


def test_latents_of_real_audio_say_how_much_their_spread_varies_by_itself(card):
    systems = card["figures"]["continuation"]
    worst = {name: systems[f"{name} through tiny-mse"]["latent_std_ratio_worst_decile"] for name in REAL}
    assert all(figure["mean"] > 1 for figure in worst.values())
    assert list(worst["same song elsewhere"]["songs"]) == ["test-0"]


def test_figures_are_means_over_songs_of_means_over_their_pairs(card, pairs):
    by_song = {}
    for position, song in enumerate(pairs.songs):
        chosen = list(pairs.of_song(position))
        by_song[song["id"]] = np.mean([metrics.chroma_cosine(p.target, p.context, RATE) for p in chosen])
    figure = card["figures"]["continuation"]["input repeated"]["chroma_cosine"]
    assert figure["songs"] == pytest.approx(by_song)
    assert [figure[key] for key in ("mean", "low", "high")] == pytest.approx(
        metrics.bootstrap_interval(by_song.values(), 0)
    )


def test_context_gain_is_how_much_worse_another_context_makes_it_by_song(card, network, pairs):
    judged, gains, songs = network("flow"), [], []
    with torch.inference_mode():
        for position in range(len(pairs.songs)):
            for pair in pairs.of_song(position):
                context, target = judged.latents(pair)
                own, other = (judged.loss(pair, heard, target) for heard in (context, judged.hear(pair.another)))
                gains.append(other - own)
                songs.append(pair.song)
    figure = card["figures"]["context"]["tiny-flow (flow)"]["gain_another_song"]
    expected = metrics.bootstrap_interval(metrics.per_song(gains, songs).values(), 0)
    assert [figure[key] for key in ("mean", "low", "high")] == pytest.approx(expected)


def test_kernel_distance_is_judged_where_its_weights_are_and_else_named_as_missing(card):
    if kad.find_weights() is None:
        assert card["kernel_audio_distance"] == {}
        assert any("musicnn" in note for note in card["notes"])
    else:
        assert card["kernel_audio_distance"]["tiny-mse"]["mean"] > card["kernel_audio_distance"]["truth"]["mean"]
        assert "silence" not in card["kernel_audio_distance"]


def test_kernel_distance_by_mel_statistics_is_always_judged(card):
    distances = card["kernel_audio_distance_mel"]
    assert set(distances) == set(card["figures"]["continuation"]) - {"silence"}
    assert distances["truth"]["mean"] < distances["tiny-mse"]["mean"]
    assert distances["truth"]["without_song"].keys() == card["songs"].keys()


def test_halves_are_the_songs_that_repeat_themselves_least_and_most(dataset, checkpoints, network, tmp_path):
    judge = evaluate.Judge([network("flow")], {}, RATE, arguments(dataset, checkpoints, tmp_path))
    judge.correlations = {"a": [0.9, 0.7], "b": [0.1, 0.2], "c": [0.6], "d": [0.5], "e": [0.4, 0.7]}
    assert judge.halves() == {"repeats least": ["b", "d", "e"], "repeats most": ["c", "a"]}


def test_every_song_is_in_one_half_with_its_own_kernel_distances(card, pairs):
    halves = card["halves"]
    assert sorted(song for half in halves.values() for song in half["songs"]) == sorted(card["songs"])
    exact = {
        song["id"]: np.mean([baselines.loop(pair.context, RATE).correlation for pair in pairs.of_song(position)])
        for position, song in enumerate(pairs.songs)
    }
    (least,), (most,) = (halves[half]["songs"] for half in evaluate.HALVES)
    assert exact[least] < exact[most]
    for half in halves.values():
        (song,) = half["songs"]
        systems = card["figures"]["continuation"].items()
        sounding = {name for name, figures in systems if song in figures["loudness_db"]["songs"]} - {"silence"}
        assert half["kernel_audio_distance_mel"].keys() == sounding
        if kad.find_weights():
            assert half["kernel_audio_distance"].keys() == sounding


def test_seams_are_judged_where_copies_are_played_and_nowhere_else(card):
    systems = card["figures"]["continuation"]
    clicks = {name: figures["seam_click_percentile"]["mean"] for name, figures in systems.items()}
    with_seams = {name for name, value in clicks.items() if value is not None}
    flow = "tiny-flow (flow)"
    assert with_seams == {"loop", flow, f"{flow}, guidance 1", f"{flow}, one step", "tiny-mse"}


def test_long_continuation_is_what_generate_plays_in_blocks_of_a_chunk(network, dataset, pairs, tmp_path):
    judged, pair = network("flow"), next(pairs.of_song(0))
    judge = evaluate.Judge([judged], {}, RATE, arguments(dataset, ["unused"], tmp_path))
    with torch.inference_mode():
        judge.continue_long(pair)
        ((kept, blocks),) = judge.long["tiny-flow"]
        seed = int(judged.draw(pair, 1).integers(2**31))
        whole = judged.model.generate(pair.context, 6 * CHUNK_SECONDS, seed=seed, steps=2, guidance=2).numpy()
    assert kept is pair
    assert [block.shape for block in blocks] == [(2, CHUNK)] * 6
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), whole)


def test_blocks_of_a_long_continuation_are_judged_one_by_one(network, dataset, pairs, tmp_path):
    """Of one that fades by 6 dB a block, in two songs."""
    fading = SimpleNamespace(
        name="fading", continues=True, config=SMALL, comb_rates=lambda: (100, 100),
        generate=lambda pair, seconds: np.concatenate([0.5**i * pair.context for i in range(6)], axis=1),
    )  # fmt: skip
    judge = evaluate.Judge([fading], {}, RATE, arguments(dataset, ["unused"], tmp_path))
    for position in range(len(pairs.songs)):
        judge.continue_long(next(pairs.of_song(position)))
    blocks = judge.judge_long()["fading"]
    assert [block["loudness_db"] for block in blocks] == pytest.approx([-6.0206 * i for i in range(6)], abs=1e-3)
    assert [block["energy_400_1000_db"] for block in blocks] == pytest.approx(
        [-6.0206 * i for i in range(6)], abs=1e-2
    )
    assert [block["chroma_cosine"] for block in blocks] == pytest.approx([1.0] * 6)
    distances = [block["kernel_audio_distance_mel"] for block in blocks]
    assert distances[0] < distances[-1]


def test_every_network_that_continues_has_its_long_blocks(card):
    assert list(card["long"]) == ["tiny-flow (flow)", "tiny-mse", "legacy-mse"]
    assert all(len(blocks) == evaluate.LONG_BLOCKS for blocks in card["long"].values())


def test_gates_are_those_of_the_flows_and_open_where_one_does_not_continue_yet(card, scores):
    assert {gate["network"] for gate in card["gates"]} == {"tiny-flow (flow)", "tiny-flow (young)"}
    young = [gate for gate in card["gates"] if gate["network"] == "tiny-flow (young)"]
    assert {gate["met"] for gate in young if not gate["demand"].startswith("reconstruction")} == {None}
    text = (scores / "scorecard.md").read_text()
    assert all(f"| {gate['demand']} |" in text for gate in card["gates"])


def test_markdown_has_tables_of_likeness_of_both_halves_and_of_long_continuations(scores, card):
    sections = dict(
        part.split("\n", 1) for part in (scores / "scorecard.md").read_text().split("\n## ") if "\n" in part
    )
    for name in card["kernel_audio_distance_mel"]:
        assert f"| {name} |" in sections["Likeness to real music"]
    for half in evaluate.HALVES:
        assert f"The 1 songs whose input {half}:" in sections["By half"]
    for name in card["figures"]["continuation"]:
        assert sections["By half"].count(f"| {name} |") == 2
    for name in card["long"]:
        assert sections["Long continuations"].count(f"| {name} |") == evaluate.LONG_BLOCKS
        assert f"| {name} | 50-60 s |" in sections["Long continuations"]


def test_undefined_figures_are_null_in_the_json_wherever_they_are():
    card = {"long": {"a": [{"loudness_db": math.nan}]}, "ranks": {"a": {"mean": math.inf}}, "pair": (1.0, math.nan)}
    assert json.loads(scorecard.as_json(card)) == {
        "long": {"a": [{"loudness_db": None}]}, "ranks": {"a": {"mean": None}}, "pair": [1.0, None]
    }  # fmt: skip


def test_hum_is_the_multiple_that_stands_highest_over_all_songs():
    frequencies = np.array([200.0, 300.0, 400.0])
    songs = {"a": [np.array([9.0, 5.0, 0.0]), np.array([1.0, 5.0, 0.0])], "b": [np.array([0.0, 6.0, 0.0])]}
    assert evaluate.worst_hum(frequencies, songs) == {"hz": 300, "db": 5.5}


def test_every_network_has_its_hum_and_silence_has_none(card):
    assert set(card["hum"]["reconstruction"]) == set(card["figures"]["reconstruction"])
    assert set(card["hum"]["continuation"]) == set(card["figures"]["continuation"]) - {"silence"}
    assert card["hum"]["continuation"]["truth"]["db"] == 0


def test_ranks_go_from_another_song_to_the_ceiling_where_these_differ():
    songs = {"a": 1.0, "b": 1.1, "c": 0.9}

    def system(chroma, loudness):
        values = {"chroma_cosine": chroma, "loudness_db": loudness}
        return {name: {"songs": {song: value * x for song, x in songs.items()}} for name, value in values.items()}

    figures = {"another song": system(0.2, 0.0), "tiny": system(0.5, 1.0), "tiny, ceiling": system(0.8, 0.0)}
    found = evaluate.rank(figures | {"truth": system(1.0, 0.0)}, seed=0)
    assert found["tiny"]["chroma_cosine"]["mean"] == pytest.approx(0.5)
    assert list(found["tiny"]) == ["chroma_cosine"]  # real audio is as loud as the ceiling: nothing to rank


def test_csv_holds_the_figures_of_the_json(scores, card):
    rows = list(csv.DictReader((scores / "scorecard.csv").read_text().splitlines()))
    assert len(rows) == sum(len(figures) for section in card["figures"].values() for figures in section.values())
    for row in rows:
        figure = card["figures"][row["section"]][row["system"]][row["measure"]]
        assert row["mean"] == ("" if figure["mean"] is None else repr(figure["mean"]))
        assert int(row["songs"]) == sum(value is not None for value in figure["songs"].values())


def test_markdown_names_every_system_and_every_measure(scores, card):
    text = (scores / "scorecard.md").read_text()
    for section, systems in card["figures"].items():
        assert f"## {section.capitalize()}\n" in text
        for system, figures in systems.items():
            assert f"| {system} |" in text
            assert all(f"| `{measure}` |" in text for measure in figures)
    widths = {line.count("|") for line in text.split("\n\n")[-1].splitlines() if line}
    assert widths == {2 + len(card["figures"]["context"])}


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        ({"mean": 1.23456, "low": 1.0, "high": 2.5, "songs": {"a": 1.0, "b": 1.4}}, "1.23 [1, 2.5]"),
        ({"mean": 3200.0, "low": 3200.0, "high": 3200.0, "songs": {"a": 3200.0, "b": 3200.0}}, "3200"),
        ({"mean": 0.5, "low": math.nan, "high": math.nan, "songs": {"a": 0.5, "b": math.nan}}, "0.5 [-, -], n 1"),
        ({"mean": math.nan, "low": math.nan, "high": math.nan, "songs": {"a": math.nan, "b": math.nan}}, "-"),
        (None, "-"),
    ],
)
def test_cell_shows_interval_and_missing_songs(figure, text):
    assert scorecard.cell(figure, 2) == text


HOSTILE = "a|b\n<script>\x1b[2J[x](http://x)\\|\udcff"
FIGURE = {"mean": 0.5, "low": 0.5, "high": 0.5, "songs": {"a": 0.5}}


def test_name_stays_in_its_cell_of_a_table_as_text():
    (_, _, row) = scorecard.table(["system", "loss"], [[HOSTILE, "1"]])
    assert row == r"| a\|b\\n\<script>\\x1b[2J[x]\(http://x)\\\|\\udcff | 1 |"


@pytest.mark.parametrize("first", "=+-@")
def test_csv_holds_no_formula(first):
    name = f'{first}HYPERLINK("x")'
    _, row = csv.reader(scorecard.as_csv({"context": {name: {"loss": FIGURE}}}).splitlines())
    assert row[1] == f"'{name}"


def test_csv_holds_a_name_on_one_line():
    _, row = csv.reader(scorecard.as_csv({"context": {"\tb\n\udcff": {"loss": FIGURE}}}).splitlines())
    assert row[1] == r"\tb\n\udcff"


def test_checkpoint_folders_of_any_name_are_judged(checkpoints, tmp_path, capsys, briefly):
    dataset, names = write_dataset(tmp_path / "dataset", (2,)), ("<!--|\n\x1b=\udcff", "b" * 120)
    folders = [Path(shutil.copytree(checkpoints[3], tmp_path / name)) for name in names]
    assert evaluate.main(arguments(dataset, folders, tmp_path / "scores")) == 0
    printed = "".join(capsys.readouterr())
    assert "\x1b" not in printed and r"tiny-flow (<!--|\n\x1b=\udcff) is still in stage 1" in printed
    assert all(name in read_card(tmp_path / "scores")["figures"]["reconstruction"]
               for name in (f"tiny-flow ({folder.name})" for folder in folders))  # fmt: skip
    lines = (tmp_path / "scores" / "scorecard.md").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith(r"| tiny-flow (\<!--\|\\n\\x1b=\\udcff) |") for line in lines)


def test_pictures_and_sounds_of_the_first_songs_are_written(scores, card):
    pictures = {path.name for path in (scores / "pictures").glob("*.png")}
    assert pictures == {"test-0-reconstruction.png", "test-0-continuation.png"}
    sounds = {path.stem for path in (scores / "sounds" / "test-0").iterdir()}
    assert sounds == {evaluate.file_name(system) for system in card["figures"]["continuation"]}
    x, rate = soundfile.read(scores / "sounds" / "test-0" / "truth.wav")  # mp3 knows no 4 kHz
    assert rate == RATE and len(x) == 2 * CHUNK


def test_listening_page_plays_every_continuation_with_its_picture(scores, card):
    page = (scores / "listen.html").read_text(encoding="utf-8")
    (song,) = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    assert song["title"] == "test-0.mp3"  # the file, not the id made of it
    assert [system["name"] for system in song["systems"]] == list(card["figures"]["continuation"])
    for system in song["systems"]:
        for kind in ("sound", "picture"):
            assert (scores / unquote(system[kind])).is_file()


def test_same_command_gives_the_same_scorecard_bit_for_bit(checkpoints, tmp_path, briefly):
    dataset = write_dataset(tmp_path / "dataset", (2, 2))
    for name in ("a", "b"):
        assert evaluate.main(arguments(dataset, checkpoints[:1], tmp_path / name)) == 0
    for suffix in ("json", "csv", "md"):
        one, other = (tmp_path / name / f"scorecard.{suffix}" for name in ("a", "b"))
        assert one.read_bytes() == other.read_bytes()


# ---- what is refused ----


@pytest.fixture
def refuses(dataset, checkpoints, tmp_path, capsys):
    """Run, expect exit code 2 and one line on stderr, and no output folder: that line."""

    def run(*flags, folders=checkpoints[:1], source=dataset):
        assert evaluate.main(arguments(source, folders, tmp_path / "scores", *flags)) == 2
        assert not (tmp_path / "scores").exists()
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    return run


def test_missing_checkpoint_is_refused(refuses, tmp_path):
    assert f"there is no checkpoint {tmp_path / 'none' / 'best.pt'}" in refuses(folders=[tmp_path / "none"])


def test_missing_dataset_is_refused(refuses, tmp_path):
    assert "create_dataset.py has not finished" in refuses(source=tmp_path / "none")


def test_checkpoint_of_another_sample_rate_is_refused(refuses, tmp_path):
    folder = write_checkpoint(tmp_path / "ck", dataclasses.replace(SMALL, sample_rate=8000, chunk_samples=80000))
    assert f"{folder} was trained at 8000 Hz, and the dataset has 4000 Hz" in refuses(folders=[folder])


def test_mono_checkpoint_is_refused_for_a_stereo_dataset(refuses, tmp_path):
    folder = write_checkpoint(tmp_path / "ck", dataclasses.replace(SMALL, channels=1))
    assert "was trained at 1 channels, and the dataset has 2 channels" in refuses(folders=[folder])


@pytest.mark.parametrize("id", ["../../outside", "/outside", "a\n"])
def test_dataset_whose_ids_lead_outside_is_refused(refuses, tmp_path, id):
    folder = write_dataset(tmp_path / "dataset")
    meta = json.loads((folder / "meta.json").read_text())
    meta["songs"][-1]["id"] = id
    (folder / "meta.json").write_text(json.dumps(meta))
    assert f"meta.json is damaged: id {id!r}" in refuses(source=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset"]


def test_output_folder_in_whose_place_a_file_is_is_refused(dataset, checkpoints, tmp_path, capsys):
    (tmp_path / "scores").touch()
    for folder in (tmp_path / "scores", tmp_path / "scores" / "below"):
        assert evaluate.main(arguments(dataset, checkpoints[:1], folder)) == 2
        error = capsys.readouterr().err
        assert error == f"error: --output_folder: a file is in the place of the folder {folder}, or of one above it\n"


def test_same_folder_twice_is_refused(refuses, checkpoints):
    assert "names the same folder twice" in refuses(folders=[checkpoints[0], checkpoints[0]])


@pytest.mark.parametrize(
    "flags", [("--split", "trial"), ("--pairs_per_song", 0), ("--steps", 0), ("--seed", -1), ("--guidance", "nan")]
)
def test_wrong_flag_is_wrong_usage(dataset, checkpoints, flags):
    with pytest.raises(SystemExit) as caught:
        arguments(dataset, checkpoints, "scores", *flags)
    assert caught.value.code == 2


def test_stop_signal_ends_it_with_the_code_for_run_me_again(dataset, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signals.StopSignals, "requested", True)
    assert evaluate.main(arguments(dataset, checkpoints[:1], tmp_path / "scores")) == 75
    assert "run the same command again" in capsys.readouterr().err


def test_command_line_reports_its_exit_code_in_one_line(tmp_path, checkpoints):
    flags = [
        "--dataset_folder",
        tmp_path / "none",
        "--checkpoint_folder",
        checkpoints[0],
        "--output_folder",
        tmp_path,
    ]
    done = subprocess.run([sys.executable, "evaluate.py", *flags], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
