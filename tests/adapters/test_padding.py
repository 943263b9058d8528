"""Latents that an adapter's patches do not divide."""

from __future__ import annotations

import pytest
import torch
from models import noise

from ddit_rt import ops
from ddit_rt.adapters import pack_padded, unpack_cut


def test_where_patches_divide_nothing_is_padded() -> None:
    latents = noise(2, 3, 8, 12)
    tokens = pack_padded(latents, 4)
    assert torch.equal(tokens, ops.pack(latents, 4))
    assert torch.equal(unpack_cut(tokens, 4, 8, 12), latents)


def test_what_lies_beyond_an_edge_is_mirrored_worked_by_hand() -> None:
    latents = torch.tensor([[0.0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]).reshape(1, 1, 2, 5)
    # One row of two patches of 4 x 4: 2 rows are mirrored to 4, and 5 columns to 8.
    tokens = pack_padded(latents, 4).reshape(2, 4, 4)
    assert tokens[0].tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [5, 6, 7, 8], [0, 1, 2, 3]]
    assert tokens[1].tolist() == [[4, 4, 3, 2], [9, 9, 8, 7], [9, 9, 8, 7], [4, 4, 3, 2]]


def test_latents_smaller_than_what_is_missing_are_mirrored_again() -> None:
    latents = torch.tensor([[1.0], [2.0]]).reshape(1, 1, 2, 1)
    tokens = pack_padded(latents, 8).reshape(8, 8)
    assert tokens[:, 0].tolist() == [1, 2, 2, 1, 1, 2, 2, 1]
    assert torch.equal(tokens, tokens[:, :1].expand(8, 8))


@pytest.mark.parametrize("size", [(18, 22), (2, 30), (6, 6)])
@pytest.mark.parametrize("patch", [4, 8])
def test_cutting_undoes_padding(size: tuple[int, int], patch: int) -> None:
    latents = noise(2, 3, *size)
    tokens = pack_padded(latents, patch)
    assert tokens.shape[1] == -(-size[0] // patch) * -(-size[1] // patch)
    assert torch.equal(unpack_cut(tokens, patch, *size), latents)
