"""`ddit-rt ui`: an artifact behind a page to try it on."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from ddit_rt.cli.command import Command, Outcome
from ddit_rt.cli.models import embedded_text
from ddit_rt.cli.options import whole
from ddit_rt.cli.serve import LOOPBACK, add_engine_arguments, load_named
from ddit_rt.sources import EMBEDDED, EMBEDDED_VIDEO, is_embedded

_STOP_SECONDS = 5.0
"""How long a run may go on once the page is to end."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser, "'demo'")
    parser.add_argument(
        "--host", default=LOOPBACK, help="address (default: %(default)s, this machine alone)"
    )
    parser.add_argument("--port", type=whole(0, 65535), default=7860, help="default: %(default)s")
    parser.add_argument(
        "--max-queue",
        type=whole(1),
        default=64,
        help="pictures that may wait (default: %(default)s)",
    )
    parser.add_argument(
        "--max-steps", type=whole(1), default=100, help="denoising steps (default: %(default)s)"
    )


def _run(args: argparse.Namespace) -> Outcome | None:
    # It holds the images that pages show; for this user alone, and gone with the server.
    with tempfile.TemporaryDirectory(prefix="ddit_rt-ui-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:  # before the model: a missing extra should not cost loading one
            from ddit_rt.serving.playground import add_playground
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"ddit-rt ui needs more ({error}); pip install 'ddit_rt[ui]'"
            ) from error
        from ddit_rt.lab.demo.prompts import DEMO_PROMPTS
        from ddit_rt.serving.app import create_app
        from ddit_rt.serving.aside import aside
        from ddit_rt.serving.config import Limits, ServeConfig
        from ddit_rt.serving.run import listen

        _refuse_video(args.artifact)
        model = args.model or args.artifact
        config = ServeConfig(
            model=Path(args.artifact).name.removesuffix(".ddit"),
            max_queue=args.max_queue,
            limits=Limits(steps=args.max_steps),
            call=embedded_text(model),
        )
        app = create_app(aside(lambda: load_named(args)), config, stop_seconds=_STOP_SECONDS)
        # Prompts to offer: an embedded model knows few words.
        add_playground(app, DEMO_PROMPTS if model == EMBEDDED else ())
        listen(app, host=args.host, port=args.port)
    return None


def _refuse_video(artifact: str) -> None:
    """Before anything is compiled or loaded.

    Raises:
        ValueError: The embedded model of videos.
        UnsupportedModelError: Another of them.
    """
    from ddit_rt.artifact import read_manifest
    from ddit_rt.errors import UnsupportedModelError
    from ddit_rt.models import family_named

    if is_embedded(artifact):
        if artifact == EMBEDDED_VIDEO:
            raise ValueError(f"got {artifact}; the playground shows images: give demo")
        return
    family = family_named(read_manifest(Path(artifact)).family)
    if family.video or family.audio:
        raise UnsupportedModelError(
            f"ddit-rt ui shows images, and {family.name} makes none; use ddit-rt generate"
        )


UI = Command(
    name="ui",
    summary="Try a compiled model in the browser: images, previews and timelines of its steps.",
    examples=(
        "ddit-rt ui demo",
        "ddit-rt ui flux.ddit --model black-forest-labs/FLUX.1-dev --port 8080",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
