"""Constants that packages are bound to."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ddit_rt.blocks.constants import _let_go


def test_storage_is_given_back_while_another_block_is_traced() -> None:
    alias = torch.ones(16)
    with FakeTensorMode():
        _let_go([alias])
    assert alias.numel() == 0
