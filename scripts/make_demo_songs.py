"""Synthesise songs to try the project: drums, bass, chords and lead, with different sounds in each song.

    python scripts/make_demo_songs.py --output_folder songs --songs 24 --seconds 60 --seed 0

Every song is in 4/4 with its own tempo, key, chord progression, groove, instruments, stereo image and structure, all
drawn from the seed. Bars and phrases repeat, so that the continuation can be predicted from the context.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STEPS_PER_BAR = 16  # sixteenth notes
BARS_PER_SECTION = 4
TABLE_SAMPLES = 2048
LOUDNESS_RMS = 0.14  # -17 dBFS
PEAK = 0.9
MP3_COMPRESSION_LEVEL = 0.2

SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
PROGRESSIONS = {  # scale degrees from 0, a chord per bar
    "major": (
        (0, 4, 5, 3),
        (0, 5, 3, 4),
        (5, 3, 0, 4),
        (0, 3, 1, 4),
        (1, 4, 0, 5),
        (0, 2, 3, 4),
        (3, 4, 2, 5),
    ),
    "minor": (
        (0, 5, 2, 6),
        (0, 3, 5, 4),
        (0, 6, 5, 6),
        (0, 5, 3, 6),
        (0, 2, 6, 3),
        (3, 0, 5, 6),
        (5, 6, 0, 0),
    ),
}
# A digit per sixteenth: the stroke's strength, 0 to 9.
KICKS = (
    "9000900090009000",
    "9000000090800000",
    "9000007090000000",
    "9007000090070000",
    "9000009000900000",
    "9000000700900070",
)
SNARES = ("0000900000009000", "0000900000009002", "0000900200209000", "0000000090000000", "0000900000009030")
HATS = ("6040604060406040", "0060006000600060", "6343634363436343", "6000603060006030", "5053505350535053")
BASSES = (
    "9000000090000000",
    "9070807090708070",
    "9000009000800000",
    "9008000890080008",
    "0090009000900090",
    "9007008009007000",
)
STABS = ("9000000000000000", "9000009000000000", "0000800000008000", "9008008009000000", "0080008000800080")
ARPEGGIOS = ((0, 1, 2, 1), (0, 1, 2, 3), (2, 1, 0, 1), (0, 2, 1, 2), (3, 2, 1, 0))
LAYERS = {  # which parts play in a section
    "intro": ("drums", "bass", "chords"),
    "verse": ("drums", "bass", "chords", "arpeggio"),
    "chorus": ("drums", "bass", "chords", "arpeggio", "lead"),
    "solo": ("drums", "bass", "lead"),
    "break": ("bass", "chords", "lead"),
}
FORMS = (
    ("intro", "verse", "chorus", "verse", "chorus", "break", "chorus"),
    ("verse", "chorus", "solo", "verse", "chorus", "chorus"),
    ("intro", "chorus", "verse", "break", "chorus", "solo"),
    ("verse", "verse", "chorus", "break", "verse", "chorus"),
)


@dataclass(frozen=True)
class Timbre:
    """Sound of an instrument: a wavetable between a bright and a dark spectrum, an envelope, detuning and FM."""

    slope: float  # harmonic k has the level k ** -slope
    even: float  # level of the even harmonics: 0 as in a square wave, 1 as in a sawtooth
    cutoff_hz: float  # where the dark spectrum ends
    sweep_octaves: float  # how far above it the bright one does
    sweep_seconds: float  # time from bright to dark
    attack_seconds: float
    decay_seconds: float
    sustain: float
    release_seconds: float
    detune_cents: float = 0.0  # left up, right down
    vibrato_cents: float = 0.0
    fm_ratio: float = 1.0
    fm_index: float = 0.0


@dataclass(frozen=True)
class Note:
    step: float  # sixteenths from the song's start
    pitch: int  # MIDI
    steps: float  # length
    strength: float  # 0 to 1


@dataclass(frozen=True)
class Part:
    """One instrument and its notes."""

    timbre: Timbre
    notes: list[Note]
    level: float
    pan: float  # -1 left to 1 right
    echo: float = 0.0


@dataclass(frozen=True)
class Clock:
    """Times of sixteenths; the odd ones are late by `swing` of a step."""

    step_seconds: float
    swing: float

    def seconds(self, step: float) -> float:
        return (step + self.swing * (int(step) % 2)) * self.step_seconds


# Sounds: pitched


def wave_table(timbre: Timbre, frequency: float, cutoff_hz: float, sample_rate: int) -> np.ndarray:
    """Make one period, without harmonics above 0.45 of the sample rate, so that nothing aliases."""
    harmonics = np.arange(1, min(TABLE_SAMPLES // 4, int(0.45 * sample_rate / frequency)) + 1)
    levels = harmonics**-timbre.slope * np.where(harmonics % 2 == 0, timbre.even, 1.0)
    levels = levels / np.sqrt(1 + (harmonics * frequency / cutoff_hz) ** 4)
    spectrum = np.zeros(TABLE_SAMPLES // 2 + 1, dtype=complex)
    # phases that grow with k**2 spread the energy over the period: a lower peak at the same sound
    spectrum[harmonics] = levels * np.exp(0.5j * np.pi * harmonics**2 / len(harmonics))
    return np.fft.irfft(spectrum) * TABLE_SAMPLES / 2 / np.sqrt(np.sum(levels**2))


def look_up(table: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """Interpolate the table linearly at `phase` (in periods)."""
    place = (phase % 1.0) * TABLE_SAMPLES
    index = place.astype(np.int64)
    return table[index % TABLE_SAMPLES] * (1 - place + index) + table[(index + 1) % TABLE_SAMPLES] * (place - index)


def envelope(timbre: Timbre, time: np.ndarray, seconds: float) -> np.ndarray:
    """Compute the envelope: it rises in the attack, falls to the sustain level, and is released after `seconds`, to
    0."""
    held = timbre.sustain + (1 - timbre.sustain) * np.exp(-time / timbre.decay_seconds)
    released = np.clip((time - seconds) / timbre.release_seconds, 0, 1)
    return np.minimum(time / timbre.attack_seconds, 1) * held * np.cos(0.5 * np.pi * released) ** 2


def pitched_sound(timbre: Timbre, pitch: int, seconds: float, sample_rate: int) -> np.ndarray:
    """Synthesise a note of `seconds` and its release, float32 (2, samples)."""
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    time = np.arange(int((seconds + timbre.release_seconds) * sample_rate) + 1) / sample_rate
    dark = wave_table(timbre, frequency, timbre.cutoff_hz, sample_rate)
    bright = wave_table(timbre, frequency, timbre.cutoff_hz * 2**timbre.sweep_octaves, sample_rate)
    mix = np.exp(-time / timbre.sweep_seconds)
    vibrato = timbre.vibrato_cents / 1200 * np.log(2) * frequency * np.cos(2 * np.pi * 5.5 * time) / (2 * np.pi * 5.5)
    modulator = timbre.fm_index * mix * np.sin(2 * np.pi * timbre.fm_ratio * frequency * time) / (2 * np.pi)
    channels = []
    for cents in (timbre.detune_cents, -timbre.detune_cents):
        phase = frequency * 2 ** (cents / 1200) * time + vibrato + modulator
        channels.append(look_up(dark, phase) * (1 - mix) + look_up(bright, phase) * mix)
    return (np.stack(channels) * envelope(timbre, time, seconds)).astype(np.float32)


# Sounds: drums


def noise(rng: np.random.Generator, samples: int, low_hz: float, high_hz: float, sample_rate: int) -> np.ndarray:
    """Make noise between two frequencies with soft edges, RMS 1, float (samples,)."""
    frequencies = np.fft.rfftfreq(samples, 1 / sample_rate)
    edge = np.maximum(frequencies, 1.0)
    gain = 1 / np.sqrt((1 + (low_hz / edge) ** 6) * (1 + (edge / high_hz) ** 6))
    shaped = np.fft.irfft(np.fft.rfft(rng.standard_normal(samples)) * gain, samples)
    return shaped / np.sqrt(np.mean(shaped**2))


def drum_kit(rng: np.random.Generator, sample_rate: int) -> dict[str, np.ndarray]:
    """Synthesise kick, snare, hat, open hat and crash of one song, each float32 (2, samples)."""

    def strike(seconds: float, decay: float) -> tuple[np.ndarray, np.ndarray]:
        time = np.arange(int(seconds * sample_rate)) / sample_rate
        ends = np.minimum(time / 0.0008, 1) * np.minimum((seconds - time) / 0.01, 1)
        return time, np.exp(-time / decay) * ends

    def stereo(sound: np.ndarray, pan: float) -> np.ndarray:
        return np.outer(pan_gains(pan), sound).astype(np.float32)

    time, fall = strike(0.5, rng.uniform(0.09, 0.2))
    base, dive, dive_seconds = rng.uniform(42, 58), rng.uniform(90, 220), rng.uniform(0.018, 0.04)
    kick = fall * np.sin(2 * np.pi * (base * time + dive * dive_seconds * (1 - np.exp(-time / dive_seconds))))
    kick += 0.25 * np.exp(-time / 0.004) * fall * noise(rng, len(time), 1000, 5000, sample_rate)

    time, fall = strike(0.4, rng.uniform(0.05, 0.13))
    tone = np.sin(2 * np.pi * rng.uniform(160, 240) * (time + 0.01 * (1 - np.exp(-time / 0.02))))
    rattle = noise(rng, len(time), rng.uniform(500, 1500), rng.uniform(6000, 11000), sample_rate)
    snare = fall * (rng.uniform(0.3, 0.8) * tone * np.exp(-time / 0.07) + rng.uniform(0.3, 0.5) * rattle)

    low_hz = rng.uniform(4500, 7000)
    hat_pan = rng.uniform(-0.5, 0.5)
    sounds = {"kick": stereo(kick, 0.0), "snare": stereo(snare, rng.uniform(-0.15, 0.15))}
    for name, seconds, decay in (
        ("hat", 0.12, rng.uniform(0.015, 0.04)),
        ("open", 0.4, 0.12),
        ("crash", 2.0, 0.5),
    ):
        time, fall = strike(seconds, decay)
        sizzle = noise(rng, len(time), low_hz if name != "crash" else 2500, 20000, sample_rate)
        sounds[name] = stereo(fall * sizzle * 0.35, hat_pan if name != "crash" else -hat_pan)
    return sounds


# Instruments


def choose_timbres(rng: np.random.Generator) -> dict[str, Timbre]:
    """Choose an instrument for each pitched part."""
    bass = (
        Timbre(1.0, 1.0, 250, 2.5, 0.12, 0.004, 0.4, 0.5, 0.05),  # sawtooth through a filter
        Timbre(1.0, 0.0, 400, 1.0, 0.3, 0.005, 0.5, 0.7, 0.05),  # square
        Timbre(3.0, 1.0, 300, 3.0, 0.08, 0.004, 0.25, 0.2, 0.08, fm_index=2.0),  # plucked FM
        Timbre(2.0, 0.3, 180, 1.5, 0.1, 0.008, 0.8, 0.8, 0.06),  # round
    )
    chords = (
        Timbre(1.0, 1.0, 900, 1.0, 0.6, 0.06, 0.8, 0.8, 0.25, detune_cents=9),  # strings
        Timbre(0.6, 0.7, 1600, 0.0, 1.0, 0.01, 1.0, 1.0, 0.06, detune_cents=3, vibrato_cents=6),  # organ
        Timbre(4.0, 1.0, 2500, 1.0, 0.35, 0.004, 0.7, 0.15, 0.2, detune_cents=2, fm_ratio=3.0, fm_index=1.4),
        Timbre(1.2, 0.0, 1200, 2.0, 0.2, 0.01, 0.5, 0.5, 0.15, detune_cents=6),  # hollow
    )
    arpeggio = (
        Timbre(1.2, 1.0, 800, 3.0, 0.06, 0.003, 0.18, 0.0, 0.08, detune_cents=3),  # plucked string
        Timbre(4.0, 1.0, 3000, 1.0, 0.2, 0.002, 0.3, 0.0, 0.15, fm_ratio=3.5, fm_index=1.8),  # bell
        Timbre(1.0, 0.0, 1500, 1.5, 0.1, 0.003, 0.15, 0.1, 0.05),  # chip
    )
    lead = (
        Timbre(1.0, 1.0, 1800, 1.5, 0.2, 0.01, 0.5, 0.7, 0.1, detune_cents=6, vibrato_cents=12),  # sawtooth
        Timbre(1.0, 0.0, 2200, 1.0, 0.3, 0.015, 0.5, 0.7, 0.1, vibrato_cents=15),  # square
        Timbre(2.2, 0.2, 3000, 1.0, 0.2, 0.04, 0.6, 0.8, 0.12, vibrato_cents=18),  # flute
        Timbre(4.0, 1.0, 3000, 1.0, 0.5, 0.004, 0.6, 0.2, 0.2, fm_ratio=2.0, fm_index=2.2, detune_cents=3),
    )
    families = {"bass": bass, "chords": chords, "arpeggio": arpeggio, "lead": lead}
    return {name: family[rng.integers(len(family))] for name, family in families.items()}


# Composition


def chord_pitches(scale: Sequence[int], root: int, degree: int, size: int, lowest: int) -> list[int]:
    """Return the thirds stacked on a scale degree, folded into the octave above `lowest`, for close voice leading."""
    pitches = [root + scale[(degree + 2 * third) % 7] for third in range(size)]
    return sorted(lowest + (pitch - lowest) % 12 for pitch in pitches)


def strokes(pattern: str) -> list[tuple[int, float]]:
    """List the steps of a bar that a pattern strikes, with their strength."""
    return [(step, int(digit) / 9) for step, digit in enumerate(pattern) if digit != "0"]


def lead_motif(rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Compose two bars of melody: (step, length in steps, scale degrees above the chord's root)."""
    motif, step, degree = [], int(rng.choice((0, 0, 2, 4))), int(rng.choice((0, 2, 4)))
    while step < 2 * STEPS_PER_BAR - 2:
        length = int(rng.choice((1, 2, 2, 3, 4, 4, 6)))
        if rng.random() < 0.8:
            motif.append((step, length, degree if step % 4 else 2 * round(degree / 2)))
        step += length
        degree = int(np.clip(degree + rng.integers(-2, 3), -2, 7))
    return motif


def compose_section(rng: np.random.Generator, scale: Sequence[int], root: int) -> dict[str, list[Note]]:
    """Compose four bars of every pitched part, with steps counted from the section's start."""
    progression = PROGRESSIONS["major" if scale == SCALES["major"] else "minor"]
    progression = progression[rng.integers(len(progression))]
    bass_pattern, stab_pattern = strokes(str(rng.choice(BASSES))), strokes(str(rng.choice(STABS)))
    held = rng.random() < 0.5
    arpeggio = ARPEGGIOS[rng.integers(len(ARPEGGIOS))]
    arpeggio_steps = int(rng.choice((1, 2, 2)))
    octave_jump, size = rng.random() < 0.4, int(rng.choice((3, 3, 4)))
    motif = lead_motif(rng)
    parts: dict[str, list[Note]] = {"bass": [], "chords": [], "arpeggio": [], "lead": []}
    for bar, degree in enumerate(progression):
        start = bar * STEPS_PER_BAR
        chord = chord_pitches(scale, root, degree, size, lowest=53)
        low = chord_pitches(scale, root, degree, 1, lowest=31)[0]
        for index, (step, strength) in enumerate(bass_pattern):
            jump = 12 if octave_jump and index % 2 else 0
            following = bass_pattern[index + 1][0] if index + 1 < len(bass_pattern) else STEPS_PER_BAR
            parts["bass"].append(Note(start + step, low + jump, 0.8 * min(following - step, 6), strength))
        for step, strength in [(0, 0.8)] if held else stab_pattern:
            parts["chords"] += [Note(start + step, pitch, 15 if held else 3, strength) for pitch in chord]
        ladder = [*(pitch + 12 for pitch in chord), chord[0] + 24]
        for index, step in enumerate(range(0, STEPS_PER_BAR, arpeggio_steps)):
            pitch = ladder[arpeggio[index % 4] % len(ladder)]
            parts["arpeggio"].append(Note(start + step, pitch, arpeggio_steps, 0.9 if step % 4 == 0 else 0.6))
        for step, length, above in motif:
            if step // STEPS_PER_BAR == bar % 2:
                octave, place = divmod(degree % 7 + above, 7)
                pitch = 60 + root % 12 + 12 * octave + scale[place]
                parts["lead"].append(Note(start + step % STEPS_PER_BAR, pitch, length, 0.8))
    return parts


def compose_drums(
    rng: np.random.Generator,
) -> tuple[list[tuple[int, str, float]], list[tuple[int, str, float]]]:
    """Compose a bar of groove and a bar of fill: (step, drum, strength)."""
    kick, snare, hat = (strokes(str(rng.choice(patterns))) for patterns in (KICKS, SNARES, HATS))
    groove = [(step, "kick", strength) for step, strength in kick]
    groove += [(step, "snare", strength) for step, strength in snare]
    groove += [(step, "hat", strength) for step, strength in hat]
    if rng.random() < 0.5:
        groove.append((14, "open", 0.6))
    first = int(rng.choice((8, 10, 12)))
    fill = [stroke for stroke in groove if stroke[0] < first]
    fill += [
        (step, "snare", 0.5 + 0.04 * (step - first)) for step in range(first, STEPS_PER_BAR) if step != first + 1
    ]
    return groove, fill


# Rendering


def pan_gains(pan: float) -> tuple[float, float]:
    """Compute the gains of left and right at equal power; 1 and 1 in the middle."""
    angle = (pan + 1) * np.pi / 4
    return np.sqrt(2) * np.cos(angle), np.sqrt(2) * np.sin(angle)


def add(mix: np.ndarray, sound: np.ndarray, start: int, gain: float) -> None:
    """Add `sound` to `mix` in place, up to the end of `mix`."""
    length = min(sound.shape[1], mix.shape[1] - start)
    if length > 0:
        mix[:, start : start + length] += gain * sound[:, :length]


def render_part(part: Part, clock: Clock, samples: int, sample_rate: int) -> np.ndarray:
    """Render all notes of a part, float32 (2, samples); equal notes are synthesised once."""
    track = np.zeros((2, samples), dtype=np.float32)
    sounds: dict[tuple[int, float], np.ndarray] = {}
    for note in part.notes:
        start = int(clock.seconds(note.step) * sample_rate)
        if start >= samples:
            continue
        key = (note.pitch, note.steps)
        if key not in sounds:
            sounds[key] = pitched_sound(part.timbre, note.pitch, note.steps * clock.step_seconds, sample_rate)
        add(track, sounds[key], start, note.strength)
    track *= part.level * np.array(pan_gains(part.pan), dtype=np.float32)[:, None]
    if part.echo:
        delay = int(3 * clock.step_seconds * sample_rate)  # a dotted eighth, from side to side
        for repeat in (1, 2, 3):
            add(track, track[::-1, : samples - delay].copy(), delay, part.echo**repeat)
    return track


def reverberate(track: np.ndarray, rng: np.random.Generator, seconds: float, sample_rate: int) -> np.ndarray:
    """Add reverberation: convolve the track with decaying noise, a different one in each channel."""
    from scipy.signal import oaconvolve

    length = int(2 * seconds * sample_rate)
    decay = np.exp(-np.arange(length) / (seconds * sample_rate / 3))
    room = np.stack([noise(rng, length, 250, 5000, sample_rate) * decay for _ in range(2)])
    room /= np.sqrt(np.sum(room**2, axis=1, keepdims=True))
    return oaconvolve(track, room.astype(np.float32), axes=1)[:, : track.shape[1]]


def duck(kicks: np.ndarray, depth: float, samples: int, sample_rate: int) -> np.ndarray:
    """Compute a gain that drops at each kick and recovers within 0.2 s, float32 (samples,)."""
    time = np.arange(int(0.2 * sample_rate)) / sample_rate
    dip = np.minimum(time / 0.005, 1) * np.cos(0.5 * np.pi * time / 0.2) ** 2
    gain = np.ones(samples, dtype=np.float32)
    for kick in kicks:
        gain[kick : kick + len(dip)] = np.minimum(gain[kick : kick + len(dip)], 1 - depth * dip[: samples - kick])
    return gain


def master(mix: np.ndarray, sample_rate: int) -> np.ndarray:
    """Scale the mix to the common loudness, soft-clip peaks, and fade out the last 50 ms; float32 (2, samples)."""
    mix = PEAK * np.tanh(mix * (LOUDNESS_RMS / PEAK / np.sqrt(np.mean(mix**2))))
    fade = min(int(0.05 * sample_rate), mix.shape[1])
    mix[:, mix.shape[1] - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
    return mix


# The whole song


def synthesise(seed: int | Sequence[int], seconds: float, sample_rate: int) -> np.ndarray:
    """Synthesise the song of a seed: float32 (2, round(seconds * sample_rate)) within -0.9 ... 0.9, the same at every
    call."""
    rng = np.random.default_rng(seed)
    samples = round(seconds * sample_rate)
    clock = Clock(step_seconds=15 / rng.uniform(84, 152), swing=float(rng.choice((0, 0, 0.1, 0.2, 0.3))))
    scale = SCALES[str(rng.choice(tuple(SCALES)))]
    root = int(rng.integers(12))
    form = FORMS[rng.integers(len(FORMS))]
    section_steps = BARS_PER_SECTION * STEPS_PER_BAR
    sections = [form[i % len(form)] for i in range(1 + int(seconds / clock.step_seconds / section_steps))]
    verse, chorus = compose_section(rng, scale, root), compose_section(rng, scale, root)

    notes: dict[str, list[Note]] = {name: [] for name in verse}
    for index, section in enumerate(sections):
        material = chorus if section == "chorus" else verse
        for name in set(LAYERS[section]) & set(notes):
            notes[name] += [
                Note(note.step + index * section_steps, note.pitch, note.steps, note.strength)
                for note in material[name]
            ]
    timbres = choose_timbres(rng)
    side = float(rng.choice((-1, 1)))
    width = rng.uniform(0.2, 0.7)
    parts = {
        "bass": Part(timbres["bass"], notes["bass"], rng.uniform(0.15, 0.22), 0.0),
        "chords": Part(timbres["chords"], notes["chords"], rng.uniform(0.1, 0.14), -0.4 * side * width),
        "arpeggio": Part(timbres["arpeggio"], notes["arpeggio"], rng.uniform(0.1, 0.18), side * width, 0.3),
        "lead": Part(timbres["lead"], notes["lead"], rng.uniform(0.12, 0.2), -0.3 * side * width, 0.35),
    }
    tracks = {name: render_part(part, clock, samples, sample_rate) for name, part in parts.items()}
    drums, kicks = render_drums(rng, sections, clock, samples, sample_rate)
    melodic = tracks["chords"] + tracks["arpeggio"] + tracks["lead"]
    melodic += rng.uniform(0.15, 0.4) * reverberate(melodic, rng, rng.uniform(0.4, 1.2), sample_rate)
    ducked = (melodic + tracks["bass"]) * duck(kicks, rng.uniform(0.0, 0.6), samples, sample_rate)
    return master(ducked + drums, sample_rate)


def render_drums(
    rng: np.random.Generator, sections: Sequence[str], clock: Clock, samples: int, sample_rate: int
) -> tuple[np.ndarray, np.ndarray]:
    """Render the drums, float32 (2, samples), with a fill at every section's end; return the kicks' samples too."""
    kit, (groove, fill) = drum_kit(rng, sample_rate), compose_drums(rng)
    levels = {"kick": rng.uniform(0.4, 0.55), "snare": rng.uniform(0.4, 0.6), "hat": rng.uniform(0.2, 0.4)}
    levels |= {"open": levels["hat"], "crash": levels["hat"]}
    track, kicks = np.zeros((2, samples), dtype=np.float32), []
    for bar in range(len(sections) * BARS_PER_SECTION):
        if "drums" not in LAYERS[sections[bar // BARS_PER_SECTION]]:
            continue
        first, last = bar % BARS_PER_SECTION == 0, bar % BARS_PER_SECTION == BARS_PER_SECTION - 1
        for step, drum, strength in [*(fill if last else groove), *([(0, "crash", 0.8)] if first else [])]:
            start = int(clock.seconds(bar * STEPS_PER_BAR + step) * sample_rate)
            add(track, kit[drum], start, levels[drum] * strength)
            if drum == "kick" and start < samples:
                kicks.append(start)
    return track, np.array(kicks, dtype=int)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Synthesise songs to try the project on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    no_default = argparse.SUPPRESS  # else the help says "(default: None)"
    parser.add_argument("--output_folder", type=Path, required=True, default=no_default, help="folder for the mp3s")
    parser.add_argument("--songs", type=int, default=24, help="number of songs")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each song in seconds")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other songs")
    parser.add_argument("--sample_rate", type=int, default=24000, help="sample rate in Hz")
    return parser.parse_args(argv)


def write_song(path: Path, seed: Sequence[int], seconds: float, sample_rate: int) -> None:
    import soundfile

    song = synthesise(seed, seconds, sample_rate)
    mp3 = {"format": "MP3", "bitrate_mode": "CONSTANT", "compression_level": MP3_COMPRESSION_LEVEL}
    soundfile.write(path, song.T, sample_rate, **mp3)


def main(args: argparse.Namespace) -> int:
    args.output_folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the mp3 encoder takes most of the time, and no GIL
        jobs = [
            pool.submit(
                write_song,
                args.output_folder / f"demo-{index:02}.mp3",
                [args.seed, index],
                args.seconds,
                args.sample_rate,
            )
            for index in range(args.songs)
        ]
        for job in jobs:
            job.result()
    print(f"{args.songs} songs of {args.seconds:g} s in {args.output_folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
