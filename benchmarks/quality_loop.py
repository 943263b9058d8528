"""A plain denoising loop whose patch size a rule in Python picks: for what the product lacks.

The paper reduces the standard deviations of the patches by a quantile, and says why not by their
mean. The native scores know the quantile only, so this loop exists to try the mean. With a quantile
it repeats the engine's decisions and pictures, which a test checks.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddit_rt.blocks import EagerRunner, load_runner
from ddit_rt.lab.measure.timing import Pixels
from ddit_rt.lab.plans.points import Prompt
from ddit_rt.models import family_of
from ddit_rt.policies import parse_patch, patch_name
from ddit_rt.steps import Bucket, Detail, FineBucket, Pass, RunContext, SnrBucket, StepModel

STATISTICS = ("quantile", "mean")
_WEIGHTS = {1: (1, -1), 2: (1, -2, 1), 3: (1, -3, 3, -1)}


@dataclass(frozen=True, kw_only=True, slots=True)
class HostRule:
    """The paper's rule, with the first steps at p, and a choice of how patches are reduced.

    Attributes:
        tau: Threshold of every coarse size.
        statistic: `"quantile"` or `"mean"`, over patches, of the deviations inside them.
        rho: The quantile; no part of a mean.
        order: Order of the finite difference.
    """

    tau: float
    statistic: str = "mean"
    rho: float = 0.4
    order: int = 3

    def __post_init__(self) -> None:
        """Checks the names."""
        if self.statistic not in STATISTICS or self.order not in _WEIGHTS:
            raise ValueError(
                f"got statistic={self.statistic!r}, order={self.order}; expected one of "
                f"{list(STATISTICS)} and {sorted(_WEIGHTS)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description."""
        return {"policy": type(self).__name__, **asdict(self)}

    def score(self, latents: Sequence[Tensor], patch: int) -> float:
        """Score of a patch size.

        Args:
            latents: z of the latest steps, `[1, C, H, W]` each, newest first, `order + 1` or more.
            patch: Side of a patch in latent pixels, dividing H and W.
        """
        pairs = zip(_WEIGHTS[self.order], latents, strict=False)
        difference = torch.stack([weight * z.double() for weight, z in pairs]).sum(0)
        _, channels, height, width = difference.shape
        shape = channels, height // patch, patch, width // patch, patch
        patches = difference.reshape(shape).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
        deviations = patches.std(dim=1)
        reduced = deviations.mean() if self.statistic == "mean" else deviations.quantile(self.rho)
        return float(reduced)

    def choose(self, latents: Sequence[Tensor], multiples: Sequence[int], patch_size: int) -> int:
        """The largest multiple of p whose score is below tau, else 1."""
        if len(latents) <= self.order:
            return 1
        fitting = [m for m in multiples if m > 1 and self.score(latents, m * patch_size) < self.tau]
        return max(fitting, default=1)


def host_model(engine: Any) -> StepModel:
    """The engine's unmodified blocks, compiled if the engine's are."""
    transformer, manifest = engine.pipeline.transformer, engine.artifact.manifest
    family = family_of(transformer)
    runners: dict[str, list[Any]] = {}
    for kind in family.block_types(transformer):
        blocks = kind.blocks(transformer)
        runners[kind.path] = [
            load_runner(engine.artifact.package(kind.name, None), block)
            if manifest.packages
            else EagerRunner(kind, block, ranges=manifest.ranges)
            for block in blocks
        ]
    return StepModel(family=family, transformer=transformer, base=runners)


@torch.no_grad()
def run_host_rule(
    model: StepModel,
    pipeline: Any,
    rule: HostRule,
    multiples: Sequence[int],
    prompt: Prompt,
    arguments: Mapping[str, Any],
) -> tuple[Pixels, list[str], float]:
    """One picture, with the training-free coarse step.

    Args:
        model: Of `host_model`.
        pipeline: The pipeline around it.
        rule: Picks the patch size.
        multiples: Sizes that it may pick, as multiples of p, 1 among them.
        prompt: What to draw.
        arguments: Of the pipeline's call, `num_inference_steps` among them.

    Returns:
        The picture, the patch size of every step, and the loop's milliseconds.
    """
    scheduler = copy.deepcopy(pipeline.scheduler)
    generator = torch.Generator().manual_seed(prompt.seed)
    call = {"prompt": [prompt.text], "generator": [generator], **arguments}
    prepared = model.family.prepare(pipeline, scheduler, call)
    started = time.perf_counter()
    latents = prepared.latents
    buckets = _buckets(model, prepared, scheduler, multiples)
    recent, sizes = deque([latents], maxlen=4), []
    for step, timestep in enumerate(scheduler.timesteps):
        multiple = rule.choose(recent, multiples, model.patch_size)
        velocity = buckets[multiple].velocity(latents, torch.tensor([step]))
        latents = scheduler.step(velocity.float(), timestep, latents, return_dict=False)[0]
        recent.appendleft(latents)
        sizes.append(patch_name(multiple))
    loop_ms = (time.perf_counter() - started) * 1e3
    image = prepared.finish(latents).images[0]
    return np.asarray(image.convert("RGB"), dtype=np.uint8), sizes, loop_ms


def _buckets(
    model: StepModel, prepared: Any, scheduler: Any, multiples: Sequence[int]
) -> dict[int, Bucket]:
    latents = prepared.latents
    context = RunContext(
        passes=(Pass.of(model, prepared.conditioning),),
        height=latents.shape[-2],
        width=latents.shape[-1],
        sigmas=scheduler.sigmas[:-1].float(),
        timesteps=model.family.linear_timesteps(scheduler),
        detail=Detail(tuple(latents.shape), latents.device),
    )
    return {
        multiple: FineBucket(model, context)
        if multiple == 1
        else SnrBucket(model, context, multiple)
        for multiple in multiples
    }


def offered_multiples(engine: Any) -> list[int]:
    """Patch sizes of an engine, as multiples of p."""
    return [parse_patch(entry.patch) for entry in engine.artifact.manifest.buckets]
