"""Checkpoints survive full disks, kills and their own damage, and give back what was saved."""

import dataclasses
import errno
import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_networks import RATE, noise, small_network, untrained_network
from states import assert_same, small_state

from continuation import checkpoint, files
from continuation.cli import UsageError
from model import build_model, load_model

unix_only = pytest.mark.skipif(os.name == "nt", reason="needs fork, fcntl and kill")


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)


# Save and load


def test_round_trip_keeps_every_type_and_bit(tmp_path):
    state = small_state()
    checkpoint.save(tmp_path / "a.pt", state)
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert loaded.pop("format") == checkpoint.FORMAT_VERSION
    assert len(loaded.pop("checksum")) == 64
    assert_same(loaded, state)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_file_is_read_directly_by_torch_load_with_weights_only(tmp_path):
    checkpoint.save(tmp_path / "a.pt", small_state())
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(loaded["weights"]["a"], small_state()["weights"]["a"])


def test_loaded_state_can_be_saved_again(tmp_path):
    checkpoint.save(tmp_path / "a.pt", small_state())
    loaded = checkpoint.load(tmp_path / "a.pt")
    checkpoint.save(tmp_path / "b.pt", {**loaded, "step": 9})
    assert checkpoint.load(tmp_path / "b.pt")["step"] == 9


def test_optimiser_scheduler_and_scaler_states_are_plain(tmp_path):
    layer = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5**step)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    layer(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    scheduler.step()
    parts = {"optimiser": optimiser, "scheduler": scheduler, "scaler": scaler, "weights": layer}
    state = {name: part.state_dict() for name, part in parts.items()}
    checkpoint.save(tmp_path / "a.pt", state)
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert_same(loaded["optimiser"], state["optimiser"])
    assert loaded["scheduler"]["last_epoch"] == 1
    assert loaded["scaler"]["scale"] == 8.0
    assert torch.equal(loaded["weights"]["bias"], layer.bias)


def test_view_of_a_large_tensor_does_not_save_the_large_tensor(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"x": torch.zeros(1_000_000)[:10]})
    assert (tmp_path / "a.pt").stat().st_size < 10_000


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(3), Path("a"), {1, 2}, object(), {(1, 2): 3}])
def test_anything_but_plain_types_and_tensors_is_a_type_error(tmp_path, value):
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path / "a.pt", {"nested": [{"value": value}]})
    assert os.listdir(tmp_path) == []


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"there is no checkpoint .*none\.pt"):
        checkpoint.load(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("number", "words"),
    [(checkpoint.FORMAT_VERSION + 1, "newer than"), (checkpoint.OLDEST_FORMAT - 1, "older than .*commit unknown")],
)
def test_another_format_is_refused_and_not_called_damaged(tmp_path, monkeypatch, number, words):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", number)
        checkpoint.save_last(tmp_path, small_state())
    with pytest.raises(UsageError, match=words) as caught:
        checkpoint.load_last(tmp_path)
    assert not isinstance(caught.value, checkpoint.DamagedError)
    assert os.listdir(tmp_path) == ["last.pt"]


def test_network_of_an_earlier_day_is_refused_with_the_version_that_wrote_it():
    """Its mixer had weights."""
    file = Path(__file__).parent / "files" / "checkpoint-format-8.pt"
    with pytest.raises(UsageError, match=r"format 8, older than .*commit [0-9a-f]{40}") as caught:
        load_model(file)
    assert not isinstance(caught.value, checkpoint.DamagedError)


def test_network_of_format_10_gets_an_equaliser_that_changes_nothing():
    model = load_model(Path(__file__).parent / "files" / "checkpoint-format-10.pt")
    assert not model.core.equaliser.to_correction.weight.any()
    assert not model.core.equaliser.to_correction.bias.any()


# Full disks and kills


def fail_with_enospc(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullFile:
    """A file whose disk fills up halfway through the write."""

    def __init__(self, path, mode):
        self.file = open(path, mode)  # noqa: SIM115 (closed by its user)
        self.fileno, self.close = self.file.fileno, self.file.close

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        fail_with_enospc()


FAULTS = {
    "open": lambda patch: patch.setattr(files, "open", fail_with_enospc, raising=False),
    "write": lambda patch: patch.setattr(files, "open", FullFile, raising=False),
    "fsync": lambda patch: patch.setattr(checkpoint.os, "fsync", fail_with_enospc),
    "rename": lambda patch: patch.setattr(checkpoint.os, "replace", fail_with_enospc),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_full_disk_leaves_the_old_checkpoints_whole_and_no_rest(tmp_path, monkeypatch, no_waiting, fault):
    for step in (1, 2):
        checkpoint.save_last(tmp_path, small_state(step))
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        with pytest.raises(OSError, match="cannot save the checkpoint: No space left") as caught:
            checkpoint.save_last(tmp_path, small_state(3))
    assert caught.value.errno == errno.ENOSPC
    assert sorted(os.listdir(tmp_path)) == ["last.1.pt", "last.pt"]
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 2
    assert checkpoint.load(tmp_path / "last.1.pt")["step"] == 1


def test_disk_that_recovers_is_tried_again(tmp_path, monkeypatch, no_waiting, capsys):
    real, calls = os.fsync, []

    def full_once(handle):
        calls.append(handle)
        return fail_with_enospc() if len(calls) == 1 else real(handle)

    monkeypatch.setattr(checkpoint.os, "fsync", full_once)
    checkpoint.save_last(tmp_path, small_state())
    assert "No space left on device), trying again in 2 s" in capsys.readouterr().err
    assert checkpoint.load_last(tmp_path)["step"] == 1


def test_failed_rename_and_its_retries_never_drop_the_only_whole_checkpoint(tmp_path, monkeypatch, no_waiting):
    checkpoint.save_last(tmp_path, small_state(1))
    real = os.replace

    def fail_into_place(source, target):
        return fail_with_enospc() if Path(target).name == "last.pt" else real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", fail_into_place)
        with pytest.raises(OSError):
            checkpoint.save_last(tmp_path, small_state(2))
    assert checkpoint.load_last(tmp_path)["step"] == 1


def test_folder_gone_is_an_os_error(tmp_path, no_waiting):
    with pytest.raises(OSError, match="cannot save the checkpoint: No such file"):
        checkpoint.save(tmp_path / "gone" / "last.pt", small_state())


def with_file_size_limit(folder, bytes_limit):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_limit, bytes_limit))
    checkpoint.RETRY_WAITS_SECONDS = ()
    try:
        checkpoint.save_last(folder, small_state(2))
    except OSError as error:
        os._exit(41 if error.errno == errno.EFBIG else 1)


def wait_for(path):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def forked(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args, daemon=True)
    process.start()
    return process


@unix_only
def test_file_size_limit_of_the_system_leaves_the_old_checkpoint_whole(tmp_path):
    checkpoint.save_last(tmp_path, small_state(1))
    process = forked(with_file_size_limit, tmp_path, 5000)
    process.join()
    assert process.exitcode == 41
    assert os.listdir(tmp_path) == ["last.pt"]
    assert checkpoint.load_last(tmp_path)["step"] == 1


def save_for_ever(folder, first_step):
    for step in range(first_step, 1_000_000):
        checkpoint.save_last(folder, {"step": step, "weights": torch.full((20_000,), float(step))})
        (folder / "saved").write_text(str(step))


@pytest.mark.slow
@unix_only
def test_sigkill_at_any_moment_leaves_a_whole_checkpoint_no_older_than_the_last_saved(tmp_path):
    draw, saved, step = random.Random(0), tmp_path / "saved", 0
    for _ in range(15):
        saved.unlink(missing_ok=True)
        process = forked(save_for_ever, tmp_path, step + 1)
        wait_for(saved)  # not a fixed time: on a busy machine that would test its speed
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.join()
        state = checkpoint.load_last(tmp_path)
        # Between its two renames a kill loses the save in progress, never one that had returned.
        assert state["step"] >= max(step + 1, int(saved.read_text() or 0))
        assert torch.all(state["weights"] == state["step"])
        step = state["step"]


# Rotation


def test_two_newest_checkpoints_are_kept(tmp_path):
    for step in range(1, 5):
        checkpoint.save_last(tmp_path, small_state(step))
    assert sorted(os.listdir(tmp_path)) == ["last.1.pt", "last.pt"]
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4
    assert checkpoint.load(tmp_path / "last.1.pt")["step"] == 3


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keep_is_the_number_of_files_also_when_it_shrinks(tmp_path, keep):
    for step in range(1, 5):
        checkpoint.save_last(tmp_path, small_state(step), keep=4)
    checkpoint.save_last(tmp_path, small_state(5), keep=keep)
    steps = [checkpoint.load(path)["step"] for path in sorted(tmp_path.iterdir(), reverse=True)]
    assert sorted(steps, reverse=True) == [5, 4, 3][:keep]


def test_best_is_replaced_without_rotation(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path / checkpoint.BEST_NAME, small_state(step))
    assert os.listdir(tmp_path) == ["best.pt"]


def test_folder_without_a_checkpoint_has_no_last(tmp_path):
    assert checkpoint.load_last(tmp_path) is None


def test_damaged_last_falls_back_with_a_warning_and_is_never_rotated_over_the_whole_one(tmp_path, capsys):
    for step in (1, 2):
        checkpoint.save_last(tmp_path, small_state(step))
    last = tmp_path / "last.pt"
    last.write_bytes(last.read_bytes()[:-200])
    assert checkpoint.load_last(tmp_path)["step"] == 1
    warning = capsys.readouterr().err
    assert "last.pt is damaged" in warning and "last.1.pt, step 1" in warning
    checkpoint.save_last(tmp_path, small_state(3))
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3
    assert checkpoint.load(tmp_path / "last.1.pt")["step"] == 1


def test_all_damaged_is_refused_and_nothing_is_moved(tmp_path):
    for name in ("last.pt", "last.1.pt"):
        (tmp_path / name).write_bytes(b"torn")
    with pytest.raises(UsageError, match=r"every checkpoint .* is damaged: last\.pt, last\.1\.pt"):
        checkpoint.load_last(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["last.1.pt", "last.pt"]


# Network


def test_loaded_model_has_the_ema_weights_and_gives_the_same_output(tmp_path):
    model = small_network()
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state = {"config": dataclasses.asdict(model.config), "weights": zeros, "ema": model.state_dict()}
    checkpoint.save(tmp_path / "best.pt", state | {"stage": 2, "step": 5})
    loaded = load_model(tmp_path / "best.pt")
    x = noise(1, model.config.channels, RATE)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded.reconstruct(x), model.reconstruct(x))


@pytest.mark.parametrize("change", [{"config": {"no_such_field": 1}}, {"ema": {}}, {"config": None}])
def test_checkpoint_of_another_network_is_refused(change):
    model = untrained_network()
    state = {"config": dataclasses.asdict(model.config), "ema": model.state_dict(), **change}
    with pytest.raises(UsageError, match="does not fit"):
        build_model(state)


def test_versions_are_plain_and_name_the_libraries(tmp_path):
    found = checkpoint.versions()
    assert found["torch"] == str(torch.__version__) and found["numpy"] == np.__version__
    checkpoint.save(tmp_path / "a.pt", {"versions": found})


# Random states


def test_restored_random_states_repeat_the_same_draws(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"rng": checkpoint.rng_state()})

    first = torch.randn(3)
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "a.pt")["rng"])
    assert torch.equal(torch.randn(3), first)


# Device and precision


def test_missing_cuda_is_said_and_auto_takes_the_cpu_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = checkpoint.choose_device("auto")
    assert device == torch.device("cpu")
    assert checkpoint.choose_precision("auto", device) is None
    with pytest.raises(UsageError, match="no CUDA device"):
        checkpoint.choose_device("cuda")


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_precision_on_cuda_takes_bf16_only_where_it_is_native(monkeypatch, native, expected):
    def is_supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert checkpoint.choose_precision("auto", torch.device("cuda")) == expected
