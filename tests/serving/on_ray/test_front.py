"""What stands before replicas: a request outlives the replica that has it. Without a cluster."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av
import numpy as np
import pytest
from fastapi.testclient import TestClient
from models import seeded
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError
from served import ASKED, PATH, config, picture, tiny_engine
from wan_models import wan_pipeline

import ddit_rt
from ddit_rt import Engine
from ddit_rt.errors import StallError
from ddit_rt.serving.errors import queue_full
from ddit_rt.serving.ray_front import front_app
from ddit_rt.serving.ray_replica import Call, Replica

FULL = [
    {"type": "http.response.start", "status": 429, "headers": [(b"retry-after", b"1")]},
    {"type": "http.response.body", "body": json.dumps(queue_full(64, 1).body()).encode()},
]
Plan = list[tuple[int, Any]]


class Answer:
    """As a handle's streaming answer; it may break off."""

    def __init__(self, messages: Any, plan: Plan) -> None:
        self.ended = False
        self._messages = messages
        after, instead = plan.pop(0) if plan else (10**9, [])
        self._after = after
        self._instead = instead if isinstance(instead, Exception) else list(instead)

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> dict[str, Any]:
        if self._after:
            self._after -= 1
            return await self._messages.__anext__()
        if isinstance(self._instead, Exception):
            await self._messages.aclose()
            raise self._instead
        if not self._instead:
            raise StopAsyncIteration
        return self._instead.pop(0)

    def cancel(self) -> None:
        self.ended = True


class Everywhere:
    def __init__(self, results: list[Any]) -> None:
        self._results = results

    async def results_async(self, **_: Any) -> list[Any]:
        return self._results


class Handle:
    """Stands for Ray Serve's: the replica is in this process, and dies when it is told to.

    `plan` says after how many messages each answer breaks off, and with what, or how it goes on.
    After the first call, `then` is called instead.
    """

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.calls: list[Call] = []
        self.answers: list[Answer] = []
        self.plan: Plan = []
        self.unreachable = False
        self.then: Handle | None = None
        self.answer = self._method("answer")
        self.video = self._method("video")

    def _method(self, name: str) -> Any:
        handle = self

        class Method:
            def remote(self, call: Call) -> Answer:
                if handle.calls and handle.then is not None:
                    return getattr(handle.then, name).remote(call)
                handle.calls.append(call)
                answer = Answer(getattr(handle.replica, name)(call), handle.plan)
                handle.answers.append(answer)
                return answer

        return Method()

    def broadcast(self, method: str) -> Everywhere:
        if method == "is_ready":
            ready = self.replica._worker.ready
            return Everywhere([ActorDiedError()] if self.unreachable else [ActorDiedError(), ready])
        found = list(self.replica._worker.metrics.registry.collect())
        return Everywhere([("one", found), ActorDiedError(), ("two", found)])


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


@contextmanager
def replica_of(engine: Engine, **settings: Any) -> Iterator[Handle]:
    replica = Replica(lambda: engine, config(**settings))
    try:
        yield Handle(replica)
    finally:
        replica._worker.stop(60)


@pytest.fixture(scope="module")
def replicas(engine: Engine) -> Iterator[Handle]:
    with replica_of(engine) as handle:
        yield handle


@pytest.fixture
def handle(replicas: Handle, monkeypatch: pytest.MonkeyPatch) -> Handle:
    monkeypatch.setattr("ddit_rt.serving.ray_calls._PAUSE", 0)
    replicas.calls, replicas.answers, replicas.plan[:] = [], [], []
    return replicas


@pytest.fixture
def client(handle: Handle) -> Iterator[TestClient]:
    with TestClient(front_app(handle, config()), raise_server_exceptions=False) as client:
        yield client


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(block.split("data: ")[1]) for block in text.strip().split("\n\n")]


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("error", [ActorDiedError(), ActorUnavailableError("gone", b"0" * 16)])
def test_a_request_whose_replica_dies_is_answered_by_another(
    client: TestClient, handle: Handle, engine: Engine, after: int, error: Exception
) -> None:
    handle.plan[:] = [(after, error)]
    answer = client.post(PATH, json=ASKED)
    assert answer.status_code == 200
    expected = engine("a fox", num_inference_steps=3, generator=seeded(7)).images[0]
    (entry,) = answer.json()["data"]
    assert np.array_equal(np.asarray(picture(entry)), np.asarray(expected))
    assert len(handle.calls) == 2
    assert all(answer.ended for answer in handle.answers)


def test_a_request_without_a_seed_has_the_same_one_wherever_it_is_made(
    client: TestClient, handle: Handle
) -> None:
    handle.plan[:] = [(1, ActorDiedError())]
    asked = {name: value for name, value in ASKED.items() if name != "seed"}
    (entry,) = client.post(PATH, json=asked).json()["data"]
    first, second = handle.calls
    assert first.seed == second.seed == entry["seed"]
    client.post(PATH, json=asked)
    assert handle.calls[-1].seed != first.seed


def test_a_trace_goes_on_at_the_replica(client: TestClient, handle: Handle, spans: Any) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    assert client.post(PATH, json=ASKED, headers=headers).status_code == 200
    (call,) = handle.calls
    sent = dict(call.scope["headers"])[b"traceparent"].decode()
    above = {one.context.span_id for one in spans.get_finished_spans()}
    assert sent.startswith(f"00-{trace}-")
    assert int(sent.split("-")[2], 16) in above, "a span of the front's"


def test_a_stream_goes_on_after_its_last_event(client: TestClient, handle: Handle) -> None:
    asked = {**ASKED, "stream": True}
    whole = events(client.post(PATH, json=asked).text)
    handle.plan[:] = [(3, ActorDiedError()), (2, ActorDiedError())]
    broken = events(client.post(PATH, json=asked).text)
    assert [event["type"] for event in broken] == [event["type"] for event in whole]
    assert [event.get("step") for event in broken] == [0, 1, 2, None]
    assert broken[-1]["b64_json"] == whole[-1]["b64_json"]


def test_a_stream_that_cannot_go_on_says_so(client: TestClient, handle: Handle) -> None:
    handle.plan[:] = [(2, ActorDiedError())] * 3
    *_, last = events(client.post(PATH, json={**ASKED, "stream": True}).text)
    assert last["error"]["code"] == "replicas_died"


def test_a_request_that_kills_its_replicas_ends_with_the_third(
    client: TestClient, handle: Handle
) -> None:
    handle.plan[:] = [(0, ActorDiedError())] * 5
    answer = client.post(PATH, json=ASKED)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replicas_died")
    assert len(handle.calls) == 3


@pytest.mark.parametrize("full", [BackPressureError(64, 64), FULL], ids=["all", "the chosen one"])
def test_full_queues_refuse_a_new_request_and_not_one_that_was_accepted(
    client: TestClient, handle: Handle, full: Any
) -> None:
    handle.plan[:] = [(0, full)]
    refused = client.post(PATH, json=ASKED)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert "retry-after" in refused.headers
    handle.plan[:] = [(0, ActorDiedError()), (0, full), (0, full)]
    assert client.post(PATH, json=ASKED).status_code == 200
    assert len(handle.calls) == 5


def test_a_request_is_late_whichever_replicas_die(
    handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddit_rt.serving.ray_calls._PAUSE", 60)
    handle.plan[:] = [(0, ActorDiedError())]
    with TestClient(front_app(handle, config(deadline_seconds=0.1))) as client:
        answer = client.post(PATH, json=ASKED)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deadline")


def test_what_has_no_key_or_is_too_large_never_reaches_a_replica(handle: Handle) -> None:
    with TestClient(front_app(handle, config(keys=("secret",)))) as client:
        assert client.post(PATH, json=ASKED).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        large = client.post(PATH, content=b" " * 2**26, headers=headers)
        assert large.status_code == 413
        assert not handle.calls
        assert client.post(PATH, json=ASKED, headers=headers).status_code == 200


def test_models_readiness_metrics_and_unknown_paths(client: TestClient, handle: Handle) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/nothing").json()["error"]["code"] == "not_found"
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    handle.unreachable = True
    assert client.get("/ready").status_code == 503
    handle.unreachable = False
    page = client.get("/metrics").text
    assert page.count("# TYPE ddit_rt_steps_total counter") == 1
    for replica in ("one", "two"):
        assert f'ddit_rt_queue_depth{{replica="{replica}"}} 0.0' in page


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_replica_whose_engine_hangs_ends_and_another_is_called(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(*_: Any, **__: Any) -> Any:
        raise StallError("no progress")

    def end(code: int) -> None:
        raise ActorDiedError

    monkeypatch.setattr("ddit_rt.serving.ray_calls._PAUSE", 0)
    monkeypatch.setattr("ddit_rt.serving.ray_replica.os._exit", end)
    with replica_of(engine) as broken, replica_of(engine) as whole:
        monkeypatch.setattr(broken.replica._worker, "_run", hang)
        broken.then = whole
        with TestClient(front_app(broken, config())) as client:
            assert client.post(PATH, json=ASKED).status_code == 200
        assert (len(broken.calls), len(whole.calls)) == (1, 1)
        with pytest.raises(RuntimeError, match="cannot go on"):
            broken.replica.check_health()


VIDEO: dict[str, Any] = {"prompt": "a cat", "size": "128x64", "num_frames": 9}
VIDEO |= {"num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def wan() -> Iterator[Handle]:
    engine = ddit_rt.compile(
        wan_pipeline(), height=64, width=128, num_frames=9, backend="eager", progress=False
    )
    with replica_of(engine, call={"max_sequence_length": 12}) as handle:
        yield handle


@pytest.fixture
def videos(wan: Handle, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr("ddit_rt.serving.ray_calls._PAUSE", 0)
    wan.calls, wan.answers = [], []
    with TestClient(front_app(wan, config()), raise_server_exceptions=False) as client:
        yield client


def finished(client: TestClient, name: str) -> dict[str, Any]:
    while True:
        entry: dict[str, Any] = client.get(f"/v1/videos/{name}").json()
        if entry["status"] in ("completed", "failed"):
            return entry


def test_a_video_outlives_its_replica_under_its_name(videos: TestClient, wan: Handle) -> None:
    wan.plan[:] = [(1, ActorDiedError()), (0, ActorDiedError())]
    accepted = videos.post("/v1/videos", json=VIDEO).json()
    entry = finished(videos, accepted["id"])
    assert entry["error"] is None
    assert [entry[name] for name in ("id", "seed")] == [accepted[name] for name in ("id", "seed")]
    assert len({call.seed for call in wan.calls}) == 1
    assert len(wan.calls) == 3
    file = videos.get(f"/v1/videos/{entry['id']}/content").content
    with av.open(io.BytesIO(file)) as video:
        assert len(list(video.decode(video=0))) == 9
    assert [one["id"] for one in videos.get("/v1/videos").json()["data"]] == [entry["id"]]
    assert videos.delete(f"/v1/videos/{entry['id']}").json()["deleted"]
    assert videos.get(f"/v1/videos/{entry['id']}").status_code == 404
    assert not wan.replica._videos.newest()  # a replica keeps none


def test_a_video_that_is_cancelled_ends_at_its_replica(videos: TestClient, wan: Handle) -> None:
    name = videos.post("/v1/videos", json={**VIDEO, "num_inference_steps": 100}).json()["id"]
    entry = videos.post(f"/v1/videos/{name}/cancel").json()
    assert (entry["status"], entry["error"]["code"]) == ("failed", "cancelled")
    while not wan.answers[0].ended:
        videos.get("/health")


def test_a_video_that_cannot_be_made_is_refused_by_a_replica(videos: TestClient) -> None:
    answer = videos.post("/v1/videos", json={**VIDEO, "num_frames": 500})
    assert answer.status_code == 400
    assert "at most 241" in answer.json()["error"]["message"]


def test_a_model_of_images_has_no_videos(client: TestClient) -> None:
    assert client.post("/v1/videos", json=VIDEO).status_code == 404
