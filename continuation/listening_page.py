"""The listening page: every system's continuation of the same songs side by side, or blind, with ratings."""

import json
from pathlib import Path
from urllib.parse import quote

import numpy as np

from continuation import audio, files, plots
from continuation.cli import one_line
from continuation.pairs import Pair
from continuation.systems import SILENCE, TRUTH, Continuation, System

TEMPLATE = Path(__file__).with_suffix(".html")


class ListeningPage:
    """Writer of listen.html and its pictures and sounds: a few pairs, one per song."""

    def __init__(self, folder: Path, sample_rate: int):
        self.folder, self.rate = folder, sample_rate
        self.songs = []

    def add(
        self, pair: Pair, reconstructions: dict[str, np.ndarray], continuations: dict[System, Continuation]
    ) -> None:
        """Write pictures and sounds of a pair; continuations: empty where no network continues songs yet."""
        self.add_reconstructions(pair, reconstructions)
        if continuations:
            self.add_continuations(pair, continuations)

    def add_reconstructions(self, pair: Pair, sounds: dict[str, np.ndarray]) -> None:
        """Write one picture of a pair's target and of its reconstructions, by their names."""
        self.write_spectrograms(f"{pair.song}-reconstruction", {TRUTH.name: pair.target, **sounds})

    def add_continuations(self, pair: Pair, continuations: dict[System, Continuation]) -> None:
        """Write one picture of all continuations of a pair, and a sound and a picture of each, after its context.

        All sounds have the same gain.
        """
        others = {system.name: played.sound for system, played in continuations.items() if system is not SILENCE}
        self.write_spectrograms(f"{pair.song}-continuation", {TRUTH.name: pair.target} | others)
        peak = max(np.abs(pair.context).max(), np.abs(pair.target).max())
        gain = min(1.0, audio.PEAK_LIMIT / peak)
        systems = [self.write_system(pair, *played, gain) for played in continuations.items()]
        self.songs.append({"title": pair.title, "systems": systems})

    def write_spectrograms(self, name: str, sounds: dict[str, np.ndarray]) -> None:
        folder = self.folder / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        plots.plot_spectrograms(folder / f"{name}.png", list(sounds.items()), self.rate)

    def write_system(self, pair: Pair, system: System, played: Continuation, gain: float) -> dict[str, str]:
        """Write the sound and the picture of one continuation; return its entry for `page`."""
        whole = gain * np.concatenate([played.context, played.sound], axis=1)
        suffix = ".mp3" if self.rate in audio.MP3_SAMPLE_RATES else ".wav"
        sound = f"sounds/{pair.song}/{system.file_name}{suffix}"
        picture = f"pictures/{pair.song}/{system.file_name}.png"
        for path in (sound, picture):
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        audio.encode_audio(self.folder / sound, whole, self.rate)
        plots.plot_join(self.folder / picture, whole, self.rate, pair.context.shape[-1] / self.rate)
        return {"name": system.name, "sound": sound, "picture": picture}

    def write(self) -> None:
        """Write listen.html, if there is anything to listen to."""
        if self.songs:
            files.write_atomic(self.folder / "listen.html", page(self.songs))


def page(songs: list[dict]) -> str:
    """Make one HTML file that needs no server.

    songs: {"title", "systems": [{"name", "sound", "picture"}]} each; sounds and pictures by paths from the page.
    """
    shown = [
        {"title": one_line(song["title"]), "systems": [
            {"name": one_line(system["name"]), "sound": quote(system["sound"]), "picture": quote(system["picture"])}
            for system in song["systems"]
        ]}
        for song in songs
    ]  # fmt: skip
    content = json.dumps(shown).replace("<", "\\u003c")  # a title must not close its script element
    return TEMPLATE.read_text(encoding="utf-8").replace("@SONGS@", content)
