"""The ops as torch sees them: schemas, fakes, gradients, export and compilation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddit_rt import ops


def op_calls() -> list[tuple[str, tuple[Any, ...]]]:
    latents, tokens = torch.randn(2, 4, 8, 12), torch.randn(2, 24, 16)
    history, ring = torch.randn(4, *latents.shape), torch.randn(2, *latents.shape)
    table = torch.randn(5, 6, dtype=torch.float64)
    table[:, 5] = 0.0  # two velocities only
    forced = torch.full((5,), -1, dtype=torch.int32)
    state = torch.tensor([-1, 0, 0, 0], dtype=torch.int32)
    decide = (torch.rand(2, 2), forced, torch.rand(5, 2), state, torch.zeros(5, 5), 3, 1, True)
    some = torch.rand
    reuse = (some(2), some(5), some(3), state, some(4), torch.zeros(5, 2), 3, 3, 0.5, 9, False)
    return [
        ("pack", (latents.clone().requires_grad_(), 2)),
        ("pack", (torch.randn(1, 2, 3, 4, 4, dtype=torch.bfloat16), 2)),
        ("unpack", (tokens.clone().requires_grad_(), 2, 8, 12)),
        ("unpack", (torch.randn(1, 12, 8), 2, 4, 4, 3)),
        ("pack", (torch.randn(2, 3, 4, 8, 12, requires_grad=True), 2, True)),
        ("unpack", (torch.randn(2, 96, 12, requires_grad=True), 2, 8, 12, 4, True)),
        ("patch_scores", (history, [2, 4], 0.4)),
        ("patch_scores", (history, [4], 0.4, 2, 3)),
        ("attention", (*torch.randn(3, 2, 5, 3, 8), 0.5)),
        ("linear", (some(2, 5, 8), some(4, 8), some(4), True)),
        ("linear", (some(2, 5, 8).transpose(0, 1), some(4, 8))),
        ("norm_rotate", (some(2, 5, 3, 8), some(8), some(5, 8), some(5, 8), 1e-6)),
        ("solver_step_", (history, ring, latents, table, 3)),
        ("decide_", decide),
        ("decide_reuse_", reuse),
    ]


@pytest.mark.parametrize(("name", "arguments"), op_calls())
def test_opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.ddit_rt, name).default, arguments)


class Step(nn.Module):
    """Everything that a denoising step does around the model."""

    def forward(
        self, history: Tensor, ring: Tensor, table: Tensor, forced: Tensor, limits: Tensor
    ) -> tuple[Tensor, ...]:
        history, ring = history.clone(), ring.clone()
        state = torch.tensor([-1, 0, 0, 0], dtype=torch.int32)
        record = torch.zeros(forced.shape[0], 3 + limits.shape[1])
        scores = ops.patch_scores(history, [4, 8], 0.4)
        ops.decide_(scores, forced, limits, state, record, 0, 2, False)
        tokens = ops.pack(history[0], 4)
        velocity = ops.unpack(tokens * 0.5, 4, history.shape[-2], history.shape[-1])
        ops.solver_step_(history, ring, velocity, table, 0)
        return history, ring, state, record, scores


def step_inputs(batch: int = 2) -> tuple[Tensor, ...]:
    history = torch.randn(4, batch, 3, 16, 24)
    table = torch.tensor([[1.0, 0, 0, -0.1, 0, 0]] * 4, dtype=torch.float64)
    forced = torch.full((4,), -1, dtype=torch.int32)
    return history, torch.zeros(2, *history.shape[1:]), table, forced, torch.full((4, 2), 3.0)


def assert_same(one: Callable[..., Any], other: Callable[..., Any], inputs: Any) -> None:
    for a, b in zip(one(*inputs), other(*inputs), strict=True):
        assert torch.equal(a, b)


def test_export_round_trip_with_dynamic_batch(tmp_path: Any) -> None:
    batch = torch.export.Dim("batch", min=2, max=8)
    dynamic = ({1: batch}, {1: batch}, None, None, None)
    program = torch.export.export(Step(), step_inputs(), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2").module()
    assert_same(Step(), loaded, step_inputs())
    assert_same(Step(), loaded, step_inputs(batch=5))


@pytest.mark.slow
def test_compile_in_one_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # torch keeps graphs on disk under keys that do not hold the schemas of others' ops.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = torch.compile(Step(), fullgraph=True)
    assert_same(Step(), compiled, step_inputs())


def test_ops_called_directly_still_check_their_arguments() -> None:
    with pytest.raises(RuntimeError, match="not contiguous"):
        torch.ops.ddit_rt.pack(torch.zeros(1, 4, 8, 8).transpose(2, 3), 2)
    with pytest.raises(RuntimeError, match="patch size 3 does not divide"):
        torch.ops.ddit_rt.pack(torch.zeros(1, 4, 8, 8), 3)
    with pytest.raises(RuntimeError, match=r"tokens has shape \[1, 64, 8\], expected \[1, 48, 8\]"):
        torch.ops.ddit_rt.unpack(torch.zeros(1, 64, 8), 2, 8, 8, 3)
    with pytest.raises(RuntimeError, match="expected 4 or 5 dimensions"):
        torch.ops.ddit_rt.pack(torch.zeros(4, 8, 8), 2)
