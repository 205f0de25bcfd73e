"""The network: its sizes and lengths are exact, `legacy` is the original, the table counts what is there."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from small_networks import CHUNK, noise, small_config, small_network, untrained_network
from torch import nn

from continuation import model_tables
from model import PRESETS, ModelConfig, make_model, on_meta, with_overrides

torch.set_num_threads(1)


# Presets and lengths


@pytest.mark.parametrize("sample_rate", [12000, 16000, 24000, 44100, 48000])
def test_ten_seconds_are_exactly_1000_latents_at_every_rate(sample_rate):
    config = small_config(sample_rate=sample_rate, channels=1, chunk_samples=10 * sample_rate)
    with torch.device("meta"):
        model = make_model(config)
        z = model.encode(torch.zeros(1, 1, 10 * sample_rate))
        y = model.decode(z)
    assert z.shape == (1, 4, 1000)
    assert y.shape == (1, 1, 10 * sample_rate)
    assert (config.chunk_latents, config.latent_rate) == (1000, 100)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_convolves_with_trainable_weights_and_pools_by_the_maximum(preset):
    with torch.device("meta"):
        model = make_model(PRESETS[preset])
        used = []
        for module in model.modules():
            module.register_forward_hook(lambda module, *_: used.append(module))
        model.reconstruct(torch.zeros(1, 2, PRESETS[preset].chunk_samples))
    convolutions = [module for module in used if isinstance(module, nn.Conv1d)]
    assert convolutions
    assert all(module.weight.requires_grad for module in convolutions)
    assert any(isinstance(module, nn.MaxPool1d) for module in used)


@pytest.mark.parametrize("preset", ["tiny", "base", "large"])
def test_no_preset_but_legacy_uses_a_transposed_convolution(preset):
    with torch.device("meta"):
        model = make_model(PRESETS[preset])
    assert not any(isinstance(module, nn.ConvTranspose1d) for module in model.modules())


@pytest.mark.parametrize("samples", [1, 19, 81, 1999, 2001])
@pytest.mark.parametrize("preset", ["tiny", "legacy"])
@pytest.mark.parametrize("channels", [1, 2])
def test_reconstruction_has_the_length_of_the_input(preset, channels, samples):
    x = 0.1 * noise(2, channels, samples)
    y = small_network(preset, channels=channels).reconstruct(x)
    assert y.shape == x.shape
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("preset", ["tiny", "legacy"])
def test_both_outputs_have_the_length_of_the_context(preset):
    reconstruction, prediction = small_network(preset)(0.1 * noise(2, 2, CHUNK))
    assert reconstruction.shape == prediction.shape == (2, 2, CHUNK)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sample_rate": 22050}, "multiple of 100"),
        ({"chunk_samples": CHUNK + 1}, "chunk"),
        ({"core_heads": 3}, "core_width"),
        ({"latents_per_token": 10}, "multiple of 4"),
        ({"objective": "hope"}, "hope"),
    ],
)
def test_config_that_cannot_work_is_refused_with_the_reason(fields, words):
    with pytest.raises(ValueError, match=words):
        small_config(**fields)


def test_overrides_change_their_fields_and_none_keeps_the_presets_value():
    config = with_overrides("tiny", core_layers=7, core_width=None)
    assert config == dataclasses.replace(PRESETS["tiny"], core_layers=7)


def test_config_survives_plain_types():
    plain = dataclasses.asdict(PRESETS["large"])
    assert ModelConfig(**plain) == PRESETS["large"]
    assert json.loads(json.dumps(plain))["core_layers"] == 20


@pytest.mark.parametrize("shape", [(2, CHUNK), (1, 3, CHUNK)])
def test_audio_of_another_shape_is_refused_with_both_shapes(model, shape):
    with pytest.raises(AssertionError, match=r"expected \(batch, 2, samples\)"):
        model.encode(torch.zeros(shape))


# Legacy


class PlainLegacy(nn.Module):
    """The layer list of the original, in plain torch.nn."""

    def __init__(self, channels: int):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(channels, 128, kernel_size=9, stride=2, padding=4),
            nn.MaxPool1d(2),
            nn.Conv1d(128, 64, kernel_size=7, stride=2, padding=3),
        )
        self.transformer = nn.TransformerEncoderLayer(
            d_model=64, nhead=4, dim_feedforward=256, dropout=0.0, activation="relu", batch_first=True
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose1d(64, 128, kernel_size=7, stride=2, padding=3, output_padding=1),
            nn.ConvTranspose1d(128, 128, kernel_size=2, stride=2),
            nn.ConvTranspose1d(128, 128, kernel_size=3, stride=5, padding=1, output_padding=4),
            nn.ConvTranspose1d(128, channels, kernel_size=9, stride=2, padding=4, output_padding=1),
        )

    def forward(self, x):
        padded = F.pad(x, (0, -x.shape[-1] % 40))
        z = nn.AdaptiveAvgPool1d(padded.shape[-1] // 40)(self.encoder(padded))
        predicted = self.transformer(z.transpose(1, 2)).transpose(1, 2)
        return z, self.decoder(z)[..., : x.shape[-1]], self.decoder(predicted)[..., : x.shape[-1]]


@pytest.mark.parametrize("samples", [4000, 1234, 39])
@pytest.mark.parametrize("channels", [1, 2])
def test_legacy_equals_a_plain_rebuild_with_its_weights(channels, samples):
    model, plain = untrained_network("legacy", channels=channels), PlainLegacy(channels).eval()
    for mine, theirs in zip(plain.parameters(), model.parameters(), strict=True):
        mine.data.copy_(theirs)
    x = noise(2, channels, samples)
    z, reconstruction, prediction = plain(x)
    assert torch.equal(model.encode(x), z)
    for mine, theirs in zip(model(x), (reconstruction, prediction), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize(("channels", "count"), [(2, 251_778), (1, 249_473)])
def test_legacy_has_the_originals_number_of_parameters(channels, count):
    assert sum(p.numel() for p in untrained_network("legacy", channels=channels).parameters()) == count


# The table


def test_table_of_legacy_names_its_layers_parameters_and_flops(capsys):
    model_tables.print_tables("legacy", on_meta(PRESETS["legacy"]))
    printed = capsys.readouterr().out
    assert "legacy: 12000 Hz, 2 channels, latents 64 x 3000 for 10 s" in printed
    assert "251,778 parameters" in printed
    for module in ("encoder.first", "encoder.pool", "core.layer.linear1", "decoder.3"):
        assert f"  {module} " in printed


def test_counted_flops_of_legacys_reconstruction_are_those_counted_by_hand():
    encoder = 60000 * 128 * 2 * 9 + 15000 * 64 * 128 * 7
    decoder = 3000 * 64 * 128 * 7 + 6000 * 128 * 128 * 2 + 12000 * 128 * 128 * 3 + 60000 * 128 * 2 * 9
    counted = model_tables.gigaflops(on_meta(PRESETS["legacy"]))
    assert next(iter(counted.values())) == pytest.approx(2 * (encoder + decoder) / 1e9)


def test_rows_of_the_table_hold_all_convolutions_and_linear_layers():
    model = on_meta(small_config(sample_rate=12000, chunk_samples=120000))
    rows = model_tables.layer_rows(model)
    expected = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Linear))]
    counted = sum(count for _, kind, _, count in rows if kind in ("Conv1d", "Linear"))
    assert counted == sum(p.numel() for module in expected for p in module.parameters())
    assert ("encoder.pool", "MaxPool1d", "8 x 1000", 0) in rows
