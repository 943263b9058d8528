"""An adapter for mixed steps: LoRA by which some of the tokens yield what all of them would.

It is distilled from runs of the study model at full resolution, on captions that nothing is
reported on. An example is a stretch of such a run: the latest step at p, the first mixed step
behind it, and one up to sixteen steps later, with the regions that both would compute. The clean
estimate of the last, less what the mixture is known to move it since the first
(`ddit_rt/steps/mixed.py`), is to be what the model finds when it sees all tokens. All sizes and
shares are trained at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from study_models import studied
from torch import Tensor

import ddit_rt
from ddit_rt import ops
from ddit_rt.adapters import AdapterConfig
from ddit_rt.lab.train.config import OptimizerConfig
from ddit_rt.lab.train.denoise import denoise, prepare
from ddit_rt.lab.train.optimizers import CLIP, WeightAverage, build_optimizer, learning_rate_at
from ddit_rt.lab.train.student import Student
from ddit_rt.models import family_of
from ddit_rt.steps import Runners, StepModel, token_velocity
from ddit_rt.steps.mixed import Regions, movement

MULTIPLES, SHARES = (2, 4), (0.25, 0.5)
BATCH, RANK, LONGEST = 4, 32, 16
"""States of a step; rank of the LoRA; longest run of mixed steps."""
_SEED, _FIRST_SEED = 0, 900_000


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Runs at full resolution.

    Attributes:
        latents: z_k, `[R, N, C, H, W]`.
        velocities: v_k, guided, likewise.
        sigmas: Noise levels, `[N]`.
        conditioning: Of the prompts, and of the negative prompts, by name, `[R, ...]` each.
    """

    latents: Tensor
    velocities: Tensor
    sigmas: Tensor
    conditioning: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]

    def clean(self, rows: list[int], step: int) -> Tensor:
        """The clean estimate of a step."""
        return self.latents[rows, step] - self.sigmas[step] * self.velocities[rows, step]


def trained_blocks(side: int, *, runs: int, run_steps: int, steps: int, backend: str) -> Runners:
    """Blocks of the study model with the trained LoRA in their weights, compiled as its own are.

    Args:
        side: Of the images, in pixels.
        runs: How many are recorded.
        run_steps: Steps of each.
        steps: Optimizer steps.
        backend: As `ddit_rt.compile` takes it.
    """
    pipeline = studied(side).pipeline
    family = family_of(pipeline.transformer, pipeline)
    config = AdapterConfig(patch="2p", rank=RANK, lora_alpha=RANK)
    student = Student(family, pipeline.transformer, (config,), seed=_SEED)
    recorded = record(student.model, pipeline, side, runs, run_steps)
    train(student, recorded, steps)
    for layer in student.transformer.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge(adapter_names=[config.patch])
    student.unload()
    engine = ddit_rt.compile(pipeline, height=side, width=side, backend=backend, progress=False)
    return engine._compiled.steps.base  # noqa: SLF001


def record(model: StepModel, pipeline: Any, side: int, runs: int, run_steps: int) -> Recorded:
    """Runs at full resolution of captions by which nothing is measured."""
    captions, call = studied(side).seen[-runs:], studied(side).arguments
    prepared = prepare(
        model.family,
        pipeline,
        captions,
        range(_FIRST_SEED, _FIRST_SEED + runs),
        num_inference_steps=run_steps,
        **{**call, "negative_prompt": [""] * runs},
    )
    latents, velocities = list[Tensor](), list[Tensor]()

    def keep(_: int, z: Tensor, v: Tensor) -> None:
        latents.append(z.clone())
        velocities.append(v.float().clone())

    sigmas = prepared.scheduler.sigmas[:-1].clone()
    denoise(model, prepared, [1] * run_steps, record=keep)
    negative = {
        name.removeprefix("negative_"): value
        for name, value in prepared.conditioning.items()
        if name.startswith("negative_")
    }
    own = {name: prepared.conditioning[name] for name in negative}
    return Recorded(
        latents=torch.stack(latents, 1),
        velocities=torch.stack(velocities, 1),
        sigmas=sigmas,
        conditioning=(own, negative),
    )


def train(student: Student, recorded: Recorded, steps: int) -> None:
    """Trains the LoRA of a student with one size; its weights are averages afterwards."""
    teacher, rng = student.model, torch.Generator().manual_seed(_SEED)
    pupil = replace(teacher, base=student.runners(*student.multiples))
    height, width = recorded.latents.shape[-2:]
    regions = [Regions(teacher.grid(height, width), one, teacher.device) for one in MULTIPLES]
    parameters = [one for name, one in student.transformer.named_parameters() if "lora_" in name]
    config = OptimizerConfig(lr=2e-3)
    optimizer, average = build_optimizer(config, parameters), WeightAverage(parameters, config.ema)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=rng))

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(config, step, steps)
        rows = torch.randint(len(recorded.latents), (BATCH,), generator=rng).tolist()
        at = drawn(max(3, len(recorded.sigmas) // 5), len(recorded.sigmas))
        latest = max(1, at - drawn(2, LONGEST + 2))
        moved = recorded.clean(rows, latest) - recorded.clean(rows, latest - 1)
        places = _places(teacher, regions[drawn(0, 2)], moved, SHARES[drawn(0, 2)])
        clean = partial(_clean, recorded=recorded, rows=rows, which=drawn(0, 2))
        with torch.no_grad():
            known, wanted = (clean(teacher, step=one)[:, places] for one in (latest, at))
        moves = clean(pupil, step=latest + 1, places=places) - known
        fade = (recorded.sigmas[at] / recorded.sigmas[latest + 1]).square()
        loss = (clean(pupil, step=at, places=places) - fade * moves - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        average.update()
    with torch.no_grad():
        for parameter, value in zip(parameters, average.values, strict=True):
            parameter.copy_(value)


def _places(model: StepModel, regions: Regions, moved: Tensor, share: float) -> Tensor:
    """The tokens of a mixed step, as `ddit_rt/steps/mixed.py` picks them."""
    edge = model.patch_size * math.isqrt(regions.tokens.shape[1])
    order = movement(moved, edge).argsort(descending=True, stable=True)
    whole = math.ceil(share * regions.count)
    return torch.cat((regions.tokens[order[:whole]].flatten(), regions.anchors[order[whole:]]))


def _clean(
    model: StepModel,
    *,
    recorded: Recorded,
    rows: list[int],
    step: int,
    which: int,
    places: Tensor | None = None,
) -> Tensor:
    """Clean estimate of all tokens at p, or of those at some places, `[B, n, C p p]`.

    Args:
        model: The model.
        recorded: Runs.
        rows: Which of them.
        step: And which step.
        which: With the prompts, 0, or the negative ones, 1.
        places: `[n]`; by default all.
    """
    layers, transformer = model.layers, model.transformer
    latents, sigma = recorded.latents[rows, step], recorded.sigmas[step]
    conditioning = {name: one[rows] for name, one in recorded.conditioning[which].items()}
    text = layers.embed_text(transformer, conditioning)
    positions = layers.positions(transformer, model.grid(*latents.shape[-2:]), text.shape[1])
    tokens = ops.pack(latents, model.patch_size)
    if places is not None:
        tokens = tokens.index_select(1, places)
        positions = layers.positions_at(positions, places, text.shape[1])
    # One level for all samples: of every pairing of the two the family makes, one row.
    temb = layers.embed_time(transformer, sigma[None], conditioning)[0]
    hidden = layers.embed_tokens(transformer, tokens)
    return tokens - sigma * token_velocity(model, hidden, text, temb, positions)
