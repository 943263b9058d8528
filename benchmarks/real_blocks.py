"""Section `blocks`: one block of each class by itself, compiled, beside the same run by torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from ops_cuda import capture, microseconds
from real_models import Case
from real_setup import Setup
from records import Save, unsaved
from timing import attempt, timed
from torch import Tensor

from ddit_rt.models.base import BATCH, IMAGE, JOINT, TEXT, BlockType
from ddit_rt.models.layered import LayeredFamily
from ddit_rt.policies import parse_patch

_REPEATS = 12
_REPLAYS = 5
_MOST = 16


def blocks(setup: Setup, case: Case, save: Save = unsaved) -> dict[str, Any]:
    """The first block of each class at every patch size, on random tokens.

    What a step costs is about the sum over its blocks, so this tells in seconds where time goes,
    with as few as one block of each class in the model.
    """
    problem = setup.engine_error()
    if problem is not None:
        return {"error": f"no engine: {problem}"}
    model = setup.engine._compiled.steps  # noqa: SLF001 - no user needs it
    assert isinstance(model.family, LayeredFamily), "the presets have one"
    rows: dict[str, Any] = {}
    for block_type in model.family.block_types(model.transformer):
        for patch in setup.costs(case):
            row, problem = attempt(partial(_row, setup, case, block_type, patch))
            rows[f"{block_type.name} {patch}"] = row or {"error": problem}
            save({"rows": rows})
    return {"rows": rows}


def _row(setup: Setup, case: Case, block_type: BlockType, patch: str) -> dict[str, Any]:
    model = setup.engine._compiled.steps  # noqa: SLF001 - no user needs it
    block, runner = block_type.blocks(model.transformer)[0], model.base[block_type.path][0]
    inputs = _inputs(setup, case, block_type, patch)
    ours = _seconds(setup, lambda: runner(*inputs))
    with torch.no_grad():
        torchs = _seconds(setup, lambda: block_type.forward(block, *inputs))
        expected = block_type.forward(block, *inputs)
    found = runner(*inputs)
    errors = [
        (one.float() - other.float()).norm() / other.float().norm()
        for one, other in zip(found, expected, strict=True)
    ]
    return {
        "seconds": ours,
        "torch_seconds": torchs,
        "speedup": torchs / ours,
        "relative_error": max(float(error) for error in errors),
        **({"kernels": _kernels(lambda: runner(*inputs))} if setup.device.type == "cuda" else {}),
    }


def _inputs(setup: Setup, case: Case, block_type: BlockType, patch: str) -> list[Tensor]:
    """Random, in the dtypes of the weights; what has no batch dimension, positions, in float32."""
    height, width = case.latent
    model = setup.engine._compiled.steps  # noqa: SLF001 - no user needs it
    grid = model.grid(height, width, parse_patch(patch), case.latent_frames)
    batch, text = setup.model.passes * case.batch, setup.preset.text_tokens
    sizes = {BATCH: batch, IMAGE: grid.tokens, TEXT: text, JOINT: grid.tokens + text}
    dtype = block_type.dtype(block_type.blocks(model.transformer)[0])
    return [
        torch.randn(
            spec.shape(sizes),
            device=setup.device,
            dtype=dtype if BATCH in spec.dims else torch.float32,
        )
        for spec in block_type.inputs
    ]


def _seconds(setup: Setup, call: Callable[[], Any]) -> float:
    """Median time of a call; on CUDA of replays of its graph, free of the host's launches."""
    if setup.device.type != "cuda":
        call()
        return statistics.median(timed(call, setup.device)[0] for _ in range(_REPEATS))
    graph, kept = capture([lambda: call])
    seconds = statistics.median(microseconds(graph, 1) * 1e-6 for _ in range(_REPEATS))
    del kept  # what the graph has written to lived until now
    return seconds


def _kernels(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernels of a call, the longest first."""
    graph, kept = capture([lambda: call])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    del kept
    found = [
        {
            "name": event.key[:160],
            "count": event.count / _REPLAYS,
            "seconds": event.self_device_time_total * 1e-6 / _REPLAYS,
        }
        for event in profile.key_averages()
        if event.self_device_time_total
    ]
    return sorted(found, key=lambda kernel: -kernel["seconds"])[:_MOST]
