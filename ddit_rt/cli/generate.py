"""`ddit-rt generate`: images, videos or sound from an artifact and its model."""

from __future__ import annotations

import argparse
import json
import random
import time
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddit_rt.cli.command import Command, Outcome
from ddit_rt.cli.models import (
    add_call_arguments,
    add_further_arguments,
    add_trust_argument,
    load_artifact,
    pipeline_arguments,
)
from ddit_rt.cli.options import existing_file, file_to_write, number, seed, whole
from ddit_rt.cli.outputs import output_paths, write_sound, write_video
from ddit_rt.cli.policies import add_policy_arguments, add_step_cache_argument, choose_policy
from ddit_rt.sources import MODEL_HELP, refuse_sound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ddit_rt.engine import Engine
    from ddit_rt.loop import RunTrace
    from ddit_rt.planning.request import PolicyChoice


_ENDINGS = {"image": ".png", "video": ".mp4", "audio": ".wav"}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="what compile wrote")
    parser.add_argument("--model", required=True, help=f"the weights: {MODEL_HELP}")
    parser.add_argument(
        "--prompt", required=True, nargs="+", metavar="TEXT", help="one or several prompts"
    )
    parser.add_argument(
        "--image",
        type=existing_file,
        nargs="+",
        metavar="FILE",
        help="image that the pipeline edits or starts from; several where it takes several",
    )
    parser.add_argument(
        "--mask-image", type=existing_file, metavar="FILE", help="white where it may be changed"
    )
    parser.add_argument(
        "--strength", type=number(0, 1), help="how much of --image is made anew, where it matters"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=file_to_write,
        metavar="FILE",
        help="image to write (default: out.png), or video (default: out.mp4; NAME.png: frames "
        "NAME/000.png, ...), or sound (default: out.wav); several become FILE-1, FILE-2, ...; "
        "existing files are replaced",
    )
    parser.add_argument(
        "--num-images", type=whole(1), default=1, help="images or videos per prompt"
    )
    parser.add_argument("--seed", type=seed, help="seed of the first image, then seed + 1, ...")
    parser.add_argument("--steps", type=whole(1), help="denoising steps; default: the pipeline's")
    add_call_arguments(parser)
    add_further_arguments(parser)
    parser.add_argument("--fps", type=whole(1), default=16, help="of an MP4 (default: %(default)s)")
    parser.add_argument(
        "--guidance-interval",
        type=number(0, 1),
        nargs=2,
        metavar=("START", "STOP"),
        help="part of the steps that classifier-free guidance acts in (default: 0 1)",
    )
    parser.add_argument(
        "--trace",
        type=file_to_write,
        metavar="FILE",
        help="write every step as JSON; to NAME.perfetto.json, as ui.perfetto.dev loads it",
    )
    add_trust_argument(parser)
    parser.add_argument(
        "--executor",
        choices=("auto", "loop", "step", "host"),
        default="auto",
        help="how a CUDA run is driven: one graph launch per image, one per step, or by the host "
        "(default: %(default)s)",
    )
    add_policy_arguments(parser)
    add_step_cache_argument(parser, "the calibrated plan's, else as compiled")


def _run(args: argparse.Namespace) -> Outcome:
    first = random.randrange(2**31) if args.seed is None else args.seed  # noqa: S311 - no secret
    _check_options(args)
    from ddit_rt.artifact import read_manifest
    from ddit_rt.models import family_named

    # Before the model: a missing artifact should not cost the minutes of loading one.
    manifest = read_manifest(args.artifact)
    refuse_sound(manifest, "generate")
    family = family_named(manifest.family)
    kind = "video" if family.video else "audio" if family.audio else "image"
    output = args.output or Path(f"out{_ENDINGS[kind]}")
    paths = output_paths(output, len(args.prompt) * args.num_images, kind=kind)
    engine = load_artifact(args, manifest, args.executor)
    policy = choose_policy(args.policy, args.tau, args.rho, engine.default_policy)
    prompts = [prompt for prompt in args.prompt for _ in range(args.num_images)]
    arguments = {**pipeline_arguments(args), "step_cache": args.step_cache, **_pictures(args)}
    made = [
        _generate(engine, policy, prompt, first + index, path, arguments, args.fps)
        for index, (prompt, path) in enumerate(zip(prompts, paths, strict=True))
    ]
    images = [entry for entry, _ in made]
    data = {"artifact": str(args.artifact), "policy": _policy_entry(policy), "pictures": images}
    if args.trace is not None:
        _write_traces(args.trace, data, [trace for _, trace in made])
    return Outcome(data=data, text=_text(images))


def _check_options(args: argparse.Namespace) -> None:
    """Refuses options that do not go together, before the model is loaded."""
    from ddit_rt.planning.request import check_interval
    from ddit_rt.policies import DDiTPolicy

    choose_policy(args.policy, args.tau, args.rho, DDiTPolicy())
    if args.guidance_interval is not None:
        check_interval(args.guidance_interval)


def _pictures(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of pipelines that take images."""
    from PIL import Image, UnidentifiedImageError

    def read(path: Path) -> Image.Image:
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} is no image that can be read: {error}") from error

    images = [read(path) for path in args.image or ()]
    given = {
        "image": images[0] if len(images) == 1 else images or None,
        "mask_image": None if args.mask_image is None else read(args.mask_image),
        "strength": args.strength,
    }
    return {name: value for name, value in given.items() if value is not None}


def _generate(
    engine: Engine,
    policy: PolicyChoice,
    prompt: str,
    seed: int,
    path: Path,
    arguments: dict[str, Any],
    fps: int,
) -> tuple[dict[str, Any], RunTrace]:
    """One image or video in its own run, so that it can be made again alone, with its seed."""
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    started = time.perf_counter()
    kind = "np" if path.suffix.lower() == _ENDINGS["audio"] else "pil"
    arguments = {"output_type": kind, **arguments}
    output = engine(prompt, patch_policy=policy, generator=generator, **arguments)
    seconds = time.perf_counter() - started
    size = _write(output, path, fps, getattr(engine.pipeline, "sample_rate", 0))
    trace = engine.last_trace
    assert trace is not None, "a run that returned has a trace"
    entry = {
        "path": str(path),
        "prompt": prompt,
        "seed": seed,
        **size,
        "seconds": seconds,
        "tokens": trace.tokens,
        "patch_sizes": trace.patch_sizes(),
        "reused_steps": trace.reused,
    }
    return entry, trace


def _write(output: Any, path: Path, fps: int, rate: int) -> dict[str, Any]:
    """Writes what a pipeline gave; how large it is."""
    if hasattr(output, "audios"):
        samples = output.audios[0]
        write_sound(samples, path, rate)
        return {"audio_seconds": samples.shape[-1] / rate}
    if hasattr(output, "frames"):
        image, frames = output.frames[0][0], len(output.frames[0])
        write_video(output.frames[0], path, fps)
    else:
        image, frames = output.images[0], None
        image.save(path)
    return {"height": image.height, "width": image.width, "num_frames": frames}


def _policy_entry(policy: PolicyChoice) -> dict[str, Any]:
    """A preset or speed by its name; the notes of the trace say which plan it stands for."""
    from ddit_rt.policies import PatchPolicy

    return policy.to_dict() if isinstance(policy, PatchPolicy) else {"calibrated": policy}


def _text(images: list[dict[str, Any]]) -> str:
    lines = []
    for image in images:
        runs = [f"{len([*same])} x {size}" for size, same in groupby(image["patch_sizes"])]
        reused = [f"{image['reused_steps']} steps reused"] if image["reused_steps"] else []
        lines.append(
            f"{image['path']}  {image['seconds']:.2f} s  seed {image['seed']}  "
            f"{', '.join(runs + reused)}"
        )
    return "\n".join(lines)


def _write_traces(path: Path, data: dict[str, Any], traces: Sequence[RunTrace]) -> None:
    """The traces as JSON, with what they are of; or for Perfetto, where the name says so."""
    from ddit_rt.loop.perfetto import ENDING, trace_events

    images = list(zip(data["pictures"], traces, strict=True))
    if path.name.endswith(ENDING):
        data = trace_events({f"{one['path']}, seed {one['seed']}": trace for one, trace in images})
    else:
        entries = [{**image, "trace": trace.to_dict()} for image, trace in images]
        data = {**data, "pictures": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


GENERATE = Command(
    name="generate",
    summary="Generate images or videos with a compiled model.",
    examples=(
        'ddit-rt generate demo.ddit --model demo --prompt "a red circle on plain blue" -o a.png',
        "ddit-rt generate flux.ddit --model black-forest-labs/FLUX.1-dev --dtype bfloat16 \\",
        '    --prompt "a zebra in tall grass" "a blue vase" --seed 7 --policy dynamic --tau 0.001',
        'ddit-rt generate demo.ddit --model demo --prompt "a red circle" --policy balanced',
        'ddit-rt generate flux.ddit --model ./flux --prompt "a fox" --step-cache teacache:0.4',
        'ddit-rt generate flux.ddit --model ./flux --prompt "a fox" --policy 4p:0.2,2p:0.4,p \\',
        "    --trace fox.json -o fox.png",
        'ddit-rt generate wan.ddit --model ./wan --prompt "a cat runs" --num-frames 33 -o cat.mp4',
        'ddit-rt generate edit.ddit --model ./kontext --image cat.png --prompt "give it a hat"',
    ),
    add_arguments=_add_arguments,
    run=_run,
)
