"""The command line of train.py: flags, defaults, and the training schedule of each preset."""

import argparse
from dataclasses import asdict, dataclass

from continuation.cli import HelpFormatter, add_debug_flag, seed_number

CODEC_FLAGS = ("latent_channels", "encoder_widths", "encoder_blocks", "decoder_widths", "decoder_blocks")
CORE_FLAGS = ("core_layers", "core_width", "core_heads", "core_dropout", "latents_per_token")
ARCHITECTURE_FLAGS = CODEC_FLAGS + CORE_FLAGS
MOST_STEPS = 10**9  # and the limit of all other integers
MOST_WORKERS = 256
FOLDER_FLAGS = ("dataset_folder", "checkpoint_folder")
FREE_ON_RESTART = {  # may differ when a run is continued
    "stage1_from", "init_from", "max_minutes", "stage1_steps", "stage2_steps", "device",
    "compile", "batch_size", "accumulate", "num_workers", "checkpoint_minutes", "keep", "dry_run", "memory_limit",
    "debug",
}  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """Default training settings of a preset."""

    stage1_steps: int
    stage2_steps: int
    batch_size: int
    accumulate: int
    learning_rate: float
    latent_variants: int


SCHEDULES = {
    "legacy": Schedule(1500, 1500, 16, 4, 5e-5, 1),
    "tiny": Schedule(8000, 8000, 8, 1, 2e-3, 1),
    "base": Schedule(40000, 8000, 16, 1, 5e-4, 4),
    "large": Schedule(100000, 100000, 16, 1, 3e-4, 4),
}


def parse_args(argv=None) -> argparse.Namespace:
    """Parse the flags, with the preset's schedule as defaults; SystemExit (2) for impossible values."""
    parser = argparse.ArgumentParser(
        description="Train the network on a paired dataset, in two stages: reconstruction, then prediction.",
        formatter_class=HelpFormatter,
    )
    add_folder_arguments(parser.add_argument_group("folders"))
    add_network_arguments(parser.add_argument_group("network"))
    add_schedule_arguments(parser.add_argument_group("schedule"))
    add_hardware_arguments(parser.add_argument_group("hardware"))
    add_memory_arguments(parser.add_argument_group("memory"))
    add_debug_flag(parser)
    args = parser.parse_args(argv)
    for field, value in asdict(SCHEDULES[args.preset]).items():
        if getattr(args, field) is None:
            setattr(args, field, value)
    if args.preset == "legacy":
        args.objective = "mse"
    check_ranges(parser, args)
    return args


def add_folder_arguments(group) -> None:
    group.add_argument("--dataset_folder", required=True, help="what create_dataset.py wrote")
    group.add_argument("--checkpoint_folder", required=True, help="where everything is written, and resumed from")
    group.add_argument(
        "--stage1_from", metavar="CK",
        help="start at stage 2, from the finished stage 1 of this checkpoint folder, or from a checkpoint file",
    )  # fmt: skip
    group.add_argument(
        "--init_from", metavar="PATH",
        help="fine-tune: start from the weights of this checkpoint file, or of best.pt or PRESET.pt in this folder "
        "(pretrained has a tiny.pt), of the same sample rate and sizes; with --stage1_from, which may then be of "
        "another dataset, stage 2 alone",
    )  # fmt: skip


def add_network_arguments(group) -> None:
    group.add_argument("--preset", choices=SCHEDULES, default="base", help="size of the network")
    group.add_argument(
        "--objective", choices=("flow", "mse"), default="flow",
        help="stage 2: a rectified flow that samples continuations, or their mean by squared error",
    )  # fmt: skip
    for part in ("encoder", "decoder"):
        for what in ("widths", "blocks"):
            help_text = f"{what} of the {part}, in the order of its layers (default: the preset's)"
            group.add_argument(f"--{part}_{what}", type=int, nargs=2, metavar="N", help=help_text)
    for name, kind, help_text in (
        ("latent_channels", int, "floats a latent; 100 latents a second"),
        ("core_layers", int, "transformer layers"),
        ("core_width", int, "width of the transformer, twice that of its head"),
        ("core_heads", int, "attention heads"),
        ("core_dropout", float, "dropout of the transformer, 0..1"),
        ("latents_per_token", int, "neighbouring latents stacked into one token"),
    ):
        group.add_argument(f"--{name}", type=kind, help=f"{help_text} (default: the preset's)")


def add_schedule_arguments(group) -> None:
    group.add_argument("--stage1_steps", type=int, help="optimiser steps of stage 1 (default: the preset's)")
    group.add_argument("--stage2_steps", type=int, help="optimiser steps of stage 2 (default: the preset's)")
    group.add_argument(
        "--joint_share", type=float, default=0.25,
        help="last share of stage 2 that trains core and codec side by side, 0..1",
    )  # fmt: skip
    group.add_argument(
        "--max_minutes", type=float,
        help="training time over all restarts, encoding before stage 2 included, shared out to the stages in "
        "proportion to their steps (default: no limit)",
    )  # fmt: skip
    group.add_argument(
        "--batch_size", type=batch_size,
        help="items a process and micro-step (default: the preset's); auto: the most that fit --memory_limit of the "
        "preset's batch x --accumulate, and as many micro-steps as make it up",
    )  # fmt: skip
    group.add_argument("--accumulate", type=int, help="micro-steps an optimiser step (default: the preset's)")
    group.add_argument("--learning_rate", type=float, help="peak learning rate (default: the preset's)")
    group.add_argument(
        "--latent_variants", type=int, help="augmented versions of each pair in the cache (default: the preset's)"
    )
    group.add_argument("--eval_steps", type=int, default=250, help="steps between evaluations")
    group.add_argument(
        "--patience", type=int, default=20,
        help="evaluations without a better one that end a stage early, cooldown and joint part included; 0: never",
    )  # fmt: skip
    group.add_argument("--checkpoint_minutes", type=float, default=10.0, help="minutes between saves of last.pt")
    group.add_argument("--keep", type=int, default=2, help="saves to keep: last.pt, last.1.pt and so on")
    group.add_argument("--seed", type=seed_number, default=0, help="random seed")


def add_hardware_arguments(group) -> None:
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    group.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 or else fp16 on CUDA, fp32 on the CPU",
    )  # fmt: skip
    group.add_argument("--num_workers", type=int, help="processes that read data (default: 4 on CUDA, 0 on the CPU)")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")


def add_memory_arguments(group) -> None:
    group.add_argument(
        "--memory_limit", type=float, default=15.0, help="GB (1e9 bytes) for --batch_size auto and --dry_run"
    )
    group.add_argument(
        "--dry_run", action="store_true",
        help="print what this training takes: steps, disk, and memory, on a GPU unless --device cpu; write nothing",
    )  # fmt: skip


def batch_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def check_ranges(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("stage1_steps", "stage2_steps", "batch_size", "accumulate", "latent_variants", "eval_steps", "keep"):
        if getattr(args, name) != "auto" and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
        if getattr(args, name) != "auto" and getattr(args, name) > MOST_STEPS:
            parser.error(f"--{name} must be at most {MOST_STEPS}")
    for name in ("max_minutes", "learning_rate", "checkpoint_minutes", "memory_limit"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} must be above 0")
    if args.preset == "legacy" and any(getattr(args, name) is not None for name in ARCHITECTURE_FLAGS):
        parser.error("--preset legacy is the original, layer for layer: its sizes cannot be changed")
    for name in (name for name in ARCHITECTURE_FLAGS if name != "core_dropout" and getattr(args, name) is not None):
        sizes, least = getattr(args, name), 0 if name.endswith("_blocks") else 1
        if min(sizes if isinstance(sizes, list) else [sizes]) < least:
            parser.error(f"--{name} must be at least {least}")
    for name in ("joint_share", "core_dropout"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} must be from 0 to 1")
    if args.num_workers is not None and not 0 <= args.num_workers <= MOST_WORKERS:
        parser.error(f"--num_workers must be from 0 to {MOST_WORKERS}")


def settings_of(args: argparse.Namespace) -> dict:
    """Return every setting of a run except its folders, as stored in checkpoints."""
    return {name: value for name, value in vars(args).items() if name not in FOLDER_FLAGS}


def changed_settings(before: dict, now: dict) -> list[str]:
    """List the settings that differ although they may not when a run is continued, in words to print."""
    return [
        f"--{name} ({before.get(name)} then, {value} now)"
        for name, value in now.items()
        if name not in FREE_ON_RESTART and before.get(name) != value
    ]
