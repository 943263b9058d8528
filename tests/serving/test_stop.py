"""How a server ends: what runs is finished or told, what comes is refused, and the exit is 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import (
    ASKED,
    PATH,
    PROGRAM,
    Held,
    client_of,
    config,
    tiny_engine,
    wait_until_served,
)

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
    with client_of(engine, max_batch=1) as client:
        worker = client.app.state.service.worker
        held = Held(engine, monkeypatch)
        answers: list[Any] = []
        asking = [
            threading.Thread(target=lambda: answers.append(client.post(PATH, json=ASKED)))
            for _ in range(2)
        ]
        asking[0].start()
        held.running.wait()
        asking[1].start()
        while not worker._queue:
            asking[1].join(0.001)
        stopping = threading.Thread(target=worker.stop, args=(60,))
        stopping.start()
        while not worker.stopping:
            stopping.join(0.001)
        refused = client.post(PATH, json=ASKED)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "stopping"
        assert "retry-after" in refused.headers
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        held.go.set()
        for thread in (*asking, stopping):
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]


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


@pytest.mark.slow
def test_a_signal_ends_the_process_with_zero(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "0"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(here)},
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "running on" in line)
        url = line.split("running on ")[1].split()[0]
        wait_until_served(process, url)
        assert httpx.post(url + PATH, json=ASKED, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        out, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert out.endswith("ended\n")
    assert "Traceback" not in rest
