"""What training is compared with: losses of untrained paths, and fidelity of images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddit_rt.adapters import AdapterConfig, PatchAdapter
from ddit_rt.lab.train.config import DataConfig
from ddit_rt.lab.train.denoise import UNADAPTED, CoarsePath, denoise, rendered
from ddit_rt.lab.train.student import Student
from ddit_rt.lab.train.velocities import States, coarse_velocity, squared_error, taught
from ddit_rt.policies import patch_name

COARSE_SHARE = 0.6
_WARMUP = 3
TRAINING_FREE, UNTRAINED, TRAINED = "training-free", "paper, untrained", "trained"

Losses = dict[int, float]
Weighting = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def untrained_losses(student: Student, states: States, weigh: Weighting) -> dict[str, Losses]:
    """Losses of the two paths that need no training, by name and multiple of p."""
    states = taught(student.model, states)
    losses: dict[str, Losses] = {TRAINING_FREE: {}, UNTRAINED: {}}
    for multiple in student.multiples:
        paper = _untrained_paper(student, multiple)
        for name, adapter in ((TRAINING_FREE, None), (UNTRAINED, paper)):
            velocity = coarse_velocity(student.model, states, multiple, adapter, student.model.base)
            assert states.velocity is not None
            error = squared_error(velocity, states.velocity)
            losses[name][multiple] = float(weigh(error, states.sigmas))
    return losses


@torch.no_grad()
def current_losses(student: Student, states: States, weigh: Weighting) -> Losses:
    """Losses of the adapters as they are now."""
    errors = student.errors(states)
    return {multiple: float(weigh(error, states.sigmas)) for multiple, error in errors.items()}


def warn_if_worse(
    step: int, variant: str, losses: Losses, untrained: Mapping[str, Losses]
) -> list[str]:
    """Says loudly which adapters are worse than doing nothing; returns the same lines."""
    own = TRAINING_FREE if variant == "snr" else UNTRAINED
    lines = []
    for multiple, loss in losses.items():
        for name, baseline in untrained.items():
            if not loss < baseline[multiple]:
                reason = (
                    "training has made it worse: a bug, or a learning rate that is far too high"
                    if name == own
                    else "until it falls below, leave the adapter out"
                )
                lines.append(
                    f"after {step} steps the loss at {patch_name(multiple)} is {loss:.4g}, not "
                    f"below the {baseline[multiple]:.4g} of the path '{name}'; {reason}"
                )
    for line in lines:
        warnings.warn(line, stacklevel=2)
    return lines


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """Fidelity of one patch size's images to full resolution from the same noise.

    Attributes:
        patch: Patch size by name.
        plan: Which steps it took, in words.
        psnr: Mean PSNR in dB over the prompts, by path.
        prompts: Number of prompts.
    """

    patch: str
    plan: str
    psnr: dict[str, float]
    prompts: int


def measure_gain(
    student: Student, pipeline: Any, data: DataConfig, prompts: Sequence[str], seed: int
) -> list[Gain]:
    """Runs every size for 60% of the steps, from the start and after three at p."""
    steps, coarse = data.sampling_steps, round(COARSE_SHARE * data.sampling_steps)
    render = _renderer(student, pipeline, data, prompts, seed)
    fine = render([1] * steps)
    gains = []
    for multiple in student.multiples:
        for first, words in ((0, "from the start"), (_WARMUP, f"after {_WARMUP} steps at p")):
            length = min(coarse, steps - first)
            if length < 1:
                continue
            plan = [1] * first + [multiple] * length + [1] * (steps - first - length)
            psnr = {
                name: _psnr(render(plan, path), fine)
                for name, path in _paths(student, multiple).items()
            }
            gains.append(
                Gain(
                    patch=patch_name(multiple),
                    plan=f"{length} of {steps} steps, {words}",
                    psnr=psnr,
                    prompts=len(prompts),
                )
            )
    return gains


def sample_grid(
    student: Student, pipeline: Any, data: DataConfig, prompts: Sequence[str], seed: int
) -> Tensor:
    """Full resolution on top, then for each size the training-free and the trained ones.

    Returns:
        `[3, rows * height, prompts * width]`, in [0, 1].
    """
    steps, coarse = data.sampling_steps, round(COARSE_SHARE * data.sampling_steps)
    render = _renderer(student, pipeline, data, prompts, seed)
    rows = [render([1] * steps)]
    for multiple in student.multiples:
        plan, paths = [multiple] * coarse + [1] * (steps - coarse), _paths(student, multiple)
        rows += [render(plan, paths[name]) for name in (TRAINING_FREE, TRAINED)]
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)


def write_png(path: Path, image: Tensor) -> None:
    """`[3, H, W]` in [0, 1] to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = image.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)


def _renderer(
    student: Student, pipeline: Any, data: DataConfig, prompts: Sequence[str], seed: int
) -> Callable[..., Tensor]:
    """Makes images of some prompts, always from the same noise, for any plan and path."""

    def render(plan: Sequence[int], path: CoarsePath = UNADAPTED) -> Tensor:
        """`[prompts, 3, height, width]`, in [0, 1], float32."""
        parts = []
        for start in range(0, len(prompts), data.encode_batch):
            batch = prompts[start : start + data.encode_batch]
            result = rendered(
                lambda prepared: denoise(student.model, prepared, plan, path),
                student.family,
                pipeline,
                batch,
                [seed + start + offset for offset in range(len(batch))],
                num_inference_steps=data.sampling_steps,
                output_type="pt",
                **data.call,
            )
            parts.append(result.images.float().cpu())
        return torch.cat(parts)

    return render


def _paths(student: Student, multiple: int) -> dict[str, CoarsePath]:
    """The ways to take a size, by name."""
    trained = student.adapter(multiple)
    paths = {TRAINING_FREE: UNADAPTED}
    if trained.config.variant == "paper":
        paths[UNTRAINED] = CoarsePath(adapter=_untrained_paper(student, multiple))
    paths[TRAINED] = CoarsePath(adapter=trained, runners=student.runners(multiple))
    return paths


def _untrained_paper(student: Student, multiple: int) -> PatchAdapter:
    """The paper's initialisation of a size, without LoRA."""
    config = AdapterConfig(patch=patch_name(multiple), rank=1, variant="paper")
    # Its residual is zero whatever is drawn here; the caller's draws are left alone.
    with torch.random.fork_rng(devices=[]):
        return PatchAdapter.from_base(config, student.family, student.transformer)


def _psnr(images: Tensor, references: Tensor) -> float:
    """Mean over the images, in dB; one that equals its reference counts as 100 dB."""
    errors = (images - references).square().flatten(1).mean(1).tolist()
    return sum(min(100.0, -10 * math.log10(max(error, 1e-30))) for error in errors) / len(errors)
