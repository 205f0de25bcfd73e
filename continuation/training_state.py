"""The state of a training run: everything that a step changes and a checkpoint stores.

    state = TrainingState(model, copy.deepcopy(model), args, meta, device, precision)
    checkpoint.save("last.pt", state.state_dict())
    state.resume(checkpoint.load("last.pt"), folder)

train.py updates it at every step; memory.py does the same on fake tensors.
A resumed run takes the same steps as an undisturbed one: weights, EMA, optimiser and clock are restored; `item` is
the number of the next item, whose random draws depend on it alone (batches.py); every step seeds its dropout anew.
It is bit-identical on the CPU, with as many processes and without --max_minutes.
"""

import argparse
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from continuation import checkpoint, distributed, stages
from continuation.cli import RunError, UsageError, one_line
from continuation.dataset import is_same_dataset
from continuation.rng import make_rng
from continuation.train_args import CORE_FLAGS, changed_settings, settings_of

COOLDOWN_SHARE = 0.4  # end of a stage in which the learning rate falls to zero, as a share of it
WARMUP_STEPS = 100
EMA_DECAY = 0.999
SKIPPED_STEPS_LIMIT = 50  # steps in a row that fp16 may skip for overflow
NOT_SIZES = ("preset", "objective", "core_dropout")  # fields of a config that no weight's shape depends on
CORE_FIELDS = ("objective", *CORE_FLAGS)  # fields that a stage 2 may change from the stage 1 that it starts from


class TrainingState:
    """Network, averaged weights (EMA), optimiser, and progress of the run.

    stage: 1 or 2; step, item: optimiser steps done in it, and items, of all processes.
    seconds: training time by stage, over all restarts.
    best, evaluations_since_best: the lowest validation loss of the stage, and evaluations since it was found.
    evaluated_at: step of the last evaluation, None before the first of the stage.
    interval: phase, sum of losses and steps since the last evaluation.
    skipped: steps in a row that were skipped for gradients that are not finite.
    cached_by: key of the latent cache.
    """

    def __init__(
        self,
        model: nn.Module,
        ema: nn.Module,
        args: argparse.Namespace,
        meta: dict,
        device: torch.device,
        precision: torch.dtype | None,
    ):
        """ema: a copy of the model, for the average; args: the command line; meta: of the dataset; precision: of
        autocast, None for fp32."""
        self.model, self.ema = model, ema.eval().requires_grad_(False)
        self.args, self.meta = args, meta
        self.device, self.precision = device, precision
        self.config = model.config
        self.settings = settings_of(args)
        self.seconds = {1: 0.0, 2: 0.0}
        self.cached_by = None
        self.begin_stage(1)

    def begin_stage(self, stage: int) -> None:
        """Start a stage with a new optimiser, from the current weights."""
        self.stage, self.step, self.item, self.evaluated_at = stage, 0, 0, None
        self.best, self.evaluations_since_best, self.skipped = math.inf, 0, 0
        self.begin_interval("")
        self.optimiser = stages.make_optimiser(self.model, stage, self.args.learning_rate)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.precision == torch.float16 and self.device.type == "cuda"
        )
        if self.args.compile:
            for part in (self.model.encoder, self.model.core, self.model.decoder):
                part.compile()

    def begin_interval(self, phase: str) -> None:
        """Begin to sum up losses and steps for the next evaluation."""
        self.interval = {"phase": phase, "loss": 0.0, "steps": 0}

    def add_to_interval(self, loss: float, seconds: float) -> None:
        """Add a step of all processes to the interval: their mean loss, and the time in seconds."""
        self.interval["loss"] += loss
        self.interval["steps"] += 1
        self.seconds[self.stage] += seconds

    # Schedule

    def phases(self) -> list[stages.Phase]:
        """Make the phases of the current stage."""
        return stages.phases_of(self.stage, self.config, self.args)

    def reads_cache(self) -> bool:
        """Return whether the stage trains on cached latents."""
        return any(phase.reads_cache for phase in self.phases())

    def stage_steps(self) -> int:
        """Return the current stage's number of steps."""
        return self.args.stage1_steps if self.stage == 1 else self.args.stage2_steps

    def stage_seconds(self) -> float:
        """Return the stage's share of --max_minutes, in seconds."""
        if self.args.max_minutes is None:
            return math.inf
        has_stage1 = self.stage == 1 or self.seconds[1] > 0  # else it came from another run
        total = self.args.stage2_steps + (self.args.stage1_steps if has_stage1 else 0)
        return 60 * self.args.max_minutes * self.stage_steps() / total

    def progress(self) -> float:
        """Return the share of the stage that is done, 0..1, by steps or by time, whichever is larger."""
        return min(1.0, max(self.step / self.stage_steps(), self.seconds[self.stage] / self.stage_seconds()))

    def seconds_left(self, steps_per_second: float) -> float:
        """Estimate the seconds until the stage's end, by steps or by time, whichever comes first."""
        by_steps = (self.stage_steps() - self.step) / steps_per_second
        return max(0.0, min(by_steps, self.stage_seconds() - self.seconds[self.stage]))

    def learning_rate(self, phase: stages.Phase) -> float:
        """Return the learning rate: warm-up, constant, and linear cooldown to zero at the stage's end; constant
        throughout where the phase says so."""
        if phase.has_constant_rate:
            return self.args.learning_rate
        warm = min(1.0, (self.step + 1) / WARMUP_STEPS)
        return self.args.learning_rate * warm * min(1.0, (1 - self.progress()) / COOLDOWN_SHARE + 1e-3)

    def should_stop_early(self) -> bool:
        """Return whether the validation loss has not improved for --patience evaluations."""
        return 0 < self.args.patience <= self.evaluations_since_best

    def is_done(self, phase: stages.Phase) -> bool:
        """Return whether the phase is over, by its share of the stage or by early stopping."""
        return self.progress() >= phase.end or self.should_stop_early()

    def is_finished(self) -> bool:
        """Return whether the run has ended, by its share or by early stopping, and has evaluated the last step."""
        is_over = self.progress() >= 1 or self.should_stop_early()
        return self.stage == 2 and is_over and self.evaluated_at == self.step

    def codec_learns(self) -> bool:
        """Return whether encoder and decoder are trained at this point of the stage."""
        return self.stage == 1 or self.progress() >= 1 - self.args.joint_share

    def joint_has_begun(self) -> bool:
        """Return whether the stage has changed the encoder, so that the cached latents are no longer its own."""
        return self.reads_cache() and any(p in self.optimiser.state for p in self.model.encoder.parameters())

    # Parts of a step

    def autocast(self):
        """Return a context manager in which the network computes in the run's precision."""
        return nullcontext() if self.precision is None else torch.autocast(self.device.type, self.precision)

    def dropout_seed(self) -> int:
        """Draw the seed of this step's dropout, another one in every process."""
        rng = make_rng(self.args.seed, "dropout", self.stage, self.step, distributed.rank())
        return int(rng.integers(2**62))

    def check_finite(self, loss: Tensor, gradient_norm: Tensor) -> None:
        """Raise RunError if one of them is not finite. fp16 may skip SKIPPED_STEPS_LIMIT steps in a row whose
        gradients overflow, with a lower loss scale each time."""
        if not math.isfinite(loss.item()):
            raise RunError(f"the loss is {loss.item()} at step {self.step} of stage {self.stage}")
        self.skipped = 0 if math.isfinite(gradient_norm.item()) else self.skipped + 1
        if self.skipped > (SKIPPED_STEPS_LIMIT if self.scaler.is_enabled() else 0):
            raise RunError(
                f"the gradients are not finite at step {self.step} of stage {self.stage}; "
                f"last.pt and best.pt hold the last good weights: try a lower --learning_rate"
            )

    @torch.no_grad()
    def update_ema(self) -> None:
        """Update the averaged weights; buffers are copied."""
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        for averaged, trained in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            averaged.copy_(trained)

    # Save and resume

    def state_dict(self) -> dict:
        """Return the checkpoint: plain types and tensors, for `resume`, generate.py and evaluate.py."""
        return {
            "config": asdict(self.config),
            "weights": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scheduler": {"seconds": self.seconds},
            "scaler": self.scaler.state_dict(),
            "stage": self.stage,
            "step": self.step,
            "rng": checkpoint.rng_state(),
            "sampler": {"item": self.item},
            "early_stop": {"best": self.best, "since": self.evaluations_since_best, "skipped": self.skipped},
            "evaluated_at": self.evaluated_at,
            "interval": self.interval,
            "cached_by": self.cached_by if self.joint_has_begun() else None,
            "data_meta": self.meta,
            "settings": self.settings,
            "processes": distributed.world_size(),
            "command": sys.argv,
            "versions": checkpoint.versions(),
        }

    def differences(self, saved: dict) -> list[str]:
        """List what shows that a saved state is of another run, in words to print."""
        differing = changed_settings(saved.get("settings", {}), self.settings)
        if not is_same_dataset(saved.get("data_meta"), self.meta):
            differing.append("the dataset")
        if not differing and saved["config"] != asdict(self.config):
            differing.append(f"the sizes that --preset {self.config.preset} stands for, which have changed since")
        return differing

    def resume(self, saved: dict, folder: Path) -> None:
        """Continue from the saved state of a folder; UsageError where settings differ that may not."""
        self.refuse_another_run(saved, folder)
        self.model.load_state_dict(saved["weights"])
        self.ema.load_state_dict(saved["ema"])
        self.begin_stage(saved["stage"])
        optimiser = saved["optimiser"]
        if saved["format"] == 10 and self.stage == 2 and self.config.has_copies:
            new = self.optimiser.state_dict()["param_groups"][-1:]  # of the equaliser, which format 10 lacks
            optimiser = optimiser | {"param_groups": optimiser["param_groups"] + new}
        checkpoint.load_optimiser(self.optimiser, optimiser)
        if saved["scaler"]:  # empty if the run was on a device without a scaler
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.item = saved["step"], saved["sampler"]["item"]
        self.seconds = dict(saved["scheduler"]["seconds"])
        if self.joint_has_begun() and self.progress() < 1 - self.args.joint_share:
            raise UsageError(
                f"{folder} is in the joint part, and this --stage2_steps or --max_minutes would put it back "
                f"before that: take less, or train stage 2 anew in another folder, with --stage1_from"
            )
        early = saved["early_stop"]
        self.best, self.evaluations_since_best, self.skipped = early["best"], early["since"], early["skipped"]
        self.evaluated_at, self.cached_by = saved["evaluated_at"], saved.get("cached_by")
        self.interval = dict(saved.get("interval", self.interval))  # older files have none
        checkpoint.set_rng_state(saved["rng"])
        self.print_changes(saved)
        print(f"continuing {folder} at stage {self.stage}, step {self.step}")

    def refuse_another_run(self, saved: dict, folder: Path) -> None:
        """Raise UsageError where the saved state is of another run."""
        differing = self.differences(saved)
        for name in ("stage1_steps", "stage2_steps"):
            if self.settings[name] < saved["settings"][name]:
                differing.append(f"--{name} (may only grow: {saved['settings'][name]} then)")
        if differing:
            raise UsageError(
                f"{folder} holds a run that differs in: {', '.join(differing)}; "
                f"use the same settings to continue it, or another --checkpoint_folder"
            )

    def print_changes(self, saved: dict) -> None:
        processes = distributed.world_size()
        if saved["processes"] != processes:
            items = stages.items_a_step(self.args)
            print(f"{processes} processes now, {saved['processes']} before: {items} items a step")
        if self.stage == 2 and self.settings["stage1_steps"] > saved["settings"]["stage1_steps"]:
            print("note: stage 1 is finished, more --stage1_steps do not continue it")

    def load_weights(self, saved: dict, path: Path) -> None:
        """Start from the EMA weights of another run's checkpoint, of any dataset and stage; UsageError where sample
        rate or sizes differ."""
        config = asdict(self.config)
        differing = [
            f"{name} {value} there, {config[name]} here"
            for name, value in saved["config"].items()
            if name not in NOT_SIZES and value != config[name]
        ]
        if differing:
            raise UsageError(
                f"--init_from {path} needs its own sample rate and sizes, and they differ: {', '.join(differing)}"
            )
        if checkpoint.shapes(saved["ema"]) != checkpoint.shapes(self.ema.state_dict()):
            raise UsageError(f"--init_from {path} has not the weights of this --preset")
        for model in (self.model, self.ema):
            model.load_state_dict(saved["ema"])
        print(f"starting from the weights of {one_line(path)}, stage {saved['stage']}, step {saved['step']}")

    def start_stage2(self, finished: dict) -> None:
        """Start stage 2 with the encoder and decoder (EMA weights) of a finished stage 1 of this or another run;
        UsageError where they do not fit. With --init_from the checkpoint may be of any stage and dataset."""
        is_same = is_same_dataset(finished.get("data_meta"), self.meta)
        if not self.args.init_from:
            if finished["stage"] != 1:
                raise UsageError("that stage1.pt is of stage 2")
            if not is_same:
                raise UsageError("that stage 1 was trained on another dataset")
        elif not is_same:
            print("note: encoder and decoder were trained on another dataset")
        if codec_fields(finished["config"]) != codec_fields(asdict(self.config)):
            raise UsageError("that stage 1 has another encoder or decoder: give the same --preset and sizes")
        codec = codec_weights(finished["ema"])
        if checkpoint.shapes(codec) != checkpoint.shapes(codec_weights(self.ema.state_dict())):
            raise UsageError("that stage1.pt has not the weights of its encoder and decoder")
        for model in (self.model, self.ema):
            model.load_state_dict(codec, strict=False)
        self.begin_stage(2)


def codec_fields(config: dict) -> dict:
    """Return the fields of a config that encoder and decoder depend on."""
    return {name: value for name, value in config.items() if name not in CORE_FIELDS}


def codec_weights(weights: dict) -> dict:
    """Return the weights of encoder and decoder, and the statistics of the latents."""
    return {name: value for name, value in weights.items() if not name.startswith("core.")}
