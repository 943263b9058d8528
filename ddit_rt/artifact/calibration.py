"""What a calibration found, as it stands in `manifest.json`.

Plain records, so that an engine can use them without the code that made them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PRESETS = ("quality", "balanced", "fast")
"""Names of the plans that every calibration offers, from the closest to the fastest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibratedPlan:
    """One measured plan; its figures are means over the calibration prompts.

    Attributes:
        kind: `"fine"` (the reference), `"steps"` (fine steps), `"static"`, `"cached"` (fine steps
            with a step cache), `"dynamic"`, or `"combined"` (coarse steps and a step cache).
        label: The plan in a few words.
        policy: `PatchPolicy.to_dict` of its policy.
        num_inference_steps: Steps that it runs; fewer than the calibration's own where fewer
            steps are part of the plan.
        cost: Cost of the denoising loop of an image, video or recording, in the calibration's unit.
        speedup: Cost of the loop at full resolution over `cost`.
        ssim: Similarity to full resolution, at most 1: structural similarity, of videos as the
            mean over their frames; of recordings STFT similarity. The evidence names it.
        psnr: Signal-to-noise ratio in dB, of images and videos to the peak; None where everything
            equals its reference.
        step_cache: `StepCache.to_dict` of its step cache; None: every step computes.
        sigmas: Noise levels of its steps, as the pipeline's call takes them; None: its own.
    """

    kind: str
    label: str
    policy: dict[str, Any]
    num_inference_steps: int
    cost: float
    speedup: float
    ssim: float
    psnr: float | None
    step_cache: dict[str, Any] | None = None
    sigmas: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Calibrated plans for one number of denoising steps.

    Attributes:
        num_inference_steps: Steps of the runs that it is for, and of its full-resolution reference.
        cost_unit: `"ms"` or `"tokens"`.
        target: What was asked for: `{"speedup": x}`, `{"min_ssim": x}`, of recordings
            `{"min_stft": x}`, or `{"budget_ms": x}`.
        presets: Plans by the names of `PRESETS`; `"balanced"` is the one that the target chose.
        front: Plans that no other one beats in both cost and similarity, full resolution
            first, then by falling cost.
        evidence: Prompts, seeds, every candidate, held-out figures, machine and versions.
    """

    num_inference_steps: int
    cost_unit: str
    target: dict[str, float]
    presets: dict[str, CalibratedPlan]
    front: tuple[CalibratedPlan, ...]
    evidence: dict[str, Any]

    def __post_init__(self) -> None:
        """Checks that every preset is there and the front is not empty."""
        if set(self.presets) != set(PRESETS) or not self.front:
            raise ValueError(
                f"a calibration needs the presets {list(PRESETS)} and a front; got the presets "
                f"{sorted(self.presets)} and {len(self.front)} plans"
            )

    @property
    def plans(self) -> tuple[CalibratedPlan, ...]:
        """All of them, presets and front."""
        return (*self.presets.values(), *self.front)

    def plan(self, choice: str | float) -> CalibratedPlan:
        """The plan of a preset's name, or of a speed between 0 and 1.

        A speed s asks for the fastest plan's speed-up to the power of s, so that equal steps of
        it are equal factors: 0 is full resolution, 1 the fastest. It gives the measured plan of
        the front that is the first to be so fast.

        Raises:
            ValueError: An unknown name, or a number outside [0, 1].
        """
        if isinstance(choice, str):
            if choice not in self.presets:
                raise ValueError(f"got the preset {choice!r}; calibrated are {list(PRESETS)}")
            return self.presets[choice]
        if not 0 <= choice <= 1:
            raise ValueError(
                f"got the speed {choice}; it lies between 0 (full resolution) and 1 (fastest)"
            )
        wanted = self.front[-1].speedup ** choice
        return next((plan for plan in self.front if plan.speedup >= wanted * 0.999), self.front[-1])


def calibration_for(calibrations: tuple[Calibration, ...], num_inference_steps: int) -> Calibration:
    """The calibration for a number of steps.

    Raises:
        ValueError: There is none; the message names those that there are.
    """
    by_steps: Mapping[int, Calibration] = {c.num_inference_steps: c for c in calibrations}
    if num_inference_steps in by_steps:
        return by_steps[num_inference_steps]
    have = f"only for {sorted(by_steps)} steps" if by_steps else "not calibrated at all"
    raise ValueError(
        f"presets and speeds for {num_inference_steps} steps need a calibration, and this "
        f"artifact is {have if not by_steps else 'calibrated ' + have}; run `ddit-rt calibrate "
        f"ARTIFACT --model MODEL --steps {num_inference_steps} --speedup 2`, or pass a policy"
    )
