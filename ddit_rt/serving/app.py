"""The HTTP application: OpenAI's paths, and an orchestrator's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from ddit_rt.engine import Engine
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models import family_of
from ddit_rt.serving import errors, images, videos
from ddit_rt.serving.config import ServeConfig
from ddit_rt.serving.gate import Gate
from ddit_rt.serving.requests import Reader
from ddit_rt.serving.styles import Styles
from ddit_rt.serving.worker import Worker, edits, is_video
from ddit_rt.version import __version__


class Service:
    """What the handlers share.

    Attributes:
        engine: The engine.
        config: What the operator set.
        worker: Who runs the engine.
        read: Who reads requests.
        edits: Whether the model works on images that it is given.
        videos: The videos that were asked for.
    """

    def __init__(self, engine: Engine, config: ServeConfig) -> None:
        if engine.pipeline is None:
            raise UnsupportedModelError(
                "a server answers prompts, and this engine was compiled from a bare transformer; "
                "compile the whole pipeline"
            )
        family = family_of(engine.pipeline.transformer, engine.pipeline)
        if family.audio or family.soundtrack:
            raise UnsupportedModelError(
                f"a server answers with images and silent videos, and {family.name} makes sound, "
                "which would be left out; call its engine in Python"
            )
        self.engine = engine
        self.config = config
        folder = config.lora_dir
        styles = None if folder is None else Styles(engine, folder, config.lora_bytes)
        self.worker = Worker(engine, config, styles)
        self.read = Reader(engine, config, styles)
        self.edits = edits(engine)
        self.videos = videos.Videos(config)


def create_app(engine: Engine, config: ServeConfig, *, stop_seconds: float = 30.0) -> FastAPI:
    """The application of one engine, which nothing else may use meanwhile.

    Args:
        engine: The engine, of a whole pipeline.
        config: What the operator sets.
        stop_seconds: How long what was accepted may still run when the server ends.

    Raises:
        UnsupportedModelError: An engine without a pipeline, or of a model that makes sound.
    """
    service = Service(engine, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop, stop_seconds)

    app = FastAPI(title="ddit_rt", version=__version__, lifespan=lifespan, redoc_url=None)
    app.state.service, app.state.stop_seconds = service, stop_seconds
    errors.install(app)
    app.add_middleware(
        Gate, keys=config.keys, body=config.limits.body, metrics=service.worker.metrics
    )
    if is_video(engine):
        app.include_router(videos.router)
    else:
        app.include_router(images.edit_router if service.edits else images.router)
    add_models(app, config.model)
    _add_operations(app, service.worker)
    return app


def add_models(app: FastAPI, name: str) -> None:
    """Adds `/v1/models` of one model, which is there from now on."""
    created = int(time.time())
    entry = {"id": name, "object": "model", "created": created, "owned_by": "ddit_rt"}

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [entry]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        """The same by its name."""
        if name != entry["id"]:
            raise errors.ApiError(
                404, f"this server has {entry['id']} alone", param="model", code="model_not_found"
            )
        return JSONResponse(entry)


def _add_operations(app: FastAPI, worker: Worker) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the process can go on."""
        status = "broken" if worker.broken else "ok"
        return JSONResponse({"status": status}, 503 if worker.broken else 200)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether requests are served at once: the model has run, and the server is to stay."""
        if worker.stopping or not worker.ready:
            raise errors.stopping() if worker.stopping else errors.not_ready()
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(worker.metrics.page(), media_type="text/plain; version=0.0.4")
