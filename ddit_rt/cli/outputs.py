"""What `ddit-rt generate` writes: pictures, or videos as MP4 or frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO = ".mp4"
_MP4_PACKAGES = {"imageio": "imageio", "imageio_ffmpeg": "imageio-ffmpeg"}


def output_paths(output: Path, count: int, *, video: bool = False) -> list[Path]:
    """Where `count` pictures or videos go; the folder is made.

    Raises:
        ValueError: None are asked for, or a file type that cannot be written.
        ModuleNotFoundError: What writes MP4 files is not installed.
    """
    if count < 1:
        raise ValueError("got --num-images below 1; ask for at least one picture per prompt")
    known = (*PICTURES, VIDEO) if video else PICTURES
    suffix = output.suffix.lower()
    if suffix not in known:
        hint = "" if video or suffix != VIDEO else "; this model makes pictures, not videos"
        raise ValueError(f"cannot write {output}: the name must end in {', '.join(known)}{hint}")
    if suffix == VIDEO:
        _require_mp4()
    output.parent.mkdir(parents=True, exist_ok=True)
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{index}") for index in range(1, count + 1)]


def _require_mp4() -> None:
    """Refuses, before minutes of work, to start without what encodes."""
    missing = [package for module, package in _MP4_PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"an MP4 needs {' and '.join(missing)}; pip install 'ddit_rt[video]', or write frames: "
            "-o NAME.png"
        )


def write_video(frames: Sequence[Any], path: Path, fps: int) -> None:
    """Writes PIL frames: as MP4, or as `NAME/000.png`, ... for a picture's name."""
    if path.suffix.lower() != VIDEO:
        folder = path.with_suffix("")
        folder.mkdir(exist_ok=True)
        for index, frame in enumerate(frames):
            frame.save(folder / f"{index:03d}{path.suffix}")
        return
    from diffusers.utils import export_to_video

    # Blocks of one pixel: by default frames are enlarged to multiples of 16.
    export_to_video(list(frames), str(path), fps=fps, macro_block_size=1)
