"""A value of an option that is none: one line and exit code 2, before any work."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import pytest
from extras import need

from ddit_rt.cli import main, options
from ddit_rt.cli.main import build_parser

GENERATE = ["generate", "none.ddit", "--model", "none", "--prompt", "a"]
CALIBRATE = ["calibrate", "none.ddit", "--model", "none"]
EVAL = ["eval", "none.ddit", "--model", "none"]
COMPILE = ["compile", "none", "-o", "none.ddit"]
TRAIN = ["train", "none", "--out", "none", "--data", "hf:none"]


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = build_parser()
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


@pytest.mark.parametrize("command", commands())
def test_type_of_every_option_takes_a_text_or_says_why_not(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = ("", "x", "nan", "inf", "-inf", "-1", "0", "1e400", "9" * 5000, "0.5", "\0", "é")
    for action in commands()[command]._actions:
        assert action.type not in (int, float), f"{action.dest} has no bounds, and may be NaN"
        for text in texts if action.type else ():
            with contextlib.suppress(argparse.ArgumentTypeError):
                value = action.type(text)
                assert value == value, f"{action.dest} takes NaN"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*GENERATE, "--steps", "0"], "argument --steps: got '0'"),
        ([*GENERATE, "--steps", "2.5"], "argument --steps: got '2.5'"),
        ([*GENERATE, "--seed", "-1"], "argument --seed: got '-1'"),
        ([*GENERATE, "--guidance-scale", "nan"], "argument --guidance-scale: got 'nan'"),
        ([*GENERATE, "--guidance-interval", "0", "2"], "argument --guidance-interval: got '2'"),
        ([*GENERATE, "--guidance-interval", "0.5", "0.2"], "0 <= start <= stop <= 1"),
        ([*GENERATE, "--policy", "dynamik"], "did you mean 'dynamic'"),
        ([*GENERATE, "--policy", "3p:0.5,p"], "argument --policy: cannot read '3p:0.5'"),
        ([*GENERATE, "--policy", "fine", "--rho", "0.5"], "belong to --policy dynamic"),
        ([*GENERATE, "--tau", "2p=nan"], "argument --tau: got tau['2p']=nan"),
        ([*GENERATE, "--step-cache", "teacach:1"], "did you mean 'teacache'"),
        ([*GENERATE, "--trace", "."], "argument --trace: . is a folder; name a file"),
        ([*GENERATE, "-o", "notes.txt/a.png"], "notes.txt is a file"),
        ([*CALIBRATE, "--speedup", "2", "--prompts", "no.txt"], "--prompts: no such file: no.txt"),
        ([*CALIBRATE, "--speedup", "2", "--prompts", "."], "--prompts: . is no file"),
        ([*CALIBRATE, "--speedup", "2", "--out", "notes.txt"], "is a file; name a folder"),
        (EVAL, "--prompts: a file with one a line, or one of demo, drawb"),
        ([*EVAL, "--prompts", "no.txt"], "no such file: no.txt"),
        ([*EVAL, "--prompts", "bytes.txt"], "bytes.txt is no UTF-8 text"),
        ([*EVAL, "--references", "no"], "argument --references: no such folder: no"),
        ([*EVAL, "--policy", "nonsense"], "argument --policy: got patch_policy='nonsense'"),
        ([*COMPILE, "--patch-sizes", "3p"], "argument --patch-sizes: got patch_sizes='3p'"),
        ([*COMPILE, "--step-cache", "magcache:x"], "argument --step-cache: got step_cache="),
        ([*COMPILE, "--adapter", "no"], "no such folder: no; --adapter names one"),
        (["compile", "./no", "-o", "a.ddit"], "no such folder: ./no; expected a diffusers folder"),
        (["compile", "notes.txt", "-o", "a.ddit"], "notes.txt is a file; expected a diffusers"),
        ([*TRAIN, "--lr", "0"], "argument --lr: got '0'"),
        (["train", "none", "--out", "o", "--self", "no.txt"], "--self: no such file: no.txt"),
        (["ab", ".", "--port", "-1"], "argument --port: got '-1'"),
    ],
)
def test_bad_value_is_one_line_and_exit_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    if arguments[:1] == ["eval"]:
        need("torchmetrics")  # told of before the files are read
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("mine")
    Path("bytes.txt").write_bytes(b"\xff\xfe")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"ddit-rt {arguments[0]}: ")
    assert message in line
    assert sorted(path.name for path in Path().iterdir()) == ["bytes.txt", "notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*GENERATE, "--stepz", "3"],
            "arguments: --stepz 3 (did you mean '--steps'?)",
        ),
        (["generate", "a.ddit"], "the following arguments are required: --model, --prompt"),
        ([], "the following arguments are required: COMMAND"),
        (["genrate"], "invalid choice: 'genrate'"),
    ],
)
def test_usage_comes_with_what_is_missing_or_unknown(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("usage: ddit-rt")
    assert message in text.splitlines()[-1]


def test_report_that_is_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("not JSON", "[]", '{"plans": 3}'):
        (tmp_path / "report.json").write_text(text)
        assert main(["ab", str(tmp_path), "--summary"]) == 2
        assert "report.json is no report of ddit-rt eval" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[*CALIBRATE, "--speedup", "2"], EVAL])
def test_missing_extra_is_named(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ddit_rt.cli.models.find_spec", lambda name: None)
    assert main(command) == 2
    assert "pip install 'ddit_rt[eval]'" in capsys.readouterr().err


def test_place_that_cannot_be_written_or_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # root may do anything: what the system says is taken from it
    (tmp_path / "a.txt").write_text("")
    monkeypatch.setattr(options.os, "access", lambda path, mode: False)
    for take, name in ((options.writable, "new"), (options.existing_file, "a.txt")):
        with pytest.raises(argparse.ArgumentTypeError, match="permission denied"):
            take(str(tmp_path / name))
