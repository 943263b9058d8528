"""Images with captions from a folder, a WebDataset, or a `datasets` data set.

An image that cannot be read is no reason to stop: it is skipped, counted and listed. No caption
is: an image without one is listed as skipped too.
"""

from __future__ import annotations

import glob
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddit_rt.lab.train.config import DataConfig

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_BROKEN = (OSError, ValueError, SyntaxError, KeyError, Image.DecompressionBombError)
"""What Pillow and the readers below raise for a file that is no image, or not a whole one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Captioned:
    """An image whose bytes have not been read yet.

    Attributes:
        name: For messages.
        caption: None where none was found.
        open: Reads the image.
    """

    name: str
    caption: str | None
    open: Callable[[], Image.Image]


def captioned_images(config: DataConfig) -> Iterator[Captioned]:
    """All images of a source, unread, in a fixed order.

    Raises:
        ValueError: Nothing of the kind is there.
        ModuleNotFoundError: The kind needs a package that is not installed; it is named.
    """
    readers = {"folder": _folder, "webdataset": _webdataset, "datasets": _datasets}
    return readers[config.kind](config)


def read_images(
    examples: Iterator[Captioned], height: int, width: int, skipped: list[str]
) -> Iterator[tuple[Tensor, str]]:
    """Reads, crops and scales images, leaving broken ones out.

    Args:
        examples: What to read.
        height: Rows of the result.
        width: Columns of the result.
        skipped: Takes a line for each image that is left out.

    Yields:
        `[3, height, width]`, float32, in [-1, 1], and its caption.
    """
    for example in examples:
        if example.caption is None:
            skipped.append(f"{example.name}: no caption")
            continue
        try:
            with example.open() as opened:
                image = opened.convert("RGB")
        except _BROKEN as error:
            skipped.append(f"{example.name}: {type(error).__name__}: {error}")
            continue
        yield _fit(image, height, width), example.caption


def _fit(image: Image.Image, height: int, width: int) -> Tensor:
    """Scales the image until it covers height x width, and cuts the middle out."""
    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def _folder(config: DataConfig) -> Iterator[Captioned]:
    root = Path(config.source)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; name one with images and captions")
    table = root / "metadata.jsonl"
    found = list(_from_table(root, table) if table.is_file() else _pairs(root))
    if not found:
        raise ValueError(
            f"{root} holds no images ({', '.join(_SUFFIXES)}); expected name.png beside "
            "name.txt, or metadata.jsonl with file_name and text"
        )
    return iter(found)


def _pairs(root: Path) -> Iterator[Captioned]:
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in _SUFFIXES:
            text = path.with_suffix(".txt")
            caption = text.read_text(encoding="utf-8").strip() if text.is_file() else None
            yield Captioned(
                name=str(path.relative_to(root)),
                caption=caption,
                open=partial(Image.open, path),
            )


def _from_table(root: Path, table: Path) -> Iterator[Captioned]:
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            path = root / row["file_name"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'{table}, line {number}: expected {{"file_name": ..., "text": ...}}, got {line!r}'
            ) from error
        yield Captioned(
            name=row["file_name"],
            caption=row.get("text"),
            open=partial(Image.open, path),
        )


def _webdataset(config: DataConfig) -> Iterator[Captioned]:
    """Members of a tar with one stem are one sample, as WebDataset has it."""
    files = sorted(glob.glob(config.source))  # noqa: PTH207 - the whole path is the pattern
    if not files:
        raise ValueError(f"no file matches {config.source}; name a tar, or a pattern of them")
    return chain.from_iterable(_tar(file) for file in files)


def _tar(file: str) -> Iterator[Captioned]:
    try:
        with tarfile.open(file) as archive:
            yield from _members(file, archive)
    except tarfile.TarError as error:
        raise ValueError(f"cannot read {file} as a tar ({error})") from error


def _members(file: str, archive: tarfile.TarFile) -> Iterator[Captioned]:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in archive:
        if member.isfile():
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            samples.setdefault(f"{folder}/{stem}", {})[f".{suffix.lower()}"] = member
    for stem, parts in samples.items():
        image = next((parts[suffix] for suffix in _SUFFIXES if suffix in parts), None)
        if image is None:
            continue
        data = _content(archive, image)
        yield Captioned(
            name=f"{PurePosixPath(file).name}:{stem.lstrip('/')}",
            caption=_tar_caption(archive, parts),
            open=partial(Image.open, io.BytesIO(data)),
        )


def _tar_caption(archive: tarfile.TarFile, parts: dict[str, tarfile.TarInfo]) -> str | None:
    if ".txt" in parts:
        return _content(archive, parts[".txt"]).decode("utf-8").strip()
    if ".json" in parts:
        fields = json.loads(_content(archive, parts[".json"]))
        caption = fields.get("caption", fields.get("text"))
        return None if caption is None else str(caption)
    return None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None, "only files are listed"
    return stream.read()


def _datasets(config: DataConfig) -> Iterator[Captioned]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading a data set of the Hub needs the package datasets: pip install datasets"
        ) from error
    folder = Path(config.source)
    saved = (folder / "dataset_info.json").is_file()
    data: Any = (
        datasets.load_from_disk(config.source)
        if saved
        else datasets.load_dataset(config.source, split="train")
    )
    columns = (config.image_column, config.caption_column)
    missing = [column for column in columns if column not in data.column_names]
    if missing:
        raise ValueError(
            f"{config.source} has the columns {data.column_names}, not {missing}; name the right "
            "ones"
        )
    data = data.cast_column(config.image_column, datasets.Image(decode=False))
    return (_row(config, index, row) for index, row in enumerate(data))


def _row(config: DataConfig, index: int, row: dict[str, Any]) -> Captioned:
    stored, caption = row[config.image_column], row[config.caption_column]
    source = stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
    return Captioned(
        name=f"row {index}",
        caption=None if caption is None else str(caption),
        open=partial(Image.open, source),
    )
