"""MP4 files, and `clips.mp4` of the demo: the clips of every plan, one row per plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ddit_rt.lab.measure.timing import Picture

_LABEL, _CAPTION, _GAP, _BLOCK = 208, 64, 8, 16
"""Pixels: width of the row labels, height of the captions, white space, what sides divide by."""


def write_mp4(path: Path, frames: Sequence[Picture], frames_per_second: int) -> None:
    """Writes frames `[H, W, 3]` as an H.264 MP4.

    Args:
        path: File to write.
        frames: All of one size, whose sides are even.
        frames_per_second: Speed.

    Raises:
        ModuleNotFoundError: PyAV is not installed; the message names the extra.
        ValueError: Odd sides.
    """
    av = require_encoder()
    height, width, _ = frames[0].shape
    if height % 2 or width % 2:
        # Half-resolution colour is the only kind that every player takes.
        raise ValueError(
            f"got frames of {height} x {width}; an MP4 needs even sides. Write frames as pictures, "
            "or make another size"
        )
    with av.open(str(path), mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=frames_per_second, options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def require_encoder() -> Any:
    """The module `av`, PyAV, whose wheels hold the encoder.

    Raises:
        ModuleNotFoundError: It is not installed; the message names the extra.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"an MP4 needs PyAV ({error}); pip install 'ddit_rt[video]', or write single frames"
        ) from error
    return av


def side_by_side(
    prompts: Sequence[str],
    rows: Mapping[str, Sequence[Picture]],
    *,
    side: int = 192,
    loops: int = 3,
) -> list[Picture]:
    """Frames that show a row of clips per label, a column per prompt.

    Args:
        prompts: Captions of the columns.
        rows: Per label, whose lines are drawn below each other, one clip `[F, H, W, 3]` per prompt.
        side: Height of a clip in the result; clips are enlarged smoothly.
        loops: How often the clips are repeated.

    Returns:
        `loops` x F frames, whose sides are multiples of 16.
    """
    clips = next(iter(rows.values()))
    count, height, width, _ = clips[0].shape
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
    sheet: Image.Image, rows: Mapping[str, Sequence[Picture]], index: int, cell: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """The sheet with frame `index` of every clip in its place."""
    frame = sheet.copy()
    for row, clips in enumerate(rows.values()):
        for column, clip in enumerate(clips):
            picture = Image.fromarray(clip[index]).resize(cell, Image.Resampling.BICUBIC)
            frame.paste(picture, _corner(cell, row, column))
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
