"""The runs under several versions: what is asked for, and the page of outcomes."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PYTHON = f"3.{sys.version_info.minor}"
TORCH = "2.11.0"
OWN = f"{PYTHON}+{TORCH}"

# Stands for scripts/test.sh: the environment gets the packages of this one, whatever was asked for.
TEST_SH = """#!/usr/bin/env bash
echo "$DDIT_RT_TORCH $*" >"$VENV.call"
folder="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
echo {packages} >"$folder/others.pth"
while [[ "$1" != --junitxml ]]; do shift; done
[[ -z "$REPORT" ]] || echo "$REPORT" >"$2"
exit "$CODE"
"""
REPORT = """<testsuites><testsuite time="61.7">
<testcase name="a"/><testcase name="b"/><testcase name="c"><skipped/></testcase>
<testcase name="d"><failure/></testcase></testsuite></testsuites>"""


def matrix(
    root: Path, *combinations: str, code: int = 0, report: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    given = {"REPORT": report, "CODE": str(code), "PYENV_ROOT": str(root / "none"), **environment}
    return subprocess.run(
        ["bash", str(root / "scripts" / "matrix.sh"), *combinations],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, **given},
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """One that holds only what the script uses, and runs no tests."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for name in ("matrix.sh", "matrix_table.py", "gpu_visit.py"):
        shutil.copy(SCRIPTS / name, scripts / name)
    packages = Path(torch.__file__).parents[1]
    (scripts / "test.sh").write_text(TEST_SH.format(packages=packages))
    (scripts / "test.sh").chmod(0o755)
    shutil.copy(SCRIPTS.parent / "pyproject.toml", tmp_path)
    return tmp_path


def row(**values: str) -> Mapping[str, str]:
    columns = import_module("matrix_table").COLUMNS
    return {**{column: f"some {column}" for column in columns}, **values}


def table(page: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines]


@pytest.mark.parametrize(
    ("combination", "message"),
    [
        ("3.12", "no combination '3.12': give 'default', or PYTHON+TORCH"),
        ("3.9+2.11.0", "no combination '3.9+2.11.0'"),
        ("3.12+2.10.1", "'3.12+2.10.1': ddit_rt needs torch 2.11 or newer"),
        ("3.12+2.11.0+0.40.1", "ddit_rt needs diffusers 0.41 or newer"),
        ("3.19+2.11.0", "no Python 3.19 found: install one, or set PYTHON319 to its path"),
    ],
)
def test_bad_combination_is_exit_2_before_any_is_run(
    checkout: Path, combination: str, message: str
) -> None:
    before = sorted(checkout.rglob("*"))
    done = matrix(checkout, OWN, combination)
    assert done.returncode == 2
    assert message in done.stderr
    assert sorted(checkout.rglob("*")) == before


def test_python_of_another_version_is_refused_by_name(checkout: Path) -> None:
    done = matrix(checkout, "3.19+2.11.0", PYTHON319=sys.executable)
    assert done.returncode == 2
    assert f"PYTHON319={sys.executable} is not a Python 3.19" in done.stderr


def test_help_names_combinations_and_settings(checkout: Path) -> None:
    done = matrix(checkout, "--help")
    assert done.returncode == 0
    for word in ("3.12+2.11.0", "default", "PYTHON312", "DDIT_RT_TORCH", "docs/matrix.md"):
        assert word in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.slow
def test_failed_tests_are_a_row_and_exit_1(checkout: Path) -> None:
    done = matrix(checkout, OWN, code=1, report=REPORT)
    assert done.returncode == 1, done.stderr
    assert f"failed: {OWN}" in done.stdout
    environment = checkout / "build" / "matrix" / f"py{PYTHON}-torch{TORCH}"
    call = environment.with_name(f"{environment.name}.call").read_text()
    assert call.startswith(f"torch=={TORCH} -m not gpu --junitxml")
    page = (checkout / "docs" / "matrix.md").read_text()
    columns, _, values = table(page)
    found = dict(zip(columns, values, strict=True))
    assert found["combination"] == OWN
    assert found["Python"] == platform.python_version()
    assert found["torch"] == str(torch.__version__)
    counts = {"passed": "2", "skipped": "1", "failed": "1", "seconds": "62"}
    assert counts.items() <= found.items()
    assert str(checkout) not in page


@pytest.mark.parametrize(("code", "report"), [(2, REPORT), (1, "")], ids=["broken off", "no start"])
def test_run_without_an_end_leaves_no_row(checkout: Path, code: int, report: str) -> None:
    # The environment is there already, and is used: without pip it is made in no time.
    environment = checkout / "build" / "matrix" / f"py{PYTHON}-torch{TORCH}"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    done = matrix(checkout, OWN, code=code, report=report)
    assert done.returncode == 1
    assert "making" not in done.stdout
    assert f"{OWN}: no outcome" in done.stdout
    assert not (checkout / "docs").exists()


def test_newest_outcome_takes_its_combinations_place_alone() -> None:
    updated = import_module("matrix_table").updated
    page = updated("", row(combination="default", passed="1"))
    page = updated(page, row(combination="3.12+2.11.0", passed="2"))
    page = updated(page, row(combination="default", passed="3"))
    columns, _, *rows = table(page)
    place = columns.index("passed")
    assert [(cells[0], cells[place]) for cells in rows] == [("3.12+2.11.0", "2"), ("default", "3")]
    assert updated(page, row(combination="default", passed="3")) == page


def test_table_of_other_columns_is_not_overwritten() -> None:
    with pytest.raises(ValueError, match=r"the table begins with .*: remove the page"):
        import_module("matrix_table").updated("| a | b |\n|---|---|\n", row())


def test_report_without_tests_is_no_outcome(tmp_path: Path) -> None:
    (tmp_path / "empty.xml").write_text('<testsuites><testsuite time="0"/></testsuites>')
    with pytest.raises(ValueError, match="holds no test"):
        import_module("matrix_table").outcome("default", tmp_path / "empty.xml")
