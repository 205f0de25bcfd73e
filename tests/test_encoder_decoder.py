"""Encoder and decoder: the filters and the overlap-add are what they claim, and every frame is heard in its place."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import noise

from continuation.encoder_stems import Stem
from continuation.layers import typical_magnitude
from continuation.spectral import COMPLEX_HZ, STEADY_HZ, ISTFTHead, istft, stft

torch.set_num_threads(1)


@pytest.mark.parametrize("hop", [20, 21])
def test_stem_starts_as_a_windowed_dft(hop):
    size = 4 * hop
    stem = Stem(channels=1, hop=hop, width=8)
    x = noise(2, 1, 20 * hop)
    ours = stem.filters(x)
    theirs = torch.stft(x[:, 0], size, hop, window=torch.hann_window(size), center=False, return_complex=True)
    about_the_middle = (-1.0) ** torch.arange(size // 2 + 1)[:, None]  # phases count from the window's middle
    theirs = theirs * about_the_middle
    assert torch.allclose(ours, torch.cat([theirs.real, theirs.imag], dim=1), atol=1e-4)


def test_full_scale_sine_is_measured_by_what_is_typical_of_its_bin():
    hop, k = 25, 8
    sine = torch.sin(2 * math.pi * k * torch.arange(400) / (4 * hop))
    stem = Stem(channels=1, hop=hop, width=8)
    real, imaginary = (stem.filters(sine[None, None]) * stem.scale).chunk(2, dim=1)
    magnitude = (real**2 + imaginary**2).sqrt()[0, k] * typical_magnitude(2 * hop + 1)[k]
    assert torch.allclose(magnitude, torch.ones(()), atol=1e-4)


def test_loudness_of_quiet_bins_is_an_input_but_gives_the_filters_no_gradient():
    """The steep logarithm of quiet bins made training diverge; the filters learn through the other inputs."""
    stem = Stem(channels=1, hop=20, width=8)
    bins = stem.scale.shape[0] // 2
    with torch.no_grad():
        stem.mix.weight[:, : 2 * bins] = 0
    quiet, loud = (stem(level * noise(1, 1, 400)) for level in (0.001, 0.01))
    assert not torch.allclose(quiet, loud, atol=0.1)
    loud.sum().backward()
    assert stem.filters.weight.grad.abs().max() == 0


def test_frame_hears_its_own_four_hops_and_no_more():
    """Frame j of the stem is centred on hop j: a click reaches exactly the frames whose windows contain it."""
    hop, frames = 20, 40
    stem = Stem(channels=1, hop=hop, width=8)
    silence = torch.zeros(1, 1, frames * hop)
    click = silence.clone()
    click[..., 20 * hop + 5] = 1.0
    changed = (stem(click) != stem(silence)).any(dim=1)[0].nonzero()[:, 0].tolist()
    assert changed == [18, 19, 20, 21]  # 30 samples before each hop begins to 30 after it ends


@pytest.mark.parametrize(("hop", "left", "right"), [(441, 661, 662), (240, 360, 360)])
def test_stem_pads_one_and_a_half_hops_on_either_side(hop, left, right):
    stem, x, heard = Stem(channels=1, hop=hop, width=8), noise(1, 1, 4 * hop), []
    stem.filters.register_forward_hook(lambda _module, inputs, _output: heard.append(inputs[0]))
    stem(x)
    assert torch.equal(heard[0], F.pad(x, (left, right)))


def clicks(*shape: int) -> torch.Tensor:
    """One at each end."""
    x = torch.zeros(shape)
    x[..., [0, -1]] = 1.0
    return x


@pytest.mark.parametrize("signal", [torch.ones, noise, clicks])
@pytest.mark.parametrize("hop", [20, 21])
def test_overlap_add_is_perfect_up_to_both_edges(hop, signal):
    """The spectra of a signal give that signal: no ripple at the frame rate, no fade at the edges."""
    head = ISTFTHead(width=8, channels=2, hop=hop)
    x = signal(1, 2, 40 * hop)
    padded = F.pad(x, (head.left_padding, 3 * hop - head.left_padding))
    y = istft(stft(padded, 4 * hop, hop).transpose(2, 3), hop)
    assert torch.allclose(y[..., head.left_padding : head.left_padding + 40 * hop], x, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2])
@torch.no_grad()
def test_sound_above_the_tones_has_the_power_asked_for(monkeypatch, channels):
    head = ISTFTHead(width=8, channels=channels, hop=120)
    monkeypatch.setattr(head, "magnitude_activation", torch.ones_like)
    spectrum, asked = head(torch.zeros(1, 8, 200))
    found = head.magnitudes(head.audio(spectrum))[..., 4:-4]
    decibels = 10 * (found.square().mean((0, 2, 3)) / asked.square().mean((0, 2, 3))).log10()
    assert decibels.abs().max() < 0.3


@torch.no_grad()
def tone_power(frames: torch.Tensor, above_hz: float) -> float:
    """Share of the power above a frequency in what the tones change of a head's sound, at 12 kHz."""
    torch.manual_seed(0)
    head = ISTFTHead(width=8, channels=1, hop=120)
    whole = head.audio(head(frames)[0])
    head.project.weight[: 2 * head.complex_bins] = 0
    head.project.bias[: 2 * head.complex_bins] = 0
    x = (whole - head.audio(head(frames)[0]))[0, 0]
    power = torch.fft.rfft(x * torch.hann_window(len(x))).abs().square()
    return float(power[round(above_hz * len(x) / 12000) :].sum() / power.sum())


@torch.no_grad()
def test_magnitudes_are_those_of_half_the_sum_and_half_the_difference_of_the_sides():
    one, two = (ISTFTHead(width=8, channels=channels, hop=120) for channels in (1, 2))
    x, y = noise(2, 1, 1, 2400)
    mid, side = one.magnitudes(x), one.magnitudes(y)
    found = two.magnitudes(torch.cat([x + y, x - y], dim=1))
    assert torch.allclose(found, torch.cat([mid, side], dim=1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2])
@torch.no_grad()
def test_audio_of_a_spectrum_of_sound_is_that_sound(channels):
    head = ISTFTHead(width=8, channels=channels, hop=20)
    x = noise(2, channels, 800)
    assert torch.allclose(head.audio(head.spectrum(x)), x, atol=1e-5)


def test_head_has_no_tones_where_phases_cannot_be_known():
    frames = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 8, 200), dtype=np.float32))
    assert tone_power(frames, 1.1 * COMPLEX_HZ[1]) < 1e-6
    assert tone_power(frames, COMPLEX_HZ[0]) > 1e-3


def test_head_cannot_hum():
    """The same at every frame, it would sound at multiples of the frame rate, whatever the music."""
    assert tone_power(torch.ones(1, 8, 200), STEADY_HZ + 50) < 1e-6
    assert tone_power(torch.ones(1, 8, 200), STEADY_HZ - 100) > 1e-3


def test_head_is_heard_where_its_frame_is():
    """A frame unlike the others changes the four hops around its own, and others by its share in their mean alone."""
    hop = 20
    head = ISTFTHead(width=8, channels=1, hop=hop)
    frames = torch.zeros(1, 8, 40)
    other = frames.clone()
    other[..., 20] = 1.0
    with torch.no_grad():
        change = head.audio(head(frames)[0] - head(other)[0]).abs()[0, 0]
    own = slice(round((20 - 1.5) * hop), round((21 + 1.5) * hop))
    elsewhere = torch.cat([change[: own.start], change[own.stop :]])
    assert elsewhere.max() < 0.1 * change[own].max()
    assert (change[own] > 1e-7).sum() > 3 * hop


def test_sound_of_latents_does_not_depend_on_what_else_is_in_the_batch(model):
    z = noise(3, 4, 100)
    assert torch.allclose(model.decode(z)[1:2], model.decode(z[1:2]), atol=1e-5)


def test_decoding_twice_gives_the_same_samples(model):
    z = noise(1, 4, 100)
    assert torch.equal(model.decode(z), model.decode(z))


def test_bf16_reconstruction_stays_near_fp32(model, song):
    x = song[None]
    with torch.autocast("cpu", torch.bfloat16):
        half = model.decode(model.encode(x), x.shape[-1])
    full = model.reconstruct(x)
    assert half.dtype == torch.float32
    assert (half - full).square().mean() < 0.02 * full.square().mean()
