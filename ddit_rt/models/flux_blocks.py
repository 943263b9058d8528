"""FLUX's two blocks in the form that is compiled: diffusers' result in fewer passes over memory.

Four differences from diffusers' own `forward`, none of them in what is computed:

- The modulation of every block depends on the time and the prompt alone. `modulations` makes that
  of all blocks, so that a run makes it once for all of its steps: at one row each, these layers
  (27 % of the weights of FLUX.1-dev) are nothing but a walk through memory.
- A single-stream block takes and returns text and image as the one sequence that it works on.
- On CUDA, GELU is the last part of the matrix product before it, and a product with each half of
  `proj_out` spares their concatenation.
- On CUDA in bfloat16, RMS norm and rotary embedding read and write a rotated pair of channels as
  one 32-bit word. Taken apart as diffusers does, by strides of two, a channel is a load of 16 bits.

The last two are only for code that is generated from a trace: run eagerly they would be slower.
Measured on an H200, kernel by kernel: `docs/gpu.md`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOUBLE_CHUNKS = 12
"""Modulation of a double-stream block, in widths d: of image and text, twice shift, scale, gate."""
SINGLE_CHUNKS = 3


PASSED_BY = {
    "FluxTransformerBlock": (
        *("", "norm1", "norm1_context", "attn"),
        *("ff", "ff.net.0", "ff_context", "ff_context.net.0"),
    ),
    "FluxSingleTransformerBlock": ("", "norm", "attn", "proj_mlp", "act_mlp", "proj_out"),
}
"""Modules of a block whose own `forward` is not called here, or not always; "" for the block's."""


def modulations(transformer: Any, temb: Tensor) -> Tensor:
    """Modulation of all blocks, in the order in which they run.

    Args:
        transformer: A `FluxTransformer2DModel`.
        temb: Embedded time, guidance and pooled prompt, `[N, d]`.

    Returns:
        `[N, m]`; m is 12 d for each double-stream block and 3 d for each single-stream one.
    """
    norms = [
        norm
        for block in transformer.transformer_blocks
        for norm in (block.norm1, block.norm1_context)
    ]
    norms += [block.norm for block in transformer.single_transformer_blocks]
    rows = [norm.linear(norm.silu(temb)) for norm in norms]
    return torch.cat(rows, dim=-1) if rows else temb[:, :0]


def double(
    block: Any, hidden: Tensor, text: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    """`FluxTransformerBlock`.

    Args:
        block: The block.
        hidden: Image tokens, `[B, n, d]`.
        text: Text tokens, `[B, T, d]`.
        modulation: `[B, 12 d]`.
        cos: Rotary tables of text, then image, `[T + n, head width]`.
        sin: As `cos`.

    Returns:
        Text and image tokens.
    """
    of_image, of_text = modulation.chunk(2, dim=-1)
    shift, scale, gate, *image_mlp = _rows(of_image, 6)
    text_shift, text_scale, text_gate, *text_mlp = _rows(of_text, 6)
    attended, attended_text = _attention(
        block.attn,
        block.norm1.norm(hidden) * (1 + scale) + shift,
        block.norm1_context.norm(text) * (1 + text_scale) + text_shift,
        cos,
        sin,
    )
    hidden = _feed_forward(block.norm2, block.ff, hidden + gate * attended, image_mlp)
    text = _feed_forward(
        block.norm2_context, block.ff_context, text + text_gate * attended_text, text_mlp
    )
    return _in_range(text), hidden


def single(
    block: Any, joint: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    """`FluxSingleTransformerBlock`, on text and image as one sequence.

    Args:
        block: The block.
        joint: Text, then image tokens, `[B, T + n, d]`.
        modulation: `[B, 3 d]`.
        cos: As of `double`.
        sin: As of `double`.
    """
    shift, scale, gate = _rows(modulation, 3)
    normed = block.norm.norm(joint) * (1 + scale) + shift
    attended = _attention(block.attn, normed, None, cos, sin)
    plain = _plain(block.proj_mlp) and _plain(block.proj_out) and _by_tanh(block.act_mlp)
    if plain and _for_cuda(joint):
        wide = _linear_gelu(block.proj_mlp, normed)
        width = attended.shape[-1]
        weight, bias = block.proj_out.weight, block.proj_out.bias
        out = F.linear(attended, weight[:, :width], bias) + F.linear(wide, weight[:, width:])
    else:
        wide = block.act_mlp(block.proj_mlp(normed))
        out = block.proj_out(torch.cat([attended, wide], dim=2))
    return (_in_range(joint + gate * out),)


def _rows(modulation: Tensor, count: int) -> tuple[Tensor, ...]:
    """`[B, count d]` to `count` times `[B, 1, d]`."""
    return modulation.unsqueeze(1).chunk(count, dim=-1)


def _feed_forward(norm: Any, layers: Any, hidden: Tensor, mlp: list[Tensor]) -> Tensor:
    shift, scale, gate = mlp
    normed = norm(hidden) * (1 + scale) + shift
    widen, *others = layers.net
    if _for_cuda(hidden) and _by_tanh(widen) and _plain(widen.proj):
        out = _linear_gelu(widen.proj, normed)
        for layer in others:
            out = layer(out)
    else:
        out = layers(normed)
    return hidden + gate * out


def _attention(attn: Any, hidden: Tensor, text: Tensor | None, cos: Tensor, sin: Tensor) -> Any:
    """`FluxAttention`: image tokens, or text and image tokens in one; with text apart, both."""
    own = type(attn.processor).__name__ == "FluxAttnProcessor" and not attn.fused_projections
    if not (own and _for_cuda(hidden) and hidden.dtype is torch.bfloat16):
        return attn(hidden_states=hidden, encoder_hidden_states=text, image_rotary_emb=(cos, sin))
    query, key, value = (_heads(layer(hidden), attn) for layer in (attn.to_q, attn.to_k, attn.to_v))
    if text is None:
        query = norm_rotate(query, attn.norm_q, cos, sin)
        key = norm_rotate(key, attn.norm_k, cos, sin)
        return _attend(query, key, value)
    count = text.shape[1]
    layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    text_query, text_key, text_value = (_heads(layer(text), attn) for layer in layers)
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


def norm_rotate(heads: Tensor, norm: Any, cos: Tensor, sin: Tensor) -> Tensor:
    """RMS norm over a head, then the rotary embedding, by 32-bit words.

    Args:
        heads: `[B, n, heads, width]`, bfloat16, contiguous.
        norm: diffusers' `RMSNorm`, with a weight in bfloat16 and no bias.
        cos: `[n, width]`, float32; the two channels of a pair have the same.
        sin: As `cos`.
    """
    even, odd = _halves(heads)
    mean = (even.square() + odd.square()).mean(-1, keepdim=True) / 2
    scale = torch.rsqrt(mean + norm.eps)
    even_weight, odd_weight = _halves(norm.weight)
    even, odd = even * scale * even_weight, odd * scale * odd_weight
    cos, sin = cos[:, None, ::2], sin[:, None, ::2]
    return _words(even * cos - odd * sin, odd * cos + even * sin)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 `[..., w]` to float32: channels 0, 2, ... and 1, 3, ..., each `[..., w / 2]`.

    A bfloat16 is the upper half of a float32, and the first of two lies in a word's lower half.
    """
    words = values.view(torch.int32)
    return (words << 16).view(torch.float32), (words & -65536).view(torch.float32)


def _words(even: Tensor, odd: Tensor) -> Tensor:
    """The inverse of `_halves`, rounded to bfloat16."""
    lower, upper = (half.bfloat16().view(torch.int16).to(torch.int32) for half in (even, odd))
    return ((lower & 0xFFFF) | (upper << 16)).view(torch.bfloat16)


def _heads(tokens: Tensor, attn: Any) -> Tensor:
    return tokens.view(*tokens.shape[:-1], -1, attn.head_dim)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`[B, n, heads, width]` each, to `[B, n, heads * width]`."""
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _linear_gelu(layer: nn.Linear, values: Tensor) -> Tensor:
    """GELU, approximated by tanh, of a linear layer, as one matrix product."""
    out: Tensor = torch.ops.aten._addmm_activation(
        layer.bias, values.flatten(0, -2), layer.weight.t(), use_gelu=True
    )
    return out.view(*values.shape[:-1], -1)


def _for_cuda(tensor: Tensor) -> bool:
    """Whether code for CUDA is being generated."""
    return tensor.is_cuda and torch.compiler.is_exporting()


def _by_tanh(activation: Any) -> bool:
    """Whether it is GELU as the matrix product has it: torch's, or diffusers' with its layer."""
    return type(activation).__name__ == "GELU" and activation.approximate == "tanh"


def _plain(layer: Any) -> bool:
    """Whether nothing but its weight and bias makes up a layer: no LoRA beside it."""
    return type(layer) is nn.Linear and layer.bias is not None


def _in_range(tokens: Tensor) -> Tensor:
    """Where half precision would overflow, its bounds, as diffusers has it."""
    return tokens.clip(-65504, 65504) if tokens.dtype is torch.float16 else tokens
