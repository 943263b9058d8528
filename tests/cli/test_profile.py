"""The command line of the profiler, and the ones that it builds for Nsight."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddit_rt.cli import profile as command
from ddit_rt.cli.main import build_parser, main
from ddit_rt.lab.profile import nsight

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "profile.py"


def profile_main(*arguments: str) -> int:
    return main(["profile", *arguments])


def printed_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert profile_main(*arguments, "--print-command") == 0
    return shlex.split(capsys.readouterr().out)


REQUEST = ["a b.ddit", "--model=./my flux", "--steps=12", "--tau=2p=0.002,4p=0.0005", "--seed=3"]


def test_nsys_command_captures_the_run_with_graph_nodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = printed_command(capsys, *REQUEST, "--tool=nsys", f"--out={tmp_path}")
    split = command.index(sys.executable)
    assert command[1] == "profile"
    assert {
        "--cuda-graph-trace=node",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
        f"--output={tmp_path}/nsys",
    } < set(command[:split])
    child = command[command.index("ddit_rt.cli") :]
    assert child[:4] == ["ddit_rt.cli", "profile", "a b.ddit", "--tool=nvtx"]


def test_ncu_command_looks_at_one_patch_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--tool=ncu", "--patch=2p", "--launches=7", f"--out={tmp_path}"]
    command = printed_command(capsys, *REQUEST, *asked)
    options = set(command[: command.index(sys.executable)])
    assert {
        "--nvtx",
        "--nvtx-include=regex:ddit_rt.model.2p/",
        "--launch-count=7",
        "--graph-profiling=node",
        "--profile-from-start=off",
        f"--export={tmp_path}/ncu-2p",
    } < options


def test_child_gets_the_same_request() -> None:
    parser = build_parser()
    options = ["--executor=loop", "--policy=4p:0.2,p", "--rho=0.3", "--trust-code", "--height=64"]
    words = ["profile", *REQUEST, *options, "--tool=nsys", "--prompt", "a fox", "a zebra"]
    args = parser.parse_args(words)
    started = command.child_command(args)
    child = parser.parse_args(started[started.index("ddit_rt.cli") + 1 :])
    assert child.tool == "nvtx"
    left_out = {"tool": "nsys", "parser": args.parser}
    assert vars(child) | left_out == vars(args)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--tool=nsys"], "install Nsight Systems"),
        (["demo", "--tool=ncu"], "use --tool torch"),
        (["x.ddit", "--tool=torch"], "without --model"),
        (["demo", "--model=./flux", "--tool=torch"], "leave --model out"),
        (["demo", "--print-command"], "needs --tool nsys or ncu"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nsight, "_FOLDER", Path("/nowhere"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert profile_main(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("ddit-rt profile: ")
    assert message in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
@pytest.mark.parametrize(
    ("option", "message"),
    [("--tool=nvtx", "needs a CUDA device"), ("--executor=loop", "one executor only")],
)
def test_what_needs_a_device_is_exit_2_without(
    option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile_main("demo", option) == 2
    assert message in capsys.readouterr().err


def test_nsight_runs_and_its_failure_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for nsys, which is not ours to test: it notes how it was called."""
    tool = tmp_path / "nsys"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexit "${{NSYS_CODE:-0}}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    result = tmp_path / "out" / "profile.json"
    arguments = ["demo", "--tool=nsys", f"--out={tmp_path / 'out'}"]
    assert profile_main(*arguments) == 0
    profiled, stats = (tmp_path / "calls").read_text().splitlines()
    assert profiled.startswith("profile --trace=cuda")
    assert stats.endswith(f"{tmp_path / 'out' / 'nsys'}.nsys-rep")
    monkeypatch.setenv("NSYS_CODE", "9")
    assert profile_main(*arguments) == 2
    assert json.loads(result.read_text())["exit_code"] == 9


def test_the_standard_librarys_profile_stays_importable() -> None:
    """Torch imports it, and a script's own folder comes first on the path."""
    code = "import cProfile, profile; print(profile.Profile.__name__)"
    folder = SCRIPT.parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert result.stdout == "Profile\n"
