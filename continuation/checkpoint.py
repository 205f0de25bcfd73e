"""Checkpoints: save, load, random states, devices.

    checkpoint.save("checkpoints/best.pt", state)
    state = checkpoint.load("checkpoints/best.pt")

A checkpoint is one file of plain types and CPU tensors that `torch.load(path, weights_only=True)` reads. Keys of a
run's: format, config, weights, ema, optimiser, scheduler, scaler, stage (1 or 2), step, rng, sampler, early_stop,
evaluated_at, interval, cached_by, data_meta, settings, processes, command, versions, checksum. Of a network alone:
format, config, ema, stage, step, data_meta, versions, checksum.
"""

import errno
import functools
import hashlib
import io
import os
import platform
import re
import struct
import subprocess
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from continuation import equaliser, files
from continuation.cli import UsageError, one_line, print_note

FORMAT_VERSION = 11  # docs/experiments.md says what each one changed
OLDEST_FORMAT = 10  # that is still read: see add_equaliser
LAST_NAME = "last.pt"
BEST_NAME = "best.pt"
NETWORK_KEYS = {"config": dict, "ema": dict, "stage": int, "step": int}  # keys that every checkpoint has
RUN_KEYS = {  # further keys of one that a run can be continued from, nested
    "weights": dict,
    "optimiser": {"state": dict, "param_groups": list},
    "scheduler": {"seconds": {1: float, 2: float}},
    "scaler": dict,
    "rng": {"torch": torch.Tensor, "cuda": list},
    "sampler": {"item": int},
    "early_stop": {"best": float, "since": int, "skipped": int},
    "evaluated_at": (int, type(None)),
    "settings": {"stage1_steps": int, "stage2_steps": int},
    "processes": int,
}
LATER_RUN_KEYS = {  # keys that files of earlier versions lack
    "interval": {"phase": str, "loss": float, "steps": int},
    "cached_by": (str, type(None)),
}
FOREIGN_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
RETRY_WAITS_SECONDS = (2, 10)  # a full disk or a network file system often recovers within seconds


class DamagedError(UsageError):
    """The file is torn, truncated, bit-flipped, or was never a checkpoint."""


# Save and load


def save(path, state: dict, keep: int = 1) -> None:
    """Write `state` to `path` atomically: a complete checkpoint is there at every moment.

    state: plain types and tensors only (TypeError otherwise); format and checksum are added here.
    keep: number of files to keep. With 2, the previous file becomes NAME.1.pt, and so on.
    Raises OSError when the disk is full or the folder missing in all of a few attempts. The checkpoint is serialised
    in memory first, since a full disk is an error in a plain write, but may crash torch's zip writer.
    """
    path = Path(path)
    state = _plain({**state, "format": FORMAT_VERSION})
    state["checksum"] = _checksum(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    for wait in (*RETRY_WAITS_SECONDS, None):
        try:
            return _write(path, buffer.getbuffer(), keep)
        except OSError as error:
            if wait is None:
                raise OSError(error.errno, f"cannot save the checkpoint: {error.strerror}", str(path)) from error
            print_note(f"warning: cannot save {path} ({error.strerror}), trying again in {wait} s")
            time.sleep(wait)


def load(path) -> dict:
    """Read a checkpoint onto the CPU, after verifying its checksum; nothing in the file is executed.

    Raises DamagedError for a file that is not a whole checkpoint, UsageError for one that is missing or
    has another format, OSError when the disk itself cannot be read.
    """
    if not Path(path).is_file():  # opening a named pipe would block
        raise UsageError(f"there is no checkpoint {path}")
    with open(path, "rb") as file:
        state = _verified(file)
    if state is None:
        raise DamagedError(f"{path} is damaged or is not a checkpoint of this project")
    if state["format"] > FORMAT_VERSION:
        raise UsageError(
            f"{path} has checkpoint format {state['format']}, newer than this program's {FORMAT_VERSION}: "
            f"update the program"
        )
    if state["format"] < OLDEST_FORMAT:
        raise UsageError(
            f"{path} has checkpoint format {state['format']}, older than this program's {OLDEST_FORMAT}: its "
            f"network was another one; use the version that wrote it (commit {_commit(state)}), or train again"
        )
    return state


def check_network(path, state: dict) -> None:
    """Raise UsageError, naming the file, unless it has weights, stage, step and songs of valid types; model.py checks
    its config. Networks of format 10 get the equaliser that they lack."""
    for key, kind in NETWORK_KEYS.items():
        if type(state.get(key)) is not kind:
            raise UsageError(f"{path} is no checkpoint of a network: {key!r} is missing or of another type")
    if state["stage"] not in (1, 2) or state["step"] < 0:
        raise UsageError(f"{path} is no checkpoint of a network: there is no such stage or step")
    if not _are_weights(state["ema"]) or not isinstance(state.get("settings", {}), dict):
        raise UsageError(f"{path} is no checkpoint of a network: its weights or its settings are damaged")
    meta = state.get("data_meta", {})
    songs = meta.get("songs", []) if isinstance(meta, dict) else None
    if not isinstance(songs, list) or not all(map(_is_song, songs)):
        raise UsageError(f"{path} is no checkpoint of a network: its list of songs is damaged")
    if state["format"] == 10 and state["config"].get("preset") != "legacy":
        add_equaliser(state)


def add_equaliser(state: dict) -> None:
    """Add an untrained equaliser, which changes nothing, to the weights of a checkpoint that has none."""
    weights = {f"core.equaliser.{name}": value for name, value in equaliser.untrained_weights().items()}
    for name in ("weights", "ema"):
        if type(state.get(name)) is dict:
            state[name] = {**weights, **state[name]}


def check_run(path, state: dict) -> None:
    """Raise UsageError, naming the file, unless a network's checkpoint has everything needed to continue its run."""
    for key, kind in (RUN_KEYS | {key: kind for key, kind in LATER_RUN_KEYS.items() if key in state}).items():
        if not _has_type(state.get(key), kind):
            raise UsageError(f"{path} cannot be continued: {key!r} is missing or of another type")
    if not _are_weights(state["weights"]):
        raise UsageError(f"{path} cannot be continued: its weights are damaged")


def load_optimiser(optimiser: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimiser's saved state; ValueError for one of other parameters."""
    types = _group_types(optimiser)
    optimiser.load_state_dict(state)
    if _group_types(optimiser) != types:
        raise ValueError("its optimiser has settings of other types")
    for parameter, values in optimiser.state.items():
        for value in values.values():
            is_tensor = isinstance(value, torch.Tensor)
            if value.shape not in (parameter.shape, ()) if is_tensor else type(value) is not int:
                raise ValueError("its optimiser is not of these parameters")


def network_alone(state: dict) -> dict:
    """Return the part of a checkpoint that generation and evaluation need: config, EMA weights in half precision
    (loading casts them back), songs and versions, without optimiser and other state of the training.

    Raises UsageError for weights that half precision cannot hold.
    """
    ema = {name: x.half() if x.is_floating_point() else x for name, x in state["ema"].items()}
    if too_large := [name for name, x in ema.items() if not x.isfinite().all()]:
        raise UsageError(f"{too_large[0]} has values that half precision cannot hold")
    kept = ("config", "stage", "step", "data_meta", "versions")
    return {key: state[key] for key in kept if key in state} | {"ema": ema}


def save_last(folder, state: dict, keep: int = 2) -> None:
    """Write `folder`/last.pt and keep the previous `keep` - 1 checkpoints as last.1.pt and so on."""
    save(Path(folder) / LAST_NAME, state, keep)


def load_last(folder) -> dict | None:
    """Load the newest undamaged last.pt of a folder; None where there is none yet.

    A damaged one is renamed to NAME.damaged, so that the next save does not rotate it over an undamaged one, and the
    previous one is used with a warning. Raises UsageError when all are damaged.
    """
    damaged = []
    for _, path in _kept_files(Path(folder) / LAST_NAME):
        try:
            state = load(path)
        except DamagedError as error:
            print_note(f"warning: {error}; looking for the one before it")
            damaged.append(path)
            continue
        for bad in damaged:
            bad.replace(f"{bad}.damaged")
        if damaged or path.name != LAST_NAME:
            print_note(f"warning: continuing from {path}, step {state.get('step')}")
        return state
    if damaged:
        raise UsageError(f"every checkpoint in {folder} is damaged: {', '.join(p.name for p in damaged)}")
    return None


def refuse_remains(folder: Path) -> None:
    """Raise UsageError for a folder of a run without its last.pt: a new run would overwrite what is left of it."""
    if left := [name for name in ("best.pt", "stage1.pt", "metrics.jsonl") if os.path.lexists(folder / name)]:
        raise UsageError(
            f"{folder} holds {', '.join(left)} of a run, but no last.pt to continue it from: put its last.pt back, "
            f"or train into another --checkpoint_folder, where --stage1_from takes over a stage1.pt"
        )


def find(path: str, *names: str) -> Path:
    """Return the file that a flag names, or the first of `names` that is in its folder."""
    if os.path.isfile(path):
        return Path(path)
    return next((Path(path) / name for name in names if (Path(path) / name).exists()), Path(path) / names[0])


def misfit(what: str, error: Exception) -> UsageError:
    """Make the UsageError for contents of `what` that led to one of FOREIGN_ERRORS."""
    reason = one_line(str(error).splitlines()[0] if str(error) else type(error).__name__)
    return UsageError(f"{what} does not fit this version of the network: {reason:.300}")


def shapes(weights: dict) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a state_dict by name."""
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


@functools.cache  # the commit that was loaded, whatever is checked out while a training runs
def versions() -> dict:
    """Return the library versions and the project's git commit, on which results depend."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "commit": commit or "unknown",
    }


def _has_type(value, kind) -> bool:
    """Return whether a value is of a type, or of one of several; for a dict of types, whether its values are."""
    if isinstance(kind, dict):
        return type(value) is dict and all(_has_type(value.get(key), inner) for key, inner in kind.items())
    return type(value) in (kind if isinstance(kind, tuple) else (kind,))


def _are_weights(values: dict) -> bool:
    return all(type(name) is str and isinstance(value, torch.Tensor) for name, value in values.items())


def _group_types(optimiser: torch.optim.Optimizer) -> list[dict]:
    """Return the types of the optimiser's settings by group."""

    def types(value):
        return [types(item) for item in value] if isinstance(value, tuple) else type(value)

    return [
        {key: types(value) for key, value in group.items() if key != "params"} for group in optimiser.param_groups
    ]


def _is_song(song) -> bool:
    return isinstance(song, dict) and all(isinstance(song.get(key), str) for key in ("id", "split"))


def _commit(state: dict) -> str:
    """Return the commit that wrote a checkpoint of an older format, 'unknown' where it names none."""
    versions = state.get("versions")
    commit = versions.get("commit") if isinstance(versions, dict) else None
    return commit if isinstance(commit, str) and re.fullmatch("[0-9a-f]{7,64}", commit) else "unknown"


def _plain(value):
    """Copy nested plain types and tensors, on the CPU and without subclasses; TypeError for the rest.

    Types are compared exactly: numpy.float64 is a float to isinstance, but weights_only refuses to load it.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        return tensor if _is_whole(tensor) else tensor.clone()  # torch.save writes the whole storage of a view
    if isinstance(value, dict):
        if not all(type(key) in (int, str) for key in value):
            raise TypeError("a checkpoint's keys must be text or whole numbers")
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    raise TypeError(f"a checkpoint holds plain types and tensors only, not {type(value).__name__}")


def _is_whole(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is its whole storage, neither a view of a part nor expanded."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _checksum(state: dict) -> str:
    """Compute the SHA-256 over everything in `state` but its checksum: structure, types, values, tensors' bytes.

    It covers the content and not the file, so that it can be stored inside and torch.load reads the file directly.
    """
    digest = hashlib.sha256()

    def add(value):
        digest.update(f"{type(value).__name__}:".encode())
        if isinstance(value, torch.Tensor):
            if not _is_whole(value):
                raise ValueError("a tensor that takes more memory than its file")
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, (dict, list, tuple)):
            digest.update(f"{len(value)};".encode())
            for item in value.items() if isinstance(value, dict) else value:
                add(item)
        elif isinstance(value, float):
            digest.update(struct.pack("<d", value))
        else:
            text = str(value).encode("utf-8", "surrogatepass")
            digest.update(f"{len(text)};".encode() + text)

    add({key: value for key, value in state.items() if key != "checksum"})
    return digest.hexdigest()


def _verified(file) -> dict | None:
    """Read the checkpoint in an open file; None unless it is one of this project with a valid checksum."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about invalid files, for which `load` raises an error
            if _unpacked_size(file) > os.fstat(file.fileno()).st_size:  # compressed: it may fill the memory
                return None
            state = torch.load(file, map_location="cpu", weights_only=True)
        is_ours = isinstance(state, dict) and type(state["format"]) is int and 0 < state["format"] < 2**31
        return state if is_ours and state["checksum"] == _checksum(state) else None
    except OSError as error:
        if error.errno == errno.EINVAL:  # a seek to nowhere: the file, not the disk
            return None
        raise
    except Exception:  # flipped bits reach torch's readers as nearly any exception
        return None


def _unpacked_size(file) -> int:
    """Return the unpacked size in bytes of a checkpoint's zip archive; zipfile.BadZipFile where it is none."""
    with zipfile.ZipFile(file) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    file.seek(0)
    return size


def _write(path: Path, payload, keep: int) -> None:
    with files.replacing(path) as file:
        file.write(payload)
        files.sync(file)  # a disk that is full leaves all that is there in its place
        _shift(path, keep)
    files.sync_folder(path.parent)


def _shift(path: Path, keep: int) -> None:
    """Rename NAME.pt to NAME.1.pt and so on; the oldest beyond `keep` is overwritten."""
    if not path.exists():  # stopped between shift and rename: shifting again would drop a good one
        return
    for index, old in reversed(_kept_files(path)):
        if index + 1 < keep:
            os.replace(old, path.with_suffix(f".{index + 1}.pt"))
        elif index >= keep:
            old.unlink()


def _kept_files(path: Path) -> list[tuple[int, Path]]:
    """List (0, NAME.pt), (1, NAME.1.pt) ... of those that exist, newest first."""
    pattern = re.compile(rf"{re.escape(path.stem)}(?:\.(\d+))?\.pt")
    matches = ((pattern.fullmatch(file.name), file) for file in path.parent.iterdir())
    return sorted((int(match[1] or 0), file) for match, file in matches if match)


def read_records(path: Path) -> list[dict]:
    """Read the lines of metrics.jsonl, each with its stage and step, without damaged ones, as left by a crash."""
    records = filter(None, files.read_jsonl(path))
    return [record for record in records if all(type(record.get(key)) is int for key in ("stage", "step"))]


# Random states


def rng_state() -> dict:
    """Return the states of torch's global generators, on CPU and CUDA; no other global generator is used."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    """Restore the states of `rng_state`; those of CUDA only on a machine with as many devices."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


# Device and precision


def choose_device(name: str) -> torch.device:
    """Return the device 'cpu', 'cuda', or 'auto' (CUDA where available); UsageError where it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has no CUDA device that torch can use")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype for autocast, None for fp32. 'auto' is fp32 on the CPU, and on CUDA bf16 where it is native.

    Emulated bf16 (as on a T4) does not count: it is slower than fp16.
    """
    if name != "auto":
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cpu":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
