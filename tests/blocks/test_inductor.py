"""What reaches a package of the process that compiles it: nothing but where and how it compiles."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from block_models import CompiledBlocks, archive, block_inputs, compile_block
from diffusers import FluxTransformer2DModel
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

from ddit_rt.blocks import PackageInfo, TokenRanges, load_runner, read_info
from ddit_rt.blocks.compile import _EXAMPLES, _example_sizes
from ddit_rt.blocks.inductor import _NEEDED, _preferred_attention
from ddit_rt.blocks.package import record_attention
from ddit_rt.blocks.rewrites import has_native_products
from ddit_rt.models import family_of
from ddit_rt.models.base import BATCH, IMAGE, JOINT, SOUND, TEXT, BlockType

# One for every kind of harm; from code, as an application sets them.
HARMFUL = {
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm": True,
    "aot_inductor.use_runtime_constant_folding": True,
    "aot_inductor_mode.compile_standalone": True,
    "aot_inductor.output_path": "elsewhere",
    "aot_inductor.package_constants_in_so": True,
    "fx_wrapper": True,
    "cpu_backend": "triton",
    "cpp.enable_unsafe_math_opt_flag": True,
    "keep_output_stride": False,
    "post_grad_custom_post_pass": print,
}
HARMLESS = {"compile_threads": 1, "coordinate_descent_tuning": True, "nan_asserts": True}
# And from the environment, as an operator sets them.
VARIABLES = {
    "TORCHINDUCTOR_FREEZING": "1",
    "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
    "TORCHINDUCTOR_CPP_WRAPPER": "1",
    "TORCHINDUCTOR_FX_WRAPPER": "1",
    "TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "LC_ALL": "C",
}


@pytest.fixture
def single(transformer: FluxTransformer2DModel) -> BlockType:
    return family_of(transformer).block_types(transformer)[1]


def info_of(block: str = "Block") -> PackageInfo:
    return PackageInfo(
        block=block, inputs=(), input_dtypes=(), device="cpu", ranges=TokenRanges(), constants={}
    )


@pytest.fixture
def observed(
    transformer: FluxTransformer2DModel,
    single: BlockType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Callable[[], Any]], Any]:
    """Compiles a block without compiling it; returns what a look around saw in the meantime."""

    def compile_and(look: Callable[[], Any]) -> Any:
        seen = []

        def instead(*_: Any, package_path: str, inductor_configs: dict[str, Any]) -> None:
            with inductor.patch(inductor_configs):
                seen.append(look())
            archive(Path(package_path), info_of())

        monkeypatch.setattr("torch._inductor.aoti_compile_and_package", instead)
        block = transformer.single_transformer_blocks[0]
        compile_block(single, block, package=tmp_path / "p.pt2", ranges=TokenRanges())
        return seen[0]

    return compile_and


def test_harmful_settings_do_not_reach_a_compile_and_harmless_ones_stay_the_users(
    observed: Callable[[Callable[[], Any]], Any],
) -> None:
    usual = inductor.get_config_copy()
    harmful = {name: value for name, value in HARMFUL.items() if name in usual}
    with inductor.patch({**harmful, **HARMLESS}):
        found = observed(inductor.get_config_copy)
    for name, value in harmful.items():
        assert found[name] == _NEEDED.get(name, usual[name]), name
        assert found[name] != value, name
    assert {name: found[name] for name in HARMLESS} == HARMLESS


def test_torchs_warnings_do_not_fail_a_compile(
    observed: Callable[[Callable[[], Any]], Any],
) -> None:
    """Such as that of TF32, which is a plain UserWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observed(lambda: warnings.warn("TensorFloat32 tensor cores are available", stacklevel=1))


@contextlib.contextmanager
def unusual_state() -> Iterator[None]:
    """Everything of a process that torch could look at, at once."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    torch.set_num_threads(3)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch.inference_mode(),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def state() -> dict[str, Any]:
    return {
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device().type,
        "inference": torch.is_inference_mode_enabled(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
    }


@pytest.mark.slow
def test_state_of_torch_does_not_reach_a_compile(
    observed: Callable[[Callable[[], Any]], Any],
) -> None:
    usual = observed(state)
    assert not usual["grad"]
    with unusual_state():
        outside = state()
        assert observed(state) == usual
        assert state() == outside
        assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_attention_is_chosen_in_a_fixed_order() -> None:
    before = _cur_sdpa_kernel_backends(with_priority=True)
    flash, efficient, math = (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    )
    with sdpa_kernel(math):
        with _preferred_attention("cuda"):
            found = _cur_sdpa_kernel_backends(with_priority=True)
            assert found == [SDPBackend.CUDNN_ATTENTION, flash, efficient, math]
        with _preferred_attention("cpu"):
            assert _cur_sdpa_kernel_backends(with_priority=True) == [flash, efficient, math]
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.parametrize(
    ("source", "attention"),
    [
        (
            "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda__scaled_dot_product_cudnn_attention(q",
            ("cudnn_attention",),
        ),
        (
            """aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(a, b);
            aoti_torch_cuda__scaled_dot_product_efficient_attention(a, b);""",
            ("efficient_attention", "flash_attention_for_cpu"),
        ),
        ('"aten._scaled_dot_product_flash_attention.default"', ("flash_attention",)),
        (
            """// Sources: [aten._scaled_dot_product_flash_attention_for_cpu, aten.cat]
            void cpp_fused__scaled_dot_product_flash_attention_for_cpu_0(""",
            ("math",),
        ),
        ('"target": "ddit_rt::attention",', ("ddit_rt",)),
        ("aoti_torch_cpu_bmm_out(buf1, a, b)", ("math",)),
    ],
)
def test_attention_is_read_off_the_generated_source(
    tmp_path: Path, source: str, attention: tuple[str, ...]
) -> None:
    path = archive(tmp_path / "p.pt2", info_of(), wrapper=source, kernel="void kernel() {}")
    assert record_attention(path, info_of()).attention == attention
    assert read_info(path).attention == attention
    with zipfile.ZipFile(path) as file:
        assert file.read("x/wrapper.cpp").decode() == source


def test_packages_name_the_attention_that_they_call(compiled_blocks: CompiledBlocks) -> None:
    for block in ("FluxTransformerBlock", "FluxSingleTransformerBlock"):
        for lora in (False, True):
            info = read_info(compiled_blocks.package(block, lora=lora))
            assert info.block == block
            native = ("ddit_rt",) if has_native_products() else ("flash_attention_for_cpu",)
            assert info.attention == native


def test_package_older_than_what_is_recorded_can_be_read() -> None:
    info = replace(info_of(), attention=("math",), fused=(("a", "b"), ("c", "d", "e")))
    assert PackageInfo.from_json(info.to_json()) == info
    raw = json.loads(info.to_json())
    del raw["attention"], raw["fused"], raw["ranges"]["sound"]
    assert PackageInfo.from_json(json.dumps(raw)) == info_of()


def test_example_on_cuda_is_a_real_picture() -> None:
    assert _example_sizes(TokenRanges(), _EXAMPLES["cuda"]) == {
        BATCH: 2,
        IMAGE: 4096,
        TEXT: 512,
        JOINT: 4608,
        SOUND: 126,
    }
    small = TokenRanges(batch=(1, 1), image=(64, 1024), text=(1, 77))
    sizes = _example_sizes(small, _EXAMPLES["cuda"])
    assert (sizes[IMAGE], sizes[TEXT]) == (1024, 77)
    assert _example_sizes(TokenRanges(), _EXAMPLES["cpu"])[IMAGE] == 22


@pytest.mark.slow
def test_package_has_the_same_bits_whatever_the_process_says(
    compiled_blocks: CompiledBlocks,
    transformer: FluxTransformer2DModel,
    single: BlockType,
    tmp_path: Path,
) -> None:
    """Compiled by a process of the most unusual settings, against the fixture's package."""
    package = tmp_path / "p.pt2"
    tests = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    code = f"""
import sys
sys.path[:0] = {tests!r}
import torch._inductor.config as inductor
from pathlib import Path
from models import tiny_transformer
from test_inductor import HARMFUL, compile_block, unusual_state
from ddit_rt.blocks import TokenRanges
from ddit_rt.models import family_of
model = tiny_transformer()
block_type = family_of(model).block_types(model)[1]
known = {{name: HARMFUL[name] for name in HARMFUL if name in inductor.get_config_copy()}}
with unusual_state(), inductor.patch(known):
    block = block_type.blocks(model)[0]
    compile_block(block_type, block, package=Path({str(package)!r}), ranges=TokenRanges())
"""
    command = [sys.executable, "-W", "error::UserWarning:torch", "-c", code]
    done = subprocess.run(
        command, env={**os.environ, **VARIABLES}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    block = transformer.single_transformer_blocks[0]
    usual = load_runner(compiled_blocks.package(single.name), block)
    unusual = load_runner(package, block)
    assert unusual.info == usual.info
    for batch, image, text in ((1, 16, 7), (2, 64, 16), (8, 4, 2)):
        inputs = block_inputs(single, batch, image, text)
        assert all(map(torch.equal, unusual(*inputs), usual(*inputs)))


@pytest.mark.slow
def test_processes_that_compile_the_same_do_not_spoil_each_others_packages(tmp_path: Path) -> None:
    """Torch packs files that it writes anew for each, under the same names."""
    tests = str(Path(__file__).parents[1])
    code = f"""
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from block_models import compile_block
from models import tiny_transformer
from ddit_rt.blocks import TokenRanges, load_runner
from ddit_rt.models import family_of
model = tiny_transformer()
block_type = family_of(model).block_types(model)[1]
block, package = block_type.blocks(model)[0], Path(sys.argv[1])
compile_block(block_type, block, package=package, ranges=TokenRanges())
load_runner(package, block)
"""
    variables = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL": "O0",  # cheap: nothing is timed
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / f"{place}.pt2")],
            env={**os.environ, **variables},
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in range(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
