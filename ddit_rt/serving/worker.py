"""The one thread that owns the engine, and the queue before it.

Images wait in the order of their arrival. Those behind the first that can share its run leave
with it: same size, steps, policy, cache, guidance, LoRA. A batch that fails is run again in halves,
so that only the request that is to blame fails, and a size that memory does not admit is not tried
again.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any

import torch
from PIL import Image

from ddit_rt import telemetry
from ddit_rt.engine import Engine
from ddit_rt.engine.watch import RunWatch, StepView
from ddit_rt.errors import CaptureError, RunCancelled, StallError
from ddit_rt.models import family_of
from ddit_rt.models.arguments import call_defaults
from ddit_rt.serving.config import ServeConfig
from ddit_rt.serving.embeddings import Embeddings
from ddit_rt.serving.errors import LOG, ApiError, not_ready, queue_full, stopping, too_late
from ddit_rt.serving.jobs import Job, Made, Sample, Work
from ddit_rt.serving.metrics import Metrics
from ddit_rt.serving.preview import LatentToRgb
from ddit_rt.serving.styles import Styles

_WARM_PROMPT = "a photo"
_LAST_STEP = 10.0
"""Seconds that the step in progress may take when the server has to end."""

_PICTURES = {
    "image": Image.new("RGB", (512, 512), "grey"),
    "mask_image": Image.new("L", (512, 512), 255),
}
"""What a run that nobody has asked for edits."""

_FITTED_STEPS = 4
"""Steps of the run that previews are fitted to."""

_REMEMBERED = 256
"""Kinds of requests whose admitted batch is remembered."""


class Worker:
    """See above.

    Attributes:
        metrics: What it counts.
        latent_to_rgb: What makes previews; None before the first.
        ready: Whether the engine has run once and can run.
        broken: Whether it never will again in this process.
        stopping: Whether requests are refused, because the server is to end.
    """

    def __init__(self, engine: Engine, config: ServeConfig, styles: Styles | None = None) -> None:
        self._engine = engine
        self._config = config
        self._styles = styles
        self._most = min(config.max_batch, engine.artifact.manifest.ranges.batch[1])
        self._admitted: dict[Hashable, int] = {}
        self._queue: deque[Sample] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._live, name="ddit-rt-engine", daemon=True)
        self._seconds = 1.0  # of the latest run
        self._ended = 0.0  # when it did, on the monotonic clock
        self._shared = False  # whether several requests shared it
        self._abort = False
        self.ready = self.broken = self.stopping = False
        device = next(engine.pipeline.transformer.parameters()).device
        self.metrics = Metrics(lambda: len(self._queue), device)
        self.latent_to_rgb: LatentToRgb | None = None
        if config.embedding_bytes:
            most = config.embedding_bytes
            state = lambda: None if styles is None else styles.state  # noqa: E731
            Embeddings(engine.pipeline, most, self.metrics, state)

    def start(self) -> None:
        """Begins to warm up, and then to serve."""
        self._thread.start()

    def submit(self, work: Work, seconds: float | None = None) -> Job:
        """Queues a request; `seconds` are to its deadline, by default the server's.

        Raises:
            ApiError: The queue is full, the server is stopping, or the engine is broken.
        """
        with self._changed:
            if self.stopping:
                raise stopping()
            if self.broken:
                raise not_ready()
            waiting = len(self._queue)
            if waiting + len(work.seeds) > self._config.max_queue:
                raise queue_full(waiting, self._seconds * waiting / self._most)
            job = Job(work, self._config.deadline_seconds if seconds is None else seconds)
            self._queue.extend(job.samples)
            self._changed.notify_all()
        return job

    def drop(self, job: Job, reason: str) -> None:
        """Ends a request that nobody waits for; a run for it alone ends within one step."""
        with self._changed:
            if not job.over:
                self.metrics.cancellations.labels(reason).inc()
            job.drop()
            self._changed.notify_all()

    def stop(self, seconds: float) -> None:
        """Refuses what is new, and finishes what is there; what is left after a while fails."""
        with self._changed:
            self.stopping = True
            LOG.info("stopping: %d images wait, %g s to make them", len(self._queue), seconds)
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(seconds)
        with self._changed:
            self._abort = True
            left = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for sample in left:
            sample.job.fail(stopping())
        if self._thread.ident is not None:
            self._thread.join(_LAST_STEP)
        LOG.info("stopped; %d images were left", len(left))

    def _live(self) -> None:
        batch: list[Sample] = []
        try:
            self._warm_up()
            while batch := self._next():
                self._serve(batch)
        except BaseException as error:  # the server must say so, whatever it was
            self._break(error, batch)
            raise

    def _break(self, error: BaseException, batch: list[Sample]) -> None:
        """Nothing can run any more: the batch in hand fails, and what waits."""
        LOG.critical("the engine cannot go on", exc_info=error)
        with self._changed:
            self.broken, self.ready = True, False
            left = [*batch, *self._queue]
            self._queue.clear()
        for sample in left:
            sample.job.fail(not_ready())

    def _warm_up(self) -> None:
        """One run of the defaults: it captures graphs and allocates memory."""
        steps, started = self._config.warmup_steps, time.monotonic()
        if steps != 0:
            given: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
            try:
                self._try_out(**given)
                self._fit_previews()
            except RunCancelled:
                return
        self.ready = True
        LOG.info("%s is ready after %.1f s", self._config.model, time.monotonic() - started)

    def _try_out(self, stepped: Callable[[StepView], None] | None = None, **given: Any) -> Any:
        """A run that nobody has asked for."""
        watch = RunWatch(stopped=lambda: self._abort or self.stopping, stepped=stepped)
        known = call_defaults(self._engine.pipeline)
        given |= {name: one for name, one in _PICTURES.items() if name in known}
        call = {**self._config.call, **given, "generator": torch.Generator().manual_seed(0)}
        return self._engine(_WARM_PROMPT, watch=watch, **call)

    def _fit_previews(self) -> None:
        """A short run whose image previews are fitted to; of a video there are none."""
        views: list[StepView] = []
        if not is_video(self._engine):
            output = self._try_out(views.append, num_inference_steps=_FITTED_STEPS)
            self.latent_to_rgb = LatentToRgb(views[-1].latents[0], output.images[0])

    def _next(self) -> list[Sample]:
        """The images of the next run; none once the server stops and nothing waits."""
        with self._changed:
            while True:
                self._forget()
                if not self._queue:
                    if self.stopping:
                        return []
                    self._changed.wait()
                    continue
                batch, most = self._gather()
                left = self._left_to_wait(self._queue[0])
                if len(batch) >= most or left <= 0 or self.stopping:
                    self._leave(batch)
                    return batch
                self._changed.wait(left)

    def _left_to_wait(self, first: Sample) -> float:
        """Seconds that the first image still waits for others: none where nobody else is about.

        Somebody is if another request waits, too; if this one came while another ran; or if the
        latest run was shared, as its clients may well ask again at once.
        """
        others = any(sample.job is not first.job for sample in self._queue)
        if not (others or self._shared or first.arrived < self._ended):
            return 0.0
        return first.arrived + self._config.batch_window_ms / 1e3 - time.monotonic()

    def _leave(self, batch: list[Sample]) -> None:
        """Takes images that are to be made from the queue."""
        now = time.monotonic()
        for sample in batch:
            self._queue.remove(sample)
            self.metrics.wait_seconds.observe(now - sample.arrived)
            sample.job.started = True

    def _forget(self) -> None:
        """Takes what nobody waits for from the queue."""
        for sample in [sample for sample in self._queue if sample.job.over]:
            self._queue.remove(sample)
            sample.job.fail(self._why_over(sample.job))

    def _why_over(self, job: Job) -> ApiError:
        return too_late(job.seconds) if job.expired else stopping()

    def _gather(self) -> tuple[list[Sample], int]:
        """The first image with those that can share its run, and how many could."""
        key = self._queue[0].job.work.key
        if key is None:
            return [self._queue[0]], 1
        most = min(self._most, self._admitted.get(key, self._most))
        same = [sample for sample in self._queue if sample.job.work.key == key]
        return same[:most], most

    def _serve(self, batch: list[Sample]) -> None:
        started = time.monotonic()
        try:
            self._run(batch)
            self._ended = time.monotonic()
            self._seconds = self._ended - started
            self._shared = any(sample.job is not batch[0].job for sample in batch)
        except RunCancelled:
            for sample in batch:
                sample.job.fail(self._why_over(sample.job))
        except StallError:
            raise
        except Exception as error:  # noqa: BLE001 - of whatever kind, it is the request's
            self._failed(batch, error)

    def _failed(self, batch: list[Sample], error: Exception) -> None:
        """Runs a batch again in halves; of one image, its request fails."""
        half = len(batch) // 2
        if not half:
            batch[0].job.fail(error)
            return
        if isinstance(error, (torch.OutOfMemoryError, CaptureError)):
            if len(self._admitted) >= _REMEMBERED:
                self._admitted.clear()
            self._admitted[batch[0].job.work.key] = half
            LOG.info("%d images are too many for the memory: %s", len(batch), error)
        self._serve(batch[:half])
        self._serve(batch[half:])

    def _run(self, batch: list[Sample]) -> None:
        work = batch[0].job.work
        with _batch_span(batch):
            if self._styles is not None:
                self._styles.switch(work.style)
            if work.on_step is not None and self.latent_to_rgb is None:
                self._fit_previews()
            output = self._engine(watch=self._watch(batch), **_arguments(batch))
        trace = self._engine.last_trace
        assert trace is not None, "a run that returned has a trace"
        self.metrics.ran(trace)
        pictures = output.frames if hasattr(output, "frames") else output.images
        for sample, picture in zip(batch, pictures, strict=True):
            sample.job.give(Made(picture=picture, seed=sample.seed, trace=trace))

    def _watch(self, batch: list[Sample]) -> RunWatch:
        followed = [
            (sample.job.work.on_step, place)
            for place, sample in enumerate(batch)
            if sample.job.work.on_step is not None
        ]

        def stepped(view: StepView) -> None:
            for on_step, place in followed:
                on_step(view, place)

        def stopped() -> bool:
            return self._abort or all(sample.job.over for sample in batch)

        return RunWatch(stopped=stopped, stepped=stepped if followed else None)


def _batch_span(batch: list[Sample]) -> AbstractContextManager[telemetry.Span]:
    """A span that belongs to the request that came first, and is linked to the others."""
    first, *others = {id(sample.job): sample.job for sample in batch}.values()
    return telemetry.span(
        "ddit_rt.batch",
        {"ddit_rt.batch": len(batch), "ddit_rt.requests": 1 + len(others)},
        parent=first.context,
        links=[job.context for job in others],
    )


def edits(engine: Engine) -> bool:
    """Whether a model works on an image that it is given."""
    return "image" in call_defaults(engine.pipeline)


def is_video(engine: Engine) -> bool:
    """Whether a model makes videos."""
    return family_of(engine.pipeline.transformer, engine.pipeline).video


def _arguments(batch: list[Sample]) -> dict[str, Any]:
    """Arguments of the engine's call; one image is asked for as a caller of the pipeline does."""
    generators = [torch.Generator().manual_seed(sample.seed) for sample in batch]
    prompts = [sample.job.work.prompt for sample in batch]
    negatives = [sample.job.work.negative_prompt for sample in batch]
    alone = len(batch) == 1
    given = {**batch[0].job.work.arguments, "output_type": "pil"}
    given["prompt"] = prompts[0] if alone else prompts
    given["generator"] = generators[0] if alone else generators
    if negatives[0] is not None:
        given["negative_prompt"] = negatives[0] if alone else negatives
    return given
