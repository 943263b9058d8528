"""Mixed steps, and what noise coarse ones have, against all else that is faster than p alone.

    OMP_NUM_THREADS=1 python benchmarks/bench_mixed.py [--quick --out FILE]

Draws the same prompts and noise by every plan with the compiled study model, with guidance
(`bench_study.py`), plans taking turns prompt by prompt. Every image is compared with that of full
resolution at as many steps.

The record has two sections: `study_50` sets mixed plans (`ddit_rt/steps/mixed.py`) beside the
others, and `study_50_noise`, on every second prompt, whole coarse steps by what noise the small
image has and how it becomes the large one. In a row `control` plans pick regions by nothing, and
`adapted` ones run mixed steps by blocks with LoRA that is trained for them (`mixed_adapter.py`);
`features` is the mean squared distance of the demo classifier's last maps, each pixel's of length
one. `verdicts` sets every mixed row against the one of the highest mean PSNR of `any` others, or of
the `coarse` ones, that takes no more time or tokens.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from demo_models import DemoModel
from mixed_adapter import trained_blocks
from quality_rows import tensor
from records import RESULTS, head, interval_entry, parser_of, publish
from study_models import STUDY, studied
from torch import Tensor

import ddit_rt
from ddit_rt.lab.demo.classifier import load_classifier
from ddit_rt.lab.measure.fidelity import fidelity
from ddit_rt.lab.measure.report import model_entry
from ddit_rt.lab.measure.timing import Pixels, loop_clock
from ddit_rt.lab.plans.genome import Static
from ddit_rt.policies import DDiTPolicy, FinePolicy, PatchPolicy, StaticPolicy
from ddit_rt.steps import Passes, Runners, SnrBucket, at_step, buckets, mixed

RESULT = RESULTS / "mixed_cpu.json"
EQUAL_COST = 1.02
"""A rival may cost 2% more."""
SIDE, STEPS, PROMPTS = 128, 50, 24
FEWER, STATIC, DYNAMIC = "fewer_steps", "static", "dynamic"
MIXED, ADAPTED, CONTROL = "mixed", "adapted", "control"
RUNS, TRAINED = 48, 1500
"""Recorded runs, and optimizer steps, of the adapter."""
HOW = {MIXED: "", ADAPTED: " by the adapter", CONTROL: " by chance"}
"""How regions of mixed steps are picked or run, in labels."""
NOISES = ("matched", "noised", "plain", "nearest", "anchor")
"""What whole coarse steps are tried with; the first is the runtime's."""
_TAUS = (1e-3, 3e-3)
_SHARES = (0.5, 0.25)
_ANCHORS = 1e-6
"""A share so small that one region alone stays at p."""
_EVERY_FOURTH = Static(count=1, sizes=("2p",), refresh=3)
_EQUAL = 60.0
"""PSNR in dB that stands for images without a difference."""

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    args = parse(argv)
    steps, count, side = (8, 2, 64) if args.quick else (STEPS, PROMPTS, SIDE)
    model = studied(side)
    backend, runs, trained = ("eager", 2, 2) if args.quick else ("aot", RUNS, TRAINED)
    engine = ddit_rt.compile(
        model.pipeline, height=side, width=side, backend=backend, progress=False
    )
    blocks = trained_blocks(side, runs=runs, run_steps=steps, steps=trained, backend=backend)
    prompts = list(enumerate(model.reported(count)))
    every_other = prompts[:: 1 if args.quick else 2]
    sections = {
        name: section(model, engine, blocks, plans, shown)
        for name, plans, shown in (
            (f"study_{steps}", list(plans_beside_others(steps)), prompts),
            (f"study_{steps}_noise", list(plans_of_noise(steps)), every_other),
        )
    }
    report = head(
        model=model_entry(STUDY, model.pipeline.transformer),
        settings={"equal_cost": EQUAL_COST},
        sections=sections,
    )
    publish(args.out or RESULT, report)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings; `--quick` is a smoke run whose figures mean nothing."""
    parser = parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="2 prompts, 8 steps, 64 px, eager")
    args = parser.parse_args(argv)
    if args.quick and args.out is None:
        parser.error("--quick needs an --out of its own: its figures mean nothing")
    return args


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One way to make images.

    Attributes:
        name: Identifier within a section.
        label: Name for people.
        kind: `fine`, or one of the constants above.
        policy: Which patch sizes it takes.
        steps: How many.
        noise: One of `NOISES`, of its coarse steps.
    """

    name: str
    label: str
    kind: str
    policy: PatchPolicy
    steps: int
    noise: str = NOISES[0]

    def to_dict(self) -> Row:
        """What it does, JSON-ready."""
        own = {name: getattr(self, name) for name in ("name", "label", "kind", "steps", "noise")}
        return {**own, "policy": self.policy.to_dict()}


def plans_beside_others(steps: int) -> Iterator[Plan]:
    """Mixed plans beside all others, after a fifth of the steps at p."""
    yield _fine("fine", "full resolution", "fine", steps)
    for count in sorted({steps // 2, steps // 3, steps // 4}, reverse=True):
        yield _fine(f"fewer_{count}", f"{count} steps at full resolution", FEWER, count)
    first = max(3, steps // 5)
    for tau, share in itertools.product(_TAUS, (0, *_SHARES)):
        policy = DDiTPolicy(tau, criterion="raw", warmup_steps=first, fine_share=share)
        name, label = f"ddit_{tau:g}", f"DDiT after {first} at p, tau {tau:g}"
        for kind in (MIXED, ADAPTED) if share else (DYNAMIC,):
            more = f"_{kind}_{100 * share:.0f}" if share else ""
            words = f", {share:.0%} at p{HOW[kind]}" if share else ""
            yield Plan(name=name + more, label=label + words, kind=kind, policy=policy, steps=steps)
    refreshed = replace(_EVERY_FOURTH, head=first)
    block = replace(refreshed, refresh=None)
    for size, shape in itertools.product(("2p", "4p"), (refreshed, block)):
        ending = "block" if shape.refresh is None else "3"
        words = f"{size} after {first} at p" + (", one at p after 3" if shape.refresh else "")
        yield _coarse(f"static_{size}_{ending}", words, STATIC, shape, size, steps)
        for share, kind in itertools.product(_SHARES, HOW):
            name = f"{kind}_{size}_{100 * share:.0f}_{ending}"
            label = f"{share:.0%} at p{HOW[kind]}, others at {words}"
            yield _coarse(name, label, kind, shape, size, steps, fine_share=share)


def plans_of_noise(steps: int) -> Iterator[Plan]:
    """Whole coarse steps by what noise the small image has, and how it becomes the large one."""
    yield _fine("fine", "full resolution", "fine", steps)
    late = replace(_EVERY_FOURTH, head=max(3, steps // 5))
    early = replace(_EVERY_FOURTH, head=0, tail=steps - 2 * steps // 5, refresh=None)
    for size, (shape, words) in itertools.product(
        ("2p", "4p"),
        ((late, f"after {late.head} at p, one at p after 3"), (early, "first of all")),
    ):
        count = len(shape.free(steps))
        for noise in NOISES:
            name = f"{noise}_{size}_{shape.head}"
            label = f"{count} of {steps} at {size} {words}: {noise}"
            share = _ANCHORS if noise == "anchor" else 0.0
            plan = _coarse(name, label, STATIC, shape, size, steps, fine_share=share)
            yield replace(plan, noise=noise)


def _fine(name: str, label: str, kind: str, steps: int) -> Plan:
    return Plan(name=name, label=label, kind=kind, policy=FinePolicy(), steps=steps)


def _coarse(
    name: str, label: str, kind: str, shape: Static, size: str, steps: int, fine_share: float = 0.0
) -> Plan:
    """As many coarse steps as fit, where a static plan of the shape would run them."""
    filled = replace(shape, count=len(shape.free(steps)), sizes=(size,))
    policy = StaticPolicy(filled.plan(steps), fine_share=fine_share)
    return Plan(name=name, label=label, kind=kind, policy=policy, steps=steps)


@contextmanager
def coarse_with(noise: str) -> Iterator[None]:
    """Lets coarse steps take one of `NOISES`, in runs that begin while this lasts."""
    places: list[tuple[Any, str, Any]] = []
    if noise in ("plain", "noised"):
        places.append((buckets, "matched_level", _at_level))
    if noise == "noised":
        places.append((SnrBucket, _REDUCE, _noised))
    if noise == "nearest":
        places.append((buckets, "bicubic", _repeated))
    own = [getattr(place, name) for place, name, _ in places]
    try:
        for place, name, other in places:
            setattr(place, name, other)
        yield
    finally:
        for (place, name, _), before in zip(places, own, strict=True):
            setattr(place, name, before)


def _repeated(small: int, size: int) -> Tensor:
    return torch.eye(small).repeat_interleave(size // small, 0)


def _at_level(sigmas: Tensor, deviation: float) -> tuple[Tensor, Tensor]:
    del deviation
    return torch.ones_like(sigmas), sigmas.clone()


_REDUCE = "_reduce"
_reduced: Callable[..., Tensor] = getattr(SnrBucket, _REDUCE)


def _noised(bucket: Any, latents: Tensor, step: Tensor) -> Tensor:
    """The small image with noise of its own scale, one draw a run, so that it is at level t."""
    small = _reduced(bucket, latents, step)
    share = math.sqrt(1 - small[0, 0].numel() / latents[0, 0].numel())
    generator = torch.Generator().manual_seed(bucket.multiple)
    # Nothing is matched: the model is told the level of the large image.
    level = at_step(vars(bucket)["_level"], step)
    return small + level * share * torch.randn(small.shape, generator=generator)


@contextmanager
def chosen_by_chance(seed: int) -> Iterator[None]:
    """Lets mixed steps pick their regions by nothing, while this lasts."""
    own, generator = mixed.movement, torch.Generator().manual_seed(seed)

    def drawn(moved: Tensor, edge: int) -> Tensor:
        return torch.rand(own(moved, edge).shape, generator=generator)

    mixed.movement = drawn
    try:
        yield
    finally:
        mixed.movement = own


@contextmanager
def run_by(blocks: Runners) -> Iterator[None]:
    """Lets mixed steps of runs that begin while this lasts run other blocks."""
    name = Passes.__name__
    setattr(mixed, name, partial(Passes, runners=blocks))
    try:
        yield
    finally:
        setattr(mixed, name, Passes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """An image, the image tokens that ran for it, and the processor seconds of its loop."""

    image: Pixels
    tokens: int
    seconds: float


def draw(
    model: DemoModel, engine: ddit_rt.Engine, blocks: Runners, plan: Plan, prompt: str, seed: int
) -> Made:
    """Draws one image; `blocks` are those of the adapter."""
    ways = {CONTROL: chosen_by_chance(seed), ADAPTED: run_by(blocks)}
    way = ways.get(plan.kind, nullcontext())
    with coarse_with(plan.noise), way, loop_clock(engine.pipeline, time.process_time) as loop:
        made = engine(
            prompt,
            generator=torch.Generator().manual_seed(seed),
            patch_policy=plan.policy,
            num_inference_steps=plan.steps,
            output_type="np",
            **model.arguments,
        )
    assert engine.last_trace is not None, "a run has a trace"
    return Made(
        image=(made.images[0] * 255).round().astype(np.uint8),
        tokens=sum(step.tokens for step in engine.last_trace),
        seconds=loop.seconds,
    )


def section(
    model: DemoModel,
    engine: ddit_rt.Engine,
    blocks: Runners,
    plans: Sequence[Plan],
    prompts: Sequence[tuple[int, str]],
) -> Row:
    """All plans on some prompts, each with its seed; the plan that comes first changes."""
    made: dict[str, list[Made]] = {plan.name: [] for plan in plans}
    draw(model, engine, blocks, plans[0], "", 0)  # warms up
    for place, (seed, prompt) in enumerate(prompts):
        turn = place * len(plans) // len(prompts)
        for plan in (*plans[turn:], *plans[:turn]):
            made[plan.name].append(draw(model, engine, blocks, plan, prompt, seed))
    rows = [_row(plan, made[plan.name], made["fine"]) for plan in plans]
    return {
        "steps": plans[0].steps,
        "side": model.size["height"],
        "scale": model.others["true_cfg_scale"],
        "prompts": [prompt for _, prompt in prompts],
        "image_tokens": made["fine"][0].tokens // plans[0].steps,
        "rows": rows,
        "verdicts": verdicts(rows),
    }


def _row(plan: Plan, made: Sequence[Made], whole: Sequence[Made]) -> Row:
    ratios = [first.seconds / own.seconds for first, own in zip(whole, made, strict=True)]
    row = {
        **plan.to_dict(),
        "tokens": statistics.fmean(one.tokens for one in made),
        "loop_ms": interval_entry([1e3 * one.seconds for one in made]),
        "speedup": interval_entry(ratios),
    }
    if plan.kind == "fine":
        return {**row, "psnr": None, "ssim": None, "features": None}
    images, references = [one.image for one in made], [one.image for one in whole]
    found = fidelity(images, references)
    values = {
        "psnr": [_EQUAL if value is None else value for value in found.psnr],
        "ssim": list(found.ssim),
        "features": _feature_distances(images, references),
    }
    for name, own in values.items():
        row |= {name: interval_entry(own), f"{name}_prompts": own}
    return row


def _feature_distances(images: Sequence[Pixels], references: Sequence[Pixels]) -> list[float]:
    classifier = load_classifier()
    ours, theirs = (
        torch.nn.functional.normalize(classifier.feature_maps(tensor(one)), dim=1)
        for one in (images, references)
    )
    distances: list[float] = (ours - theirs).square().sum(1).mean((1, 2)).tolist()
    return distances


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """Every mixed plan against the closest others that cost no more."""
    by_name = {row["name"]: row for row in rows}
    others = [row for row in rows if row["kind"] not in (*HOW, "fine")]
    coarse = [row for row in others if row["kind"] in (STATIC, DYNAMIC)]
    found = []
    for row in rows:
        if row["kind"] not in HOW:
            continue
        entry: Row = {"name": row["name"]}
        for key, rivals in (("any", others), ("coarse", coarse)):
            for unit, cost in COSTS.items():
                entry[f"{key}_{unit}"] = best_against(row, rivals, cost)
        for kind, beside in (("control", MIXED), ("untrained", ADAPTED)):
            same = row["name"].replace(beside, CONTROL if beside == MIXED else MIXED)
            rival = by_name.get(same) if row["kind"] == beside else None
            entry[kind] = None if rival is None else against(row, rival)
        found.append(entry)
    return found


COSTS: dict[str, Callable[[Row], float]] = {
    "time": lambda row: float(row["loop_ms"]["value"]),
    "tokens": lambda row: float(row["tokens"]),
}


def best_against(row: Row, rivals: Sequence[Row], cost: Callable[[Row], float]) -> Row | None:
    """Against the closest that costs no more; None where there is none."""
    most = cost(row) * EQUAL_COST
    cheap = [one for one in rivals if cost(one) <= most]
    best = max(cheap, key=lambda one: one["psnr"]["value"], default=None)
    return None if best is None else against(row, best)


def against(row: Row, rival: Mapping[str, Any]) -> Row:
    """The difference to a rival, prompt by prompt."""
    pairs = zip(row["psnr_prompts"], rival["psnr_prompts"], strict=True)
    difference = interval_entry([ours - theirs for ours, theirs in pairs])
    low, high = (float(difference[name] or 0) for name in ("low", "high"))
    return {
        "rival": rival["name"],
        "speed": rival["loop_ms"]["value"] / row["loop_ms"]["value"],
        "psnr": difference,
        "holds": "yes" if low > 0 else "no" if high < 0 else "undecided",
    }


if __name__ == "__main__":
    sys.exit(main())
