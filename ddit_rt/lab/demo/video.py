"""The video demo: compile the embedded Wan model, run every plan, compare, write an MP4."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddit_rt.engine import Engine
from ddit_rt.lab.demo.clips import ClipConfig
from ddit_rt.lab.demo.comparison import REFERENCE, artifact_folder, prepare_engine, report_of, timed
from ddit_rt.lab.demo.plans import FINE, VIDEO_POLICY, Plan, demo_plans
from ddit_rt.lab.demo.prompts import MAX_SEQUENCE_LENGTH, VIDEO_PROMPTS
from ddit_rt.lab.measure.timing import Sample
from ddit_rt.lab.measure.video_fidelity import ClipFidelity, clip_fidelity
from ddit_rt.lab.measure.video_file import require_encoder, side_by_side, write_mp4

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
        The report, as in `report.json`: the schema of `ddit_rt.lab.measure.report`, whose `psnr`
        and `ssim` are means over the frames, and in every entry of a way to generate `flicker` and
        `speedup_over_fine`; per prompt `flicker`, `psnr_frames` and `ssim_frames`.

    Raises:
        ModuleNotFoundError: A package of the extra `demo` is missing; the message names it.
    """
    require_encoder()
    config.out.mkdir(parents=True, exist_ok=True)
    pipeline.set_progress_bar_config(disable=True)
    with artifact_folder(config.out, keep=config.keep_artifact) as folder:
        engine, compiling = prepare_engine(
            pipeline,
            folder / "video.ddit",
            height=config.height,
            width=config.width,
            num_frames=config.num_frames,
            patch_policy=VIDEO_POLICY,
            backend=config.backend,
        )
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
    from ddit_rt.lab.demo.timeline import draw_timeline

    arguments = {
        "num_inference_steps": config.steps,
        "height": config.height,
        "width": config.width,
        "num_frames": config.num_frames,
        "guidance_scale": config.guidance_scale,
        "max_sequence_length": config.max_sequence_length,
    }
    samples = timed(
        engine, plans, config.prompts, seed=config.seed, repeats=config.repeats, arguments=arguments
    )
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


def _report(
    engine: Engine,
    plans: Sequence[Plan],
    samples: Mapping[str, list[Sample]],
    config: VideoDemoConfig,
    compiling: Mapping[str, float | int],
) -> dict[str, Any]:
    clips = {name: [sample.pictures[0] for sample in row] for name, row in samples.items()}
    closeness = {name: clip_fidelity(row, clips[FINE]) for name, row in clips.items()}
    settings = asdict(config)
    for name in ("out", "keep_artifact", "backend"):
        del settings[name]
    report = report_of(
        "demo-video",
        engine,
        plans,
        samples,
        {name: close.clips for name, close in closeness.items()},
        settings={**settings, "prompts": list(config.prompts)},
        compiling=compiling,
    )
    runs = {entry["policy"]: entry for entry in report["runs"]}
    fine = runs[FINE]["seconds_denoise"]
    for name, entry in {REFERENCE: report["reference"], **runs}.items():
        entry["speedup_over_fine"] = fine / entry["seconds_denoise"]
        _add_frames(entry, closeness[name])
    return report


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
