"""The benchmark takes turns, takes medians, keeps to its time, and says what it left out."""

from __future__ import annotations

import cProfile
import json
import statistics
import subprocess
import sys
import time

import bench
import numpy as np
import pytest

from continuation.fingerprint import Fingerprinter, find_same_music, read_fingerprint

SIZES = bench.Sizes(60, 2, 10, 3, (2, 4), 2, 2, (1, 2), 3, variants=False)


@pytest.fixture
def small(tmp_path):
    return bench.Bench(tmp_path, SIZES)


def test_rivals_run_by_turns_and_none_always_first(small):
    order = []
    rivals = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    measured = small.alternate(rivals)
    assert "".join(order) == "abc" + "cba" + "abc"
    assert {name: len(seconds) for name, seconds in measured.items()} == {"a": 3, "b": 3, "c": 3}


def test_rounds_end_with_the_time_and_the_first_must_be_whole(small):
    def measure(name, last):
        turns[name] += 1
        if turns[name] > last:
            raise subprocess.TimeoutExpired("command", 1)
        return turns[name]

    turns = {"a": 0, "b": 0}
    assert small.alternate({"a": lambda: measure("a", 1), "b": lambda: measure("b", 9)}) == {"a": [1], "b": [1, 2]}
    turns = {"a": 0, "b": 0}
    with pytest.raises(subprocess.TimeoutExpired):
        small.alternate({"a": lambda: measure("a", 1), "b": lambda: measure("b", 0)})


def test_a_part_gets_at_most_twice_its_share_of_the_time_left(small):
    small.end = time.monotonic() + 100
    for parts, share in ((5, 40), (2, 100), (1, 100)):
        small.share_out(parts)
        assert small.deadline - time.monotonic() == pytest.approx(share, abs=1)


def test_folder_is_replaced_only_by_one_that_was_made_without_an_error(tmp_path):
    target = tmp_path / "chunks"
    with bench.fresh(target) as folder:
        folder.mkdir()
        (folder / "whole").touch()
    with pytest.raises(OSError), bench.fresh(target) as folder:
        folder.mkdir()
        raise OSError
    assert [path.name for path in target.iterdir()] == ["whole"]


def test_rows_have_the_median_the_range_and_the_ratio_to_the_first():
    rows = bench.rival_rows({"ours": [2.0, 9.0, 1.0], "theirs": [4.0, 4.0, 1.0]})
    assert rows == [("ours", "2.00", "1.00 .. 9.00", "1.00"), ("theirs", "4.00", "1.00 .. 4.00", "2.00")]


def test_a_song_more_is_what_it_added_since_the_last_count():
    assert bench.a_song_more([10], [3.0]) == ""
    assert bench.a_song_more([10, 110], [3.0, 4.0]) == "10.0"


def test_command_is_timed_and_its_failure_is_one_sentence(small):
    seconds, printed = small.run(sys.executable, "-c", "import time; time.sleep(0.2); print('done')")
    assert seconds >= 0.2 and printed == "done\n"
    with pytest.raises(bench.RunError, match=r"ended with 3: second$"):
        small.run(sys.executable, "-c", "import sys; print('first\\nsecond', file=sys.stderr); sys.exit(3)")


@pytest.mark.slow
def test_command_is_killed_with_its_children_when_the_time_is_up(small, tmp_path):
    small.deadline = time.monotonic() + 0.5
    child = f"import time; time.sleep(2); open({str(tmp_path / 'alive')!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(subprocess.TimeoutExpired):
        small.run(sys.executable, "-c", code)
    time.sleep(2.5)
    assert not (tmp_path / "alive").exists()


@pytest.mark.slow
def test_what_is_missing_is_said_and_does_not_stop_the_rest(small, monkeypatch):
    def fail(_):
        raise bench.RunError("train.py ended with 1: why")

    def time_is_up(_):
        raise subprocess.TimeoutExpired("command", 1)

    for name in ("measure_preprocess", "measure_create_dataset", "measure_cost_per_song"):
        monkeypatch.setattr(bench, name, lambda _: bench.Table("title", ("", "seconds"), [("a", 1)], {"a": 1.0}))
    fail.__name__, time_is_up.__name__ = "measure_training", "measure_generate"
    monkeypatch.setattr(bench, "measure_training", fail)
    monkeypatch.setattr(bench, "measure_generate", time_is_up)
    tables, missing = bench.measure(small)
    assert len(tables) == 3
    assert missing == ["measure_training: train.py ended with 1: why", "measure_generate: the time was up"]
    text = bench.as_markdown("a machine", tables, missing)
    assert "|  | seconds |\n| --- | --- |\n| a | 1 |\n" in text and text.endswith("generate: the time was up\n")
    bench.draw(small.folder / "bench.png", tables)
    assert (small.folder / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_share_of_waiting_is_read_from_a_profile(tmp_path):
    def slow():
        while True:
            time.sleep(0.03)
            yield

    def train_step(batches):
        next(batches)
        time.sleep(0.01)

    batches, profile = slow(), cProfile.Profile()
    next(batches)
    profile.enable()
    next(batches)  # outside of a step: not counted
    for _ in range(5):
        train_step(batches)
    profile.disable()
    profile.dump_stats(tmp_path / "profile")
    assert bench.waiting_share(tmp_path / "profile") == pytest.approx(0.75, abs=0.15)


def test_step_seconds_are_those_of_the_stage(tmp_path):
    records = [(1, 0, 0.0), (1, 10, 5.0), (2, 0, 5.0), (2, 4, 9.0)]
    lines = [json.dumps({"stage": stage, "step": step, "seconds": seconds}) for stage, step, seconds in records]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert [bench.step_seconds(tmp_path, stage) for stage in (1, 2)] == [0.5, 1.0]


def test_seconds_of_generations_are_read_from_what_generate_prints():
    printed = "next-1.wav: 10.00 s, generated in 1.25 s, 8.0 x real time\nnext-2.wav: 1.00 s, generated in 0.50 s, 2"
    assert bench.generation_seconds(printed) == [1.25, 0.5]


def test_synthesised_songs_are_different_music(tmp_path):
    printers = [Fingerprinter(8000) for _ in range(6)]
    for seed, printer in enumerate(printers):
        printer.add(bench.synthesise(seed, bench.SHORT_SONG_SECONDS, 8000))
    assert not list(find_same_music([read_fingerprint(printer.result()) for printer in printers]))
    song = bench.synthesise(0, 3.3, 8000)
    assert song.shape == (2, 26400) and song.dtype == np.float32 and np.abs(song).max() < 1
    assert statistics.mean(np.sqrt(np.square(song).mean(axis=1)).tolist()) > 0.02


@pytest.mark.parametrize("output", ["bench.txt", "folder.md"])
def test_output_that_is_no_markdown_file_is_refused(tmp_path, capsys, output):
    (tmp_path / "folder.md").mkdir()
    assert bench.main(bench.parse_args(["--quick", "--output", str(tmp_path / output)])) == 2
    assert "is not the name of a .md file" in capsys.readouterr().err
