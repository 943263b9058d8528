"""The GPU battery as far as it goes without a device: its stages, and what it notes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_battery.sh"
STAGES = [
    *("info", "build", "tests", "sanitize", "ops", "profile", "flux-buckets", "flux-loops"),
    *("flux-memory", "flux-compile", "flux-overhead", "wan-buckets", "wan-loops", "summary"),
]


def battery(
    folder: Path, *arguments: str, out: str = "out", **environment: str
) -> subprocess.CompletedProcess[str]:
    places = {
        "OUT": str(folder / out),
        "SCRATCH": str(folder / "scratch"),
        "PYTHON": sys.executable,
    }
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **places, **environment},
    )


def stages_of(folder: Path, out: str = "out") -> dict[str, dict[str, str]]:
    stages: dict[str, dict[str, str]] = json.loads((folder / out / "stages.json").read_text())[
        "stages"
    ]
    return stages


def test_help_names_every_stage_and_setting(tmp_path: Path) -> None:
    done = battery(tmp_path, "--help")
    assert done.returncode == 0
    for name in (*STAGES, "OUT", "WHEELS", "LIMIT", "FLUX_ARGS", "WAN_ARGS"):
        assert name in done.stdout
    assert "set -euo" not in done.stdout


def test_unknown_stage_is_exit_2_and_runs_nothing(tmp_path: Path) -> None:
    done = battery(tmp_path, "info", "benchmark")
    assert done.returncode == 2
    assert "no stage 'benchmark'" in done.stderr
    assert all(stage in done.stderr for stage in STAGES)
    assert not list(tmp_path.iterdir())


def test_dry_run_shows_all_commands_and_runs_none(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "pytest-9-py3-none-any.whl").touch()
    done = battery(
        tmp_path, "--dry-run", WHEELS=str(wheels), LIMIT="90", LIMIT_FLUX_LOOPS="300",
        FLUX_ARGS="--height 1024 --batch 1", WAN_ARGS="--steps 20",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]
    lines = done.stdout.splitlines()
    titles = [line.split()[1] for line in lines if "(limit " in line]
    assert titles == STAGES
    assert "[battery] info (limit 90 s)" in lines
    assert "[battery] flux-loops (limit 300 s)" in lines
    wheel, install, build = (line for line in lines if "'pip'" in line)
    assert "'pytest-9-py3-none-any.whl'" not in wheel  # a path, not a name for an index
    assert str(wheels / "pytest-9-py3-none-any.whl") in wheel
    for command in (wheel, install, build):
        assert "'--no-index'" in command
        assert "'--no-deps'" in command
    assert "'--no-build-isolation'" in install
    assert f"'--target' '{tmp_path}/scratch/site'" in build
    loops, video = (line for line in lines if "'--sections' 'loops'" in line)
    assert f"'--out' '{tmp_path}/out/wan.json' '--steps' '20'" in video
    assert "'--budget-s' '240'" in loops
    assert loops.endswith("'--height' '1024' '--batch' '1'")
    assert f"'--out' '{tmp_path}/out/flux.json'" in loops


def test_a_model_stands_for_its_sections(tmp_path: Path) -> None:
    done = battery(tmp_path, "--dry-run", "wan", "flux", "summary")
    titles = [line.split()[1] for line in done.stdout.splitlines() if "(limit " in line]
    wan, flux = ([one for one in STAGES if one.startswith(name)] for name in ("wan-", "flux-"))
    assert titles == [*wan, *flux, "summary"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_info_without_a_device_fails_in_one_line(tmp_path: Path) -> None:
    done = battery(tmp_path, "info")
    assert done.returncode == 1
    assert "no CUDA device: torch" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    info = json.loads((tmp_path / "out" / "info.json").read_text())
    assert info["torch"]["version"] == str(torch.__version__)
    assert info["torch"]["gpus"] == []
    entry = stages_of(tmp_path)["info"]
    assert entry["outcome"] == "failed"
    assert entry["reason"].startswith("no CUDA device: torch")


def test_failing_stage_does_not_stop_the_next(tmp_path: Path) -> None:
    done = battery(tmp_path, "ops", "summary")
    assert done.returncode == 1
    stages = stages_of(tmp_path)
    assert stages["ops"]["outcome"] == "failed"
    assert "run the stage build first" in stages["ops"]["reason"]
    assert stages["summary"]["outcome"] == "passed"
    assert "| ops | failed |" in (tmp_path / "out" / "summary.md").read_text()
    logs = (tmp_path / "out" / "logs.txt").read_text()
    assert logs.index("===== ops: failed") < logs.index("===== summary: passed")


def test_stage_is_stopped_at_its_limit(tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *"report.py info"*) exec sleep 600;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    slow.chmod(0o755)
    done = battery(tmp_path, "info", PYTHON=str(slow), LIMIT_INFO="1")
    assert done.returncode == 1
    assert stages_of(tmp_path)["info"]["outcome"] == "timed out"


def test_wheels_that_are_not_there_are_named(tmp_path: Path) -> None:
    assert battery(tmp_path, "build", WHEELS=str(tmp_path)).returncode == 1
    assert stages_of(tmp_path)["build"]["reason"] == f"no wheels in WHEELS={tmp_path}"


def test_later_call_brings_results_of_an_earlier_one(tmp_path: Path) -> None:
    battery(tmp_path, "ops", out="first")
    assert battery(tmp_path, "summary", out="second").returncode == 0
    assert list(stages_of(tmp_path, "second")) == ["ops", "summary"]
    (tmp_path / "scratch" / "results" / "stamp").write_text("of other sources")
    assert battery(tmp_path, "summary", out="third").returncode == 1
    assert list(stages_of(tmp_path, "third")) == ["summary"]
