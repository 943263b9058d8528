"""A stream shows every step as it is taken, and ends with the picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from served import ASKED, PATH, Held, picture, running, tiny_engine

from ddit_rt import Engine
from ddit_rt.serving.preview import LatentToRgb

STREAM = {**ASKED, "num_inference_steps": 4, "patch_policy": "2p:0.5,p", "stream": True}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with running(engine) as url:
        yield url


def events(url: str, asked: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    answer = httpx.post(url + PATH, json=asked, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    found = []
    for block in answer.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_every_step_comes_with_its_size_and_a_preview_and_then_the_picture(url: str) -> None:
    *steps, (last, whole) = events(url, {**STREAM, "return_trace": True})
    assert {kind for kind, _ in steps} == {"image_generation.partial_image"}
    assert [event["step"] for _, event in steps] == [0, 1, 2, 3]
    assert [event["patch_size"] for _, event in steps] == ["2p", "2p", "p", "p"]
    assert {picture(event).size for _, event in steps} == {(16, 16)}
    assert last == "image_generation.completed"
    plain = httpx.post(url + PATH, json={**STREAM, "stream": False}, timeout=60).json()
    assert whole["b64_json"] == plain["data"][0]["b64_json"]
    assert whole["size"] == "64x64"
    assert len(whole["trace"]["steps"]) == 4


@pytest.mark.parametrize(("count", "steps"), [(0, []), (1, [2]), (2, [1, 2]), (3, [1, 2, 3])])
def test_as_many_previews_come_as_are_asked_for(url: str, count: int, steps: list[int]) -> None:
    *partial, _ = events(url, {**STREAM, "partial_images": count})
    assert [event["step"] for _, event in partial] == steps


def test_the_official_client_reads_it(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        stream = client.images.generate(
            prompt="a fox", stream=True, partial_images=2, extra_body={"num_inference_steps": 4}
        )
        kinds = [event.type for event in stream]
    partial = "image_generation.partial_image"
    assert kinds == [partial, partial, "image_generation.completed"]


def test_what_cannot_be_streamed_is_refused_before_it_begins(url: str) -> None:
    for change, param in (({"n": 2}, "n"), ({"stream": False, "partial_images": 1}, None)):
        answer = httpx.post(url + PATH, json={**STREAM, **change})
        assert answer.status_code == 400
        assert param is None or answer.json()["error"]["param"] == param


def test_an_error_on_the_way_is_an_event(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("inside")

    monkeypatch.setattr(Engine, "__call__", fail)
    ((kind, data),) = events(url, STREAM)
    assert kind == "error"
    assert data["error"]["message"] == "internal error"


def test_a_reader_that_leaves_ends_the_run(
    url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(engine, monkeypatch)
    with httpx.stream("POST", url + PATH, json=STREAM, timeout=60):
        assert held.running.wait(60)
    (call,) = held.calls  # goes on only because its watch says stop
    while not call["watch"].stopped():
        held.go.wait(0.01)
    held.go.set()
    monkeypatch.undo()
    assert len(events(url, STREAM)) == 5


def test_a_linear_picture_is_fitted_exactly() -> None:
    torch.manual_seed(0)
    latents, weights = torch.rand(4, 12, 10), torch.rand(4, 3) * 60
    colours = (torch.einsum("chw,ck->hwk", latents, weights)).round().to(torch.uint8).numpy()
    convert = LatentToRgb(latents, Image.fromarray(colours))
    near = np.abs(np.asarray(convert(latents), int) - colours)
    assert near.max() <= 1  # colours were rounded before the fit
