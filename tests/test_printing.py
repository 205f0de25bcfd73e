"""Whether what a script prints is read, written or lost decides about nothing that it does."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import synth
from chunks import Chunks
from tiny import NETWORK, write_dataset

import create_dataset
import preprocess
from continuation import checkpoint, cli
from continuation.dataset import open_dataset
from continuation.signals import StopSignals, sigterm_as_ctrl_c

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# What a shell does with stdout; it exits as the command does.
GONE = "exec 3> >(:); wait $!"  # 3 is a pipe whose reader has ended
REDIRECTIONS = {
    "closed": "exec {} >&-",
    "all closed": "exec {} <&- >&- 2>&-",
    "no reader": f"{GONE}; exec {{}} >&3 3>&-",
    "no reader of either": f"{GONE}; exec {{}} >&3 2>&1 3>&-",
}
if Path("/dev/full").exists():
    REDIRECTIONS |= {"full disk": "exec {} >/dev/full", "all on a full disk": "exec {} >/dev/full 2>&1"}
unix_only = pytest.mark.skipif(os.name == "nt", reason="needs bash")


def shell(redirection: str, *words: object) -> subprocess.CompletedProcess:
    """Run Python with these words, its output redirected by bash."""
    command = REDIRECTIONS[redirection].format('"$@"')
    every = ["bash", "-c", command, "bash", sys.executable, *map(str, words)]
    return subprocess.run(every, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


# The five scripts


@pytest.mark.slow
@unix_only
@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_scripts_do_their_work_whatever_becomes_of_what_they_print(tmp_path, redirection):
    chunks = Chunks(tmp_path / "chunks")
    chunks.add_many(0, 6)
    chunks.write()
    words = ["create_dataset.py", "--output_folder", chunks.folder, "--dataset_folder", tmp_path / "dataset"]
    done = shell(redirection, *words)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert len(open_dataset(tmp_path / "dataset")[0]["songs"]) == 6


@pytest.mark.slow
@unix_only
@pytest.mark.parametrize("redirection", ["closed", "no reader of either"])
def test_songs_are_preprocessed_whatever_becomes_of_what_is_printed(tmp_path, redirection):
    (tmp_path / "songs").mkdir()
    synth.write(tmp_path / "songs" / "a.wav", synth.song(0, 2.5, 8000), 8000)
    words = ["--input_folder", tmp_path / "songs", "--output_folder", tmp_path / "out", "--chunk_seconds", 1]
    assert shell(redirection, "preprocess.py", *words, "--sample_rate", 8000, "--workers", 1).returncode == 0
    assert len(list((tmp_path / "out").glob("*.npy"))) == 1


@unix_only
def test_lost_output_is_said_on_stderr_in_one_line(tmp_path):
    code = "from continuation import cli\nwith cli.steady_output():\n    for _ in range(9): print('x', flush=True)"
    done = shell("no reader", "-c", code)
    assert done.stderr == "note: stdout cannot be written: Broken pipe\n"


@unix_only
@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_no_file_takes_the_number_of_a_closed_stdout(tmp_path, redirection):
    """What a library or a subprocess prints there would be written into it."""
    code = (
        "import os, sys\n"
        "from continuation import cli\n"
        "with cli.steady_output(), open(sys.argv[1], 'w') as file:\n"
        "    os.system('echo printed; echo printed >&2')\n"
        "    os._exit(0 if file.fileno() > 2 else 3)"
    )
    assert shell(redirection, "-c", code, tmp_path / "file").returncode == 0
    assert (tmp_path / "file").read_text() == ""


@unix_only
def test_output_that_is_the_work_is_a_failure_where_it_is_lost_and_none_where_nobody_wants_more():
    code = (
        "import sys\n"
        "from continuation import cli\n"
        "with cli.steady_output():\n"
        "    print('plan')\n"
        "    code = cli.output_code()\n"
        "sys.exit(code)"
    )
    expected = {"closed": 0, "no reader": 0, "full disk": 1}
    found = {name: shell(name, "-c", code).returncode for name in expected}
    assert found == expected


def test_next_command_quotes_folders_as_the_shell_needs_them(tmp_path, capsys):
    songs, chunks, dataset = (tmp_path / name for name in ("songs", "it's chunks", "the dataset; true"))
    songs.mkdir()
    synth.write(songs / "a.wav", synth.song(0, 2.5, 8000), 8000)
    words = f"--sample_rate 8000 --chunk_seconds 1 --workers 1 --input_folder {songs} --output_folder"
    assert preprocess.main(preprocess.parse_args([*words.split(), str(chunks)])) == 0
    assert next_command(capsys)[:4] == ["python", "create_dataset.py", "--output_folder", str(chunks)]
    made = Chunks(tmp_path / "made chunks")
    made.add_many(0, 6)
    made.write()
    words = ["--output_folder", str(made.folder), "--dataset_folder", str(dataset)]
    assert create_dataset.main(create_dataset.parse_args(words)) == 0
    assert next_command(capsys)[:4] == ["python", "train.py", "--dataset_folder", str(dataset)]


def next_command(capsys) -> list[str]:
    line = capsys.readouterr().out.splitlines()[-1]
    return shlex.split(line.removeprefix("next: "))


def test_name_that_is_not_utf8_is_printed_with_escapes(capsys):
    with cli.steady_output():
        print("caf\udce9.mp3")
    assert capsys.readouterr().out == "caf\\udce9.mp3\n"


# A closed terminal


@pytest.fixture
def hangup_is():
    """Set what becomes of SIGHUP, as whoever starts a script does."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


@unix_only
@pytest.mark.parametrize(("handler", "stops"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_closed_terminal_stops_a_run_unless_it_is_under_nohup(hangup_is, handler, stops):
    hangup_is(handler)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested == stops
    assert signal.getsignal(signal.SIGHUP) is handler


@unix_only
def test_closed_terminal_is_like_ctrl_c_unless_it_is_under_nohup(hangup_is):
    hangup_is(signal.SIG_DFL)
    with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c():
        os.kill(os.getpid(), signal.SIGHUP)
    hangup_is(signal.SIG_IGN)
    with sigterm_as_ctrl_c():
        os.kill(os.getpid(), signal.SIGHUP)


# Training


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture
def training(dataset, tmp_path):
    """Start a training without end, with options of Popen; its process, and its checkpoint folder."""
    started = []

    def start(**options) -> tuple[subprocess.Popen, Path]:
        flags = (
            f"--preset tiny {NETWORK} --batch_size 2 --stage1_steps 100000 --eval_steps 5 --device cpu --patience 0"
        )
        words = [sys.executable, str(ROOT / "tests" / "run_quietly.py"), *flags.split()]
        words += ["--dataset_folder", str(dataset), "--checkpoint_folder", str(tmp_path / "ck")]
        # of its own, since the tests themselves may run under nohup
        hangup = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}
        started.append(subprocess.Popen(words, env=ENVIRONMENT, text=True, **hangup | options))
        return started[-1], tmp_path / "ck"

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
@unix_only
@pytest.mark.parametrize("stop", ["the reader of stdout goes", "the terminal is closed"])
def test_training_that_is_left_alone_saves_and_ends_with_75(training, stop):
    process, folder = training(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert any("step 5/100000" in line for line in process.stdout)
    if stop == "the reader of stdout goes":
        process.stdout.close()
    else:
        process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 75
    assert "everything is saved: run the same command again" in process.stderr.read()
    assert checkpoint.load(folder / "last.pt")["step"] >= 5


@pytest.mark.slow
@unix_only
def test_training_under_nohup_or_with_a_full_log_goes_on(training):
    full = open("/dev/full" if Path("/dev/full").exists() else os.devnull, "w")  # noqa: SIM115
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process, folder = training(stdout=full, stderr=full, **ignore)
    full.close()
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    lines = len(metrics.read_text().splitlines())
    while len(metrics.read_text().splitlines()) < lines + 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
