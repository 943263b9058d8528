"""Rows of `skip_*.json`: what a plan came to on the held-out prompts, and who was faster.

Every comparison is made prompt by prompt, on the mean of the ratio of the loops' times and of the
difference in SSIM, each with its 95% bootstrap interval.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from records import interval_entry
from skip_models import SkipModel, frame_means
from skip_plans import CACHES, COMBINED, DDIT, FEWER, STATIC
from skip_search import Tried, coarse_share

from ddit_rt.lab.measure.statistics import mean_interval
from ddit_rt.lab.measure.timing import Sample
from ddit_rt.loop import RunTrace

Row = dict[str, Any]
YES, NO, UNDECIDED, UNEQUAL = "yes", "no", "undecided", "not comparable"
TOLERANCE = 0.02
"""SSIM by which plans may differ and still count as equally close."""


def row(model: SkipModel, tried: Tried, samples: Sequence[Sample], fine: Sequence[Sample]) -> Row:
    """A plan's row; `bench_skip.py` says what is in it.

    Args:
        model: What was drawn.
        tried: The plan, and what it came to in the search.
        samples: One per held-out prompt.
        fine: The same of the all-fine reference.
    """
    plan = tried.plan
    return {
        "kind": plan.kind,
        "label": plan.label,
        "policy": plan.policy.to_dict(),
        "step_cache": plan.cache.to_dict(),
        "steps": plan.steps,
        "search": {"ssim": tried.ssim, "cost_ms": tried.cost_ms},
        **_work([_trace(sample) for sample in samples]),
        **_times(samples, fine),
        **_closeness(model, samples, fine),
    }


def _work(traces: Sequence[RunTrace]) -> Row:
    """Means over the prompts."""
    sizes = Counter(
        f"{step.patch_size}{' reused' * step.reused}" for trace in traces for step in trace
    )
    return {
        "tokens": statistics.fmean(trace.tokens for trace in traces),
        "reused_share": statistics.fmean(trace.reused / len(trace) for trace in traces),
        "coarse_share": statistics.fmean(coarse_share(trace) for trace in traces),
        "steps_at": {name: count / len(traces) for name, count in sorted(sizes.items())},
    }


def _times(samples: Sequence[Sample], fine: Sequence[Sample]) -> Row:
    own = [sample.median_denoise for sample in samples]
    rounds = [
        sum(reference.denoise[index] for reference in fine)
        / sum(sample.denoise[index] for sample in samples)
        for index in range(len(samples[0].denoise))
    ]
    ratios = [reference.median_denoise / time for reference, time in zip(fine, own, strict=True)]
    return {
        "loop_seconds": interval_entry(own),
        "speedup": interval_entry(ratios),
        "speedup_rounds": [min(rounds), max(rounds)],
        "loop_seconds_per_prompt": own,
    }


def _closeness(model: SkipModel, samples: Sequence[Sample], fine: Sequence[Sample]) -> Row:
    close = model.closeness(
        [sample.outputs[0] for sample in samples], [sample.outputs[0] for sample in fine]
    )
    psnr = [value for value in close.psnr if value is not None]
    entry: Row = {
        "ssim": interval_entry(close.ssim),
        "psnr": interval_entry(psnr) if psnr else None,
        "ssim_per_prompt": list(close.ssim),
        "psnr_per_prompt": list(close.psnr),
    }
    if close.flicker is not None and close.frames is not None:
        entry["flicker"] = interval_entry(close.flicker)
        entry["frames"] = frame_means(close.frames)
    return entry


def _trace(sample: Sample) -> RunTrace:
    assert sample.trace is not None, "an engine's run has a trace"
    return sample.trace


def verdicts(rows: Mapping[str, Row], target: float) -> list[dict[str, Any]]:
    """Per way to combine, whether it is faster than either alone, and than every other plan.

    Args:
        rows: By kind the cheapest that has the SSIM asked for.
        target: That SSIM.
    """
    return [
        _verdict(kind, cache, rows, target) for kind, cache in zip(COMBINED, CACHES, strict=True)
    ]


def _verdict(kind: str, cache: str, rows: Mapping[str, Row], target: float) -> dict[str, Any]:
    rivals = [name for name in (DDIT, cache, *CACHES, FEWER, STATIC) if name in rows]
    if kind not in rows:
        return {"kind": kind, "either_alone": NO, "against": {}, "reason": "none was close enough"}
    against = {name: compare(rows[kind], rows[name], target) for name in dict.fromkeys(rivals)}
    either = [against[name]["faster"] for name in (DDIT, cache) if name in against]
    return {"kind": kind, "either_alone": together(either), "against": against}


def compare(own: Row, other: Row, target: float) -> dict[str, Any]:
    """Whether one plan is faster than another at an equal SSIM.

    The SSIM of the faster one may lie `TOLERANCE` below that of the other or, if that is lower, the
    one that both were asked for: a plan that is closer than asked is still the cheapest of its kind
    that is close enough. Where it lies further below, nothing is said.
    """
    speed = mean_interval(_paired(other, own, "loop_seconds_per_prompt", lambda a, b: a / b))
    ssim = mean_interval(_paired(own, other, "ssim_per_prompt", lambda a, b: a - b))
    here, there = own["ssim"]["value"], other["ssim"]["value"]
    close, rival_close = (
        one >= min(wanted, target) - TOLERANCE for one, wanted in ((here, there), (there, here))
    )
    if speed.low > 1:
        faster = YES if close else UNEQUAL
    elif speed.high < 1:
        faster = NO if rival_close else UNEQUAL
    else:
        faster = UNDECIDED if close and rival_close else UNEQUAL
    return {"speed": asdict(speed), "ssim": asdict(ssim), "faster": faster}


def together(answers: Sequence[str]) -> str:
    """Yes if all are; else the first of no, not comparable and undecided that is among them."""
    return next((answer for answer in (NO, UNEQUAL, UNDECIDED) if answer in answers), YES)


def _paired(one: Row, other: Row, field: str, join: Callable[[float, float], float]) -> list[float]:
    return [join(a, b) for a, b in zip(one[field], other[field], strict=True)]
