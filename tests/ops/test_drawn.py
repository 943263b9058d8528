"""The ops on drawn shapes, strides, data types and sizes of nothing, against plain torch.

`scripts/sanitize.sh` runs them on libraries that are built with sanitizers.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
import torch
from drawn import drawn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddit_rt.ops import (
    CacheGrowth,
    attention,
    decide_,
    decide_reuse_,
    linear,
    norm_rotate,
    pack,
    patch_scores,
    solver_step_,
    unpack,
)
from ddit_rt.ops.functions import solver_step_in_torch

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
OTHERS = st.sampled_from([torch.float64, torch.int32, torch.bool, torch.complex64])
SMALL = st.integers(0, 5)


@st.composite
def laid_out(draw: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Noise of a shape: contiguous, permuted, sliced with a step, shifted, or expanded."""
    kind = draw(st.sampled_from(["plain", "permuted", "sliced", "shifted", "expanded"]))
    noise = torch.randn(shape).to(dtype)
    if kind == "permuted":
        order = draw(st.permutations(range(len(shape))))
        back = [order.index(axis) for axis in range(len(shape))]
        noise = noise.permute(order).contiguous().permute(back)
    elif kind == "sliced":
        wide = torch.randn([2 * size + 1 for size in shape]).to(dtype)
        noise = wide[tuple(slice(1, 2 * size + 1, 2) for size in shape)]
    elif kind == "shifted":
        flat = torch.randn(math.prod(shape) + 3).to(dtype)
        noise = flat[3:].view(shape)
    elif kind == "expanded":
        noise = noise[:1].expand(shape) if shape[0] else noise
    assert noise.shape == torch.Size(shape)
    return noise


def reference_pack(latents: Tensor, p: int, channels_last: bool) -> Tensor:
    video = latents if latents.dim() == 5 else latents.unsqueeze(2)
    b, c, f, h, w = video.shape
    patches = video.reshape(b, c, f, h // p, p, w // p, p)
    features = (4, 6, 1) if channels_last else (1, 4, 6)
    tokens = f * (h // p) * (w // p)
    return patches.permute(0, 2, 3, 5, *features).reshape(b, tokens, c * p * p)


@drawn(80)
@given(
    data=st.data(),
    p=st.sampled_from([1, 2, 3, 4, 5, 6, 8, 16]),
    dtype=FLOATS,
    channels_last=st.booleans(),
)
def test_pack_and_unpack(data: Any, p: int, dtype: torch.dtype, channels_last: bool) -> None:
    batch, channels, rows, columns = (data.draw(SMALL) for _ in range(4))
    frames = data.draw(st.lists(st.integers(1, 3), max_size=1))
    shape = (batch, channels, *frames, max(rows, 1) * p, max(columns, 1) * p)
    latents = data.draw(laid_out(shape, dtype))
    tokens = pack(latents, p, channels_last=channels_last)
    assert torch.equal(tokens, reference_pack(latents, p, channels_last))
    size = (shape[-2], shape[-1], frames[0] if frames else 0)
    turned = tokens.transpose(0, 1).contiguous().transpose(0, 1)
    if channels:
        assert torch.equal(unpack(turned, p, *size, channels_last=channels_last), latents)


@drawn(60)
@given(data=st.data(), heads=st.integers(1, 3), width=st.integers(1, 40))
def test_attention(data: Any, heads: int, width: int) -> None:
    batch, queries, keys = data.draw(SMALL), data.draw(st.integers(0, 120)), data.draw(SMALL) + 1
    sizes = (queries, keys, keys)
    tensors = [data.draw(laid_out((batch, n, heads, width), torch.float32)) for n in sizes]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.double().transpose(1, 2) for tensor in tensors)
    )
    found = attention(*tensors)
    assert torch.allclose(found, expected.transpose(1, 2).float(), atol=1e-5)


@drawn(60)
@given(data=st.data(), channels=st.integers(0, 40), features=st.integers(0, 70))
def test_linear(data: Any, channels: int, features: int) -> None:
    batch, tokens = data.draw(SMALL), data.draw(st.integers(0, 110))
    values = data.draw(laid_out((batch, tokens, channels), torch.float32))
    weight, bias = torch.randn(features, channels), torch.randn(features)
    expected = torch.nn.functional.linear(values.double(), weight.double(), bias.double())
    assert torch.allclose(linear(values, weight, bias), expected.float(), atol=1e-4)


@drawn(60)
@given(data=st.data(), pairs=st.integers(1, 40), over_all=st.booleans())
def test_norm_and_rotation(data: Any, pairs: int, over_all: bool) -> None:
    batch, tokens, heads = data.draw(SMALL), data.draw(SMALL), data.draw(st.integers(1, 3))
    width = 2 * pairs
    values = data.draw(laid_out((batch, tokens, heads, width), torch.float32))
    wide = heads * width if over_all else width
    weight, cos, sin = torch.rand(wide), torch.rand(tokens, width), torch.rand(tokens, width)
    if values.stride(-1) != 1:
        with pytest.raises(RuntimeError, match="side by side"):
            norm_rotate(values, weight, cos, sin, 1e-6)
        return
    grouped = values.reshape(batch, tokens, 1 if over_all else heads, wide).double()
    normed = torch.nn.functional.rms_norm(grouped, (wide,), weight.double(), 1e-6)
    even, odd = normed.reshape(batch, tokens, heads, pairs, 2).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).reshape(batch, tokens, heads, width)
    expected = normed.reshape(turned.shape) * cos[:, None] + turned * sin[:, None]
    found = norm_rotate(values, weight, cos, sin, 1e-6)
    assert torch.allclose(found, expected.float(), atol=1e-5)


@drawn(60)
@given(data=st.data())
def test_scores(data: Any) -> None:
    batch, channels = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    frames = data.draw(st.lists(st.integers(1, 2), max_size=1))
    height, width = data.draw(st.integers(1, 17)), data.draw(st.integers(1, 17))
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    quantile = data.draw(st.floats(0, 1))
    order, head = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    history = data.draw(laid_out((4, batch, channels, *frames, height, width), torch.float32))
    smallest = min(channels * (height % p or p) * (width % p or p) for p in sizes)
    if smallest < 2 or not history.is_contiguous():
        with pytest.raises(RuntimeError, match="contiguous|single value"):
            patch_scores(history, sizes, quantile, order, head)
        return
    scores = patch_scores(history, sizes, quantile, order, head)
    assert scores.shape == (batch, len(sizes))
    if not batch:
        return
    z = [history[(head + age) % 4].double() for age in range(4)]
    weights = {1: (1, -1), 2: (1, -2, 1), 3: (1, -3, 3, -1)}[order]
    change = sum((w * one for w, one in zip(weights, z, strict=False)), torch.zeros(()))
    change = change if change.dim() == 5 else change.unsqueeze(2)
    for place, p in enumerate(sizes):
        stds = [
            change[..., y : y + p, x : x + p].transpose(1, 2).flatten(2).std(-1)
            for y in range(0, height, p)
            for x in range(0, width, p)
        ]
        every = torch.stack(stds, dim=-1).flatten(1)
        expected = torch.quantile(every, quantile, dim=-1).float()
        # Sums in float32, and an interpolation between two of them.
        torch.testing.assert_close(scores[:, place], expected.float(), rtol=2e-5, atol=1e-6)


@drawn(60)
@given(data=st.data(), slots=st.integers(0, 2), dtype=FLOATS)
def test_solver_steps(data: Any, slots: int, dtype: torch.dtype) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=5)))
    step = data.draw(st.integers(0, 6))
    table = torch.randn(7, 6, dtype=data.draw(st.sampled_from([torch.float32, torch.float64])))
    table[:, 4 + slots :] = 0
    velocity = data.draw(laid_out(shape, dtype))
    ours = torch.randn(4, *shape), torch.randn(slots, *shape)
    theirs = tuple(one.clone() for one in ours)
    solver_step_(*ours, velocity, table, step)
    solver_step_in_torch(*theirs, velocity, table, step)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@drawn(60)
@given(data=st.data(), dwell=st.integers(0, 3), monotone=st.booleans())
def test_decisions(data: Any, dwell: int, monotone: bool) -> None:
    """One step of a fresh run, whose rules of dwelling and of order do not act yet."""
    batch, sizes, steps = data.draw(SMALL), data.draw(st.integers(0, 4)), 5
    step = data.draw(st.integers(0, steps - 1))
    scores = data.draw(laid_out((batch, sizes), torch.float32))
    limits = data.draw(laid_out((steps, sizes), torch.float32))
    forced = torch.full((steps,), -1, dtype=torch.int32)
    state = torch.tensor([-1, 0, 0, 0], dtype=torch.int32)
    record = torch.zeros(steps, 3 + sizes)
    arguments = (scores, forced, limits, state, record, step, dwell, monotone)
    if not (batch and sizes):  # decided or refused, which the memory around must outlive
        with suppress(RuntimeError):
            decide_(*arguments)
        return
    decide_(*arguments)
    takes = [
        max((place + 1 for place in range(sizes) if row[place] < limits[step, place]), default=0)
        for row in scores
    ]
    assert int(state[0]) == int(state[3]) == min(takes)
    assert state[1] == 1
    assert torch.equal(record[step, 3:], scores.amax(0))


@drawn(60)
@given(data=st.data(), growth=st.sampled_from(CacheGrowth))
def test_reuse(data: Any, growth: CacheGrowth) -> None:
    """A step that follows a computed one: it reuses while no row's change reaches the threshold."""
    rows = data.draw(st.integers(1, 5))
    signal = data.draw(laid_out((rows,), torch.float32)).abs()
    terms = torch.tensor(data.draw(st.lists(st.floats(-2, 2, width=32), max_size=7)))
    increments = torch.tensor([math.nan, data.draw(st.floats(0, 2, width=32))])
    threshold = data.draw(st.floats(0, 3, width=32))
    state = torch.tensor([0, 1, 0, 0], dtype=torch.int32)
    memory, record = torch.full((2 + rows,), 7.0), torch.zeros(2, 2)
    fixed = (2, threshold, 9, growth)
    decide_reuse_(signal, increments, terms, state, memory, record, 0, *fixed)
    assert int(state[3]) == 0
    state[1] = 2
    decide_reuse_(signal, increments, terms, state, memory, record, 1, *fixed)
    if len(terms):
        change = torch.zeros(rows)
        for term in terms:
            change = change * signal + term
    else:
        grown = abs(1 - increments[1]) if growth == CacheGrowth.PRODUCT else increments[1]
        change = torch.full((rows,), float(grown))
    largest = float(change.max())
    if math.isclose(largest, threshold, rel_tol=1e-6, abs_tol=1e-6):
        return
    assert int(state[3]) == (2 if largest < threshold else 0)


@drawn(200)
@given(data=st.data())
def test_what_does_not_fit_is_refused_and_nothing_is_written(data: Any) -> None:
    """Wrong types, ranks, sizes and numbers; most do not fit, and what does runs."""
    dims = st.lists(st.integers(0, 4), max_size=6).map(tuple)
    kinds = FLOATS | OTHERS

    def tensor() -> Tensor:
        return torch.ones(data.draw(dims)).to(data.draw(kinds))

    number = st.integers(-(2**40), 2**40) | st.integers(-2, 9)
    real = st.floats(allow_nan=True, allow_infinity=True)
    history, record = tensor(), tensor()
    before = history.clone(), record.clone()
    numbers = [data.draw(number) for _ in range(4)]
    call = data.draw(
        st.sampled_from(
            [
                lambda: pack(tensor(), numbers[0]),
                lambda: unpack(tensor(), *numbers),
                lambda: patch_scores(history, numbers[2:], data.draw(real), *numbers[:2]),
                lambda: solver_step_(history, tensor(), tensor(), tensor(), numbers[0]),
                lambda: decide_(tensor(), tensor(), tensor(), history, record, *numbers[:2], True),
                lambda: decide_reuse_(
                    *(tensor(), tensor(), tensor(), history, record, tensor()),
                    *(*numbers[:2], data.draw(real), numbers[2], False),
                ),
            ]
        )
    )
    try:
        call()
    except (RuntimeError, TypeError, ValueError, OverflowError):
        assert torch.equal(history, before[0])
        assert torch.equal(record, before[1])
