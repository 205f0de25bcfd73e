"""The memory estimate: it is what is really allocated, for the worst step of every part of a training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from continuation import distributed, latent_encoding, losses, memory, muon, stages
from model import PRESETS, make_model, with_overrides

ROOM = 0.2  # between the estimate and the truth, relative
CODEC = {"encoder_widths": (16, 16), "encoder_blocks": (1, 1), "decoder_widths": (16, 16), "decoder_blocks": (1, 1)}
CORE = {"latent_channels": 4, "core_layers": 2, "core_width": 32, "core_heads": 2, "latents_per_token": 4}
SMALL = with_overrides("tiny", sample_rate=8000, channels=2, chunk_samples=24000, **CODEC, **CORE)


def plan(config=SMALL, **fields) -> memory.Plan:
    """Of a training on the CPU in fp32, unless `fields` say otherwise."""
    parts = memory.PARTS if config.has_copies else ("stage1", "stage2")
    given = {"parts": parts, "batch_size": 8, "accumulate": 1, "device": "cpu", "precision": None}
    given |= {"network": make_model, "train_step": train.train_step}
    return memory.Plan(config=config, **given | fields)


def profiled_gigabytes(action) -> float:
    """The most memory that torch's allocator had given out at once while `action` ran, as its profiler saw it."""
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        action()
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 1e9


def allocated_gigabytes(action) -> float:
    """The same by the estimate's own count, of fake tensors."""
    with FakeTensorMode(), memory.Allocations() as allocations:
        action()
    return allocations.peak / 1e9


def do_once(given: memory.Plan, part: str) -> None:
    rehearsal = memory.Rehearsal(given, part)
    rehearsal.fill_cache() if part == "latents" else rehearsal.step()


# Base


@pytest.fixture
def short_optimiser(monkeypatch):
    """One iteration of the optimiser's inner loop takes the memory of five, and much less time."""
    monkeypatch.setattr(muon, "NEWTON_SCHULZ_STEPS", 1)


@pytest.mark.slow
def test_base_fits_into_15_gb_in_every_stage_even_in_fp32(short_optimiser):
    schedule, config = train.SCHEDULES["base"], PRESETS["base"]
    peaks = memory.peak_gigabytes(
        plan(config, batch_size=schedule.batch_size, accumulate=schedule.accumulate, device="cuda")
    )
    assert peaks.keys() == set(memory.PARTS)
    assert all(memory.CONTEXT_GIGABYTES < peak < 15 for peak in peaks.values())


@pytest.mark.slow
@pytest.mark.parametrize(("part", "batch_size"), [*((part, 1) for part in memory.PARTS), ("joint", 2)])
def test_estimate_of_base_is_what_the_profiler_sees_in_a_real_step(part, batch_size, short_optimiser, monkeypatch):
    monkeypatch.setattr(latent_encoding, "CACHE_BATCH", batch_size)
    given = plan(PRESETS["base"], batch_size=batch_size)
    estimated = allocated_gigabytes(lambda: do_once(given, part))
    assert estimated == pytest.approx(profiled_gigabytes(lambda: do_once(given, part)), rel=ROOM)


# The rehearsal is the training


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture
def arguments(dataset, tmp_path):
    """Parsed arguments of train.py with flags."""

    def parse(flags: str):
        argv = ["--dataset_folder", str(dataset), "--checkpoint_folder", str(tmp_path / "ck"), *flags.split()]
        return train.parse_args(argv)

    return parse


@pytest.fixture
def new_run(arguments, tmp_path):
    """A Run that has not begun, and the plan of its memory."""

    def make(flags: str, stage: int) -> tuple[train.Run, memory.Plan]:
        (tmp_path / "ck" / "samples").mkdir(parents=True)
        run = train.Run(arguments(flags))
        run.state.begin_stage(stage)
        if run.state.reads_cache():
            run.fill_cache(tiny.NotStopped)
        return run, train.make_plan(run.args, run.meta, run.device)

    return make


TINY, LEGACY = f"{tiny.TINY} --batch_size 16", f"{tiny.LEGACY} --batch_size 3"
PHASES = [
    (TINY, 1, 0, "stage1"),
    (TINY, 2, 0, "stage2"),
    (TINY, 2, 1, "joint"),
    (LEGACY, 1, 0, "stage1"),
    (LEGACY, 2, 0, "stage2"),
]


@pytest.mark.parametrize(("flags", "stage", "phase", "part"), PHASES)
def test_rehearsed_part_has_the_batches_and_the_trained_weights_of_the_phase(new_run, flags, stage, phase, part):
    run, given = new_run(flags, stage)
    phase = run.state.phases()[phase]
    rehearsal = memory.Rehearsal(given, part)
    batches = [next(iter(run.loader(phase))), rehearsal.batch()]
    real, rehearsed = ({name: (x.shape, x.dtype) for name, x in batch.items()} for batch in batches)
    assert real == rehearsed
    stages.freeze_all_but(run.state.model, phase.trained(run.state.model))
    trained, rehearsed = ([p.requires_grad for p in m.parameters()] for m in (run.state.model, rehearsal.state.model))
    assert trained == rehearsed
    assert type(rehearsal.state.optimiser) is type(run.state.optimiser)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "stage", "phase", "part"), PHASES)
def test_estimate_is_what_a_small_training_allocates(new_run, monkeypatch, flags, stage, phase, part):
    """Two real steps of train.py and its evaluation, counted tensor by tensor."""
    monkeypatch.setattr(stages.Phase, "stft_settings", lambda self, step: memory.worst_stft_settings(self.config))
    with memory.Allocations() as allocations:
        run, given = new_run(flags, stage)
        allocations.peak = allocations.bytes
        phase = run.state.phases()[phase]
        stages.freeze_all_but(run.state.model, phase.trained(run.state.model))
        batches = iter(run.loader(phase))
        for _ in range(2):
            train.train_step(run.state, phase, distributed.loss_module(phase, run.state.model), batches)
        run.validate()
        run.write_sample()
    assert memory.estimate(given, part) == pytest.approx(allocations.peak / 1e9, rel=ROOM)


# The worst step


@pytest.mark.slow
def test_no_draw_of_the_spectral_losses_takes_more_than_the_one_that_is_rehearsed(monkeypatch):
    given, peaks = plan(batch_size=64), []
    draws = [
        {"sample_rate": SMALL.sample_rate, "size": size, "in_mid_side": basis}
        for size in losses.spectral_sizes(SMALL.sample_rate)
        for basis in (False, True)
    ]
    worst = draws.index(memory.worst_stft_settings(SMALL))
    for draw in draws:
        monkeypatch.setattr(memory, "worst_stft_settings", lambda config, draw=draw: draw)
        peaks.append(allocated_gigabytes(lambda: memory.Rehearsal(given, "stage1").step()))
    assert peaks[worst] == max(peaks)


@pytest.mark.slow
def test_accumulated_gradients_lie_beside_the_activations():
    def peak(accumulate: int) -> float:
        rehearsal_of = plan(batch_size=64, accumulate=accumulate)
        return allocated_gigabytes(lambda: memory.Rehearsal(rehearsal_of, "stage2").step())

    assert peak(1) < peak(2) == peak(9)


@pytest.mark.slow
def test_evaluation_counts_where_the_batch_is_smaller(monkeypatch):
    monkeypatch.setattr(stages, "CROP_SECONDS", 0.4)
    given = plan(batch_size=1)
    assert memory.estimate(given, "stage1") > 1.5 * allocated_gigabytes(lambda: do_once(given, "stage1"))


@pytest.mark.slow
def test_autocast_halves_most_of_the_activations():
    def peak(precision) -> float:
        given = plan(batch_size=64, precision=precision)
        return allocated_gigabytes(lambda: memory.Rehearsal(given, "stage2").step())

    assert peak(torch.float16) == peak(torch.bfloat16)
    assert 0.5 < peak(torch.float16) / peak(None) < 0.85


# The largest batch


@pytest.fixture
def one_gigabyte_an_item(monkeypatch):
    """An estimate of a GB an item in the joint part, and of half a GB in the others."""
    sizes = {"joint": 1.0}
    monkeypatch.setattr(memory, "estimate", lambda given, part: given.batch_size * sizes.get(part, 0.5))


@pytest.mark.parametrize(("limit", "size"), [(100, 12), (12, 12), (11.9, 6), (5, 4), (1, 1)])
def test_largest_batch_is_the_largest_divisor_that_fits_every_part(one_gigabyte_an_item, limit, size):
    found = memory.largest_batch(plan(batch_size=6, accumulate=2), limit)
    assert (found.batch_size, found.accumulate) == (size, 12 // size)


def test_there_is_no_largest_batch_where_single_items_do_not_fit(one_gigabyte_an_item):
    assert memory.largest_batch(plan(), 0.9) is None


@pytest.fixture
def small_gpu(monkeypatch):
    """A GPU that runs out of memory in the joint part above so many items."""

    def pretend(items: int) -> None:
        def measure(given: memory.Plan, part: str) -> float:
            if part == "joint" and given.batch_size > items:
                raise torch.cuda.OutOfMemoryError
            return 1.5

        monkeypatch.setattr(memory, "measure", measure)

    return pretend


def test_out_of_memory_lowers_the_batch_and_raises_the_accumulation(small_gpu):
    small_gpu(5)
    found, peaks = memory.measured_gigabytes(plan(batch_size=8, accumulate=3))
    assert (found.batch_size, found.accumulate) == (4, 6)
    assert peaks == dict.fromkeys(memory.PARTS, 1.5)


def test_batch_that_fits_is_left_as_it_is(small_gpu):
    small_gpu(100)
    found, _ = memory.measured_gigabytes(plan(batch_size=8, accumulate=3))
    assert (found.batch_size, found.accumulate) == (8, 3)


def test_single_items_that_do_not_fit_are_an_error(small_gpu):
    small_gpu(0)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        memory.measured_gigabytes(plan())


# The command line


@pytest.mark.slow
def test_dry_run_ends_with_its_figures_and_writes_nothing(arguments, tmp_path, capsys):
    args = arguments(f"--preset tiny {tiny.NETWORK} --batch_size 2 --dry_run")
    assert train.main(args) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    keys = ["stage1_gb", "latents_gb", "stage2_gb", "joint_gb", "limit_gb", "batch_size", "accumulate"]
    assert list(found) == keys
    assert all(memory.CONTEXT_GIGABYTES < found[name] < 2 for name in keys[:4])
    assert (found["limit_gb"], found["batch_size"], found["accumulate"]) == (15.0, 2, 1)
    text = "\n".join(lines)
    assert "train: 3 songs, 7 pairs" in text
    assert "stage 1: 8000 steps of 2 items, 2285.7 epochs" in text
    assert "latent cache: " in text
    assert "peak memory on cuda in float16" in text
    assert not (tmp_path / "ck").exists()


@pytest.mark.parametrize(
    ("flags", "epochs"),
    [
        (
            f"{tiny.TINY} --batch_size 16 --stage2_steps 70 --joint_share 0.3",  # of 7 pairs
            ["stage 2: 49 steps of 16 items, 112.0 epochs", "stage 2, joint part: 21 steps of 16 items, 48.0 epochs"],
        ),
        (f"{tiny.TINY} --joint_share 0", ["stage 2: 6 steps of 2 items, 1.7 epochs"]),
        (f"{tiny.LEGACY} --stage2_steps 8", ["stage 2: 8 steps of 1 items, 2.0 epochs"]),  # of 4 fixed pairs
    ],
)
def test_dry_run_counts_the_epochs_of_the_items_that_are_drawn(
    arguments, one_gigabyte_an_item, capsys, flags, epochs
):
    assert train.main(arguments(f"{flags} --dry_run")) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("stage 2")] == epochs


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_dry_run_counts_the_saves_that_are_kept_and_three_more(arguments, one_gigabyte_an_item, capsys, keep):
    assert train.main(arguments(f"{tiny.TINY} --dry_run --keep {keep}")) == 0
    assert f"the cache and {keep + 3} checkpoints" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "absent"),
    [
        (f"{tiny.TINY} --joint_share 0 --stage1_from other", {"stage1_gb", "joint_gb"}),
        (f"{tiny.TINY} --joint_share 1", {"stage2_gb"}),
        (tiny.LEGACY, {"latents_gb", "joint_gb"}),
    ],
)
def test_dry_run_has_zeros_for_the_parts_that_the_training_has_not(
    arguments, one_gigabyte_an_item, capsys, flags, absent
):
    assert train.main(arguments(f"{flags} --dry_run")) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name for name, value in found.items() if value == 0} == absent


def test_limit_that_nothing_fits_is_said_by_the_dry_run_and_refused_in_training(
    arguments, one_gigabyte_an_item, capsys
):
    flags = f"{tiny.TINY} --batch_size auto --memory_limit 0.9"
    assert train.main(arguments(f"{flags} --dry_run")) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["batch_size"] is None
    assert "more than 0.9 GB" in lines[-1]
    assert train.main(arguments(flags)) == 2
    assert "not even one item" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--dataset_folder nowhere", "--core_width 17"])
def test_dry_run_refuses_what_training_refuses(arguments, tmp_path, capsys, flags):
    assert train.main(arguments(f"{tiny.TINY} --dry_run {flags}")) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "ck").exists()


def test_training_takes_the_batch_that_the_dry_run_names(arguments, one_gigabyte_an_item, capsys):
    flags = f"--preset tiny {tiny.NETWORK} --device cpu --batch_size auto --accumulate 3 --memory_limit 7"
    assert train.main(arguments(f"{flags} --dry_run")) == 0
    named = json.loads(capsys.readouterr().out.splitlines()[-1])
    args = arguments(flags)
    train.fit_batch(args, torch.device("cpu"))
    assert (args.batch_size, args.accumulate) == (named["batch_size"], named["accumulate"]) == (6, 4)


def test_batch_that_is_given_is_not_changed_on_the_cpu(arguments):
    args = arguments(f"{tiny.TINY} --batch_size 5 --accumulate 3 --memory_limit 0.001")
    train.fit_batch(args, torch.device("cpu"))
    assert (args.batch_size, args.accumulate) == (5, 3)


@pytest.mark.parametrize("flags", ["--batch_size some", "--memory_limit 0"])
def test_impossible_values_are_wrong_usage(arguments, flags):
    with pytest.raises(SystemExit) as caught:
        arguments(flags)
    assert caught.value.code == 2


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [None, torch.float16])
def test_true_peak_of_base_on_cuda_is_near_the_estimate(precision):
    given = plan(PRESETS["base"], batch_size=16, device="cuda", precision=precision)
    found, measured = memory.measured_gigabytes(given)
    assert found == given
    for part, estimated in memory.peak_gigabytes(given).items():
        assert measured[part] == pytest.approx(estimated, rel=ROOM), part


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_that_is_too_small_lowers_the_batch():
    given = plan(PRESETS["base"], batch_size=16, device="cuda")
    half = memory.estimate(replace(given, batch_size=8), "stage2") - memory.CONTEXT_GIGABYTES
    torch.cuda.set_per_process_memory_fraction(1.2 * half * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        found, _ = memory.measured_gigabytes(replace(given, parts=("stage2",)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found.batch_size < 16
    assert found.batch_size * found.accumulate == 16
