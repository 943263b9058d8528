"""The products of compiled blocks on a CPU, and what lies between, against torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from ddit_rt.ops import attention, linear, norm_rotate


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    heads = (part.double().transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2).float()


# Blocks of one, two and three vectors, several of them; chunks of keys that are whole or not.
@pytest.mark.parametrize("keys", [1, 7, 256, 700])
def test_any_number_of_tokens(keys: int) -> None:
    key, value = torch.randn(2, 2, keys, 3, 24)
    for queries in (1, 16, 17, 33, 48, 100, 400):
        query = torch.randn(2, queries, 3, 24)
        found = attention(query, key, value)
        assert found.is_contiguous()
        assert torch.allclose(found, exact(query, key, value), atol=3e-6)


@pytest.mark.parametrize(
    ("width", "scale"),
    [(1, None), (5, 0.01), (8, 0.3), (20, None), (32, 0.01), (64, 0.3), (128, None)],
)
def test_any_width_and_scale(width: int, scale: float | None) -> None:
    query, key, value = torch.randn(3, 1, 40, 2, width)
    found = attention(query, key, value, scale)
    assert torch.allclose(found, exact(query, key, value, scale), atol=1e-5)


def test_scores_of_any_size_neither_overflow_nor_vanish() -> None:
    query, key, value = torch.randn(3, 1, 300, 1, 16)
    # The greatest score comes last, in another chunk than the first one's: all sums are rescaled.
    key[:, -1] = 40 * query[:, :1].mean(1)
    found = attention(100 * query, key, value)
    assert torch.allclose(found, exact(100 * query, key, value), atol=1e-4)
    # Equal scores, however large: the mean of the values.
    same = attention(torch.full((1, 3, 1, 16), 1e18), torch.full((1, 300, 1, 16), 1e18), value)
    assert torch.allclose(same, value.mean(1, keepdim=True).expand(1, 3, 1, 16), atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_what_is_not_finite_shows(which: str, bad: float) -> None:
    tensors = dict(zip(("query", "key", "value"), torch.randn(3, 1, 300, 1, 8), strict=True))
    tensors[which][0, 200, 0, 3] = bad
    found, expected = attention(**tensors), exact(**tensors)
    assert not expected.isfinite().all()
    assert torch.equal(found.isfinite(), expected.isfinite())


def test_result_hangs_neither_on_threads_nor_on_the_batch_nor_on_the_layout() -> None:
    tensors = torch.randn(3, 3, 500, 2, 32)
    whole = attention(*tensors)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(attention(*tensors), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(attention(*tensors[:, 1:2]), whole[1:2])
    assert torch.equal(attention(tensors[0][:, 100:105], *tensors[1:]), whole[:, 100:105])
    turned = (part.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0) for part in tensors)
    assert torch.equal(attention(*turned), whole)


def test_no_queries_and_no_samples_are_no_results() -> None:
    key = torch.randn(2, 3, 4, 8)
    assert attention(key[:, :0], key, key).shape == (2, 0, 4, 8)
    assert attention(key[:0], key[:0], key[:0]).shape == (0, 3, 4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(2, 3, 8)}, "query has shape .*expected .B, n, heads, width."),
        ({"key": torch.randn(2, 3, 4, 9)}, "key has shape"),
        ({"value": torch.randn(2, 4, 4, 8)}, "value has shape"),
        ({"query": torch.randn(2, 3, 4, 8).double()}, "query is Double, expected Float"),
        ({"key": torch.randn(2, 0, 4, 8)}, "expected at least one token"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    tensors = {name: torch.randn(2, 3, 4, 8) for name in ("query", "key", "value")}
    with pytest.raises(RuntimeError, match=message):
        attention(**{**tensors, **change})


@pytest.mark.parametrize(("channels", "features"), [(1, 1), (8, 8), (13, 50), (600, 33), (1030, 8)])
@pytest.mark.parametrize("gelu", [False, True])
def test_linear_layers_of_any_size(channels: int, features: int, gelu: bool) -> None:
    weight = torch.randn(features, channels + 3)[:, 2:-1]
    bias = torch.randn(features) if features != 50 else None
    for tokens in (1, 16, 17, 40, 48, 100):
        values = torch.randn(2, tokens, channels)
        expected = F.linear(
            values.double(), weight.double(), None if bias is None else bias.double()
        )
        if gelu:
            expected = F.gelu(expected, approximate="tanh")
        found = linear(values, weight, bias, gelu=gelu)
        assert found.is_contiguous()
        assert torch.allclose(found, expected.float(), rtol=1e-5, atol=1e-5 * channels**0.5)


def test_gelu_of_any_size_is_torchs() -> None:
    values = torch.cat((torch.linspace(-12, 12, 999), torch.tensor([-1e30, 1e30])))
    values = values[None, :, None]
    found = linear(values, torch.ones(1, 1), gelu=True)
    expected = F.gelu(values.double(), approximate="tanh").float()
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert linear(torch.full((1, 1, 1), math.nan), torch.ones(1, 1), gelu=True).isnan().all()


def test_linear_layers_hang_neither_on_threads_nor_on_other_tokens_nor_on_the_layout() -> None:
    values, weight, bias = torch.randn(3, 200, 136), torch.randn(300, 136), torch.randn(300)
    whole = linear(values, weight, bias, gelu=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(linear(values, weight, bias, gelu=True), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(linear(values[1:2, 60:65], weight, bias, gelu=True), whole[1:2, 60:65])
    turned = values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(linear(turned, weight, bias, gelu=True), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.randn(5, 8)}, "values have shape .*expected .B, n, channels."),
        ({"values": torch.randn(1, 5, 8).double()}, "values is Double, expected Float"),
        ({"weight": torch.randn(4, 9)}, "weight has shape"),
        ({"weight": torch.randn(8, 4).T}, "does not have its channels side by side"),
        ({"bias": torch.randn(5)}, "bias has shape"),
    ],
)
def test_linear_layers_refuse_what_does_not_fit(change: dict[str, Tensor], message: str) -> None:
    given = {"values": torch.randn(1, 5, 8), "weight": torch.randn(4, 8), "bias": torch.randn(4)}
    with pytest.raises(RuntimeError, match=message):
        linear(**{**given, **change})


@pytest.mark.parametrize("width", [2, 8, 30, 32, 50, 128])
@pytest.mark.parametrize("over", ["each", "all"])
def test_norm_and_rotation_are_diffusers(width: int, over: str) -> None:
    heads, tokens = 3, 21
    projected = torch.randn(2, tokens, 3 * heads * width)
    values = projected[..., heads * width : 2 * heads * width].view(2, tokens, heads, width)
    wide = width * (heads if over == "all" else 1)
    weight = torch.rand(wide) + 0.5
    angles = torch.rand(tokens, width // 2).repeat_interleave(2, dim=1) * 6
    grouped = values.reshape(2, tokens, -1, wide).double()
    normed = F.rms_norm(grouped, (wide,), weight.double(), 1e-6).view(2, tokens, heads, width)
    expected = apply_rotary_emb(normed, (angles.cos(), angles.sin()), sequence_dim=1)
    found = norm_rotate(values, weight, angles.cos(), angles.sin(), 1e-6)
    assert torch.allclose(found, expected.float(), atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": torch.randn(2, 5, 3, 7)}, "expected an even number side by side"),
        ({"heads": torch.randn(2, 5, 8, 3).transpose(2, 3)}, "side by side"),
        ({"heads": torch.randn(2, 5, 3, 8).half()}, "values is Half, expected Float"),
        ({"weight": torch.rand(9)}, "weight has shape"),
        ({"cos": torch.rand(4, 8)}, "cos has shape"),
        ({"sin": torch.rand(8, 5).T}, "sin of shape .* is not contiguous"),
    ],
)
def test_norm_and_rotation_refuse_what_does_not_fit(
    change: dict[str, Tensor], message: str
) -> None:
    tensors = {"heads": torch.randn(2, 5, 3, 8), "weight": torch.rand(8)}
    tables = {"cos": torch.rand(5, 8), "sin": torch.rand(5, 8)}
    with pytest.raises(RuntimeError, match=message):
        norm_rotate(**{**tensors, **tables, **change}, eps=1e-6)
