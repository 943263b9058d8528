"""`report.json` of the demo: what was run, how long it took and how close the pictures are.

Schema, version 1. Strict JSON: a number that does not exist is null.

- `schema_version`: 1.
- `machine`: `cpu`, `cores`, `threads` (of torch), `platform`.
- `versions`: `ddit_rt`, `torch`, `diffusers`, `python`.
- `model`: `name`, `transformer_class`, `parameters`, `dtype`.
- `settings`: `steps`, `height`, `width`, `seed`, `repeats`, `max_sequence_length`, `prompts`.
- `compile`: `compile_seconds`, `load_seconds`, `artifact_bytes`.
- `reference`: diffusers' own pipeline, as an entry of `runs` without policy, tokens and speed-ups.
- `runs`: one entry per plan:
  - `policy`: `"fine"`, `"static"` or `"dynamic"`; `label`; `settings`: the policy's fields.
  - `seconds`: whole call, per picture; `seconds_denoise`: denoising loop, per picture. Means over
    the prompts of the median over the repeats. `ddit_rt.lab.measure.timing` says what is timed.
  - `tokens`: image tokens that the model ran on, per picture, summed over the steps.
  - `speedup_denoise`, `speedup_end_to_end`: over `reference`, same prompts and seeds.
  - `psnr` (dB; mean over the pictures that differ, null when none does), `ssim`: against the
    all-fine pictures.
  - `prompts`: per prompt `prompt`, `seed`, `seconds`, `seconds_denoise`, `seconds_spread` and
    `seconds_denoise_spread` (`[min, max]` over the repeats), `tokens`, `psnr`, `ssim` and `trace`
    (`RunTrace.to_dict()`: every step with size, scores, thresholds, time and reason).
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ddit_rt.lab.measure.fidelity import Fidelity
from ddit_rt.lab.measure.timing import Sample
from ddit_rt.version import __version__

SCHEMA_VERSION = 1


def machine() -> dict[str, Any]:
    """This machine, as far as it explains a timing."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Versions of what ran."""
    import diffusers
    import torch

    return {
        "ddit_rt": __version__,
        "torch": str(torch.__version__),
        "diffusers": str(diffusers.__version__),
        "python": platform.python_version(),
    }


def model_entry(name: str, transformer: Any) -> dict[str, Any]:
    """The entry `model`."""
    return {
        "name": name,
        "transformer_class": type(transformer).__name__,
        "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
        "dtype": str(transformer.dtype).removeprefix("torch."),
    }


def reference_entry(label: str, samples: Sequence[Sample], closeness: Fidelity) -> dict[str, Any]:
    """The entry `reference`, and the part of an entry of `runs` that every contender has."""
    return {
        "label": label,
        "seconds": fmean(sample.median_end_to_end for sample in samples),
        "seconds_denoise": fmean(sample.median_denoise for sample in samples),
        "psnr": closeness.mean_psnr,
        "ssim": closeness.mean_ssim,
        "prompts": [
            _prompt_entry(sample, psnr, ssim)
            for sample, psnr, ssim in zip(samples, closeness.psnr, closeness.ssim, strict=True)
        ],
    }


def run_entry(
    policy: str,
    label: str,
    settings: dict[str, Any],
    samples: Sequence[Sample],
    closeness: Fidelity,
    reference: dict[str, Any],
) -> dict[str, Any]:
    """An entry of `runs`.

    Args:
        policy: Name of the plan.
        label: Its name for people.
        settings: Its fields.
        samples: One per prompt, made by an engine.
        closeness: To the all-fine pictures.
        reference: What `reference_entry` gave for diffusers' own pipeline.
    """
    entry = reference_entry(label, samples, closeness)
    return {
        "policy": policy,
        "settings": settings,
        "tokens": fmean(prompt["tokens"] for prompt in entry["prompts"]),
        "speedup_denoise": reference["seconds_denoise"] / entry["seconds_denoise"],
        "speedup_end_to_end": reference["seconds"] / entry["seconds"],
        **entry,
    }


def summary_table(report: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    header = (
        f"{'plan':<22}{'loop s':>8}{'speed-up':>10}{'call s':>8}{'speed-up':>10}"
        f"{'tokens':>8}{'PSNR':>7}{'SSIM':>7}"
    )
    lines = [header]
    for entry in (report["reference"], *report["runs"]):
        psnr = "same" if entry["psnr"] is None else f"{entry['psnr']:.1f}"
        tokens = f"{entry['tokens']:.0f}" if "tokens" in entry else "-"
        lines.append(
            f"{entry['label']:<22}{entry['seconds_denoise']:>8.3f}"
            f"{entry.get('speedup_denoise', 1.0):>9.2f}x{entry['seconds']:>8.3f}"
            f"{entry.get('speedup_end_to_end', 1.0):>9.2f}x{tokens:>8}{psnr:>7}"
            f"{entry['ssim']:>7.3f}"
        )
    lines.append("speed-up over diffusers' own pipeline; PSNR (dB) and SSIM against all fine")
    return "\n".join(lines)


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
    if trace is not None:
        entry |= {"tokens": trace.tokens, "trace": trace.to_dict()}
    return entry


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()
