"""Which layers of a block are quantised: those that multiply tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ddit_rt.blocks.linears import linear_calls
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.base import BlockType
from ddit_rt.models.quantised import is_quantised, quantise, quantises_rows

_STEP = 16
"""The widths of a product in 8 bits are multiples of this."""


def quantise_blocks(transformer: nn.Module, block_types: Sequence[BlockType], kind: str) -> None:
    """Quantises a model's blocks in place: the linear layers that multiply tokens.

    Layers that see one row a sample, such as those that make the modulation, stay: there is
    nothing to gain, and GPUs have no product in 8 bits of so few rows.

    Args:
        transformer: The user's model.
        block_types: Its repeated blocks.
        kind: One of `QUANTIZATIONS`.

    Raises:
        UnsupportedModelError: No layer of the blocks can be quantised.
    """
    layers: list[nn.Linear] = []
    for block_type in block_types:
        blocks = block_type.blocks(transformer)
        of_tokens, _ = _layers(block_type, blocks[0])
        for one in (block.get_submodule(path) for block in blocks for path in of_tokens):
            assert isinstance(one, nn.Linear)
            if not (one.in_features % _STEP or one.out_features % _STEP):
                layers.append(one)
    if not layers:
        raise UnsupportedModelError(
            f"got quantization={kind!r} for a {type(transformer).__name__} whose blocks have no "
            f"layer that it fits: widths must be multiples of {_STEP}; leave it out"
        )
    # Blocks that are called in two ways are there twice.
    quantise([one for one in dict.fromkeys(layers) if not is_quantised(one.weight)], kind)


def check_rows(block_type: BlockType, block: nn.Module) -> None:
    """Refuses a block for CUDA with a product in 8 bits of one row a sample, which CUDA lacks.

    Raises:
        UnsupportedModelError: It has one; by name.
    """
    weights = (getattr(module, "weight", None) for module in block.modules())
    if not any(isinstance(one, Tensor) and is_quantised(one) for one in weights):
        return
    _, of_samples = _layers(block_type, block)
    for path in of_samples:
        weight = block.get_submodule(path).weight
        if isinstance(weight, Tensor) and is_quantised(weight) and quantises_rows(weight):
            raise UnsupportedModelError(
                f"{block_type.name}.{path} is quantised with its inputs, and has one row of them a "
                "sample, too few for a product in 8 bits on CUDA: name it in "
                f'modules_to_not_convert ("{path}"), or load the model in bfloat16 and pass '
                "quantization= to compile, which leaves such layers out"
            )


def _layers(block_type: BlockType, block: nn.Module) -> tuple[list[str], list[str]]:
    """Paths of the linear layers that see tokens, and of the others."""
    of_tokens = {call.path: call.of_tokens for call in linear_calls(block_type, block)}
    first, second = (
        [path for path, one in of_tokens.items() if one is wanted] for wanted in (True, False)
    )
    return first, second
