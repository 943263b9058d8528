"""`ddit-rt serve`: an artifact behind OpenAI's interface."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddit_rt.cli.command import Command, Outcome
from ddit_rt.cli.models import add_weights_arguments, embedded_text
from ddit_rt.cli.options import existing_file, existing_folder, number, whole
from ddit_rt.sources import load_engine

if TYPE_CHECKING:
    from ddit_rt.engine import Engine

LOOPBACK = "127.0.0.1"


def add_engine_arguments(
    parser: argparse.ArgumentParser, embedded: str = "'demo' or 'demo-video'"
) -> None:
    """Declares what `load_named` reads, with the embedded models that a command takes."""
    parser.add_argument(
        "artifact",
        metavar="ARTIFACT",
        help=f"what compile wrote; or {embedded}, compiled once and kept",
    )
    add_weights_arguments(parser)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    _add_http_arguments(parser.add_argument_group("interface"))
    _add_queue_arguments(parser.add_argument_group("queue"))


def _add_http_arguments(group: Any) -> None:
    group.add_argument(
        "--host", default=LOOPBACK, help="address (default: %(default)s, this machine alone)"
    )
    group.add_argument("--port", type=whole(0, 65535), default=8000, help="default: %(default)s")
    group.add_argument(
        "--api-key-file",
        type=existing_file,
        metavar="FILE",
        help="API keys, one a line, of which every request must carry one; default: none is asked",
    )
    group.add_argument("--name", help="the model's name in the interface; default: the artifact's")
    group.add_argument(
        "--lora-dir",
        type=existing_folder,
        metavar="DIR",
        help="style LoRAs (NAME.safetensors) that requests may name; default: none",
    )
    group.add_argument(
        "--max-pixels", type=whole(1), default=2048**2, help="of an image (default: %(default)s)"
    )
    group.add_argument(
        "--max-steps", type=whole(1), default=100, help="denoising steps (default: %(default)s)"
    )
    group.add_argument("--fps", type=whole(1), default=16, help="of a video (default: %(default)s)")


def _add_queue_arguments(group: Any) -> None:
    group.add_argument(
        "--max-queue",
        type=whole(1),
        default=64,
        help="pictures that may wait; beyond it: 429 (default: %(default)s)",
    )
    group.add_argument(
        "--max-batch",
        type=whole(1),
        default=4,
        help="pictures of a run; 1 turns batching off (default: %(default)s)",
    )
    group.add_argument(
        "--batch-window-ms",
        type=number(0),
        default=5.0,
        help="how long an image waits for others of its kind, where other requests are about "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--deadline-seconds",
        type=number(0, open_low=True),
        default=300.0,
        help="to an answer; beyond it: 503 (default: %(default)s)",
    )
    group.add_argument(
        "--stop-seconds",
        type=number(0),
        default=30.0,
        help="how long what was accepted may run after SIGTERM (default: %(default)s)",
    )
    group.add_argument(
        "--warmup-steps",
        type=whole(0),
        help="of the run before it is ready; 0: none (default: the pipeline's own)",
    )


def _run(args: argparse.Namespace) -> Outcome | None:
    try:
        import fastapi  # noqa: F401 - before the model: it should not cost loading one
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"ddit-rt serve needs more ({error}); pip install 'ddit_rt[serve]'"
        ) from error
    from ddit_rt.serving.app import create_app
    from ddit_rt.serving.aside import aside
    from ddit_rt.serving.config import Limits, ServeConfig, read_keys
    from ddit_rt.serving.run import listen

    config = ServeConfig(
        model=args.name or Path(args.artifact).name.removesuffix(".ddit"),
        keys=read_keys(args.api_key_file) if args.api_key_file else (),
        max_queue=args.max_queue,
        batch_window_ms=args.batch_window_ms,
        max_batch=args.max_batch,
        deadline_seconds=args.deadline_seconds,
        limits=Limits(pixels=args.max_pixels, steps=args.max_steps),
        call=embedded_text(args.model or args.artifact),
        lora_dir=args.lora_dir,
        warmup_steps=args.warmup_steps,
        fps=args.fps,
    )
    app = create_app(aside(lambda: load_named(args)), config, stop_seconds=args.stop_seconds)
    listen(app, host=args.host, port=args.port)
    return None


def load_named(args: argparse.Namespace) -> Engine:
    """The engine that a command's arguments name; see `sources.load_engine`."""
    return load_engine(
        args.artifact,
        args.model,
        command=args.command.name,
        dtype=args.dtype,
        trust_code=args.trust_code,
    )


SERVE = Command(
    name="serve",
    summary="Serve a compiled model over HTTP, with OpenAI's interface.",
    examples=(
        "ddit-rt serve demo",
        "ddit-rt serve demo.ddit --model demo --port 8080",
        "ddit-rt serve flux.ddit --model black-forest-labs/FLUX.1-dev --max-batch 4 \\",
        "    --batch-window-ms 20 --lora-dir styles",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
