"""The demo run: compile, save, load, generate with every plan, compare, draw."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddit_rt.engine import Engine
from ddit_rt.lab.demo.comparison import artifact_folder, prepare_engine, report_of, timed
from ddit_rt.lab.demo.plans import DEMO_POLICY, FINE, Plan, demo_plans
from ddit_rt.lab.measure.fidelity import fidelity


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Settings of the demo.

    Attributes:
        out: Folder to write to; it is made.
        steps: Denoising steps.
        height: Picture height.
        width: Picture width.
        max_sequence_length: Text tokens.
        seed: Seed of the first prompt; the next ones count up.
        repeats: Timed runs of every picture.
        keep_artifact: Whether the artifact stays, as `demo.ddit` in `out`.
    """

    out: Path
    steps: int = 24
    height: int = 128
    width: int = 128
    max_sequence_length: int = 16
    seed: int = 0
    repeats: int = 3
    keep_artifact: bool = False

    def __post_init__(self) -> None:
        """Checks the counts before minutes of work."""
        if self.steps < 1 or self.repeats < 1:
            raise ValueError(
                f"got steps={self.steps}, repeats={self.repeats}; both must be at least 1"
            )


def run_demo(pipeline: Any, config: DemoConfig) -> dict[str, Any]:
    """Runs the demo and writes its three files.

    Args:
        pipeline: The embedded pipeline, loaded.
        config: Settings.

    Returns:
        The report, as in `report.json`.
    """
    from ddit_rt.lab.demo.prompts import DEMO_PROMPTS

    config.out.mkdir(parents=True, exist_ok=True)
    pipeline.set_progress_bar_config(disable=True)
    with artifact_folder(config.out, keep=config.keep_artifact) as folder:
        engine, compiling = prepare_engine(
            pipeline,
            folder / "demo.ddit",
            height=config.height,
            width=config.width,
            patch_policy=DEMO_POLICY,
        )
        return compare(engine, DEMO_PROMPTS, demo_plans(config.steps), config, compiling)


def compare(
    engine: Engine,
    prompts: Sequence[str],
    plans: Sequence[Plan],
    config: DemoConfig,
    compiling: Mapping[str, float | int],
) -> dict[str, Any]:
    """Generates every prompt with every plan and with diffusers, and writes the three files.

    Args:
        engine: A compiled pipeline.
        prompts: One picture each.
        plans: The plans, all-fine among them.
        config: Settings; `out` must exist.
        compiling: The entry `compile`.

    Returns:
        The report.
    """
    from ddit_rt.lab.demo.timeline import draw_timeline
    from ddit_rt.lab.measure.grid import draw_grid

    arguments = {
        "num_inference_steps": config.steps,
        "height": config.height,
        "width": config.width,
        "max_sequence_length": config.max_sequence_length,
    }
    samples = timed(
        engine, plans, prompts, seed=config.seed, repeats=config.repeats, arguments=arguments
    )
    pictures = {name: [sample.pictures[0] for sample in row] for name, row in samples.items()}
    settings = asdict(config)
    del settings["out"], settings["keep_artifact"]
    report = report_of(
        "demo",
        engine,
        plans,
        samples,
        {name: fidelity(row, pictures[FINE]) for name, row in pictures.items()},
        settings={**settings, "prompts": list(prompts)},
        compiling=compiling,
    )
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    (config.out / "report.json").write_text(text, encoding="utf-8")
    draw_grid(report, pictures, config.out / "grid.png")
    draw_timeline(report, config.out / "timeline.png")
    return report
