"""What every section of `bench_real_size.py` works with: a model, an engine of it, and limits."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from real_models import MODELS, Case, Preset, RealModel
from records import Record, Save
from timing import Call, Deadline, Measured, attempt, release, take_turns, time_limit
from torch import Tensor

import ddit_rt
from ddit_rt.blocks import compile_blocks
from ddit_rt.blocks.package import package_path
from ddit_rt.engine import Engine
from ddit_rt.engine.cost import StepCost, step_cost
from ddit_rt.lab.profile.ceilings import copy_rate, matrix_rate
from ddit_rt.models import family_of
from ddit_rt.models.base import BlockType
from ddit_rt.models.quantised import has_quantised
from ddit_rt.policies import PatchPolicy, StepCache, parse_patch
from ddit_rt.steps import StepModel

PATCHES = ("p", "2p", "4p")


class Setup:
    """One run of the script.

    Attributes:
        args: Its settings, completed.
        model: The family.
        preset: The model of it, and its sizes.
        device: Where it runs.
        artifact: Folder that a compiled artifact is loaded from, or saved to if it is not there.
        deadline: When the run has to end.
        engine_times: Seconds that compiling and saving, or loading, the engine took.
    """

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        """Starts the clock.

        Args:
            args: See the attributes.
            scratch: For an artifact that nobody asked for.
        """
        self.args = args
        self.model: RealModel = MODELS[args.model]
        self.preset: Preset = self.model.presets[args.preset]
        device = torch.device(args.device)
        self.device = torch.device("cuda", device.index or 0) if device.type == "cuda" else device
        self.artifact: Path = args.artifact or scratch / "model.ddit"
        self.deadline = Deadline(args.budget_s)
        self.engine_times: dict[str, float] = {}
        self._engine_error: str | None = None
        self._costs: dict[Case, dict[str, StepCost]] = {}

    @cached_property
    def pipeline(self) -> Any:
        """The model, whose weights all methods share."""
        dtype = self.args.dtype
        return self.model.pipeline(self.model.transformer(self.preset, self.device, dtype))

    @cached_property
    def engine(self) -> Engine:
        """Our engine: loaded from `artifact`, or compiled and saved there."""
        pipeline = self.pipeline
        started = time.perf_counter()
        compiles = self.args.backend == "eager" or not self.artifact.exists()
        if compiles:
            engine = self.compiled()
            if self.args.backend != "eager":
                engine.save(self.artifact)
        else:
            engine = ddit_rt.load(self.artifact, pipeline, progress=False)
        name = "compile_seconds" if compiles else "load_seconds"
        self.engine_times[name] = time.perf_counter() - started
        return engine

    def compiled(self) -> Engine:
        """An engine, compiled anew."""
        # What has been quantised is not quantised again.
        quantised = has_quantised(self.pipeline.transformer)
        kind = None if quantised else self.args.quantization
        with mock.patch("ddit_rt.engine.build.compile_blocks", self._lowered or compile_blocks):
            return ddit_rt.compile(
                self.pipeline, backend=self.args.backend, quantization=kind, progress=False
            )

    @property
    def blocks(self) -> str:
        """What our engine's blocks are: `aot`, `eager`, or `lowered` where there was no GPU."""
        lowered = self.args.lowered and self.args.backend == "aot"
        return "lowered" if lowered else str(self.args.backend)

    @property
    def _lowered(self) -> Callable[..., list[str]] | None:
        """In the place of `compile_blocks`: packages that are there."""
        folder = self.args.lowered
        if folder is None:
            return None

        def copied(
            _: Any, block_types: Sequence[BlockType], directory: Path, **__: Any
        ) -> list[str]:
            paths = [package_path(block_type.name, None) for block_type in block_types]
            for path in paths:
                (directory / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / path, directory / path)
            return paths

        return copied

    def engine_error(self) -> str | None:
        """Why there is no engine; None if there is one.

        Compiles at most once, even if it fails, and no longer than this run has.
        """

        def make() -> Engine:
            with time_limit(self.deadline.left):
                return self.engine

        if "engine" not in self.__dict__ and self._engine_error is None:
            _, self._engine_error = attempt(make)
        return self._engine_error

    def need_engine(self) -> None:
        """Raises unless there is an engine."""
        problem = self.engine_error()
        if problem is not None:
            raise RuntimeError(f"no engine: {problem}")

    def forget_engine(self) -> None:
        """Drops the engine and all that it captured, to measure what is used without it."""
        self.__dict__.pop("engine", None)
        torch.compiler.reset()
        release()

    @property
    def form(self) -> str:
        """The form of a measurement that takes one: the only one there is, or what works."""
        forms = self.args.executors
        return str(forms[0]) if len(forms) == 1 else "auto"

    @cached_property
    def rates(self) -> dict[str, float]:
        """What the machine can do at best, measured in this run."""
        return {
            "matrix_flops_per_second": matrix_rate(self.device, self.args.dtype),
            "copy_bytes_per_second": copy_rate(self.device),
        }

    def in_turns(
        self,
        builders: Mapping[str, Callable[[], Call]],
        record: Callable[[Mapping[str, Measured]], Record],
        save: Save,
    ) -> Record:
        """The record of methods that took turns; saved whenever there is more of it."""
        measured = take_turns(
            builders,
            repeats=self.args.repeats,
            device=self.device,
            deadline=self.deadline,
            warm_up_limit=self.args.warm_up_limit_s,
            on_news=lambda measured: save(record(measured)),
        )
        return record(measured)

    def request(self, case: Case) -> dict[str, Any]:
        """Arguments of a call."""
        return self.model.request(self.pipeline, self.preset, case)

    def generate(
        self,
        case_request: dict[str, Any],
        policy: PatchPolicy,
        executor: str = "auto",
        cache: StepCache | None = None,
    ) -> Tensor:
        """Final latents from our engine, as the pipeline lays them out."""
        use_executor(self.engine, executor)
        output = self.engine(**case_request, patch_policy=policy, step_cache=cache)
        return self.model.latents(output)

    def costs(self, case: Case) -> dict[str, StepCost]:
        """Count of operations and weight bytes of one step, by patch sizes that the case offers."""
        if case in self._costs:
            return self._costs[case]
        transformer = self.pipeline.transformer
        model = StepModel(family=family_of(transformer), transformer=transformer, base={})
        height, width = case.latent
        offered = [
            patch
            for patch in PATCHES
            if not any(edge % (model.patch_size * parse_patch(patch)) for edge in (height, width))
        ]
        self._costs[case] = {
            patch: step_cost(
                model,
                height=height,
                width=width,
                frames=case.latent_frames,
                multiple=parse_patch(patch),
                batch=self.model.passes * case.batch,
                text_tokens=self.preset.text_tokens,
            )
            for patch in offered
        }
        return self._costs[case]

    def flops(self, case: Case) -> dict[str, int]:
        """Operations of one step by patch size."""
        return {patch: cost.flops for patch, cost in self.costs(case).items()}


def use_executor(engine: Any, form: str) -> None:
    """Selects a form of the executor; `"auto"` is the only one on a CPU."""
    if getattr(engine, "executor", "auto") != form:
        engine.executor = form


def captures_of(engine: Any) -> tuple[Any, ...]:
    """Reports of what was captured; none on a CPU."""
    return tuple(getattr(engine, "captures", ()))
