"""MP4 files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddit_rt.lab.measure.timing import Pixels


def write_mp4(path: Path, frames: Sequence[Pixels], frames_per_second: int) -> None:
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
            f"got frames of {height} x {width}; an MP4 needs even sides. Write frames as images, "
            "or make another size"
        )
    with av.open(str(path), mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=frames_per_second, options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(image))
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
