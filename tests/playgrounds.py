"""A playground of a tiny model, within a test."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from extras import need
from fastapi import FastAPI
from served import config, listening

from ddit_rt import Engine
from ddit_rt.serving.app import create_app
from ddit_rt.serving.playground import add_playground
from ddit_rt.serving.playground.rows import Row

PLAN = "2p:0.5,p"


@contextmanager
def playing(engine: Engine, folder: Path, **settings: Any) -> Iterator[str]:
    """Base URL of its page, whose pictures lie in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        app = create_app(engine, config(max_batch=1, **settings), stop_seconds=60)
        asyncio.run(_add_playground(app))
        with listening(app) as url:
            yield url


async def _add_playground(app: FastAPI) -> None:
    """Within a loop: outside of one Gradio makes some, which it does not close."""
    add_playground(app, ["a fox", "a red circle"])


CHROMIUM = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
"""Options of a Chromium that asks nothing of anybody by itself."""


@contextmanager
def browsing() -> Iterator[Any]:
    """A headless Chromium of this machine; skips where there is none."""
    need("playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome")
        found = [path for name in names if (path := shutil.which(name))]
        found.append(playwright.chromium.executable_path)
        if not Path(found[0]).exists():
            pytest.skip(f"no Chromium: none of {', '.join(names)} on PATH, and Playwright has none")
        browser = playwright.chromium.launch(executable_path=found[0], args=list(CHROMIUM))
        yield browser
        browser.close()


class AtStep:
    """Holds every run after a step, until it is let go.

    Attributes:
        reached: Whether one is there.
        go: Lets them go.
        taken: Steps of all runs, in their order.
    """

    def __init__(self, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self.taken: list[int] = []
        own = Row.on_step

        def on_step(row: Row, view: Any, place: int) -> None:
            own(row, view, place)
            self.taken.append(view.step)
            if view.step == step:
                self.reached.set()
                assert self.go.wait(60)

        monkeypatch.setattr(Row, "on_step", on_step)
