"""Fixtures of the tests of generate.py: one network, one song, and a run of the script in this process."""

import pytest
import synth
from generation_helpers import FORMAT, SONG_SECONDS
from small_networks import small_network, write_checkpoint

import generate


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints", small_network(**FORMAT))


@pytest.fixture
def own_sound_is_heard(monkeypatch):
    """Let the mixer play the decoder's own sound; beside good copies it plays next to nothing of it."""
    monkeypatch.setattr("continuation.mixer.OWN_ERROR", 1e-9)


@pytest.fixture(scope="session")
def song(tmp_path_factory):
    """Of another rate than the network's, so that all is resampled; soft, so that no peak is scaled down."""
    path = tmp_path_factory.mktemp("songs") / "song.flac"
    return synth.write(path, 0.1 * synth.song(1, SONG_SECONDS, 44100), 44100)


@pytest.fixture
def run(checkpoints, song):
    """Run the script in this process with the given flags: its exit code."""

    def run_main(output, *flags, folder=checkpoints, source=song):
        fixed = ["--checkpoint_folder", folder, "--input", source, "--output", output, "--steps", 2]
        return generate.main(generate.parse_args([str(flag) for flag in (*fixed, *flags)]))

    return run_main


@pytest.fixture
def refuses(run, capsys, tmp_path):
    """Run with the given flags, expect one line on stderr and the exit code, and no output: that line."""

    def run_and_read(*flags, output="next.wav", code=2, **options):
        assert run(tmp_path / "out" / output, *flags, **options) == code
        assert not (tmp_path / "out" / output).exists()
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    return run_and_read
