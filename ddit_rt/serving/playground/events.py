"""What the page's controls ask for, and how their runs are followed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import gradio as gr
from pydantic import ValidationError

from ddit_rt.artifact.calibration import Calibration, calibration_for
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.planning.request import requested_steps
from ddit_rt.serving.answer import awaited
from ddit_rt.serving.app import Service
from ddit_rt.serving.errors import ApiError, as_api_error, clean, misread
from ddit_rt.serving.jobs import Job, Work
from ddit_rt.serving.playground import rows
from ddit_rt.serving.playground.rows import Row
from ddit_rt.serving.schema import Generation
from ddit_rt.serving.worker import is_video

OWN, SPEED = "own", "speed"
"""Plans that are no text of a policy: the artifact's, and the slider's."""

REFERENCE = "full resolution"
"""Name of the run at p that another is compared with."""

_STAYS = gr.skip()
_FRAME = 0.1
"""Seconds between two looks at a run in progress."""


class Update(NamedTuple):
    """What an event changes of the page, in the order of its outputs; the rest stays.

    Attributes:
        message: HTML of what went wrong, or nothing.
        progress: HTML of the runs and their steps.
        picture: Image of the plan that was asked for.
        reference: At full resolution.
        timeline: HTML of both runs' timelines.
        go: The button that starts a run.
        stop: The button that ends it.
    """

    message: Any = _STAYS
    progress: Any = _STAYS
    picture: Any = _STAYS
    reference: Any = _STAYS
    timeline: Any = _STAYS
    go: Any = _STAYS
    stop: Any = _STAYS


class Asking:
    """What one press of the button asks for, while it runs."""

    def __init__(self, session: str | None) -> None:
        self.session = session
        self.runs: list[tuple[Row, Work]] = []
        self.job: Job | None = None
        self.cancelled = False

    @property
    def rows(self) -> list[Row]:
        """What the page shows of it; empty before it is read."""
        return [row for row, _ in self.runs]


class Playground:
    """What the page's events call."""

    def __init__(self, service: Service) -> None:
        """Stands beside a service.

        Raises:
            UnsupportedModelError: A model that makes videos, or that edits images.
        """
        self._service = service
        self._engine = service.engine
        self._asking: list[Asking] = []
        video = is_video(self._engine)
        if video or service.edits:
            does = "makes videos" if video else "edits an image that it is given"
            raise UnsupportedModelError(
                f"the playground makes images of prompts alone, and this model {does}; use "
                "ddit-rt serve or ddit-rt generate"
            )

    @property
    def calibrations(self) -> tuple[Calibration, ...]:
        """Of the artifact; the first is for the steps that the page begins with."""
        return self._engine.artifact.manifest.calibrations

    @property
    def about(self) -> str:
        """What runs, in a few words."""
        transformer = self._engine.pipeline.transformer
        device, kind = next(transformer.parameters()).device, str(transformer.dtype)
        return (
            f"{self._service.config.model} · {type(self._engine.pipeline).__name__} · "
            f"{device} · {kind.removeprefix('torch.')}"
        )

    @property
    def sizes(self) -> list[str]:
        """Patch sizes that the artifact offers, by name."""
        return [entry.patch for entry in self._engine.artifact.manifest.buckets]

    @property
    def steps(self) -> int:
        """Denoising steps that the page begins with."""
        if self.calibrations:
            return self.calibrations[0].num_inference_steps
        return requested_steps(self._engine.pipeline, {})[0]

    async def generate(
        self,
        prompt: str,
        plan: str,
        speed: float,
        steps: float | None,
        seed: float | None,
        compare: bool,
        request: gr.Request,
    ) -> AsyncIterator[Update]:
        """Runs what the controls say, and shows it while it runs.

        Whoever leaves the page ends it: its generator is closed.

        Args:
            prompt: The prompt.
            plan: `OWN`, `SPEED`, a preset, or a policy as text.
            speed: From 0 to 1; read where the plan is `SPEED`.
            steps: Denoising steps; None: the pipeline's default.
            seed: Of the noise; None: drawn.
            compare: Whether a run at full resolution comes after it.
            request: Whose it is.
        """
        asking = Asking(request.session_hash)
        self._asking.append(asking)
        try:
            asking.runs = self._read(prompt, plan, speed, steps, seed, compare)
            yield _begun(asking)
            for row, work in asking.runs:
                if asking.cancelled:
                    break
                # A person who waits can cancel: there is no deadline.
                asking.job = self._service.worker.submit(work, float("inf"))
                done = awaited(asking.job)
                while not (await asyncio.wait({done}, timeout=_FRAME))[0]:
                    yield _running(asking)
                (row.made,) = done.result()
            yield await _ended(asking)
        except Exception as error:  # noqa: BLE001 - the page tells of it, whatever it was
            yield await _ended(asking, None if asking.cancelled else _told(error))
        finally:
            self._drop(asking, "disconnect")
            self._asking.remove(asking)

    def cancel(self, request: gr.Request) -> None:
        """Ends what a page runs before its next step, or takes it from the queue."""
        for asking in self._asking:
            if asking.session == request.session_hash:
                asking.cancelled = True
                self._drop(asking, "cancel")

    def describe(self, plan: str, speed: float, steps: float | None) -> Any:
        """What the slider stands for, and whether it is read.

        Args:
            plan: As in `generate`.
            speed: See there.
            steps: See there.
        """
        if not self.calibrations:
            return gr.update(info="this artifact has no speeds: ddit-rt calibrate measures them")
        if plan != SPEED:
            return gr.update(info="0 is full resolution, 1 the fastest plan")
        try:
            found = calibration_for(self.calibrations, self.steps if steps is None else int(steps))
        except ValueError as error:
            return gr.update(info=clean(str(error)))
        told = found.plan(speed)
        factor = f"{told.speedup:.2f}x {'faster' if found.cost_unit == 'ms' else 'fewer tokens'}"
        info = f"{told.label}: {factor}, SSIM {told.ssim:.3f} in calibration"
        return gr.update(info=info)

    def _read(
        self,
        prompt: str,
        plan: str,
        speed: float,
        steps: float | None,
        seed: float | None,
        compare: bool,
    ) -> list[tuple[Row, Work]]:
        """The runs that are asked for, refused before any of them where one cannot be run."""
        if not prompt.strip():
            raise ApiError(400, "the prompt is empty; say what the image should show")
        policy: Any = {OWN: None, SPEED: speed}.get(plan, plan)
        name = {OWN: "the artifact's own plan", SPEED: f"speed {speed:g}"}.get(plan, plan)
        asked = {"prompt": prompt, "num_inference_steps": steps, "seed": seed}
        found = [self._run(name, {**asked, "patch_policy": policy})]
        if compare:
            (asked["seed"],) = found[0][1].seeds
            found.append(self._run(REFERENCE, {**asked, "patch_policy": "fine"}))
        return found

    def _run(self, name: str, asked: dict[str, Any]) -> tuple[Row, Work]:
        row = Row(name, self._service.worker)
        try:
            body = Generation.model_validate(asked)
        except ValidationError as error:
            raise misread(error.errors()) from error
        return row, self._service.read(body, on_step=row.on_step)

    def _drop(self, asking: Asking, reason: str) -> None:
        if asking.job is not None:
            self._service.worker.drop(asking.job, reason)


def _told(error: Exception) -> str:
    """What a person is told, in the page's words; the log has the rest."""
    return clean(str(as_api_error(error))).replace("num_inference_steps", "steps")


def _begun(asking: Asking) -> Update:
    compared = len(asking.rows) > 1
    return Update(
        message=gr.update(value="", visible=False),
        progress=rows.progress(asking.rows),
        picture=gr.update(value=None, label=asking.rows[0].name),
        reference=gr.update(value=None, visible=compared),
        timeline="",
        go=gr.update(interactive=False),
        stop=gr.update(interactive=True),
    )


def _running(asking: Asking) -> Update:
    return Update(
        progress=rows.progress(asking.rows),
        picture=_shown(asking.rows[0]),
        reference=_shown(asking.rows[1]) if len(asking.rows) > 1 else _STAYS,
    )


def _shown(row: Row) -> Any:
    """A row's image, where it is another than before."""
    picture = row.preview if row.made is None else row.made.picture
    if picture is None or picture is row.shown:
        return _STAYS
    row.shown = picture
    return picture


async def _ended(asking: Asking, problem: str | None = None) -> Update:
    """Of a run that is over, and why where it made nothing."""
    told = "" if problem is None else rows.problem(problem)
    message = gr.update(value=told, visible=problem is not None)
    if not asking.runs:  # what the page shows of an earlier run stays
        return Update(message)
    made = [row for row in asking.rows if row.made is not None]
    return _running(asking)._replace(
        message=message,
        progress=rows.progress(asking.rows, "cancelled" if asking.cancelled else "failed"),
        timeline=await asyncio.to_thread(rows.timeline, made) if made else _STAYS,
        go=gr.update(interactive=True),
        stop=gr.update(interactive=False),
    )
