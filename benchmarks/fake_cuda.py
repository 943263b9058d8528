"""Makes torch believe in an H100, so that blocks can be lowered for one where there is none.

Nothing can run: kernels are generated and compiled by Triton, in the first configuration of each (a
GPU would time them all), and never launched. Needs a CUDA build of torch. Import it after what was
exported, and in a process of its own: there is no way back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.codecache
import torch._inductor.codegen.wrapper as wrapper
import torch._inductor.fx_passes.fuse_attention as fuse_attention
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.pad_mm as pad_mm
import torch._inductor.graph as graph
import torch._inductor.runtime.triton_helpers as triton_helpers
import torch._inductor.runtime.triton_heuristics as heuristics
import torch._inductor.utils as inductor_utils
import torch._subclasses.fake_tensor as fake_tensor
import torch.utils._triton
import triton
from torch._dynamo import device_interface
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel


class _H100:
    """Properties of the device, as `torch.cuda.get_device_properties` names them."""

    name = "NVIDIA H100 80GB HBM3"
    major, minor = 9, 0
    total_memory = 80 << 30
    multi_processor_count = 132
    regs_per_multiprocessor = 65536
    warp_size = 32
    max_threads_per_multi_processor = 2048
    max_threads_per_block = 1024
    shared_memory_per_block = 49152
    shared_memory_per_block_optin = 232448
    shared_memory_per_multiprocessor = 233472
    L2_cache_size = 50 << 20
    clock_rate, memory_clock_rate, memory_bus_width = 1980000, 2619000, 5120
    gcnArchName, uuid, is_integrated = "", "x", 0  # noqa: N815 - torch's names


class _Driver:
    """Of Triton."""

    class utils:  # noqa: N801 - Triton's name
        @staticmethod
        def get_device_properties(_: int) -> dict[str, int]:
            return {
                "max_shared_mem": _H100.shared_memory_per_block_optin,
                "multiprocessor_count": _H100.multi_processor_count,
                "max_num_regs": _H100.regs_per_multiprocessor,
                "warpSize": _H100.warp_size,
            }

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


class _Launcher:
    """What a compiled kernel leaves for the C++ code that launches it."""

    def __init__(self, kernel: Any, config: Any, names: list[str], constants: set[str]) -> None:
        self.bin, self.config = kernel, config
        given = [name for name in names if name not in constants and name not in config.kwargs]
        self.def_args, self.call_args = given, list(given)
        self.global_scratch = getattr(kernel.metadata, "global_scratch_size", None) or None
        self.profile_scratch = None


def _compile_first(self: Any, *_: Any, **__: Any) -> None:
    if getattr(self, "first", None) is None:
        self.first = self._precompile_config(self.configs[0])


def _save(self: Any, *_: Any, stream: Any = 0, **__: Any) -> None:
    _compile_first(self)
    names = list(self.fn.arg_names)
    constants = {
        names[key[0]] if isinstance(key, tuple) else key
        for key in self.first.compile_meta["constants"]
    }
    launcher = _Launcher(self.first.kernel, self.first.config, names, constants)
    self.save_gpu_kernel(stream, launcher)


_autotune: Any = wrapper.PythonWrapperCodegen.generate_and_run_autotune_block


def _autotune_nothing(self: Any) -> Any:
    """Runs the code that would time kernels on tensors without data."""
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        return _autotune(self)


def _set(names: str, value: Any, *holders: Any) -> None:
    for holder in holders:
        for name in names.split():
            setattr(holder, name, value)


def pretend() -> None:
    """Puts the device in place."""
    for remembers in vars(torch.utils._triton).values():  # noqa: SLF001 - that there is no device
        getattr(remembers, "cache_clear", int)()
    interface, nothing = device_interface.CudaInterface, lambda *_, **__: None
    first = lambda *_, **__: 0  # noqa: E731
    _set("is_available is_bf16_supported", lambda *_, **__: True, torch.cuda)
    _set("device_count", lambda: 1, torch.cuda)
    _set("current_device maybe_exchange_device _exchange_device", first, torch.cuda)
    _set("_maybe_exchange_device", first, torch.cuda)
    _set("get_device_properties _get_device_properties", lambda *_, **__: _H100, torch.cuda)
    _set("get_device_capability", lambda *_, **__: (9, 0), torch.cuda)
    _set("get_device_name", lambda *_, **__: _H100.name, torch.cuda)
    _set("synchronize empty_cache", nothing, torch.cuda)
    state = torch.zeros(16, dtype=torch.uint8)
    _set("_lazy_init set_rng_state", nothing, torch.cuda, torch.cuda.random)
    _set("get_rng_state", lambda *_, **__: state, torch.cuda, torch.cuda.random)
    _set("is_initialized", lambda: False, torch.cuda)
    bindings = torch._C  # noqa: SLF001
    _set("_cuda_getDevice _cuda_exchangeDevice _cuda_maybeExchangeDevice", first, bindings)
    _set("_cuda_getCurrentRawStream", first, bindings)
    static = staticmethod(first)
    _set("exchange_device maybe_exchange_device current_device", static, interface)
    _set("is_available", staticmethod(lambda: True), interface)
    _set("get_device_properties", staticmethod(lambda _=None: _H100), interface.Worker)
    _set("current_device", static, interface.Worker)
    triton.runtime.driver.set_active(_Driver())
    _set("set_driver_to_gpu set_driver_to_cpu", nothing, triton_helpers)
    _set("init_gpu_context", nothing, fake_tensor)
    _set("_sfdp_init", nothing, fuse_attention, joint_graph)
    _set("_pad_mm_init", nothing, pad_mm, joint_graph)
    _set("is_same_tensor", lambda one, other: one is other, inductor_utils, graph)
    _set("_init_handles", nothing, CompiledKernel)
    never = staticmethod(nothing)
    _set("can_statically_launch", never, heuristics.StaticTritonCompileResult)
    _set("precompile", _compile_first, heuristics.CachingAutotuner)
    _set("run", _save, heuristics.CachingAutotuner)
    _set("generate_and_run_autotune_block", _autotune_nothing, wrapper.PythonWrapperCodegen)
