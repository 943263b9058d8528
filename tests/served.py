"""A server of a tiny model, within a test."""

from __future__ import annotations

import base64
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from flux_edit_models import img2img
from models import prompting_pipeline
from PIL import Image
from wan_models import wan_pipeline

import ddit_rt
from ddit_rt import Engine
from ddit_rt.serving.app import create_app
from ddit_rt.serving.config import ServeConfig

PATH = "/v1/images/generations"
PAUSE = 0.05
"""Seconds between two looks at another process, which needs the core more than who waits for it."""
ASKED: dict[str, Any] = {"prompt": "a fox", "num_inference_steps": 3, "seed": 7}
PROGRAM = """
import sys
from served import config, tiny_engine
from ddit_rt.serving.app import create_app
from ddit_rt.serving.run import listen
app = create_app(tiny_engine(), config(), stop_seconds=60)
listen(app, host="127.0.0.1", port=int(sys.argv[1]))
"""
"""Serves in a process of its own, at the port that is its argument."""


def tiny_engine() -> Engine:
    """One whose prompts embed as noise of their own."""
    return ddit_rt.compile(
        prompting_pipeline(), height=64, width=64, backend="eager", progress=False
    )


def editing_engine() -> Engine:
    """One that starts from an uploaded image."""
    pipeline = img2img()
    pipeline.encode_prompt = prompting_pipeline().encode_prompt
    return ddit_rt.compile(pipeline, height=64, width=64, backend="eager", progress=False)


def video_engine() -> Engine:
    """One that makes videos."""
    size = {"height": 64, "width": 128, "num_frames": 9}
    return ddit_rt.compile(wan_pipeline(), **size, backend="eager", progress=False)


def config(**settings: Any) -> ServeConfig:
    return ServeConfig(**{"model": "tiny", "warmup_steps": 1, "batch_window_ms": 0, **settings})


@contextmanager
def client_of(engine: Engine, **settings: Any) -> Iterator[TestClient]:
    """A client of a running application that is ready."""
    app = create_app(engine, config(**settings), stop_seconds=60)
    with TestClient(app, raise_server_exceptions=False) as client:
        wait_until_ready(client)
        yield client


def wait_until_ready(client: TestClient) -> None:
    worker = client.app.state.service.worker  # type: ignore[attr-defined]
    while not worker.ready:
        assert worker._thread.is_alive(), "the worker ended"
        worker._thread.join(0.01)


def until_waiting(client: Any, count: int) -> None:
    """Until as many pictures wait behind the one that runs."""
    worker = client.app.state.service.worker
    while len(worker._queue) < count:
        time.sleep(0.001)


@contextmanager
def process_of(
    arguments: Sequence[str], log: Path, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, which logs to a file, and its URL once it is ready."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], stderr=file, text=True, env={**os.environ, **environment}
        )
    try:
        while (found := re.search(r"running on (\S+)", log.read_text(encoding="utf-8"))) is None:
            assert process.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(PAUSE)
        wait_until_served(process, found[1])
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


def wait_until_served(process: subprocess.Popen[str], url: str) -> None:
    """Until the server of a process that has its port is ready."""
    while not _answers_ready(url):
        assert process.poll() is None, "the server ended"
        time.sleep(PAUSE)


def _answers_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:  # it does not listen yet
        return False


@contextmanager
def running(engine: Engine, **settings: Any) -> Iterator[str]:
    """Base URL of a real server on a free port of this machine."""
    with listening(create_app(engine, config(**settings), stop_seconds=60)) as url:
        yield url


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The same of an application that is made."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    worker = app.state.service.worker
    while not (server.started and worker.ready):
        thread.join(0.01)
        assert thread.is_alive(), "the server ended"
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def picture(entry: dict[str, Any]) -> Image.Image:
    """Of an answer."""
    image = Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))
    image.load()
    return image


class Held:
    """Holds the runs of an engine until they are let go, so that a queue builds up."""

    def __init__(self, engine: Engine, monkeypatch: Any) -> None:
        self.running = threading.Event()
        self.go = threading.Event()
        self.calls: list[dict[str, Any]] = []
        own = Engine.__call__

        def held(one: Engine, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(kwargs)
            self.running.set()
            watch = kwargs.get("watch")
            while not self.go.wait(0.01):
                if watch is not None and watch.stopped():
                    break
            return own(one, *args, **kwargs)

        monkeypatch.setattr(Engine, "__call__", held)
