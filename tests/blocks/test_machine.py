"""With the real compiler and linker, on folders made up like a toolkit's and a driver's."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from torch._inductor import config, cpu_vec_isa

from ddit_rt.blocks import machine
from ddit_rt.blocks.machine import compiler_ready, unpack_folder
from ddit_rt.errors import CompileError
from ddit_rt.folder import no_place_for_code

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No toolkit, no driver, nothing in the compiler's own search paths."""
    for name in ("CPATH", "LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "_torch_folders", lambda: ([], []))
    monkeypatch.setattr(machine, "_TOOLKIT", tmp_path / "no-toolkit")
    monkeypatch.setattr(machine, "_known_to_loader", lambda _: [])


def driver(path: Path) -> Path:
    """A library that links as the driver does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = "-Wl,-soname,libcuda.so.1"
    subprocess.run(["g++", "-shared", "-fPIC", "-xc++", "/dev/null", "-o", path, name], check=True)
    return path


def toolkit(root: Path, stubs: str = "lib64/stubs") -> Path:
    """A toolkit with the header and the stub."""
    (root / "include").mkdir(parents=True)
    (root / "include" / "cuda.h").write_text("#pragma once\n", encoding="utf-8")
    driver(root / stubs / "libcuda.so")
    return root


def paths() -> tuple[str | None, str | None]:
    """What the compiler is given, while a block is compiled."""
    with compiler_ready("cuda"):
        return os.environ.get("CPATH"), os.environ.get("LIBRARY_PATH")


def test_cpu_needs_no_toolkit() -> None:
    with compiler_ready("cpu"):
        assert "CPATH" not in os.environ


def test_nothing_is_added_where_torch_finds_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kit = toolkit(tmp_path / "cuda")
    found = ([str(kit / "include")], [str(kit / "lib64" / "stubs")])
    monkeypatch.setattr(machine, "_torch_folders", lambda: found)
    assert paths() == (None, None)


@pytest.mark.parametrize("stubs", ["lib64/stubs", "lib/stubs", "targets/sbsa-linux/lib/stubs"])
def test_toolkit_in_its_usual_place_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stubs: str
) -> None:
    kit = toolkit(tmp_path / "cuda", stubs)
    monkeypatch.setattr(machine, "_TOOLKIT", kit)
    assert paths() == (str(kit / "include"), str(kit / stubs))
    assert "CPATH" not in os.environ
    assert "LIBRARY_PATH" not in os.environ


def test_toolkit_of_the_environment_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "_TOOLKIT", toolkit(tmp_path / "other"))
    kit = toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(kit))
    monkeypatch.setenv("LIBRARY_PATH", "/own")
    assert paths() == (str(kit / "include"), f"{kit / 'lib64' / 'stubs'}:/own")
    assert os.environ["LIBRARY_PATH"] == "/own"


def test_driver_alone_is_linked_under_its_own_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kit = toolkit(tmp_path / "cuda")
    (kit / "lib64" / "stubs" / "libcuda.so").unlink()
    monkeypatch.setattr(machine, "_TOOLKIT", kit)
    library = driver(tmp_path / "driver" / "libcuda.so.1")
    monkeypatch.setattr(machine, "_known_to_loader", lambda _: [str(library)])
    with compiler_ready("cuda"):
        folder = Path(os.environ["LIBRARY_PATH"])
        assert (folder / "libcuda.so").resolve() == library
    assert not folder.exists()


def test_missing_header_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_torch_folders", lambda: (["/usr/local/include"], []))
    with (
        pytest.raises(CompileError, match=r"cuda\.h is neither in /usr/local/include.*CUDA_HOME="),
        compiler_ready("cuda"),
    ):
        pass


def test_missing_driver_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = toolkit(tmp_path / "cuda")
    shutil.rmtree(kit / "lib64")
    monkeypatch.setenv("CUDA_HOME", str(kit))
    with (
        pytest.raises(CompileError, match=r"-lcuda.*export LIBRARY_PATH=\$CUDA_HOME/lib64/stubs"),
        compiler_ready("cuda"),
    ):
        pass


def test_torch_without_a_toolkit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def none(*_: object, **__: object) -> None:
        raise OSError("CUDA_HOME environment variable is not set.")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_torch_device_options", none)
    with pytest.raises(CompileError, match="no CUDA toolkit.*export CUDA_HOME"):
        machine._torch_folders()


def test_loader_knows_libc() -> None:
    """Of the real one; the fixture replaces it where it is asked for the driver."""
    found = ORIGINAL("libc.so.6")
    assert found
    assert all(Path(path).is_file() for path in found)


ORIGINAL = machine._known_to_loader


def test_folder_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    blocked = str(tmp_path / "file" / "folder")
    monkeypatch.setattr("torch._inductor.runtime.cache_dir_utils.cache_dir", lambda: blocked)
    said = "folder, which cannot be written.*set TORCHINDUCTOR_CACHE_DIR"
    with pytest.raises(CompileError, match=said), compiler_ready("cpu"):
        pass


@pytest.mark.parametrize(
    ("encoding", "fits"), [("ANSI_X3.4-1968", False), ("ISO-8859-9", True), ("UTF-8", True)]
)
def test_locale_in_which_torch_cannot_read_itself_is_named(
    monkeypatch: pytest.MonkeyPatch, encoding: str, fits: bool
) -> None:
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: encoding)
    expected = (
        contextlib.nullcontext() if fits else pytest.raises(CompileError, match="set PYTHONUTF8=1")
    )
    with expected, compiler_ready("cpu"):
        pass


@pytest.mark.parametrize("version", [(2, 11), (2, 13)])
def test_a_place_that_packages_cannot_be_loaded_from_is_refused_before_the_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: tuple[int, int]
) -> None:
    """Torch compiles below TMPDIR, but 2.11 unpacks in /tmp all the same."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(machine, "TORCH", version)
    folder, remedy = unpack_folder()
    assert (folder == tmp_path) == (version == (2, 13))
    monkeypatch.setattr(
        machine, "no_place_for_code", lambda asked, _: "noexec" if asked == folder else ""
    )
    said = re.escape(f"{folder}, noexec: {remedy}")
    with pytest.raises(CompileError, match=said), compiler_ready("cpu"):
        pass


def test_user_without_a_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As older versions of torch fail for the user of `docker run --user 12345`."""

    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("torch._inductor.runtime.cache_dir_utils.cache_dir", nameless)
    with pytest.raises(CompileError, match="USER to any name"), compiler_ready("cpu"):
        pass


@pytest.mark.parametrize(
    ("flag", "blocks", "said"),
    [
        (0, 10**6, ""),
        (os.ST_NOEXEC, 10**6, "mounted noexec"),
        (0, 100, "has 0 MiB of room for the 32 MiB"),
    ],
)
def test_place_for_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: int, blocks: int, said: str
) -> None:
    status = os.statvfs(tmp_path)
    values = list(status)
    values[1], values[4], values[8] = 4096, blocks, flag  # block size, free blocks, flags
    monkeypatch.setattr("os.statvfs", lambda _: os.statvfs_result(values))
    problem = no_place_for_code(tmp_path, 32 * 2**20)
    assert said in problem if said else not problem


def test_read_only_folder_is_no_place() -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o555)
        stack.callback(folder.chmod, 0o755)
        if os.geteuid() == 0:  # root may write anywhere, so for a moment it is nobody
            stack.callback(os.seteuid, 0)
            os.seteuid(65534)
        problem = no_place_for_code(folder, 1)
    assert "cannot be written (Permission denied)" in problem


def compiler(path: Path, *flags: str) -> str:
    """A g++ that links with flags of its own."""
    path.write_text(
        f'#!/bin/sh\ncase " $* " in *" -shared "*) set -- "$@" {" ".join(flags)};; esac\n'
        'exec g++ "$@"\n'
    )
    path.chmod(0o700)
    return str(path)


def test_cpp_library_is_linked_by_its_name_where_the_compiler_would_copy_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = compiler(tmp_path / "g++", "-static-libstdc++")
    monkeypatch.setattr(machine, "_cpp_compiler", lambda: static)
    source = tmp_path / "text.cpp"
    source.write_text("#include <string>\nstd::string text(int n) { return std::to_string(n); }\n")
    library = tmp_path / "text.so"
    build = ["-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run([static, *build], check=True)
    assert b"libstdc++.so.6" not in library.read_bytes()
    with compiler_ready("cpu") as options:
        (chosen,) = options["cpp.cxx"]
        subprocess.run([chosen, *build], check=True)
        assert b"libstdc++.so.6" in library.read_bytes()
        subprocess.run([chosen, "-c", str(source), "-o", str(tmp_path / "text.o")], check=True)


def test_compiler_that_copies_the_cpp_library_all_the_same_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = compiler(tmp_path / "g++", "-static-libstdc++")
    monkeypatch.setattr(machine, "_cpp_compiler", lambda: static)
    monkeypatch.setattr(machine, "_shares_cpp_library", lambda *_: False)
    with pytest.raises(CompileError, match="g\\+\\+ links the C\\+\\+ library statically.*CXX"):
        compiler_ready("cpu").__enter__()


def test_compiler_that_cannot_link_the_cpp_library_of_the_process_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = Path(compiler(tmp_path / "g++", "-static-libstdc++"))
    refusal = 'case "$*" in *libstdc++.so.6*) exit 1;; esac\n'
    static.write_text(static.read_text().replace("exec", f"{refusal}exec"))
    monkeypatch.setattr(machine, "_cpp_compiler", lambda: str(static))
    with pytest.raises(CompileError, match="g\\+\\+ links the C\\+\\+ library statically"):
        compiler_ready("cpu").__enter__()


def test_compiler_of_this_machine_needs_no_options() -> None:
    with compiler_ready("cpu") as options:
        assert "cpp.cxx" not in options


def test_what_is_not_tried_is_what_a_trial_finds() -> None:
    with compiler_ready("cpu") as options:
        tried = str(cpu_vec_isa.pick_vec_isa())
        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        with config.patch(options):
            assert str(cpu_vec_isa.pick_vec_isa()) == tried
    cpu_vec_isa.valid_vec_isa_list.cache_clear()


def test_blocks_on_cuda_try_no_instruction_set_and_leave_a_cpus_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "_TOOLKIT", toolkit(tmp_path / "cuda"))
    before = str(cpu_vec_isa.pick_vec_isa())
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    for kind in (cpu_vec_isa.VecAVX512, cpu_vec_isa.VecAVX512VNNI, cpu_vec_isa.VecAMX):
        kind.__bool__.cache_clear()
    with compiler_ready("cuda") as options, config.patch(options), monkeypatch.context() as patch:
        patch.setattr(cpu_vec_isa.VecISA, "check_build", lambda *_: pytest.fail("tried"))
        assert cpu_vec_isa.pick_vec_isa() is cpu_vec_isa.invalid_vec_isa
    assert str(cpu_vec_isa.pick_vec_isa()) == before
