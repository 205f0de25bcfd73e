"""Checkpoints survive disks, kills and damage."""

import dataclasses
import errno
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from continuation import checkpoint, files
from continuation.cli import UsageError
from model import PRESETS, ContinuationModel, build_model, load_checkpoint, load_model

PROJECT = Path(__file__).resolve().parent.parent
unix_only = pytest.mark.skipif(os.name == "nt", reason="needs fork, fcntl and kill")


def small_state(step=1):
    generator = torch.Generator().manual_seed(step)
    return {
        "stage": 1,
        "step": step,
        "weights": {
            "a": torch.randn(3, 5, generator=generator),
            "b": torch.tensor(2.5, dtype=torch.bfloat16),
        },
        "optimiser": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]},
        "early_stop": {"best": float("inf"), "bad": 0, "on": True, "note": None},
        "rng": checkpoint.rng_state(),
        "command": ["train.py", "--dataset_folder", "Ä b"],
    }


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)


# ---- save and load ----


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


@pytest.mark.parametrize(("later", "words"), [(1, "newer than"), (-1, "older than .*commit unknown")])
def test_another_format_is_refused_and_not_called_damaged(tmp_path, monkeypatch, later, words):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", checkpoint.FORMAT_VERSION + later)
        checkpoint.save_last(tmp_path, small_state())
    with pytest.raises(UsageError, match=words) as caught:
        checkpoint.load_last(tmp_path)
    assert not isinstance(caught.value, checkpoint.DamagedError)
    assert os.listdir(tmp_path) == ["last.pt"]


def test_network_of_an_earlier_day_is_refused_with_the_version_that_wrote_it():
    """Its core predicted no levels, and its mixer had weights."""
    file = Path(__file__).parent / "files" / "checkpoint-format-8.pt"
    with pytest.raises(UsageError, match=r"format 8, older than .*commit [0-9a-f]{40}") as caught:
        load_model(file)
    assert not isinstance(caught.value, checkpoint.DamagedError)


# ---- damage ----


def test_truncated_file_is_refused_at_every_length(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, small_state())
    whole = path.read_bytes()
    for length in [0, 1, 4, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(checkpoint.DamagedError, match=r"a\.pt is damaged or is not a checkpoint"):
            checkpoint.load(path)


def test_flipped_bit_is_refused_or_touches_nothing(tmp_path):
    """A flip in the zip's padding or dates changes no content; every other one must be refused."""
    path = tmp_path / "a.pt"
    checkpoint.save(path, small_state())
    whole, original = path.read_bytes(), checkpoint.load(path)
    draw, refused = random.Random(0), 0
    for _ in range(150):
        broken = bytearray(whole)
        broken[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        try:
            assert_same(checkpoint.load(path), original)
        except checkpoint.DamagedError:
            refused += 1
    assert refused > 50


def test_flipped_weight_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    weights = torch.full((1000,), 1.2345)
    checkpoint.save(path, {"weights": weights})
    broken = bytearray(path.read_bytes())
    broken[broken.index(weights.numpy().tobytes()) + 2001] ^= 1
    path.write_bytes(broken)
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.load(path)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("write", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_code_in_a_checkpoint_is_never_executed(tmp_path, write):
    marker = tmp_path / "executed"
    write({"format": 1, "checksum": "", "weights": Bomb(marker)}, tmp_path / "bomb.pt")
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.load(tmp_path / "bomb.pt")
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint\n" * 50, pickle.dumps([1, 2])])
def test_what_never_was_a_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.load(tmp_path / "a.pt")


def test_other_peoples_torch_file_is_refused(tmp_path):
    for number, other in enumerate([torch.ones(3), {"weights": torch.ones(3)}, {"format": 1, "checksum": "0"}]):
        torch.save(other, tmp_path / f"{number}.pt")
        with pytest.raises(checkpoint.DamagedError):
            checkpoint.load(tmp_path / f"{number}.pt")


# ---- hostile files ----


def network_state(**config):
    """The least that a checkpoint of a network has; only the network itself is missing."""
    values = dataclasses.asdict(PRESETS["tiny"]) | config
    return {"config": values, "ema": {}, "stage": 2, "step": 5}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preset", "huge"),
        ("preset", "tiny\x1b[31m\n# heading"),
        ("preset", 7),
        ("objective", "=1+1"),
        ("objective", None),
        ("sample_rate", 0),
        ("sample_rate", -12000),
        ("sample_rate", 12000.0),
        ("sample_rate", 10**12),
        ("channels", 0),
        ("channels", True),
        ("chunk_samples", 0),
        ("chunk_samples", 10**4000),
        ("latent_channels", "32"),
        ("encoder_widths", (128, -128)),
        ("encoder_widths", 128),
        ("encoder_blocks", (10**7, 10**7)),
        ("decoder_widths", [128, 128]),
        ("decoder_blocks", (2, 2, 2)),
        ("core_layers", 10**7),
        ("core_width", 10**9),
        ("core_heads", 0),
        ("core_dropout", float("nan")),
        ("core_dropout", "0"),
        ("latents_per_token", 0),
        ("a\nb\x1b", 1),
        (3, 1),
    ],
)
def test_config_of_no_network_is_refused_in_one_plain_sentence(tmp_path, field, value):
    state = network_state()
    state["config"][field] = value
    checkpoint.save(tmp_path / "best.pt", state)
    with pytest.raises(UsageError) as caught:
        load_checkpoint(tmp_path / "best.pt")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("key", checkpoint.NETWORK_KEYS)
def test_checkpoint_without_what_every_network_has_is_refused_by_name(tmp_path, key):
    missing = network_state()
    del missing[key]
    for state in (missing, network_state() | {key: [1]}):
        checkpoint.save(tmp_path / "best.pt", state)
        with pytest.raises(UsageError, match=rf"best\.pt is no checkpoint of a network: '{key}'"):
            load_model(tmp_path / "best.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"stage": 3},
        {"step": -1},
        {"step": True},
        {"data_meta": [1]},
        {"data_meta": {"songs": [{"id": 1, "split": "train"}]}},
    ],
)
def test_stage_step_and_songs_that_cannot_be_are_refused(tmp_path, change):
    checkpoint.save(tmp_path / "best.pt", network_state() | change)
    with pytest.raises(UsageError, match="is no checkpoint of a network"):
        load_checkpoint(tmp_path / "best.pt")


@pytest.mark.parametrize(
    "versions", [None, 7, [1], {"commit": [1]}, {"commit": "\x1b[31m\nerror"}, {"commit": "a" * 999}]
)
def test_older_format_with_strange_versions_is_refused_in_one_plain_sentence(tmp_path, monkeypatch, versions):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", checkpoint.FORMAT_VERSION - 1)
        checkpoint.save(tmp_path / "best.pt", {"versions": versions, "config": 3})
    with pytest.raises(UsageError, match="commit unknown") as caught:
        checkpoint.load(tmp_path / "best.pt")
    assert str(caught.value).isprintable()


@unix_only
def test_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "best.pt")
    os.mkfifo(tmp_path / "last.pt")
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UsageError, match=r"there is no checkpoint .*best\.pt"):
        checkpoint.load(tmp_path / "best.pt")
    with pytest.raises(UsageError, match=r"there is no checkpoint .*last\.pt"):
        checkpoint.load_last(tmp_path)
    assert checkpoint.read_records(tmp_path / "metrics.jsonl") == []


def write_packed(path):
    """A file of 0.1 MB that torch would unpack to 100 MB of zeros."""
    torch.save({"format": checkpoint.FORMAT_VERSION, "checksum": "", "x": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, bytes(100_000_000) if name.endswith("/data/0") else content)


def write_repeating(path):
    """A file of one number that is read as a tensor of 2 GB."""
    x = torch.zeros(1).expand(500_000_000)
    torch.save({"format": checkpoint.FORMAT_VERSION, "checksum": "", "x": x}, path)


@pytest.mark.slow
@unix_only
def test_file_that_unfolds_takes_no_memory_before_it_is_refused(tmp_path):
    write_packed(tmp_path / "packed.pt")
    write_repeating(tmp_path / "repeating.pt")
    code = (
        "import resource, sys\n"
        "from continuation import checkpoint\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\n"
        "for path in sys.argv[1:]:\n"
        "    try: checkpoint.load(path)\n"
        "    except checkpoint.DamagedError: print(peak() - before)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "packed.pt"), str(tmp_path / "repeating.pt")]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True)
    megabytes = [float(line) for line in done.stdout.splitlines()]
    assert len(megabytes) == 2
    assert max(megabytes) < 60


@pytest.mark.parametrize(
    "config",
    [
        {"core_layers": 256, "core_width": 12288},
        {"core_layers": 9},
        {"decoder_blocks": (4, 256)},
        {"encoder_widths": (1024, 512)},
        dataclasses.asdict(PRESETS["large"]),
    ],
    ids=["core", "layers", "blocks", "widths", "large"],
)
def test_network_that_is_larger_than_its_file_is_refused_before_it_is_made(tmp_path, monkeypatch, config):
    def on_meta_alone(config):
        if torch.get_default_device().type != "meta":
            pytest.fail("it was made")
        return ContinuationModel(config)

    monkeypatch.setattr("model.ContinuationModel", on_meta_alone)
    checkpoint.save(tmp_path / "best.pt", network_state(**config))
    with pytest.raises(UsageError, match="not those of its sizes"):
        load_model(tmp_path / "best.pt")


# ---- full disks and kills ----


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


# ---- rotation ----


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


# ---- network ----


def test_loaded_model_has_the_ema_weights_and_gives_the_same_output(tmp_path):
    config = dataclasses.replace(PRESETS["tiny"], core_layers=1)
    torch.manual_seed(0)
    model, other = ContinuationModel(config).eval(), ContinuationModel(config)
    state = {"config": dataclasses.asdict(config), "weights": other.state_dict(), "ema": model.state_dict()}
    checkpoint.save(tmp_path / "best.pt", state | {"stage": 2, "step": 5})
    loaded = load_model(tmp_path / "best.pt")
    x = torch.randn(1, config.channels, config.sample_rate)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded.reconstruct(x), model.reconstruct(x))


@pytest.mark.parametrize("change", [{"config": {"no_such_field": 1}}, {"ema": {}}, {"config": None}])
def test_checkpoint_of_another_network_is_refused(change):
    config = dataclasses.replace(PRESETS["tiny"], core_layers=1)
    state = {"config": dataclasses.asdict(config), "ema": ContinuationModel(config).state_dict(), **change}
    with pytest.raises(UsageError, match="does not fit"):
        build_model(state)


def test_versions_are_plain_and_name_the_libraries(tmp_path):
    found = checkpoint.versions()
    assert found["torch"] == str(torch.__version__) and found["numpy"] == np.__version__
    checkpoint.save(tmp_path / "a.pt", {"versions": found})


# ---- random states ----


def test_restored_random_states_repeat_the_same_draws(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"rng": checkpoint.rng_state()})

    first = torch.randn(3)
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "a.pt")["rng"])
    assert torch.equal(torch.randn(3), first)


# ---- device and precision ----


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
