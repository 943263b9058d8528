"""Norm and rotary embedding in one pass, against diffusers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn

from ddit_rt.models import processors
from ddit_rt.models.processors import norm_rotate, set_processors

TOKENS, HEADS, WIDTH = 12, 2, 32


def tables() -> tuple[Tensor, Tensor]:
    """Rotary cos and sin, each `[n, width]`."""
    angles = torch.rand(TOKENS, WIDTH // 2).repeat_interleave(2, dim=1) * 6
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("over", [1, HEADS], ids=["each head", "all heads"])
def test_it_is_what_diffusers_computes(over: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(2, TOKENS, HEADS, WIDTH, dtype=dtype)
    norm = nn.RMSNorm(over * WIDTH, eps=1e-6, dtype=dtype).requires_grad_(False)
    norm.weight.uniform_(0.5, 1.5)
    cos, sin = tables()
    exact = nn.functional.rms_norm(
        values.view(2, TOKENS, -1, over * WIDTH).double(),
        (over * WIDTH,),
        norm.weight.double(),
        norm.eps,
    ).view(2, TOKENS, HEADS, WIDTH)
    exact = apply_rotary_emb(exact.float(), (cos, sin), sequence_dim=1)
    given = values if dtype is torch.float32 else values.view(torch.int32)
    found = norm_rotate(given, norm, cos[:, None], sin[:, None])
    assert found.dtype is dtype
    rounding = 2**-8 if dtype is torch.bfloat16 else 1e-6
    assert torch.allclose(found.float(), exact, rtol=rounding, atol=1e-6)


def test_self_attention_of_wan_differs_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    attn = wan_attention()
    hidden = torch.randn(2, TOKENS, HEADS * WIDTH, dtype=torch.bfloat16)
    rotary = tuple(table[None, :, None] for table in tables())
    exact = copy.deepcopy(attn).float()(hidden.float(), rotary_emb=rotary)
    own = attn(hidden, rotary_emb=rotary)
    monkeypatch.setattr(processors, "_is_known", processors._is_plain)
    set_processors(attn)
    fast = attn(hidden, rotary_emb=rotary)
    assert not torch.equal(fast, own)
    assert distance(fast, exact) <= 1.1 * distance(own, exact)


def test_what_is_not_known_is_diffusers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(processors, "_is_known", processors._is_plain)
    attn = wan_attention()
    hidden, text = (torch.randn(2, n, HEADS * WIDTH, dtype=torch.bfloat16) for n in (TOKENS, 5))
    expected = attn(hidden, text)
    set_processors(attn)
    assert torch.equal(attn(hidden, text), expected)

    class Mine(WanAttnProcessor):  # type: ignore[misc]
        pass

    attn.processor = mine = Mine()
    set_processors(attn)
    assert attn.processor is mine


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_norms_in_float32_are_diffusers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(processors, "_is_known", processors._is_plain)
    attn = wan_attention()
    attn.norm_q.float()
    hidden = torch.randn(2, TOKENS, HEADS * WIDTH, dtype=torch.bfloat16)
    rotary = tuple(table[None, :, None] for table in tables())
    expected = attn(hidden, rotary_emb=rotary)
    set_processors(attn)
    assert torch.equal(attn(hidden, rotary_emb=rotary), expected)


def wan_attention() -> Any:
    attn = WanAttention(HEADS * WIDTH, HEADS, WIDTH, processor=WanAttnProcessor())
    for norm in (attn.norm_q, attn.norm_k):
        norm.weight.data.uniform_(0.5, 1.5)
    return attn.bfloat16().eval().requires_grad_(False)


def distance(found: Tensor, reference: Tensor) -> float:
    return float((found.float() - reference.float()).norm() / reference.float().norm())
