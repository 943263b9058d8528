"""`ddit-rt batch`: the images of a file of prompts, made on all GPUs, resumable."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddit_rt.cli.command import Command, Outcome
from ddit_rt.cli.models import add_weights_arguments, embedded_text
from ddit_rt.cli.options import existing_file, folder_to_write, seed, whole
from ddit_rt.serving.ray_local import require_ray
from ddit_rt.sources import (
    EMBEDDED_VIDEO,
    check_names,
    engine_loader,
    is_embedded,
    refuse_sound,
)

if TYPE_CHECKING:
    from ddit_rt.serving.batch import Item

_SHOWN = 3
"""Failures that the message names."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts",
        type=existing_file,
        metavar="PROMPTS.jsonl",
        help='a JSON object a line: {"prompt": ...}, and as wanted id, n, seed, size, '
        "num_inference_steps, guidance_scale, negative_prompt, patch_policy, step_cache, "
        "num_frames, as docs/serving.md tells of a request",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=folder_to_write,
        required=True,
        metavar="DIR",
        help="folder of the images and manifest.jsonl; a job that was begun there is resumed",
    )
    parser.add_argument(
        "--artifact",
        required=True,
        help="what compile wrote; or 'demo' or 'demo-video', compiled once and kept",
    )
    add_weights_arguments(parser)
    parser.add_argument(
        "--workers",
        type=whole(1),
        help="number of engines (default: one per GPU, or one on the CPU)",
    )
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="seed of the first image, then seed + 1, ..., for lines without one "
        "(default: %(default)s)",
    )
    parser.add_argument("--fps", type=whole(1), default=16, help="of videos (default: %(default)s)")


def _run(args: argparse.Namespace) -> Outcome:
    require_ray("ddit-rt batch")
    from ddit_rt.serving import batch

    about, video, gpu = _about(args)
    items = batch.read_items(args.prompts, args.seed, ".mp4" if video else ".png")
    job = {"prompts": batch.digest(items), **about}
    with batch.opened(args.out, job):
        there = batch.done(args.out, items)
        left = [item for item in items if item.file not in there]
        failed = _make(args, left, len(items), gpu=gpu) if left else []
        count = batch.write_manifest(args.out, items)
    if failed:
        raise ValueError(_failure(failed, len(items), args.out))
    data = {"images": count, "made": len(left), "manifest": str(args.out / batch.MANIFEST)}
    return Outcome(data=data, text=f"{count} images, {len(left)} made now: {data['manifest']}")


def _about(args: argparse.Namespace) -> tuple[dict[str, Any], bool, bool]:
    """What tells the job from others with its prompts; whether it is of videos, and on CUDA."""
    from ddit_rt.artifact import read_manifest
    from ddit_rt.models import family_named

    about = {"artifact": args.artifact, "model": args.model, "dtype": args.dtype}
    check_names(args.artifact, args.model)
    if is_embedded(args.artifact):
        return about, args.artifact == EMBEDDED_VIDEO, False
    manifest = read_manifest(Path(args.artifact))
    refuse_sound(manifest, "batch", audio=True)
    about["artifact"] = manifest.digest
    video = family_named(manifest.family).video
    return about, video, manifest.environment.device == "cuda"


def _make(
    args: argparse.Namespace, left: Sequence[Item], count: int, *, gpu: bool
) -> list[dict[str, Any]]:
    """Makes the images that are left; returns those that could not be made."""
    import ray
    from tqdm import tqdm

    from ddit_rt.serving import ray_batch

    load = engine_loader(
        args.artifact,
        args.model,
        command="batch",
        dtype=args.dtype,
        trust_code=args.trust_code,
    )
    settings = {"fps": args.fps, "call": embedded_text(args.model or args.artifact)}
    workers, takes = ray_batch.start_ray(args.workers, gpu=gpu)
    try:
        made = ray_batch.make(
            left, load, args.out.absolute(), settings, workers=workers, takes=takes
        )
        with tqdm(made, total=count, initial=count - len(left), unit="image") as progress:
            return [told for told in progress if told["error"]]
    finally:
        ray.shutdown()


def _failure(failed: Sequence[dict[str, Any]], count: int, out: Path) -> str:
    first = sorted(failed, key=lambda told: int(told["line"]))[:_SHOWN]
    told = "; ".join(f"line {one['line']}: {one['error']}" for one in first)
    return (
        f"{len(failed)} of {count} images could not be made ({told}); the others are in {out}: "
        "run the command again to try these again"
    )


BATCH = Command(
    name="batch",
    summary="Make the images of a file of prompts on all GPUs; a killed job resumes.",
    examples=(
        "ddit-rt batch prompts.jsonl --artifact demo --out images --workers 2",
        "ddit-rt batch prompts.jsonl --artifact flux.ddit \\",
        "    --model black-forest-labs/FLUX.1-dev --out images",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
