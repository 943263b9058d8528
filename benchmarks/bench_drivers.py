"""What it costs that the pipeline's own loop drives a run, beside the loop that a table drives.

    python benchmarks/bench_drivers.py [--out benchmarks/results/drivers_cpu.json] [--quick]

The same call, noise and plan with and without a callback that changes nothing, on the demo models:
images (FLUX) without guidance, and videos (Wan), guided, so with two passes a step. There the
table-driven loop runs the passes as one batch, its default, and one after the other, as the
pipeline's loop always does. Diffusers' own pipeline stands beside them. Whole calls without VAE,
text encoders included, in all alike. Methods take turns; times are microseconds a step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from records import RESULTS, head, parser_of, publish
from timing import rounds_of
from torch import Tensor

import ddit_rt
from ddit_rt.lab.demo.prompts import DEMO_PROMPTS, MAX_SEQUENCE_LENGTH, VIDEO_CALL, VIDEO_PROMPTS
from ddit_rt.sources import EMBEDDED, EMBEDDED_VIDEO, load_pipeline

RESULT = RESULTS / "drivers_cpu.json"
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    EMBEDDED: ({"height": 128, "width": 128}, DEMO_PROMPTS[0]),
    EMBEDDED_VIDEO: (
        {name: VIDEO_CALL[name] for name in ("height", "width", "num_frames")},
        VIDEO_PROMPTS[0],
    ),
}
"""Size and prompt of each model."""
PLANS: dict[str, ddit_rt.PatchPolicy] = {
    "fine": ddit_rt.FinePolicy(),
    "static": ddit_rt.StaticPolicy("p:0.2,4p:0.3,2p:0.3,p"),
    "dynamic": ddit_rt.DDiTPolicy(),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurements."""
    parser = parser_of(__doc__, RESULT)
    parser.add_argument("--quick", action="store_true", help="uncompiled, one round of six steps")
    args = parser.parse_args(argv)
    rounds, steps, backend = (1, 6, "eager") if args.quick else (15, 24, "aot")
    runs = [run for model in CALLS for run in runs_of(model, steps, rounds, backend)]
    publish(args.out, head(backend=backend, runs=runs))
    return 0


def runs_of(model: str, steps: int, rounds: int, backend: str) -> list[dict[str, Any]]:
    """Every plan of one model."""
    size, prompt = CALLS[model]
    how = {"prompt": prompt, "num_inference_steps": steps, "output_type": "latent"}
    call = {**size, "max_sequence_length": MAX_SEQUENCE_LENGTH, **how}
    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    engine = ddit_rt.compile(pipeline, backend=backend, progress=False, **size)
    return [measure(model, plan, pipeline, engine, call, rounds) for plan in PLANS]


def measure(
    name: str,
    plan: str,
    pipeline: Any,
    engine: ddit_rt.Engine,
    call: Mapping[str, Any],
    rounds: int,
) -> dict[str, Any]:
    """One plan of one model."""
    guided = name == EMBEDDED_VIDEO
    own = {**call, "patch_policy": PLANS[plan]}
    calls: dict[str, Callable[[], Any]] = {
        "table": lambda: generate(engine, own),
        "pipeline": lambda: generate(engine, {**own, "callback_on_step_end": keep}),
    }
    if guided:
        calls["table_apart"] = lambda: apart(engine, own)
    if plan == "fine":
        calls["diffusers"] = lambda: generate(pipeline, call)
    steps = int(call["num_inference_steps"])
    times, finals = rounds_of(calls, rounds, steps)
    equal_passes = times["table_apart" if guided else "table"]["median"]
    error = (finals["pipeline"] - finals["table"]).abs().max() / finals["table"].abs().max()
    return {
        "model": name,
        "plan": plan,
        "steps": steps,
        "guided": guided,
        "microseconds": times,
        "added": times["pipeline"]["median"] - equal_passes,
        "ratio": times["pipeline"]["median"] / times["table"]["median"],
        "relative_error": float(error),
    }


def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """A callback that changes nothing."""
    del step, timestep
    return tensors


def generate(run: Callable[..., Any], call: Mapping[str, Any]) -> Tensor:
    """Final latents of a call."""
    result = run(**call, generator=torch.Generator().manual_seed(0))
    latents = result.images if hasattr(result, "images") else result.frames
    assert isinstance(latents, Tensor)
    return latents


def apart(engine: ddit_rt.Engine, call: Mapping[str, Any]) -> Tensor:
    """The same with the passes of guidance one after the other."""
    engine.batched_guidance = False
    try:
        return generate(engine, call)
    finally:
        engine.batched_guidance = True


if __name__ == "__main__":
    sys.exit(main())
