"""A page to try a model on, beside the interface of `app.py`.

It shares the server's queue and its limits: a run that somebody follows in a browser waits behind
the requests of others, and theirs behind it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from fastapi import FastAPI, Request

from ddit_rt.serving.errors import ApiError

# Read by Gradio at its import, and where it would ask its makers' servers for its own version.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from ddit_rt.serving.playground.events import Playground
from ddit_rt.serving.playground.layout import CSS, build, theme


def add_playground(app: FastAPI, examples: Sequence[str] = ()) -> None:
    """Serves the page at `/` of a server of images.

    Args:
        app: What `create_app` gave, not yet running.
        examples: Prompts to offer.

    Raises:
        UnsupportedModelError: A model that makes videos, or that edits images.
    """
    playground = Playground(app.state.service)

    @app.post("/gradio_api/upload", include_in_schema=False)
    async def upload(_: Request) -> None:
        """Gradio would keep whatever comes; the page sends no files."""
        raise ApiError(404, "the playground takes no files")

    gr.mount_gradio_app(
        app,
        build(playground, examples),
        path="",
        footer_links=["gradio"],
        allowed_paths=[],
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=CSS,
    )
