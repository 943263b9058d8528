"""The video demo: compile the embedded Wan model, run every plan, compare, write an MP4."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import ddit_rt
from ddit_rt.demo.clips import ClipConfig
from ddit_rt.demo.measure import (
    Batch,
    Contender,
    Sample,
    engine_contender,
    measure,
    pipeline_contender,
)
from ddit_rt.demo.plans import FINE, VIDEO_POLICY, Plan, demo_plans
from ddit_rt.demo.prompts import MAX_SEQUENCE_LENGTH, VIDEO_PROMPTS
from ddit_rt.demo.report import (
    SCHEMA_VERSION,
    machine,
    model_entry,
    reference_entry,
    run_entry,
    versions,
)
from ddit_rt.demo.video_file import require_encoder, side_by_side, write_mp4
from ddit_rt.demo.video_quality import ClipFidelity, clip_fidelity
from ddit_rt.pipeline import Engine

REFERENCE = "diffusers"
_FRAMES_PER_SECOND = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoDemoConfig:
    """Settings of the video demo.

    Attributes:
        out: Folder to write to; it is made.
        prompts: One clip each.
        steps: Denoising steps.
        height: Height of a frame.
        width: Width of a frame.
        num_frames: Frames of a clip.
        guidance_scale: Weight of the prompt against the empty one; 1 runs the model once a step.
        max_sequence_length: Text tokens.
        seed: Seed of the first prompt; the next ones count up.
        repeats: Timed runs of every clip.
        backend: `"aot"` or `"eager"`, as `ddit_rt.compile` takes it.
        keep_artifact: Whether the artifact stays, as `video.ddit` in `out`.
    """

    out: Path
    prompts: tuple[str, ...] = VIDEO_PROMPTS
    steps: int = 24
    height: int = ClipConfig().height
    width: int = ClipConfig().width
    num_frames: int = ClipConfig().frames
    guidance_scale: float = 3.0
    max_sequence_length: int = MAX_SEQUENCE_LENGTH
    seed: int = 0
    repeats: int = 2
    backend: str = "aot"
    keep_artifact: bool = False

    def __post_init__(self) -> None:
        """Checks the counts before minutes of work."""
        if self.steps < 1 or self.repeats < 1 or not self.prompts:
            raise ValueError(
                f"got steps={self.steps}, repeats={self.repeats}, {len(self.prompts)} prompts; "
                "each must be at least 1"
            )


def run_video_demo(pipeline: Any, config: VideoDemoConfig) -> dict[str, Any]:
    """Runs the demo and writes `clips.mp4`, `timeline.png` and `report.json`.

    Args:
        pipeline: The embedded pipeline, loaded.
        config: Settings.

    Returns:
        The report, as in `report.json`: the schema of `ddit_rt.demo.report`, whose `psnr` and
        `ssim` are means over the frames, and in every entry of a way to generate `flicker` and
        `speedup_over_fine`; per prompt `flicker`, `psnr_frames` and `ssim_frames`.

    Raises:
        ModuleNotFoundError: A package of the extra `demo` is missing; the message names it.
    """
    require_encoder()
    config.out.mkdir(parents=True, exist_ok=True)
    pipeline.set_progress_bar_config(disable=True)
    with ExitStack() as stack:
        folder = config.out
        if not config.keep_artifact:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddit_rt-")))
        engine, compiling = _prepare_engine(pipeline, folder / "video.ddit", config)
        return compare_clips(engine, demo_plans(config.steps, VIDEO_POLICY), config, compiling)


def compare_clips(
    engine: Engine,
    plans: Sequence[Plan],
    config: VideoDemoConfig,
    compiling: Mapping[str, float | int],
) -> dict[str, Any]:
    """Generates every prompt with every plan and with diffusers, and writes the three files.

    Args:
        engine: A compiled pipeline.
        plans: The plans, all-fine among them.
        config: Settings; `out` must exist.
        compiling: The entry `compile`.

    Returns:
        The report.
    """
    from ddit_rt.demo.timeline import draw_timeline

    samples = _measure(_contenders(engine, plans, config), config)
    report = _report(engine, plans, samples, config, compiling)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    (config.out / "report.json").write_text(text, encoding="utf-8")
    rows = {
        _row_label(entry): [sample.pictures[0] for sample in samples[entry["policy"]]]
        for entry in report["runs"]
    }
    frames = side_by_side(config.prompts, rows)
    write_mp4(config.out / "clips.mp4", frames, _FRAMES_PER_SECOND)
    draw_timeline(report, config.out / "timeline.png")
    return report


def video_summary_table(report: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    header = (
        f"{'plan':<14}{'loop s':>8}{'over fine':>11}{'over diffusers':>16}{'call s':>8}"
        f"{'tokens':>8}{'PSNR':>7}{'SSIM':>7}{'flicker':>9}"
    )
    lines = [header]
    for entry in (report["reference"], *report["runs"]):
        psnr = "same" if entry["psnr"] is None else f"{entry['psnr']:.1f}"
        tokens = f"{entry['tokens']:.0f}" if "tokens" in entry else "-"
        lines.append(
            f"{entry['label']:<14}{entry['seconds_denoise']:>8.3f}"
            f"{entry['speedup_over_fine']:>10.2f}x{entry.get('speedup_denoise', 1.0):>15.2f}x"
            f"{entry['seconds']:>8.3f}{tokens:>8}{psnr:>7}{entry['ssim']:>7.3f}"
            f"{entry['flicker']:>9.4f}"
        )
    lines.append(
        "speed-ups of the loop; PSNR (dB) and SSIM: means over the frames, against all fine; "
        "flicker: mean error of the change from frame to frame, of 1"
    )
    return "\n".join(lines)


def _prepare_engine(
    pipeline: Any, path: Path, config: VideoDemoConfig
) -> tuple[Engine, dict[str, float | int]]:
    """Compiles, saves and loads back, so that the loaded engine is what the demo runs."""
    started = time.perf_counter()
    compiled = ddit_rt.compile(
        pipeline,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        patch_policy=VIDEO_POLICY,
        backend=config.backend,
    )
    seconds = time.perf_counter() - started
    compiled.save(path)
    started = time.perf_counter()
    engine = ddit_rt.load(path, pipeline)
    return engine, {
        "compile_seconds": seconds,
        "load_seconds": time.perf_counter() - started,
        "artifact_bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
    }


def _contenders(engine: Engine, plans: Sequence[Plan], config: VideoDemoConfig) -> list[Contender]:
    arguments = {
        "num_inference_steps": config.steps,
        "height": config.height,
        "width": config.width,
        "num_frames": config.num_frames,
        "guidance_scale": config.guidance_scale,
        "max_sequence_length": config.max_sequence_length,
    }
    return [
        pipeline_contender(REFERENCE, "diffusers", engine.pipeline, **arguments),
        *(
            engine_contender(plan.name, plan.label, engine, patch_policy=plan.policy, **arguments)
            for plan in plans
        ),
    ]


def _measure(contenders: Sequence[Contender], config: VideoDemoConfig) -> dict[str, list[Sample]]:
    batches = [
        Batch(prompts=(prompt,), seeds=(config.seed + index,))
        for index, prompt in enumerate(config.prompts)
    ]
    total = len(contenders) * (1 + config.repeats * len(batches))
    with tqdm(total=total, desc="generate", leave=False) as bar:
        return measure(contenders, batches, repeats=config.repeats, advance=bar.update)


def _report(
    engine: Engine,
    plans: Sequence[Plan],
    samples: Mapping[str, list[Sample]],
    config: VideoDemoConfig,
    compiling: Mapping[str, float | int],
) -> dict[str, Any]:
    closeness = {name: _closeness(row, samples[FINE]) for name, row in samples.items()}
    reference = reference_entry("diffusers", samples[REFERENCE], closeness[REFERENCE].clips)
    runs = [
        run_entry(
            plan.name,
            plan.label,
            plan.policy.to_dict(),
            samples[plan.name],
            closeness[plan.name].clips,
            reference,
        )
        for plan in plans
    ]
    fine = next(entry["seconds_denoise"] for entry in runs if entry["policy"] == FINE)
    for name, entry in ((REFERENCE, reference), *((entry["policy"], entry) for entry in runs)):
        entry["speedup_over_fine"] = fine / entry["seconds_denoise"]
        _add_frames(entry, closeness[name])
    settings = asdict(config)
    for name in ("out", "keep_artifact", "backend"):
        del settings[name]
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine(),
        "versions": versions(),
        "model": model_entry("demo-video", engine.pipeline.transformer),
        "settings": {**settings, "prompts": list(config.prompts)},
        "compile": dict(compiling),
        "reference": reference,
        "runs": runs,
    }


def _closeness(samples: Sequence[Sample], references: Sequence[Sample]) -> ClipFidelity:
    return clip_fidelity(
        [sample.pictures[0] for sample in samples], [sample.pictures[0] for sample in references]
    )


def _add_frames(entry: dict[str, Any], closeness: ClipFidelity) -> None:
    entry["flicker"] = closeness.mean_flicker
    for prompt, frames, flicker in zip(
        entry["prompts"], closeness.frames, closeness.flicker, strict=True
    ):
        prompt.update(flicker=flicker, psnr_frames=list(frames.psnr), ssim_frames=list(frames.ssim))


def _row_label(entry: Mapping[str, Any]) -> str:
    """What stands beside a row of clips."""
    lines = [entry["label"], f"{entry['seconds_denoise']:.2f} s denoising"]
    if entry["policy"] != FINE:
        lines += [f"{entry['speedup_over_fine']:.2f}x of all fine", f"SSIM {entry['ssim']:.3f}"]
    return "\n".join(lines)
