"""Measures of an evaluation during training, on fixed validation pairs, noise and flow times.

Pairs are evenly spaced over the split. Stage 1's loss is averaged over all window lengths and stereo bases of which
training draws one; stage 2's is at fixed flow times, with one noise a pair and the whole context.
"""

import math
from collections.abc import Iterable
from itertools import product

import numpy as np
import torch
from torch import Tensor

from continuation import losses, metrics
from continuation.rng import make_rng
from continuation.windows import Windows, next_other

PAIRS = 24
DECODED = 4  # pairs whose continuations are decoded; twice as many are reconstructed, and compared with the loop


def mean_of(values) -> float:
    """Compute the mean of the defined values; nan where there is none."""
    defined = [value for value in values if math.isfinite(value)]
    return sum(defined) / len(defined) if defined else math.nan


def means_of(rows: list[dict]) -> dict[str, float]:
    """Compute the means of the defined values; that of the loss is over all rows, to show a non-finite one."""
    means = {name: mean_of(row[name] for row in rows) for name in rows[0]}
    if "loss" in means:
        means["loss"] = sum(row["loss"] for row in rows) / len(rows)
    return means


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return `count` indices from the first to the last of `total`, or all where there are fewer."""
    return np.unique(np.linspace(0, total - 1, count).round().astype(int)).tolist()


def continuation_distance(truth: Tensor, sound: Tensor, sample_rate: int) -> float:
    """Compute the distance of a continuation (1, channels, samples) from the true one: MR-STFT distance, plus 1 -
    onset correlation, plus 1 - chroma cosine; an undefined correlation or cosine counts as 0."""
    truth, sound = (x[0].float().cpu().numpy() for x in (truth, sound))
    onsets = metrics.onset_correlation(*(metrics.Sound(x, sample_rate) for x in (truth, sound)))
    chroma = metrics.chroma_cosine(truth, sound, sample_rate)
    return metrics.mr_stft_distance(truth, sound) + sum(1 - np.nan_to_num([onsets, chroma]))


class Validation:
    """Validation of a model (with EMA weights) on the windows of the validation split.

    autocast: returns the context manager in which the network computes.
    """

    def __init__(self, model, windows: Windows, seed: int, autocast):
        self.model, self.windows, self.seed, self.autocast = model, windows, seed, autocast
        self.config = model.config
        self.cached = None  # latents of the pairs
        self.baselines = {}  # distances of the baselines by pair, the same at every evaluation

    @torch.no_grad()
    def figures(self, stage: int, codec_learns: bool) -> dict[str, float]:
        """Compute `loss`, by which the best checkpoint is chosen, and the other measures of the stage.

        Latents are cached between calls, unless encoder and decoder are trained.
        """
        if codec_learns:
            self.cached = None
        if self.config.learns_waveforms:
            return self.waveform_errors(stage)
        return self.reconstruction() if stage == 1 else self.prediction()

    def pairs(self, count: int) -> list[int]:
        """Return the numbers of `count` pairs, evenly spaced over the split."""
        return evenly_spaced(len(self.windows), count)

    def songs(self, count: int) -> list[int]:
        """Return the middle pair of each of `count` different songs, evenly spaced over the split; of fewer, where it
        has fewer."""
        pairs_of = {}
        for pair, group in enumerate(self.groups(range(len(self.windows)))):
            pairs_of.setdefault(group, []).append(pair)
        songs = list(pairs_of.values())
        return [songs[i][len(songs[i]) // 2] for i in evenly_spaced(len(songs), count)]

    def groups(self, pairs: Iterable[int]) -> list[str]:
        """Return the group of each pair; songs of one group are the same music."""
        return [self.windows.song(pair)["group"] for pair in pairs]

    def audio(self, pair: int) -> Tensor:
        """Read context and target: (1, channels, 2 * chunk)."""
        return self.batch(self.windows.pair(pair))

    def batch(self, x: np.ndarray) -> Tensor:
        """Make a batch of one from x, on the device of the model."""
        return torch.from_numpy(x)[None].to(self.model.latent_mean.device)

    def reconstruction(self) -> dict[str, float]:
        """Compute stage 1's loss over all window lengths and stereo bases, and distances of the decoded audio."""
        rows = []
        for pair in self.pairs(2 * DECODED):
            x = self.audio(pair)[..., : self.config.chunk_samples]
            with self.autocast():
                mean, log_variance = self.model.posterior(x)
                decoded = self.model.decode_with_magnitudes(mean)
            row = {"loss": self.reconstruction_loss(x, mean, log_variance, decoded)}
            signals = [t[0, :, : x.shape[-1]].float().cpu().numpy() for t in (x, decoded[0])]
            row["waveform_mse"] = metrics.waveform_mse(*signals)
            row["mr_stft"] = metrics.mr_stft_distance(*signals)
            row["si_sdr_below_1000_db"] = metrics.si_sdr(*signals, self.config.sample_rate, below_hz=1000)
            rows.append(row)
        return means_of(rows)

    def reconstruction_loss(self, *coded) -> float:
        """Compute the mean over all window lengths and stereo bases, of which a training step draws one."""
        found = []
        for size, basis in self.stft_settings():
            draw = {"sample_rate": self.config.sample_rate, "size": size, "in_mid_side": basis}
            found.append(losses.total_loss(losses.reconstruction_parts(self.model, *coded, draw)).item())
        return sum(found) / len(found)

    def prediction(self) -> dict[str, float]:
        """Compute stage 2's loss, the flow's at fixed times and noise plus the equaliser's, and the context gains:
        the growth of the flow's loss with the context of another song, and of another passage of the same song."""
        encoded = self.encoded_pairs()
        groups = self.groups(list(encoded))
        rows = []
        for i, (number, (pair, other_passage)) in enumerate(encoded.items()):
            by_time = self.prediction_losses(number, pair)
            flow, equaliser = by_time.mean().item(), losses.equaliser_loss(self.model, pair).item()
            row = {"loss": flow + equaliser, "equaliser_loss": equaliser, "latent_mse": by_time[0].item()}
            other = next_other(groups, i)
            other_song = None if other is None else list(encoded.values())[other][0]
            for name, foreign in (("context_gain", other_song), ("context_gain_same_song", other_passage)):
                row[name] = math.nan if foreign is None else self.loss_with(foreign, number, pair) - flow
            rows.append(row)
        return means_of(rows) | means_of([self.against_repetition(number) for number in self.pairs(2 * DECODED)])

    def loss_with(self, foreign: dict, number: int, pair: dict) -> float:
        """Compute the flow's loss of predicting a pair's target from the context of a foreign pair."""
        pair = pair | {part: foreign[part] for part in ("context", "outlook")}
        return self.prediction_losses(number, pair).mean().item()

    def prediction_losses(self, number: int, pair: dict) -> Tensor:
        """Compute the flow's loss at each of the fixed times, with the fixed noise of the pair."""
        with self.autocast():
            return losses.fixed_time_losses(self.model, pair, self.noise(number, pair["target"].shape))

    def against_repetition(self, number: int) -> dict[str, float]:
        """Compute the distances from the true continuation: of the one-step continuation, and of two without a
        network, the loop and the input repeated."""
        past, truth = self.audio(number).split(self.config.chunk_samples, dim=-1)
        copies = self.model.copies(past)
        with self.autocast():
            predicted = self.model.predict(self.model.encode_context(past, copies), steps=1)
            continuation = self.model.decode(predicted, truth.shape[-1], copies)
        rate = self.config.sample_rate
        if number not in self.baselines:
            sounds = {"loop": copies.play(0, truth.shape[-1])[:, 0], "input_repeated": past}
            self.baselines[number] = {name: continuation_distance(truth, x, rate) for name, x in sounds.items()}
        return {"continuation": continuation_distance(truth, continuation, rate)} | self.baselines[number]

    def stft_settings(self) -> list[tuple[int, bool]]:
        """Return every window length and stereo basis."""
        return list(product(losses.spectral_sizes(self.config.sample_rate), (False, True)))

    def encoded_pairs(self) -> dict[int, tuple[dict, dict | None]]:
        """Encode each pair as in stage 2, and another passage of its song (None where there is none): by number."""
        if self.cached is None:
            self.cached = {}
            for number in self.pairs(PAIRS):
                x = self.windows.other_passage(number)
                other = None
                if x is not None:
                    with self.autocast():
                        context = self.model.encode_context(self.batch(x))
                    other = {"context": context.latents, "outlook": context.outlook}
                self.cached[number] = (self.encode_pair(self.audio(number)), other)
        return self.cached

    def encode_pair(self, x: Tensor) -> dict[str, Tensor]:
        """Encode a pair, rounded to fp16 as in the latent cache."""
        with self.autocast():
            return {name: part.half().float() for name, part in self.model.encode_pair(x).items()}

    def noise(self, pair: int, shape: tuple[int, ...]) -> Tensor:
        """Draw a pair's noise, the same at every evaluation."""
        rng = make_rng(self.seed, "validation", pair)
        return torch.from_numpy(rng.standard_normal(shape, dtype="float32")).to(self.model.latent_mean.device)

    def waveform_errors(self, stage: int) -> dict[str, float]:
        """Return the loss and its parts, squared errors of the waveform; the context gain is that of the decoded
        prediction."""
        pairs, rows = self.pairs(2 * DECODED), []
        groups = self.groups(pairs)
        cut = self.config.chunk_samples
        for i, pair in enumerate(pairs):
            x, other = self.audio(pair), next_other(groups, i)
            _, parts = losses.legacy_step(self.model, {"x": x}, predict=True)
            row = {name: value.item() for name, value in parts.items()} | {"context_gain": math.nan}
            row["loss"] = row["waveform_mse"] + (row["decoded_mse"] if stage == 2 else 0.0)
            if other is not None:
                context = self.model.encode_context(self.audio(pairs[other])[..., :cut])
                foreign = self.model.decode(self.model.predict(context), cut)
                row["context_gain"] = losses.waveform_mse(x[..., cut:], foreign).item() - row["decoded_mse"]
            rows.append(row)
        return means_of(rows)

    @torch.no_grad()
    def continuation(self) -> dict[str, float]:
        """Compute the measures of sampled continuations of a few pairs: spread of the latents, loudness, waveform
        error."""
        rows = []
        for pair in self.pairs(DECODED):
            x = self.audio(pair)
            cut = self.config.chunk_samples
            past = x[..., :cut]
            copies = self.model.copies(past)
            with self.autocast():
                context, target = self.model.encode_context(past, copies), self.encode_pair(x)["target"]
                sampled, mean = self.model.predict(context), self.model.predict(context, steps=1)
                decoded = self.model.decode(sampled, cut, copies)
                mean = self.model.decode(mean, cut, copies).float()
                again = self.model.reconstruct(past).float()
            decoded, sampled = decoded[0].float().cpu().numpy(), sampled.float()
            truth = x[0, :, cut:].cpu().numpy()
            rows.append({
                "latent_std_ratio": (sampled.std(-1) / target.std(-1).clamp(min=1e-5)).median().item(),
                "loudness_ratio_db": metrics.loudness_ratio_db(truth, decoded),
                "decoded_mse": losses.waveform_mse(x[..., cut:], mean).item(),
                "waveform_mse": losses.waveform_mse(past, again).item(),
            })  # fmt: skip
        return means_of(rows)
