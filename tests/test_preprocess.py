"""preprocess.py: what it stores, what it refuses, and that no interruption loses anything."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synth
from preprocessing import (
    RATE,
    command,
    contents,
    make_songs,
    manifest,
    preprocess_cli,
    preprocess_here,
    wait_for,
)

import preprocess
from continuation import audio, files, manifests, plots

# Before running


def test_dry_run_says_what_is_to_do_and_writes_nothing(tmp_path, no_workers, capsys):
    folder, out = make_songs(tmp_path / "songs", 3), tmp_path / "out"
    (folder / "no song.mp3").write_text("text")
    assert preprocess_here(folder, out, "--dry_run") == 0
    said = capsys.readouterr().out
    assert "4 files: 0 done before and not changed, 4 to do" in said
    assert "to do: about 0.00 hours, 8 chunks of 1 s, 0.00 GB (" in said  # the fourth is taken to be like the others
    assert "1 of them do not tell their length before they are decoded: the mean of the others is taken" in said
    assert not out.exists() and no_workers == []


def test_dry_run_counts_what_is_done_new_and_gone(tmp_path, no_workers, capsys):
    folder, out = make_songs(tmp_path / "songs", 3), tmp_path / "out"
    preprocess_here(folder, out)
    synth.write(folder / "song 3.wav", synth.song(3, 7.5, RATE), RATE)
    (folder / "song 0.wav").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert preprocess_here(folder, out, "--dry_run", "--clip_seconds", "4.5") == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert preprocess_here(folder, out, "--dry_run") == 0
    said = capsys.readouterr().out
    assert "3 files: 2 done before and not changed, 1 to do" in said
    assert "1 done before are no longer in the input folder: they would be removed" in said
    assert "7 chunks of 1 s" in said
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


# Running again


def test_a_second_run_does_nothing_twice(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 3), tmp_path / "out"
    (folder / "bad.mp3").write_text("text")
    assert preprocess_here(folder, out) == 0
    before = contents(out)
    assert len(no_workers) == 4
    assert preprocess_here(folder, out) == 0
    assert len(no_workers) == 4
    assert contents(out) == before


def test_only_new_changed_and_damaged_songs_are_done_again_and_gone_ones_dropped(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 5), tmp_path / "out"
    preprocess_here(folder, out)
    lines = manifest(out)
    no_workers.clear()
    synth.write(folder / "song 0.wav", synth.song(9, 3.5, RATE), RATE)
    (folder / "song 1.wav").write_text("it is no song any more")
    os.truncate(out / f"{lines['song 2.wav']['id']}.npy", 1000)
    (folder / "song 3.wav").unlink()
    synth.write(folder / "song 5.wav", synth.song(5, 2.5, RATE), RATE)
    assert preprocess_here(folder, out) == 0
    assert no_workers == ["song 0.wav", "song 1.wav", "song 2.wav", "song 5.wav"]
    assert [line["chunks"] for line in manifest(out).values()] == [3, 0, 2, 2, 2]
    assert "song 3.wav" not in manifest(out)
    arrays = {f"{line['id']}.npy" for line in manifest(out).values() if line["status"] == "ok"}
    assert {path.name for path in out.glob("*.npy")} == arrays


def test_the_input_folder_may_move(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    preprocess_here(folder, out)
    shutil.move(folder, tmp_path / "moved")
    no_workers.clear()
    assert preprocess_here(tmp_path / "moved", out) == 0
    assert no_workers == []


def test_other_settings_in_the_same_output_are_refused_and_named(tmp_path, no_workers, capsys):
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    preprocess_here(folder, out)
    before = contents(out)
    assert preprocess_here(folder, out, "--sample_rate", "12000") == 2
    assert "sample_rate 8000, not 12000" in capsys.readouterr().err
    assert preprocess_here(folder, out, "--clip_seconds", "2") == 2
    assert "clip_seconds None, not 2.0" in capsys.readouterr().err
    assert contents(out) == before


def test_a_damaged_meta_is_refused(tmp_path, no_workers, capsys):
    folder, out = make_songs(tmp_path / "songs", 1), tmp_path / "out"
    out.mkdir()
    for damaged in ("{", "[]", '{"settings": 3}'):
        (out / "meta.json").write_text(damaged)
        assert preprocess_here(folder, out) == 2
        assert "meta.json is damaged" in capsys.readouterr().err


def test_max_files_takes_the_first_and_a_later_run_the_others(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 4), tmp_path / "out"
    assert preprocess_here(folder, out, "--max_files", "2") == 0
    assert list(manifest(out)) == ["song 0.wav", "song 1.wav"]
    assert preprocess_here(folder, out) == 0
    assert no_workers == [f"song {number}.wav" for number in range(4)]


def changed_bytes(path: Path, start: int, count: int) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(bytes(count))


def test_an_array_with_a_damaged_header_is_done_again(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 3), tmp_path / "out"
    preprocess_here(folder, out)
    before = contents(out)
    ids = [line["id"] for line in manifest(out).values()]
    size = (out / f"{ids[0]}.npy").stat().st_size
    changed_bytes(out / f"{ids[0]}.npy", 0, size)  # what a file system leaves after a power cut
    with files.ArrayWriter(out / f"{ids[1]}.npy", np.int16, (RATE, 2)) as writer:  # as large, of another shape
        writer.append(np.ones((2, RATE, 2), np.int16))
    no_workers.clear()
    assert preprocess_here(folder, out) == 0
    assert no_workers == ["song 0.wav", "song 1.wav"]
    assert contents(out) == before


def test_verify_finds_damage_within_an_array_and_mends_it(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    preprocess_here(folder, out)
    before = contents(out)
    line = manifest(out)["song 1.wav"]
    assert line["array_sha256"] == hashlib.sha256(np.load(out / f"{line['id']}.npy").tobytes()).hexdigest()
    changed_bytes(out / f"{line['id']}.npy", 9000, 2)
    no_workers.clear()
    assert preprocess_here(folder, out) == 0
    assert no_workers == []
    assert preprocess_here(folder, out, "--verify") == 0
    assert no_workers == ["song 1.wav"]
    assert contents(out) == before


def test_lines_without_a_checksum_are_kept_and_to_verify_done_again(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    preprocess_here(folder, out)
    lines = manifest(out)
    for line in lines.values():
        del line["array_sha256"], line["input_folder"]  # as an earlier version wrote them
    manifests.write_lines(out / "manifest.jsonl", lines)
    no_workers.clear()
    assert preprocess_here(folder, out) == 0
    assert no_workers == []
    assert preprocess_here(folder, out, "--verify") == 0
    assert no_workers == ["song 0.wav", "song 1.wav"]


# The input folder


@pytest.fixture
def of_two_folders(tmp_path, no_workers):
    """(what was made of a folder of 3 songs, another folder with one of the names and other music)"""
    out = tmp_path / "out"
    assert preprocess_here(make_songs(tmp_path / "songs", 3), out) == 0
    other = tmp_path / "other"
    other.mkdir()
    synth.write(other / "song 1.wav", synth.song(7, 2.5, RATE), RATE)
    no_workers.clear()
    return out, other


@pytest.mark.parametrize("missing", [True, False], ids=["songs are missing", "songs are others"])
def test_another_input_folder_is_refused(tmp_path, of_two_folders, no_workers, capsys, missing):
    out, other = of_two_folders
    if not missing:
        for name in ("song 0.wav", "song 2.wav"):
            shutil.copy2(tmp_path / "songs" / name, other)
    before = contents(out)
    assert preprocess_here(other, out) == 2
    said = capsys.readouterr().err
    assert f"was made of {tmp_path / 'songs'}, and {3 if missing else 1} of its songs are not in {other}" in said
    assert contents(out) == before
    assert no_workers == []


def test_another_input_folder_that_is_asked_for_replaces_the_songs_and_names_them(of_two_folders, no_workers, capsys):
    out, other = of_two_folders
    assert preprocess_here(other, out, "--other_input_folder") == 0
    assert "2 songs are no longer in the input folder and were removed: 'song 0.wav', 'song 2.wav'" in (
        capsys.readouterr().out
    )
    assert no_workers == list(manifest(out)) == ["song 1.wav"]
    assert len(list(out.glob("*.npy"))) == 1
    assert preprocess_here(other, out) == 0


def test_a_copy_of_the_input_folder_is_no_other_folder(tmp_path, of_two_folders, no_workers):
    out, _ = of_two_folders
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (tmp_path / "songs").iterdir():
        shutil.copy(path, copy)
        os.utime(copy / path.name, (1, 1))
    synth.write(copy / "song 3.wav", synth.song(3, 2.5, RATE), RATE)
    assert preprocess_here(copy, out) == 0
    assert len(manifest(out)) == 4
    (copy / "song 0.wav").unlink()
    assert preprocess_here(copy, out) == 0  # it is the folder of this output now
    assert len(manifest(out)) == 3


def test_songs_that_are_gone_are_counted_and_named(tmp_path, no_workers, capsys):
    folder, out = make_songs(tmp_path / "songs", 9), tmp_path / "out"
    preprocess_here(folder, out)
    for number in range(8):
        (folder / f"song {number}.wav").unlink()
    capsys.readouterr()
    assert preprocess_here(folder, out) == 0
    names = ", ".join(f"'song {number}.wav'" for number in range(5))
    assert f"8 songs are no longer in the input folder and were removed: {names} and 3 more\n" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("name", ["file", "file/below", "file/further/below"])
def test_an_output_folder_in_whose_place_a_file_is_is_refused(tmp_path, capsys, name):
    folder = make_songs(tmp_path / "songs", 1)
    (tmp_path / "file").touch()
    assert preprocess_here(folder, tmp_path / name) == 2
    assert capsys.readouterr().err.startswith("error: --output_folder: a file is in the place of the folder ")


# Interruptions


def test_a_torn_last_line_costs_one_song(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 3), tmp_path / "out"
    preprocess_here(folder, out)
    before = contents(out)
    os.truncate(out / "manifest.jsonl", len(before["manifest.jsonl"]) - 30)
    no_workers.clear()
    assert preprocess_here(folder, out) == 0
    assert no_workers == ["song 2.wav"]
    assert contents(out) == before


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(folder of songs, what a run makes of them)"""
    base = tmp_path_factory.mktemp("uninterrupted")
    folder = make_songs(base / "songs", 9, seconds=40)
    # The last takes so long that a run is caught before its end by a busy machine too.
    synth.write(folder / "the last.wav", synth.noise(0, 1200, RATE), RATE, subtype="PCM_U8")
    assert preprocess_cli(folder, base / "out").returncode == 0
    return folder, contents(base / "out")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, uninterrupted, number, no_workers):
    folder, expected = uninterrupted
    out = tmp_path / "out"
    running = subprocess.Popen(
        command(folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(lambda: (out / "manifest.jsonl").exists() and manifest(out))
    if number in (signal.SIGINT, signal.SIGUSR1):
        os.killpg(running.pid, number)  # as Ctrl-C and Slurm do
    else:
        running.send_signal(number)
    assert running.wait(timeout=120) == (-number if number == signal.SIGKILL else preprocess.INTERRUPTED)
    # An orphaned worker ends itself, and removes what it was writing.
    wait_for(lambda: number != signal.SIGKILL or not list(out.glob("*.tmp")))
    assert not list(out.glob("*.tmp"))
    done = set(manifest(out))
    assert 0 < len(done) < 10
    assert (out / "manifest.jsonl.unfinished").exists()
    assert preprocess_here(folder, out) == 0
    assert not done & set(no_workers)
    assert contents(out) == expected


# Shards


@pytest.mark.slow
def test_shards_started_at_once_share_the_work_and_equal_one_run(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 5), tmp_path / "out"
    started = [
        subprocess.Popen(command(folder, out, "--shard", f"{index}/2"), stdout=subprocess.DEVNULL)
        for index in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert preprocess_here(folder, tmp_path / "whole") == 0
    first, second = (manifest(out, f"manifest.{index}-of-2.jsonl") for index in range(2))
    assert list(first) == ["song 0.wav", "song 2.wav", "song 4.wav"]
    assert first | second == manifest(tmp_path / "whole")
    for path in (tmp_path / "whole").glob("*.npy"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_song_that_moves_to_another_shard_is_not_done_again_and_gone_ones_leave(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 4), tmp_path / "out"
    shards = ("0/2", "1/2")
    for shard in shards:
        preprocess_here(folder, out, "--shard", shard)
    (folder / "song 1.wav").unlink()  # songs 2 and 3 change places
    no_workers.clear()
    for shard in reversed(shards):
        assert preprocess_here(folder, out, "--shard", shard) == 0
    assert list(manifest(out, "manifest.0-of-2.jsonl")) == ["song 0.wav", "song 3.wav"]
    assert list(manifest(out, "manifest.1-of-2.jsonl")) == ["song 2.wav"]
    assert len(list(out.glob("*.npy"))) == 3
    assert set(no_workers) <= {"song 3.wav"}  # its old shard had let it go already


def test_another_number_of_shards_in_the_same_output_is_refused(tmp_path, no_workers, capsys):
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    preprocess_here(folder, out, "--shard", "0/2")
    for arguments in ((), ("--shard", "0/3")):
        assert preprocess_here(folder, out, *arguments) == 2
        assert "manifest.0-of-2.jsonl comes from a run with other shards" in capsys.readouterr().err


def test_a_shard_without_files_is_done_at_once(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 1), tmp_path / "out"
    assert preprocess_here(folder, out, "--shard", "1/2") == 0
    assert manifest(out, "manifest.1-of-2.jsonl") == {}


def test_a_shard_without_a_usable_file_is_done_too(tmp_path, no_workers, capsys):
    folder, out = make_songs(tmp_path / "songs", 1), tmp_path / "out"
    (folder / "torn.mp3").write_bytes(b"no music")
    assert preprocess_here(folder, out, "--shard", "1/2") == 0
    assert "no usable audio file" in capsys.readouterr().out
    assert manifest(out, "manifest.1-of-2.jsonl")["torn.mp3"]["status"] != "ok"


@pytest.mark.parametrize("others", [(), ("other.mp3",)], ids=["empty", "another"])
@pytest.mark.parametrize("shard", [(), ("--shard", "0/2")])
def test_nothing_is_deleted_when_the_input_folder_has_none_of_the_songs(tmp_path, no_workers, capsys, shard, others):
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    preprocess_here(folder, out, *shard)
    before = {path: path.read_bytes() for path in out.iterdir() if path.suffix in (".npy", ".jsonl")}
    assert len(before) > 1
    (tmp_path / "wrong").mkdir()
    for name in others:
        (tmp_path / "wrong" / name).write_bytes(b"another song")
    assert preprocess_here(tmp_path / "wrong", out, *shard) == 2
    assert "is it the right folder, and mounted?" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_a_slurm_array_task_finds_its_shard_and_says_so(tmp_path, no_workers, monkeypatch, capsys):
    folder, out = make_songs(tmp_path / "songs", 3), tmp_path / "out"
    for name, value in {"ID": 14, "MIN": 10, "STEP": 2, "COUNT": 3}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert preprocess_here(folder, out) == 0
    assert "shard 2/3, from the Slurm array\n" in capsys.readouterr().out
    assert list(manifest(out, "manifest.2-of-3.jsonl")) == ["song 2.wav"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "13")
    assert preprocess_here(folder, out) == 2


# The command line, and the disk


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--sample_rate", "22050"), "22050 Hz is no multiple of 100 Hz: take 24000 (or 12000)"),
        (("--sample_rate", "11025"), "take 24000 (or 12000)"),
        (("--chunk_seconds", "0.03"), "no whole number of latents"),
        (("--shard", "2/2"), "is not I/N"),
        (("--workers", "0"), "0 is not above 0"),
        (("--clip_seconds", "nan"), "nan is not above 0"),
        (("--clip_seconds", "1e305"), "1e+305 s is more than a day"),
        (("--chunk_seconds", "1e305"), "1e+305 s is more than a day"),
    ],
)
def test_a_senseless_flag_is_refused_in_a_sentence(tmp_path, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stopped:
        preprocess_here(tmp_path, tmp_path / "out", *arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [("CPUS_PER_TASK", "abc"), ("CPUS_PER_TASK", "0"), ("CPUS_PER_TASK", ""), ("CPUS_PER_TASK", "-1"),
     ("ARRAY_TASK_ID", "abc"), ("ARRAY_TASK_STEP", "0"), ("ARRAY_TASK_COUNT", "4.5")],
)  # fmt: skip
def test_slurm_variables_that_are_no_numbers_are_refused_before_anything_is_written(
    tmp_path, no_workers, monkeypatch, capsys, name, value
):
    for part in ("ID", "MIN", "STEP", "COUNT"):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{part}", "1")
    monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "in").mkdir()
    flags = ["--input_folder", str(tmp_path / "in"), "--output_folder", str(tmp_path / "out")]
    assert preprocess.main(preprocess.parse_args(flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: SLURM_{name}={value} in the environment is not a whole number")
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_folders_that_make_no_sense_exit_2_and_a_folder_without_songs_exits_1(tmp_path, no_workers):
    (tmp_path / "songs").mkdir()
    assert preprocess_here(tmp_path / "missing", tmp_path / "out") == 2
    assert preprocess_here(tmp_path / "songs", tmp_path / "songs") == 2
    assert preprocess_here(tmp_path / "songs", tmp_path / "out") == 1
    (tmp_path / "songs" / "text.mp3").write_text("text")
    assert preprocess_here(tmp_path / "songs", tmp_path / "out") == 1


def test_a_folder_in_use_is_refused(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 1), tmp_path / "out"
    out.mkdir()
    with files.locked(out / ".manifest.jsonl.lock"):
        assert preprocess_here(folder, out) == 2
    assert preprocess_here(folder, out) == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit is not on PATH")
def test_a_full_disk_is_a_clear_error_without_half_files_and_can_be_continued(tmp_path, no_workers):
    folder, out = make_songs(tmp_path / "songs", 2), tmp_path / "out"
    limited = ["prlimit", "--fsize=40000", *command(folder, out)]
    result = subprocess.run(limited, capture_output=True, text=True)
    assert result.returncode == 1
    assert "error: " in result.stderr and "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        ".manifest.jsonl.lock",
        "manifest.jsonl",
        "manifest.jsonl.unfinished",
        "meta.json",
    ]
    assert preprocess_here(folder, out) == 0
    assert len(manifest(out)) == 2


def test_a_line_that_cannot_be_written_leaves_the_manifest_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "manifest.jsonl"
    manifests.append_line(path, {"source": "a"})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        manifests.append_line(path, {"source": "b"})
    assert path.read_text() == '{"source": "a"}\n'


def test_plot_hands_over_the_songs_as_float(tmp_path, no_workers, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "plot_waveforms", lambda *arguments: drawn.append(arguments))
    folder, out = make_songs(tmp_path / "songs", 6), tmp_path / "out"
    assert preprocess_here(folder, out, "--plot") == 0
    [(path, items, sample_rate)] = drawn
    assert (path, sample_rate) == (out / "waveforms.png", RATE)
    assert [title for title, _ in items] == ["song 0.wav", "song 2.wav", "song 4.wav"]
    song = audio.load_audio(folder / "song 0.wav", RATE, 2)
    np.testing.assert_allclose(items[0][1], song[:, : 2 * RATE], atol=1 / 32768)


@pytest.mark.slow
def test_importing_the_script_loads_no_heavy_library():
    heavy = ["torch", "librosa", "matplotlib", "pydub"]  # every worker process would load them
    code = f"import sys, preprocess; print([name for name in {heavy} if name in sys.modules])"
    folder = Path(preprocess.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.stdout == "[]\n"
