"""Real sizes of every family: what patches they offer, by the compiled ranges."""

from __future__ import annotations

from typing import Any

import pytest

from ddit_rt.blocks import TokenRanges
from ddit_rt.models import FAMILIES, family_named
from ddit_rt.planning.compiled import CompiledModel
from ddit_rt.steps import StepModel

IMAGE = ((1024, 1024), (1360, 768), (768, 1360), (1920, 1080), (512, 512), (1328, 1328))
QWEN = ((1328, 1328), (1664, 928), (928, 1664), (1472, 1140), (1140, 1472))
WAN = ((480, 832), (832, 480), (720, 1280), (1280, 720))
TI2V = ((704, 1280), (1280, 704), (480, 832))

LTX = ((512, 768), (768, 512), (704, 1216), (1088, 1920))
AUDIO = ((1, 24000 * 30), (1, 24000 * 10), (1, 24000 * 5), (1, 24000 * 3))

# By family: pixels, or samples, of a latent pixel, frames of a latent (0: an image), and sizes in
# pixels, or samples, as model cards, or the pipelines' own defaults, name them.
SIZES: dict[str, tuple[int, int, tuple[tuple[int, int], ...]]] = {
    "flux": (8, 0, IMAGE),
    "flux-img2img": (8, 0, IMAGE),
    "flux-inpaint": (8, 0, IMAGE),
    "flux-kontext": (8, 0, IMAGE),
    "flux-fill": (8, 0, IMAGE),
    "wan": (8, 21, WAN),
    "wan-ti2v": (16, 31, TI2V),
    "wan-image": (8, 21, WAN),
    "wan-vace": (8, 21, WAN),
    "qwen-image": (8, 0, QWEN),
    "chroma": (8, 0, IMAGE),
    "sd3": (8, 0, ((1024, 1024), (1216, 832), (832, 1216))),
    "flux2": (8, 0, IMAGE),
    "z-image": (8, 0, IMAGE),
    "krea2": (8, 0, IMAGE),
    "longcat-audio": (2048, 0, AUDIO),
    "ltx2": (32, 16, LTX),
}

# Wan's text to video has two sizes of latent pixels.
ROWS = [(name, *row) for name, row in (*SIZES.items(), ("wan", (16, 31, TI2V)))]


def test_no_family_is_left_out() -> None:
    assert {family.name for family in FAMILIES} == set(SIZES)


@pytest.mark.parametrize(("name", "scale", "frames", "sizes"), ROWS)
def test_real_sizes_offer_every_patch(
    name: str, scale: int, frames: int, sizes: tuple[tuple[int, int], ...]
) -> None:
    family: Any = family_named(name)
    model = StepModel(family=family, transformer=None, base={})  # type: ignore[arg-type]
    ranges = TokenRanges(**family.default_ranges)
    compiled = CompiledModel(steps=model, multiples=(1, 2, 4), ranges=ranges)
    unit = scale * family.patch
    for size in sizes:
        height, width = (family.patch * max(1, edge // unit) for edge in size)
        assert compiled.offered(height, width, frames) == ((1, 2, 4), ()), size
