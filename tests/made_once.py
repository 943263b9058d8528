"""What takes long to compile is compiled once for all workers of a test run."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.export import ExportedProgram

import ddit_rt.blocks.inductor as inductor
import ddit_rt.blocks.side_by_side as side_by_side
from ddit_rt.blocks import PackageInfo, read_info

Packages = Callable[[], AbstractContextManager[None]]


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run see, and all runs on one tree where it has a name."""
    if named := os.environ.get("DDIT_RT_TEST_CACHE"):
        return Path(named)
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(path: Path, make: Callable[[Path], Any]) -> Path:
    """Calls `make(temporary)` unless another worker has made `path`, or waits until it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            temporary = path.with_name(f"{path.name}.unfinished")
            make(temporary)
            temporary.rename(path)
    return path


def compile_for_tests(patch: pytest.MonkeyPatch) -> None:
    """Makes compiling as cheap as it can be where hundreds of packages are made and none is timed.

    Headers are parsed once, and what calls a package's kernels is not optimised; the kernels are,
    so that packages compute the same bits. All in this process, where it is patched.
    """
    patch.setattr(side_by_side, "spare_processes", lambda: 0)
    cheap = {"aot_inductor.precompile_headers": True}
    cheap |= {"aot_inductor.compile_wrapper_opt_level": "O0"}
    patch.setattr(inductor, "_WHERE_KNOWN", {**inductor._WHERE_KNOWN, **cheap})


@contextmanager
def packages_made_once(folder: Path) -> Iterator[None]:
    """Within, a program whose package is in the folder is not compiled again.

    Blocks are exported each time. A package holds no weights, so equal programs with equal metadata
    are equal packages.
    """
    compile_program = side_by_side.compile_program

    def compile_or_copy(
        program: ExportedProgram, info: PackageInfo, target: Path, options: Mapping[str, Any]
    ) -> PackageInfo:
        text = f"{program}\n{info.to_json()}"
        package = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.pt2"

        def make(temporary: Path) -> None:
            own = temporary.with_suffix(".pt2")
            compile_program(program, info, own, options)
            own.rename(temporary)

        shutil.copyfile(made_once(package, make), target)
        return read_info(target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_by_side, "compile_program", compile_or_copy)
        yield
