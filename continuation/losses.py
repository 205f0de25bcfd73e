"""Training losses: reconstruction in stage 1, prediction in stage 2.

    stage 1                 reconstruct_step, of the codec
    stage 2a, predict       predict_step, of the core on cached latents: the flow's loss and the equaliser's
    stage 2b, joint         joint_step, both side by side
    legacy                  legacy_step

stages.py says when each begins, and draws the window length and stereo basis of a step. The mixer has no weights: no
loss trains it. Every loss has one value per item of the batch, (batch,), so that the mean over a batch does not
depend on how it is split over accumulation steps or processes.
"""

import math

import torch
from torch import Tensor

from continuation.context import Context
from continuation.equaliser import QUIETEST_LEVEL
from continuation.layers import CONTEXT_LEVEL
from continuation.spectral import COMPLEX_HZ, mid_side, stft

SPECTRAL_SECONDS = 2048 / 12000  # the longest window, which resolves the partials of a hum; each next is half as long
SPECTRAL_SIZES = 5
BANDS = 32
QUIET_LEVEL = 0.03  # added to levels, in power, so that softer ones do not count
LINEAR_FROM_RATIO = 7.4  # of the powers of reference and estimate, 8.7 dB
MAGNITUDE_WEIGHT = 0.5  # of the magnitudes above the complex bins, relative to the spectral distance
QUIET_MAGNITUDE = 1e-2  # added to a bin before its logarithm, so that much softer ones do not count
PHASE_WEIGHT = 0.75  # of the phase distance and the waveform's error, relative to the spectral distance
FULL_LEVEL_POWER = CONTEXT_LEVEL**2
KL_WEIGHT = 1e-4
ROBUST_NOISE = 0.15  # of each latent's standard deviation, at most
FIXED_TIMES = (0.0, 0.3, 0.5, 0.7)  # flow times of the validation loss


# Stage 1: reconstruction


def spectral_sizes(sample_rate: int) -> list[int]:
    """Return the window lengths in samples: 4096 ... 256 at 24 kHz, at other rates the nearest powers of two."""
    largest = 2 ** round(math.log2(SPECTRAL_SECONDS * sample_rate))
    return [largest >> i for i in range(SPECTRAL_SIZES)]


def spectrum(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Compute the spectra of x (batch, channels, samples) at a hop of size/4: (batch, channels, frames, bins, 2) real
    and imaginary, and their magnitude (batch, channels, frames, bins), whose gradient is finite at zero."""
    parts = torch.view_as_real(stft(x, size, size // 4))
    return parts, ((parts * parts).sum(-1) + 1e-8).sqrt()


def spectral_distance(reference: Tensor, estimate: Tensor) -> Tensor:
    """Compute the mean |ln ratio| of two magnitudes (batch, channels, frames, bins), plus twice that of their levels
    in bands, plus half that of these bands' levels over all frames, plus spectral convergence: (batch,).

    Single bins of noise differ in both directions whatever their level; the levels in bands penalise a wrong
    loudness. Absolute log ratios fit the median over frames, but a few loud frames have most of the energy: the
    levels over all frames account for these.
    """
    log_ratio = (estimate + QUIET_MAGNITUDE).log() - (reference + QUIET_MAGNITUDE).log()
    powers = band_power(reference), band_power(estimate)
    in_frames = level_distance(*powers).mean((1, 2, 3))
    over_frames = level_distance(*(power.mean(2) for power in powers)).mean((1, 2))
    error = estimate - reference
    convergence = ((error * error).sum((2, 3)) + 1e-8).sqrt() / ((reference * reference).sum((2, 3)).sqrt() + 1)
    return log_ratio.abs().mean((1, 2, 3)) + 2 * in_frames + 0.5 * over_frames + convergence.mean(1)


def band_power(magnitude: Tensor) -> Tensor:
    """Compute the mean square magnitude in equal bands of at least 2 bins, without the bin of 0 Hz: (batch, channels,
    frames, bands)."""
    bins = magnitude.shape[-1] - 1
    return magnitude[..., 1:].square().unflatten(-1, (min(BANDS, bins // 2), -1)).mean(-1)


def level_distance(reference: Tensor, estimate: Tensor) -> Tensor:
    """Compute |ln ratio| of the magnitudes of two powers, elementwise."""
    return ((estimate + 1e-6).log() - (reference + 1e-6).log()).abs() / 2


def phase_distance(reference: tuple, estimate: tuple, sample_rate: int) -> Tensor:
    """Compute the mean |difference| of two `spectrum` outputs with magnitudes compressed to |X|^0.5, relative to the
    reference's magnitudes: (batch,).

    Bins have full weight up to the first of COMPLEX_HZ and none from the second on: where phases cannot be predicted,
    the best estimate of a complex value is zero, and this loss would only make the sound dull.
    """
    bins = reference[1].shape[-1]
    full_hz, zero_hz = COMPLEX_HZ
    frequencies = torch.linspace(0, sample_rate / 2, bins, device=reference[1].device)
    weight = ((zero_hz - frequencies) / (zero_hz - full_hz)).clamp(0, 1)
    used = min(bins, math.ceil(2 * zero_hz * (bins - 1) / sample_rate))
    (a, size_a), (b, size_b) = ((s[..., :used, :], m[..., :used]) for s, m in (reference, estimate))
    error = a * torch.rsqrt(size_a + 1e-2)[..., None] - b * torch.rsqrt(size_b + 1e-2)[..., None]
    error = ((error * error).sum(-1) + 1e-8).sqrt()
    scale = (size_a.sqrt() * weight[:used]).mean((1, 2, 3)) + 1e-2
    return (error * weight[:used]).mean((1, 2, 3)) / scale


def magnitude_divergence(reference: Tensor, estimate: Tensor) -> Tensor:
    """Compute the Itakura-Saito divergence of the powers of two magnitudes (batch, channels, bins, frames), linear in
    the logarithm of their ratio beyond LINEAR_FROM_RATIO, where it would explode: (batch,).

    Up to a constant it is the negative log-likelihood of Gaussian noise (Fevotte et al. 2009): it fits the mean power
    of noise, where distances of logarithms fit the median. The linear part bounds the gradient of single bins that
    are much louder than the estimate.
    """
    log_ratio = (reference.square() + QUIET_LEVEL**2).log() - (estimate.square() + QUIET_LEVEL**2).log()
    beyond = (log_ratio - math.log(LINEAR_FROM_RATIO)).clamp(min=0)
    ratio = (log_ratio - beyond).exp() * (1 + beyond)
    divergence = (ratio - log_ratio - 1).flatten(1)
    return divergence.sum(1) / max(1, divergence.shape[1])  # below a rate of 1800 Hz all bins are complex


def waveform_mse(reference: Tensor, estimate: Tensor) -> Tensor:
    """Compute the mean squared error of the samples: (batch,)."""
    error = reference.float() - estimate.float()
    return (error * error).mean((1, 2))


def reconstruction_losses(x: Tensor, y: Tensor, sample_rate: int, size: int, in_mid_side: bool) -> dict[str, Tensor]:
    """Compute the losses of the reconstruction y of x (batch, channels, samples), (batch,) each, at one window length
    and in one stereo basis (left and right, or mid and side).

    With both drawn at random at every step, the losses are an unbiased estimate of their mean over all window lengths
    and bases, for a tenth of the spectra.
    """
    if in_mid_side:
        x_basis, y_basis = mid_side(x), mid_side(y)
    else:
        x_basis, y_basis = x, y
    with torch.no_grad():
        reference = spectrum(x_basis, size)
    estimate = spectrum(y_basis, size)
    return {
        "spectral": spectral_distance(reference[1], estimate[1]),
        "phase": phase_distance(reference, estimate, sample_rate),
        "waveform_mse": waveform_mse(x, y),
    }


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Compute the KL divergence of the posterior from a standard normal, mean over latents: (batch,)."""
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean * mean + log_variance.exp() - 1 - log_variance).mean((1, 2))


def latent_noise(model, mean: Tensor, log_variance: Tensor, batch: dict) -> Tensor:
    """Sample the latents that the decoder is trained on: from the posterior, plus noise of up to ROBUST_NOISE of each
    channel's standard deviation, so that it tolerates small errors of the core: (batch, latent_channels, latents)."""
    z = mean + (0.5 * log_variance).exp() * batch["posterior_noise"]
    return z + ROBUST_NOISE * model.latent_std * batch["robust_noise"]


def reconstruction_parts(
    model, x: Tensor, mean: Tensor, log_variance: Tensor, decoded: tuple[Tensor, Tensor], stft_settings: dict
) -> dict[str, Tensor]:
    """Compute all parts of stage 1's loss, (batch,) each.

    x: (batch, channels, samples); decoded: the decoder's audio and magnitudes; stft_settings: see `reconstruct_step`.
    """
    y, magnitudes = decoded
    with torch.no_grad():
        reference = model.decoder.head.magnitudes(x)
    return reconstruction_losses(x, y[..., : x.shape[-1]], **stft_settings) | {
        "magnitudes": magnitude_divergence(reference, magnitudes[..., : reference.shape[-1]]),
        "kl": kl_divergence(mean, log_variance),
    }


def total_loss(parts: dict[str, Tensor]) -> Tensor:
    """Add up stage 1's loss (batch,). The waveform's error is relative to the power at full level."""
    waveform = parts["waveform_mse"] / FULL_LEVEL_POWER
    spectral = parts["spectral"] + MAGNITUDE_WEIGHT * parts["magnitudes"]
    return spectral + PHASE_WEIGHT * (parts["phase"] + waveform) + KL_WEIGHT * parts["kl"]


def reconstruct_step(model, batch: dict, stft_settings: dict, average=None) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute stage 1's loss (batch,) of the reconstruction of batch["x"], and its parts.

    stft_settings: sample_rate, size and in_mid_side of `reconstruction_losses`. average: averages a tensor over all
    processes; where it is given, the latents' running statistics are updated.
    """
    x, latents = batch["x"], batch["posterior_noise"].shape[-1]
    mean, log_variance = (part[..., :latents] for part in model.posterior(x))  # without the encoder's padding
    if average is not None:
        means = mean.detach().float()
        model.track_latents(*average(torch.stack([means.mean((0, 2)), means.square().mean((0, 2))])))
    decoded = model.decode_with_magnitudes(latent_noise(model, mean, log_variance, batch))
    parts = reconstruction_parts(model, x, mean, log_variance, decoded, stft_settings)
    return total_loss(parts), parts


# Stage 2: prediction


def flow_loss(velocity_of, target: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Compute the rectified-flow loss (batch,) of `velocity_of(noisy latents)` (Liu et al. 2022).

    target, noise: (batch, latent_channels, latents); time: (batch,), from 0 (noise) to 1 (data). Zero noise at time 0
    is plain regression: the mse objective.
    """
    t = time[:, None, None]
    error = velocity_of((1 - t) * noise + t * target).float() - (target - noise)
    return (error * error).mean((1, 2))


def prediction_loss(model, batch: dict) -> Tensor:
    """Compute the flow loss of predicting from a context: (batch,).

    batch: the tensors of ContinuationModel.encode_pair and batches.sample_flow.
    """
    time, noise = batch["time"], batch["flow_noise"]
    if model.config.objective == "mse":
        time, noise = torch.zeros_like(time), torch.zeros_like(noise)
    context = Context(model.standardise(batch["context"]) + batch["context_noise"], batch["outlook"])
    tokens = model.core(context, batch["context_share"])
    target = model.standardise(batch["target"])
    return flow_loss(lambda noisy: model.core.head(noisy, tokens, time), target, noise, time)


def equaliser_loss(model, batch: dict) -> Tensor:
    """Compute the mean distance of the predicted corrections of the spectrum from the true ones, as logarithms of
    power: (batch,). Bands count by the level expected in them, from 1 for the loudest down to 0.

    batch: the tensors of ContinuationModel.encode_pair.
    """
    features, true = batch["features"], batch["correction"]
    weights = 1 - features[:, :, 0] / QUIETEST_LEVEL
    distance = (model.core.equaliser(features).float() - true).abs()
    return (weights * distance).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1)


def fixed_time_losses(model, pair: dict, noise: Tensor) -> Tensor:
    """Compute the prediction loss at each of FIXED_TIMES, (times,), for validation; with the mse objective at time 0
    alone, without noise.

    pair: the tensors of ContinuationModel.encode_pair, batch of one; noise: (1, latent_channels, latents).
    """
    times = FIXED_TIMES if model.config.objective == "flow" else FIXED_TIMES[:1]
    parts = pair | {"flow_noise": noise, "context_noise": torch.zeros_like(noise)}
    batch = {name: part.expand(len(times), *part.shape[1:]) for name, part in parts.items()}
    time = torch.tensor(times, device=noise.device)
    return prediction_loss(model, batch | {"time": time, "context_share": torch.ones_like(time)})


def predict_step(model, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute stage 2a's loss (batch,), of the core's flow and of its equaliser on a cached pair, and its parts."""
    parts = {"prediction": prediction_loss(model, batch), "equaliser": equaliser_loss(model, batch)}
    return sum(parts.values()), parts


def joint_step(model, batch: dict, stft_settings: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute stage 2b's loss (batch,), that of stage 1 for the codec plus that of stage 2a for the core, and its
    parts."""
    reconstruction, parts = reconstruct_step(model, batch, stft_settings)
    prediction, predicted = predict_step(model, batch)
    return reconstruction + prediction, parts | predicted


# Legacy: mean squared error of the waveform alone


def legacy_step(model, batch: dict, predict: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the legacy loss (batch,) and its parts: of the reconstruction of the first half of batch["x"], and with
    `predict` of the prediction of the second half."""
    cut = model.config.chunk_samples
    z = model.encode(batch["x"][..., :cut])
    parts = {"waveform_mse": waveform_mse(batch["x"][..., :cut], model.decode(z, cut))}
    if predict:
        parts["decoded_mse"] = waveform_mse(batch["x"][..., cut:], model.decode(model.core(z), cut))
    return sum(parts.values()), parts
