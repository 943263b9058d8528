"""Pseudo-inverse resize: the identities that define it."""

import pytest
import torch
from models import noise

from ddit_rt.adapters.resize import bilinear_matrix, resize_embedding, resize_projection


@pytest.mark.parametrize("new_patch", [4, 8])
def test_embedding_of_a_resized_patch_is_the_embedding_of_the_patch(new_patch):
    weight, patch = noise(6, 3 * 4).double(), noise(3, 4, seed=1).double()
    larger = patch @ bilinear_matrix(2, new_patch).T
    resized = resize_embedding(weight, 2, new_patch)
    torch.testing.assert_close(resized @ larger.flatten(), weight @ patch.flatten())


@pytest.mark.parametrize("new_patch", [4, 8])
def test_projection_writes_the_resized_patch(new_patch):
    weight, hidden = noise(3 * 4, 6).double(), noise(6, seed=1).double()
    patch = (weight @ hidden).reshape(3, 1, 2, 2)
    expected = torch.nn.functional.interpolate(patch, size=(new_patch, new_patch), mode="bilinear")
    resized = resize_projection(weight, 2, new_patch)
    torch.testing.assert_close(resized @ hidden, expected.flatten())


def test_same_size_is_the_identity():
    weight = noise(6, 12)
    torch.testing.assert_close(resize_embedding(weight, 2, 2), weight)
    torch.testing.assert_close(resize_projection(weight.T, 2, 2), weight.T)
