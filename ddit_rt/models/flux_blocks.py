"""FLUX's two blocks in the form that is compiled: diffusers' result in fewer passes over memory.

Three differences from diffusers' own `forward`, none of them in what is computed:

- The modulation of every block depends on the time and the prompt alone. `modulations` makes that
  of all blocks, so that a run makes it once for all of its steps: at one row each, these layers
  (27 % of the weights of FLUX.1-dev) are nothing but a walk through memory.
- A single-stream block takes and returns text and image as the one sequence that it works on.
- On CUDA a product with each half of `proj_out` spares their concatenation; run eagerly that would
  be slower, so it is only for code that is generated from a trace.

What else is done for CUDA is every model's: `processors.py`, and GELU in `blocks/rewrites.py`.
Measured on an H200, kernel by kernel: `docs/gpu.md`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_CHUNKS = 3
"""What comes before the blocks' modulation, in widths d: the time, and the output norm's two."""
DOUBLE_CHUNKS = 12
"""Modulation of a double-stream block, in widths d: of image and text, twice shift, scale, gate."""
SINGLE_CHUNKS = 3

PASSED_BY = {
    "FluxTransformerBlock": ("", "norm1", "norm1_context"),
    "FluxSingleTransformerBlock": ("", "norm", "proj_out"),
}
"""Modules of a block whose own `forward` is not called here, or not always; "" for the block's."""


def modulations(transformer: Any, temb: Tensor) -> Tensor:
    """All that hangs on the time: itself, and the modulation of the output norm and of all blocks.

    Args:
        transformer: A `FluxTransformer2DModel`.
        temb: Embedded time, guidance and pooled prompt, `[N, d]`.

    Returns:
        `[N, m]`: the time; scale and shift of the output norm; of the blocks in the order in which
        they run, 12 d for each double-stream block and 3 d for each single-stream one.
    """
    norms = [transformer.norm_out]
    for block in transformer.transformer_blocks:
        norms += [block.norm1, block.norm1_context]
    norms += [block.norm for block in transformer.single_transformer_blocks]
    return torch.cat([temb, *(norm.linear(norm.silu(temb)) for norm in norms)], dim=-1)


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
    attended, attended_text = block.attn(
        hidden_states=block.norm1.norm(hidden) * (1 + scale) + shift,
        encoder_hidden_states=block.norm1_context.norm(text) * (1 + text_scale) + text_shift,
        image_rotary_emb=(cos, sin),
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
    attended = block.attn(hidden_states=normed, image_rotary_emb=(cos, sin))
    wide = block.act_mlp(block.proj_mlp(normed))
    if _plain(block.proj_out) and _for_cuda(joint):
        width = attended.shape[-1]
        weight, bias = block.proj_out.weight, block.proj_out.bias
        out = F.linear(attended, weight[:, :width], bias) + F.linear(wide, weight[:, width:])
    else:
        out = block.proj_out(torch.cat([attended, wide], dim=2))
    return (_in_range(joint + gate * out),)


def _rows(modulation: Tensor, count: int) -> tuple[Tensor, ...]:
    """`[B, count d]` to `count` times `[B, 1, d]`."""
    return modulation.unsqueeze(1).chunk(count, dim=-1)


def _feed_forward(norm: Any, layers: Any, hidden: Tensor, mlp: list[Tensor]) -> Tensor:
    shift, scale, gate = mlp
    out: Tensor = layers(norm(hidden) * (1 + scale) + shift)
    return hidden + gate * out


def _for_cuda(tensor: Tensor) -> bool:
    """Whether code for CUDA is being generated."""
    return tensor.is_cuda and torch.compiler.is_exporting()


def _plain(layer: Any) -> bool:
    """Whether nothing but its weight and bias makes up a layer: no LoRA beside it."""
    return type(layer) is nn.Linear and layer.bias is not None


def _in_range(tokens: Tensor) -> Tensor:
    """Where half precision would overflow, its bounds, as diffusers has it."""
    return tokens.clip(-65504, 65504) if tokens.dtype is torch.float16 else tokens
