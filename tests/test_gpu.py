"""What only a CUDA device can show: `python -m pytest -m gpu`. Skipped without one, and never run in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import synth
import torch
from tiny import NETWORK, write_dataset

from continuation import checkpoint, losses
from model import ContinuationModel, make_model, with_overrides

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SCRIPT = Path(__file__).with_name("run_quietly.py")
FLAGS = f"--preset tiny {NETWORK} --batch_size 2 --stage1_steps 6 --stage2_steps 6 --latent_variants 1 --device cuda"
PRECISIONS = ["fp32", "fp16", "bf16"]
DRAW = {"sample_rate": 12000, "size": 1024, "in_mid_side": True}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def model() -> ContinuationModel:
    torch.manual_seed(0)
    model = make_model(with_overrides("tiny")).eval()
    torch.nn.init.normal_(model.core.head.to_velocity.weight, std=0.02)
    return model


@pytest.fixture(scope="module")
def song() -> torch.Tensor:
    return torch.from_numpy(synth.song(0, 10, 12000))


def train(dataset: Path, folder: Path, more: str = "", processes: int = 1) -> subprocess.CompletedProcess:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [sys.executable, *(torchrun if processes > 1 else []), str(SCRIPT), *FLAGS.split(), *more.split()]
    words += ["--dataset_folder", str(dataset), "--checkpoint_folder", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)


def test_gpu_computes_what_the_cpu_computes(model, song, monkeypatch):
    """In fp32: by default cuDNN's convolutions round to 10 bits (TF32) on cards that can."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    cpu = model.reconstruct(song[None])
    model.cuda()
    try:
        gpu = model.reconstruct(song[None].cuda()).cpu()
        assert (gpu - cpu).square().mean() < 1e-6 * cpu.square().mean()
        first, again = (model.generate(song, 2, seed=1, steps=4) for _ in range(2))
        assert torch.equal(first, again)
    finally:
        model.cpu()
    assert (first - model.generate(song, 2, seed=1, steps=4)).square().mean() < 1e-3 * first.square().mean()


@pytest.fixture(scope="module")
def stage1(model, song) -> tuple[ContinuationModel, dict]:
    """A network some steps into stage 1, and its batch. An untrained one is so quiet that its gradient is nearly
    singular, and bf16 gives three quarters of it."""
    network = make_model(model.config).cuda()
    noise = torch.zeros(1, 32, 100, device="cuda")
    batch = {"x": song[None, :, :12000].cuda(), "posterior_noise": noise, "robust_noise": noise}
    optimiser = torch.optim.Adam([*network.encoder.parameters(), *network.decoder.parameters()], 1e-3)
    for _ in range(40):
        optimiser.zero_grad()
        losses.reconstruct_step(network, batch, DRAW)[0].mean().backward()
        optimiser.step()
    return network, batch


@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_and_gradients_of_every_precision_are_near_those_of_fp32(stage1, precision):
    """Of stage 1, whose spectra and norms must stay in fp32."""
    trained, batch = stage1
    found = {}
    for name in ("fp32", precision):
        network = make_model(trained.config).cuda()
        network.load_state_dict(trained.state_dict())
        dtype = checkpoint.choose_precision(name, torch.device("cuda"))
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            loss = losses.reconstruct_step(network, batch, DRAW)[0].mean()
        (1024 * loss).backward()
        gradients = [p.grad.flatten() / 1024 for p in network.parameters() if p.grad is not None]
        found[name] = loss.item(), torch.cat(gradients)
    (loss, gradient), (true_loss, true_gradient) = found[precision], found["fp32"]
    assert loss == pytest.approx(true_loss, rel=0.01)
    assert gradient.norm().item() == pytest.approx(true_gradient.norm().item(), rel=0.1)
    assert torch.cosine_similarity(gradient, true_gradient, dim=0) > 0.95


@pytest.mark.parametrize("precision", PRECISIONS)
def test_both_stages_train_and_go_on_in_every_precision(dataset, tmp_path, precision):
    assert train(dataset, tmp_path, f"--precision {precision}").returncode == 0
    done = train(dataset, tmp_path, f"--precision {precision} --stage2_steps 8")
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stdout


def test_compiled_network_trains(dataset, tmp_path):
    done = train(dataset, tmp_path, "--compile")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_two_gpus_train_one_network(dataset, tmp_path):
    done = train(dataset, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
