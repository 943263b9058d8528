"""No pickle is read: not one that the package's own code could reach, nor one that is put anywhere.

A pickle runs whatever it says while it is read. Artifacts are code too, but say so, and are trusted
by name; everything else is JSON, safetensors or an image.
"""

from __future__ import annotations

import ast
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import check_unchanged, eager, everything, speaking_pipeline
from models import random_adapters, tiny_pipeline
from text_encoders import save_tiny

import ddit_rt
from ddit_rt.adapters import load_adapters, save_adapters
from ddit_rt.artifact import open_artifact
from ddit_rt.artifact.trust import is_trusted
from ddit_rt.blocks import LoadedPackage
from ddit_rt.errors import DditError
from ddit_rt.models import FluxFamily
from ddit_rt.sources import load_pipeline

ROOT = Path(ddit_rt.__file__).parent
MODULES = ("cloudpickle", "cPickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve")
READERS = ("torch.load", "np.load", "numpy.load", "torch.hub.load", "torch.jit.load", "yaml.load")
ELSEWHERE = {
    "lab/evaluate/metrics/text.py: from_pretrained": "networks that metrics are, by their names",
    "lab/train/trainer.py: load_state": "accelerate's, of checkpoints that the run has written",
    "serving/ray_batch.py: cloudpickle": "between processes of a cluster, as all that Ray sends",
}
"""Beside the runtime, with the reason."""


def reached(tree: ast.AST) -> Iterator[str]:
    """What of a module reads pickles, or might."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [one.name for one in node.names]
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            yield from (m for m in MODULES if any(m in name.split(".") for name in names))
        if isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            last = name.rpartition(".")[2]
            if name in READERS or name in ("eval", "exec") or last == "load_state":
                yield last if last == "load_state" else name
            if last in ("from_pretrained", "load_lora_weights") and not is_true(
                given.get("use_safetensors")
            ):
                yield last
            if "allow_pickle" in given and not is_false(given["allow_pickle"]):
                yield f"{last}(allow_pickle)"
            if is_false(given.get("weights_only")):
                yield f"{last}(weights_only)"


def is_true(node: Any) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def is_false(node: Any) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_no_module_reads_a_pickle_but_those_that_say_why() -> None:
    found = {
        f"{path.relative_to(ROOT).as_posix()}: {name}"
        for path in ROOT.rglob("*.py")
        for name in reached(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set(ELSEWHERE)
    assert all(one.startswith(("lab/", "serving/ray_")) for one in found), "not in the runtime"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from ray import cloudpickle",
        "import torch.serialization, marshal",
        "state = torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "fetch(path, allow_pickle=allowed)",
        "read(path, weights_only=False)",
        "Model.from_pretrained(path)",
        "Model.from_pretrained(path, use_safetensors=None)",
        "eval(text)",
    ],
)
def test_what_reads_one_would_be_found(code: str) -> None:
    assert list(reached(ast.parse(code)))


class Alive:
    """Makes a folder when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.marker,)


@pytest.fixture(params=["pickle", "torch"])
def trap(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[bytes]:
    """A pickle, as Python and as torch write it; whoever reads it leaves a mark."""
    marker, file = tmp_path / "it ran", tmp_path / "trap"
    if request.param == "torch":
        torch.save(Alive(marker), file)
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            content = archive.read(name)
    else:
        content = pickle.dumps(Alive(marker))
    pickle.loads(content)  # noqa: S301 - it is a trap that works
    marker.rmdir()
    yield file.read_bytes() if request.param == "torch" else content
    assert not marker.exists()


def manifest(folder: Path, trap: bytes) -> Callable[[], Any]:
    (folder / "manifest.json").write_bytes(trap)
    return lambda: open_artifact(folder, trust_code=True)


def package(folder: Path, trap: bytes) -> Callable[[], Any]:
    path = folder / "package.pt2"
    path.write_bytes(trap)
    return lambda: LoadedPackage(path, device=torch.device("cpu"))


def trust_list(folder: Path, trap: bytes) -> Callable[[], Any]:
    home = folder.parent / "ddit-home"
    home.mkdir()
    (home / "trusted.json").write_bytes(trap)
    return lambda: is_trusted("0" * 64)


def adapter(name: str) -> Callable[[Path, bytes], Callable[[], Any]]:
    def put(folder: Path, trap: bytes) -> Callable[[], Any]:
        pipeline = tiny_pipeline()
        save_adapters(random_adapters(pipeline), folder, FluxFamily(), pipeline.transformer)
        (folder / "2p" / name).write_bytes(trap)
        return lambda: load_adapters(folder, FluxFamily(), pipeline.transformer)

    return put


def model(name: str) -> Callable[[Path, bytes], Callable[[], Any]]:
    """In place of the safetensors of a part of a pipeline, which are not there."""

    def put(folder: Path, trap: bytes) -> Callable[[], Any]:
        source = save_tiny(folder / "model", seed=0)
        (weights,) = (source / name).glob("*.safetensors")
        weights.unlink()
        (source / name / weights.name.replace("model.safetensors", "model.bin")).write_bytes(trap)
        (source / name / "pytorch_model.bin").write_bytes(trap)
        return lambda: load_pipeline(str(source))

    return put


def upload(folder: Path, trap: bytes) -> Callable[[], Any]:
    del folder
    uploads = pytest.importorskip("ddit_rt.serving.uploads", exc_type=ImportError)
    return lambda: uploads.read_picture(trap, "image", 10**6)


@pytest.mark.parametrize(
    "put",
    [
        *(manifest, package, trust_list, upload),
        *(adapter("patch_adapter.safetensors"), adapter("adapter_model.safetensors")),
        *(model("transformer"), model("text_encoder")),
    ],
)
def test_a_pickle_in_the_place_of_a_file_is_refused(
    put: Callable[[Path, bytes], Callable[[], Any]], tmp_path: Path, trap: bytes
) -> None:
    folder = tmp_path / "place"
    folder.mkdir()
    read = put(folder, trap)
    refusals: tuple[type[Exception], ...] = (DditError, ValueError, OSError)
    if put is upload:
        from ddit_rt.serving.errors import ApiError

        refusals = (ApiError,)
    with pytest.raises(refusals):
        read()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("ink.safetensors", {}),
        ("ink.bin", {}),
        ("ink.bin", {"weight_name": "ink.bin"}),
        ("pytorch_lora_weights.bin", {"folder": True}),
        ("pytorch_lora_weights.bin", {"folder": True, "use_safetensors": False}),
        ("ink.pt", {"folder": True, "weight_name": "ink.pt"}),
    ],
)
def test_a_lora_that_is_a_pickle_is_refused(
    name: str, more: dict[str, Any], tmp_path: Path, trap: bytes
) -> None:
    folder = tmp_path / "styles"
    folder.mkdir()
    (folder / name).write_bytes(trap)
    pipeline = speaking_pipeline()
    engine, before = eager(pipeline), everything(pipeline)
    arguments = {key: value for key, value in more.items() if key != "folder"}
    place = folder if more.get("folder") else folder / name
    with pytest.raises((ValueError, OSError), match=r"pickle|safetensors"):
        engine.load_lora(str(place), **arguments)
    check_unchanged(pipeline, before)


def test_a_harmless_pickle_is_refused_with_what_to_do(tmp_path: Path) -> None:
    pipeline = speaking_pipeline()
    torch.save({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "ink.bin")
    with pytest.raises(ValueError, match=r"save_file\(torch\.load\(FILE, weights_only=True\)"):
        eager(pipeline).load_lora(str(tmp_path / "ink.bin"))
