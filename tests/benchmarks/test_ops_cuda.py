from __future__ import annotations

from importlib import import_module

import pytest
import torch

from ddit_rt import ops

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_every_size_is_packed_with_patches_that_divide_it() -> None:
    bench = import_module("ops_cuda")
    assert bench.PATCH_SIZES.keys() == bench.LATENTS.keys()
    for size, patches in bench.PATCH_SIZES.items():
        assert not any(edge % patch for edge in bench.LATENTS[size][-2:] for patch in patches)


@pytest.mark.parametrize("shape", [(1, 16, 8, 16), (2, 3, 5, 8, 24)])
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_eager_method_computes_the_same_as_the_op(shape: tuple[int, ...], patch: int) -> None:
    bench = import_module("ops_cuda")
    latents = torch.randn(shape)
    for channels_last in (False, True):
        tokens = bench.eager_pack(latents, patch, channels_last)
        assert torch.equal(bench.native_pack(latents, patch, channels_last), tokens)
        back = bench.eager_unpack(tokens, patch, channels_last, shape)
        assert torch.equal(back, latents)
        assert torch.equal(bench.native_unpack(tokens, patch, channels_last, shape), latents)
    assert torch.equal(ops.pack(latents, patch), bench.eager_pack(latents, patch, False))


@pytest.mark.parametrize("unpack", [False, True])
def test_case_moves_what_its_methods_read_and_write(unpack: bool) -> None:
    bench = import_module("ops_cuda")
    case = bench.pack_case(CPU, "Wan 480p", 4, torch.bfloat16, True, unpack)
    assert set(case.methods) == {"native", "eager", "copy"}
    for build in case.methods.values():
        result = build()()
        assert result.dtype == torch.bfloat16
        assert 2 * result.nbytes == case.moved_bytes == 2 * 2 * 16 * 21 * 60 * 104


def test_buffers_of_a_graph_are_larger_than_the_cache() -> None:
    bench = import_module("ops_cuda")
    cache = 50 << 20
    flux, wan = 2 * 2 * 16 * 128 * 128, 2 * 4 * 16 * 21 * 90 * 160
    assert bench.launches(flux, cache) * flux >= 4 * cache
    assert bench.launches(wan, cache) == 8
    assert bench.launches(1, cache) == 512


def test_step_kernels_have_a_case_for_every_size() -> None:
    kernels = import_module("ops_cuda")
    cases = {(case.name, case.size): case for case in kernels.step_cases(CPU)}
    names = ("update, euler, order 3", "decide, 2 coarse sizes")
    sizes = ("FLUX 1024", "Wan 480p", "Wan 720p")
    assert set(cases) == {(name, size) for name in names for size in sizes}
    assert cases[names[0], "FLUX 1024"].moved_bytes == 6 * 4 * 16 * 128 * 128
    assert [cases[name, "FLUX 1024"].latency_bound for name in names[:2]] == [False, True]
    assert cases[names[1], "FLUX 1024"].moved_bytes == 2 * 4 * 32 * 32  # base patches of 4 x 4
    assert cases[names[1], "Wan 720p"].moved_bytes == 2 * 4 * 21 * 23 * 40
    plan = kernels.plan_of()
    assert plan.capacity == plan.policy.steps == plan.solver.steps
    assert all(plan.policy.scored(step) for step in range(plan.policy.steps))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("index", [0, 1])
def test_step_kernels_are_timed(index: int) -> None:
    bench = import_module("ops_cuda")
    case = bench.step_cases(torch.device("cuda", 0))[index]
    row = bench.entry(case, 2, 50 << 20, 1e12)
    assert "error" not in row
    assert row["microseconds"]["native"]["median"] > 0


@pytest.mark.gpu
@needs_gpu
def test_captured_launches_keep_their_results_apart() -> None:
    bench = import_module("ops_cuda")
    device = torch.device("cuda")
    case = bench.pack_case(device, "FLUX 1024", 2, torch.bfloat16, False, False)
    graph, (calls, results) = bench.capture([case.methods["native"]] * 4)
    graph.replay()
    torch.cuda.synchronize()
    assert len({result.data_ptr() for result in results}) == 4
    for call, result in zip(calls, results, strict=True):
        assert torch.equal(call(), result)


@pytest.mark.gpu
@needs_gpu
def test_entry_has_times_of_all_methods() -> None:
    bench = import_module("ops_cuda")
    case = bench.pack_case(torch.device("cuda"), "FLUX 1024", 2, torch.bfloat16, False, False)
    row = bench.entry(case, 2, 50 << 20, 1e12)
    assert "error" not in row
    assert set(row["microseconds"]) == {"native", "eager", "copy"}
    assert row["over_floor"] > 0
