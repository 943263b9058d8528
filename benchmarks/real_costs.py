"""Sections `memory` and `compile`: what an engine needs beside the model before it is fast."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hardware import MemoryProbe
from real_models import Case
from real_setup import PATCHES, Setup, captures_of, use_executor
from timing import Call, attempt, release, synchronize

import ddit_rt
from ddit_rt.engine.memory import memory_of
from ddit_rt.policies import StaticPolicy

_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def memory(setup: Setup, case: Case) -> dict[str, Any]:
    """Peaks of a run of diffusers eager, and of ours with every patch size; growth by ours.

    To be trusted when it runs alone: what earlier sections left in the process counts.
    """
    probe = MemoryProbe(setup.device)
    problem = setup.engine_error()  # so that later it is loaded, and not compiled, where it can be
    setup.forget_engine()
    parameters = setup.pipeline.transformer.parameters()
    record: dict[str, Any] = {"weight_bytes": sum(p.nbytes for p in parameters)}
    arguments = {**setup.request(case), "num_inference_steps": _steps(setup, case)}
    record["diffusers_eager"] = _peak(setup, probe, lambda: setup.pipeline(**arguments))
    release()
    before = probe.used()
    problem = problem or setup.engine_error()
    if problem is not None:
        return {**record, "ddit_rt": {"error": f"no engine: {problem}"}}
    policy = StaticPolicy(_plan(setup, case))
    loaded = probe.used()
    run: Call = lambda: setup.generate(arguments, policy, setup.form)  # noqa: E731
    ours = _peak(setup, probe, run)
    release()
    ours["growth_by_load_bytes"] = loaded - before
    ours["growth_by_runs_bytes"] = probe.used() - loaded
    ours["captures"] = [asdict(report) for report in captures_of(setup.engine)]
    record["ddit_rt"] = ours
    size = {"height": case.height, "width": case.width}
    if case.num_frames:
        size["num_frames"] = case.num_frames
    record["state"] = asdict(memory_of(setup.engine.artifact, setup.pipeline, case.steps, **size))
    for kind in ("peak_bytes", "used_bytes"):
        base = record["diffusers_eager"].get(kind)
        if base and kind in ours:
            record[f"ratio_of_{kind}"] = ours[kind] / base
    return record


def compiling(setup: Setup, case: Case) -> dict[str, Any]:
    """Times to compile without any cache, to load, to capture, and from load to first image.

    The artifact is left for later calls where they look for one and there is none.
    """
    setup.forget_engine()
    record: dict[str, Any] = {}
    arguments = setup.request(case)
    policy = StaticPolicy(_plan(setup, case, case.steps))
    with tempfile.TemporaryDirectory(prefix="ddit_rt-") as name, fresh_caches(Path(name)):
        folder = Path(name) / "model.ddit"
        engine, record["compile_seconds"] = _clocked(setup, setup.compiled)
        engine.save(folder)
        if not setup.artifact.exists():
            engine.save(setup.artifact)
        record["artifact_bytes"] = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        del engine
        release()
        started = time.perf_counter()
        engine, record["load_seconds"] = _clocked(
            setup, lambda: ddit_rt.load(folder, setup.pipeline, progress=False)
        )
        use_executor(engine, setup.form)
        first: Call = lambda: engine(**arguments, patch_policy=policy)  # noqa: E731
        _, record["first_run_seconds"] = _clocked(setup, first)
        record["load_to_first_image_seconds"] = time.perf_counter() - started
        _, record["second_run_seconds"] = _clocked(setup, first)
        record["captures"] = [asdict(report) for report in captures_of(engine)]
    return record


@contextmanager
def fresh_caches(folder: Path) -> Iterator[None]:
    """Empty caches of Inductor and Triton, so that a compilation is timed and not a look-up."""
    before = {name: os.environ.get(name) for name in _CACHES}
    try:
        for name in _CACHES:
            (folder / name).mkdir()
            os.environ[name] = str(folder / name)
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _plan(setup: Setup, case: Case, steps: int | None = None) -> list[str]:
    """Every size that the case offers, coarse ones first; the rest at p."""
    offered = [patch for patch in reversed(PATCHES) if patch in setup.costs(case)]
    return offered + ["p"] * ((steps or _steps(setup, case)) - len(offered))


def _steps(setup: Setup, case: Case) -> int:
    """A few steps: memory does not grow with their number."""
    return len(setup.costs(case)) + 1


def _peak(setup: Setup, probe: MemoryProbe, run: Call) -> dict[str, Any]:
    """Memory of two runs, the first of which captures; or why there is none."""
    probe.reset()

    def twice() -> dict[str, int]:
        for _ in range(2):
            run()
            synchronize(setup.device)
        return probe.read()

    result, problem = attempt(twice)
    return {"error": problem} if problem is not None else dict(result)


def _clocked(setup: Setup, call: Call) -> tuple[Any, float]:
    started = time.perf_counter()
    result = call()
    synchronize(setup.device)
    return result, time.perf_counter() - started
