"""Pictures over HTTP: what is asked for is what the engine makes, and all else is refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from models import seeded
from served import ASKED, PATH, Held, client_of, picture, tiny_engine, until_waiting

from ddit_rt import Engine
from ddit_rt.errors import StallError


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with client_of(engine) as client:
        yield client


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    return body["error"]


def test_a_picture_is_the_engines_own(client: TestClient, engine: Engine) -> None:
    answer = client.post(PATH, json={**ASKED, "size": "96x64", "patch_policy": "2p:0.4,p"})
    assert answer.status_code == 200
    body = answer.json()
    assert body["size"] == "96x64"
    assert body["created"] > 0
    (entry,) = body["data"]
    call = {"width": 96, "height": 64, "num_inference_steps": 3, "patch_policy": "2p:0.4,p"}
    expected = engine("a fox", **call, generator=seeded(7)).images[0]
    assert np.array_equal(np.asarray(picture(entry)), np.asarray(expected))
    assert entry["seed"] == 7
    assert "trace" not in entry


def test_several_pictures_have_seeds_that_follow(client: TestClient) -> None:
    three = client.post(PATH, json={**ASKED, "n": 3}).json()["data"]
    assert [entry["seed"] for entry in three] == [7, 8, 9]
    last = client.post(PATH, json={**ASKED, "seed": 9}).json()["data"]
    near = np.abs(np.asarray(picture(last[0]), int) - np.asarray(picture(three[2]), int))
    assert near.max() <= 1  # fp32 in a batch of another size rounds otherwise


def test_a_seed_is_drawn_and_told_where_none_came(client: TestClient) -> None:
    asked = {name: value for name, value in ASKED.items() if name != "seed"}
    first, second = (client.post(PATH, json=asked).json()["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    again = client.post(PATH, json={**asked, "seed": first["seed"]}).json()["data"][0]
    assert again["b64_json"] == first["b64_json"]


def test_thresholds_of_a_request_act(client: TestClient) -> None:
    asked = {**ASKED, "num_inference_steps": 10, "patch_policy": {"tau": 1e9}}
    (entry,) = client.post(PATH, json={**asked, "return_trace": True}).json()["data"]
    assert "4p" in [step["patch_size"] for step in entry["trace"]["steps"]]


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_a_picture_comes_in_the_format_that_is_asked_for(
    client: TestClient, output_format: str
) -> None:
    answer = client.post(PATH, json={**ASKED, "output_format": output_format}).json()
    assert answer["output_format"] == output_format
    assert picture(answer["data"][0]).format == output_format.upper()


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"prompt": None}, "prompt", "string"),
        ({"size": "64"}, "size", "WIDTHxHEIGHT"),
        ({"size": "64x4"}, None, "smallest image"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": True}, "n", "integer"),
        ({"num_inference_steps": 1.5}, "num_inference_steps", "integer"),
        ({"guidance_scale": "high"}, "guidance_scale", "number"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**64}, "seed", "less than or equal"),
        ({"patch_policy": "fats"}, None, "did you mean 'fast'"),
        ({"patch_policy": "balanced"}, None, "calibration"),
        ({"patch_policy": 0.5}, None, "calibration"),
        ({"patch_policy": 2}, None, "between 0"),
        ({"patch_policy": "8p:0.5,p"}, None, "offer only"),
        ({"patch_policy": {"tau": -1}}, "patch_policy", "tau"),
        ({"patch_policy": {"tau": 1, "roh": 1}}, None, "not permitted"),
        ({"step_cache": "teacash:1"}, None, "did you mean"),
        ({"step_cache": "teacache:0.4"}, None, "fit"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"output_format": "gif"}, "output_format", "png"),
        ({"prompts": "a"}, "prompts", "not permitted"),
        ({"true_cfg_scale": 1e39}, None, "finite number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_run_is_refused_by_name(
    client: TestClient, change: dict[str, Any], param: str | None, said: str
) -> None:
    error = error_of(client.post(PATH, json={**ASKED, **change}), 400)
    assert error["type"] == "invalid_request_error"
    assert said in error["message"]
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"null", b'{"prompt": "\\ud800"}', b"[" * 10**5, b"\xff\xfe"]
)
def test_a_body_that_is_no_request_is_refused(client: TestClient, body: bytes) -> None:
    answer = client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    error_of(answer, 400)


def test_other_models_and_other_paths_are_not_found(client: TestClient) -> None:
    error = error_of(client.post(PATH, json={**ASKED, "model": "gpt-image-1"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert client.post(PATH, json={**ASKED, "model": "tiny"}).status_code == 200
    error_of(client.get("/v1/nothing"), 404)
    error_of(client.get(PATH), 405)


def test_a_full_queue_is_429_and_says_when_to_ask_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor() as pool, client_of(engine, max_queue=2, max_batch=1) as client:
        held = Held(engine, monkeypatch)
        first = pool.submit(client.post, PATH, json=ASKED)
        held.running.wait()
        second = pool.submit(client.post, PATH, json={**ASKED, "n": 2})
        until_waiting(client, 2)
        full = client.post(PATH, json=ASKED)
        error = error_of(full, 429)
        assert error["code"] == "queue_full"
        assert int(full.headers["retry-after"]) >= 1
        held.go.set()
        assert [one.result().status_code for one in (first, second)] == [200, 200]
        page = client.get("/metrics").text
        assert 'ddit_rt_requests_total{endpoint="/v1/images/generations",status="429"} 1.0' in page


def test_a_deadline_is_503_whether_it_waits_or_runs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client_of(engine, deadline_seconds=0) as client:
        answer = client.post(PATH, json=ASKED)
        assert error_of(answer, 503)["code"] == "deadline"
        assert int(answer.headers["retry-after"]) > 0
    with client_of(engine, deadline_seconds=0.2) as client:
        held = Held(engine, monkeypatch)
        error_of(client.post(PATH, json=ASKED), 503)
        held.go.set()


def test_a_request_that_fails_within_is_500_and_the_next_is_served(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret of /usr/lib/python3/secret.py")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "__call__", fail)
        error = error_of(client.post(PATH, json=ASKED), 500)
        assert error["message"] == "internal error"
    assert client.post(PATH, json=ASKED).status_code == 200


def test_want_of_memory_is_503(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Engine, "__call__", fail)
    assert error_of(client.post(PATH, json=ASKED), 503)["code"] == "out_of_memory"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_device_that_hangs_makes_the_server_unhealthy(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stall(*_: Any, **__: Any) -> None:
        raise StallError("no progress")

    with client_of(engine) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 200
        monkeypatch.setattr(Engine, "__call__", stall)
        error_of(client.post(PATH, json=ASKED), 503)
        client.app.state.service.worker._thread.join()
        assert client.get("/health").status_code == 503
        error_of(client.get("/ready"), 503)
        assert error_of(client.post(PATH, json=ASKED), 503)["code"] == "not_ready"


def test_metrics_count_what_ran(engine: Engine) -> None:
    with client_of(engine) as client:
        client.post(PATH, json={**ASKED, "num_inference_steps": 4, "patch_policy": "2p:0.5,p"})
        page = client.get("/metrics").text
    for line in (
        'ddit_rt_steps_total{patch="2p",reused="false"} 2.0',
        'ddit_rt_steps_total{patch="p",reused="false"} 2.0',
        "ddit_rt_batch_size_count 1.0",
        "ddit_rt_queue_wait_seconds_count 1.0",
        "ddit_rt_queue_depth 0.0",
        'ddit_rt_request_seconds_count{endpoint="/v1/images/generations"} 1.0',
    ):
        assert line in page.splitlines(), line
    assert 'ddit_rt_memory_bytes{device="cpu"}' in page
