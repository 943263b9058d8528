"""Videos as jobs: asked for, looked up, fetched, cancelled, deleted."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import av
import httpx
import openai
import pytest
from served import Held, running, video_engine

from ddit_rt import Engine

ASKED: dict[str, Any] = {"prompt": "a cat", "size": "128x64", "num_frames": 9, "seed": 1}
ASKED |= {"num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return video_engine()


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with running(engine, call={"max_sequence_length": 12}) as url:
        yield url


def finished(url: str, name: str) -> dict[str, Any]:
    while True:
        entry: dict[str, Any] = httpx.get(f"{url}/v1/videos/{name}").json()
        if entry["status"] in ("completed", "failed"):
            return entry


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_the_official_client_makes_fetches_and_deletes_one(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        own = {key: ASKED[key] for key in ("num_inference_steps", "guidance_scale", "num_frames")}
        video: Any = client.videos.create(prompt="a cat", size="128x64", extra_body=own)
        assert video.status in ("queued", "in_progress")
        assert finished(url, video.id)["error"] is None
        assert client.videos.retrieve(video.id).progress == 100
        with av.open(io.BytesIO(client.videos.download_content(video.id).read())) as file:
            frames = list(file.decode(video=0))
        assert (len(frames), frames[0].width, frames[0].height) == (9, 128, 64)
        assert video.id in [one.id for one in client.videos.list()]
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)


def test_one_can_be_cancelled_while_it_waits_or_runs(
    url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(engine, monkeypatch)
    runs, waits = (httpx.post(f"{url}/v1/videos", json=ASKED).json()["id"] for _ in range(2))
    assert held.running.wait(60)
    early = httpx.get(f"{url}/v1/videos/{runs}/content")
    assert (early.status_code, early.json()["error"]["code"]) == (400, "not_completed")
    for name in (waits, runs):
        assert httpx.post(f"{url}/v1/videos/{name}/cancel").status_code == 200
    held.go.set()
    for name in (waits, runs):
        assert finished(url, name)["error"]["code"] == "cancelled"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_frames": 500}, "at most 241"),
        ({"seconds": -1}, "greater than 0"),
        ({"seconds": 9e307}, "less than or equal to 86400"),
        ({"seconds": 86_400, "num_frames": None}, "at most 241"),
        ({"seconds": 1}, "give one of them"),
        ({"size": "big"}, "WIDTHxHEIGHT"),
        ({"n": 2}, "not permitted"),
    ],
    ids=str,
)
def test_what_cannot_be_made_is_refused(url: str, change: dict[str, Any], said: str) -> None:
    answer = httpx.post(f"{url}/v1/videos", json={**ASKED, **change})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_pictures_are_not_found_at_a_model_of_videos(url: str) -> None:
    assert httpx.post(f"{url}/v1/images/generations", json=ASKED).status_code == 404
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", ""), ("POST", "/cancel")):
        assert httpx.request(method, f"{url}/v1/videos/video_0{path}").status_code == 404


def test_a_picture_is_refused_by_a_model_that_takes_none(url: str) -> None:
    fields = {name: str(value) for name, value in ASKED.items()}
    files = {"input_reference": ("a.png", b"\x89PNG")}
    answer = httpx.post(f"{url}/v1/videos", data=fields, files=files)
    assert answer.status_code == 400
    assert "takes no image" in answer.json()["error"]["message"]
