"""The latent cache of stage 2: whole or made again, and no context in it hears the future."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import synth
import torch
from tiny import CHANNELS, CHUNK, RATE, NotStopped

from continuation import audio, latent_encoding
from continuation.batches import WindowItems
from continuation.windows import Windows

# The cache


def arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "latents").glob("*.npy")}


@pytest.fixture
def filled(new_run, monkeypatch):
    """Fill the cache of stage 2, once more or for the first time, with flags: the variants that were encoded."""

    def fill(more: str = "") -> list[int]:
        run, encoded = new_run(more=more), []
        fill_variant = latent_encoding.fill_variant

        def note(state, windows, cache, variant, *given):
            encoded.append(variant)
            fill_variant(state, windows, cache, variant, *given)

        run.state.begin_stage(2)
        with monkeypatch.context() as patch:
            patch.setattr(latent_encoding, "fill_variant", note)
            run.fill_cache(NotStopped)
        return encoded

    return fill


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def damage_zeros_behind_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:128] + bytes(path.stat().st_size - 128))


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damage_gone(path: Path) -> None:
    path.unlink()


@pytest.fixture(scope="module")
def whole_cache(begin, tmp_path_factory) -> Path:
    """The folder of a run whose cache is filled."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = begin(folder)
    run.state.begin_stage(2)
    run.fill_cache(NotStopped)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("part", ["context", "outlook"])
@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_zeros, damage_zeros_behind_the_header, damage_bit, damage_gone]
)
def test_damaged_file_of_the_latent_cache_is_made_again(whole_cache, filled, tmp_path, capsys, part, damage):
    shutil.copytree(whole_cache, tmp_path / "run")
    damage(tmp_path / "run" / "latents" / f"{part}-1.npy")
    assert filled() == [1]
    assert f"{part}-1.npy is missing or damaged" in capsys.readouterr().err
    assert arrays(tmp_path / "run") == arrays(whole_cache)
    assert filled() == []


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"sha256": [1]}', b"\xff"])
def test_latent_cache_with_a_damaged_index_is_made_again(whole_cache, filled, tmp_path, content):
    shutil.copytree(whole_cache, tmp_path / "run")
    index = tmp_path / "run" / "latents" / "key.json"
    index.unlink() if content is None else index.write_bytes(content)
    assert filled() == [0, 1]


@pytest.mark.parametrize("exists", [True, False])
def test_latent_cache_behind_a_link_holds_the_latents_of_its_own_encoder(filled, tmp_path, exists):
    """The link may point at nothing, as to a scratch disk that was cleared; what else lies there stays."""
    scratch = tmp_path / "scratch"
    if exists:
        scratch.mkdir()
        (scratch / "notes.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latents").symlink_to(scratch)
    assert filled() == [0, 1]
    first = arrays(tmp_path / "run")
    assert filled("--seed 1") == [0, 1]
    assert not set(arrays(tmp_path / "run").values()) & set(first.values())
    assert filled() == [0, 1]
    assert arrays(tmp_path / "run") == first
    assert (scratch / "notes.txt").exists() == exists


# No future


def test_context_does_not_change_when_the_target_audio_is_replaced_by_noise(new_run):
    run = new_run()
    x = torch.from_numpy(run.windows["train"].pair(0))[None]
    other = torch.cat([x[..., :CHUNK], 0.1 * torch.randn(1, CHANNELS, CHUNK)], dim=-1)
    first, second = run.state.ema.encode_pair(x), run.state.ema.encode_pair(other)
    for part in ("context", "outlook"):
        assert torch.equal(first[part], second[part])
    assert not torch.equal(first["target"], second["target"])
    leaky = [run.state.ema.encode(audio)[..., : run.state.config.chunk_latents] for audio in (x, other)]
    assert not torch.equal(*leaky)  # cut out of the 20 s encoded together, they would have heard the future


def test_cached_context_does_not_change_when_the_target_audio_is_replaced_by_noise(new_run, monkeypatch):
    """Through the windows, the encoder and the cache, up to the batches that stage 2 trains on."""
    batches = []
    window = Windows.window
    for level in (0.0, 0.1):

        def noisy_future(self, pair, chunks, change, level=level):
            x = window(self, pair, chunks, change)
            x[:, CHUNK:] += synth.noise(pair, CHUNK / RATE, RATE, CHANNELS, level)
            return x

        monkeypatch.setattr(Windows, "window", noisy_future)
        run = new_run()
        run.open_cache().clear()
        run.state.begin_stage(2)
        run.fill_cache(NotStopped)
        batches.append(next(iter(run.loader(run.state.phases()[0]))))
    first, second = batches
    for part in ("context", "outlook"):
        assert torch.equal(first[part], second[part])
    assert not torch.equal(first["target"], second["target"])


def test_cached_pair_is_the_encoded_window_of_its_variant(new_run):
    run = new_run()
    run.state.begin_stage(2)
    run.fill_cache(NotStopped)
    for variant, pair in ((0, 0), (1, 6)):
        x = torch.from_numpy(WindowItems(run.windows["train"], variant, seed=0)[pair]["x"])[None]
        encoded = run.state.ema.encode_pair(x)
        for part, cached in run.open_cache().read(variant, pair).items():
            assert torch.allclose(torch.from_numpy(cached), encoded[part][0].float(), atol=4e-3), part


def test_both_phases_of_stage_2_read_the_same_pairs(new_run):
    run = new_run()
    run.state.begin_stage(2)
    run.fill_cache(NotStopped)
    predict, joint = (phase.items(run.windows["train"], run.open_cache()) for phase in run.state.phases())
    for item in (0, 5):
        assert all(np.array_equal(joint[item][name], value) for name, value in predict[item].items())


def test_validation_context_is_what_generation_would_hear(new_run, monkeypatch):
    run = new_run()
    row = run.windows["val"].split.rows[run.windows["val"].split.pairs[0, 0]]
    pair, _ = run.validation.encoded_pairs()[0]
    heard, encode_context = [], run.state.ema.encode_context

    def note(*given):
        heard.append(encode_context(*given))
        return heard[-1]

    monkeypatch.setattr(run.state.ema, "encode_context", note)
    run.state.ema.generate(audio.from_int16(row), seconds=0.1, steps=1)
    assert torch.allclose(pair["context"], heard[0].latents, atol=2e-3)
    assert torch.allclose(pair["outlook"], heard[0].outlook, atol=4e-3)
