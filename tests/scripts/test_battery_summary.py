"""The page that the battery ends with, from records as their writers leave them."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from profiles import ceilings, profiled, tiny_subject

TESTS = """
import pytest

def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.fixture
def broken(): raise ValueError
def test_broken(broken): pass
@pytest.mark.skip
def test_left_out(): pass
"""

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


def report(*arguments: object) -> int:
    code: int = import_module("gpu_battery_report").main([str(word) for word in arguments])
    return code


def junit(folder: Path) -> Path:
    """What pytest itself writes of four tests with four fates."""
    (folder / "test_fates.py").write_text(TESTS)
    path = folder / "tests-gpu.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder]
    subprocess.run([*command, "--junitxml", path, folder], check=False, capture_output=True)
    return path


def test_junit_counts_and_names_what_failed(tmp_path: Path) -> None:
    assert report("tests", "--out", tmp_path, junit(tmp_path)) == 0
    run = json.loads((tmp_path / "stages.json").read_text())["stages"]["tests"]["runs"]["tests-gpu"]
    failed = ["test_fates::test_bad", "test_fates::test_broken"]
    assert run == {"tests": 4, "passed": 1, "skipped": 1, "failed": failed}


def test_tests_that_were_all_skipped_are_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tests-gpu.xml"
    case = '<testcase classname="a" name="b"><skipped/></testcase>'
    path.write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    assert report("tests", "--out", tmp_path, path) == 1
    assert "no test passed in tests-gpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("log", "errors"),
    [
        (MEMCHECK, 3),
        (RACECHECK, 1),
        ("========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("========= Error: no device\n", None),
    ],
)
def test_sanitizer_summary_is_read(log: str, errors: int | None) -> None:
    assert import_module("battery.stages").sanitizer_errors(log) == errors


def test_start_forgets_what_a_stage_gave_before(tmp_path: Path) -> None:
    report("record", "--out", tmp_path, "--stage", "tests", "--outcome", "started", "--limit", 9)
    report("tests", "--out", tmp_path, junit(tmp_path))
    ended = ["--outcome", "failed", "--seconds", 5, "--limit", 9]
    report("record", "--out", tmp_path, "--stage", "tests", *ended)
    stages = import_module("battery.stages")
    assert {"runs", "outcome", "seconds"} < set(stages.load_stages(tmp_path)["tests"])
    report("record", "--out", tmp_path, "--stage", "tests", "--outcome", "started", "--limit", 9)
    assert "runs" not in stages.load_stages(tmp_path)["tests"]


def write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data))


def flux(**sections: Any) -> dict[str, Any]:
    return {"sections": sections}


def row_of(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_page_says_what_ran_and_which_targets_are_met(tmp_path: Path) -> None:
    report("info", "--out", tmp_path)
    (tmp_path / "sanitize-memcheck.log").write_text(MEMCHECK)
    report("tests", "--out", tmp_path, junit(tmp_path))
    report("sanitize", "--out", tmp_path, tmp_path / "sanitize-memcheck.log")
    for stage in ("tests", "sanitize"):
        outcome = ["--outcome", "failed", "--seconds", 7, "--limit", 60, "--reason", "a | b"]
        report("record", "--out", tmp_path, "--stage", stage, *outcome)
    rows = [
        {"op": "pack p=2", "size": "Wan 720p", "over_floor": 1.2},
        {"op": "pack p=4", "size": "Wan 720p", "over_floor": 1.9},
        {"op": "pack p=2", "size": "FLUX 1024", "over_floor": 9.0},
        {
            "op": "decide, 2 coarse sizes",
            "size": "FLUX 1024",
            "over_floor": 900.0,
            "microseconds": {"native": {"median": 9.5}},
        },
        {"op": "pack", "size": "Wan", "moved_bytes": 2**24, "error": "out of memory"},
    ]
    write(tmp_path / "ops.json", {"results": rows})
    loops = {
        "ddit_rt_loop_paper_2.18x": {"speedup": 2.31},
        "ddit_rt_loop_paper_3.52x": {"error": "TimeoutError: not ready"},
        "ddit_rt_host_paper_3.52x": {"speedup": 3.6},
    }
    calls = {"cudaGraphLaunch": 1, "cudaStreamSynchronize": 2}
    form = {"loop_overhead_share": 0.011, "host_calls_in_loop": calls}
    overhead = {"4p": {"model_seconds": 0.1, "executors": {"loop": form}}}
    write(
        tmp_path / "flux.json",
        flux(
            loops={"1024x1024/batch1/steps28": {"rows": loops}},
            overhead={"1024x1024/batch1/steps28": {"rows": overhead}},
            memory={"1024x1024/batch1": {"ratio_of_used_bytes": 1.04}},
        ),
    )
    assert report("summary", "--out", tmp_path) == 0
    text = (tmp_path / "summary.md").read_text()
    assert row_of(text, "tests") == ["tests", "failed", "7", "a / b"]
    assert "- tests-gpu: 1 of 4 passed, 1 skipped, 2 failed" in text
    assert "  - test_fates::test_bad" in text
    assert row_of(text, "failed tests")[2:] == ["2", "tests-gpu", "**no**, 0 of 1"]
    assert row_of(text, "errors of the sanitizer")[2:] == ["3", "memcheck", "**no**, 0 of 1"]
    ops = row_of(text, "packing at Wan 720p over its floor")
    assert ops[1:] == ["at most 1.43x", "1.9x", "pack p=4, Wan 720p", "**no**, 1 of 2"]
    assert row_of(text, "decide at FLUX 1024")[2:] == ["9.5 us", "decide, 2 coarse sizes", "yes"]
    assert row_of(text, "loop, the paper's 2.18x plan")[2:] == [
        "2.31x",
        "1024x1024/batch1/steps28",
        "yes",
    ]
    assert row_of(text, "loop, the paper's 3.52x plan")[-1] == "not measured"
    assert row_of(text, "share of the loop beside its model, 4p")[-1] == "yes"
    assert row_of(text, "waits of the host inside a loop")[2] == "2"
    assert row_of(text, "memory of all buckets over diffusers")[-1] == "yes"
    assert row_of(text, "step at p over its floor")[-1] == "not measured"
    assert "- ops pack, Wan: out of memory" in text
    assert "ddit_rt_loop_paper_3.52x: TimeoutError: not ready" in text


def test_page_shows_a_profile_as_the_profiler_writes_it(tmp_path: Path) -> None:
    subject = tiny_subject()
    entry = profiled(subject, None, tmp_path)
    profile = import_module("run_profiling.report").report_of(subject, ceilings(), [entry])
    write(tmp_path / "profile.json", profile)
    assert report("summary", "--out", tmp_path) == 0
    text = (tmp_path / "summary.md").read_text()
    assert "cpu, FluxTransformer2DModel" in text
    for patch, calls in (("p", 1), ("2p", 3), ("4p", 2)):
        assert f"| cpu | {patch} | model | {calls} |" in text


def test_empty_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report("summary", "--out", tmp_path) == 1
    assert "run other stages first" in capsys.readouterr().err
    assert report("tests", "--out", tmp_path, tmp_path / "none.xml") == 1
    assert "no such file" in capsys.readouterr().err
