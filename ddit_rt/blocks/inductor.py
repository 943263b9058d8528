"""AOTInductor, called with what packages need, whatever the process has set.

Settings of `torch._inductor.config`, from code or from `TORCHINDUCTOR_*` and `AOT_INDUCTOR_*` in
the environment, reach a package in three ways. Those that would make one which cannot be bound, or
that computes something else, are set here. Those that only choose among equal programs (tuning,
assertions, debug output), or where and how torch compiles (caches, workers, compiler), stay the
user's. Measured on FluxTransformerBlock (d = 128, fp32, one thread, 256 + 16 tokens):

- `cpp.dynamic_threads`: a package otherwise keeps the thread count of the machine that compiled
  it. No measurable cost (< 1 %).
- `cpp.use_decompose_tanh`: GELU through `exp` instead of a library `tanh`: 13 % less time a block.
- not `enable_line_tables`: a third of the package size, and less to unpack for every block.
- not `precompile_headers`: preparing them takes 10 s of CPU time in the first compile of an
  environment and 280 MB of disk, and saves one or two seconds a package.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ddit_rt.blocks.package import METADATA_KEY, PackageInfo, record_attention
from ddit_rt.blocks.rewrites import rewrite_for
from ddit_rt.torch_state import plain_defaults, shielded

_NEEDED: Mapping[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    "cpp.dynamic_threads": True,
    "cpp.use_decompose_tanh": True,
    # They fold or pack the user's tensors into copies, which ends the sharing of weights.
    "aot_inductor.use_runtime_constant_folding": False,
    "freezing": False,
    "max_autotune": False,
    "max_autotune_gemm": False,
}

# Left out where this torch does not know them.
_WHERE_KNOWN: Mapping[str, Any] = {
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.precompile_headers": False,
    # The tracer notes every open size as 2 or more; code made from it runs with 1 as well.
    "aot_inductor.check_lowerbound": False,
    # Another kind of file than a package with a library in it that torch can load.
    "aot_inductor.cross_target_platform": None,
    "aot_inductor.debug_intermediate_value_printer": "0",
    "aot_inductor.dump_aoti_minifier": False,
    "aot_inductor.link_libtorch": True,
    "aot_inductor.model_name_for_generated_files": None,
    "aot_inductor.output_path": "",
    "aot_inductor.package_constants_on_disk_format": None,
    "aot_inductor.package_cpp_only": False,
    "aot_inductor.presets": {},
    "aot_inductor.use_minimal_arrayref_interface": False,
    "aot_inductor_mode.compile_standalone": False,
    "cpu_backend": "cpp",
    "cuda_backend": "triton",
    "disable_cpp_codegen": False,
    "fx_wrapper": False,
    "triton.cudagraphs": False,
    # Another program: outputs of other strides, other rounding, or other operations.
    "assume_32bit_indexing": False,
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_unsafe_math_opt_flag": False,
    "emulate_precision_casts": False,
    "enable_linear_binary_folding": False,
    "is_predispatch": False,
    "joint_custom_post_pass": None,
    "joint_custom_pre_pass": None,
    "joint_graph_constant_folding": True,
    "keep_output_stride": True,
    "post_grad_custom_post_pass": None,
    "post_grad_custom_pre_pass": None,
    "post_grad_fusion_options": {},
    "pre_grad_custom_pass": None,
    "pre_grad_fusion_options": {},
    "use_fast_math": False,
}


def compile_program(
    program: ExportedProgram,
    info: PackageInfo,
    target: Path,
    options: Mapping[str, Any] | None = None,
) -> PackageInfo:
    """Compiles an exported block into a package.

    Args:
        program: The block, as `export_block` gives it.
        info: What the package is to say about itself.
        target: The `.pt2` file to write.
        options: Options that the machine's compiler needs.

    Returns:
        `info` with the attention that the package really calls.
    """
    # Imported here: it takes a second.
    from torch._inductor import aoti_compile_and_package, config
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch.utils._filelock import FileLock

    rewrite_for(info.device, program)
    known = config.get_config_copy()
    optional = {name: value for name, value in _WHERE_KNOWN.items() if name in known}
    metadata = {"aot_inductor.metadata": {METADATA_KEY: info.to_json()}}
    settings = {**_NEEDED, **optional, **(options or {}), **metadata}
    # Torch packs files of its cache that another process, generating the same code, writes anew.
    same = sha256(f"{program.graph_module.code}{info.constants}".encode()).hexdigest()[:32]
    lock = FileLock(Path(cache_dir()) / f"ddit_rt-{same}.lock")
    with lock, _preferred_attention(info.device):
        aoti_compile_and_package(program, package_path=str(target), inductor_configs=settings)
    return record_attention(target, info)


@contextmanager
def torch_as_tested() -> Iterator[None]:
    """The state of torch that blocks are traced and compiled in, whatever the process's is.

    Torch's warnings are about its own internals: there is nothing that a caller could do, and a
    process that makes errors of warnings would lose the compile.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(shielded())
        stack.enter_context(plain_defaults())
        if deterministic:
            # A block has no operation that it concerns, but it decides between kernels.
            torch.use_deterministic_algorithms(False)
            stack.callback(torch.use_deterministic_algorithms, True, warn_only=warn_only)
        yield


@contextmanager
def _preferred_attention(device_type: str) -> Iterator[None]:
    """Which attention torch is to take, where it has a choice: the first that can run.

    Left alone it goes by the state of the process and by the GPU that it compiles on. The order of
    the process is put back by itself: torch, within a choice of the user's, forgets the rest of it.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if device_type == "cuda":
        order.insert(0, SDPBackend.CUDNN_ATTENTION)
    before = torch._C._get_sdp_priority_order()  # noqa: SLF001
    try:
        with sdpa_kernel(order, set_priority=True):
            yield
    finally:
        torch._C._set_sdp_priority_order(before)  # noqa: SLF001
