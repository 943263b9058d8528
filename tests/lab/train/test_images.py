"""Every source of images, and what happens to those that cannot be used."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from ddit_rt.lab.train import DataConfig
from ddit_rt.lab.train.images import captioned_images, read_images


def config(kind: str, source: object) -> DataConfig:
    return DataConfig(kind=kind, source=str(source), height=32, width=48)


def captions(kind: str, source: object) -> tuple[list[str], list[str]]:
    skipped: list[str] = []
    read = read_images(captioned_images(config(kind, source)), 32, 48, skipped)
    return [caption for _, caption in read], skipped


def png(colour: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(stream, format="PNG")
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_folder_reads_pairs_and_lists_what_it_leaves_out(image_folder: Path) -> None:
    found, skipped = captions("folder", image_folder)
    assert found == ["picture a", "picture b", "picture c"]
    assert skipped[0].startswith("broken.png: OSError: ")
    assert skipped[1] == "silent.png: no caption"


def test_folder_reads_metadata(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    rows = [{"file_name": "one.png", "text": "red"}, {"file_name": "gone.png", "text": "gone"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found, skipped = captions("folder", tmp_path)
    assert found == ["red"]
    assert len(skipped) == 1
    assert skipped[0].startswith("gone.png: FileNotFoundError")


def test_bad_metadata_line_is_shown(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file": "one.png"}\n')
    with pytest.raises(ValueError, match=r"line 1: expected .*file_name.*got '\{\"file\""):
        captions("folder", tmp_path)


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        captions("folder", tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        captions("folder", tmp_path / "nowhere")


def test_webdataset_reads_samples_of_several_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a/1.png": png(), "a/1.txt": b"one", "a/2.png": png()})
    write_tar(
        tmp_path / "1.tar",
        {"3.jpg": b"no picture", "3.txt": b"three", "4.PNG": png(), "4.json": b'{"caption": "4"}'},
    )
    found, skipped = captions("webdataset", tmp_path / "*.tar")
    assert found == ["one", "4"]
    assert skipped[0] == "0.tar:a/2: no caption"
    assert skipped[1].startswith("1.tar:3: UnidentifiedImageError")


def test_file_that_is_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"not a tar")
    with pytest.raises(ValueError, match=r"cannot read .*x\.tar as a tar"):
        captions("webdataset", tmp_path / "x.tar")
    with pytest.raises(ValueError, match="no file matches"):
        captions("webdataset", tmp_path / "y*.tar")


def test_missing_datasets_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import of it then finds
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        captions("datasets", "owner/name")


def test_datasets_rows_are_read_undecoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's interface as its documentation has it, without the package."""

    class Table(list):
        column_names = ("image", "text")

        def cast_column(self, name: str, feature: object) -> Table:
            assert (name, feature) == ("image", "undecoded")
            return self

    (tmp_path / "b.png").write_bytes(png())
    rows = Table(
        [
            {"image": {"bytes": png(), "path": None}, "text": "in the table"},
            {"image": {"bytes": None, "path": str(tmp_path / "b.png")}, "text": "beside it"},
            {"image": {"bytes": b"broken", "path": None}, "text": "broken"},
        ]
    )
    package = ModuleType("datasets")
    package.load_dataset = lambda name, split: rows  # type: ignore[attr-defined]
    package.Image = lambda decode: "undecoded"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    found, skipped = captions("datasets", "owner/name")
    assert found == ["in the table", "beside it"]
    assert skipped[0].startswith("row 2: UnidentifiedImageError")
    rows.column_names = ("picture", "text")
    with pytest.raises(ValueError, match=r"has the columns .*'picture'.* not \['image'\]"):
        captions("datasets", "owner/name")


def test_image_is_scaled_and_cut_in_the_middle(tmp_path: Path) -> None:
    """A wide image, black but for a white middle: only the middle is left."""
    image = Image.new("RGB", (300, 64))
    image.paste((255, 255, 255), (100, 0, 200, 64))
    image.save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("wide")
    examples = captioned_images(config("folder", tmp_path))
    (pixels, _), *_ = read_images(examples, 32, 48, [])
    assert pixels.shape == (3, 32, 48)
    # Lanczos weights sum to 1 within half an 8-bit step.
    torch.testing.assert_close(pixels, torch.ones(3, 32, 48), rtol=0, atol=2 / 255)
