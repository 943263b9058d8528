from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddit_rt.lab.demo.figures import is_textured


@pytest.mark.parametrize("name", ["grid.png", "timeline.png"])
@pytest.mark.usefixtures("report")
def test_image_is_large_enough_to_read(name: str, demo_out: Path) -> None:
    with Image.open(demo_out / name) as image:
        assert min(image.size) >= 400
        colours = image.convert("RGB").getcolors(maxcolors=2**24)
    assert colours is not None
    assert len(colours) > 20


def test_grid_has_a_column_per_prompt_and_a_row_per_way(
    report: dict[str, Any], demo_out: Path
) -> None:
    with Image.open(demo_out / "grid.png") as image:
        width, height = image.size
    # Two columns of 1.55 inches beside 2 inches of labels; four rows below 0.55 inches of captions.
    assert width == pytest.approx((2.0 + 1.55 * len(report["settings"]["prompts"])) * 150, abs=1)
    assert height == pytest.approx((0.55 + 1.55 * 4) * 150, abs=1)


def test_plain_prompts_come_before_textured_ones() -> None:
    prompts = ["a red star on blue dots", "a red star on plain blue", "a red star on blue fade"]
    assert sorted(prompts, key=is_textured) == [prompts[1], prompts[2], prompts[0]]
