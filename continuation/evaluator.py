"""The evaluator: runs every system on the pairs of a split, and collects the measures."""

import math
from collections.abc import Iterable

import numpy as np

from continuation import baselines, kad, metrics
from continuation.criteria import HALVES
from continuation.metrics import Sound
from continuation.pairs import Pair
from continuation.rng import make_rng
from continuation.scorecard import SECTIONS
from continuation.systems import (
    BASELINES,
    TRUTH,
    Continuation,
    Network,
    System,
    play_baselines,
    play_predictions,
)

LONG_BLOCKS = 6  # chunks of a long continuation
REFERENCE_NOISE = 3  # purpose of the random draws of the noise reference


class Evaluator:
    """Runner of the systems, and collector of their measures.

    rows: section -> system -> (song, measures), one per pair; measures that need all pairs of a song have a row of
    their own.
    """

    def __init__(self, networks: list[Network], predictions: list[System], sample_rate: int, seed: int):
        self.networks, self.predictions, self.rate, self.seed = networks, predictions, sample_rate, seed
        self.continuing = [network for network in networks if network.continues]
        framewise = [network for network in networks if network.config.latent_samples == network.config.hop]
        self.comb_rates = (framewise or networks)[0].comb_rates()  # of systems without a network
        self.embedders = {"mel": kad.mel_statistics}
        if kad.find_weights():
            self.embedders["musicnn"] = kad.Embedder()
        self.rows = {section: {} for section in SECTIONS}
        self.hums = {"reconstruction": {}, "continuation": {}}  # section -> system -> (Hz, song -> dB of its pairs)
        self.embeddings = {kind: {} for kind in self.embedders}  # kind -> system -> song -> its continuations'
        self.correlations = {}  # song -> correlation of each pair's loop
        self.latents = {}  # system -> (true, predicted) of the pairs of the current song
        self.passages = []  # (system, song, pair, passages of the continuation), to compare with the training songs
        self.long = {}  # network -> (pair, blocks of a long continuation)
        if self.continuing:  # shown even where no pair has one
            self.rows["continuation"] = {system.name: [] for system in BASELINES}

    def add(self, section: str, system: str, song: str, measures: dict[str, float]) -> None:
        self.rows[section].setdefault(system, []).append((song, measures))

    # Running the systems

    def reconstruct(self, pair: Pair) -> dict[str, np.ndarray]:
        """Make the reference signals and all networks' reconstructions of a pair's target, by the names of rows."""
        seed = int(make_rng(self.seed, "validation", pair.number, REFERENCE_NOISE).integers(2**31))
        references = {
            "noise reference": metrics.noise_reference(pair.target, self.rate, seed),
            "smooth reference": metrics.smooth_reference(pair.target, self.rate),
        }
        return references | {network.name: network.reconstruct(pair.target) for network in self.networks}

    def continue_pair(self, pair: Pair) -> dict[System, Continuation]:
        """Continue a pair by every system that can, in the order of rows, and compute the measures that need the
        networks. Empty where no network continues songs yet."""
        if not self.continuing:
            return {}
        loop = baselines.loop(pair.context, self.rate)
        self.correlations.setdefault(pair.song, []).append(loop.correlation)
        played = play_baselines(pair, loop, self.rate)
        real_audio = dict(played)
        played |= {system: play_predictions(system, pair, self.rate) for system in self.predictions}
        for network in self.continuing:
            encoded = network.encode_pair(pair)
            self.add("context", network.name, pair.song, network.context_gain(pair, encoded))
            played |= network.continue_pair(pair, encoded, real_audio)
            if network.is_flow:
                diversity = network.diversity(pair, encoded, played[network.systems[0]].latents[1])
                self.add("continuation", network.name, pair.song, {"latent_diversity": diversity})
        return played | {TRUTH: Continuation(pair.context, pair.target)}

    # Measuring

    def measure_reconstructions(self, pair: Pair, sounds: dict[str, np.ndarray]) -> None:
        """Measure all reconstructions of a pair's target; sounds: by the names of rows."""
        networks, truth = {network.name: network for network in self.networks}, Sound(pair.target, self.rate)
        for name, samples in sounds.items():
            network, sound = networks.get(name), Sound(samples, self.rate)
            rates = network.comb_rates() if network else self.comb_rates
            measures = metrics.reconstruction_measures(truth, sound, *rates)
            if network:
                measures["floats_per_second"] = network.floats_per_second()
            self.add("reconstruction", name, pair.song, measures)
            self.add_hum("reconstruction", name, pair.song, metrics.hum(truth, sound, *rates))

    def measure_continuations(self, pair: Pair, continuations: dict[System, Continuation]) -> None:
        """Measure all continuations of a pair against the true one."""
        if not continuations:
            return
        context, truth = Sound(pair.context, self.rate), Sound(pair.target, self.rate)
        own = {kind: embed(pair.context, self.rate) for kind, embed in self.embedders.items()}
        for system, played in continuations.items():
            past = context if played.context is pair.context else Sound(played.context, self.rate)
            sound = truth if played.sound is pair.target else Sound(played.sound, self.rate)
            rates = system.network.comb_rates() if system.network else self.comb_rates
            measures = metrics.continuation_measures(past, truth, sound, played.seams)
            del measures["join_click_percentile_truth"]  # it is in the truth's own row
            measures |= metrics.combs_above_truth(truth, sound, *rates)
            self.add("continuation", system.name, pair.song, measures)
            self.add_hum("continuation", system.name, pair.song, metrics.hum(truth, sound, *rates))
            passages = metrics.passages(played.sound, self.rate, 1.0).astype(np.float32)
            self.passages.append((system.name, pair.song, pair.number, passages))
            if played.latents:
                self.latents.setdefault(system.name, []).append(played.latents)
            if played.sound.any():  # silence has no passages
                self.embed(system.name, pair.song, played.sound, own)

    def add_hum(self, section: str, system: str, song: str, hum: tuple[np.ndarray, np.ndarray]) -> None:
        """Add the hum of one pair, frequencies in Hz and heights in dB; nothing where it is empty."""
        frequencies, heights = hum
        if len(heights):
            _, songs = self.hums[section].setdefault(system, (frequencies, {}))
            songs.setdefault(song, []).append(heights)

    def embed(self, system: str, song: str, sound: np.ndarray, of_context: dict[str, np.ndarray]) -> None:
        """Collect the embeddings of a continuation, and the similarity of its musicnn embedding to the context's."""
        for kind, embed in self.embedders.items():
            found = embed(sound, self.rate)
            self.embeddings[kind].setdefault(system, {}).setdefault(song, []).append(found)
            if kind == "musicnn":
                similarity = kad.paired_similarity(of_context[kind], found)
                self.add("continuation", system, song, {"embedding_similarity": similarity})

    def finish_song(self, song: str) -> None:
        """Compute the measures that need the latents of all pairs of a song."""
        for system, latents in self.latents.items():
            true, own = (np.stack(parts) for parts in zip(*latents, strict=True))
            self.add("continuation", system, song, metrics.latent_std_ratios(true, own))
        self.latents.clear()

    def passage_bytes(self) -> int:
        return sum(found.nbytes for *_, found in self.passages)

    def measure_memorisation(self, sounds: Iterable[np.ndarray]) -> None:
        """Compare the continuations since the last call, at least one, with the nearest passages of the training
        songs (`sounds`), less the similarity of the true continuation."""
        systems, songs, numbers, passages = zip(*self.passages, strict=True)
        nearest = metrics.nearest_similarity(np.concatenate(passages), sounds, self.rate)
        ends = np.cumsum([len(found) for found in passages])
        similarities = [float(part.mean()) if len(part) else math.nan for part in np.split(nearest, ends[:-1])]
        rows = list(zip(systems, songs, numbers, similarities, strict=True))
        of_truth = {number: value for system, _, number, value in rows if system == TRUTH.name}
        for system, song, number, value in rows:
            self.add("continuation", system, song, {"memorisation": value - of_truth[number]})
        self.passages.clear()

    def continue_long(self, pair: Pair) -> None:
        """Collect a continuation of LONG_BLOCKS chunks by every network, in blocks."""
        seconds = LONG_BLOCKS * pair.context.shape[-1] / self.rate
        for network in self.continuing:
            blocks = np.split(network.generate(pair, seconds), LONG_BLOCKS, axis=1)
            self.long.setdefault(network.name, []).append((pair, blocks))

    # Results over all songs

    def worst_hums(self) -> dict[str, dict[str, dict]]:
        """Return section -> system -> the multiple with the largest mean excess over the truth's, over songs, and
        that excess in dB."""
        return {
            section: {name: worst_hum(frequencies, songs) for name, (frequencies, songs) in systems.items()}
            for section, systems in self.hums.items()
        }

    def kernel_distances(self, kind: str, songs: list[str]) -> dict[str, dict]:
        """Compute the kernel audio distance of each system's continuations of these songs from the true ones, its
        interval over songs, and its values without each song. kind: musicnn or mel."""
        embeddings = self.embeddings.get(kind, {})
        truth, distances = embeddings.get(TRUTH.name, {}), {}
        songs = [song for song in songs if song in truth]
        none = next((parts[0][:0] for parts in truth.values()), None)  # of a song in which a system is silent
        for system, found in embeddings.items():
            if not any(song in found for song in songs):
                continue
            sets = ([np.concatenate([none, *parts.get(song, [])]) for song in songs] for parts in (truth, found))
            whole, without = kad.kernel_distance(*sets)
            value, low, high = metrics.jackknife_interval(whole, without)
            without = dict(zip(songs, without.tolist(), strict=True))
            distances[system] = {"mean": value, "low": low, "high": high, "without_song": without}
        return distances

    def halves(self) -> dict[str, list[str]]:
        """Split the songs into the half whose contexts repeat least exactly, with the odd one, and the others."""
        means = {song: metrics.per_song(own, [song] * len(own))[song] for song, own in self.correlations.items()}
        ranked = sorted(means, key=means.get)
        middle = (len(ranked) + 1) // 2
        return dict(zip(HALVES, (ranked[:middle], ranked[middle:]), strict=True))

    def long_measures(self) -> dict[str, list[dict]]:
        """Return network -> the measures of `measure_block` for each block of its long continuations."""
        return {
            name: [self.measure_block([(pair, blocks[i]) for pair, blocks in played]) for i in range(LONG_BLOCKS)]
            for name, played in self.long.items()
        }

    def measure_block(self, block: list[tuple[Pair, np.ndarray]]) -> dict[str, float]:
        """Compute loudness, band energies and chroma relative to the context, means over songs, and the kernel audio
        distances from the true continuations."""
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
        means = {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]}
        for kind, embed in self.embedders.items():
            true = [embed(pair.target, self.rate) for pair, _ in block]
            own = [embed(sound, self.rate) for _, sound in block]
            means[f"kernel_audio_distance_{kind}"] = kad.kernel_distance(true, own)[0]
        return means


def worst_hum(frequencies: np.ndarray, songs: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """Return frequency and height, mean over songs, of the line that stands highest; songs: heights (n,) by pair."""
    heights = np.mean([np.mean(pairs, axis=0) for pairs in songs.values()], axis=0)
    worst = int(np.argmax(heights))
    return {"hz": float(frequencies[worst]), "db": float(heights[worst])}
