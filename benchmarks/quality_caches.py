"""The table `caches`: DDiT and step caches, alone and together, at equal fidelity.

Every comparison is made prompt by prompt, on the mean of the ratio of the loops' times and of the
difference in SSIM, each with its 95% bootstrap interval.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from demo_models import DemoModel
from quality_paths import TRAINING_FREE
from quality_rows import Row, fidelity_entry, steps_at
from quality_runs import SEARCH_SEED, Plan, Runs, batch_of, seeded, trace_of
from quality_search import DDIT, Judged, dials_of, plan_of, table_kind
from records import interval_entry

from ddit_rt.lab.calibrate.cache_fit import fit_cache
from ddit_rt.lab.calibrate.moves import Space
from ddit_rt.lab.calibrate.search import Search
from ddit_rt.lab.measure.fidelity import fidelity
from ddit_rt.lab.measure.statistics import mean_interval
from ddit_rt.lab.measure.timing import Sample, measure, on_trial
from ddit_rt.lab.plans.candidates import full_resolution
from ddit_rt.lab.plans.dial import TAU_PROBES, branch, tau_range
from ddit_rt.lab.plans.points import Point, Prompt
from ddit_rt.lab.plans.step_caches import CacheDial
from ddit_rt.lab.plans.target import GENTLE, STRONG, Target

FEWER, STATIC = "fewer_steps", "static"
CACHES = ("teacache", "magcache")
COMBINED = tuple(f"{DDIT}_{cache}" for cache in CACHES)
KINDS = (FEWER, STATIC, DDIT, *CACHES, *COMBINED)
"""In the order of the table."""

YES, NO, UNDECIDED, UNEQUAL = "yes", "no", "undecided", "not comparable"
TOLERANCE = 0.02
"""SSIM by which plans may differ and still count as equal."""

_FIT_SEED = 70_000


def measure_caches(model: DemoModel, runs: Runs, args: argparse.Namespace) -> dict[str, Any]:
    """The entries of the report behind machine, versions and model."""
    fitting = seeded(model.seen[: args.fit_prompts], _FIT_SEED)
    searched = seeded(model.seen[args.fit_prompts :][: args.search_prompts], SEARCH_SEED)
    held_out = seeded(model.reported(args.prompts))
    engine = runs.paths[TRAINING_FREE].engine
    arguments = {**model.arguments, "num_inference_steps": args.steps}
    fits = {
        kind: fit_cache(engine, kind, fitting, arguments=arguments, conditions={})
        for kind in CACHES
    }
    dials = [dial for dial in dials_of(fits, runs, args.steps, searched[0]) if dial.fit]
    caches = tuple(dial.cache for dial in dials)
    costs = runs.costs(args.steps, searched[0], args.repeats, caches)
    dials = [dial.priced(costs.milliseconds[type(dial.cache).__name__]) for dial in dials]
    judged = Judged(runs=runs, steps=args.steps, costs=costs)
    started = time.perf_counter()
    points = look(judged, searched, dials, args)
    seconds = time.perf_counter() - started
    print(f"search: {len(points)} plans in {seconds:.0f} s", file=sys.stderr)
    return {
        "settings": settings(model, (fitting, searched, held_out), args),
        "fits": {name: asdict(fit) for name, fit in fits.items()},
        "costs": costs.milliseconds,
        "search": {"plans": len(points), "seconds": seconds},
        **confirmed(judged, points, (searched, held_out), args),
    }


def settings(
    model: DemoModel, prompts: Sequence[Sequence[Prompt]], args: argparse.Namespace
) -> dict[str, Any]:
    """The entry `settings`."""
    fitting, searched, held_out = ([prompt.text for prompt in one] for one in prompts)
    names = ("targets", "steps", "pictures", "repeats", "patch_sizes", "backend")
    return {
        **{name: getattr(args, name) for name in names},
        "arguments": model.arguments,
        "warm_up_calls": 1,
        "prompts": held_out,
        "search_prompts": searched,
        "fit_prompts": fitting,
    }


def look(
    judged: Judged,
    prompts: Sequence[Prompt],
    dials: Sequence[CacheDial],
    args: argparse.Namespace,
) -> list[Point]:
    """Plans of every kind on the search prompts, with each step cache and target in turn."""
    probes = [Plan(policy=policy, num_inference_steps=args.steps) for policy in TAU_PROBES]
    traces = [judged.runs.trace(plan, prompt) for plan in probes for prompt in prompts[:2]]
    costs, taus = judged.costs.milliseconds[TRAINING_FREE], tau_range(traces)
    points: dict[str, Point] = {}
    for dial, ssim in itertools.product(dials, args.targets):
        target = Target(min_ssim=ssim)
        ends = [target.shifted(power, costs["p"] * args.steps) for power in (GENTLE, STRONG)]
        search = Search(
            space=Space(steps=args.steps, costs=costs, taus=taus, dials=[dial]),
            evaluator=judged,
            prompts=prompts,
            targets=[target, *ends],
            pictures=args.pictures,
        )
        points |= {point.candidate.key: point for point in search.run()}
        tried = len(search.tried)
        print(f"SSIM {ssim}: {tried} plans, {search.spent} pictures", file=sys.stderr)
    return list(points.values())


def cheapest(
    points: Sequence[Point], kind: str, target: float, does_both: Callable[[Point], bool]
) -> Point | None:
    """The cheapest plan of a kind that met a target.

    Args:
        points: What a search found.
        kind: Of plans.
        target: SSIM of the search prompts.
        does_both: Whether a combined plan takes coarse steps and reuses.
    """
    met = [
        point
        for point in points
        if table_kind(point.candidate) == kind
        and point.ssim >= target
        and (kind not in COMBINED or does_both(point))
    ]
    return min(met, key=lambda point: point.cost, default=None)


def confirmed(
    judged: Judged,
    points: Sequence[Point],
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The entries `fine` and `targets`: every plan that was found, side by side.

    Args:
        judged: What the search went by.
        points: What it found.
        prompts: To search with, and held-out ones.
        args: Settings.
    """
    searched, held_out = prompts

    def does_both(point: Point) -> bool:
        made = [judged.runs.run(plan_of(point.candidate), [prompt]) for prompt in searched]
        branches = [own.branches[0] for own in made]
        return any(map(coarse_share, branches)) and any(map(reused_share, branches))

    chosen = {
        target: {
            kind: found
            for kind in KINDS
            if (found := cheapest(points, kind, target, does_both)) is not None
        }
        for target in args.targets
    }
    fine = full_resolution(args.steps)
    whole = Point(candidate=fine, measurement=judged.evaluate(fine, searched))
    plans = {fine.key: whole}
    plans |= {point.candidate.key: point for kinds in chosen.values() for point in kinds.values()}
    engine, arguments = judged.runs.paths[TRAINING_FREE].engine, judged.runs.arguments
    started = time.perf_counter()
    samples = measure(
        [on_trial(point.candidate.on(engine, key, **arguments)) for key, point in plans.items()],
        [batch_of([prompt]) for prompt in held_out],
        repeats=args.repeats,
    )
    seconds = time.perf_counter() - started
    print(f"held-out prompts: {len(plans)} plans in {seconds:.0f} s", file=sys.stderr)
    own = {key: row(point, samples[key], samples[fine.key]) for key, point in plans.items()}
    targets = []
    for target, kinds in chosen.items():
        rows = {kind: own[point.candidate.key] for kind, point in kinds.items()}
        entry = {"ssim": target, "rows": list(rows.values()), "verdicts": verdicts(rows, target)}
        targets.append(entry)
    return {"fine": own[fine.key], "targets": targets}


def row(point: Point, samples: Sequence[Sample], fine: Sequence[Sample]) -> Row:
    """A plan's row; `bench_quality.py` says what is in it.

    Args:
        point: The plan, and what it came to in the search.
        samples: One per held-out prompt.
        fine: The same of full resolution.
    """
    candidate = point.candidate
    branches = [[branch(step) for step in trace_of(sample)] for sample in samples]
    images, whole = ([sample.outputs[0] for sample in own] for own in (samples, fine))
    return {
        "kind": table_kind(candidate),
        "label": candidate.label,
        "policy": candidate.policy.to_dict(),
        "step_cache": candidate.step_cache.to_dict(),
        "steps": candidate.num_inference_steps,
        "search": {"ssim": point.ssim, "cost_ms": point.cost},
        "tokens": statistics.fmean(trace_of(sample).tokens for sample in samples),
        "reused_share": statistics.fmean(map(reused_share, branches)),
        "coarse_share": statistics.fmean(map(coarse_share, branches)),
        "steps_at": steps_at(branches),
        **_times(samples, fine),
        **fidelity_entry(fidelity(images, whole), len(samples)),
    }


def coarse_share(branches: Sequence[str]) -> float:
    """Share of the steps that ran or reused at a coarse size."""
    return sum(not one.startswith("p") for one in branches) / len(branches)


def reused_share(branches: Sequence[str]) -> float:
    """Share of the steps that reused."""
    return sum(one.endswith(" reused") for one in branches) / len(branches)


def _times(samples: Sequence[Sample], fine: Sequence[Sample]) -> Row:
    own = [sample.median_denoise for sample in samples]
    rounds = [
        sum(whole.denoise[index] for whole in fine)
        / sum(sample.denoise[index] for sample in samples)
        for index in range(len(samples[0].denoise))
    ]
    ratios = [whole.median_denoise / seconds for whole, seconds in zip(fine, own, strict=True)]
    return {
        "loop_seconds": interval_entry(own),
        "speedup": interval_entry(ratios),
        "speedup_rounds": [min(rounds), max(rounds)],
        "loop_seconds_per_prompt": own,
    }


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
    others = [name for name in (DDIT, cache, *CACHES, FEWER, STATIC) if name in rows]
    if kind not in rows:
        return {"kind": kind, "either_alone": NO, "against": {}, "reason": "none was close enough"}
    against = {name: compare(rows[kind], rows[name], target) for name in dict.fromkeys(others)}
    either = [against[name]["faster"] for name in (DDIT, cache) if name in against]
    return {"kind": kind, "either_alone": together(either), "against": against}


def compare(own: Row, other: Row, target: float) -> dict[str, Any]:
    """Whether one plan is faster than another at an equal SSIM.

    The SSIM of the faster one may lie `TOLERANCE` below that of the other or, if that is lower, the
    one that both were asked for: a plan that is closer than asked is still the cheapest of its kind
    that is close enough. Where it lies further below, nothing is said.
    """
    seconds, values = (
        list(zip(own[name], other[name], strict=True))
        for name in ("loop_seconds_per_prompt", "ssim_per_prompt")
    )
    speed = mean_interval([theirs / ours for ours, theirs in seconds])
    ssim = mean_interval([ours - theirs for ours, theirs in values])
    here, there = own["ssim"]["value"], other["ssim"]["value"]
    close, other_close = (
        one >= min(wanted, target) - TOLERANCE for one, wanted in ((here, there), (there, here))
    )
    if speed.low > 1:
        faster = YES if close else UNEQUAL
    elif speed.high < 1:
        faster = NO if other_close else UNEQUAL
    else:
        faster = UNDECIDED if close and other_close else UNEQUAL
    return {"speed": asdict(speed), "ssim": asdict(ssim), "faster": faster}


def together(answers: Sequence[str]) -> str:
    """Yes if all are; else the first of no, not comparable and undecided that is among them."""
    return next((answer for answer in (NO, UNEQUAL, UNDECIDED) if answer in answers), YES)
