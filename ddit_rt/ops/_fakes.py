"""Shapes of the ops' results without data, for tracing, and the gradients of pack and unpack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _pack(latents: Tensor, patch_size: int, channels_last: bool = False) -> Tensor:
    del channels_last  # it changes the order of the features, not their number
    batch, channels, *frames, height, width = latents.shape
    tokens = (height // patch_size) * (width // patch_size)
    if frames:
        tokens = tokens * frames[0]
    return latents.new_empty((batch, tokens, channels * patch_size**2))


def _unpack(
    tokens: Tensor,
    patch_size: int,
    height: int,
    width: int,
    frames: int = 0,
    channels_last: bool = False,
) -> Tensor:
    del channels_last
    batch, _, features = tokens.shape
    middle = (frames,) if frames else ()
    channels = features // patch_size**2
    return tokens.new_empty((batch, channels, *middle, height, width))


def _patch_scores(
    history: Tensor,
    patch_sizes: Sequence[int],
    quantile: float,
    order: int = 3,
    head: int = 0,
) -> Tensor:
    del quantile, order, head  # they change values, not shapes
    return history.new_empty((history.shape[1], len(patch_sizes)))


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    del key, value, scale
    return query.new_empty(query.shape)


def _linear(
    values: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False
) -> Tensor:
    del bias, gelu
    return values.new_empty((*values.shape[:2], weight.shape[0]))


def _norm_rotate(values: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    del weight, cos, sin, eps
    return values.new_empty(values.shape)


def _solver_step(
    history: Tensor, velocities: Tensor, velocity: Tensor, coefficients: Tensor, step: int
) -> None:
    del history, velocities, velocity, coefficients, step


def _decide(
    scores: Tensor,
    forced: Tensor,
    thresholds: Tensor,
    state: Tensor,
    record: Tensor,
    step: int,
    dwell: int,
    monotone: bool,
) -> None:
    del scores, forced, thresholds, state, record, step, dwell, monotone


def _decide_reuse(
    signal: Tensor,
    increments: Tensor,
    coefficients: Tensor,
    state: Tensor,
    memory: Tensor,
    record: Tensor,
    step: int,
    buckets: int,
    threshold: float,
    limit: int,
    growth: int,
) -> None:
    del signal, increments, coefficients, state, memory, record
    del step, buckets, threshold, limit, growth


def _pack_setup(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
    del output
    latents, ctx.patch_size, ctx.channels_last = inputs
    ctx.shape = latents.shape


def _pack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *_, height, width = ctx.shape
    frames = ctx.shape[2] if len(ctx.shape) == 5 else 0
    sizes = (ctx.patch_size, height, width, frames)
    latents = torch.ops.ddit_rt.unpack(grad.contiguous(), *sizes, ctx.channels_last)
    return latents, None, None


def _unpack_setup(
    ctx: Any, inputs: tuple[Tensor, int, int, int, int, bool], output: Tensor
) -> None:
    del output
    _, ctx.patch_size, _, _, _, ctx.channels_last = inputs


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tokens = torch.ops.ddit_rt.pack(grad.contiguous(), ctx.patch_size, ctx.channels_last)
    return tokens, None, None, None, None, None


torch.library.register_fake("ddit_rt::pack", _pack)
torch.library.register_fake("ddit_rt::unpack", _unpack)
torch.library.register_fake("ddit_rt::patch_scores", _patch_scores)
torch.library.register_fake("ddit_rt::attention", _attention)
torch.library.register_fake("ddit_rt::linear", _linear)
torch.library.register_fake("ddit_rt::norm_rotate", _norm_rotate)
torch.library.register_fake("ddit_rt::solver_step_", _solver_step)
torch.library.register_fake("ddit_rt::decide_", _decide)
torch.library.register_fake("ddit_rt::decide_reuse_", _decide_reuse)
torch.library.register_autograd("ddit_rt::pack", _pack_backward, setup_context=_pack_setup)
torch.library.register_autograd("ddit_rt::unpack", _unpack_backward, setup_context=_unpack_setup)
