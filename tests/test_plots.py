"""Every picture is drawn whole, at its place, without a trace in matplotlib's global state."""

import sys

import numpy as np
import pytest
from synth import song

from continuation import plots

RATE = 12000


@pytest.fixture(scope="module")
def music() -> np.ndarray:
    return song(seed=1, seconds=4, sample_rate=RATE, channels=2)


def pixels(path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def has_colour(path, colour: str) -> bool:
    from matplotlib.colors import to_rgb

    return bool((np.abs(pixels(path) - to_rgb(colour)).max(axis=-1) < 0.02).any())


def test_continuation_shows_input_and_continuation_in_two_colours(tmp_path, music):
    path = tmp_path / "next.png"
    plots.plot_continuation(path, music[:, : 2 * RATE], music[:, 2 * RATE :], RATE, "a song of $5 and \\ more")
    assert has_colour(path, plots.INPUT_COLOUR) and has_colour(path, plots.CONTINUATION_COLOUR)


def test_continuation_of_silence_is_drawn_black(tmp_path, music):
    path = tmp_path / "silence.png"
    silence = np.zeros((2, 2 * RATE), dtype=np.float32)
    plots.plot_continuation(path, silence, silence, RATE, "silence")
    image = pixels(path)
    height, width = image.shape[:2]
    assert image[int(0.6 * height), int(0.25 * width)].max() < 0.05


def test_a_tone_stands_where_its_frequency_is():
    tone = np.sin(2 * np.pi * 1000 * np.arange(2 * RATE) / RATE)[None].astype(np.float32)
    level = plots._log_spectrogram(tone, RATE)
    row = int(level.mean(axis=1).argmax())
    frequencies = np.geomspace(plots.LOWEST_HZ, RATE / 2, plots.SPECTROGRAM_ROWS)
    assert frequencies[row] == pytest.approx(1000, rel=0.02)


def test_waveforms_and_spectrograms_of_several_signals_are_drawn(tmp_path, music):
    items = [("truth", music), ("mono", music[:1]), ("shorter", music[:, :RATE]), ("quiet", 0.01 * music)]
    plots.plot_waveforms(tmp_path / "waveforms.png", items, RATE)
    plots.plot_spectrograms(tmp_path / "spectrograms.png", items, RATE)
    assert has_colour(tmp_path / "waveforms.png", plots.INPUT_COLOUR)
    assert pixels(tmp_path / "spectrograms.png").min() < 0.05


def test_name_that_is_no_text_is_drawn_escaped(tmp_path, music):
    name, shown = "caf\udce9\x1b\n.mp3", r"caf\udce9\x1b\n.mp3"
    for title, path in ((name, tmp_path / "name.png"), (shown, tmp_path / "shown.png")):
        plots.plot_continuation(path, music[:, :RATE], music[:, RATE:], RATE, title)
        plots.plot_waveforms(path.with_suffix(".waveforms.png"), [(title, music)], RATE)
        plots.plot_spectrograms(path.with_suffix(".spectrograms.png"), [(title, music)], RATE)
    for suffix in (".png", ".waveforms.png", ".spectrograms.png"):
        np.testing.assert_array_equal(pixels(tmp_path / f"name{suffix}"), pixels(tmp_path / f"shown{suffix}"))


def test_dataset_shows_every_split_and_leaves_out_unknown_tempos(tmp_path):
    tempos = [("train", 120.0), ("train", None), ("val", float("nan")), ("test", 90)]
    rows = [
        {"split": split, "hours": 0.05, "rms_db": -20.0 + i, "silent_share": 0.01 * i, "tempo_bpm": tempo}
        for i, (split, tempo) in enumerate(tempos)
    ]
    plots.plot_dataset(tmp_path / "dataset.png", rows)
    assert all(has_colour(tmp_path / "dataset.png", colour) for colour in plots.SPLIT_COLOURS.values())


def test_curves_show_both_stages_and_every_further_measure(tmp_path):
    records = [
        {"stage": stage, "step": step, "train_loss": 1 / step, "val_loss": 2 / step, "val_mr_stft": 1.0}
        for stage in (1, 2)
        for step in (10, 20, 30)
    ]
    few = [{k: v for k, v in record.items() if k != "val_mr_stft"} for record in records]
    plots.plot_curves(tmp_path / "all.png", records)
    plots.plot_curves(tmp_path / "few.png", few)
    assert has_colour(tmp_path / "all.png", plots.VAL_COLOUR)
    assert pixels(tmp_path / "all.png").shape[0] > pixels(tmp_path / "few.png").shape[0]


def test_curves_leave_out_undefined_values_and_survive_an_empty_log(tmp_path):
    undefined = {
        "stage": 1,
        "step": 1,
        "train_loss": float("nan"),
        "val_loss": None,
        "val_onset_f": float("nan"),
    }
    plots.plot_curves(tmp_path / "undefined.png", [undefined, {"stage": 1, "step": 2, "train_loss": 1.0}])
    plots.plot_curves(tmp_path / "empty.png", [])
    assert pixels(tmp_path / "empty.png").size


def test_a_failed_picture_leaves_the_old_one_and_nothing_else(tmp_path, music, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def fail(figure, target, **options):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="No space"):
        plots.plot_waveforms(path, [("a", music)], RATE)
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"] and path.read_bytes() == b"old"


def test_drawing_leaves_no_global_state(tmp_path, music):
    import matplotlib

    before = dict(matplotlib.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    plots.plot_waveforms(tmp_path / "a.png", [("a", music)], RATE)
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded
