from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddit_rt.lab.demo.report import summary_table

ENTRY = {"label", "seconds", "seconds_denoise", "psnr", "ssim", "prompts"}
RUN = ENTRY | {"policy", "settings", "tokens", "speedup_denoise", "speedup_end_to_end"}
PROMPT = {
    "prompt",
    "seed",
    "seconds",
    "seconds_denoise",
    "seconds_spread",
    "seconds_denoise_spread",
    "psnr",
    "ssim",
}


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_file_is_strict_json_and_equals_the_result(report: dict[str, Any], demo_out: Path) -> None:
    text = (demo_out / "report.json").read_text()
    assert json.loads(text, parse_constant=refuse) == report


def test_top_level_follows_the_schema(report: dict[str, Any]) -> None:
    assert report["schema_version"] == 1
    assert set(report["machine"]) == {"cpu", "cores", "threads", "platform"}
    assert set(report["versions"]) == {"ddit_rt", "torch", "diffusers", "python"}
    assert set(report["model"]) == {"name", "transformer_class", "parameters", "dtype"}
    assert report["settings"]["steps"] == 8
    assert len(report["settings"]["prompts"]) == 2


def test_entries_follow_the_schema(report: dict[str, Any]) -> None:
    assert set(report["reference"]) == ENTRY
    assert [run["policy"] for run in report["runs"]] == ["fine", "static", "dynamic"]
    for run in report["runs"]:
        assert set(run) == RUN
        for prompt in run["prompts"]:
            assert set(prompt) == PROMPT | {"tokens", "trace"}
            assert len(prompt["trace"]["steps"]) == 8
            assert prompt["trace"]["tokens"] == prompt["tokens"]


def test_all_fine_is_its_own_reference_of_quality(report: dict[str, Any]) -> None:
    fine = report["runs"][0]
    assert fine["psnr"] is None
    assert fine["ssim"] == pytest.approx(1)


def test_diffusers_made_the_same_images_up_to_rounding(report: dict[str, Any]) -> None:
    # A byte may round the other way: one level in 255 is 48 dB.
    assert report["reference"]["psnr"] is None or report["reference"]["psnr"] > 48


def test_speedups_are_ratios_of_the_reported_seconds(report: dict[str, Any]) -> None:
    for run in report["runs"]:
        loop = report["reference"]["seconds_denoise"] / run["seconds_denoise"]
        assert run["speedup_denoise"] == pytest.approx(loop)
        assert run["speedup_end_to_end"] == pytest.approx(
            report["reference"]["seconds"] / run["seconds"]
        )
        assert run["seconds"] > run["seconds_denoise"]


def test_static_plan_spends_the_planned_tokens(report: dict[str, Any]) -> None:
    fine, static, _ = report["runs"]
    tokens = fine["tokens"] / 8
    assert static["tokens"] == 4 * tokens + 4 * tokens / 4


def test_summary_has_a_line_per_way(report: dict[str, Any]) -> None:
    table = summary_table(report)
    for label in ("diffusers", "full resolution", "static plan", "dynamic"):
        assert any(line.startswith(label) for line in table.splitlines())
