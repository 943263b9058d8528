"""Which pictures share a run, and that each is the one that it is alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import seeded
from served import config, tiny_engine

from ddit_rt import Engine
from ddit_rt.serving.jobs import Job, Made
from ddit_rt.serving.requests import Reader
from ddit_rt.serving.schema import Generation
from ddit_rt.serving.worker import Worker

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


def made(engine: Engine, asked: list[dict[str, Any]], **settings: Any) -> list[list[Made]]:
    """What requests give that wait together before the first of them runs."""
    settings = {"warmup_steps": 0, "max_batch": 8, **settings}
    read, worker = Reader(engine, config(**settings)), Worker(engine, config(**settings))
    jobs: list[Job] = []
    for one in asked:
        body = Generation(**{"num_inference_steps": 4, **one})
        jobs.append(worker.submit(read(body, body.n)))
    worker.start()
    worker.stop(60)
    return [job.done.result() for job in jobs]


def levels(picture: Any) -> np.ndarray[Any, Any]:
    return np.asarray(picture, dtype=np.int16)


@pytest.mark.parametrize("policy", ["fine", "4p:0.25,2p:0.25,p"])
def test_a_picture_of_a_batch_is_the_one_that_it_is_alone(engine: Engine, policy: str) -> None:
    prompts = ["a fox", "a blue vase", "two men"]
    asked = [
        {"prompt": prompt, "seed": seed, "patch_policy": policy}
        for seed, prompt in enumerate(prompts)
    ]
    for seed, (one,) in enumerate(made(engine, asked)):
        assert one.trace.batch == 3
        call = {"num_inference_steps": 4, "patch_policy": policy}
        alone = engine(prompts[seed], **call, generator=seeded(seed)).images[0]
        # fp32: products of another batch round otherwise, at most to the next of 256 levels.
        assert np.abs(levels(one.picture) - levels(alone)).max() <= 1
        other = engine(prompts[seed], **call, generator=seeded(seed + 1)).images[0]
        assert np.abs(levels(one.picture) - levels(other)).max() > 1


@pytest.mark.parametrize(
    "change",
    [
        {"size": "96x64"},
        {"num_inference_steps": 3},
        {"patch_policy": "2p:0.5,p"},
        {"negative_prompt": "a dog", "true_cfg_scale": 2.0},
    ],
    ids=str,
)
def test_what_differs_beyond_prompt_and_seed_does_not_share_a_run(
    engine: Engine, change: dict[str, Any]
) -> None:
    same = {"prompt": "a fox", "seed": 1, "patch_policy": "fine"}
    first, other, last = made(engine, [same, {**same, **change}, {**same, "prompt": "a hen"}])
    assert [one[0].trace.batch for one in (first, other, last)] == [2, 1, 2]
    assert first[0].trace is last[0].trace


def test_a_batch_has_no_more_pictures_than_are_admitted(engine: Engine) -> None:
    asked = [{"prompt": "a fox", "seed": 1, "n": 3}, {"prompt": "a hen", "seed": 1, "n": 2}]
    batches = [[one.trace.batch for one in job] for job in made(engine, asked, max_batch=2)]
    assert batches == [[2, 2, 2], [2, 1]]
    alone = [[one.trace.batch for one in job] for job in made(engine, asked, max_batch=1)]
    assert alone == [[1, 1, 1], [1, 1]]
    widest = engine.artifact.manifest.ranges.batch[1]
    (most,) = made(engine, [{"prompt": "a fox", "seed": 1, "n": 8}], max_batch=100)
    assert most[0].trace.batch == widest == 8


def test_guidance_halves_what_one_run_can_hold(engine: Engine) -> None:
    guided = {"prompt": "a fox", "negative_prompt": "a dog", "true_cfg_scale": 2.0, "n": 8}
    (job,) = made(engine, [guided])
    assert [one.trace.batch for one in job] == [4] * 8


def failing(own: Call, fails: Callable[[list[str]], Exception | None]) -> Call:
    def call(engine: Engine, **given: Any) -> Any:
        prompts = given["prompt"] if isinstance(given["prompt"], list) else [given["prompt"]]
        error = fails(prompts)
        if error is not None:
            raise error
        return own(engine, **given)

    return call


def test_a_batch_that_memory_does_not_admit_is_run_in_parts_and_not_tried_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def fails(prompts: list[str]) -> Exception | None:
        tried.append(len(prompts))
        return torch.OutOfMemoryError() if len(prompts) > 2 else None

    monkeypatch.setattr(Engine, "__call__", failing(Engine.__call__, fails))
    (job,) = made(engine, [{"prompt": "a fox", "n": 6}], max_batch=4)
    assert len(job) == 6
    assert tried == [4, 2, 2, 2]


def test_of_a_batch_that_fails_only_the_one_to_blame_does(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(prompts: list[str]) -> Exception | None:
        return ValueError("mine") if "bad" in prompts else None

    monkeypatch.setattr(Engine, "__call__", failing(Engine.__call__, fails))
    read, worker = Reader(engine, config()), Worker(engine, config(warmup_steps=0))
    jobs = [
        worker.submit(read(Generation(prompt=prompt, num_inference_steps=2)))
        for prompt in ("a fox", "bad", "a hen")
    ]
    worker.start()
    worker.stop(60)
    assert [job.done.exception() is None for job in jobs] == [True, False, True]


def test_of_a_batch_the_finest_size_that_any_picture_needs_is_taken(engine: Engine) -> None:
    asked = {"num_inference_steps": 10, "patch_policy": {"tau": {"2p": 0.05, "4p": 0.02}}}
    prompts = [f"prompt {number}" for number in range(4)]
    alone = [made(engine, [{**asked, "prompt": p, "seed": 3}])[0][0].trace for p in prompts]
    together = made(engine, [{**asked, "prompt": p, "seed": 3} for p in prompts])[0][0].trace
    first = next(s for s, record in enumerate(together) if record.scores)
    expected = {size: max(t[first].scores[size] for t in alone) for size in ("2p", "4p")}
    assert together[first].scores == pytest.approx(expected, rel=1e-3)
