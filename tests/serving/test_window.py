"""When an image waits for company: only where somebody else is about."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import pytest
from served import Held, config, tiny_engine

from ddit_rt import Engine
from ddit_rt.serving.jobs import Job
from ddit_rt.serving.requests import Reader
from ddit_rt.serving.schema import Generation
from ddit_rt.serving.worker import Worker

LONG = 3600.0


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


class Asked:
    """A worker that a test asks."""

    def __init__(self, engine: Engine, window: float) -> None:
        settings = config(warmup_steps=0, batch_window_ms=1e3 * window, max_batch=2)
        self._read, self.worker = Reader(engine, settings), Worker(engine, settings)

    def __call__(self, prompt: str, n: int = 1) -> Job:
        body = Generation(prompt=prompt, num_inference_steps=2, n=n)
        return self.worker.submit(self._read(body, n))

    def batches(self, *jobs: Job) -> list[int]:
        return [job.done.result(60)[0].trace.batch for job in jobs]


@pytest.fixture
def ask(engine: Engine) -> Iterator[Asked]:
    asked = Asked(engine, LONG)
    asked.worker.start()
    yield asked
    asked.worker.stop(60)


def test_a_request_that_is_alone_does_not_wait(ask: Asked) -> None:
    assert ask.batches(ask("a fox")) == [1]
    assert ask.batches(ask("a hen")) == [1]
    assert ask.batches(ask("a cow", n=2)) == [2]


def test_one_that_came_while_another_ran_waits_for_company(
    ask: Asked, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(engine, monkeypatch)
    first = ask("a fox")
    assert held.running.wait(60)
    second = ask("a hen")
    held.go.set()
    assert ask.batches(first) == [1]
    time.sleep(0.05)
    assert not second.started
    assert ask.batches(second, ask("a cow")) == [2, 2]


def test_after_a_shared_run_the_next_waits_once(engine: Engine) -> None:
    ask = Asked(engine, 0.2)
    together = [ask("a fox"), ask("a hen")]
    ask.worker.start()
    assert ask.batches(*together) == [2, 2]
    began = time.monotonic()
    assert ask.batches(ask("a cow")) == [1]
    assert time.monotonic() - began >= 0.2
    # Another wait would outlast the test.
    settings = dataclasses.replace(ask.worker._config, batch_window_ms=1e3 * LONG)
    vars(ask.worker)["_config"] = settings
    assert ask.batches(ask("a dog")) == [1]
    ask.worker.stop(60)
