"""What the network is trained on: stage 1 reconstructs, stage 2 predicts. Every loss is one value an item of the
batch, so that the mean over a batch does not depend on how it is cut over accumulation steps or processes. Only the
place of what is continued in the joint part is one for a whole batch."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from continuation.layers import FRAME_RATE_HZ
from continuation.repetition import onset_strength
from continuation.spectral import TONES_HZ, mid_side, stft

SPECTRAL_SECONDS = 2048 / 12000  # the longest window, which sees the partials of a hum; each next is half as long
SPECTRAL_SIZES = 5
BANDS = 32
QUIET_LEVEL = 0.03  # softer ones do not count
LINEAR_FROM_RATIO = 7.4  # of the powers of reference and estimate, 8.7 dB
LEVEL_WEIGHT = 0.5  # of the levels above the tones, beside the spectral distance
QUIET_MAGNITUDE = 1e-2  # added to a bin before its logarithm, so that much softer ones do not count
PHASE_WEIGHT = 0.75  # of the phase distance and the waveform's error, beside the spectral distance
FULL_LEVEL_POWER = 0.01  # of a signal at -20 dBFS RMS, the level of every context
KL_WEIGHT = 1e-4
ROBUST_NOISE = 0.15  # of each latent's standard deviation, at most
FIXED_TIMES = (0.0, 0.3, 0.5, 0.7)  # of the flow, at which it is validated
ONSET_FRAMES = 5  # 50 ms
ONSET_WEIGHT, NOTE_WEIGHT = 2.0, 2.0  # of the continuation, beside its spectral distance
CHROMA_HZ = (55, 2000)
CONTINUED_SECONDS = 4  # of a continuation that are decoded in a step of the joint part


# Stage 1: reconstruction


def spectral_sizes(sample_rate: int) -> list[int]:
    """Window lengths in samples, 4096 ... 256 at 24 kHz, scaled with the rate to the nearest power of two."""
    largest = 2 ** round(math.log2(SPECTRAL_SECONDS * sample_rate))
    return [largest >> i for i in range(SPECTRAL_SIZES)]


def spectrum(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Spectra of x (batch, channels, samples) at a hop of size/4: (batch, channels, frames, bins, 2) real and
    imaginary, and their magnitude (batch, channels, frames, bins), whose gradient is finite at zero."""
    parts = torch.view_as_real(stft(x, size, size // 4))
    return parts, ((parts * parts).sum(-1) + 1e-8).sqrt()


def spectral_distance(reference: Tensor, estimate: Tensor) -> Tensor:
    """Mean |ln ratio| of two magnitudes (batch, channels, frames, bins), plus twice that of their levels in bands,
    plus half that of these bands' levels over all frames, plus spectral convergence: (batch,).

    A bin of noise is as often too loud as too soft, whatever its level; a band's level says how loud it should be. In
    the median over frames: most of the energy is in the few loud ones, which the level over all frames speaks for.
    """
    log_ratio = (estimate + QUIET_MAGNITUDE).log() - (reference + QUIET_MAGNITUDE).log()
    powers = band_power(reference), band_power(estimate)
    in_frames = level_distance(*powers).mean((1, 2, 3))
    over_frames = level_distance(*(power.mean(2) for power in powers)).mean((1, 2))
    error = estimate - reference
    convergence = ((error * error).sum((2, 3)) + 1e-8).sqrt() / ((reference * reference).sum((2, 3)).sqrt() + 1)
    return log_ratio.abs().mean((1, 2, 3)) + 2 * in_frames + 0.5 * over_frames + convergence.mean(1)


def band_power(magnitude: Tensor) -> Tensor:
    """Mean square magnitude in equal bands of at least 2 bins, all but that of 0 Hz: (batch, channels, frames,
    bands)."""
    bins = magnitude.shape[-1] - 1
    return magnitude[..., 1:].square().unflatten(-1, (min(BANDS, bins // 2), -1)).mean(-1)


def level_distance(reference: Tensor, estimate: Tensor) -> Tensor:
    """|ln ratio| of two powers as magnitudes, element by element."""
    return ((estimate + 1e-6).log() - (reference + 1e-6).log()).abs() / 2


def phase_distance(reference: tuple, estimate: tuple, sample_rate: int) -> Tensor:
    """Mean |difference| of two `spectrum` outputs with magnitudes compressed to |X|^0.5, over the reference's:
    (batch,).

    Bins count fully up to the first of TONES_HZ and fade out up to the second: where phases cannot be known, the
    best guess of a complex value is zero, and asking for it would only make the sound dull.
    """
    bins = reference[1].shape[-1]
    whole, gone = TONES_HZ
    frequencies = torch.linspace(0, sample_rate / 2, bins, device=reference[1].device)
    weight = ((gone - frequencies) / (gone - whole)).clamp(0, 1)
    used = min(bins, math.ceil(2 * gone * (bins - 1) / sample_rate))
    (a, size_a), (b, size_b) = ((s[..., :used, :], m[..., :used]) for s, m in (reference, estimate))
    error = a * torch.rsqrt(size_a + 1e-2)[..., None] - b * torch.rsqrt(size_b + 1e-2)[..., None]
    error = ((error * error).sum(-1) + 1e-8).sqrt()
    scale = (size_a.sqrt() * weight[:used]).mean((1, 2, 3)) + 1e-2
    return (error * weight[:used]).mean((1, 2, 3)) / scale


def level_divergence(reference: Tensor, estimate: Tensor) -> Tensor:
    """Itakura-Saito divergence of the powers of two levels (batch, channels, bins, frames), linear in the logarithm
    beyond LINEAR_FROM_RATIO, where it would explode: (batch,).

    But for a constant it is minus the logarithm of the likelihood of normal noise (Fevotte et al. 2009): of noise the
    estimate has the right power in the mean, where logarithms are right in the median. Single bins that are louder
    than the estimate by more than LINEAR_FROM_RATIO pull no harder than one that is as loud as that.
    """
    log_ratio = (reference.square() + QUIET_LEVEL**2).log() - (estimate.square() + QUIET_LEVEL**2).log()
    beyond = (log_ratio - math.log(LINEAR_FROM_RATIO)).clamp(min=0)
    ratio = (log_ratio - beyond).exp() * (1 + beyond)
    divergence = (ratio - log_ratio - 1).flatten(1)
    return divergence.sum(1) / max(1, divergence.shape[1])  # below a rate of 1800 Hz all bins have tones


def waveform_mse(reference: Tensor, estimate: Tensor) -> Tensor:
    """Mean squared error of the samples: (batch,)."""
    error = reference.float() - estimate.float()
    return (error * error).mean((1, 2))


def reconstruction_losses(x: Tensor, y: Tensor, sample_rate: int, size: int, in_mid_side: bool) -> dict[str, Tensor]:
    """Losses of the reconstruction y of x (batch, channels, samples), (batch,) each, at one window length and in one
    stereo basis.

    Drawn at random a step they estimate, without bias and at a tenth of its spectra, the mean over all window
    lengths, left and right, mid and side. The target's spectrum needs no gradient.
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
    """KL divergence of the posterior from a standard normal, mean over latents: (batch,)."""
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean * mean + log_variance.exp() - 1 - log_variance).mean((1, 2))


def latent_noise(model, mean: Tensor, log_variance: Tensor, batch: dict) -> Tensor:
    """The latents that the decoder is trained on: drawn from the posterior, then roughened by up to ROBUST_NOISE of
    each latent's standard deviation, so that small errors of the core decode well."""
    z = mean + (0.5 * log_variance).exp() * batch["posterior_noise"]
    return z + ROBUST_NOISE * model.latent_std * batch["robust_noise"]


def reconstruction_parts(
    model, x: Tensor, mean: Tensor, log_variance: Tensor, decoded: tuple[Tensor, Tensor], draw: dict
) -> dict[str, Tensor]:
    """All parts of stage 1's loss, (batch,) each, of x (batch, channels, samples) and what was decoded, audio and
    levels."""
    y, levels = decoded
    with torch.no_grad():
        reference = model.decoder.head.levels(x)
    return reconstruction_losses(x, y[..., : x.shape[-1]], **draw) | {
        "levels": level_divergence(reference, levels[..., : reference.shape[-1]]),
        "kl": kl_divergence(mean, log_variance),
    }


def total_loss(parts: dict[str, Tensor]) -> Tensor:
    """Stage 1's loss (batch,). The waveform's error counts relative to the power of a signal at full level."""
    waveform = parts["waveform_mse"] / FULL_LEVEL_POWER
    spectral = parts["spectral"] + LEVEL_WEIGHT * parts["levels"]
    return spectral + PHASE_WEIGHT * (parts["phase"] + waveform) + KL_WEIGHT * parts["kl"]


def reconstruct_step(model, batch: dict, draw: dict, average=lambda own: own) -> tuple[Tensor, dict[str, Tensor]]:
    """Stage 1: loss (batch,) of the reconstruction of batch["x"], and its parts.

    draw: sample_rate, size and in_mid_side of `reconstruction_losses`. The latents' running statistics are updated,
    by what `average` makes of this process's: the mean over all.
    """
    x, latents = batch["x"], batch["posterior_noise"].shape[-1]
    mean, log_variance = (part[..., :latents] for part in model.posterior(x))  # the encoder rounds their number up
    means = mean.detach().float()
    model.track_latents(*average(torch.stack([means.mean((0, 2)), means.square().mean((0, 2))])))
    decoded = model.decode_with_levels(latent_noise(model, mean, log_variance, batch))
    parts = reconstruction_parts(model, x, mean, log_variance, decoded, draw)
    return total_loss(parts), parts


# Stage 2: prediction


def flow_loss(velocity_of, target: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Rectified-flow loss (batch,) of `velocity_of(noisy latents)`, and the one-step prediction of the target.

    target, noise: (batch, latent_channels, latents); time: (batch,), 0 noise .. 1 music. With the prediction
    z_t + (1 - t) v the loss is exactly MSE(prediction, target) / (1 - t)^2 (Liu et al. 2022). Zero noise at time 0
    is plain regression: the mse objective.
    """
    t = time[:, None, None]
    noisy = (1 - t) * noise + t * target
    velocity = velocity_of(noisy).float()
    error = velocity - (target - noise)
    return (error * error).mean((1, 2)), noisy + (1 - t) * velocity


def prediction_loss(model, context: Tensor, target: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
    """Loss (batch,) of predicting target from context (raw latents, see ContinuationModel.hear), and the standardised
    one-step prediction. batch["context_noise"] is on what was heard, not on the hints."""
    time, noise = batch["time"], batch["flow_noise"]
    if model.config.objective == "mse":
        time, noise = torch.zeros_like(time), torch.zeros_like(noise)
    noisy_part = F.pad(batch["context_noise"], (0, context.shape[-1] - target.shape[-1]))
    context = model.standardise(context) + noisy_part
    return flow_loss(
        lambda noisy: model.core(noisy, context, time, batch["heard"]), model.standardise(target), noise, time
    )


def fixed_time_losses(model, context: Tensor, target: Tensor, noise: Tensor) -> Tensor:
    """Prediction loss at each of FIXED_TIMES (times,), for validation; mse: the one at time 0 without noise.

    context (see ContinuationModel.hear), target and noise (1, latent_channels, latents): of one pair.
    """
    times = FIXED_TIMES if model.config.objective == "flow" else FIXED_TIMES[:1]
    batch = {
        "time": torch.tensor(times, device=target.device),
        "heard": torch.ones(len(times), device=target.device),
        "flow_noise": noise.expand(len(times), -1, -1),
        "context_noise": torch.zeros_like(noise),
    }
    both = (z.expand(len(times), -1, -1) for z in (context, target))
    return prediction_loss(model, *both, batch)[0]


def predict_step(model, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Stage 2a: loss (batch,) of the core on cached latents."""
    loss, _ = prediction_loss(model, batch["context"], batch["target"], batch)
    return loss, {"prediction": loss}


def continuation_losses(
    target: Tensor, continuation: Tensor, sample_rate: int, size: int, in_mid_side: bool
) -> dict[str, Tensor]:
    """Distances of a continuation from the true one, audio (batch, channels, samples), (batch,) each: of the spectra,
    at one window length and in one stereo basis, of the onsets and of the notes. Phases are not asked for: nobody
    could predict them."""
    onsets = onset_distance(target, continuation, sample_rate)
    notes = chroma_distance(target, continuation, sample_rate)
    if in_mid_side:
        target, continuation = mid_side(target), mid_side(continuation)
    with torch.no_grad():
        reference = spectrum(target, size)[1]
    spectral = spectral_distance(reference, spectrum(continuation, size)[1])
    return {"continued_spectral": spectral, "continued_onsets": onsets, "continued_notes": notes}


def continuation_sum(parts: dict[str, Tensor]) -> Tensor:
    """What of stage 2's loss the continuation has: (batch,)."""
    beat, notes = ONSET_WEIGHT * parts["continued_onsets"], NOTE_WEIGHT * parts["continued_notes"]
    return parts["continued_spectral"] + beat + notes


def onset_distance(target: Tensor, estimate: Tensor, sample_rate: int) -> Tensor:
    """1 - correlation of the onset strengths, mean over bands, smoothed over 50 ms: (batch,), 0..2."""
    hop = sample_rate // FRAME_RATE_HZ
    a, b = (F.avg_pool1d(onset_strength(x, hop).mean(1), ONSET_FRAMES, 1) for x in (target, estimate))
    power = a.square().sum(1) * b.square().sum(1)
    return 1 - (a * b).sum(1) * torch.rsqrt(power + 1e-6)


def chroma_distance(target: Tensor, estimate: Tensor, sample_rate: int) -> Tensor:
    """1 - cosine of the mean pitch-class profiles: (batch,), 0..1."""
    return 1 - F.cosine_similarity(*(pitch_classes(x, sample_rate) for x in (target, estimate)), dim=1)


def pitch_classes(x: Tensor, sample_rate: int) -> Tensor:
    """Mean over frames of the shares of the 12 pitch classes in the power of audio x (batch, channels, samples) from
    CHROMA_HZ[0] to CHROMA_HZ[1], each bin counted to its nearest semitone: (batch, 12)."""
    size = 2 * max(spectral_sizes(sample_rate))  # tells semitones apart from 100 Hz on
    if x.shape[-1] < size:
        return x.new_ones(len(x), 12)
    first, end = (min(math.ceil(hz * size / sample_rate), size // 2 + 1) for hz in CHROMA_HZ)
    frequencies = torch.arange(first, end, device=x.device) * sample_rate / size
    pitch = (12 * (frequencies / 440).log2()).round().long() % 12
    power = spectrum(x.mean(1, keepdim=True), size)[1][:, 0, :, first:end].square()
    classes = power @ (pitch[:, None] == torch.arange(12, device=x.device)).to(power)
    return (classes / (classes.sum(-1, keepdim=True) + 1e-6)).mean(1)


def start_noise(config, noise: Tensor) -> Tensor:
    """What a prediction starts from: the noise (batch, latent_channels, latents), or the mse objective's zeros."""
    return noise if config.objective == "flow" else torch.zeros_like(noise)


def joint_step(model, batch: dict, draw: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Stage 2b: reconstruction, prediction, and the decoded continuation, nothing frozen.

    batch: latents as in stage 2a, and batch["x"], the sound of context and target, (batch, channels, 2 * chunk). The
    end of the context is reconstructed, as much of it as the noise in the batch covers.
    CONTINUED_SECONDS of the core's one-step prediction, the same of every item, are decoded with copies of the
    context, but for those that batch["present"] leaves out: so the core learns to say what helps the decoder.
    """
    config, x, cut = model.config, batch["x"], model.config.chunk_samples
    samples = batch["posterior_noise"].shape[-1] * config.latent_samples
    heard = x[..., :cut]
    end = heard[..., -samples:]
    mean, log_variance = (part[..., : batch["posterior_noise"].shape[-1]] for part in model.posterior(end))
    again = model.decode_with_levels(latent_noise(model, mean, log_variance, batch))
    parts = reconstruction_parts(model, end, mean, log_variance, again, draw)
    loss = total_loss(parts)
    copies = replace(model.copies(heard), present=batch["present"])
    parts["prediction"], _ = prediction_loss(model, batch["context"], batch["target"], batch)
    predicted = model.sample(batch["context"], start_noise(config, batch["flow_noise"]), steps=1, guidance=1.0)
    latents = min(round(CONTINUED_SECONDS * config.latent_rate), config.chunk_latents)
    # a tensor: its value is never asked for, which would make the GPU wait, and which the memory estimate has not
    first = (batch["place"][0] * (config.chunk_latents - latents)).round().long()
    start, samples = first * config.latent_samples, latents * config.latent_samples
    part = predicted[..., first + torch.arange(latents, device=x.device)].float()
    truth = x[..., cut + start + torch.arange(samples, device=x.device)]
    continuation = model.decode(part, samples, copies, start)
    parts |= continuation_losses(truth, continuation, **draw)
    return loss + parts["prediction"] + continuation_sum(parts), parts


# Legacy: mean squared error of the waveform, and nothing else


def legacy_step(model, batch: dict, predict: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (batch,) of the reconstruction of the first half of batch["x"], with `predict` plus the second half's."""
    cut = model.config.chunk_samples
    z = model.encode(batch["x"][..., :cut])
    parts = {"waveform_mse": waveform_mse(batch["x"][..., :cut], model.decode(z, cut))}
    if predict:
        parts["decoded_mse"] = waveform_mse(batch["x"][..., cut:], model.decode(model.core(z), cut))
    return sum(parts.values()), parts
