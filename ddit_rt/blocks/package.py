"""One compiled block on disk: its path, and what it says about itself.

The layout is the Hugging Face Hub's for such packages, `{BlockName}[.variant]/package.pt2`. Each
package carries one metadata entry with all that a runner has to check: the inputs with their
types, the sizes it was compiled for, and the constants it expects. A package is a zip archive, and
is read here as one: nothing of it is executed.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

import torch

from ddit_rt.blocks.constants import ConstantSpec, FusedLayers
from ddit_rt.blocks.inputs import SYMBOLS, TokenRanges
from ddit_rt.errors import ArtifactError
from ddit_rt.models.base import BATCH, TensorSpec

METADATA_KEY = "ddit_rt"

_UNREADABLE = (
    *(OSError, EOFError, ValueError, RecursionError, RuntimeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What Python says of a damaged archive, an encrypted one, or text that is no JSON."""

_METADATA_SUFFIX = "_metadata.json"
_SOURCE_SUFFIXES = (".cpp", ".json")
_ATTENTION = re.compile(
    rb"(?:aoti_torch_[a-z]+_|aten::|aten\.)_scaled_dot_product_(\w+?)(?:\.default)?[(\"]"
    rb"|(ddit_rt)::attention\""
)


def package_path(block: str, variant: str | None = None) -> str:
    """Path of a package inside an artifact, `/`-separated.

    Args:
        block: Class name of the block.
        variant: What distinguishes it from the plain block, e.g. `lora32`.
    """
    return f"{block}.{variant}/package.pt2" if variant else f"{block}/package.pt2"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackageInfo:
    """What a compiled block expects from its caller.

    Attributes:
        block: Class name of the block.
        inputs: The block's flat inputs.
        input_dtypes: Data types of the inputs.
        device: Device type, `cpu` or `cuda`.
        ranges: Sizes that it was compiled for.
        constants: Shape and type of every constant, by canonical name.
        attention: The fused attention kernels that its code calls, such as `cudnn_attention` or
            `flash_attention_for_cpu` of torch, or `ddit_rt`, this project's; `math` where there are
            none. Empty: not recorded.
        fused: Layers of which it makes one product each.
    """

    block: str
    inputs: tuple[TensorSpec, ...]
    input_dtypes: tuple[torch.dtype, ...]
    device: str
    ranges: TokenRanges
    constants: Mapping[str, ConstantSpec]
    attention: tuple[str, ...] = ()
    fused: FusedLayers = ()

    def takes(self, inputs: Sequence[TensorSpec]) -> bool:
        """Whether a block type's inputs are these; data types count where it names them."""
        own = [(spec.name, spec.dims) for spec in self.inputs]
        return own == [(spec.name, spec.dims) for spec in inputs] and all(
            spec.dtype in (None, dtype)
            for spec, dtype in zip(inputs, self.input_dtypes, strict=True)
        )

    def to_json(self) -> str:
        """One line of JSON for the package's metadata."""
        inputs = [
            [spec.name, list(spec.dims), dtype_name(dtype)]
            for spec, dtype in zip(self.inputs, self.input_dtypes, strict=True)
        ]
        constants = {
            name: [list(spec.shape), dtype_name(spec.dtype)]
            for name, spec in self.constants.items()
        }
        ranges = {symbol: self.ranges.of(symbol) for symbol in SYMBOLS}
        return json.dumps(
            {
                "block": self.block,
                "inputs": inputs,
                "device": self.device,
                "ranges": ranges,
                "constants": constants,
                "attention": list(self.attention),
                "fused": self.fused,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> PackageInfo:
        """The inverse of `to_json`; raises `ArtifactError` on anything else."""
        try:
            raw: dict[str, Any] = json.loads(text)
            return cls(
                block=_text(raw["block"]),
                inputs=tuple(TensorSpec(name=n, dims=tuple(d)) for n, d, _ in raw["inputs"]),
                input_dtypes=tuple(parse_dtype(t) for _, _, t in raw["inputs"]),
                device=_text(raw["device"]),
                ranges=TokenRanges(**{key: tuple(b) for key, b in dict(raw["ranges"]).items()}),
                constants={
                    name: ConstantSpec(tuple(map(index, shape)), parse_dtype(dtype))
                    for name, (shape, dtype) in dict(raw["constants"]).items()
                },
                attention=tuple(map(_text, raw.get("attention", ()))),
                fused=tuple(tuple(map(_text, group)) for group in raw.get("fused", ()) if group),
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ArtifactError(
                f"unreadable package metadata ({error!r}): compile the block again"
            ) from error


def read_info(package: Path) -> PackageInfo:
    """What a package says about itself.

    Args:
        package: Path of a `.pt2` file.

    Raises:
        ArtifactError: The file is missing, damaged, or no package of this project.
    """
    if not package.is_file():
        raise ArtifactError(f"no package at {package}")
    try:
        with zipfile.ZipFile(package) as archive:
            _check_size(package, archive)
            names = [name for name in archive.namelist() if name.endswith(_METADATA_SUFFIX)]
            metadata = json.loads(archive.read(names[0])) if names else {}
    except ArtifactError:
        raise
    except _UNREADABLE as error:
        raise ArtifactError(f"{package} cannot be loaded ({error}): compile it again") from error
    if not isinstance(metadata, dict) or METADATA_KEY not in metadata:
        raise ArtifactError(
            f"{package} was not written by ddit_rt: it does not say what it expects"
        )
    return PackageInfo.from_json(metadata[METADATA_KEY])


def _check_size(package: Path, archive: zipfile.ZipFile) -> None:
    """Refuses what unpacks to more than it is: torch compresses nothing in a package."""
    size = package.stat().st_size
    if sum(entry.file_size for entry in archive.infolist()) > size:
        raise ArtifactError(
            f"{package} holds compressed files, as no package of ddit_rt does, and would unpack to "
            "more than it is: do not use it"
        )


def record_attention(package: Path, info: PackageInfo) -> PackageInfo:
    """Writes into a package which attention its code really calls, and returns the whole info.

    What is asked for when a block is compiled is a wish: torch chooses by shape, data type and
    device. So it is read off the generated source, which lies beside the compiled code.

    Args:
        package: A package that was just compiled; replaced.
        info: What the package says about itself so far.
    """
    with zipfile.ZipFile(package) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    sources = [text for name, text in contents.items() if name.endswith(_SOURCE_SUFFIXES)]
    matches = (match for text in sources for match in _ATTENTION.finditer(text))
    found = {match[match.lastindex or 0].decode() for match in matches}
    info = replace(info, attention=tuple(sorted(found)) or ("math",))
    with zipfile.ZipFile(package, "w") as archive:
        for name, content in contents.items():
            if name.endswith(_METADATA_SUFFIX):
                metadata = {**json.loads(content), METADATA_KEY: info.to_json()}
                archive.writestr(name, json.dumps(metadata))
            else:
                archive.writestr(name, content)
    return info


def input_dtypes(inputs: Sequence[TensorSpec], dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Data type of every input of a block.

    Args:
        inputs: The inputs.
        dtype: Type of the block's weights. It is that of every input that has a batch dimension;
            position encodings, which have none, are float32.
    """
    return tuple(spec.dtype or (dtype if BATCH in spec.dims else torch.float32) for spec in inputs)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {type(value).__name__}")
    return value


def parse_dtype(name: str) -> torch.dtype:
    """The inverse of `dtype_name`; raises `ValueError` for any other word."""
    dtype = getattr(torch, _text(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a torch data type")  # noqa: TRY004 (a value of a file)
    return dtype
