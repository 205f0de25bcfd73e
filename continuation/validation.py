"""What train.py measures at an evaluation, on validation pairs, noise and times that never change.

Pairs are spread over the whole split; losses are made of training's own, without what training draws.
"""

import math
from itertools import product

import numpy as np
import torch
from torch import Tensor

from continuation import losses, metrics
from continuation.windows import Windows, make_rng, next_other

PAIRS = 24
DECODED = 4  # pairs that are continued in sound; twice as many are reconstructed, and compared with the loop


def mean_of(values) -> float:
    """Mean of the defined values; nan where there is none."""
    defined = [value for value in values if math.isfinite(value)]
    return sum(defined) / len(defined) if defined else math.nan


def means_of(rows: list[dict]) -> dict[str, float]:
    """Means of the defined values; the loss's is over all rows, so that one that is not finite shows."""
    means = {name: mean_of(row[name] for row in rows) for name in rows[0]}
    if "loss" in means:
        means["loss"] = sum(row["loss"] for row in rows) / len(rows)
    return means


class Validation:
    """Figures of a model, the averaged one, on the validation windows.

    `autocast` makes the context in which the network computes.
    """

    def __init__(self, model, windows: Windows, seed: int, autocast):
        self.model, self.windows, self.seed, self.autocast = model, windows, seed, autocast
        self.config = model.config
        self.kept = None  # latents of the pairs

    @torch.no_grad()
    def figures(self, stage: int, codec_learns: bool) -> dict[str, float]:
        """`loss`, which decides what is best, and what else the stage is judged by.

        Latents are kept from call to call; they age while encoder and decoder learn.
        """
        if codec_learns:
            self.kept = None
        if self.config.is_legacy:
            return self.legacy(stage)
        return self.reconstruction() if stage == 1 else self.prediction()

    def pairs(self, count: int) -> list[int]:
        return np.unique(np.linspace(0, len(self.windows) - 1, count).round().astype(int)).tolist()

    def groups(self, pairs: list[int]) -> list[str]:
        """Whose music each pair is."""
        return [self.windows.song(pair)["group"] for pair in pairs]

    def audio(self, pair: int) -> Tensor:
        """Context and target, (1, channels, 2 * chunk)."""
        return self.batch(self.windows.pair(pair))

    def batch(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x)[None].to(self.model.latent_mean.device)

    def reconstruction(self) -> dict[str, float]:
        """Stage 1's loss over all window lengths and both stereo bases, and what a listener would notice."""
        rows = []
        for pair in self.pairs(2 * DECODED):
            x = self.audio(pair)[..., : self.config.chunk_samples]
            with self.autocast():
                mean, log_variance = self.model.posterior(x)
                decoded = self.model.decode_with_levels(mean)
            row = {"loss": self.reconstruction_loss(x, mean, log_variance, decoded)}
            signals = [t[0, :, : x.shape[-1]].float().cpu().numpy() for t in (x, decoded[0])]
            row["waveform_mse"] = metrics.waveform_mse(*signals)
            row["mr_stft"] = metrics.mr_stft_distance(*signals)
            row["si_sdr_below_1000_db"] = metrics.si_sdr(*signals, self.config.sample_rate, below_hz=1000)
            rows.append(row)
        return means_of(rows)

    def reconstruction_loss(self, *coded) -> float:
        """Mean over all that a step draws from."""
        found = []
        for size, basis in self.spectral_draws():
            draw = {"sample_rate": self.config.sample_rate, "size": size, "in_mid_side": basis}
            found.append(losses.weighted_sum(losses.reconstruction_parts(self.model, *coded, draw)).item())
        return sum(found) / len(found)

    def prediction(self) -> dict[str, float]:
        """Stage 2's loss at fixed times and noise, and what the context gains against other contexts."""
        pairs, latents = self.pairs(PAIRS), self.latents()
        groups = self.groups(pairs)
        own, another, passage = [], [], []
        for i, (pair, (context, target, same_song)) in enumerate(zip(pairs, latents, strict=True)):
            own.append(self.prediction_losses(pair, context, target))
            other = next_other(groups, i)
            for gains, foreign in ((another, None if other is None else latents[other][0]), (passage, same_song)):
                if foreign is not None:
                    loss = self.prediction_losses(pair, foreign, target).mean()
                    gains.append(loss.item() - own[-1].mean().item())
        own = torch.stack(own)
        rows = [self.against_repetition(pair) for pair in self.pairs(2 * DECODED)]
        continued = means_of([{"loss": row["continuation"], **row} for row in rows])
        return {
            "loss": own.mean().item() + continued.pop("loss"),
            "prediction": own.mean().item(),
            "latent_mse": own[:, 0].mean().item(),
            **continued,
            "context_gain": mean_of(another),
            "context_gain_same_song": mean_of(passage),
        }

    def against_repetition(self, pair: int) -> dict[str, float]:
        """Distance from the true continuation of the one that the joint part learns from, one step of the core,
        decoded, and of what needs no network: the loop, and the input repeated."""
        heard, truth = self.audio(pair).split(self.config.chunk_samples, dim=-1)
        noise = self.noise(pair, (1, self.config.latent_channels, self.config.chunk_latents))
        with self.autocast():
            copies = self.model.copies(heard)
            predicted = self.model.sample(self.model.hear(heard), losses.start_noise(self.config, noise), 1, 1.0)
            continuation = self.model.decode(predicted.float(), truth.shape[-1], copies)
        looped = copies.play(0, truth.shape[-1])[:, 0]
        sounds = {"continuation": continuation, "loop": looped, "input_repeated": heard}
        return {name: self.continuation_loss(truth, sound) for name, sound in sounds.items()}

    def continuation_loss(self, truth: Tensor, sound: Tensor) -> float:
        """Mean over all that a step draws from."""
        draws = ((self.config.sample_rate, *draw) for draw in self.spectral_draws())
        parts = (losses.continuation_losses(truth, sound, *draw) for draw in draws)
        found = [losses.continuation_sum(part).item() for part in parts]
        return sum(found) / len(found)

    def spectral_draws(self) -> list[tuple[int, bool]]:
        """Every window length and stereo basis."""
        return list(product(losses.spectral_sizes(self.config.sample_rate), (False, True)))

    def latents(self) -> list[tuple]:
        """(context, target, context from another passage of the song or None) of each pair."""
        if self.kept is None:
            self.kept = []
            for pair in self.pairs(PAIRS):
                x = self.windows.other_passage(pair)
                with self.autocast():
                    same_song = None if x is None else self.model.hear(self.batch(x)).float()
                self.kept.append((*self.encode_pair(self.audio(pair)), same_song))
        return self.kept

    def encode_pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As stage 2 reads them, rounded to fp16."""
        with self.autocast():
            context, target = self.model.encode_pair(x)
        return context.half().float(), target.half().float()

    def prediction_losses(self, pair: int, context: Tensor, target: Tensor) -> Tensor:
        """Loss at each of the fixed times, with noise that is the pair's own."""
        with self.autocast():
            return losses.fixed_time_losses(self.model, context, target, self.noise(pair, target.shape))

    def noise(self, pair: int, shape: tuple[int, ...]) -> Tensor:
        rng = make_rng(self.seed, "validation", pair)
        return torch.from_numpy(rng.standard_normal(shape, dtype="float32")).to(self.model.latent_mean.device)

    def legacy(self, stage: int) -> dict[str, float]:
        """Squared errors of the waveform; the gain is that of the decoded prediction."""
        pairs, rows = self.pairs(2 * DECODED), []
        groups = self.groups(pairs)
        cut = self.config.chunk_samples
        for i, pair in enumerate(pairs):
            x, other = self.audio(pair), next_other(groups, i)
            _, parts = losses.legacy_step(self.model, {"x": x}, predict=True)
            row = {name: value.item() for name, value in parts.items()} | {"context_gain": math.nan}
            row["loss"] = row["waveform_mse"] + (row["decoded_mse"] if stage == 2 else 0.0)
            if other is not None:
                heard = self.model.hear(self.audio(pairs[other])[..., :cut])
                foreign = self.model.decode(self.model.predict(heard), cut)
                row["context_gain"] = losses.waveform_mse(x[..., cut:], foreign).item() - row["decoded_mse"]
            rows.append(row)
        return means_of(rows)

    @torch.no_grad()
    def continuation(self) -> dict[str, float]:
        """Sampled continuations of a few pairs: spread of the latents, loudness, error of the waveform."""
        rows = []
        for pair in self.pairs(DECODED):
            x = self.audio(pair)
            cut = self.config.chunk_samples
            context, target = self.encode_pair(x)
            with self.autocast():
                sampled = self.model.predict(context).float()
                copies = self.model.copies(x[..., :cut])
                decoded = self.model.decode(sampled, cut, copies)[0].float().cpu().numpy()
                mean = self.model.decode(self.model.predict(context, steps=1, guidance=1.0), cut, copies).float()
                again = self.model.reconstruct(x[..., :cut]).float()
            truth = x[0, :, cut:].cpu().numpy()
            rows.append({
                "latent_std_ratio": (sampled.std(-1) / target.std(-1).clamp(min=1e-5)).median().item(),
                "loudness_ratio_db": metrics.loudness_ratio_db(truth, decoded),
                "decoded_mse": losses.waveform_mse(x[..., cut:], mean).item(),
                "waveform_mse": losses.waveform_mse(x[..., :cut], again).item(),
            })  # fmt: skip
        return means_of(rows)
