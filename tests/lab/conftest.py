from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny_embeds, tiny_pipeline

import ddit_rt
from ddit_rt import Engine


@pytest.fixture(scope="session")
def engine() -> Engine:
    """An eager engine of a tiny pipeline that takes every prompt for the same one."""
    pipeline, one = tiny_pipeline(), tiny_embeds()

    def encode_prompt(prompt: list[str], **_: Any) -> tuple[torch.Tensor, ...]:
        embeds = {name: value.repeat_interleave(len(prompt), 0) for name, value in one.items()}
        return embeds["prompt_embeds"], embeds["pooled_prompt_embeds"], torch.zeros(7, 3)

    pipeline.encode_prompt = encode_prompt
    return ddit_rt.compile(
        pipeline,
        height=32,
        width=32,
        patch_sizes=("p", "2p"),
        backend="eager",
        progress=False,
    )
