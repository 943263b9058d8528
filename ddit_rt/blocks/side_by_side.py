"""Packages compiled side by side: one in this process, others in processes of their own.

A block is traced in this process, from the user's model. What is left, lowering and compiling,
takes far longer, and torch does it for one program at a time in a process. So further programs are
handed over in folders, without the weights, which no package holds, to processes that have imported
torch meanwhile.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ddit_rt.blocks.inductor import compile_program, torch_as_tested
from ddit_rt.blocks.machine import compiler_ready
from ddit_rt.blocks.package import PackageInfo, record_attention
from ddit_rt.errors import CompileError
from ddit_rt.notices import warn

if TYPE_CHECKING:
    from typing_extensions import Self

LOG = logging.getLogger("ddit_rt.blocks")

_PROGRAM, _INFO, _LAYOUTS = "program.pt2", "info.json", "layouts.json"
_SAID = "output.txt"
_REGISTERING = ("torchao",)
"""Packages whose ops blocks may call, by the namespace of these; ours come with this one."""
_MOST = 3
"""Processes beside this one: each holds torch and a program."""
_SHOWN = 2000
"""Characters of what a process that failed had printed."""
_COMMAND = "from ddit_rt.blocks.side_by_side import work; work()"

Program = tuple[ExportedProgram, PackageInfo, Path]
"""A traced block, what its package is to say of itself, and the `.pt2` file to write."""


def compile_package(program: ExportedProgram, info: PackageInfo, package: Path) -> PackageInfo:
    """Compiles a traced block, in this process, into a file that appears only when complete.

    Returns:
        `info` with the attention that the package really calls.

    Raises:
        CompileError: It cannot be compiled, or the machine lacks what that needs.
    """
    started = time.perf_counter()
    with (
        failures_of(info.block),
        torch_as_tested(),
        compiler_ready(info.device) as options,
        _replacing(package) as temporary,
    ):
        made = compile_program(program, info, temporary, options)
    LOG.info("%s: compiled in %.1f s", package.parent.name, time.perf_counter() - started)
    return made


def spare_processes() -> int:
    """How many processes may compile beside this one: one for each further CPU, up to three.

    None where code has changed Inductor's settings, of which another process would not know, or
    where Python runs inside another program.
    """
    from torch._inductor import config

    if "python" not in Path(sys.executable or "").name or config.codegen_config():
        return 0
    known = hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return min(cpus - 1, _MOST)


class SideBySide:
    """Compiles programs while further ones are traced; equal ones once.

    To be entered: processes end when it is left.

    Args:
        count: Programs that will be added, at most.
        done: Called with every package that is complete.
    """

    def __init__(self, count: int, done: Callable[[Path], None]) -> None:
        self._done, self._spare = done, spare_processes()
        self._known: dict[str, Path] = {}
        self._waiting: deque[Program] = deque()
        self._idle = [_Process() for _ in range(min(self._spare, count - 1))]
        self._busy: list[_Process] = []
        self._equal: list[tuple[Path, PackageInfo, Path]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self._idle, *self._busy):
            process.close()

    def add(self, program: ExportedProgram, info: PackageInfo, package: Path) -> None:
        """Begins with a program, or lets it wait for `finish`."""
        made = self._known.setdefault(_identity(program, info), package)
        if made != package:
            self._equal.append((made, info, package))
        else:
            self._waiting.append((program, info, package))
            self._hand_over()

    def finish(self) -> None:
        """Compiles what waits, and waits for the processes.

        Raises:
            CompileError: A program cannot be compiled.
        """
        while self._waiting:
            program, info, package = self._waiting.popleft()
            self._hand_over(keep=0)
            compile_package(program, info, package)
            self._done(package)
        for process in self._busy:
            process.finish()
            self._done(process.package)
        for made, info, package in self._equal:
            with _replacing(package) as temporary:
                shutil.copyfile(made, temporary)
                record_attention(temporary, info)
            LOG.info("%s: the program of %s", package.parent.name, made.parent.name)
            self._done(package)

    def _hand_over(self, keep: int = 1) -> None:
        """Gives programs away while there are CPUs for them; `keep` of them stay."""
        while len(self._waiting) > keep:
            if not self._idle:
                if sum(process.is_running() for process in self._busy) >= self._spare:
                    return
                self._idle.append(_Process())
            process = self._idle.pop()
            self._busy.append(process)
            program, info, package = self._waiting.pop()
            with failures_of(info.block):
                process.give(program, info, package)


class _Process:
    """A process that compiles the program that it will be given."""

    package: Path

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ddit_rt-")
        self._path = Path(self._folder.name)
        paths = os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path)
        with (self._path / _SAID).open("wb") as said:
            self._process = subprocess.Popen(  # noqa: S603 - this Python, on our own code
                [sys.executable, "-c", _COMMAND],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
            )

    def give(self, program: ExportedProgram, info: PackageInfo, package: Path) -> None:
        """Hands a program over, whose weights are lost."""
        self.package, self._block, self._since = package, info.block, time.perf_counter()
        _save(program, info, self._path)
        told = {"folder": str(self._path), "package": str(package), "needs": _needs(program)}
        order = json.dumps(told)
        assert self._process.stdin is not None, "it is a pipe"
        with suppress(BrokenPipeError), self._process.stdin as pipe:  # `finish` says why it ended
            pipe.write(order.encode())

    def is_running(self) -> bool:
        """Whether it uses a CPU."""
        return self._process.poll() is None

    def finish(self) -> None:
        """Waits for the package. If the process fails, it is compiled here: there is more room now.

        Raises:
            CompileError: It cannot be compiled here either.
        """
        code, name = self._process.wait(), self.package.parent.name
        if code == 0 and self.package.exists():
            LOG.info(
                "%s: compiled in %.1f s, beside others", name, time.perf_counter() - self._since
            )
            return
        said = (self._path / _SAID).read_text(encoding="utf-8", errors="replace").strip()
        warn(
            f"the process that was to compile {name} ended with {code}, and it is compiled anew in "
            f"this one, which takes longer; it said: {said[-_SHOWN:] or 'nothing'}"
        )
        with failures_of(self._block), torch_as_tested():
            program, info = _load(self._path)
        compile_package(program, info, self.package)

    def close(self) -> None:
        """Ends the process, if it still runs, and removes what was handed over."""
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._folder.cleanup()


def work() -> None:
    """What such a process does: it compiles what it is told of on its standard input."""
    order = sys.stdin.read()
    if not order:
        return
    told = json.loads(order)
    for name in told["needs"]:
        importlib.import_module(name)
    with torch_as_tested():
        program, info = _load(Path(told["folder"]))
    compile_package(program, info, Path(told["package"]))


def _needs(program: ExportedProgram) -> list[str]:
    """What a process has to import that is to read a program: it registers ops that are called."""
    targets = [node.target for node in program.graph.nodes]
    called = {one.namespace for one in targets if isinstance(one, torch._ops.OpOverload)}  # noqa: SLF001
    return [name for name in _REGISTERING if name in called]


def _save(program: ExportedProgram, info: PackageInfo, folder: Path) -> None:
    weights = program._state_dict  # noqa: SLF001 - `state_dict` may be a copy
    layouts = {name: (one.shape, one.stride()) for name, one in weights.items()}
    for name, one in weights.items():
        weights[name] = _as(one, one.new_zeros(1))
    with torch_as_tested():
        torch.export.save(program, folder / _PROGRAM)
    (folder / _LAYOUTS).write_text(json.dumps(layouts), encoding="utf-8")
    (folder / _INFO).write_text(info.to_json(), encoding="utf-8")


def _load(folder: Path) -> tuple[ExportedProgram, PackageInfo]:
    """The program, with weights of the same layout: their values are no part of a package."""
    program = torch.export.load(folder / _PROGRAM)
    layouts = json.loads((folder / _LAYOUTS).read_text(encoding="utf-8"))
    weights = program._state_dict  # noqa: SLF001
    for name, one in weights.items():
        empty = torch.empty_strided(*layouts[name], dtype=one.dtype, device=one.device)
        weights[name] = _as(one, empty)
    return program, PackageInfo.from_json((folder / _INFO).read_text(encoding="utf-8"))


def _as(one: Tensor, other: Tensor) -> Tensor:
    """A parameter where the first is one."""
    return nn.Parameter(other, requires_grad=False) if isinstance(one, nn.Parameter) else other


def _identity(program: ExportedProgram, info: PackageInfo) -> str:
    """All that a package hangs on but for its name: it holds no weights."""
    return f"{program}\n{replace(info, block='').to_json()}"


@contextmanager
def failures_of(block: str) -> Iterator[None]:
    """Whatever fails is a `CompileError` that says of which block."""
    try:
        yield
    except CompileError:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise CompileError(f"{block} cannot be compiled ahead of time: {reason}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` on success and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.pt2")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
