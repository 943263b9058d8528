"""How a server ends: what runs is finished or told, and what comes is refused."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import ASKED, PATH, Held, client_of, config, tiny_engine, until_waiting

from ddit_rt import Engine
from ddit_rt.serving.errors import ApiError
from ddit_rt.serving.requests import Reader
from ddit_rt.serving.schema import Generation
from ddit_rt.serving.worker import Worker


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


def test_what_waits_is_finished_and_what_comes_is_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor() as pool, client_of(engine, max_batch=1) as client:
        worker = client.app.state.service.worker
        held = Held(engine, monkeypatch)
        first = pool.submit(client.post, PATH, json=ASKED)
        held.running.wait()
        second = pool.submit(client.post, PATH, json=ASKED)
        until_waiting(client, 1)
        pool.submit(worker.stop, 60)
        while not worker.stopping:
            time.sleep(0.001)
        refused = client.post(PATH, json=ASKED)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "stopping"
        assert "retry-after" in refused.headers
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        held.go.set()
        assert [one.result().status_code for one in (first, second)] == [200, 200]


def test_what_does_not_end_in_time_fails_within_a_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, worker = Reader(engine, config()), Worker(engine, config(warmup_steps=0, max_batch=1))
    held = Held(engine, monkeypatch)
    jobs = [worker.submit(read(Generation(prompt="a fox"))) for _ in range(2)]
    worker.start()
    held.running.wait()
    worker.stop(0)
    for job in jobs:
        error = job.done.exception()
        assert isinstance(error, ApiError)
        assert error.code == "stopping"
    assert not worker._thread.is_alive()
