"""The CUDA kernels' own source, run on the CPU by the emulator, against the CPU ops."""

from __future__ import annotations

import ctypes
import math
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddit_rt import ops

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    flags.append("-fno-extern-tls-init")  # the emulated shared memory needs no constructor
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    source = ROOT / "tests" / "native" / "kernels.cpp"
    subprocess.run(["g++", *flags, *includes, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def address(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def addresses(*tensors: Tensor | None) -> ctypes.Array[ctypes.c_void_p]:
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return (ctypes.c_void_p * len(tensors))(*pointers)


def scores_of(
    kernels: ctypes.CDLL, history: Tensor, base: int, factors: list[int], q: float, order: int = 3
) -> Tensor:
    video = history if history.dim() == 6 else history.unsqueeze(3)
    _, b, c, f, h, w = video.shape
    patches = b * f * (h // base) * (w // base)
    mean, m2 = torch.full((2, patches), math.nan)
    keys = torch.empty(len(factors) * patches, dtype=torch.int32)
    scores = torch.empty(b, len(factors))
    kernels.emulate_patch_scores(
        addresses(*history),
        (ctypes.c_int64 * 6)(b, c, f, h, w, base),
        order,
        ctypes.c_float(q),
        len(factors),
        (ctypes.c_int * len(factors))(*factors),
        address(mean),
        address(m2),
        address(keys),
        address(scores),
    )
    return scores


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "base", "factors"),
    [
        ((1, 16, 64, 64), 4, [1, 2]),
        ((2, 4, 24, 48), 2, [2, 1, 3]),
        ((1, 3, 2, 48, 48), 3, [2, 4]),
        ((1, 2, 32, 64), 32, [1]),
        ((1, 5, 8, 40), 1, [8]),
    ],
)
def test_patch_scores_equal_cpu(
    kernels: ctypes.CDLL, order: int, shape: tuple[int, ...], base: int, factors: list[int]
) -> None:
    history = torch.randn(4, *shape)
    sizes = [base * factor for factor in factors]
    scores = scores_of(kernels, history, base, factors, 0.4, order)
    # The two sum in different orders: a few units in the last place.
    torch.testing.assert_close(
        scores, ops.patch_scores(history, sizes, 0.4, order), rtol=2e-6, atol=0.0
    )


def test_patch_scores_of_a_nonfinite_sample_are_nan(kernels: ctypes.CDLL) -> None:
    history = torch.randn(4, 3, 4, 16, 16)
    history[1, 1, 2, 3, 4] = math.inf
    scores = scores_of(kernels, history, 4, [1, 2], 0.4)
    assert scores.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


@pytest.mark.parametrize("count", [1, 2, 3, 500, 1024, 1500])
@pytest.mark.parametrize("levels", [2, 1_000_000])
def test_quantile_has_the_bits_of_torch(kernels: ctypes.CDLL, count: int, levels: int) -> None:
    squares = torch.randint(0, levels, (count,)).float()  # two levels: nothing but ties
    # torch's float32 sqrt is not correctly rounded on every CPU; rounded from float64 it is.
    roots = squares.double().sqrt().float()
    keys, score = torch.empty(count, dtype=torch.int32), torch.empty(1)
    for q in (0.0, 0.1, 0.4, 0.5, 0.999, 1.0):
        kernels.emulate_quantile(
            address(squares), ctypes.c_int64(count), ctypes.c_float(q), address(keys),
            address(score),
        )  # fmt: skip
        assert score.item() == torch.quantile(roots, q).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize(
    "row",
    [
        (1, 0, 0, -0.07, 0, 0),
        (0, 0, 0, 0, 0, 0),
        (0.9, 0.2, -0.1, 0.5, -0.3, 0.2),
        (0, 1, 0, 0, 2, 0),
    ],
)
def test_solver_step_has_the_bits_of_the_cpu(
    kernels: ctypes.CDLL, dtype: torch.dtype, width: int, row: tuple[float, ...]
) -> None:
    count, step = 1000, 3
    history, ring = torch.randn(4, count), torch.randn(3, count)
    velocity = torch.randn(count).to(dtype)
    velocity[:2] = torch.tensor([-0.0, 6e-8])  # a signed zero; subnormal in float16
    table = torch.tensor(row, dtype=torch.float64).repeat(step + 1, 1)
    expected_history, expected_ring = history.clone(), ring.clone()
    ops.solver_step_(expected_history, expected_ring, velocity, table, step)

    def slot(k: int, length: int) -> int:
        return -k % length

    kernels.emulate_solver_step(
        ctypes.c_int64(count),
        address(table[step]),
        addresses(*(history[slot(step - i, 4)] for i in range(3))),
        addresses(*(ring[slot(step - j, 3)] for j in (1, 2))),
        address(velocity),
        address(ring[slot(step, 3)]),
        address(history[slot(step + 1, 4)]),
        DTYPES.index(dtype),
        width,
    )
    assert torch.equal(ring.view(torch.int32), expected_ring.view(torch.int32))
    assert torch.equal(history.view(torch.int32), expected_history.view(torch.int32))


def test_solver_step_shows_a_velocity_that_the_ring_does_not_hold(kernels: ctypes.CDLL) -> None:
    latents, velocity = torch.zeros(3, 8), torch.zeros(8)
    row = torch.tensor([1.0, 0, 0, 1.0, 0.5, 0], dtype=torch.float64)
    out, stored = torch.zeros(8), torch.zeros(8)
    kernels.emulate_solver_step(
        ctypes.c_int64(8), address(row), addresses(*latents), addresses(None, None),
        address(velocity), address(stored), address(out), 0, 4,
    )  # fmt: skip
    assert out.isnan().all()


def test_decide_equals_cpu_over_random_runs(kernels: ctypes.CDLL) -> None:
    steps, sizes, batch = 200, 3, 2
    scores = torch.rand(steps, batch, sizes)
    scores[torch.rand(scores.shape) < 0.01] = math.nan
    limits = torch.rand(steps, sizes)
    limits[torch.rand(limits.shape) < 0.1] = math.nan
    forced = torch.where(torch.rand(steps) < 0.1, torch.randint(0, 4, (steps,)), -1).int()
    for dwell, monotone in [(0, False), (3, False), (0, True), (4, True)]:
        states = [torch.tensor([-1, 0, 0, 0], dtype=torch.int32) for _ in range(2)]
        records = [torch.zeros(steps, 3 + sizes) for _ in range(2)]
        for k in range(steps):
            ops.decide_(scores[k], forced, limits, states[0], records[0], k, dwell, monotone)
            kernels.emulate_decide(
                address(scores[k]), address(forced[k]), address(limits[k]), address(states[1]),
                address(records[1][k]), batch, sizes, dwell, ctypes.c_bool(monotone),
            )  # fmt: skip
        assert torch.equal(states[0], states[1])
        torch.testing.assert_close(records[0], records[1], rtol=0, atol=0, equal_nan=True)
        assert len(records[0][:, 1].unique()) >= 4  # the run met most rules
