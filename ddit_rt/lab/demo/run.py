"""The demo run: compile, save, load, generate with every plan, compare, draw.

Images by the embedded FLUX model and videos by the embedded Wan model take the same path.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import ddit_rt
from ddit_rt.artifact import require_savable
from ddit_rt.engine import Engine
from ddit_rt.lab.demo.plans import DEMO_POLICY, FINE, VIDEO_POLICY, Plan, demo_plans
from ddit_rt.lab.demo.prompts import (
    DEMO_PROMPTS,
    IMAGE_CALL,
    MAX_SEQUENCE_LENGTH,
    VIDEO_CALL,
    VIDEO_PROMPTS,
)
from ddit_rt.lab.demo.report import REFERENCE, report_of
from ddit_rt.lab.measure.fidelity import fidelity, video_fidelity
from ddit_rt.lab.measure.report import write_json
from ddit_rt.lab.measure.timing import (
    Batch,
    Pixels,
    Sample,
    engine_method,
    measure,
    pipeline_method,
)
from ddit_rt.lab.measure.video_file import require_encoder, write_mp4

_FRAMES_PER_SECOND, _VIDEO_GUIDANCE = 8, 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Settings of the demo.

    Attributes:
        out: Folder to write to; it is made.
        prompts: One image or video is generated of each.
        steps: Denoising steps.
        height: Height of an image or frame.
        width: Width of an image or frame.
        num_frames: Frames of a video; None for images.
        seed: Seed of the first prompt; prompt i uses seed + i.
        repeats: Timed runs of every image or video.
        keep_artifact: Whether the artifact stays in `out`, as `demo.ddit` or `video.ddit`.
    """

    out: Path
    prompts: tuple[str, ...] = DEMO_PROMPTS
    steps: int = 24
    height: int = IMAGE_CALL["height"]
    width: int = IMAGE_CALL["width"]
    num_frames: int | None = None
    seed: int = 0
    repeats: int = 3
    keep_artifact: bool = False

    def __post_init__(self) -> None:
        """Checks the counts before minutes of work."""
        if self.steps < 1 or self.repeats < 1 or not self.prompts:
            raise ValueError(
                f"got steps={self.steps}, repeats={self.repeats}, {len(self.prompts)} prompts; "
                "each must be at least 1"
            )

    @property
    def video(self) -> bool:
        """Whether videos are made."""
        return self.num_frames is not None

    def size(self) -> dict[str, int]:
        """Arguments of `compile` and of a call."""
        size = {"height": self.height, "width": self.width}
        return size if self.num_frames is None else {**size, "num_frames": self.num_frames}

    def call(self) -> dict[str, Any]:
        """Further arguments of a call, except for the steps."""
        call = {**self.size(), "max_sequence_length": MAX_SEQUENCE_LENGTH}
        return {**call, "guidance_scale": _VIDEO_GUIDANCE} if self.video else call


def video_demo(out: Path, **settings: Any) -> DemoConfig:
    """Settings of the video demo, of which `settings` change some."""
    size = {name: VIDEO_CALL[name] for name in ("height", "width", "num_frames")}
    defaults = {"prompts": VIDEO_PROMPTS, **size, "repeats": 2}
    return DemoConfig(out=out, **{**defaults, **settings})


def run_demo(pipeline: Any, config: DemoConfig) -> dict[str, Any]:
    """Runs the demo and writes its files, as `compare` does.

    Args:
        pipeline: The embedded pipeline, loaded.
        config: Settings.

    Returns:
        The report, as in `report.json`.

    Raises:
        ModuleNotFoundError: A package of the extra `demo` is missing; the message names it.
    """
    if config.video:
        require_encoder()
    config.out.mkdir(parents=True, exist_ok=True)
    pipeline.set_progress_bar_config(disable=True)
    policy = VIDEO_POLICY if config.video else DEMO_POLICY
    kept = config.keep_artifact
    place = nullcontext(config.out) if kept else tempfile.TemporaryDirectory(prefix="ddit_rt-")
    with place as folder:
        path = Path(folder, "video.ddit" if config.video else "demo.ddit")
        engine, compiling = prepare_engine(pipeline, path, **config.size(), patch_policy=policy)
        return compare(engine, demo_plans(config.steps, policy), config, compiling)


def prepare_engine(
    pipeline: Any, path: Path, **arguments: Any
) -> tuple[Engine, dict[str, float | int]]:
    """Compiles, saves and loads back, so that the loaded engine is what a demo runs.

    Args:
        pipeline: The pipeline.
        path: Where its artifact goes.
        arguments: Arguments of `ddit_rt.compile`.

    Returns:
        The engine, and the entry `compile` of the report.
    """
    require_savable(path)
    started = time.perf_counter()
    compiled = ddit_rt.compile(pipeline, **arguments)
    seconds = time.perf_counter() - started
    compiled.save(path)
    started = time.perf_counter()
    engine = ddit_rt.load(path, pipeline)
    return engine, {
        "compile_seconds": seconds,
        "load_seconds": time.perf_counter() - started,
        "artifact_bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
    }


def compare(
    engine: Engine,
    plans: Sequence[Plan],
    config: DemoConfig,
    compiling: Mapping[str, float | int],
) -> dict[str, Any]:
    """Generates every prompt with diffusers and with every plan, and writes the files of the demo.

    These are `report.json`, `timeline.png`, and `grid.png` or, of videos, `clips.mp4`.

    Args:
        engine: A compiled pipeline.
        plans: The plans, full resolution among them.
        config: Settings; `out` must exist.
        compiling: The entry `compile`.

    Returns:
        The report.
    """
    samples = _timed(engine, plans, config)
    made = {name: [sample.outputs[0] for sample in row] for name, row in samples.items()}
    settings = {
        **config.call(),
        "steps": config.steps,
        "seed": config.seed,
        "repeats": config.repeats,
        "prompts": list(config.prompts),
    }
    closeness = video_fidelity if config.video else fidelity
    found = {name: closeness(row, made[FINE]) for name, row in made.items()}
    report = report_of(engine, plans, samples, found, settings=settings, compiling=compiling)
    write_json(config.out / "report.json", report)
    _draw(report, made, config)
    return report


def _timed(engine: Engine, plans: Sequence[Plan], config: DemoConfig) -> dict[str, list[Sample]]:
    """A sample per prompt, by the name of the plan and of `REFERENCE`, which take turns."""
    arguments = {"num_inference_steps": config.steps, **config.call()}
    methods = [
        pipeline_method(REFERENCE, REFERENCE, engine.pipeline, **arguments),
        *(
            engine_method(plan.name, plan.label, engine, patch_policy=plan.policy, **arguments)
            for plan in plans
        ),
    ]
    batches = [
        Batch(prompts=(prompt,), seeds=(config.seed + index,))
        for index, prompt in enumerate(config.prompts)
    ]
    total = len(methods) * (1 + config.repeats * len(batches))
    with tqdm(total=total, desc="generate", leave=False) as bar:
        return measure(methods, batches, repeats=config.repeats, advance=bar.update)


def _draw(
    report: Mapping[str, Any], made: Mapping[str, Sequence[Pixels]], config: DemoConfig
) -> None:
    from ddit_rt.lab.demo.figures import draw_grid, draw_timeline, grid_frames

    draw_timeline(report, config.out / "timeline.png")
    if config.video:
        write_mp4(config.out / "clips.mp4", grid_frames(report, made), _FRAMES_PER_SECOND)
    else:
        draw_grid(report, made, config.out / "grid.png")
