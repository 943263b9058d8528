"""Builds `emulated_runtime`: the step loop of `ddit_rt._runtime` without a GPU.

The shipped sources of `csrc/runtime`, linked against a mock CUDA runtime, and the shipped kernels
under a block emulator; see `native/`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "tests" / "native"
NAME = "emulated_runtime"
LIBRARY = f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"

UNITS = {  # what is compiled at once, as headers take longest; the longest comes first
    "bindings": [ROOT / "csrc" / "runtime" / "bind_step.cpp", NATIVE / "mock_module.cpp"],
    "mock": [NATIVE / f"mock_{part}.cpp" for part in ("cudart", "cudart_graph", "graph", "queue")],
    "runtime": [ROOT / "csrc" / "runtime" / f"step_{part}.cpp" for part in ("control", "graph")],
    "kernels": [NATIVE / "step_kernels.cpp"],
}

FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-unknown-pragmas"]

_NEEDED = 12080  # SWITCH nodes


def _toolkits() -> Iterator[Path]:
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        yield Path(nvcc).resolve().parents[1]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    yield from sorted(Path("/usr/local").glob("cuda*"), reverse=True)


def _version(header: Path) -> int:
    match = re.search(r"#define CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
    return int(match[1]) if match else 0


def cuda_headers() -> Path | None:
    """The include folder of a CUDA toolkit that knows SWITCH nodes, if there is one."""
    for toolkit in _toolkits():
        header = toolkit / "include" / "cuda_runtime_api.h"
        if header.exists() and _version(header) >= _NEEDED:
            return header.parent
    return None


def _compile(unit: str, folder: Path, headers: Path) -> Path:
    import pybind11

    source, target = folder / f"{unit}.cpp", folder / f"{unit}.o"
    source.write_text("".join(f'#include "{part}"\n' for part in UNITS[unit]))
    includes = [f"-I{path}" for path in (ROOT / "csrc", ROOT / "csrc" / "include", NATIVE)]
    for path in (headers, pybind11.get_include(), sysconfig.get_path("include")):
        includes += ["-isystem", str(path)]
    # Only the kernels have to run fast.
    optimisation = "-O1" if unit == "kernels" else "-O0"
    command = [_compiler(), *FLAGS, optimisation, *includes, "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def _compiler() -> str:
    return os.environ.get("CXX") or "c++"


def build(folder: Path, headers: Path) -> None:
    """Compiles the module into a new folder: ten seconds on two cores."""
    folder.mkdir()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda unit: _compile(unit, folder, headers), UNITS))
    command = [_compiler(), "-shared", *map(str, objects), "-o", str(folder / LIBRARY)]
    subprocess.run(command, check=True)


def load(folder: Path) -> ModuleType:
    """Imports the module from the folder that it was built into."""
    spec = importlib.util.spec_from_file_location(NAME, folder / LIBRARY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
