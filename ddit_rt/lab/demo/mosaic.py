"""`clips.mp4` of the demo: the videos of every plan, one row per plan and a column per prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddit_rt.lab.demo.plans import FINE
from ddit_rt.lab.measure.timing import Pixels

_LABEL, _CAPTION, _GAP, _BLOCK = 208, 64, 8, 16
"""Pixels: width of the row labels, height of the captions, white space, what sides divide by."""


def labelled(
    report: Mapping[str, Any], made: Mapping[str, Sequence[Pixels]]
) -> dict[str, Sequence[Pixels]]:
    """Rows for `side_by_side`: the videos of each plan, by what to say of it.

    Args:
        report: The demo's report.
        made: The videos by the name of the plan.
    """
    rows = {}
    for entry in report["runs"]:
        lines = [entry["label"], f"{entry['seconds_denoise']:.2f} s denoising"]
        if entry["policy"] != FINE:
            lines += [f"{entry['speedup_over_fine']:.2f}x as fast", f"SSIM {entry['ssim']:.3f}"]
        rows["\n".join(lines)] = made[entry["policy"]]
    return rows


def side_by_side(
    prompts: Sequence[str],
    rows: Mapping[str, Sequence[Pixels]],
    *,
    side: int = 192,
    loops: int = 3,
) -> list[Pixels]:
    """Frames that show a row of videos per label, a column per prompt.

    Args:
        prompts: Captions of the columns.
        rows: One video `[F, H, W, 3]` per prompt, by a label, whose lines are drawn below each
            other.
        side: Height of a video in the result; videos are enlarged smoothly.
        loops: How often the videos are repeated.

    Returns:
        `loops` x F frames, whose sides are multiples of 16.
    """
    videos = next(iter(rows.values()))
    count, height, width, _ = videos[0].shape
    cell = (side * width // height, side)
    sheet = Image.new("RGB", _sheet_size(cell, len(prompts), len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        left, _ = _corner(cell, 0, column)
        draw.multiline_text((left, _GAP), _two_lines(prompt), fill="black", font=_font(14))
    for row, label in enumerate(rows):
        _, top = _corner(cell, row, 0)
        draw.multiline_text((_GAP, top + _GAP), label, fill="black", font=_font(17), spacing=6)
    once = [_filled(sheet, rows, index, cell) for index in range(count)]
    return once * loops


def _filled(
    sheet: Image.Image, rows: Mapping[str, Sequence[Pixels]], index: int, cell: tuple[int, int]
) -> Pixels:
    """The sheet with frame `index` of every video in its place."""
    frame = sheet.copy()
    for row, videos in enumerate(rows.values()):
        for column, video in enumerate(videos):
            image = Image.fromarray(video[index]).resize(cell, Image.Resampling.BICUBIC)
            frame.paste(image, _corner(cell, row, column))
    return np.asarray(frame, dtype=np.uint8)


def _corner(cell: tuple[int, int], row: int, column: int) -> tuple[int, int]:
    return _LABEL + column * (cell[0] + _GAP), _CAPTION + row * (cell[1] + _GAP)


def _sheet_size(cell: tuple[int, int], columns: int, rows: int) -> tuple[int, int]:
    width, height = _corner(cell, rows, columns)
    return -(-width // _BLOCK) * _BLOCK, -(-height // _BLOCK) * _BLOCK


def _two_lines(prompt: str) -> str:
    return prompt.replace(" moving", "\nmoving", 1)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
