from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddit_rt import _runtime
from ddit_rt.ops import _library


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return result.stdout


def test_build_info_is_complete() -> None:
    info = _runtime.build_info()
    assert info["version"] == _runtime.__version__
    assert info["compiler"]
    assert bool(info["cuda_version"]) == info["cuda"]
    assert bool(info["cuda_architectures"]) == info["cuda"]


def test_cuda_status_says_why_there_is_no_cuda() -> None:
    status = _runtime.cuda_status()
    assert status["available"] == (status["device_count"] > 0)
    assert status["available"] == (not status["reason"])


def test_runtime_imports_without_devices_and_without_torch() -> None:
    code = (
        "import importlib.util, sys; from pathlib import Path\n"
        f"path = {_runtime.__file__!r}\n"
        "spec = importlib.util.spec_from_file_location('_runtime', path)\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.cuda_status()['available'], 'torch' in sys.modules)"
    )
    assert run_python(code, CUDA_VISIBLE_DEVICES="").split() == ["False", "False"]


def test_cuda_kernels_are_loaded_only_where_they_can_run() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert not _library.cuda_wanted()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("ddit_rt::pack", "CPU")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("ddit_rt::pack", "CUDA")


def test_missing_library_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"without CUDA.*setup\.sh"):
        _library._load_one(tmp_path / "_ops_cuda.so")
    broken = tmp_path / "_ops.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(ImportError, match="cannot be loaded by torch"):
        _library._load_one(broken)


@pytest.mark.skipif(not _runtime.build_info()["cuda"], reason="built without CUDA")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch itself has libtorch_cuda.so")
def test_cuda_library_links_and_registers_without_a_gpu(tmp_path: Path) -> None:
    source = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    stub = tmp_path / "libtorch_cuda.so"
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-xc++", "-", "-o", stub],
        input=source.encode(),
        check=True,
    )
    code = (
        "import ctypes, torch, ddit_rt.ops; from ddit_rt.ops import _library\n"
        f"ctypes.CDLL({str(stub)!r}, mode=ctypes.RTLD_GLOBAL)\n"
        "_library._load_one(_library._directory() / '_ops_cuda.so')\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "names = 'pack', 'unpack'\n"
        "print(all(has('ddit_rt::' + name, 'CUDA') for name in names))"
    )
    assert run_python(code) == "True\n"
