"""What the page's events do, called as Gradio calls them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flux_edit_models import img2img
from playgrounds import PLAN, AtStep
from served import Held, config, tiny_engine
from wan_models import wan_pipeline

import ddit_rt
from ddit_rt import Engine
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.lab.demo.plans import demo_calibration
from ddit_rt.serving.app import Service
from ddit_rt.serving.playground.events import OWN, SPEED, Playground, Update

CALL: dict[str, Any] = {"prompt": "a fox", "steps": 4, "seed": 7, "plan": PLAN}
SKIPPED = {"__type__": "update"}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


@pytest.fixture(scope="module")
def playground(engine: Engine) -> Iterator[Playground]:
    with started(engine) as one:
        yield one


@contextmanager
def started(engine: Engine, **settings: Any) -> Iterator[Playground]:
    """A playground whose worker runs."""
    service = Service(engine, config(max_batch=1, **settings))
    service.worker.start()
    yield Playground(service)
    service.worker.stop(60)


def asked(one: Playground, session: str = "a", **change: Any) -> AsyncIterator[Update]:
    """The updates of a press of the button."""
    call = {"speed": 0.5, "compare": False, **CALL, **change}
    return one.generate(**call, request=SimpleNamespace(session_hash=session))  # type: ignore[arg-type]


async def all_of(updates: AsyncIterator[Update]) -> list[Update]:
    return [update async for update in updates]


def pressed(one: Playground, **change: Any) -> list[Update]:
    """All of them."""
    return asyncio.run(all_of(asked(one, **change)))


def latest(updates: list[Update], field: str) -> Any:
    """What the page has of an output in the end."""
    changes = [getattr(update, field) for update in updates]
    return next(change for change in reversed(changes) if change != SKIPPED)


def picture_of(engine: Engine, policy: Any, **arguments: Any) -> Any:
    """The engine's own."""
    call = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(7), **arguments}
    return engine("a fox", patch_policy=policy, **call).images[0]


def test_the_picture_is_the_engines_own_and_every_step_is_shown(
    engine: Engine, playground: Playground
) -> None:
    updates = pressed(playground)
    assert latest(updates, "picture") == picture_of(engine, PLAN)
    assert updates[0].go["interactive"] is False
    assert updates[0].stop["interactive"] is True
    assert updates[-1].go["interactive"] is True
    assert updates[-1].stop["interactive"] is False
    progress = latest(updates, "progress")
    for step, size in enumerate(("2p", "2p", "p", "p")):
        assert f'"step {step}: {size}"' in progress
    assert "2 of 4 steps coarse" in progress
    assert "seed 7" in progress


def test_the_timeline_shows_size_score_and_time_of_each_step(playground: Playground) -> None:
    text = latest(pressed(playground, plan="dynamic", steps=8), "timeline")
    for title in ("patch size of each step", "score (line) and threshold", "time per step, ms"):
        assert title in text
    assert "no step was scored" not in text
    assert text.count("<svg") == 1


def test_full_resolution_stands_beside_it_with_the_same_noise(
    engine: Engine, playground: Playground
) -> None:
    updates = pressed(playground, compare=True, seed=None)
    assert updates[0].reference["visible"] is True
    progress = latest(updates, "progress")
    assert "x as fast" in progress
    seeds = {int(part.split("<")[0].split(" ")[0]) for part in progress.split("seed ")[1:]}
    (seed,) = seeds
    generator = torch.Generator().manual_seed(seed)
    assert latest(updates, "reference") == picture_of(engine, "fine", generator=generator)
    assert latest(updates, "timeline").count("tokens") >= 2
    assert pressed(playground)[0].reference["visible"] is False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": " \n"}, "the prompt is empty; say what the image should show"),
        ({"prompt": "x" * 4001}, "at most 4000 characters"),
        ({"steps": 0}, "steps: Input should be greater than or equal to 1"),
        ({"steps": 101}, "steps is beyond this server&#x27;s limit: at most 100"),
        ({"steps": 2.5}, "steps: Input should be a valid integer"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"plan": "fats"}, "did you mean"),
        ({"plan": "8p:0.5,p"}, "offer only"),
        ({"plan": "<script>"}, "&lt;script&gt;"),
        ({"plan": SPEED}, "need a calibration"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input_is_one_sentence_in_the_page_and_nothing_runs(
    engine: Engine,
    playground: Playground,
    change: dict[str, Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Engine, "__call__", lambda *_, **__: pytest.fail("it ran"))
    (update,) = pressed(playground, compare=True, **change)
    assert update.message["visible"] is True
    assert said in update.message["value"]
    assert "<script>" not in update.message["value"]
    assert "Traceback" not in update.message["value"]
    assert all(change == SKIPPED for change in update[1:])


def test_a_fault_of_the_engine_is_told_without_its_inside(
    playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("/home/somebody/secret.py is wrong")

    monkeypatch.setattr(Engine, "__call__", broken)
    update = pressed(playground)[-1]
    assert "internal error" in update.message["value"]
    assert "secret" not in str(update)
    assert "failed" in update.progress
    assert update.go["interactive"] is True


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_waits_is_told_when_the_engines_thread_ends(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(engine) as one:
        pressed(one)

        def ended(*_: Any, **__: Any) -> Any:
            raise SystemExit

        monkeypatch.setattr(Engine, "__call__", ended)
        assert "the model is not ready" in pressed(one)[-1].message["value"]


async def until(holds: Callable[[], Any]) -> None:
    async def wait() -> None:
        while not holds():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), 60)


def test_cancel_ends_the_run_before_its_next_step_and_harms_no_other(
    playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = latest(pressed(playground), "picture")
    held = AtStep(2, monkeypatch)

    async def scenario() -> list[list[Update]]:
        first = asyncio.ensure_future(all_of(asked(playground, "a", steps=50, compare=True)))
        await until(held.reached.is_set)
        other = asyncio.ensure_future(all_of(asked(playground, "b")))
        playground.cancel(SimpleNamespace(session_hash="a"))  # type: ignore[arg-type]
        held.go.set()
        return [await first, await other]

    cancelled, other = asyncio.run(scenario())
    progress = latest(cancelled, "progress")
    assert "cancelled after step 3 of 50" in progress
    assert progress.count("cancelled") == 2, "nor does the run at full resolution come"
    assert latest(cancelled, "message")["visible"] is False
    assert cancelled[-1].go["interactive"] is True
    assert latest(other, "picture") == before


def test_cancel_takes_what_waits_from_the_queue_at_once(
    playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(playground._engine, monkeypatch)

    async def scenario() -> list[Update]:
        first = asyncio.ensure_future(all_of(asked(playground, "a")))
        await until(held.running.is_set)
        waiting = asyncio.ensure_future(all_of(asked(playground, "b")))
        await until(lambda: playground._asking[-1].job and len(playground._asking) == 2)
        playground.cancel(SimpleNamespace(session_hash="b"))  # type: ignore[arg-type]
        await until(lambda: held.go.set() or waiting.done())
        await first
        return await waiting

    assert "cancelled" in latest(asyncio.run(scenario()), "progress")
    assert len(held.calls) == 1


def test_who_leaves_ends_the_run(playground: Playground, monkeypatch: pytest.MonkeyPatch) -> None:
    held = AtStep(1, monkeypatch)
    dropped = playground._service.worker.metrics.cancellations.labels("disconnect")
    count = dropped._value.get()

    async def scenario() -> None:
        updates = asked(playground, steps=50)
        await anext(updates)
        await anext(updates)
        await until(held.reached.is_set)
        await updates.aclose()  # type: ignore[attr-defined]
        held.go.set()

    asyncio.run(scenario())
    assert dropped._value.get() == count + 1
    assert playground._asking == []
    assert "4 steps" in latest(pressed(playground), "progress")


@pytest.mark.filterwarnings("ignore:the plan was calibrated with height=128")
def test_the_slider_is_the_servers_speed_and_says_what_it_stands_for() -> None:
    engine = tiny_engine()
    engine.artifact = engine.artifact.with_calibration(demo_calibration())
    with started(engine) as one:
        assert one.steps == 24
        wanted = demo_calibration().plan(0.5)
        assert wanted.label in one.describe(SPEED, 0.5, 24)["info"]
        assert "calibrated only for [24]" in one.describe(SPEED, 0.5, 23)["info"]
        assert "fastest" in one.describe(OWN, 0.5, 24)["info"]
        updates = pressed(one, plan=SPEED, steps=24, speed=0.5)
        assert f"0.5 of the calibration for 24 steps: {wanted.label}" in updates[-1].timeline
        assert f"of {wanted.num_inference_steps} steps coarse" in updates[-1].progress
        assert latest(updates, "picture") == picture_of(engine, 0.5, num_inference_steps=24)


def test_without_a_calibration_it_says_how_to_have_speeds(playground: Playground) -> None:
    assert "ddit-rt calibrate" in playground.describe(SPEED, 0.5, 24)["info"]


@pytest.mark.parametrize(
    ("pipeline", "size", "does"),
    [
        (wan_pipeline, {"height": 64, "width": 128, "num_frames": 9}, "makes videos"),
        (img2img, {"height": 64, "width": 64}, "edits an image"),
    ],
)
def test_models_that_make_no_pictures_of_prompts_are_refused(
    pipeline: Callable[[], Any], size: dict[str, int], does: str
) -> None:
    engine = ddit_rt.compile(pipeline(), **size, backend="eager", progress=False)
    with pytest.raises(UnsupportedModelError, match=f"{does}.*use ddit-rt serve"):
        Playground(Service(engine, config()))
