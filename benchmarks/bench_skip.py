"""DDiT and step caches, alone and together, at equal closeness to the all-fine pictures, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/bench_skip.py [--model demo | demo-video] [--quick]

Compiles the model once; fits TeaCache and MagCache on prompts of their own; then looks, for every
SSIM asked for, for the cheapest plan of each kind on a few search prompts: fewer fine steps, static
plans, DDiT by tau, each cache by its threshold, and DDiT with a cache by both. The plans found, and
all fine, then draw the held-out prompts, taking turns picture by picture after a warm-up of each,
so that machine drift hits all alike. `ddit_rt.lab.measure.timing` says what the denoising loop
includes. All run the same weights, prompts, seeds, dtype and threads. Writes the JSON, and the
table of docs/quality.md from it. Run it on an idle core; where there is none, with `--clock cpu`.

Schema, version 1:

- `machine`, `versions`, `model` as in the demo's report; `settings`; `fits`: by cache the fitted
  values with their evidence; `costs`: wall milliseconds of a step by cache, `computed` or `reused`,
  and patch size, medians of static runs, which the search reads; `search`: `plans` that were run on
  the search prompts, `seconds`.
- `fine`: the row of the all-fine reference.
- `targets`: per SSIM asked for on the search prompts
  - `ssim`: that SSIM.
  - `rows`: one per kind, `fewer_steps`, `static`, `ddit`, `teacache`, `magcache`, `ddit_teacache`,
    `ddit_magcache`; a kind of which no plan was close enough is missing, and a combined plan runs
    coarse steps and reuses. Each has `kind`, `label`, `policy`, `step_cache`, `steps`; `search`:
    `ssim` and `cost_ms` on the search prompts; `tokens` (per picture), `reused_share` and
    `coarse_share` of the steps, `steps_at` (steps per picture by patch size, reused ones apart);
    `loop_seconds` and `speedup` over all fine: `value`, `low`, `high` (mean over the prompts of the
    median over the rounds, 95% interval over the prompts), `speedup_rounds` (least and most of the
    rounds); `ssim` and `psnr` (dB; of pictures that differ) to the all-fine pictures, likewise; of
    clips means over the frames, with `flicker`, the mean absolute error of the change from frame to
    frame, of 1, and `frames`, `ssim` and `psnr` of each frame, means over the clips; and the values
    `..._per_prompt`.
  - `verdicts`: per combined kind `either_alone`, whether it is faster than DDiT alone and than its
    cache alone at an equal SSIM (`yes`, `no`, `undecided`, `not comparable`; see
    `skip_rows.py`), and `against` each other kind `speed` (ratio of times), `ssim` (difference) and
    `faster`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from skip_models import MODELS, SkipModel
from skip_plans import (
    CACHES,
    KINDS,
    CacheDial,
    SkipPlan,
    cache_dials,
    ddits,
    fewer_steps,
    fine,
    statics,
)
from skip_rows import row, verdicts
from skip_search import Search, Tried, batch, contender, sizes_of, step_costs, tau_range
from tables import update_tables

import ddit_rt
from ddit_rt.lab.calibrate.cache_fit import fit_cache
from ddit_rt.lab.measure.report import machine, model_entry, versions
from ddit_rt.lab.measure.timing import Sample, measure
from ddit_rt.lab.plans.points import Prompt
from ddit_rt.policies import CacheFit

RESULTS = Path(__file__).resolve().parent / "results"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_FIT_SEED, _SEARCH_SEED = 70_000, 50_000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    args = parse(argv)
    model = MODELS[args.model](quick=args.quick)
    model.pipeline.set_progress_bar_config(disable=True)
    engine = ddit_rt.compile(
        model.pipeline,
        patch_sizes=args.patch_sizes,
        backend=args.backend,
        progress=False,
        **model.size,
    )
    report = run(engine, model, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if args.out == default_out(args.model):
        update_tables(args.out.stem, report)
    print(f"wrote {args.out}", file=sys.stderr)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings; `--quick` is a smoke run whose figures mean nothing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="demo")
    parser.add_argument("--out", type=Path, help="default: in benchmarks/results")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.97, 0.95, 0.9])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=24, help="held-out ones, to report on")
    parser.add_argument("--search-prompts", type=int, default=4)
    parser.add_argument("--fit-prompts", type=int, default=6)
    parser.add_argument("--levels", type=int, default=24, help="of tau, and of a threshold")
    parser.add_argument("--taus", type=int, default=3, help="taus that each cache is tried with")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: processor time, for one thread on a machine with other work",
    )
    parser.add_argument("--patch-sizes", nargs="+", default=["p", "2p", "4p"])
    parser.add_argument("--backend", choices=["aot", "eager"], default="aot")
    parser.add_argument("--quick", action="store_true", help="2 prompts, 8 steps, small, eager")
    args = parser.parse_args(argv)
    if args.quick:
        args.targets, args.steps, args.prompts, args.search_prompts = [0.97, 0.5], 8, 2, 1
        args.fit_prompts, args.levels, args.taus, args.repeats = 1, 3, 1, 1
        args.backend, args.patch_sizes = "eager", ["p", "2p"]
        args.out = args.out or RESULTS / f"{default_out(args.model).stem}_quick.json"
    args.out = args.out or default_out(args.model)
    if args.clock == "cpu" and torch.get_num_threads() > 1:
        parser.error("--clock cpu adds the threads up; set OMP_NUM_THREADS=1")
    if args.prompts < 2 or min(args.search_prompts, args.fit_prompts, args.repeats) < 1:
        parser.error("needs two prompts or more, and at least one to search, one to fit, one round")
    return args


def default_out(model: str) -> Path:
    """The record that table is made of."""
    return RESULTS / f"skip_{model.replace('-', '_')}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """Prompts, none in two lists."""

    fit: tuple[Prompt, ...]
    search: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]


def prompts_of(model: SkipModel, args: argparse.Namespace) -> Prompts:
    """Fit and search take captions that the model has seen, the report those that it has not.

    Raises:
        ValueError: The model has fewer held-out captions.
    """
    fits, searched = args.fit_prompts, args.search_prompts
    return Prompts(
        fit=_seeded(model.seen[:fits], _FIT_SEED),
        search=_seeded(model.seen[fits : fits + searched], _SEARCH_SEED),
        held_out=_seeded(model.reported(args.prompts), 0),
    )


def _seeded(texts: Sequence[str], seed: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(text=text, seed=seed + place) for place, text in enumerate(texts))


def run(engine: Any, model: SkipModel, args: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    prompts = prompts_of(model, args)
    fits = fitted(engine, model, prompts.fit, args.steps)
    dials = {name: cache_dials(fit, args.steps, args.levels) for name, fit in fits.items()}
    bounds = [dials[name][0].make(threshold) for name in CACHES for threshold in (0.0, 1e9)]
    costs = step_costs(engine, model, args.steps, prompts.search[0], bounds, args.repeats)
    search = Search(
        engine=engine, model=model, prompts=prompts.search, steps=args.steps, costs=costs
    )
    started = time.perf_counter()
    look(search, dials, args)
    seconds = time.perf_counter() - started
    print(f"search: {len(search.tried)} plans in {seconds:.0f} s", file=sys.stderr)
    return {
        "schema_version": 1,
        "machine": machine(),
        "versions": versions(),
        "model": model_entry(model.name, model.pipeline.transformer),
        "settings": settings(model, prompts, args),
        "fits": {name: asdict(fit) for name, fit in fits.items()},
        "costs": costs,
        "search": {"plans": len(search.tried), "seconds": seconds},
        **confirmed(search, prompts.held_out, args),
    }


def fitted(
    engine: Any, model: SkipModel, prompts: Sequence[Prompt], steps: int
) -> dict[str, CacheFit]:
    """What each cache has to know of the model."""
    arguments = {**model.arguments, "num_inference_steps": steps}
    return {
        name: fit_cache(engine, name, prompts, arguments=arguments, conditions={})
        for name in CACHES
    }


def look(
    search: Search, dials: Mapping[str, Sequence[CacheDial]], args: argparse.Namespace
) -> None:
    """Runs plans of every kind on the search prompts."""
    coarse, targets = sizes_of(search.engine)[1:], args.targets
    taus = tau_range(search.engine, search.model, args.steps, search.prompts[:2])
    rules = ddits(args.steps, coarse, taus, args.levels)
    caches = [dial for name in CACHES for dial in dials[name]]
    alone = [dial.alone(args.steps) for dial in caches]
    for dial in (fewer_steps(args.steps), *statics(args.steps, coarse), *rules, *alone):
        search.sweep(dial, targets)
    for rule in rules:
        for cache in caches:
            search.sweep_pairs(rule, cache, targets, args.taus)


def confirmed(
    search: Search, prompts: Sequence[Prompt], args: argparse.Namespace
) -> dict[str, Any]:
    """The entries `fine` and `targets`: every plan that was found, side by side."""
    chosen = {
        target: {kind: found for kind in KINDS if (found := search.cheapest(kind, target))}
        for target in args.targets
    }
    reference = search.run(fine(args.steps))
    plans: dict[str, Tried] = {reference.plan.key: reference}
    plans.update({tried.plan.key: tried for kinds in chosen.values() for tried in kinds.values()})
    samples = timed(search, [tried.plan for tried in plans.values()], prompts, args)
    rows = {
        key: row(search.model, tried, samples[key], samples[reference.plan.key])
        for key, tried in plans.items()
    }
    targets = []
    for target, kinds in chosen.items():
        own = {kind: rows[tried.plan.key] for kind, tried in kinds.items()}
        targets.append(
            {"ssim": target, "rows": list(own.values()), "verdicts": verdicts(own, target)}
        )
    return {"fine": rows[reference.plan.key], "targets": targets}


def timed(
    search: Search,
    plans: Sequence[SkipPlan],
    prompts: Sequence[Prompt],
    args: argparse.Namespace,
) -> dict[str, list[Sample]]:
    """Samples by the plan's key."""
    contenders = [contender(plan.key, search.engine, search.model, plan) for plan in plans]
    started = time.perf_counter()
    samples = measure(
        contenders,
        [batch(prompt) for prompt in prompts],
        repeats=args.repeats,
        clock=CLOCKS[args.clock],
    )
    seconds = time.perf_counter() - started
    print(f"held-out prompts: {len(plans)} plans in {seconds:.0f} s", file=sys.stderr)
    return samples


def settings(model: SkipModel, prompts: Prompts, args: argparse.Namespace) -> dict[str, Any]:
    """The entry `settings`."""
    names = ("targets", "steps", "levels", "taus", "repeats", "patch_sizes", "backend", "clock")
    return {
        **{name: getattr(args, name) for name in names},
        "arguments": model.arguments,
        "warm_up_calls": 1,
        "prompts": [prompt.text for prompt in prompts.held_out],
        "search_prompts": [prompt.text for prompt in prompts.search],
        "fit_prompts": [prompt.text for prompt in prompts.fit],
    }


if __name__ == "__main__":
    sys.exit(main())
