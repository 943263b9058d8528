"""`report.json` of the demo: what was run, how long it took, and its fidelity.

Schema, version 1. Strict JSON: a number that does not exist is null.

- `schema_version`: 1.
- `machine`: `cpu`, `cores`, `threads` (of torch), `platform`.
- `versions`: `ddit_rt`, `torch`, `diffusers`, `python`.
- `model`: `name`, `transformer_class`, `parameters`, `dtype`.
- `settings`: `steps`, `height`, `width`, `seed`, `repeats`, `max_sequence_length`, `prompts`; of
  videos also `num_frames` and `guidance_scale`.
- `compile`: `compile_seconds`, `load_seconds`, `artifact_bytes`.
- `reference`: diffusers' own pipeline, as an entry of `runs` without policy, tokens and speed-ups.
- `runs`: one entry per plan:
  - `policy`: `"fine"`, `"static"` or `"dynamic"`; `label`; `settings`: the policy's fields.
  - `seconds`: whole call, per image or video; `seconds_denoise`: its denoising loop. Means over
    the prompts of the median over the repeats. `ddit_rt.lab.measure.timing` says what is timed.
  - `tokens`: image tokens that the model ran on, per image or video, summed over the steps.
  - `speedup_denoise`, `speedup_end_to_end`: over `reference`, same prompts and seeds.
  - `psnr` (dB; mean over the images that differ, null when none does), `ssim`: against full
    resolution; of videos, means over the frames.
  - `prompts`: per prompt `prompt`, `seed`, `seconds`, `seconds_denoise`, `seconds_spread` and
    `seconds_denoise_spread` (`[min, max]` over the repeats), `tokens`, `psnr`, `ssim` and `trace`
    (`RunTrace.to_dict()`: every step with size, scores, thresholds, time and reason).
- Of videos, every entry of a way to generate has `flicker` and `speedup_over_fine`, and per prompt
  `flicker`, `psnr_frames` and `ssim_frames`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ddit_rt.engine import Engine
from ddit_rt.lab.demo.plans import FINE, Plan
from ddit_rt.lab.measure.fidelity import Fidelity, VideoFidelity
from ddit_rt.lab.measure.report import machine, model_entry, versions
from ddit_rt.lab.measure.timing import Sample

SCHEMA_VERSION = 1
REFERENCE = "diffusers"
"""Name of diffusers' own pipeline beside the plans."""


def report_of(
    engine: Engine,
    plans: Sequence[Plan],
    samples: Mapping[str, Sequence[Sample]],
    fidelity: Mapping[str, Fidelity | VideoFidelity],
    *,
    settings: Mapping[str, Any],
    compiling: Mapping[str, float | int],
) -> dict[str, Any]:
    """The report.

    Args:
        engine: The model's engine.
        plans: The plans.
        samples: A sample per prompt, by the name of the plan and of `REFERENCE`.
        fidelity: Fidelity to full resolution, by the same names.
        settings: The entry `settings`.
        compiling: The entry `compile`.
    """
    reference = _entry(REFERENCE, samples[REFERENCE], fidelity[REFERENCE])
    runs = [_run_entry(plan, samples[plan.name], fidelity[plan.name], reference) for plan in plans]
    video = "num_frames" in settings
    if video:
        (fine,) = (entry["seconds_denoise"] for entry in runs if entry["policy"] == FINE)
        for entry in (reference, *runs):
            entry["speedup_over_fine"] = fine / entry["seconds_denoise"]
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine(),
        "versions": versions(),
        "model": model_entry("demo-video" if video else "demo", engine.pipeline.transformer),
        "settings": dict(settings),
        "compile": dict(compiling),
        "reference": reference,
        "runs": runs,
    }


def summary_table(report: Mapping[str, Any]) -> str:
    """A few lines for a terminal."""
    video = "num_frames" in report["settings"]
    header = (
        f"{'plan':<18}{'loop s':>8}{'speed-up':>10}{'call s':>8}{'speed-up':>10}"
        f"{'tokens':>8}{'PSNR':>7}{'SSIM':>7}"
    )
    lines = [header + f"{'flicker':>9}" * video]
    for entry in (report["reference"], *report["runs"]):
        psnr = "same" if entry["psnr"] is None else f"{entry['psnr']:.1f}"
        tokens = f"{entry['tokens']:.0f}" if "tokens" in entry else "-"
        line = (
            f"{entry['label']:<18}{entry['seconds_denoise']:>8.3f}"
            f"{entry.get('speedup_denoise', 1.0):>9.2f}x{entry['seconds']:>8.3f}"
            f"{entry.get('speedup_end_to_end', 1.0):>9.2f}x{tokens:>8}{psnr:>7}"
            f"{entry['ssim']:>7.3f}"
        )
        lines.append(f"{line}{entry['flicker']:>9.4f}" if video else line)
    means = ", means over the frames," if video else ""
    lines.append(
        f"speed-up over diffusers' own pipeline; PSNR (dB) and SSIM{means} against full resolution"
    )
    if video:
        lines.append("flicker: mean error of the change from frame to frame, of 1")
    return "\n".join(lines)


def _entry(
    label: str, samples: Sequence[Sample], fidelity: Fidelity | VideoFidelity
) -> dict[str, Any]:
    """The entry `reference`, and the part of an entry of `runs` that it shares."""
    whole = fidelity.videos if isinstance(fidelity, VideoFidelity) else fidelity
    entry: dict[str, Any] = {
        "label": label,
        "seconds": fmean(sample.median_end_to_end for sample in samples),
        "seconds_denoise": fmean(sample.median_denoise for sample in samples),
        "psnr": whole.mean_psnr,
        "ssim": whole.mean_ssim,
        "prompts": [
            _prompt_entry(sample, psnr, ssim)
            for sample, psnr, ssim in zip(samples, whole.psnr, whole.ssim, strict=True)
        ],
    }
    if isinstance(fidelity, VideoFidelity):
        entry["flicker"] = fidelity.mean_flicker
        each = zip(entry["prompts"], fidelity.frames, fidelity.flicker, strict=True)
        for prompt, frames, flicker in each:
            lists = {"psnr_frames": list(frames.psnr), "ssim_frames": list(frames.ssim)}
            prompt.update(flicker=flicker, **lists)
    return entry


def _run_entry(
    plan: Plan,
    samples: Sequence[Sample],
    fidelity: Fidelity | VideoFidelity,
    reference: Mapping[str, Any],
) -> dict[str, Any]:
    entry = _entry(plan.label, samples, fidelity)
    return {
        "policy": plan.name,
        "settings": plan.policy.to_dict(),
        "tokens": fmean(prompt["tokens"] for prompt in entry["prompts"]),
        "speedup_denoise": reference["seconds_denoise"] / entry["seconds_denoise"],
        "speedup_end_to_end": reference["seconds"] / entry["seconds"],
        **entry,
    }


def _prompt_entry(sample: Sample, psnr: float | None, ssim: float) -> dict[str, Any]:
    trace = sample.trace
    entry: dict[str, Any] = {
        "prompt": sample.batch.prompts[0],
        "seed": sample.batch.seeds[0],
        "seconds": sample.median_end_to_end,
        "seconds_denoise": sample.median_denoise,
        "seconds_spread": [min(sample.end_to_end), max(sample.end_to_end)],
        "seconds_denoise_spread": [min(sample.denoise), max(sample.denoise)],
        "psnr": psnr,
        "ssim": ssim,
    }
    return entry if trace is None else {**entry, "tokens": trace.tokens, "trace": trace.to_dict()}
