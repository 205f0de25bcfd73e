"""Systems that a scorecard compares: baselines, networks, external predictions, and the true continuation."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from continuation import audio, baselines, checkpoint, losses, metrics
from continuation.cli import RunError, UsageError
from continuation.context import Context
from continuation.dataset import known_by_group
from continuation.layers import crossfade
from continuation.pairs import Pair
from continuation.rng import make_rng

GAINS = {"gain_another_song": "val_context_gain", "gain_same_song": "val_context_gain_same_song"}  # as train.py logs
NOISE, LOSS_NOISE, SECOND_NOISE = 1, 2, 4  # purposes of a pair's random draws
LONGEST_FILE_NAME = 100  # bytes, without the suffix and the additions of a temporary name

# Kinds of systems
BASELINE = "baseline"  # without a network
PREDICTIONS = "predictions"  # of another program, read from files
NETWORK = "network"  # predicted latents, decoded, mixed with copies of the context, and equalised
NOT_EQUALISED = "not equalised"  # the same before the equaliser: copies are mixed by a rule, untrained
OWN_SOUND = "own sound"  # predicted latents, decoded without copies
CEILING = "ceiling"  # the true latents, decoded without copies
CODEC = "codec"  # a baseline of real audio through a network's encoder and decoder
REAL = "real"  # the true continuation


@dataclass(frozen=True)
class Sampling:
    """Settings of a flow's sampler: its steps, and classifier-free guidance (1: none)."""

    steps: int
    guidance: float


@dataclass(frozen=True)
class System:
    """A method that continues songs: a row of the scorecard."""

    name: str
    kind: str
    network: Network | None = None
    sampling: Sampling | None = None  # of its predicted latents
    baseline: System | None = None  # whose audio a codec encodes
    folder: Path | None = None  # of external predictions

    @property
    def file_name(self) -> str:
        return file_name(self.name)


SILENCE = System("silence", BASELINE)
INPUT_REPEATED = System("input repeated", BASELINE)
TEMPO_LOCKED_LOOP = System("tempo-locked loop", BASELINE)
LOOP = System("loop", BASELINE)
LONGEST_LOOP = System("loop, longest multiple", BASELINE)
OTHER_SONG = System("another song", BASELINE)
OTHER_PASSAGE = System("same song elsewhere", BASELINE)
COPY_ORACLE = System("oracle of copies", BASELINE)
TRUTH = System("truth", REAL)

BASELINES = (SILENCE, INPUT_REPEATED, TEMPO_LOCKED_LOOP, LOOP, LONGEST_LOOP, OTHER_SONG, OTHER_PASSAGE, COPY_ORACLE)
REAL_AUDIO = (LOOP, OTHER_SONG, OTHER_PASSAGE)  # baselines that every codec encodes too


@dataclass(frozen=True)
class Continuation:
    """Output of a system: the context, whose end a network crossfades into its own output, and the continuation.

    Both are float32 (channels, samples).
    """

    context: np.ndarray
    sound: np.ndarray
    seams: Sequence[int] = ()  # samples at which copies of the context restart
    latents: tuple[np.ndarray, np.ndarray] | None = None  # true and predicted, (latent_channels, latents) each


def file_name(name: str) -> str:
    """Return the name of a system's files, without suffix; '' where its own name has no letter or digit."""
    plain = re.sub(r"[^\w.]+", "-", name).strip("-._")
    if len(plain.encode()) <= LONGEST_FILE_NAME:
        return plain
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{plain[:20]}-{digest[:10]}"


def play_baselines(pair: Pair, loop: baselines.Loop, sample_rate: int) -> dict[System, Continuation]:
    """Continue a pair by all baselines that are defined for it; loop: that of its context."""
    sounds = {
        SILENCE: np.zeros_like(pair.target),
        INPUT_REPEATED: pair.context,
        TEMPO_LOCKED_LOOP: baselines.tempo_locked_loop(pair.context, sample_rate),
        LOOP: loop.sound,
        LONGEST_LOOP: loop.longest,
        OTHER_SONG: pair.other_song,
        OTHER_PASSAGE: pair.other_passage,
        COPY_ORACLE: baselines.copy_oracle(pair.context, pair.target, sample_rate),
    }
    return {
        system: Continuation(pair.context, sound, loop.seams if system is LOOP else ())
        for system, sound in sounds.items()
        if sound is not None
    }


def play_predictions(system: System, pair: Pair, sample_rate: int) -> Continuation:
    """Read an external prediction of the pair, which is at the song's own level, and scale it to the pair's."""
    sound = load_prediction(system.folder / f"{pair.id}.wav", sample_rate, *pair.target.shape)
    return Continuation(pair.context, pair.gain * sound)


def load_prediction(path: Path, sample_rate: int, channels: int, samples: int) -> np.ndarray:
    """Read the first samples of an external prediction, float32 (channels, samples).

    Raises UsageError for a shorter file, and for one that the decoder has to repair, since measures would not be of
    what was predicted.
    """
    decoder = audio.Decoder(path, sample_rate, channels, samples / sample_rate)
    try:
        x = np.concatenate([np.zeros((channels, 0), np.float32), *decoder], axis=1)
    except audio.AudioError as error:
        raise UsageError(f"{path}: {error}") from error
    if x.shape[1] < samples:
        raise UsageError(f"{path} is too short: {x.shape[1] / sample_rate:g} s of {samples / sample_rate:g} s")
    if decoder.notes:
        raise UsageError(f"{path} cannot be judged as it is: {'; '.join(decoder.notes)}")
    return x


# Networks


class Network:
    """A checkpoint under evaluation.

    state: the checkpoint's stage, step and data_meta. sampling: settings of its sampler, used where it continues
    songs (stage 2); every pair has its own noise, the same in all samplings.
    """

    def __init__(self, name: str, folder: Path, state: dict, model, sampling: Sampling, seed: int):
        self.name, self.folder, self.model, self.seed = name, folder, model, seed
        self.stage, self.step = state["stage"], state["step"]
        self.config = model.config
        self.continues = self.stage == 2
        self.is_flow = self.config.objective == "flow"
        self.sampling = sampling
        self.systems = self.make_systems() if self.continues else []
        songs = (state["data_meta"] or {}).get("songs", [])
        self.trained_on = [song for song in songs if song["split"] == "train"]

    def make_systems(self) -> list[System]:
        """Make the systems whose continuations `continue_pair` plays, in the order of their rows."""
        parts = (NOT_EQUALISED, OWN_SOUND) if self.config.has_copies else ()
        return [
            System(self.name, NETWORK, self, self.sampling),
            *(System(f"{self.name}, {part}", part, self, self.sampling) for part in parts),
            *(System(f"{self.name}, {way}", NETWORK, self, s) for way, s in self.other_samplings().items()),
            System(f"{self.name}, ceiling", CEILING, self),
            *(System(f"{real.name} through {self.name}", CODEC, self, baseline=real) for real in REAL_AUDIO),
        ]

    def other_samplings(self) -> dict[str, Sampling]:
        """Return further samplings of a flow, by what they add to its name."""
        if not self.is_flow:
            return {}
        as_trained = {} if self.sampling.guidance == 1 else {"guidance 1": Sampling(self.sampling.steps, 1.0)}
        return as_trained | {"one step": Sampling(1, 1.0)}

    # Facts about the checkpoint

    def facts(self, songs: list[dict]) -> dict:
        """Describe the checkpoint; songs: those that it is evaluated on.

        The context gains are those that train.py measured on its validation songs, at the first evaluation of stage 2
        and at this checkpoint's.
        """
        seen = known_by_group(songs, self.trained_on)
        log = self.folder / "metrics.jsonl"
        return {
            "folder": str(self.folder),
            "stage": self.stage,
            "step": self.step,
            "objective": self.config.objective,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "floats_per_second": self.floats_per_second(),
            "songs_trained_on": sorted(song["id"] for song in songs if seen[song["group"]]),
            **(gains_in_training(log, self.step) if self.continues and log.exists() else {}),
        }

    def floats_per_second(self) -> float:
        return self.config.latent_channels * self.config.latent_rate

    def comb_rates(self) -> tuple[float, float]:
        """Return latents and frames per second: the rates in Hz whose multiples may be audible in decoded audio."""
        return self.config.latent_rate, self.config.sample_rate / self.config.hop

    # Audio and latents

    def batch(self, *parts: np.ndarray) -> Tensor:
        """Concatenate parts (channels, samples) of one signal to a batch of one on the network's device."""
        return torch.from_numpy(np.concatenate(parts, axis=1))[None].to(self.model.latent_mean.device)

    def sound(self, x: Tensor) -> np.ndarray:
        """Convert a decoded batch of one to (channels, samples); RunError where it is not finite."""
        x = x[0].float().cpu().numpy()
        if not np.isfinite(x).all():
            raise RunError(f"{self.name}: the network's output is not finite")
        return x

    def encode(self, x: np.ndarray) -> Tensor:
        """Encode audio (channels, samples) as latents (1, latent_channels, latents)."""
        return self.model.encode(self.batch(x))

    def encode_context(self, x: np.ndarray) -> Context:
        """Encode audio (channels, samples) as the core's input."""
        return self.model.encode_context(self.batch(x))

    def encode_pair(self, pair: Pair) -> dict[str, Tensor]:
        """Encode a pair's context and target, as training does."""
        return self.model.encode_pair(self.batch(pair.context, pair.target))

    def reconstruct(self, x: np.ndarray) -> np.ndarray:
        """Encode and decode audio (channels, samples)."""
        return self.sound(self.model.decode(self.encode(x), x.shape[-1]))

    # Continuations

    def continue_pair(
        self, pair: Pair, encoded: dict[str, Tensor], baselines: dict[System, Continuation]
    ) -> dict[System, Continuation]:
        """Continue a pair by all of the network's systems; baselines: the pair's baseline continuations."""
        context, target = Context(encoded["context"], encoded.get("outlook")), encoded["target"]
        samplings = dict.fromkeys(system.sampling for system in self.systems if system.sampling)
        predicted = {sampling: self.predict(pair, context, sampling) for sampling in samplings}
        played = {}
        for system in self.systems:
            if system.kind == NETWORK:
                prediction = predicted[system.sampling]
                latents = as_arrays(target, prediction)
                played[system] = replace(self.play(pair, context, prediction), latents=latents)
            elif system.kind == NOT_EQUALISED:
                played[system] = self.play(pair, context, predicted[system.sampling], equalise=False)
            elif system.kind == OWN_SOUND:
                played[system] = self.play(pair, context, predicted[system.sampling], with_copies=False)
            elif system.kind == CEILING:
                played[system] = self.play(pair, context, target, with_copies=False)
            elif system.baseline in baselines:
                played[system] = self.code(pair, target, baselines[system.baseline].sound)
        return played

    def predict(self, pair: Pair, context: Context, sampling: Sampling, purpose: int = NOISE) -> Tensor:
        """Predict the pair's target; the noise is the pair's own, the same in every sampling."""
        seed = int(self.rng(pair, purpose).integers(2**31))
        return self.model.predict(context, seed=seed, **asdict(sampling))

    def rng(self, pair: Pair, purpose: int) -> np.random.Generator:
        return make_rng(self.seed, "validation", pair.number, purpose)

    def play(
        self, pair: Pair, context: Context, predicted: Tensor, with_copies: bool = True, equalise: bool = True
    ) -> Continuation:
        """Decode a prediction after the pair's context, whose end is crossfaded, with copies of it or without."""
        copies = self.model.copies(self.batch(pair.context)) if with_copies else None
        decoded = self.model.decode_continuation(context, predicted, copies, equalise=equalise)
        context_tail, continuation = map(self.sound, decoded)
        faded = crossfade(torch.from_numpy(pair.context), torch.from_numpy(context_tail)).numpy()
        seams = copies.seams(self.config.chunk_samples) if copies else ()
        return Continuation(faded, continuation[:, : self.config.chunk_samples], seams)

    def code(self, pair: Pair, target: Tensor, x: np.ndarray) -> Continuation:
        """Encode and decode real audio x (channels, samples) in place of the target; target: the true latents."""
        latents = self.encode(x)
        sound = self.sound(self.model.decode(latents, x.shape[-1]))
        return Continuation(pair.context, sound, latents=as_arrays(target, latents))

    def generate(self, pair: Pair, seconds: float) -> np.ndarray:
        """Generate a continuation of any length, as generate.py does: (channels, samples)."""
        seed = int(self.rng(pair, NOISE).integers(2**31))
        return self.model.generate(pair.context, seconds, seed, **asdict(self.sampling)).numpy()

    # Measures that need the network

    def loss(self, pair: Pair, encoded: dict[str, Tensor]) -> float:
        """Compute the loss of the prediction of an encoded pair, without the equaliser's."""
        if self.config.learns_waveforms:
            predicted = self.model.predict(Context(encoded["context"], None))
            return metrics.waveform_mse(pair.target, self.sound(self.model.decode(predicted, pair.target.shape[-1])))
        noise = self.rng(pair, LOSS_NOISE).standard_normal(encoded["target"].shape, dtype="float32")
        noise = torch.from_numpy(noise).to(encoded["target"])
        return losses.fixed_time_losses(self.model, encoded, noise).mean().item()

    def context_gain(self, pair: Pair, encoded: dict[str, Tensor]) -> dict[str, float]:
        """Compute the loss with the true context, and by how much it grows with other contexts; nan where the pair
        has no other."""
        own = self.loss(pair, encoded)
        measures = {"loss": own}
        for name, x in (("gain_another_song", pair.other_song), ("gain_same_song", pair.other_passage)):
            measures[name] = math.nan if x is None else self.loss(pair, encoded | self.foreign_context(x)) - own
        return measures

    def foreign_context(self, x: np.ndarray) -> dict[str, Tensor]:
        """Encode another context x (channels, samples) as the parts of an encoded pair that it replaces."""
        context = self.encode_context(x)
        return {"context": context.latents, "outlook": context.outlook}

    def diversity(self, pair: Pair, encoded: dict[str, Tensor], predicted: np.ndarray) -> float:
        """Compute `metrics.latent_diversity` between the predicted latents and those from other noise."""
        context = Context(encoded["context"], encoded.get("outlook"))
        again = self.predict(pair, context, self.sampling, SECOND_NOISE)
        return metrics.latent_diversity(predicted, again[0].float().cpu().numpy())


def as_arrays(*latents: Tensor) -> tuple[np.ndarray, ...]:
    """Convert batches of one to arrays (latent_channels, latents)."""
    return tuple(z[0].float().cpu().numpy() for z in latents)


def gains_in_training(log: Path, step: int) -> dict[str, tuple[float, float]]:
    """Read each context gain of metrics.jsonl at the first evaluation of stage 2 and at `step`, where it has both."""
    found = {}
    records = {record["step"]: record for record in checkpoint.read_records(log) if record["stage"] == 2}
    for name, logged in GAINS.items():
        gains = [records.get(at, {}).get(logged) for at in (0, step)]
        if None not in gains:
            found[name] = tuple(gains)
    return found
