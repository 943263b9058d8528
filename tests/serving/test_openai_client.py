"""The official client against a real server, unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from served import picture, running, tiny_engine

KEY = "sk-tiny-1"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(tiny_engine(), keys=("sk-other", KEY)) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_a_picture(client: openai.OpenAI) -> None:
    own = {"num_inference_steps": 4, "patch_policy": "2p:0.5,p", "seed": 3, "return_trace": True}
    made = client.images.generate(prompt="a fox", model="tiny", size="96x64", n=2, extra_body=own)
    assert made.data is not None
    assert [picture(one.model_dump()).size for one in made.data] == [(96, 64)] * 2
    extra = made.data[1].model_extra
    assert extra is not None
    assert extra["seed"] == 4
    assert [step["patch_size"] for step in extra["trace"]["steps"]] == ["2p", "2p", "p", "p"]


def test_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_are_the_clients_own_classes(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError, match="WIDTHxHEIGHT") as bad:
        client.images.generate(prompt="a fox", size="large")
    assert (bad.value.param, bad.value.type) == ("size", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt="a fox", model="dall-e-3")
    assert missing.value.code == "model_not_found"
    for key in ("sk-tiny", f"{KEY}1", "k"):
        other = client.with_options(api_key=key)
        with pytest.raises(openai.AuthenticationError, match="no valid API key"):
            other.models.list()
