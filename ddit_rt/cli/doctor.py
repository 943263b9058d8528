"""`ddit-rt doctor`: what of this machine and its libraries works, what does not, and what helps."""

from __future__ import annotations

import argparse
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata

from ddit_rt.cli.command import Command, ExitCode, Outcome
from ddit_rt.errors import ArtifactError, CompileError

WORKS, ABSENT, BROKEN = "works", "absent", "broken"
"""Absent is what this machine or installation does not have; broken, what it has and cannot use."""

_GRAPHS_DRIVER = 12080
_NAME = re.compile(r"^[\w.-]+")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([\w-]+)['"]""")
_FOR_DEVELOPERS = ("bench", "browser", "dev", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        state: `works`, `absent` or `broken`.
        text: What was found, and what to do where it does not work.
    """

    name: str
    state: str
    text: str


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # It takes nothing but what all commands take.


def _run(args: argparse.Namespace) -> Outcome:
    del args
    found = list(findings())
    broken = [one.name for one in found if one.state == BROKEN]
    width = max(len(one.name) for one in found)
    lines = [f"{one.name:{width}}  {one.state:6}  {one.text}" for one in found]
    verdict = f"broken: {', '.join(broken)}" if broken else "all that is here works"
    data = {"works": not broken, "findings": [asdict(one) for one in found]}
    code = ExitCode.INTERNAL if broken else ExitCode.OK
    return Outcome(data=data, text="\n".join([*lines, "", verdict]), code=code)


def findings() -> Iterator[Finding]:
    """Looks at everything; nothing is compiled but an empty file, and nothing is kept."""
    yield _versions()
    yield _attempt("native ops", _native_ops)
    yield _attempt("compile on CPU", lambda: _compiler("cpu"))
    yield _attempt("trusted artifacts", _trusted)
    yield _attempt("GPU", _gpu)
    yield _attempt("compile on CUDA", _compile_on_cuda)
    yield _attempt("image in one launch", _graphs)
    yield from _extras()


class _AbsentError(Exception):
    """What is looked at is not there, which is no fault."""


def _attempt(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name=name, state=WORKS, text=look())
    except _AbsentError as reason:
        return Finding(name=name, state=ABSENT, text=str(reason))
    except (ArtifactError, CompileError, ImportError, OSError, RuntimeError) as error:
        return Finding(name=name, state=BROKEN, text=" ".join(str(error).split()))


def _versions() -> Finding:
    """The packages that the runtime needs, against the versions that it was made for."""
    from packaging.requirements import Requirement

    found, old = [f"Python {platform.python_version()}"], []
    for line in _required():
        wanted = Requirement(line)
        here = metadata.version(wanted.name)
        found.append(f"{wanted.name} {here}")
        if not wanted.specifier.contains(here, prereleases=True):
            old.append(f"{wanted.name} {here} is not {wanted.specifier}")
    if old:
        text = f"{'; '.join(old)}: pip install --upgrade {' '.join(one.split()[0] for one in old)}"
        return Finding(name="versions", state=BROKEN, text=text)
    ours = f"ddit_rt {metadata.version('ddit_rt')}"
    return Finding(name="versions", state=WORKS, text=", ".join([ours, *found]))


def _required() -> list[str]:
    return [line for line in metadata.requires("ddit_rt") or [] if "extra ==" not in line]


def _native_ops() -> str:
    import ddit_rt.ops  # noqa: F401 - loads them
    from ddit_rt import _runtime

    info = _runtime.build_info()
    kernels = f"CUDA {info['cuda_version']}" if info["cuda"] else "no CUDA kernels"
    return f"built by {info['compiler']}, {kernels}"


def _compiler(device_type: str) -> str:
    from ddit_rt.blocks.machine import compiler_ready

    with compiler_ready(device_type):
        from torch._inductor.cpp_builder import get_cpp_compiler

        return f"with {get_cpp_compiler()}"


def _trusted() -> str:
    from ddit_rt.artifact.trust import require_trust_list

    return f"their list is {require_trust_list()}"


def _gpu() -> str:
    import torch

    if torch.version.cuda is None:
        raise _AbsentError(
            f"torch {torch.__version__} is a build without CUDA; on a machine with a GPU install "
            "one with it"
        )
    if not torch.cuda.is_available():
        raise _AbsentError("torch finds no GPU, or no driver for one")
    names = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        gib = card.total_memory / 2**30
        names.append(f"{card.name}, {gib:.0f} GiB, compute capability {card.major}.{card.minor}")
    return "; ".join(names)


def _compile_on_cuda() -> str:
    _gpu()
    return _compiler("cuda")


def _graphs() -> str:
    """Whether the driver has the conditional nodes that the device's own loop is made of."""
    from ddit_rt import _runtime

    _gpu()
    if not _runtime.build_info()["cuda"]:
        raise ImportError(
            "this build of ddit_rt has no CUDA kernels; install it again where nvcc is found"
        )
    status = _runtime.cuda_status()
    if not status["available"]:
        raise RuntimeError(f"CUDA cannot be used: {status['reason']}")
    driver = status["driver_version"]
    if driver < _GRAPHS_DRIVER:
        raise _AbsentError(
            f"the driver is of CUDA {_version(driver)}; conditional graph nodes need "
            f"{_version(_GRAPHS_DRIVER)}: until it is updated, the host launches each step"
        )
    return f"driver of CUDA {_version(driver)}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _extras() -> Iterator[Finding]:
    """The optional parts: there if all that they need is."""
    for extra, packages in _needed_by_extras().items():
        missing = [name for name in packages if not _installed(name)]
        if missing:
            text = f"pip install 'ddit_rt[{extra}]' brings {', '.join(missing)}"
            yield Finding(name=f"extra {extra}", state=ABSENT, text=text)
        else:
            yield Finding(name=f"extra {extra}", state=WORKS, text=", ".join(packages))


def _needed_by_extras() -> dict[str, list[str]]:
    direct: dict[str, list[str]] = {}
    for line in metadata.requires("ddit_rt") or []:
        extra, name = _EXTRA.search(line), _NAME.match(line)
        if extra and name and extra[1] not in _FOR_DEVELOPERS and name[0] != "ddit_rt":
            direct.setdefault(extra[1], []).append(name[0])
    return direct


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


DOCTOR = Command(
    name="doctor",
    summary="Look at this machine: what works, what does not, and what helps.",
    examples=("ddit-rt doctor", "ddit-rt doctor --json  # for a report of a fault"),
    add_arguments=_add_arguments,
    run=_run,
)
