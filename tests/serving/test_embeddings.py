"""Prompt embeddings are kept by all that enters them, within their bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_files import speaking_pipeline
from models import prompting_pipeline
from served import ASKED, PATH, client_of, tiny_engine

from ddit_rt.serving.embeddings import Embeddings
from ddit_rt.serving.metrics import Metrics

CPU = torch.device("cpu")


def counted(pipeline: Any, most: int = 10**6, state: Any = None) -> tuple[Embeddings, list[Any]]:
    calls: list[Any] = []
    own = pipeline.encode_prompt

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return own(*args, **kwargs)

    pipeline.encode_prompt = encode_prompt
    kept = Embeddings(pipeline, most, Metrics(lambda: 0, CPU), lambda: state and state[0])
    return kept, calls


def test_a_batch_gets_what_its_prompts_get_alone_and_each_is_encoded_once() -> None:
    pipeline = speaking_pipeline()
    call = {"prompt_2": None, "max_sequence_length": 16, "device": CPU}
    alone = [pipeline.encode_prompt(prompt=[text], **call) for text in ("a fox", "a hen")]
    whole = pipeline.encode_prompt(prompt=["a fox", "a hen", "a fox"], **call)
    _, calls = counted(pipeline)
    joined = pipeline.encode_prompt(prompt=["a fox", "a hen", "a fox"], **call)
    assert len(calls) == 2
    for place, (ours, theirs) in enumerate(zip(joined, whole, strict=True)):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        if place < 2:  # the third are positions, the same for all
            assert torch.equal(ours, torch.cat([alone[0][place], alone[1][place], alone[0][place]]))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a fox "},
        {"prompt_2": "a hen"},
        {"max_sequence_length": 8},
        {"num_images_per_prompt": 2},
        {"num_images_per_prompt": True},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_all_that_enters_is_in_the_key(change: dict[str, Any]) -> None:
    pipeline = prompting_pipeline()
    _, calls = counted(pipeline)
    call = {"prompt": "a fox", "prompt_2": None, "num_images_per_prompt": 1}
    for one in (call, call, {**call, **change}, call):
        pipeline.encode_prompt(**one)
    assert len(calls) == 2


def test_a_changed_text_encoder_is_another_key() -> None:
    pipeline, state = prompting_pipeline(), ["none"]
    _, calls = counted(pipeline, state=state)
    for state[0] in ("none", "style", "none", "style"):
        pipeline.encode_prompt(prompt="a fox")
    assert len(calls) == 2


def test_what_was_not_used_for_longest_makes_room() -> None:
    pipeline = prompting_pipeline()
    size = sum(tensor.nbytes for tensor in pipeline.encode_prompt(prompt="a"))
    kept, calls = counted(pipeline, most=2 * size)
    for prompt in ("a", "b", "a", "c", "a", "b"):
        pipeline.encode_prompt(prompt=prompt)
    assert [kwargs["prompt"] for _, kwargs in calls] == ["a", "b", "c", "b"]
    assert kept.held == 2 * size
    kept, calls = counted(prompting_pipeline(), most=size - 1)
    assert kept("a")[0].shape == kept("a")[0].shape
    assert (len(calls), kept.held) == (2, 0)


def test_tensors_have_no_key() -> None:
    pipeline = prompting_pipeline()
    _, calls = counted(pipeline)
    for _ in range(2):
        pipeline.encode_prompt(prompt="a fox", image=torch.zeros(3))
    assert len(calls) == 2


def test_a_server_keeps_them_and_counts_its_hits() -> None:
    with client_of(tiny_engine()) as client:
        first, second = (client.post(PATH, json=ASKED).json()["data"] for _ in range(2))
        assert first == second
        page = client.get("/metrics").text
    assert 'ddit_rt_prompt_embeddings_total{result="hit"} 2.0' in page  # the other is of warming up
