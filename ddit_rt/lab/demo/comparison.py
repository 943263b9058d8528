"""What the demos of pictures and of clips share: an engine, and its plans beside diffusers.

`run.py` and `video.py` say what is generated, how closeness is taken, and what is drawn.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import ddit_rt
from ddit_rt.artifact import require_savable
from ddit_rt.engine import Engine
from ddit_rt.lab.demo.plans import Plan
from ddit_rt.lab.measure.fidelity import Fidelity
from ddit_rt.lab.measure.report import (
    SCHEMA_VERSION,
    machine,
    model_entry,
    reference_entry,
    run_entry,
    versions,
)
from ddit_rt.lab.measure.timing import Batch, Sample, engine_contender, measure, pipeline_contender

REFERENCE = "diffusers"


@contextmanager
def artifact_folder(out: Path, *, keep: bool) -> Iterator[Path]:
    """Where an artifact goes: into `out`, or a folder that is gone afterwards."""
    if keep:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="ddit_rt-") as folder:
        yield Path(folder)


def prepare_engine(
    pipeline: Any, path: Path, **arguments: Any
) -> tuple[Engine, dict[str, float | int]]:
    """Compiles, saves and loads back, so that the loaded engine is what a demo runs.

    Args:
        pipeline: The pipeline.
        path: Where its artifact goes.
        arguments: Of `ddit_rt.compile`.

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


def timed(
    engine: Engine,
    plans: Sequence[Plan],
    prompts: Sequence[str],
    *,
    seed: int,
    repeats: int,
    arguments: Mapping[str, Any],
) -> dict[str, list[Sample]]:
    """Every prompt with diffusers and with every plan, taking turns.

    Args:
        engine: A compiled pipeline.
        plans: The plans.
        prompts: One picture or clip each.
        seed: Of the first prompt; the next ones count up.
        repeats: Timed runs of each.
        arguments: Further arguments of a call.

    Returns:
        A sample per prompt, by the name of the plan, and of `REFERENCE`.
    """
    contenders = [
        pipeline_contender(REFERENCE, "diffusers", engine.pipeline, **arguments),
        *(
            engine_contender(plan.name, plan.label, engine, patch_policy=plan.policy, **arguments)
            for plan in plans
        ),
    ]
    batches = [
        Batch(prompts=(prompt,), seeds=(seed + index,)) for index, prompt in enumerate(prompts)
    ]
    total = len(contenders) * (1 + repeats * len(batches))
    with tqdm(total=total, desc="generate", leave=False) as bar:
        return measure(contenders, batches, repeats=repeats, advance=bar.update)


def report_of(
    name: str,
    engine: Engine,
    plans: Sequence[Plan],
    samples: Mapping[str, Sequence[Sample]],
    closeness: Mapping[str, Fidelity],
    *,
    settings: Mapping[str, Any],
    compiling: Mapping[str, float | int],
) -> dict[str, Any]:
    """The report, as `ddit_rt.lab.measure.report` has it.

    Args:
        name: Of the model.
        engine: Its engine.
        plans: The plans.
        samples: Of `timed`.
        closeness: To the all-fine pictures, by the same names.
        settings: The entry `settings`.
        compiling: The entry `compile`.
    """
    reference = reference_entry("diffusers", samples[REFERENCE], closeness[REFERENCE])
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine(),
        "versions": versions(),
        "model": model_entry(name, engine.pipeline.transformer),
        "settings": dict(settings),
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
