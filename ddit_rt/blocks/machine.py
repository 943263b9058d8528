"""What a compile needs of the machine: looked at before the minute that tracing takes.

Torch compiles with the C++ compiler, into folders of its own. Blocks on CUDA also need the header
`cuda.h` and a `libcuda.so` to link with. Torch looks for them in the CUDA toolkit that it finds
(`CUDA_HOME`, else that of `nvcc`, else `/usr/local/cuda`), and adds the toolkit's own stub of the
driver only where `CUDA_HOME` is set. So what it would miss is looked for in the other usual places,
and handed to the compiler for the time of the compile:

- `cuda.h`: `CUDA_HOME`, `CUDA_PATH`, `/usr/local/cuda`;
- `libcuda.so`: the stubs of these toolkits, else the installed driver, which has it under the name
  `libcuda.so.1` alone. Whichever it is linked with, a package runs with the driver of the machine.

A compiler that has the C++ library for static linking only would make packages with a copy of it
inside, which crash beside torch's as soon as they are loaded. There the library that this process
runs with is put before it.

Torch tries what the compiler makes of every instruction set that the processor has, program by
program where its cache is empty. Blocks on CUDA leave no loop to the host, and need none of it;
for those on a CPU the longer half is left out where torch itself runs with these instructions.
"""

from __future__ import annotations

import locale
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ddit_rt.errors import CompileError
from ddit_rt.folder import no_place_for_code

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
_UNPACKS_IN_TMPDIR = (2, 13)
"""From this torch on, packages are unpacked in TMPDIR; 2.11 takes /tmp whatever TMPDIR says."""
_TMP = "/tmp"  # noqa: S108 - torch's own choice

_TOOLKIT = Path("/usr/local/cuda")
_STUBS = ("lib64/stubs", "lib/stubs", "targets/*/lib/stubs")
_LDCONFIG = "/sbin/ldconfig"
_CPP_LIBRARY = "libstdc++.so.6"

_CODE_ROOM = 32 * 2**20
"""Bytes that a compile may take; a few MiB in fact."""


@contextmanager
def compiler_ready(device_type: str) -> Iterator[dict[str, Any]]:
    """Holds while a block is compiled; gives the options of Inductor that this compiler needs.

    Args:
        device_type: `cpu` or `cuda`.

    Raises:
        CompileError: Something is missing; the message names the setting that helps.
    """
    _check_encoding()
    _check_folders()
    compiler = _cpp_compiler()
    with tempfile.TemporaryDirectory(prefix="ddit_rt-") as name:
        scratch = Path(name)
        options = {}
        if not _shares_cpp_library(compiler, scratch):
            compiler = _sharing_compiler(compiler, scratch)
            options["cpp.cxx"] = (compiler,)
        added = _cuda_paths(compiler, scratch) if device_type == "cuda" else {}
        with _environment(added), _instruction_sets(device_type) as chosen:
            yield {**options, **chosen}


@contextmanager
def _instruction_sets(device_type: str) -> Iterator[dict[str, Any]]:
    """Says which instruction sets of the processor need no trial."""
    from torch._inductor import config, cpu_vec_isa

    if config.cpp.vec_isa_ok is not None:
        yield {}  # The user has said it.
    elif device_type != "cuda":
        runs = torch.backends.cpu.get_cpu_capability()
        best = "AVX512" if torch.cpu._is_avx512_supported() else "AVX2"  # noqa: SLF001
        yield {"cpp.vec_isa_ok": True} if runs == best else {}
    else:
        try:
            yield {"cpp.vec_isa_ok": False}
        finally:
            # Torch remembers the answer, which a CPU's blocks are not to be compiled with.
            kinds = {type(one).__bool__ for one in cpu_vec_isa.supported_vec_isa_list}
            for remembers in (cpu_vec_isa.valid_vec_isa_list, *kinds):
                getattr(remembers, "cache_clear", int)()


def _shares_cpp_library(compiler: str, scratch: Path) -> bool:
    """Whether what it links asks for the C++ library of the system, and has no copy inside."""
    source, linked = scratch / "text.cpp", scratch / "linked.so"
    source.write_text(
        "#include <string>\nstd::string text(int value) { return std::to_string(value); }\n",
        encoding="utf-8",
    )
    # A file, not `-xc++ -`: that would read a library among the arguments as C++, too.
    if not _runs([compiler, "-shared", "-fPIC", str(source), "-o", str(linked)], b""):
        return True  # What is wrong with it, torch will say.
    code = linked.read_bytes()
    return any(library in code for library in (_CPP_LIBRARY.encode(), b"libc++"))


def _sharing_compiler(compiler: str, scratch: Path) -> str:
    """The same compiler, with the C++ library of this process before its own."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    lines = (line.split(maxsplit=5) for line in maps.splitlines())
    used = {words[5] for words in lines if len(words) > 5 and _CPP_LIBRARY in words[5]}
    script = scratch / "c++"
    script.write_text(
        "#!/bin/sh\n"
        f'case " $* " in *" -shared "*) set -- "$@" -Wl,--no-as-needed {shlex.join(used)};; esac\n'
        f'exec {shlex.quote(compiler)} "$@"\n',
        encoding="utf-8",
        errors="surrogateescape",
    )
    script.chmod(0o700)
    linked = scratch / "linked.so"
    linked.unlink(missing_ok=True)
    if not _shares_cpp_library(str(script), scratch) or not linked.exists():
        raise CompileError(
            f"{compiler} links the C++ library statically, and a package with a copy of it crashes "
            "when it is loaded: point the environment variable CXX at another compiler"
        )
    return str(script)


def _check_encoding() -> None:
    """Torch reads sources of its own, some with such signs, in the encoding of the locale."""
    encoding = locale.getpreferredencoding(False)
    try:
        "\u2013\u2264\u00e9".encode().decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise CompileError(
            f"torch cannot read its own sources in the encoding of this locale, {encoding}: set "
            "PYTHONUTF8=1, or LC_ALL=C.UTF-8"
        ) from error


def _cpp_compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return str(get_cpp_compiler())
    except InvalidCxxCompiler as error:
        raise CompileError(
            f"{str(error).strip().splitlines()[0]}: install g++ (e.g. apt-get install g++), or "
            "point the environment variable CXX at a compiler"
        ) from error


def _check_folders() -> None:
    """Refuses folders that torch could not use, for what it compiles and for what it loads."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        folder = Path(cache_dir())
    except (KeyError, OSError) as error:
        # Older versions of torch want the name of the user, for the name of the folder.
        raise CompileError(
            f"torch has no folder for what it compiles ({error}): set TORCHINDUCTOR_CACHE_DIR to a "
            "folder that you can write, and USER to any name if this user has none"
        ) from error
    if problem := no_place_for_code(folder, _CODE_ROOM):
        raise CompileError(
            f"torch compiles in {folder}, {problem}: set TORCHINDUCTOR_CACHE_DIR to another folder"
        )
    folder, remedy = unpack_folder()
    if problem := no_place_for_code(folder, _CODE_ROOM):
        raise CompileError(f"torch loads what it compiled from {folder}, {problem}: {remedy}")


def unpack_folder() -> tuple[Path, str]:
    """Where torch unpacks a package to load its code, and what to do if it cannot."""
    if TORCH >= _UNPACKS_IN_TMPDIR:
        return Path(os.environ.get("TMPDIR") or _TMP), "set TMPDIR to another folder"
    return Path(_TMP), (
        f"PyTorch {torch.__version__} unpacks nowhere else, so make room there, or use PyTorch "
        "2.13 or newer and set TMPDIR"
    )


def _cuda_paths(compiler: str, scratch: Path) -> dict[str, Path]:
    """Folders that the compiler needs beside those that torch names, by environment variable."""
    headers, libraries = _torch_folders()
    added: dict[str, Path] = {}
    if not _finds_header(compiler, headers):
        found = (kit / "include" for kit in _toolkits())
        header = next((path for path in found if _finds_header(compiler, [*headers, path])), None)
        if header is None:
            raise CompileError(
                f"cuda.h is neither in {_listed(headers)}, where torch looks for it, nor in a "
                "toolkit known here: install one, or export CUDA_HOME=/usr/local/cuda (or wherever "
                "yours is) before Python starts"
            )
        added["CPATH"] = header
    if not _links(compiler, libraries, scratch):
        folders = _driver_folders(scratch)
        library = next((path for path in folders if _links(compiler, [path], scratch)), None)
        if library is None:
            raise CompileError(
                "the linker finds no libcuda.so (-lcuda), with which blocks on CUDA are linked: "
                "export LIBRARY_PATH=$CUDA_HOME/lib64/stubs, or another folder with a libcuda.so"
            )
        added["LIBRARY_PATH"] = library
    return added


def _torch_folders() -> tuple[list[str], list[str]]:
    """Where torch lets the compiler look for headers and for libraries."""
    from torch._inductor.cpp_builder import get_cpp_torch_device_options

    try:
        _, headers, _, _, libraries, _, _ = get_cpp_torch_device_options("cuda", aot_mode=True)
    except OSError as error:
        raise CompileError(
            f"torch finds no CUDA toolkit ({error}): install one, or export "
            "CUDA_HOME=/usr/local/cuda (or wherever yours is) before Python starts"
        ) from error
    return headers, libraries


def _toolkits() -> list[Path]:
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    return [*(Path(name) for name in named if name), _TOOLKIT]


def _driver_folders(scratch: Path) -> Iterator[Path]:
    """Where a `libcuda.so` may be; of the driver, one is made in `scratch`."""
    for kit in _toolkits():
        for pattern in _STUBS:
            yield from kit.glob(pattern)
    for library in _known_to_loader("libcuda.so.1"):
        link = scratch / "libcuda.so"
        link.unlink(missing_ok=True)
        link.symlink_to(library)
        yield scratch


def _known_to_loader(name: str) -> list[str]:
    """Paths of a library that programs are started with."""
    ldconfig = shutil.which("ldconfig") or _LDCONFIG
    try:
        listed = subprocess.run([ldconfig, "-p"], capture_output=True, check=True).stdout  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return []
    lines = (line.split() for line in os.fsdecode(listed).splitlines())
    return [words[-1] for words in lines if words and words[0] == name]


def _finds_header(compiler: str, folders: Iterable[str | Path]) -> bool:
    return _runs(
        [compiler, "-fsyntax-only", "-xc++", "-", *(f"-I{folder}" for folder in folders)],
        b"#include <cuda.h>\n",
    )


def _links(compiler: str, folders: Iterable[str | Path], scratch: Path) -> bool:
    target = ["-shared", "-fPIC", "-xc++", "-", "-o", str(scratch / "linked.so")]
    return _runs([compiler, *target, *(f"-L{folder}" for folder in folders), "-lcuda"], b"")


def _runs(command: list[str], source: bytes) -> bool:
    # The compiler and its arguments are torch's own, or folders named by the user.
    return not subprocess.run(command, input=source, capture_output=True, check=False).returncode  # noqa: S603


def _listed(folders: Iterable[str]) -> str:
    return ", ".join(folder for folder in folders if "torch" not in Path(folder).parts)


@contextmanager
def _environment(folders: dict[str, Path]) -> Iterator[None]:
    """Puts folders before those of the process's search paths."""
    before = {name: os.environ.get(name) for name in folders}
    try:
        for name, folder in folders.items():
            os.environ[name] = os.pathsep.join(filter(None, (str(folder), before[name])))
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
