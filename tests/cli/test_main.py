from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from ddit_rt.cli import main
from ddit_rt.cli.command import Command, ExitCode, Outcome
from ddit_rt.cli.main import COMMANDS, explain
from ddit_rt.errors import (
    ArtifactMismatchError,
    CompileError,
    RunCancelled,
    ShapeError,
    UntrustedArtifactError,
)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a command `probe` that runs a given function."""

    def install(run: Any) -> None:
        probe = Command(
            name="probe", summary="Probe.", examples=(), add_arguments=lambda _: None, run=run
        )
        monkeypatch.setattr(sys.modules["ddit_rt.cli.main"], "COMMANDS", (probe,))

    return install


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_help_shows_examples_and_exit_codes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == ExitCode.OK
    text = capsys.readouterr().out
    assert f"ddit-rt {name}" in text.partition("examples:")[2]
    assert "exit codes:" in text
    assert "--json" in text


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from ddit_rt.cli import main; assert main(['--help']) == 0; "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == ExitCode.OK
    assert capsys.readouterr().out.startswith("ddit-rt ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ShapeError("33 x 33"), ExitCode.USAGE),
        (FileNotFoundError("no such file"), ExitCode.USAGE),
        (ModuleNotFoundError("pip install 'ddit_rt[demo]'"), ExitCode.USAGE),
        (ArtifactMismatchError("torch: 2.12"), ExitCode.ARTIFACT),
        (UntrustedArtifactError("not built here"), ExitCode.ARTIFACT),
        (CompileError("no compiler"), ExitCode.INTERNAL),
        (RunCancelled("after 3 of 20 steps"), ExitCode.INTERRUPTED),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
        (KeyError("x"), ExitCode.INTERNAL),
    ],
)
def test_error_has_exit_code_and_one_line(error: BaseException, code: ExitCode) -> None:
    assert explain(error)[0] == code
    assert "\n" not in explain(type(error)("two\nlines"))[1]


def test_error_hides_traceback_unless_debugging(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> Outcome:
        raise ValueError("got 3; expected 4")

    command(fail)
    assert main(["probe"]) == ExitCode.USAGE
    assert capsys.readouterr() == ("", "ddit-rt probe: got 3; expected 4\n")
    assert main(["probe", "--debug"]) == ExitCode.USAGE
    assert "Traceback" in capsys.readouterr().err


def test_json_is_all_of_stdout_whatever_the_command_prints(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatter(_: Any) -> Outcome:
        sys.stdout.write("from a library")
        return Outcome(data={"answer": 42}, text="the answer is 42")

    command(chatter)
    assert main(["probe", "--json"]) == ExitCode.OK
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"answer": 42}
    assert "from a library" in captured.err
    assert main(["probe"]) == ExitCode.OK
    assert capsys.readouterr().out == "the answer is 42\n"
