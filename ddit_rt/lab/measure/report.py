"""Records: what each says of where it was made, and how it is written."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddit_rt.version import __version__


def machine() -> dict[str, Any]:
    """This machine, as far as it explains a timing."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that ran."""
    import diffusers
    import torch

    return {
        "ddit_rt": __version__,
        "torch": str(torch.__version__),
        "diffusers": str(diffusers.__version__),
        "python": platform.python_version(),
    }


def model_entry(name: str, transformer: Any) -> dict[str, Any]:
    """The entry `model` of a record."""
    return {
        "name": name,
        "transformer_class": type(transformer).__name__,
        "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
        "dtype": str(transformer.dtype).removeprefix("torch."),
    }


def device_name(device: Any) -> str:
    """Name of a GPU, or the kind of another device."""
    import torch

    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else str(device)


def write_json(path: Path, data: Any) -> None:
    """Writes strict JSON, whole or not at all.

    Raises:
        ValueError: A number that is not finite.
    """
    write_whole(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_bytes(data)
    partial.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON lines file; one that a stop cut off is left out."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends to a JSON lines file, whole lines even after a stop that cut one off."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    cut_off = path.is_file() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + text if cut_off else text)
        file.flush()
        os.fsync(file.fileno())


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()
