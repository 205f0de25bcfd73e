"""All figures of the project, drawn without a display and written atomically.

Figures are made as objects, never through pyplot, so that there is no global state. Signals are float
arrays (channels, samples) in -1..1; several channels are drawn as their mean. Times are in seconds,
frequencies in Hz, spectrogram levels in dB under the loudest point of the picture.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from continuation import files
from continuation.cli import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

INPUT_COLOUR, CONTINUATION_COLOUR = "#2f6db3", "#e1711f"
SPLIT_COLOURS = {"train": "#2f6db3", "val": "#e1711f", "test": "#3a9a62"}
TRAIN_COLOUR, VAL_COLOUR = "#9db7d5", "#1d4f91"
INK = "#26303b"
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c3cad2",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#e6eaee",
    "xtick.color": "#5b6672",
    "ytick.color": "#5b6672",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "axes.axisbelow": True,
    "text.parse_math": False,  # a song's name may hold dollar signs
}
DPI = 130
WAVEFORM_COLUMNS = 1600
SPECTROGRAM_ROWS = 300
SPECTROGRAM_COLUMNS = 1400
SPECTROGRAM_SECONDS = 0.085
SPECTROGRAM_RANGE_DB = 80.0
QUIETEST_TOP_DB = -40.0  # so that silence is black
LOWEST_HZ = 40.0
FREQUENCY_TICKS_HZ = (50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)
COLOUR_MAP = "magma"


# The pictures


def plot_waveforms(path: str | Path, items: Sequence[tuple[str, np.ndarray]], sample_rate: int) -> None:
    """Draw the waveforms of `items`, (title, (channels, samples)) each, one below the other on one time axis."""
    height = 0.8 + 1.35 * len(items)
    with _figure(path, 11, height) as figure:
        rows = figure.subplots(len(items), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (title, x) in zip(rows, items, strict=True):
            _draw_waveform(axes, x, sample_rate, INPUT_COLOUR)
            axes.set_title(one_line(title))
        limit = max([0.05, *(np.abs(x).max(initial=0.0) for _, x in items)])
        rows[0].set_ylim(-1.05 * limit, 1.05 * limit)
        rows[0].set_xlim(0, max(x.shape[-1] for _, x in items) / sample_rate)
        rows[-1].set_xlabel("time (s)")


def plot_dataset(path: str | Path, rows: Sequence[dict]) -> None:
    """Draw four panels, coloured by split: hours, loudness, silence and tempo of the songs.

    rows: one per song, with the keys split, hours, rms_db, silent_share (0..1) and tempo_bpm; None and nan are left
    out of their panel.
    """
    splits = [name for name in SPLIT_COLOURS if any(row["split"] == name for row in rows)]
    with _figure(path, 11, 6.4) as figure:
        (hours, loudness), (silence, tempo) = figure.subplots(2, 2)
        _draw_hours(hours, rows, splits)
        _draw_histogram(loudness, rows, splits, "rms_db", "loudness of the songs", "RMS (dBFS)")
        _draw_histogram(
            silence,
            rows,
            splits,
            "silent_share",
            "silence in the songs",
            "share of frames below -60 dBFS (%)",
            100,
        )
        _draw_histogram(tempo, rows, splits, "tempo_bpm", "tempo of the songs", "beats per minute")
        hours.figure.legend(*loudness.get_legend_handles_labels(), loc="outside upper right", ncols=3)


def plot_continuation(
    path: str | Path, context: np.ndarray, continuation: np.ndarray, sample_rate: int, title: str
) -> None:
    """Draw the waveforms of input and continuation in two colours, and their spectrogram below, with the join marked.

    Both (channels, samples); time 0 is the beginning of the context, the join is where it ends.
    """
    join = context.shape[-1] / sample_rate
    whole = np.concatenate([context, continuation], axis=-1)
    end = whole.shape[-1] / sample_rate
    with _figure(path, 11, 6) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.7))
        _draw_waveform(top, context, sample_rate, INPUT_COLOUR, label="input")
        _draw_waveform(top, continuation, sample_rate, CONTINUATION_COLOUR, start=join, label="continuation")
        limit = 1.05 * max(0.05, np.abs(whole).max(initial=0.0))
        top.set(ylim=(-limit, limit), title=one_line(title))
        top.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
        image = _draw_spectrogram(bottom, _log_spectrogram(whole, sample_rate), end, sample_rate)
        bottom.set(xlabel="time (s)", ylabel="frequency (Hz)", xlim=(0, end))
        top.axvline(join, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        bottom.axvline(join, color="white", linewidth=1.1, linestyle=(0, (4, 3)))
        bottom.annotate(
            "join",
            (join, 0.97),
            (5, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color="white",
            va="top",
        )
        figure.colorbar(image, ax=(top, bottom), label="dB", pad=0.01, fraction=0.025, aspect=50)


def plot_curves(path: str | Path, records: Sequence[dict]) -> None:
    """Draw the loss curves, one column per stage, and below them every other val_* measure with a curve.

    records: the lines of metrics.jsonl: stage, step, train_loss, val_loss and any val_* measures.
    """
    stages = sorted({record["stage"] for record in records if "stage" in record}, key=str)
    measures = sorted({key for record in records for key in record if _is_measure(key, record)})
    by_stage = {stage: [r for r in records if r.get("stage") == stage] for stage in stages}
    panels = [(stage, key) for stage in stages for key in measures if _points(by_stage[stage], key)[0].size > 1]
    rows = 1 + -(-len(panels) // 3)
    with _figure(path, 12, 1.4 + 2.2 * rows) as figure:
        grid = figure.add_gridspec(rows, 6, height_ratios=[1.6] + [1] * (rows - 1))
        width = 6 // max(1, len(stages))
        for i, stage in enumerate(stages):
            cell = grid[0, i * width : (i + 1) * width]
            _draw_losses(figure.add_subplot(cell), by_stage[stage], stage)
        for i, (stage, key) in enumerate(panels):
            row, column = 1 + i // 3, 2 * (i % 3)
            _draw_measure(figure.add_subplot(grid[row, column : column + 2]), by_stage[stage], stage, key)


def plot_spectrograms(path: str | Path, items: Sequence[tuple[str, np.ndarray]], sample_rate: int) -> None:
    """Draw spectrograms of `items`, (title, (channels, samples)) each, side by side on one level scale."""
    columns = len(items) if len(items) <= 3 else math.ceil(math.sqrt(len(items)))
    rows = -(-len(items) // columns)
    spectrograms = [_log_spectrogram(x, sample_rate) for _, x in items]
    top = max(s.max() for s in spectrograms)
    with _figure(path, 0.8 + 4.2 * columns, 0.5 + 2.9 * rows) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(items) :]:
            axes.set_axis_off()
        for axes, (title, x), spectrogram in zip(grid.flat, items, spectrograms, strict=False):
            end = x.shape[-1] / sample_rate
            image = _draw_spectrogram(axes, spectrogram, end, sample_rate, top)
            axes.set_title(one_line(title))
        for axes in grid[:, 0]:
            axes.set_ylabel("frequency (Hz)")
        for column in range(columns):
            lowest = (len(items) - 1 - column) // columns
            grid[lowest, column].set_xlabel("time (s)")
            grid[lowest, column].tick_params(labelbottom=True)
        figure.colorbar(image, ax=grid, label="dB", pad=0.01, fraction=0.03, aspect=40)


def plot_join(path: str | Path, x: np.ndarray, sample_rate: int, join_seconds: float) -> None:
    """Draw a small spectrogram of x (channels, samples), with a line where its continuation begins."""
    with _figure(path, 4.2, 2.4) as figure:
        axes = figure.subplots()
        _draw_spectrogram(axes, _log_spectrogram(x, sample_rate), x.shape[-1] / sample_rate, sample_rate)
        axes.axvline(join_seconds, color="white", linewidth=1.5)
        axes.set(xlabel="time (s)", ylabel="frequency (Hz)")


def spectrogram_image(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Draw a small spectrogram of x (channels, samples) without axes: uint8 (rows, columns, 3), high frequencies in
    the first rows."""
    import matplotlib

    levels = _log_spectrogram(x, sample_rate)[::-2, ::3]
    shown = 1 + (levels - max(levels.max(), QUIETEST_TOP_DB)) / SPECTROGRAM_RANGE_DB
    return matplotlib.colormaps[COLOUR_MAP](shown, bytes=True)[..., :3]


# Parts of figures


@contextmanager
def _figure(path: str | Path, width: float, height: float) -> Iterator["Figure"]:
    """Yield a figure in the project's style; its file is written at the end of the block."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with files.replacing(path) as file:
            figure.savefig(Path(file.name), format="png")


def _draw_waveform(
    axes: "Axes", x: np.ndarray, sample_rate: int, colour: str, start: float = 0.0, label: str | None = None
) -> None:
    """Draw the range of the samples in each column of the figure, and inside it, darker, their RMS."""
    mono = x.mean(axis=0)
    size = max(1, -(-mono.size // WAVEFORM_COLUMNS))
    columns = np.pad(mono, (0, -mono.size % size), mode="edge").reshape(-1, size)
    time = start + (np.arange(len(columns)) + 0.5) * size / sample_rate
    rms = np.sqrt(np.mean(columns**2, axis=1))
    axes.fill_between(time, columns.min(axis=1), columns.max(axis=1), color=colour, alpha=0.5, linewidth=0)
    axes.fill_between(time, -rms, rms, color=colour, linewidth=0, label=label)
    axes.axhline(0, color="white", linewidth=0.4, alpha=0.6)
    axes.set_ylabel("amplitude")


def _log_spectrogram(x: np.ndarray, sample_rate: int) -> np.ndarray:
    """Compute levels in dB of the channels' mean, (rows, columns), rows evenly spaced in log frequency."""
    mono = x.mean(axis=0).astype(np.float32)
    size = 2 ** round(np.log2(SPECTROGRAM_SECONDS * sample_rate))
    hop = max(size // 8, mono.size // SPECTROGRAM_COLUMNS)
    padded = np.pad(mono, (size // 2, size // 2 + hop))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[: mono.size : hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size))) ** 2 / size**2
    level = 10 * np.log10(power + 1e-12)  # (columns, bins)
    bins = np.geomspace(LOWEST_HZ, sample_rate / 2, SPECTROGRAM_ROWS) * size / sample_rate
    lower = np.minimum(bins.astype(int), size // 2 - 1)
    share = (bins - lower).astype(np.float32)
    return (level[:, lower] * (1 - share) + level[:, lower + 1] * share).T


def _draw_spectrogram(
    axes: "Axes", spectrogram: np.ndarray, end: float, sample_rate: int, top: float | None = None
) -> "AxesImage":
    """Draw the levels below `top` (None: this spectrogram's maximum) over time and log frequency."""
    top = max(spectrogram.max() if top is None else top, QUIETEST_TOP_DB)
    image = axes.imshow(
        spectrogram - top,
        origin="lower",
        aspect="auto",
        cmap=COLOUR_MAP,
        interpolation="bilinear",
        extent=(0, end, np.log2(LOWEST_HZ), np.log2(sample_rate / 2)),
        vmin=-SPECTROGRAM_RANGE_DB,
        vmax=0,
    )
    ticks = [frequency for frequency in FREQUENCY_TICKS_HZ if LOWEST_HZ <= frequency <= sample_rate / 2]
    labels = [f"{tick // 1000}k" if tick >= 1000 else str(tick) for tick in ticks]
    axes.set_yticks(np.log2(ticks), labels)
    return image


def _draw_hours(axes: "Axes", rows: Sequence[dict], splits: Sequence[str]) -> None:
    totals = [sum(row["hours"] for row in rows if row["split"] == split) for split in splits]
    songs = [sum(row["split"] == split for row in rows) for split in splits]
    bars = axes.barh(splits, totals, color=[SPLIT_COLOURS[split] for split in splits], height=0.6)
    texts = [
        f" {hours:.2f} h, {count} {'song' if count == 1 else 'songs'}"
        for hours, count in zip(totals, songs, strict=True)
    ]
    axes.bar_label(bars, texts, color=INK)
    axes.set(title="hours of music", xlabel="hours", xlim=(0, 1.45 * max([1e-3, *totals])))
    axes.invert_yaxis()
    axes.grid(axis="x")


def _draw_histogram(
    axes: "Axes",
    rows: Sequence[dict],
    splits: Sequence[str],
    key: str,
    title: str,
    unit: str,
    scale: float = 1,
) -> None:
    """Draw a histogram of the songs by `key`, the splits stacked on one another."""
    values = [
        np.array([row[key] for row in rows if row["split"] == split and row[key] is not None], dtype=float)
        for split in splits
    ]
    values = [scale * v[np.isfinite(v)] for v in values]
    axes.hist(
        values,
        bins=24,
        stacked=True,
        label=splits,
        color=[SPLIT_COLOURS[split] for split in splits],
        edgecolor="white",
        linewidth=0.6,
    )
    axes.set(title=title, xlabel=unit, ylabel="songs")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")


def _is_measure(key: str, record: dict) -> bool:
    value = record[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return key.startswith("val_") and key != "val_loss" and is_number


def _points(records: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and finite values of `key`."""
    pairs = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def _draw_losses(axes: "Axes", records: Sequence[dict], stage: object) -> None:
    axes.plot(*_points(records, "train_loss"), color=TRAIN_COLOUR, linewidth=1.6, label="training")
    steps, values = _points(records, "val_loss")
    axes.plot(steps, values, color=VAL_COLOUR, linewidth=2, label="validation")
    if values.size:
        best = int(values.argmin())
        axes.plot(steps[best], values[best], "o", color=CONTINUATION_COLOUR, zorder=3)
        axes.annotate(
            f"best {values[best]:.4g}",
            (steps[best], values[best]),
            (0, 10),
            textcoords="offset points",
            ha="center",
            color=CONTINUATION_COLOUR,
        )
    axes.set(title=f"stage {stage}: loss", xlabel="step")
    axes.legend(loc="upper right")
    axes.grid()


def _draw_measure(axes: "Axes", records: Sequence[dict], stage: object, key: str) -> None:
    steps, values = _points(records, key)
    axes.plot(steps, values, color=SPLIT_COLOURS["test"], linewidth=1.6, marker=".", markersize=4)
    axes.set_title(f"stage {stage}: {key.removeprefix('val_').replace('_', ' ')}", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid()
