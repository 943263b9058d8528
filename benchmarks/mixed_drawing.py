"""Pictures of the plans of `mixed_plans.py`, each drawn once and kept with its time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixed_plans import Choice, Plan
from mixed_regions import Prompted, Subject
from mixed_steps import Run
from quality_runs import code_fingerprint
from torch import Tensor

from ddit_rt.lab.demo.prompts import MAX_SEQUENCE_LENGTH
from ddit_rt.lab.measure.timing import Pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """What is drawn, and how large.

    Attributes:
        name: Identifier.
        side: In pixels.
        scale: Of true guidance; None without.
        open: Whether captions name the ground alone, and leave shape and colour open.
    """

    name: str
    side: int = 128
    scale: float | None = None
    open: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A picture, what ran for it, and the processor seconds of its loop."""

    image: Pixels
    tokens: int
    seconds: float


def noise_levels(scheduler: Any, steps: int, tokens: int) -> Tensor:
    """As `FluxPipeline`'s call sets them for a picture of as many tokens, `[steps + 1]`."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    levels: Tensor = scheduler.sigmas
    return levels


class Drawing:
    """One condition.

    Attributes:
        tokens: Image tokens of a step at p.
    """

    def __init__(
        self, pipeline: Any, condition: Condition, folder: Path, part: Sequence[str] = ()
    ) -> None:
        """On a `FluxPipeline`; pictures are kept in `folder`, those of each part by themselves."""
        self._pipeline, self._condition = pipeline, condition
        self._folder, self._part = folder, list(part)
        pixels = condition.side // pipeline.vae_scale_factor
        self._subject = Subject(transformer=pipeline.transformer, size=(pixels, pixels))
        self.tokens = self._subject.positions[0].shape[0]
        self._warm = False

    def kept(self, plan: Plan, prompt: str, seed: int) -> Made:
        """One picture, drawn now or before."""
        file = self.file(plan, prompt, seed)
        if not file.exists():
            with torch.inference_mode():
                if not self._warm:
                    self._draw(plan, prompt, seed)
                    self._warm = True
                made = self._draw(plan, prompt, seed)
            partial = file.with_suffix(".part.npz")
            np.savez_compressed(partial, **asdict(made))
            partial.replace(file)  # whole or not at all
        with np.load(file) as data:
            tokens, seconds = int(data["tokens"]), float(data["seconds"])
            return Made(image=data["image"], tokens=tokens, seconds=seconds)

    def file(self, plan: Plan, prompt: str, seed: int) -> Path:
        """Where a picture is kept, by what went into it, this code among it."""
        what = [self._condition, plan, prompt, seed, self._part, self._code]
        name = hashlib.sha256(repr(what).encode()).hexdigest()[:32]
        return self._folder / f"{name}.npz"

    @cached_property
    def _code(self) -> str:
        digest = hashlib.sha256(code_fingerprint().encode())
        for name in ("model", "plans", "regions", "steps"):
            digest.update((Path(__file__).parent / f"mixed_{name}.py").read_bytes())
        return digest.hexdigest()

    def _draw(self, plan: Plan, prompt: str, seed: int) -> Made:
        """One picture."""
        generator = torch.Generator().manual_seed(seed)
        channels = self._pipeline.transformer.config.in_channels // 4
        noise = torch.randn(1, channels, *self._subject.size, generator=generator)
        sigmas = noise_levels(self._pipeline.scheduler, plan.steps, self.tokens)
        prompted = self._prompted(prompt)
        started = time.process_time()
        run = Run(self._subject, prompted, noise, sigmas, seed)
        choose = Choice(plan, self._subject, sigmas) if plan.policy is not None else None
        for index in range(plan.steps):
            run.step(index, choose(run, index) if choose is not None else plan.how[index])
        seconds = time.process_time() - started - run.aside
        return Made(image=self._decoded(run.latents[0]), tokens=run.tokens, seconds=seconds)

    def _prompted(self, prompt: str) -> Prompted:
        scale = self._condition.scale
        texts = [prompt] if scale is None else [prompt, ""]
        text, pooled, _ = self._pipeline.encode_prompt(
            prompt=texts, prompt_2=None, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
        embedded = self._pipeline.transformer.context_embedder(text)
        return Prompted(text=embedded, pooled=pooled, scale=scale)

    def _decoded(self, latents: Tensor) -> Pixels:
        vae = self._pipeline.vae
        image = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor)[0]
        pixels = (image[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
        found: Pixels = (pixels * 255).round().to(torch.uint8).numpy()
        return found
