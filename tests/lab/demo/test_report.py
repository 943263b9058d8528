from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddit_rt.lab.demo.figures import is_textured
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


def test_file_is_strict_json_that_follows_the_schema(
    report: dict[str, Any], demo_out: Path
) -> None:
    text = (demo_out / "report.json").read_text()
    assert json.loads(text, parse_constant=refuse) == report
    assert report["schema_version"] == 1
    assert set(report["machine"]) == {"cpu", "cores", "threads", "platform"}
    assert set(report["versions"]) == {"ddit_rt", "torch", "diffusers", "python"}
    assert set(report["model"]) == {"name", "transformer_class", "parameters", "dtype"}
    assert report["settings"]["steps"] == 8
    assert len(report["settings"]["prompts"]) == 2
    assert set(report["reference"]) == ENTRY
    assert [run["policy"] for run in report["runs"]] == ["fine", "static", "dynamic"]
    for run in report["runs"]:
        assert set(run) == RUN
        for prompt in run["prompts"]:
            assert set(prompt) == PROMPT | {"tokens", "trace"}
            assert len(prompt["trace"]["steps"]) == 8
            assert prompt["trace"]["tokens"] == prompt["tokens"]


def test_all_fine_is_its_own_reference_and_diffusers_images(report: dict[str, Any]) -> None:
    fine = report["runs"][0]
    assert fine["psnr"] is None
    assert fine["ssim"] == pytest.approx(1)
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


def test_grid_has_a_column_per_prompt_and_a_row_per_way(
    report: dict[str, Any], demo_out: Path
) -> None:
    with Image.open(demo_out / "grid.png") as image:
        width, height = image.size
        colours = image.convert("RGB").getcolors(maxcolors=2**24)
    # Two columns of 1.55 inches beside 2 inches of labels; four rows below 0.55 inches of captions.
    assert width == pytest.approx((2.0 + 1.55 * len(report["settings"]["prompts"])) * 150, abs=1)
    assert height == pytest.approx((0.55 + 1.55 * 4) * 150, abs=1)
    assert colours is not None
    assert len(colours) > 20
    with Image.open(demo_out / "timeline.png") as image:
        assert min(image.size) >= 400


def test_plain_prompts_come_before_textured_ones() -> None:
    prompts = ["a red star on blue dots", "a red star on plain blue", "a red star on blue fade"]
    assert sorted(prompts, key=is_textured) == [prompts[1], prompts[2], prompts[0]]
