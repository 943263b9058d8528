"""The GPU battery as far as it goes without a device: what it tries, gives up on and goes on from.

`.ci/rehearse.py` runs all of it for real on a CPU; here a script stands for Python, so that each
refusal that a device may give is tried.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_battery.sh"

# Stands for Python: says what the rules allow, and fails what matches $REFUSES.
PYTHON = """#!/bin/bash
echo "$*" >>"$CALLS"
[[ -n "$REFUSES" && "$*" =~ $REFUSES ]] && exit 1
case "$*" in
  *gpu_visit.py\\ card*) echo fake ;;
  *gpu_visit.py\\ form*) echo "${FORM:-loop}" ;;
  *gpu_visit.py\\ bench*) [[ "$3" != */flux_fake.json ]] || echo '{}' >"$3" ;;
  *ddit_rt.cli\\ demo*) mkdir -p demo && echo '{}' >demo/report.json ;;
esac
exit 0
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    return path


def battery(
    folder: Path, *arguments: str, out: str = "out", **environment: str
) -> subprocess.CompletedProcess[str]:
    places = {
        "OUT": str(folder / out),
        "SCRATCH": str(folder / "scratch"),
        "PYTHON": str(folder / "python"),
        "CALLS": str(folder / "calls"),
        "WHEELS": str(folder / "no wheels"),
        "REFUSES": "",
    }
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **places, **environment},
    )


def steps(folder: Path, out: str = "out") -> dict[str, Any]:
    lines = (folder / out / "steps.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return {entry["step"]: entry["code"] for entry in entries if "code" in entry}


def calls(folder: Path, *words: str) -> list[str]:
    lines = (folder / "calls").read_text().splitlines()
    return [line for line in lines if all(word in line for word in words)]


def test_help_names_every_setting_and_other_words_are_refused(tmp_path: Path) -> None:
    done = battery(tmp_path, "--help")
    assert done.returncode == 0
    for name in ("pack", "OUT", "FROM", "END", "WHEELS", "WHEEL", "SCRATCH", "MAX_MIB", "DEVICE"):
        assert name in done.stdout
    assert "set -uo" not in done.stdout
    assert battery(tmp_path, "benchmark").returncode == 2


@pytest.mark.usefixtures("python")
def test_what_matters_most_comes_first_and_in_the_form_that_passed(tmp_path: Path) -> None:
    done = battery(tmp_path)
    assert done.returncode == 0, done.stdout
    order = [name for name in steps(tmp_path) if name != "compile"]
    assert order == [
        *("rules", "buckets-loop", "loops", "buckets-fp8", "wan-buckets", "loops-50"),
        *("buckets-512", "buckets-batch-4", "wan-loops", "ops", "demo"),
    ]
    assert set(steps(tmp_path).values()) == {0}
    for line in calls(tmp_path, "gpu_visit.py bench", "--sections loops"):
        assert "--executors loop" in line
    (compiled,) = calls(tmp_path, "--sections compile")
    (buckets,) = calls(tmp_path, "--sections buckets blocks kernels")
    artifact = f"--artifact {tmp_path}/scratch/flux.ddit"
    assert artifact in compiled
    assert artifact in buckets
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("demo.json", "flux_fake.json", "log.txt", "steps.jsonl"),
    ]


@pytest.mark.usefixtures("python")
def test_blocks_that_travel_take_the_place_of_a_compile_that_fails(tmp_path: Path) -> None:
    (tmp_path / "wheels" / "lowered").mkdir(parents=True)
    battery(tmp_path, REFUSES="sections compile", WHEELS=str(tmp_path / "wheels"))
    lowered = f"--lowered {tmp_path}/wheels/lowered"
    (buckets,) = calls(tmp_path, "--sections buckets blocks kernels")
    assert lowered in buckets
    assert "--executors loop" in buckets
    others = [*calls(tmp_path, "--model wan"), *calls(tmp_path, "--quantization")]
    assert others
    assert not [line for line in others if "--lowered" in line]
    assert steps(tmp_path)["compile"] == 1
    shutil.rmtree(tmp_path / "wheels")
    (tmp_path / "calls").unlink()
    battery(tmp_path, out="bare", SCRATCH=str(tmp_path / "other"), REFUSES="sections compile")
    (buckets,) = calls(tmp_path, "--sections buckets blocks kernels")
    assert "--backend eager" in buckets


@pytest.mark.usefixtures("python")
def test_a_part_of_the_steps_can_be_asked_for(tmp_path: Path) -> None:
    battery(tmp_path, ONLY="compile|rules|buckets-(loop|host)|loops")
    assert sorted(steps(tmp_path)) == ["buckets-loop", "compile", "loops", "rules"]


@pytest.mark.usefixtures("python")
@pytest.mark.parametrize(
    ("refuses", "tried", "how"),
    [
        ("executors loop", ["buckets-loop", "buckets-host"], "--executors host"),
        ("buckets.*executors (loop|host)$", ["buckets-loop", "buckets-host", "buckets-eager"],
         "--executors host --backend eager"),
    ],
)  # fmt: skip
def test_what_is_refused_gives_way_to_the_next_best(
    tmp_path: Path, refuses: str, tried: list[str], how: str
) -> None:
    battery(tmp_path, REFUSES=refuses)
    found = steps(tmp_path)
    assert [name for name in found if name.startswith("buckets-") and name[8].islower()][
        : len(tried)
    ] == tried
    assert [found[name] for name in tried] == [1] * (len(tried) - 1) + [0]
    assert all(how in line for line in calls(tmp_path, "--sections loops"))


@pytest.mark.usefixtures("python")
def test_later_call_does_only_what_is_left(tmp_path: Path) -> None:
    battery(tmp_path, REFUSES="executors loop|loops.*steps 50")
    assert steps(tmp_path)["loops-50"] == 1
    (tmp_path / "calls").unlink()
    battery(tmp_path, out="second")
    assert steps(tmp_path, "second")["loops-50"] == 0
    assert not calls(tmp_path, "--sections buckets")
    (left,) = calls(tmp_path, "gpu_visit.py bench", "--sections loops")
    assert "--executors host" in left  # what the first call found, though loop is what rules allow
    assert (tmp_path / "second" / "flux_fake.json").exists()


@pytest.mark.usefixtures("python")
def test_a_call_on_another_machine_goes_on_from_records_of_the_same_sources(tmp_path: Path) -> None:
    battery(tmp_path, out="first")
    (tmp_path / "calls").unlink()
    elsewhere = {"SCRATCH": str(tmp_path / "elsewhere")}
    battery(tmp_path, out="second", FROM=str(tmp_path / "first"), **elsewhere)
    assert not calls(tmp_path, "--sections loops")
    record = tmp_path / "first" / "steps.jsonl"
    record.write_text(record.read_text().replace('"key": "', '"key": "other '))
    battery(tmp_path, out="third", FROM=str(tmp_path / "first"), SCRATCH=str(tmp_path / "third-s"))
    assert len(calls(tmp_path, "gpu_visit.py bench", "--sections loops")) == 3


@pytest.mark.usefixtures("python")
def test_nothing_starts_when_the_time_is_over(tmp_path: Path) -> None:
    battery(tmp_path, END="0")
    assert set(steps(tmp_path).values()) == {"no time"}
    assert not calls(tmp_path, "gpu_visit.py bench")
    assert calls(tmp_path, "gpu_visit.py summary")


@pytest.mark.usefixtures("python")
def test_a_machine_without_the_wheels_builds_the_package(tmp_path: Path) -> None:
    battery(tmp_path, REFUSES="import ddit_rt._runtime", WHEELS=str(tmp_path))
    (build,) = calls(tmp_path, "--no-build-isolation")
    assert "--no-index" in build
    assert "CMAKE_CUDA_ARCHITECTURES=90-real" in build
    assert f"--target {tmp_path}/scratch/site" in build


def passed(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "passed")


def test_the_form_rests_on_the_rules_that_hold() -> None:
    visit = import_module("gpu_visit")
    alone = passed(f"{visit.ALONE}[shape0]")
    attention = passed(*visit.LOOP[1:])
    every = {**alone, **passed(visit.SWITCH, visit.LOOP[0]), **attention}
    assert visit.form_of(every) == "loop"
    assert visit.form_of({**every, visit.LOOP[2]: "skipped"}) == "loop"
    assert visit.form_of({**every, visit.LOOP[1]: "failed"}) == "step"
    assert visit.form_of({**every, visit.LOOP[0]: "skipped"}) == "step"
    assert visit.form_of({**alone, visit.SWITCH: "failed"}) == "host"
    assert visit.form_of({}) == "host"  # the rules were cut off
    assert visit.form_of({**every, f"{visit.ALONE}[shape1]": "failed"}) == "eager"


def test_the_names_of_the_rules_are_those_of_tests() -> None:
    visit = import_module("gpu_visit")
    text = (SCRIPT.parents[1] / "tests/runtime/test_step_gpu.py").read_text()
    for name in (visit.ALONE, visit.SWITCH, *visit.LOOP):
        assert f"def {name.partition('[')[0]}(" in text


def test_form_is_noted_and_kept_for_a_call_that_does_not_try_the_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    visit = import_module("gpu_visit")
    notes, junit = tmp_path / "steps.jsonl", tmp_path / "rules.xml"
    junit.write_text(
        f'<testsuite><testcase name="{visit.ALONE}[a]"/><testcase name="{visit.SWITCH}"/>'
        f'<testcase name="{visit.LOOP[0]}"><failure/></testcase></testsuite>'
    )
    command = ["form", str(notes), "--junit", str(junit)]
    assert visit.main(command) == 0
    assert json.loads(notes.read_text())["failed"] == [visit.LOOP[0]]
    junit.unlink()
    assert visit.main(command) == 0
    assert capsys.readouterr().out.split() == ["step", "step"]


def test_summary_holds_figures_against_their_aims_and_names_what_failed(tmp_path: Path) -> None:
    visit = import_module("gpu_visit")
    row = {"seconds": {"median": 0.2}, "floor_seconds": 0.1, "over_floor": 2.0, "bound": "bytes"}
    report = {
        "machine": {"gpu": {"name": "card"}},
        "versions": {"torch": "2", "diffusers": "1"},
        "model": {"preset": "flux-dev", "dtype": "bfloat16", "text_tokens": 512},
        "sections": {"buckets": {"1024": {"rows": {"p": row, "4p": {"error": "no\nroom"}}}}},
    }
    (tmp_path / "flux_card.json").write_text(json.dumps(report))
    (tmp_path / "steps.jsonl").write_text(
        '{"step": "rules", "code": 1, "from": 0, "seconds": 9}\n'
        '{"step": "form", "form": "host", "failed": ["a"], "passed": 3}\n'
    )
    text = visit.write_summary(tmp_path)
    assert text == (tmp_path / "summary.md").read_text()
    assert "| rules | 1 | 9 |" in text
    assert "form host, failed: a" in text
    assert "1024 p, step over its floor: 2, aim <= 1.25" in text
    assert "4p: no room" in text


def test_what_is_too_large_to_travel_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    visit = import_module("gpu_visit")
    (tmp_path / "diffusers-1-py3-none-any.whl").write_bytes(b"0" * 2**20)
    command = ["size", str(tmp_path), "--limit-mib"]
    assert visit.main([*command, "64"]) == 0
    shown = capsys.readouterr()
    assert "1.0 MiB  diffusers-1" in shown.out
    assert "no wheel of ddit_rt" in shown.err
    assert visit.main([*command, "1.5"]) == 1
    assert "too large" in capsys.readouterr().err
