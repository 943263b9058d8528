"""Attention whose norm and rotary embedding touch queries and keys once.

Taken apart as diffusers does, by strides of two, each channel of a rotated pair is a load of its
own. In bfloat16 these processors compute the same from 32-bit words of two channels, for code on
CUDA (measured on an H200, kernel by kernel: `docs/gpu.md`); in float32 they call the op
`ddit_rt::norm_rotate`, for code on a CPU. So they do where code is generated from a trace;
elsewhere, and for what they do not know, they call diffusers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddit_rt import ops

Rotary = tuple[Tensor, Tensor]


def set_processors(block: nn.Module) -> None:
    """Gives the attention layers of a block that is to be compiled processors of this file.

    Args:
        block: A copy of a model's block; processors of other classes stay.
    """
    for module in block.modules():
        own = getattr(module, "processor", None)
        if own is not None and (made := _PROCESSORS.get(type(own).__name__)):
            module.processor = made(own)


class _Processor:
    """In the place of a processor of diffusers, which it calls for what it does not know.

    Args:
        own: That processor.
    """

    def __init__(self, own: Any) -> None:
        self._own = own


class FluxProcessor(_Processor):
    """In the place of a `FluxAttnProcessor`; RMS norm is over each head."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Any:
        """Image tokens, or text and image tokens in one; with text apart, both.

        Args:
            attn: A `FluxAttention`.
            hidden_states: Image tokens, `[B, n, d]`.
            encoder_hidden_states: Text tokens, `[B, T, d]`.
            attention_mask: As diffusers takes it.
            image_rotary_emb: Tables of text, then image, each `[T + n, head width]`.
        """
        hidden, text = hidden_states, encoder_hidden_states
        known = attention_mask is None and image_rotary_emb is not None
        if not (known and _is_known(attn, hidden)):
            return self._own(attn, hidden, text, attention_mask, image_rotary_emb)
        assert image_rotary_emb is not None
        cos, sin = (table[:, None] for table in image_rotary_emb)
        width = attn.head_dim
        query, key = (_projected(layer, hidden, width) for layer in (attn.to_q, attn.to_k))
        value = _heads(attn.to_v(hidden), width)
        if text is None:
            query = norm_rotate(query, attn.norm_q, cos, sin)
            key = norm_rotate(key, attn.norm_k, cos, sin)
            return _attend(query, key, value)
        count = text.shape[1]
        text_query, text_key = (
            _projected(layer, text, width) for layer in (attn.add_q_proj, attn.add_k_proj)
        )
        text_value = _heads(attn.add_v_proj(text), width)
        query, key = (
            torch.cat(
                (
                    norm_rotate(of_text, text_norm, cos[:count], sin[:count]),
                    norm_rotate(of_image, norm, cos[count:], sin[count:]),
                ),
                dim=1,
            )
            for of_text, of_image, text_norm, norm in (
                (text_query, query, attn.norm_added_q, attn.norm_q),
                (text_key, key, attn.norm_added_k, attn.norm_k),
            )
        )
        attended = _attend(query, key, torch.cat((text_value, value), dim=1))
        out: Tensor = attended[:, count:]
        for layer in attn.to_out:
            out = layer(out)
        return out, attn.to_add_out(attended[:, :count])


class WanProcessor(_Processor):
    """In the place of a `WanAttnProcessor`; RMS norm is over all heads together."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """Self-attention of a video's tokens; cross-attention has no positions and is diffusers'.

        Args:
            attn: A `WanAttention`.
            hidden_states: `[B, n, d]`.
            encoder_hidden_states: Text and image tokens of cross-attention.
            attention_mask: As diffusers takes it.
            rotary_emb: Tables, each `[1, n, 1, head width]`.
        """
        hidden = hidden_states
        known = encoder_hidden_states is None and attention_mask is None and rotary_emb is not None
        if not (known and _is_known(attn, hidden)):
            given = (attn, hidden, encoder_hidden_states, attention_mask, rotary_emb)
            result: Tensor = self._own(*given)
            return result
        assert rotary_emb is not None
        cos, sin = rotary_emb
        width = cos.shape[-1]
        query, key = (
            norm_rotate(_projected(layer, hidden, width), norm, cos, sin)
            for layer, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
        )
        out = _attend(query, key, _heads(attn.to_v(hidden), width))
        for layer in attn.to_out:
            out = layer(out)
        return out


_PROCESSORS: Mapping[str, Callable[[Any], Any]] = {
    "FluxAttnProcessor": FluxProcessor,
    "WanAttnProcessor": WanProcessor,
}


def norm_rotate(heads: Tensor, norm: Any, cos: Tensor, sin: Tensor) -> Tensor:
    """RMS norm over each head or all heads, as the weight is wide, then the rotary embedding.

    Args:
        heads: `[B, n, heads, width]` in float32, or bfloat16 as int32 words and half as wide.
        norm: An RMS norm with a weight of the same dtype and no bias.
        cos: float32, `[..., n, 1, width]`; the two channels of a pair have the same.
        sin: As `cos`.

    Returns:
        `[B, n, heads, width]`, of the norm's dtype.
    """
    if heads.dtype is torch.float32:
        cos, sin = (table.flatten(0, -2) for table in (cos, sin))
        return ops.norm_rotate(heads, norm.weight, cos, sin, norm.eps)
    values = heads if norm.weight.shape[-1] == cos.shape[-1] else heads.flatten(2)
    even, odd = _halves(values)
    mean = (even.square() + odd.square()).mean(-1, keepdim=True) / 2
    scale = torch.rsqrt(mean + norm.eps)
    even_weight, odd_weight = _halves(norm.weight)
    even, odd = (
        (half * scale * weight).view(heads.shape)
        for half, weight in ((even, even_weight), (odd, odd_weight))
    )
    cos, sin = cos[..., ::2], sin[..., ::2]
    return _words(even * cos - odd * sin, odd * cos + even * sin)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 `[..., w]`, or such words, to float32: channels 0, 2, ... and 1, 3, ...

    Each is `[..., w / 2]`.

    A bfloat16 is the upper half of a float32, and the first of two lies in a word's lower half.
    """
    words = values if values.dtype is torch.int32 else values.view(torch.int32)
    return (words << 16).view(torch.float32), (words & -65536).view(torch.float32)


def _words(even: Tensor, odd: Tensor) -> Tensor:
    """The inverse of `_halves`, rounded to bfloat16."""
    lower, upper = (half.bfloat16().view(torch.int16).to(torch.int32) for half in (even, odd))
    return ((lower & 0xFFFF) | (upper << 16)).view(torch.bfloat16)


def _projected(layer: Any, tokens: Tensor, width: int) -> Tensor:
    """What a linear layer makes of tokens, by heads: `[B, n, heads, width]`, or words of that.

    One product of several layers is read so as a whole: generated code would copy a part first.
    """
    if tokens.dtype is torch.float32:
        return _heads(layer(tokens), width)
    own = getattr(layer, "words", None)
    return _heads(layer(tokens).view(torch.int32) if own is None else own(tokens), width // 2)


def _heads(tokens: Tensor, width: int) -> Tensor:
    return tokens.view(*tokens.shape[:-1], -1, width)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`[B, n, heads, width]` each, to `[B, n, heads * width]`."""
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _is_known(attn: Any, tensor: Tensor) -> bool:
    """Whether code is being generated, of layers apart and all in the dtype for the device."""
    dtype = torch.bfloat16 if tensor.is_cuda else torch.float32
    is_generated = tensor.dtype is dtype and torch.compiler.is_exporting()
    return is_generated and not attn.fused_projections and _is_plain(attn, tensor)


def _is_plain(attn: Any, tensor: Tensor) -> bool:
    """Norms may have no weight, or be kept in float32, whose channels are words already."""
    names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    norms = [norm for name in names if (norm := getattr(attn, name, None)) is not None]
    weights = [getattr(norm, "weight", None) for norm in norms]
    return all(weight is not None and weight.dtype is tensor.dtype for weight in weights)
