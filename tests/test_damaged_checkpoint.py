"""Damaged and hostile checkpoints are refused in one sentence; nothing in them is executed or unfolded."""

import dataclasses
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from states import assert_same, small_state

from continuation import checkpoint
from continuation.cli import UsageError
from model import PRESETS, ContinuationModel, load_checkpoint, load_model

PROJECT = Path(__file__).resolve().parent.parent
unix_only = pytest.mark.skipif(os.name == "nt", reason="needs fork, fcntl and kill")


# Damage


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


# Hostile files


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
        patch.setattr(checkpoint, "FORMAT_VERSION", checkpoint.OLDEST_FORMAT - 1)
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
