"""What `ddit-rt generate` writes: images, videos as MP4 or frame by frame, sound as WAV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO = ".mp4"
SOUND = ".wav"

_KNOWN = {"image": IMAGES, "video": (*IMAGES, VIDEO), "audio": (SOUND,)}
_MAKES = {"image": "images", "video": "videos", "audio": "sound"}


def output_paths(output: Path, count: int, *, kind: str = "image") -> list[Path]:
    """Where `count` images, videos or recordings go; the folder is made.

    Args:
        output: The name that was asked for.
        count: Number of files; several are numbered.
        kind: What the model makes: `"image"`, `"video"` or `"audio"`.

    Raises:
        ValueError: A file type that cannot be written, or a folder in the way.
        ModuleNotFoundError: What writes MP4 files is not installed.
    """
    suffix = output.suffix.lower()
    if suffix not in _KNOWN[kind]:
        raise ValueError(
            f"cannot write {output}: this model makes {_MAKES[kind]}, and the name must end in "
            f"{', '.join(_KNOWN[kind])}"
        )
    if suffix == VIDEO:
        from ddit_rt.lab.measure.video_file import require_encoder

        require_encoder()  # before minutes of work
    several = [output.with_stem(f"{output.stem}-{index}") for index in range(1, count + 1)]
    paths = several if count > 1 else [output]
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file")
    output.parent.mkdir(parents=True, exist_ok=True)
    return paths


def write_video(frames: Sequence[Any], path: Path, fps: int) -> None:
    """Writes PIL frames: as MP4, or as `NAME/000.png`, ... for an image's name."""
    if path.suffix.lower() != VIDEO:
        folder = path.with_suffix("")
        folder.mkdir(exist_ok=True)
        for index, frame in enumerate(frames):
            frame.save(folder / f"{index:03d}{path.suffix}")
        return
    import numpy as np

    from ddit_rt.lab.measure.video_file import write_mp4

    write_mp4(path, [np.asarray(frame.convert("RGB")) for frame in frames], fps)


def write_sound(samples: Any, path: Path, rate: int) -> None:
    """Writes a recording as 16-bit PCM.

    Args:
        samples: `[channels, samples]`, floating-point numbers in [-1, 1]; what lies beyond is cut.
        path: The file.
        rate: Samples a second.
    """
    from ddit_rt.lab.measure.sound_file import as_pcm, wav_bytes

    path.write_bytes(wav_bytes(as_pcm(samples), rate))
