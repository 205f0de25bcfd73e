"""Judge checkpoints on held-out songs, beside what needs no network: the scorecard.

    python evaluate.py --dataset_folder dataset --checkpoint_folder checkpoints --output_folder scores

Writes scorecard.json, scorecard.csv, scorecard.md, listen.html, pictures/ and sounds/ into the output folder. The
same command gives the same scorecard, bit for bit on the CPU.
Exit codes: 0 done, 1 failed, 2 wrong usage or refused input, 75 interrupted: run the same command again.
"""

import argparse
import hashlib
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from continuation import (
    audio,
    baselines,
    criteria,
    files,
    kad,
    listening_page,
    metrics,
    plots,
    scorecard,
    signals,
)
from continuation.cli import (
    INTERRUPTED,
    UsageError,
    make_folder,
    not_negative_float,
    one_line,
    positive_int,
    seed_number,
    steady_output,
)
from continuation.criteria import CEILING, LOOP, ONE_STEP, OWN_SOUND
from continuation.dataset import SPLITS, Split, known_by_group, open_dataset, read_window
from continuation.windows import Windows, make_rng, next_other
from model import GUIDANCE, SAMPLING_STEPS

SHOWN_SONGS = 3  # songs whose first pair is drawn and written as sound
KEPT_OF_A_CHECKPOINT = ("config", "ema", "stage", "step", "data_meta")  # the rest is large
GAINS = {"gain_another_song": "val_context_gain", "gain_same_song": "val_context_gain_same_song"}  # as train.py logs
WITHOUT_NETWORK = (
    "silence", "input repeated", "tempo-locked loop", LOOP, "another song", "same song elsewhere", "oracle of copies"
)  # fmt: skip
REAL_AUDIO = (LOOP, "another song", "same song elsewhere")  # judged through each codec too
LONG_SONGS = 10  # songs that are continued for LONG_BLOCKS chunks
LONG_BLOCKS = 6
HALVES = ("repeats least", "repeats most")
LONGEST_FILE_NAME = 100  # bytes of a system's; a suffix and a temporary name's additions come to it
PASSAGES_AT_ONCE = 2**30  # bytes of continuations that are looked for in the training songs together


class Stopped(Exception):
    """A stop signal came."""


# Arguments


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    folders = parser.add_argument_group("folders")
    folders.add_argument("--dataset_folder", required=True, type=Path, help="what create_dataset.py wrote")
    folders.add_argument(
        "--checkpoint_folder", required=True, type=Path, nargs="+", metavar="CK", help="what train.py wrote, best.pt"
    )
    folders.add_argument("--output_folder", required=True, type=Path, help="where the scorecard is written")
    folders.add_argument(
        "--predictions", type=named_folder, nargs="+", action="extend", default=[], metavar="NAME=DIR",
        help="continuations by anybody else: a folder with ID.wav for every pair id that scorecard.json lists",
    )  # fmt: skip
    songs = parser.add_argument_group("songs")
    songs.add_argument("--split", choices=SPLITS, default="test", help="split of the dataset")
    songs.add_argument("--pairs_per_song", type=positive_int, default=4, help="pairs, spread over each song")
    songs.add_argument("--seed", type=seed_number, default=0, help="of everything that is drawn")
    sampling = parser.add_argument_group("sampling and hardware")
    sampling.add_argument("--steps", type=positive_int, default=SAMPLING_STEPS, help="steps from noise to music")
    sampling.add_argument(
        "--guidance",
        type=not_negative_float,
        default=GUIDANCE,
        help="how strongly the input is followed; 1: as trained",
    )
    sampling.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    return parser.parse_args(argv)


def named_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    if not file_name(name):
        raise argparse.ArgumentTypeError(f"{text!r}: a name needs a letter or a digit, files are called after it")
    return name, Path(folder)


# What is judged: pairs of the split


@dataclass(frozen=True)
class Pair:
    """Ten seconds and the next ten, and what might stand in for either: float32 (channels, samples), all at the
    level that generation gives its context."""

    number: int  # in the split
    id: str  # the song's, and the second at which the input begins
    song: str
    title: str  # the song's file, as listen.html names it
    gain: float  # from the song's own level
    context: np.ndarray
    target: np.ndarray
    another: np.ndarray | None  # an input of another song; None where all songs are the same music
    other_passage: np.ndarray | None  # of the same song; None where the song is too short


class Pairs:
    """The chosen pairs of a split, song by song."""

    def __init__(self, windows: Windows, pairs_per_song: int):
        self.windows = windows
        owned = [np.flatnonzero(windows.song_of_pair == song) for song in range(len(windows.split.songs))]
        self.chosen = [spread(pairs, pairs_per_song) for pairs in owned if len(pairs)]
        self.songs = [windows.song(pairs[0]) for pairs in self.chosen]

    def __len__(self) -> int:
        return sum(map(len, self.chosen))

    def of_song(self, position: int) -> Iterator[Pair]:
        other = next_other([song["group"] for song in self.songs], position)
        chunk = self.windows.chunk
        for i, number in enumerate(self.chosen[position]):
            x = self.windows.pair(number)
            another = None
            if other is not None:
                pairs = self.chosen[other]
                another = self.windows.pair(pairs[i % len(pairs)])[:, :chunk]
            other_passage = self.windows.other_passage(number)
            song, gain = self.songs[position], self.windows.gain(number)
            names = (self.id(number), song["id"], song["source"])
            yield Pair(number, *names, gain, x[:, :chunk], x[:, chunk:], another, other_passage)

    def id(self, number: int) -> str:
        return f"{self.windows.song(number)['id']}-{self.windows.start_seconds(number):g}"

    def ids(self) -> list[str]:
        return [self.id(number) for pairs in self.chosen for number in pairs]


def spread(pairs: np.ndarray, count: int) -> list[int]:
    """The middles of `count` equal parts of a song's pairs; all of them where there are fewer."""
    count = min(count, len(pairs))
    return [int(pairs[(2 * i + 1) * len(pairs) // (2 * count)]) for i in range(count)]


# Who is judged: checkpoints, and what needs none


@dataclass(frozen=True)
class Continuation:
    """What a listener hears: the input, which a network fades over before the join, and what follows it."""

    context: np.ndarray
    sound: np.ndarray
    comb_rates: tuple[float, float]  # in Hz, at which a network may hum
    seams: Sequence[int] = ()  # samples at which copies of the input begin anew


class Network:
    """A checkpoint on trial."""

    def __init__(self, name: str, folder: Path, state: dict, args: argparse.Namespace):
        from continuation import checkpoint

        self.name, self.folder, self.state_of_training = name, folder, (state["stage"], state["step"])
        self.model = checkpoint.build_model(state, checkpoint.choose_device(args.device))
        self.config, self.seed = self.model.config, args.seed
        self.continues = state["stage"] == 2
        self.samplings = samplings(self.config, args) if self.continues else {}
        songs = (state["data_meta"] or {}).get("songs", [])
        self.trained_on = [song for song in songs if song["split"] == "train"]

    def facts(self, songs: list[dict]) -> dict:
        """What the scorecard says about the checkpoint itself. Under the names of the context gains: what train.py
        measured on its validation songs at the first evaluation of stage 2 and at this checkpoint's."""
        stage, step = self.state_of_training
        seen = known_by_group(songs, self.trained_on)
        log = self.folder / "metrics.jsonl"
        return {
            "folder": str(self.folder),
            "stage": stage,
            "step": step,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "floats_per_second": self.floats_per_second(),
            "songs_trained_on": sorted(song["id"] for song in songs if seen[song["group"]]),
            **(gains_in_training(log, step) if self.continues and log.exists() else {}),
        }

    def floats_per_second(self) -> float:
        return self.config.latent_channels * self.config.latent_rate

    def comb_rates(self) -> tuple[float, float]:
        """Latents and frames a second."""
        return self.config.latent_rate, self.config.sample_rate / self.config.hop

    def encode(self, x: np.ndarray):
        """Latents (1, latent_channels, latents) of audio (channels, samples)."""
        return self.model.encode(self.batch(x))

    def hear(self, x: np.ndarray):
        """The context of audio (channels, samples)."""
        return self.model.hear(self.batch(x))

    def batch(self, *parts: np.ndarray):
        """Parts (channels, samples) of one sound behind one another, as a batch of one on the network's device."""
        import torch

        return torch.from_numpy(np.concatenate(parts, axis=1))[None].to(self.model.latent_mean.device)

    def sound(self, x) -> np.ndarray:
        """A decoded batch of one as (channels, samples)."""
        x = x[0].float().cpu().numpy()
        if not np.isfinite(x).all():
            raise FloatingPointError(f"{self.name}: the network's output is not finite")
        return x

    def reconstruct(self, x: np.ndarray) -> np.ndarray:
        return self.sound(self.model.decode(self.encode(x), x.shape[-1]))

    def latents(self, pair: Pair) -> tuple:
        """Context and target's latents as training sees them."""
        return self.model.encode_pair(self.batch(pair.context, pair.target))

    def draw(self, pair: Pair, purpose: int) -> np.random.Generator:
        return make_rng(self.seed, "validation", pair.number, purpose)

    def predict(self, pair: Pair, context, sampling: dict, purpose: int = 1):
        """Predicted latents of the pair's target; every pair has a noise of its own, the same in every sampling."""
        seed = int(self.draw(pair, purpose).integers(2**31))
        return self.model.predict(context, seed=seed, **sampling).float()

    def play(self, pair: Pair, context, latents, with_copies: bool = True) -> Continuation:
        """What is heard of the pair's input, whose end is faded over, and of `latents` decoded behind it, beside
        copies of the input or as the decoder's own sound alone."""
        import torch

        from model import fade_over

        copies = self.model.copies(self.batch(pair.context)) if with_copies else None
        before, after = map(self.sound, self.model.decode_behind(context, latents, copies))
        heard = fade_over(torch.from_numpy(pair.context), torch.from_numpy(before)).numpy()
        seams = copies.seams(self.config.chunk_samples) if copies else ()
        return Continuation(heard, after[:, : self.config.chunk_samples], self.comb_rates(), seams)

    def generate(self, pair: Pair, seconds: float) -> np.ndarray:
        """A continuation of any length, as generate.py makes it."""
        seed = int(self.draw(pair, 1).integers(2**31))
        return self.model.generate(pair.context, seconds, seed, **self.samplings[""]).numpy()

    def loss(self, pair: Pair, context, target) -> float:
        """Validation loss of the prediction from this context."""
        import torch

        from continuation import losses

        if self.config.is_legacy:
            decoded = self.sound(self.model.decode(self.model.predict(context), pair.target.shape[-1]))
            return metrics.waveform_mse(pair.target, decoded)
        noise = self.draw(pair, 2).standard_normal(target.shape, dtype="float32")
        return losses.fixed_time_losses(self.model, context, target, torch.from_numpy(noise).to(target)).mean().item()

    def context_gain(self, pair: Pair, context, target) -> dict[str, float]:
        """Loss with the true context, and how much other contexts make it worse."""
        own = self.loss(pair, context, target)
        others = {"gain_another_song": pair.another, "gain_same_song": pair.other_passage}
        measures = {"loss": own}
        for name, x in others.items():
            measures[name] = math.nan if x is None else self.loss(pair, self.hear(x), target) - own
        return measures


def gains_in_training(log: Path, step: int) -> dict[str, tuple[float, float]]:
    """The context gains of metrics.jsonl at the first evaluation of stage 2 and at the one of `step`, where it has
    both."""
    from continuation import checkpoint

    found = {}
    records = {record["step"]: record for record in checkpoint.read_records(log) if record["stage"] == 2}
    for name, logged in GAINS.items():
        gains = [records.get(at, {}).get(logged) for at in (0, step)]
        if None not in gains:
            found[name] = tuple(gains)
    return found


def samplings(config, args: argparse.Namespace) -> dict[str, dict]:
    """How a network is made to continue: what is added to its name -> arguments of `predict`."""
    ways = {"": {"steps": args.steps, "guidance": args.guidance}}
    if config.objective == "flow":
        if args.guidance != 1:
            ways[", guidance 1"] = {"steps": args.steps, "guidance": 1.0}
        ways[ONE_STEP] = {"steps": 1, "guidance": 1.0}
    return ways


def load_networks(args: argparse.Namespace, meta: dict) -> list[Network]:
    """The networks of all checkpoint folders, named; refused where one does not fit the dataset."""
    from continuation import checkpoint

    states = []
    for folder in args.checkpoint_folder:
        state = checkpoint.load_network(folder / checkpoint.BEST_NAME)
        check_fit(folder, state, meta)
        states.append({key: state.get(key) for key in KEPT_OF_A_CHECKPOINT})
    names = names_of(args.checkpoint_folder, [state["config"] for state in states])
    zipped = zip(names, args.checkpoint_folder, states, strict=True)
    return [Network(name, folder, state, args) for name, folder, state in zipped]


def check_fit(folder: Path, state: dict, meta: dict) -> None:
    for key, unit in (("sample_rate", " Hz"), ("channels", " channels"), ("chunk_samples", " samples a chunk")):
        own = state["config"][key]
        if own != meta[key]:
            raise UsageError(f"{folder} was trained at {own}{unit}, and the dataset has {meta[key]}{unit}")


def names_of(folders: list[Path], configs: list[dict]) -> list[str]:
    """preset-objective, with the folder's name in brackets where that is not enough, or its path."""
    short = [f"{config['preset']}-{config['objective']}" for config in configs]
    long = [f"{name} ({folder.resolve().name})" for name, folder in zip(short, folders, strict=True)]
    longest = [f"{name} ({folder})" for name, folder in zip(short, folders, strict=True)]
    names = [n if short.count(n) == 1 else m for n, m in zip(short, long, strict=True)]
    names = [n if names.count(n) == 1 else m for n, m in zip(names, longest, strict=True)]
    if len({file_name(name) for name in names}) < len(names):
        raise UsageError("--checkpoint_folder names the same folder twice, or two that differ in signs alone")
    return names


def check_predictions(predictions: list[tuple[str, Path]], networks: list[Network], pairs: Pairs, meta: dict) -> None:
    """Refuse, before hours of work, names that other systems have or might have, and sounds that are missing or
    cannot be judged."""
    taken = {file_name(name) for name in (*WITHOUT_NETWORK, "truth", *(network.name for network in networks))}
    for name, folder in predictions:
        if file_name(name) in taken or "," in name or " through " in name:
            raise UsageError(f"--predictions {name}={folder}: the name is taken by another system")
        taken.add(file_name(name))
        for path in (folder / f"{id}.wav" for id in pairs.ids()):
            if not path.is_file():
                raise UsageError(f"{path} is missing: there must be a continuation of every pair")
            load_prediction(path, meta["sample_rate"], meta["channels"], meta["chunk_samples"])


def load_prediction(path: Path, sample_rate: int, channels: int, samples: int) -> np.ndarray:
    """The first samples of somebody's continuation, float32 (channels, samples); the rest is not read. UsageError for
    a shorter one, and for one that the decoder mends: what it would judge is not what was played."""
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


def read_prediction(folder: Path, pair: Pair, sample_rate: int) -> np.ndarray:
    """Somebody's continuation of the pair, given at the song's own level, at the pair's."""
    return pair.gain * load_prediction(folder / f"{pair.id}.wav", sample_rate, *pair.target.shape)


# Judging


class Judge:
    """Collects the measures of every system over the pairs of a split, and shows a few of them.

    `rows`: section -> system -> (song, measures), one a pair; a few measures need all pairs of a song at once and
    have a row of their own.
    """

    def __init__(self, networks: list[Network], predictions: dict[str, Path], sample_rate: int, args):
        self.networks, self.predictions, self.rate = networks, predictions, sample_rate
        self.seed, self.output = args.seed, args.output_folder
        self.continuing = [network for network in networks if network.continues]
        modern = [network for network in networks if not network.config.is_legacy]
        self.comb_rates = (modern or networks)[0].comb_rates()  # of systems without a network
        self.rows = {section: {} for section in scorecard.SECTIONS}
        self.listening = []  # what listen.html plays
        self.embedders = {"mel": kad.mel_statistics}
        if kad.find_weights():
            self.embedders["musicnn"] = kad.Embedder()
        self.embeddings = {name: {} for name in self.embedders}  # system -> song -> embeddings of its continuations
        self.correlations = {}  # song -> how exactly each pair's input repeats itself
        self.long = {}  # network -> (song, input, truth, blocks of a long continuation)
        self.hums = {"reconstruction": {}, "continuation": {}}  # section -> system -> (Hz, song -> dB of its pairs)
        self.passages = []  # (system, song, pair, passages of the continuation), to be looked for in training songs
        if self.continuing:  # shown even where no pair has one
            self.rows["continuation"] = {name: [] for name in WITHOUT_NETWORK}

    def add(self, section: str, system: str, song: str, measures: dict[str, float]) -> None:
        self.rows[section].setdefault(system, []).append((song, measures))

    def add_hum(self, section: str, system: str, pair: Pair, sound: np.ndarray, rates: tuple[float, float]) -> None:
        frequencies, heights = metrics.hum(pair.target, sound, self.rate, *rates)
        if len(heights):
            _, songs = self.hums[section].setdefault(system, (frequencies, {}))
            songs.setdefault(pair.song, []).append(heights)

    def worst_hums(self) -> dict[str, dict[str, dict]]:
        """section -> system -> the multiple that stands highest above the truth's in the mean over songs, and by how
        many dB."""
        return {
            section: {name: worst_hum(frequencies, songs) for name, (frequencies, songs) in systems.items()}
            for section, systems in self.hums.items()
        }

    def judge_pair(self, pair: Pair, shown: bool) -> dict[str, tuple]:
        """Measure all systems on a pair; returns the true and the predicted latents of those that predict."""
        reconstructions = self.judge_reconstructions(pair)
        if shown:
            self.draw(pair, "reconstruction", {"truth": pair.target, **reconstructions})
        if not self.continuing:
            return {}
        baselines, latents = self.baselines(pair), {}
        continuations = dict(baselines)
        for network in self.continuing:
            played, predicted = self.judge_network(network, pair, baselines)
            continuations |= played
            latents |= predicted
        continuations["truth"] = Continuation(pair.context, pair.target, self.comb_rates)
        self.judge_continuations(pair, continuations)
        if shown:
            self.show(pair, continuations)
        return latents

    def judge_reconstructions(self, pair: Pair) -> dict[str, np.ndarray]:
        seed = int(make_rng(self.seed, "validation", pair.number, 3).integers(2**31))
        sounds = {
            "noise reference": metrics.noise_reference(pair.target, self.rate, seed),
            "smooth reference": metrics.smooth_reference(pair.target, self.rate),
        }
        rates, floats = dict.fromkeys(sounds, self.comb_rates), {}
        for network in self.networks:
            sounds[network.name], rates[network.name] = network.reconstruct(pair.target), network.comb_rates()
            floats[network.name] = {"floats_per_second": network.floats_per_second()}
        for name, sound in sounds.items():
            measures = metrics.reconstruction_measures(pair.target, sound, self.rate, *rates[name])
            self.add("reconstruction", name, pair.song, measures | floats.get(name, {}))
            self.add_hum("reconstruction", name, pair, sound, rates[name])
        return sounds

    def baselines(self, pair: Pair) -> dict[str, Continuation]:
        """What continues a song without a network, as far as this pair has it."""
        loop = baselines.loop(pair.context, self.rate)
        self.correlations.setdefault(pair.song, []).append(loop.correlation)
        bars = baselines.tempo_locked_loop(pair.context, self.rate)
        oracle = baselines.copy_oracle(pair.context, pair.target, self.rate)
        sounds = (
            np.zeros_like(pair.target), pair.context, bars, loop.sound, pair.another, pair.other_passage, oracle
        )  # fmt: skip
        named = dict(zip(WITHOUT_NETWORK, sounds, strict=True))
        named |= {name: read_prediction(folder, pair, self.rate) for name, folder in self.predictions.items()}
        seams = {LOOP: loop.seams}
        return {
            name: Continuation(pair.context, x, self.comb_rates, seams.get(name, ()))
            for name, x in named.items()
            if x is not None
        }

    def judge_network(self, network: Network, pair: Pair, baselines: dict) -> tuple[dict, dict]:
        """By name the continuations of a network, its ceiling and real audio through it among them, and the latents
        of the truth and of what was predicted, or of the real audio."""
        context, target = network.latents(pair)
        self.add("context", network.name, pair.song, network.context_gain(pair, context, target))
        played, latents = {}, {}
        for suffix, sampling in network.samplings.items():
            predicted = network.predict(pair, context, sampling)
            played[network.name + suffix] = network.play(pair, context, predicted)
            latents[network.name + suffix] = target[0].cpu().numpy(), predicted[0].cpu().numpy()
            if not suffix and not network.config.is_legacy:
                played[network.name + OWN_SOUND] = network.play(pair, context, predicted, with_copies=False)
        if network.config.objective == "flow":
            again = network.predict(pair, context, network.samplings[""], purpose=4)[0].cpu().numpy()
            diversity = metrics.latent_diversity(latents[network.name][1], again)
            self.add("continuation", network.name, pair.song, {"latent_diversity": diversity})
        played[network.name + CEILING] = network.play(pair, context, target, with_copies=False)
        for name in (name for name in REAL_AUDIO if name in baselines):
            z, through = network.encode(baselines[name].sound), f"{name} through {network.name}"
            coded = network.sound(network.model.decode(z, pair.target.shape[-1]))
            played[through] = Continuation(pair.context, coded, network.comb_rates())
            latents[through] = target[0].cpu().numpy(), z[0].cpu().numpy()
        return played, latents

    def judge_continuations(self, pair: Pair, continuations: dict[str, Continuation]) -> None:
        heard = {kind: embed(pair.context, self.rate) for kind, embed in self.embedders.items()}
        for name, played in continuations.items():
            measures = metrics.continuation_measures(
                played.context, pair.target, played.sound, self.rate, played.seams
            )
            del measures["join_click_percentile_truth"]  # stands in the truth's own row
            measures |= metrics.combs_above_truth(pair.target, played.sound, self.rate, *played.comb_rates)
            self.add("continuation", name, pair.song, measures)
            self.add_hum("continuation", name, pair, played.sound, played.comb_rates)
            passages = metrics.passages(played.sound, self.rate, 1.0).astype(np.float32)
            self.passages.append((name, pair.song, pair.number, passages))
            for kind, embed in self.embedders.items() if played.sound.any() else ():  # silence is like nothing
                found = embed(played.sound, self.rate)
                self.embeddings[kind].setdefault(name, {}).setdefault(pair.song, []).append(found)
                if kind == "musicnn":
                    likeness = kad.paired_similarity(heard[kind], found)
                    self.add("continuation", name, pair.song, {"embedding_similarity": likeness})

    def kernel_distances(self, kind: str, songs: list[str]) -> dict[str, dict]:
        """Kernel audio distance of each system's continuations of these songs, where it has any, from the true ones,
        its interval over songs, and what it is without each song. kind: musicnn or mel."""
        embeddings = self.embeddings.get(kind, {})
        truth, distances = embeddings.get("truth", {}), {}
        songs = [song for song in songs if song in truth]
        none = next((parts[0][:0] for parts in truth.values()), None)  # of a song in which a system is silent
        for name, found in embeddings.items():
            if not any(song in found for song in songs):
                continue
            sets = ([np.concatenate([none, *parts.get(song, [])]) for song in songs] for parts in (truth, found))
            whole, without = kad.kernel_distance(*sets)
            value, low, high = metrics.jackknife_interval(whole, without)
            without = dict(zip(songs, without.tolist(), strict=True))
            distances[name] = {"mean": value, "low": low, "high": high, "without_song": without}
        return distances

    def halves(self) -> dict[str, list[str]]:
        """The songs whose inputs repeat their sound least exactly, and the others; an odd one is with the least."""
        means = {
            song: metrics.per_song(found, [song] * len(found))[song] for song, found in self.correlations.items()
        }
        ranked = sorted(means, key=means.get)
        middle = (len(ranked) + 1) // 2
        return dict(zip(HALVES, (ranked[:middle], ranked[middle:]), strict=True))

    def continue_long(self, pair: Pair) -> None:
        """Keep a continuation of LONG_BLOCKS chunks by every network, in blocks."""
        seconds = LONG_BLOCKS * pair.context.shape[-1] / self.rate
        for network in self.continuing:
            blocks = np.split(network.generate(pair, seconds), LONG_BLOCKS, axis=1)
            self.long.setdefault(network.name, []).append((pair, blocks))

    def judge_long(self) -> dict[str, list[dict]]:
        """network -> by block of its long continuations: loudness and band energies against the input and chroma to
        it, means over songs, and the kernel audio distances from the true continuations."""
        return {
            name: [self.judge_block([(pair, blocks[i]) for pair, blocks in played]) for i in range(LONG_BLOCKS)]
            for name, played in self.long.items()
        }

    def judge_block(self, block: list[tuple[Pair, np.ndarray]]) -> dict[str, float]:
        rows = [
            {
                "loudness_db": metrics.loudness_ratio_db(pair.context, sound),
                "chroma_cosine": metrics.chroma_cosine(pair.context, sound, self.rate),
                **{
                    f"energy_{band}_db": ratio
                    for band, ratio in metrics.band_energy_ratios_db(pair.context, sound, self.rate).items()
                },
            }
            for pair, sound in block
        ]
        found = {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]}
        for kind, embed in self.embedders.items():
            sets = (
                [embed(x, self.rate) for x in sounds]
                for sounds in zip(*((p.target, s) for p, s in block), strict=True)
            )
            found[f"kernel_audio_distance_{kind}"] = kad.kernel_distance(*sets)[0]
        return found

    def passage_bytes(self) -> int:
        return sum(found.nbytes for *_, found in self.passages)

    def judge_memory(self, sounds: Iterable[np.ndarray]) -> None:
        """Likeness of the continuations since the last call, at least one, to the nearest passages of the training
        songs (`sounds`), minus the true continuation's own."""
        systems, songs, numbers, passages = zip(*self.passages, strict=True)
        nearest = metrics.nearest_likeness(np.concatenate(passages), sounds, self.rate)
        ends = np.cumsum([len(found) for found in passages])
        likeness = [float(part.mean()) if len(part) else math.nan for part in np.split(nearest, ends[:-1])]
        of_truth = {n: value for name, n, value in zip(systems, numbers, likeness, strict=True) if name == "truth"}
        for name, song, number, value in zip(systems, songs, numbers, likeness, strict=True):
            self.add("continuation", name, song, {"memorisation": value - of_truth[number]})
        self.passages.clear()

    def judge_song(self, song: str, latents: list[dict[str, tuple]]) -> None:
        """What needs all pairs of a song: `latents` as `judge_pair` returned them."""
        for name in dict.fromkeys(name for pair in latents for name in pair):
            found = [pair[name] for pair in latents if name in pair]
            true, predicted = (np.stack(parts) for parts in zip(*found, strict=True))
            self.add("continuation", name, song, metrics.latent_std_ratios(true, predicted))

    # pictures and sounds

    def draw(self, pair: Pair, kind: str, sounds: dict[str, np.ndarray]) -> None:
        folder = self.output / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        plots.plot_spectrograms(folder / f"{pair.song}-{kind}.png", list(sounds.items()), self.rate)

    def show(self, pair: Pair, continuations: dict[str, Continuation]) -> None:
        """One picture of all continuations, and each behind its input as a sound and a picture for listen.html; one
        gain for all of them."""
        pictures = {"truth": pair.target, **{name: played.sound for name, played in continuations.items()}}
        del pictures["silence"]
        self.draw(pair, "continuation", pictures)
        suffix = ".mp3" if self.rate in audio.MP3_SAMPLE_RATES else ".wav"
        peak = max(np.abs(pair.context).max(), np.abs(pair.target).max())
        gain = min(1.0, audio.PEAK_LIMIT / peak)
        systems = []
        for name, played in continuations.items():
            whole = gain * np.concatenate([played.context, played.sound], axis=1)
            shown = {kind: f"{kind}s/{pair.song}/{file_name(name)}" for kind in ("sound", "picture")}
            shown["sound"] += suffix
            shown["picture"] += ".png"
            for path in shown.values():
                (self.output / path).parent.mkdir(parents=True, exist_ok=True)
            audio.encode_audio(self.output / shown["sound"], whole, self.rate)
            plots.plot_join(self.output / shown["picture"], whole, self.rate, pair.context.shape[-1] / self.rate)
            systems.append({"name": name, **shown})
        self.listening.append({"title": pair.title, "systems": systems})


def worst_hum(frequencies: np.ndarray, songs: dict[str, list[np.ndarray]]) -> dict[str, float]:
    heights = np.mean([np.mean(pairs, axis=0) for pairs in songs.values()], axis=0)
    worst = int(np.argmax(heights))
    return {"hz": float(frequencies[worst]), "db": float(heights[worst])}


def file_name(system: str) -> str:
    """What the files of a system are called; '' where its name has no letter or digit."""
    name = re.sub(r"[^\w.]+", "-", system).strip("-._")
    if len(name.encode()) <= LONGEST_FILE_NAME:
        return name
    digest = hashlib.sha256(system.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{name[:20]}-{digest[:10]}"


# The scorecard


def summarise(rows: dict, seed: int) -> dict:
    """section -> system -> measure -> mean over songs, its 95 % interval, and the value of each song."""
    return {
        section: {system: summarise_system(entries, seed) for system, entries in systems.items()}
        for section, systems in rows.items()
    }


def summarise_system(entries: list[tuple[str, dict[str, float]]], seed: int) -> dict[str, dict]:
    """Every measure of one system: its pairs are averaged within their songs, and the songs count equally."""
    songs = [song for song, _ in entries]
    figures = {}
    for measure in dict.fromkeys(name for _, measures in entries for name in measures):
        by_song = metrics.per_song([measures.get(measure, math.nan) for _, measures in entries], songs)
        mean, low, high = metrics.bootstrap_interval(by_song.values(), seed)
        figures[measure] = {"mean": mean, "low": low, "high": high, "songs": by_song}
    return figures


def rank(figures: dict, seed: int) -> dict[str, dict[str, dict]]:
    """network -> measure -> how far its continuation is on the way from another song (0) to its ceiling (1), with an
    interval; only where the interval of that whole way, over songs, excludes 0."""
    found = {}
    for ceiling in (name for name in figures if name.endswith(CEILING)):
        network = ceiling.removesuffix(CEILING)
        found[network] = {}
        for measure in figures[ceiling]:
            floor, own, top = (by_song(figures, name, measure) for name in ("another song", network, ceiling))
            way, low, high = metrics.paired_interval(floor, top, seed)
            if low > 0 or high < 0:
                mean, *ends = metrics.paired_interval(floor, own, seed)
                low, high = sorted(end / way for end in ends)
                found[network][measure] = {"mean": mean / way, "low": low, "high": high}
    return found


def by_song(figures: dict, system: str, measure: str) -> list[float]:
    """Values of the songs of the truth's row, nan where the system has none."""
    songs = figures["truth"]["loudness_db"]["songs"]
    values = figures[system].get(measure, {"songs": {}})["songs"]
    return [values.get(song, math.nan) for song in songs]


def notes_on(networks: list[Network], facts: dict[str, dict], pairs: Pairs, split: str) -> list[str]:
    """What a reader has to know before believing a figure."""
    notes = [f"{n.name} is still in stage 1: its reconstruction only" for n in networks if not n.continues]
    for network in networks:
        seen = len(facts[network.name]["songs_trained_on"])
        if seen:
            notes.append(f"{network.name} was trained on {seen} of these {len(pairs.songs)} songs: not held out")
    presets = dict.fromkeys(n.config.preset for n in networks if not n.config.is_legacy) or {"tiny": None}
    expected = [f"{preset}-{objective}" for preset in presets for objective in ("flow", "mse")] + ["legacy-mse"]
    missing = [name for name in expected if not any(network.name.startswith(name) for network in networks)]
    if missing:
        notes.append(f"missing, for want of a checkpoint: {', '.join(missing)}")
    if kad.find_weights() is None:
        notes.append("missing, for want of its weights: KAD; pip install --no-deps musicnn==0.1.0 brings them")
    if split == "val":
        notes.append("training and every choice are steered by val: only test is held out")
    return notes


def make_card(args: argparse.Namespace, judge: Judge, pairs: Pairs, facts: dict[str, dict], notes: list[str]) -> dict:
    from continuation import checkpoint

    figures = summarise(judge.rows, args.seed)
    songs = [song["id"] for song in pairs.songs]
    kept = ("split", "pairs_per_song", "seed", "steps", "guidance")
    card = {
        "format": 1,
        "dataset": str(args.dataset_folder),
        "settings": {name: getattr(args, name) for name in kept},
        "device": judge.networks[0].model.latent_mean.device.type,
        "versions": checkpoint.versions(),
        "checkpoints": facts,
        "songs": {song["id"]: song["source"] for song in pairs.songs},
        "pairs": len(pairs),
        "pair_ids": pairs.ids(),
        "notes": notes,
        "figures": figures,
        "hum": judge.worst_hums(),
        "kernel_audio_distance": judge.kernel_distances("musicnn", songs),
        "kernel_audio_distance_mel": judge.kernel_distances("mel", songs),
        "halves": {
            half: {
                "songs": of_half,
                "kernel_audio_distance": judge.kernel_distances("musicnn", of_half),
                "kernel_audio_distance_mel": judge.kernel_distances("mel", of_half),
            }
            for half, of_half in judge.halves().items()
        },
        "long": judge.judge_long(),
        "ranks": rank(figures["continuation"], args.seed),
    }
    return card | {"gates": [asdict(gate) for gate in criteria.check(card)]}


def write_card(folder: Path, card: dict) -> None:
    files.write_atomic(folder / "scorecard.json", scorecard.as_json(card))
    files.write_atomic(folder / "scorecard.csv", scorecard.as_csv(card["figures"]))
    files.write_atomic(folder / "scorecard.md", scorecard.as_markdown(card))


# Main


def training_sounds(split: Split, meta: dict) -> Iterator[np.ndarray]:
    """Every chunk of a split with the seconds behind it that a passage which begins in it still needs."""
    chunk, more = meta["chunk_samples"], round(metrics.COPY_SECONDS * meta["sample_rate"])
    for song in split.songs:
        for start in range(0, song["rows"] * chunk, chunk):
            length = min(chunk + more, song["rows"] * chunk - start)
            yield audio.from_int16(read_window(split, song, start, length))


def until_stopped(items: Iterable, stop) -> Iterator:
    for item in items:
        if stop.requested:
            raise Stopped
        yield item


def run(args: argparse.Namespace, stop) -> None:

    meta, splits = open_dataset(args.dataset_folder)
    pairs = Pairs(Windows(splits[args.split], meta), args.pairs_per_song)
    networks = load_networks(args, meta)
    check_predictions(args.predictions, networks, pairs, meta)
    facts = {network.name: network.facts(pairs.songs) for network in networks}
    notes = notes_on(networks, facts, pairs, args.split)
    for note in notes:
        print(f"note: {one_line(note)}")
    make_folder(args.output_folder, "--output_folder")
    with files.locked(args.output_folder / ".lock"):
        judge = Judge(networks, dict(args.predictions), meta["sample_rate"], args)
        judge_pairs(judge, pairs, splits["train"], meta, stop)
        write_card(args.output_folder, make_card(args, judge, pairs, facts, notes))
        if judge.listening:
            files.write_atomic(args.output_folder / "listen.html", listening_page.page(judge.listening))
    card_path = one_line(args.output_folder / "scorecard.md")
    print(f"done: {card_path}; listen.html, .json, .csv, pictures and sounds are beside it")


def judge_pairs(judge: Judge, pairs: Pairs, training_split: Split, meta: dict, stop) -> None:
    """Judge every pair, and how near the continuations come to the training songs."""
    import torch
    from tqdm import tqdm

    def look_for_copies() -> None:
        if not judge.passages:
            return
        sounds = tqdm(training_sounds(training_split, meta), desc="memorisation", total=len(training_split.rows))
        judge.judge_memory(until_stopped(sounds, stop))

    with torch.inference_mode(), tqdm(total=len(pairs), unit="pair") as bar:
        for position, song in enumerate(pairs.songs):
            latents = []
            for pair in until_stopped(pairs.of_song(position), stop):
                if position < LONG_SONGS and not latents:
                    judge.continue_long(pair)
                latents.append(judge.judge_pair(pair, shown=position < SHOWN_SONGS and not latents))
                bar.update()
            judge.judge_song(song["id"], latents)
            if judge.passage_bytes() > PASSAGES_AT_ONCE:
                look_for_copies()
    look_for_copies()


@steady_output()
def main(args: argparse.Namespace) -> int:
    import torch

    from continuation import checkpoint

    checkpoint.versions()  # of the code that runs, whatever is checked out before it ends
    try:
        with signals.StopSignals() as stop:
            run(args, stop)
    except (Stopped, KeyboardInterrupt):
        print(f"interrupted by {stop.name}: run the same command again", file=sys.stderr)
        return INTERRUPTED
    except (UsageError, checkpoint.CheckpointError, checkpoint.DeviceError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except (audio.AudioError, OSError, FloatingPointError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except torch.cuda.OutOfMemoryError:
        print("error: the GPU's memory ran out: free some of it, or use --device cpu", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
