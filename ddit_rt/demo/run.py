"""The demo run: compile, save, load, generate with every plan, compare, draw."""

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
from ddit_rt.demo.measure import (
    Batch,
    Contender,
    Sample,
    engine_contender,
    measure,
    pipeline_contender,
)
from ddit_rt.demo.plans import DEMO_POLICY, FINE, Plan, demo_plans
from ddit_rt.demo.quality import Fidelity, fidelity
from ddit_rt.demo.report import (
    SCHEMA_VERSION,
    machine,
    model_entry,
    reference_entry,
    run_entry,
    versions,
)
from ddit_rt.pipeline import Engine

REFERENCE = "diffusers"


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
    from ddit_rt.demo.prompts import DEMO_PROMPTS

    config.out.mkdir(parents=True, exist_ok=True)
    pipeline.set_progress_bar_config(disable=True)
    with ExitStack() as stack:
        folder = config.out
        if not config.keep_artifact:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddit_rt-")))
        engine, compiling = prepare_engine(pipeline, folder / "demo.ddit", config)
        return compare(engine, DEMO_PROMPTS, demo_plans(config.steps), config, compiling)


def prepare_engine(
    pipeline: Any, path: Path, config: DemoConfig
) -> tuple[Engine, dict[str, float | int]]:
    """Compiles, saves and loads back, so that the loaded engine is what the demo runs.

    Returns:
        The engine, and the entry `compile` of the report.
    """
    started = time.perf_counter()
    compiled = ddit_rt.compile(
        pipeline, height=config.height, width=config.width, patch_policy=DEMO_POLICY
    )
    seconds = time.perf_counter() - started
    compiled.save(path)
    started = time.perf_counter()
    engine = ddit_rt.load(path, pipeline)
    entry = {
        "compile_seconds": seconds,
        "load_seconds": time.perf_counter() - started,
        "artifact_bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
    }
    return engine, entry


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
    from ddit_rt.demo.grid import draw_grid
    from ddit_rt.demo.timeline import draw_timeline

    samples = _measure(_contenders(engine, plans, config), prompts, config)
    report = _report(engine, plans, samples, config, compiling)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    (config.out / "report.json").write_text(text, encoding="utf-8")
    pictures = {name: [sample.pictures[0] for sample in row] for name, row in samples.items()}
    draw_grid(report, pictures, config.out / "grid.png")
    draw_timeline(report, config.out / "timeline.png")
    return report


def _contenders(engine: Engine, plans: Sequence[Plan], config: DemoConfig) -> list[Contender]:
    arguments = {
        "num_inference_steps": config.steps,
        "height": config.height,
        "width": config.width,
        "max_sequence_length": config.max_sequence_length,
    }
    return [
        pipeline_contender(REFERENCE, "diffusers", engine.pipeline, **arguments),
        *(
            engine_contender(plan.name, plan.label, engine, patch_policy=plan.policy, **arguments)
            for plan in plans
        ),
    ]


def _measure(
    contenders: Sequence[Contender], prompts: Sequence[str], config: DemoConfig
) -> dict[str, list[Sample]]:
    batches = [
        Batch(prompts=(prompt,), seeds=(config.seed + index,))
        for index, prompt in enumerate(prompts)
    ]
    total = len(contenders) * (1 + config.repeats * len(batches))
    with tqdm(total=total, desc="generate", leave=False) as bar:
        return measure(contenders, batches, repeats=config.repeats, advance=bar.update)


def _report(
    engine: Engine,
    plans: Sequence[Plan],
    samples: Mapping[str, list[Sample]],
    config: DemoConfig,
    compiling: Mapping[str, float | int],
) -> dict[str, Any]:
    closeness = {name: _closeness(row, samples[FINE]) for name, row in samples.items()}
    reference = reference_entry("diffusers", samples[REFERENCE], closeness[REFERENCE])
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine(),
        "versions": versions(),
        "model": model_entry("demo", engine.pipeline.transformer),
        "settings": _settings(config, samples[FINE]),
        "compile": dict(compiling),
        "reference": reference,
        "runs": [
            run_entry(
                plan.name,
                plan.label,
                plan.policy.to_dict(),
                samples[plan.name],
                closeness[plan.name],
                reference,
            )
            for plan in plans
        ],
    }


def _closeness(samples: Sequence[Sample], references: Sequence[Sample]) -> Fidelity:
    return fidelity(
        [sample.pictures[0] for sample in samples], [sample.pictures[0] for sample in references]
    )


def _settings(config: DemoConfig, samples: Sequence[Sample]) -> dict[str, Any]:
    settings = asdict(config)
    del settings["out"], settings["keep_artifact"]
    return {**settings, "prompts": [sample.batch.prompts[0] for sample in samples]}
