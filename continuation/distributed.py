"""The processes of one training run: one per GPU, started by torchrun or srun, or a single one without either.

Every function also works without other processes, so that the training loop is the same in both cases. Only process
0, the main one, prints and writes; its decisions are broadcast to the others.
"""

import os
import sys
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from datetime import timedelta
from inspect import signature

import torch
import torch.distributed as dist
from torch import Tensor, nn

from continuation import signals
from continuation.cli import RunError, UsageError, environment_int

TIMEOUT = timedelta(minutes=30)  # longest wait, as while process 0 evaluates
LOST_PEER_WORDS = ("closed by peer", "reset by peer", "broken pipe", "timed out", "connection refused")


def environment() -> tuple[int, int, int]:
    """Return (rank, rank on this node, number of processes) from torchrun's or else srun's environment; (0, 0, 1)
    without either.

    A batch script without srun is one process, however many tasks its job has. Raises UsageError where the
    environment's values are no such numbers.
    """
    for names in (("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")):
        if all(name in os.environ for name in names):
            rank, local_rank = (environment_int(os.environ, name) for name in names[:2])
            return rank, local_rank, environment_int(os.environ, names[2], least=1)
    return 0, 0, 1


@contextmanager
def process_group(device: torch.device):
    """Join the other processes of this run, on this process's own GPU; all but process 0 print errors only.

    Raises UsageError without MASTER_ADDR and MASTER_PORT, RunError when another process has ended.
    """
    rank, local_rank, count = environment()
    if count == 1:
        yield
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"process {rank} of {count} is not told where they all meet: set {' and '.join(missing)}, the first "
            f"node's name and a free port of it, as slurm/train.sbatch does"
        )
    if device.type == "cuda":  # a task may see all GPUs of its node, or only its own
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, rank=rank, world_size=count, timeout=TIMEOUT)
        with nullcontext() if rank == 0 else redirect_stdout(None):
            yield
    except RuntimeError as error:
        is_lost = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in LOST_PEER_WORDS)
        if not is_lost:
            raise
        raise RunError(f"process {rank} of {count} has lost the others: {str(error).splitlines()[0]}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def leave(code: int) -> None:
    """End this program with its exit code, in spite of the TERM that srun and torchrun send to all processes after
    the first has ended. One of several processes exits at once, without the interpreter's shutdown, which gloo's
    threads sometimes abort."""
    signals.ignore("SIGTERM")
    with suppress(UsageError):  # already printed: the reason to leave
        if environment()[2] > 1:
            for stream in filter(None, (sys.stdout, sys.stderr)):  # None where the shell closed it
                stream.flush()
            os._exit(code)
    sys.exit(code)


def rank() -> int:
    """Return the number of this process, 0 in a single one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


class PhaseLoss(nn.Module):
    """Mean loss of a batch in a training phase, as the module that DistributedDataParallel requires."""

    no_sync = nullcontext  # without other processes there is nothing to exchange

    def __init__(self, phase, model: nn.Module):
        super().__init__()
        self.phase, self.model = phase, model

    def forward(self, batch: dict, step: int) -> Tensor:
        return self.phase.loss(self.model, batch, step)[0].mean()


def loss_module(phase, model: nn.Module) -> nn.Module:
    """Make the module of the phase's loss, whose gradients are averaged over all processes, except inside its
    `no_sync()`."""
    loss = PhaseLoss(phase, model)
    if world_size() == 1:
        return loss
    parallel = nn.parallel.DistributedDataParallel
    sync = "forward_sync_buffers" in signature(parallel).parameters  # as torch calls it from 2.13 on
    keep_buffers = {"forward_sync_buffers" if sync else "broadcast_buffers": False}
    # gradients are views of the communication buckets, so that they take memory once
    return parallel(loss, gradient_as_bucket_view=True, **keep_buffers)


def main_only(context):
    """Return `context` on process 0, a null context on the others."""
    return context if is_main() else nullcontext()


@contextmanager
def main_first():
    """Run the block on process 0 before the others, so that they find the files that it repairs."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def all_reduce_mean(x: Tensor) -> Tensor:
    """Average x over the processes."""
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / world_size()


def all_reduce_min(number: int, device: torch.device) -> int:
    """Return the smallest of the processes' numbers; device: the run's."""
    return min(all_gather(torch.tensor([number], device=device)).tolist())


def broadcast(x: Tensor) -> Tensor:
    """Return process 0's x; the others pass a tensor of the same shape and type."""
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x


def all_gather(x: Tensor) -> Tensor:
    """Concatenate the x of all processes along the first dimension."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def sync_step(loss: float, seconds: float, stop_requested: bool, device: torch.device) -> tuple[float, float, bool]:
    """Return, the same on all processes after a step, their mean loss, process 0's seconds, and whether any of them
    was asked to stop."""
    own = [loss, seconds if is_main() else 0.0, float(stop_requested)]
    mean_loss, mean_seconds, stopped = all_reduce_mean(torch.tensor(own, dtype=torch.float64, device=device)).tolist()
    return mean_loss, mean_seconds * world_size(), stopped > 0
