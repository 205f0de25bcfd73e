"""What the scripts have in common at the shell keeps foreign text harmless and refuses with one sentence."""

from __future__ import annotations

import argparse

import pytest

import create_dataset
import evaluate
import generate
import preprocess
import train
from continuation.cli import HelpFormatter, UsageError, environment_int, make_folder, one_line


def test_help_shows_the_default_of_flags_that_have_one():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--folder", required=True, help="a folder")
    parser.add_argument("--rate", type=int, default=0, help="a rate")
    parser.add_argument("--size", type=int, help="a size (default: the preset's)")
    parser.add_argument("--plot", action="store_true", help="draw it")
    lines = [line.strip() for line in parser.format_help().splitlines()]
    assert "--folder FOLDER  a folder" in lines
    assert "--rate RATE      a rate (default: 0)" in lines
    assert "--size SIZE      a size (default: the preset's)" in lines
    assert "--plot           draw it" in lines


@pytest.mark.parametrize("script", [preprocess, create_dataset, generate])
def test_help_of_the_scripts_names_no_default_that_is_none(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    said = capsys.readouterr().out
    assert "default: " in said and "None" not in said and "False" not in said


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Ænima - 夜 01.mp3", "Ænima - 夜 01.mp3"),
        ("a\nerror: b\r\tc", r"a\nerror: b\r\tc"),
        ("\x1b[2J\x07\x7f\x9b", r"\x1b[2J\x07\x7f\x9b"),
        ("caf\udce9.mp3", r"caf\udce9.mp3"),
        ("a\u2028b\u202egpj", r"a\u2028b\u202egpj"),
        (ValueError("a\nb"), r"a\nb"),
    ],
    ids=["letters", "line breaks", "control", "no UTF-8", "separators and direction", "exception"],
)
def test_foreign_text_is_shown_on_one_line_without_control_characters(text, shown):
    assert one_line(text) == shown


FOLDERS = {  # that are missing, and those that are written to
    preprocess: ("--input_folder missing", "--output_folder out"),
    create_dataset: ("--output_folder missing", "--dataset_folder out"),
    train: ("--dataset_folder missing", "--checkpoint_folder out"),
    generate: ("--checkpoint_folder missing --input missing.mp3", "--output out.mp3"),
    evaluate: ("--dataset_folder missing --checkpoint_folder missing", "--output_folder out"),
}


@pytest.mark.parametrize("script", FOLDERS, ids=lambda script: script.__name__)
def test_debug_shows_the_traceback_before_the_one_sentence(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = " ".join(FOLDERS[script]).split()
    assert script.main(script.parse_args(flags)) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: ") and sentence.count("\n") == 1
    assert script.main(script.parse_args([*flags, "--debug"])) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n") and shown.endswith(f"\n{sentence}")


def test_whole_number_of_the_environment_is_read():
    assert environment_int({"CPUS": "4"}, "CPUS", least=1) == 4


@pytest.mark.parametrize("text", ["abc", "0", "-1", "", "1.5", "4(x2)", "9" * 5000])
def test_anything_else_in_the_environment_is_refused_by_name(text):
    with pytest.raises(UsageError, match=r"^CPUS=.* in the environment is not a whole number from 1 up$"):
        environment_int({"CPUS": text}, "CPUS", least=1)


def test_folder_is_made_with_those_above_it(tmp_path):
    for _ in range(2):
        make_folder(tmp_path / "a" / "b", "--output_folder")
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("name", ["file", "file/below", "file/further/below"])
def test_folder_in_whose_place_a_file_is_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"^--output_folder: a file is in the place of the folder {tmp_path / name}"):
        make_folder(tmp_path / name, "--output_folder")
