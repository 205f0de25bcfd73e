"""Train the network on a paired dataset, in two stages: reconstruction, then prediction.

    python train.py --dataset_folder dataset --checkpoint_folder checkpoints

The same command continues a run that was stopped. Writes last.pt, best.pt, stage1.pt, metrics.jsonl, curves.png,
samples/, tb/ (TensorBoard: figures, and sounds and spectrograms of three validation songs) and latents/ (the cache of
stage 2) into the checkpoint folder.
Exit codes: 0 done, 1 failed, 2 wrong usage or refused input, 75 interrupted: run the same command again.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from continuation import checkpoint, distributed, files, latent_encoding, memory, run_log, signals, stages
from continuation.batches import items_of_rank
from continuation.cli import INTERRUPTED, RunError, UsageError, entry_point, make_folder, output_code
from continuation.dataset import open_dataset
from continuation.latent_cache import LatentCache
from continuation.progress import Progress
from continuation.signals import Stopped
from continuation.train_args import ARCHITECTURE_FLAGS, SCHEDULES, parse_args
from continuation.training_state import TrainingState
from continuation.validation import Validation
from continuation.windows import Windows
from model import ModelConfig, check_network, load_checkpoint, make_model, with_overrides

GRADIENT_NORM = 1.0


# The loop


def train_step(state: TrainingState, phase: stages.Phase, loss_module: nn.Module, batches: Iterator[dict]) -> Tensor:
    """Take one optimiser step over the phase's micro-batches; return this process's mean loss, float64.

    It does no input or output, and only `check_finite` reads values: memory.py runs it on fake tensors.
    """
    torch.manual_seed(state.dropout_seed())
    for group in state.optimiser.param_groups:
        group["lr"] = state.learning_rate(phase) * group["scale"]
    total = 0.0
    for micro_step in range(phase.accumulate):
        batch = {name: x.to(state.device, non_blocking=True) for name, x in next(batches).items()}
        is_last = micro_step == phase.accumulate - 1
        with nullcontext() if is_last else loss_module.no_sync():
            with state.autocast():
                loss = loss_module(batch, state.step) / phase.accumulate
            state.scaler.scale(loss).backward()
        total = total + loss.detach().double()
    state.scaler.unscale_(state.optimiser)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), GRADIENT_NORM)
    state.check_finite(total, norm)
    state.scaler.step(state.optimiser)
    state.scaler.update()
    state.optimiser.zero_grad(set_to_none=True)
    state.step += 1
    state.item += phase.accumulate * phase.batch_size * distributed.world_size()
    state.update_ema()
    return total


class Run:
    """One training run in one checkpoint folder."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.folder = Path(args.checkpoint_folder)
        self.meta, splits = open_dataset(args.dataset_folder)
        self.windows = {name: Windows(split, self.meta) for name, split in splits.items()}
        self.device = checkpoint.choose_device(args.device)
        run_log.warn_without_cuda(args, self.device)
        precision = checkpoint.choose_precision(args.precision, self.device)
        torch.manual_seed(args.seed)
        model = make_model(make_config(args, self.meta)).to(self.device)
        self.state = TrainingState(model, copy.deepcopy(model), args, self.meta, self.device, precision)
        self.validation = Validation(self.state.ema, self.windows["val"], args.seed, self.state.autocast)
        self.log = run_log.RunLog(self.folder)

    def train_phase(self, phase: stages.Phase, stop) -> None:
        """Train until the phase has ended: step, evaluate, save."""
        state = self.state
        if state.is_done(phase):
            return
        stages.freeze_all_but(state.model, phase.trained(state.model))
        state.model.train()
        loss_module = distributed.loss_module(phase, state.model)
        batches = iter(self.loader(phase))
        if state.interval["phase"] != phase.name:  # else the interval continues after a resume
            state.begin_interval(phase.name)
        started = saved = time.monotonic()
        with Progress(state) as progress:
            while not state.is_done(phase):
                loss = train_step(state, phase, loss_module, batches).item()
                now = time.monotonic()
                loss, seconds, is_stopping = distributed.sync_step(loss, now - started, stop.requested, self.device)
                started = now
                state.add_to_interval(loss, seconds)
                progress.update()
                if state.step % self.args.eval_steps == 0:
                    progress.clear()
                    self.evaluate(state.interval["loss"] / state.interval["steps"], phase.name)
                    state.begin_interval(phase.name)
                if is_stopping:
                    self.save_and_stop()
                if time.monotonic() - saved > 60 * self.args.checkpoint_minutes:
                    self.save()
                    saved = time.monotonic()

    def train(self, stop) -> None:
        """Train the remaining stages of the run. Raises Stopped at a stop signal."""
        if distributed.is_main():
            (self.folder / "samples").mkdir(exist_ok=True)
        if self.state.stage == 1:
            self.train_stage(stop)
            self.finish_stage1()
        if not self.state.is_finished():
            self.train_stage(stop)
        self.save()

    def train_stage(self, stop) -> None:
        """Train the remaining phases of the current stage."""
        state = self.state
        self.log.open_board(state)
        if state.reads_cache():
            self.fill_cache(stop)
        if state.best == math.inf:
            distributed.barrier()  # until all have searched for last.pt
            self.save()  # before best.pt: a folder with a best.pt and without a last.pt is refused
            self.evaluate()
        for phase in state.phases():
            self.train_phase(phase, stop)
        if state.evaluated_at != state.step:
            self.evaluate()

    # Data

    def loader(self, phase: stages.Phase):
        """Make the endless loader of the phase's batches, from the run's next item on, for this process."""
        items = phase.items(self.windows["train"], self.open_cache() if phase.reads_cache else None)
        first, ranks = self.state.item, (distributed.rank(), distributed.world_size())
        numbers = items_of_rank(first, phase.batch_size, *ranks)
        return stages.make_loader(items, numbers, phase.batch_size, self.device, self.args.num_workers)

    def open_cache(self) -> LatentCache:
        """Open the cache of the training split's latents."""
        pairs, shapes = len(self.windows["train"]), self.state.config.pair_shapes
        return LatentCache(self.folder / "latents", self.args.latent_variants, shapes, pairs)

    def fill_cache(self, stop) -> None:
        """Encode all training windows for stage 2, unless the cache has them."""

        def after_batch() -> None:
            if distributed.sync_step(0.0, 0.0, stop.requested, self.device)[2]:
                self.save_and_stop()

        latent_encoding.fill_cache(self.state, self.windows["train"], self.open_cache(), after_batch)

    # Evaluate

    def evaluate(self, train_loss: float | None = None, phase: str = "") -> None:
        """Validate the EMA weights on fixed pairs and noise, log the result, and save the best, on process 0; the
        others receive the best loss."""
        state = self.state
        state.evaluated_at = state.step
        if distributed.is_main():
            self.evaluate_main(train_loss, phase)
        standing = torch.tensor([state.best, state.evaluations_since_best], dtype=torch.float64, device=self.device)
        state.best, since = distributed.broadcast(standing).tolist()
        state.evaluations_since_best = int(since)

    def evaluate_main(self, train_loss: float | None, phase: str) -> None:
        """Validate, log and save the best on process 0. Raises RunError where the loss is not finite."""
        state = self.state
        record = {
            "stage": state.stage, "step": state.step, "phase": phase,
            "epoch": state.item / state.phases()[0].pairs_an_epoch(self.windows["train"]),
            "seconds": sum(state.seconds.values()), "train_loss": train_loss,
        }  # fmt: skip
        record |= self.validate()
        if not math.isfinite(record["val_loss"]):
            raise RunError(f"the validation loss is not finite at step {state.step} of stage {state.stage}")
        is_best = record["val_loss"] < state.best
        state.evaluations_since_best = 0 if is_best else state.evaluations_since_best + 1
        if is_best:
            state.best = record["val_loss"]
            self.save("best.pt")
        self.log.write(record)
        self.write_sample()
        self.show_songs()
        print(run_log.line_of(state, record, is_best), flush=True)
        self.log.warn_of_collapse(state, record)

    def validate(self) -> dict:
        """Compute the val_* measures of the EMA weights, at step 0 and in stage 2 those of continuations too."""
        figures = self.validation.figures(self.state.stage, self.state.codec_learns())
        if self.state.stage == 2 or self.state.step == 0:
            figures = self.validation.continuation() | figures  # what is in both is over more pairs in the latter
        return {f"val_{name}": value for name, value in figures.items()}

    def write_sample(self) -> None:
        """Write the first validation pair, as it sounds now, to samples/."""
        x = self.windows["val"].pair(0)[:, : self.state.config.chunk_samples]
        run_log.write_sample(self.folder, self.state, x)

    def show_songs(self) -> None:
        """Show a pair of each of a few validation songs in TensorBoard."""
        for number, pair in enumerate(self.validation.songs(run_log.SONGS), start=1):
            self.log.show_song(self.state, number, self.windows["val"].pair(pair))

    # Save and resume

    def save(self, name: str = checkpoint.LAST_NAME) -> None:
        """Save the run's state on process 0; last.pt keeps its predecessors."""
        if not distributed.is_main():
            return
        if name == checkpoint.LAST_NAME:
            checkpoint.save_last(self.folder, self.state.state_dict(), self.args.keep)
        else:
            checkpoint.save(self.folder / name, self.state.state_dict())

    def save_and_stop(self) -> None:
        """Save, and raise Stopped in all processes at once: launchers end the others as soon as one has left, while
        process 0 may still be writing."""
        self.save()
        distributed.barrier()
        raise Stopped

    def resume(self, saved: dict) -> None:
        """Continue from a saved state; UsageError where settings differ that may not."""
        self.state.resume(saved, self.folder)
        self.log.drop_later(self.state)

    def finish_stage1(self) -> None:
        """Save the best of stage 1 as stage1.pt, and start stage 2 from it."""
        distributed.barrier()
        finished = self.best_of_stage1()
        if finished is None:
            print("warning: the best of stage 1 is lost, going on from its last weights")
            self.save("best.pt")
            distributed.barrier()
            finished = self.best_of_stage1()
        if distributed.is_main():
            checkpoint.save(self.folder / "stage1.pt", finished)
        self.state.start_stage2(finished)
        self.save()

    def best_of_stage1(self) -> dict | None:
        """Load the best of stage 1 of this run: best.pt, or stage1.pt if a stage 2 has replaced best.pt and its
        last.pt was lost; None where neither is."""
        for name in ("best.pt", "stage1.pt"):
            with suppress(UsageError):
                saved = load_checkpoint(self.folder / name)
                if saved["stage"] == 1 and not self.state.differences(saved):
                    return saved
        return None


# Before the loop


def make_config(args: argparse.Namespace, meta: dict) -> ModelConfig:
    """Make the network's config from the flags and the dataset. Raises UsageError for an invalid one."""
    overrides = {name: getattr(args, name) for name in ARCHITECTURE_FLAGS}
    overrides |= {name: tuple(value) for name, value in overrides.items() if isinstance(value, list)}
    shape = {name: meta[name] for name in ("sample_rate", "channels", "chunk_samples")}
    try:
        return with_overrides(args.preset, objective=args.objective, **overrides, **shape)
    except ValueError as error:
        raise UsageError(str(error)) from error


def make_plan(args: argparse.Namespace, meta: dict, device: torch.device) -> memory.Plan:
    """Make the memory plan of this training; --batch_size auto is the preset's batch until it is chosen."""
    config = make_config(args, meta)
    return memory.Plan(
        config=config,
        parts=memory.parts_of(config, args),
        batch_size=SCHEDULES[args.preset].batch_size if args.batch_size == "auto" else args.batch_size,
        accumulate=args.accumulate,
        device=device.type,
        precision=checkpoint.choose_precision(args.precision, device),
        network=make_model,
        train_step=train_step,
    )


def dry_run(args: argparse.Namespace) -> None:
    """Print the training's memory and disk space, for a GPU even where there is none; write nothing."""
    meta, splits = open_dataset(args.dataset_folder)
    plan = make_plan(args, meta, torch.device("cpu" if args.device == "cpu" else "cuda"))
    memory.print_plan(plan, args, meta, splits)


def fit_batch(args: argparse.Namespace, device: torch.device) -> None:
    """Choose batch_size and accumulate before training."""
    if args.batch_size == "auto" or device.type == "cuda":
        meta, _ = open_dataset(args.dataset_folder)
        plan = memory.fitting_plan(make_plan(args, meta, device), args)
        args.batch_size, args.accumulate = plan.batch_size, plan.accumulate


def prepare(args: argparse.Namespace) -> Run:
    """Make the run of this folder, continued or new."""
    run = Run(args)
    with distributed.main_first():
        last = checkpoint.load_last(run.folder)
        if last is None:
            checkpoint.refuse_remains(run.folder)
    if last is not None:
        check_network(f"the last checkpoint of {run.folder}", last)
        checkpoint.check_run(f"the last checkpoint of {run.folder}", last)
        try:
            run.resume(last)
        except checkpoint.FOREIGN_ERRORS as error:
            raise checkpoint.misfit(f"the last checkpoint of {run.folder}", error) from error
    else:
        if args.init_from:
            path = checkpoint.find(args.init_from, checkpoint.BEST_NAME, f"{args.preset}.pt")
            run.state.load_weights(load_checkpoint(path), path)
        if args.stage1_from:
            run.state.start_stage2(load_checkpoint(checkpoint.find(args.stage1_from, "stage1.pt")))
    run_log.announce(run.state, run.windows)
    return run


@entry_point
def main(args: argparse.Namespace) -> int:
    checkpoint.versions()  # of the code that runs, whatever is checked out before it ends
    folder = Path(args.checkpoint_folder)
    try:
        if args.dry_run:
            dry_run(args)
            return output_code()
        make_folder(folder, "--checkpoint_folder")
        device = checkpoint.choose_device(args.device)
        with (
            signals.StopSignals("SIGPIPE") as stop,
            distributed.process_group(device),
            distributed.main_only(files.locked(folder / ".lock", wait_seconds=60)),
        ):
            fit_batch(args, device)  # before the run takes memory of its own
            run = prepare(args)
            run.train(stop)
            run_log.summarise(run.state, folder)
    except Stopped:
        by = stop.name or "a signal to another process"
        print(f"interrupted by {by}, everything is saved: run the same command again to continue", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:  # a second Ctrl-C, which does not wait for the end of the step
        print("interrupted at once: run the same command again to continue from the last save", file=sys.stderr)
        return INTERRUPTED
    except torch.cuda.OutOfMemoryError as error:
        raise RunError("the GPU's memory ran out: run the same command with a smaller --batch_size") from error
    return 0


if __name__ == "__main__":
    distributed.leave(main(parse_args()))
