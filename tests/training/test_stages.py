"""A phase moves what it should, steps do what is documented, both stages can learn a batch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny import CHANNELS, LEGACY, RATE, NotStopped, assert_same_tensors, moved, snapshot

import train
from continuation import checkpoint, distributed, losses, muon, stages, training_state
from model import ContinuationModel

# Phases


def parts_of(model: ContinuationModel) -> tuple:
    """Encoder, core and decoder."""
    return model.encoder, model.core, model.decoder


def test_frozen_parameters_do_not_move_in_2a_and_do_move_in_2b(new_run):
    run = new_run()
    run.state.begin_stage(2)
    run.fill_cache(NotStopped)
    predict, joint = run.state.phases()
    parts = parts_of(run.state.model)
    before, averaged = [snapshot(part) for part in parts], snapshot(run.state.ema.encoder)
    run.train_phase(predict, NotStopped)
    assert [moved(*pair) for pair in zip(parts, before, strict=True)] == [False, True, False]
    assert not moved(run.state.ema.encoder, averaged)
    before = [snapshot(part) for part in parts]
    run.train_phase(joint, NotStopped)
    assert [moved(*pair) for pair in zip(parts, before, strict=True)] == [True] * 3
    assert run.state.step == 6


@pytest.mark.parametrize("more", ["--batch_size 16", "--batch_size 2 --accumulate 8"])
def test_step_of_the_joint_part_takes_the_same_items_however_they_are_cut(new_run, more):
    run = new_run(more=more)
    run.state.begin_stage(2)
    run.fill_cache(NotStopped)
    joint = run.state.phases()[1]
    train.train_step(run.state, joint, distributed.loss_module(joint, run.state.model), iter(run.loader(joint)))
    assert run.state.item == 16


def test_stage_1_trains_encoder_and_decoder_and_leaves_the_core(new_run):
    run = new_run()
    parts = parts_of(run.state.model)
    before = [snapshot(part) for part in parts]
    run.train_phase(run.state.phases()[0], NotStopped)
    assert [moved(*pair) for pair in zip(parts, before, strict=True)] == [True, False, True]


@pytest.mark.parametrize(("share", "names"), [(0, ["predict"]), (0.5, ["predict", "joint"]), (1, ["joint"])])
def test_joint_share_says_which_phases_stage_2_has(new_run, share, names):
    run = new_run(more=f"--joint_share {share}")
    run.state.begin_stage(2)
    assert [phase.name for phase in run.state.phases()] == names


def test_stage_2_starts_from_the_averaged_weights_of_the_best_of_stage_1(undisturbed, new_run):
    finished = checkpoint.load(undisturbed / "stage1.pt")
    assert finished["stage"] == 1
    run = new_run()
    run.state.start_stage2(finished)
    for model in (run.state.model, run.state.ema):
        assert_same_tensors(dict(model.state_dict()), finished["ema"])


def test_finished_stage_1_is_not_held_in_memory_during_stage_2(new_run, monkeypatch):
    run, loaded = new_run(), []
    load = checkpoint.load

    def load_and_remember(path):
        state = load(path)
        loaded.extend(weakref.ref(tensor) for tensor in state["weights"].values())
        return state

    def look(self, stop):
        gc.collect()
        assert not any(tensor() is not None for tensor in loaded)
        raise train.Stopped

    monkeypatch.setattr(checkpoint, "load", load_and_remember)
    monkeypatch.setattr(train.Run, "fill_cache", look)
    run.state.step = run.state.evaluated_at = run.state.stage_steps()
    run.state.best = 0.0
    run.save("best.pt")
    with pytest.raises(train.Stopped):
        run.train(NotStopped)
    assert loaded
    assert run.state.stage == 2


def test_joint_part_moves_the_core_at_the_full_rate_and_the_codec_more_slowly(new_run):
    run = new_run()
    run.state.begin_stage(2)
    fast, slow, equaliser = ({id(p) for p in group["params"]} for group in run.state.optimiser.param_groups)
    encoder, core, decoder = ({id(p) for p in part.parameters()} for part in parts_of(run.state.model))
    assert (fast | equaliser, slow) == (core, encoder | decoder)
    assert not fast & equaliser
    assert [group["scale"] for group in run.state.optimiser.param_groups] == [1.0, stages.JOINT_CODEC_RATE, 1.0]


def test_batch_of_the_joint_part_has_crops_and_pairs(new_run):
    run = new_run()
    run.state.begin_stage(2)
    run.fill_cache(NotStopped)
    batch = next(iter(run.loader(run.state.phases()[1])))
    shapes = {name: (2, *shape) for name, shape in run.state.config.pair_shapes.items()}
    assert {name: tuple(batch[name].shape) for name in shapes} == shapes
    assert batch["x"].shape == (2, CHANNELS, RATE)  # a second
    assert batch["posterior_noise"].shape == (2, 4, 100)


def test_learning_rate_warms_up_stays_and_cools_down_to_nearly_zero(new_run):
    run = new_run(more="--stage1_steps 1000 --learning_rate 0.5")
    (phase,), rates = run.state.phases(), {}
    for run.state.step in (0, 49, 100, 599, 800, 999):
        rates[run.state.step] = run.state.learning_rate(phase) / 0.5
    assert rates[0] == pytest.approx(1 / training_state.WARMUP_STEPS)
    assert rates[49] == pytest.approx(50 / training_state.WARMUP_STEPS)
    assert rates[100] == rates[599] == 1
    assert rates[800] == pytest.approx(0.5, abs=0.01)
    assert 0 < rates[999] < 0.01


def test_averaged_weights_follow_the_documented_decay(new_run):
    run = new_run()
    ours, theirs = next(run.state.ema.encoder.parameters()), next(run.state.model.encoder.parameters())
    start = ours.clone()
    theirs.data += 1.0
    run.state.step = 5
    run.state.update_ema()
    assert torch.allclose(ours, start + 1 - (1 + 5) / (10 + 5), atol=1e-6)


# Learning


def overfit(run: train.Run, batch: dict, loss_of, parts: list, steps: int, rate: float) -> tuple[float, float]:
    """First and last loss on one fixed batch."""
    stages.freeze_all_but(run.state.model, parts)
    optimiser = muon.Muon([p for part in parts for p in part.parameters()], lr=rate, weight_decay=0.0)
    history = []
    for _ in range(steps):
        loss = loss_of(run.state.model, batch).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    return history[0], history[-1]


@pytest.mark.slow
def test_one_batch_can_be_overfit_in_stage_1(new_run):
    run = new_run(more="--encoder_widths 32 32 --decoder_widths 32 32 --latent_channels 16")
    phase = run.state.phases()[0]
    batch = next(iter(run.loader(phase)))
    draw = {"sample_rate": RATE, "size": 512, "in_mid_side": False}

    def loss_of(model, batch):
        return losses.reconstruct_step(model, batch, draw)[0]

    first, last = overfit(run, batch, loss_of, phase.trained(run.state.model), steps=320, rate=1e-2)
    assert last < first / 2


@pytest.mark.slow
def test_one_batch_can_be_overfit_in_stage_2(new_run):
    run = new_run(more="--core_width 64 --core_layers 2 --core_dropout 0")
    run.state.begin_stage(2)
    run.fill_cache(NotStopped)
    phase = run.state.phases()[0]
    batch = next(iter(run.loader(phase)))
    batch["time"][:] = 0.0
    first, last = overfit(
        run,
        batch,
        lambda *given: losses.predict_step(*given)[0],
        phase.trained(run.state.model),
        steps=160,
        rate=5e-3,
    )
    assert last < first / 10


# Steps


def test_legacy_freezes_nothing_in_stage_2_and_has_no_core_loss_in_stage_1(new_run):
    run = new_run(LEGACY)
    for stage, expected in ((1, [True, False, True]), (2, [True, True, True])):
        run.state.begin_stage(stage)
        parts = (run.state.model.encoder, run.state.model.core, run.state.model.decoder)
        before = [snapshot(part) for part in parts]
        run.train_phase(run.state.phases()[0], NotStopped)
        assert [moved(*pair) for pair in zip(parts, before, strict=True)] == expected


def test_accumulated_micro_batches_are_one_large_batch(new_run):
    """Same items, cut differently: the same loss and nearly the same step."""
    found = []
    for more in ("--batch_size 4", "--batch_size 1 --accumulate 4"):
        run = new_run(LEGACY, more)
        phase = run.state.phases()[0]
        stages.freeze_all_but(run.state.model, phase.trained(run.state.model))
        module = distributed.loss_module(phase, run.state.model)
        loss = train.train_step(run.state, phase, module, iter(run.loader(phase))).item()
        found.append((loss, run.state.item, snapshot(run.state.model.decoder)))
    (loss, item, weights), (other_loss, other_item, other_weights) = found
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert item == other_item == 4
    for one, other in zip(weights, other_weights, strict=True):
        assert torch.allclose(one, other, atol=2e-5)


def test_a_run_without_a_scaler_goes_on_with_one(new_run, monkeypatch):
    """As from bf16 on one card to fp16 on another."""
    run = new_run()
    run.state.begin_stage(1)
    run.save()
    enabled = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: enabled)
    run.resume(checkpoint.load(run.folder / "last.pt"))
    assert run.state.scaler.get_scale() == 1024


def test_overflow_in_fp16_is_skipped_with_a_lower_scale_until_it_happens_too_often(new_run, monkeypatch):
    """On the CPU, whose gradients overflow only where they are made to."""
    monkeypatch.setattr(training_state, "SKIPPED_STEPS_LIMIT", 2)
    run = new_run()
    run.state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (phase,) = run.state.phases()
    given = run.state, phase, distributed.loss_module(phase, run.state.model), iter(run.loader(phase))
    before = snapshot(run.state.model.decoder)
    overflow = next(run.state.model.decoder.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    train.train_step(*given)
    assert run.state.scaler.get_scale() == 512
    assert not moved(run.state.model.decoder, before)
    overflow.remove()
    train.train_step(*given)
    assert moved(run.state.model.decoder, before)
    next(run.state.model.decoder.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    train.train_step(*given)
    train.train_step(*given)
    with pytest.raises(train.RunError, match="last good weights"):
        train.train_step(*given)
