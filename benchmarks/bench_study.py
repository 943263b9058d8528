"""Whether a small model behaves like large ones: half the steps against step caches, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/bench_study.py [--curve NAME ...] [--order NAME ...]
        [--quick]

On FLUX.1-dev 25 of 50 steps are 16 to 18 dB away from the image of all 50, and MagCache at about
the same cost is at 30 dB (the tables of SeaCache, arXiv 2602.18993). On the demo model fewer steps
beat every cache. This measures where a model stands between the two, and what moves it: captions
that leave things open, guidance, the shift of the noise levels, and training for it
(`scripts/train_demo.py scenes`, `benchmarks/study`). Every image is compared with that of 50 steps
at full resolution from the same noise. Costs are counted, in image tokens that the blocks ran on,
or with `--unit ms` summed from a table of step times that the run measures first;
`study_plans.py` says how plans are chosen. Images are kept in `--cache`: a run that was cut off
goes on from there, and settings that are not asked for stay in the record as they were.

In `study_cpu.json`, beside `machine` and `versions` as in the other records, `sections`:

- `curve`: settings, each with half the steps and MagCache at that cost;
- `order`: settings, each with every kind of plan at every cost. Both by the setting's name, with
  - `setting`: see `study_models.Setting`; `prompts`, `seeds`; `magcache`, `spectrum`: the fits;
  - `unit` of the costs, `costs` of a step by path or class of step cache;
  - `two_seeds`: how close images of two seeds of a prompt are, which is the scale;
  - `levels`: by how many times cheaper than full resolution, rows of `kind`, `label`, `policy`,
    `step_cache`, `steps`, `sigmas`; `share`: cost over full resolution's; `steps_at`; `psnr` (of
    images that differ) and `ssim`, each `value`, `low`, `high` (mean over the prompts, 95%
    interval), and the values per prompt; `over_fewer`: how many dB closer than fewer steps at that
    cost, likewise; under `order`, `frechet` distance to full resolution's images and the share that
    shows what it is asked for: `as_asked`, null where no classifier knows the captions;
  - `full_resolution`: its `as_asked`, and `frechet` of the images of two seeds.

Features of the Fréchet distance are those of the demo's classifier, which never saw a scene.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from demo_models import DemoModel
from quality_paths import TRAINING_FREE, CoarsePath, build_paths
from quality_plots import draw_order
from quality_rows import Judge, fidelity_entry, frechet, steps_at
from quality_runs import SEARCH_SEED, Plan, Runs, reference, seeded
from records import RESULTS, Record, head, interval_entry, opened, parser_of, publish, stamped
from study_models import EMPTY, SETTINGS, STUDY, Setting, model_of, pipeline_of
from study_plans import CACHES, FEWER, KINDS, LEAST_LEVELS, MAG, Planner

from ddit_rt.lab.calibrate.cache_fit import fit_cache
from ddit_rt.lab.measure.fidelity import fidelity
from ddit_rt.lab.measure.timing import Pixels
from ddit_rt.lab.plans.bench import UNITS

RESULT = RESULTS / "study_cpu.json"
CACHE = Path(__file__).resolve().parent.parent / "build" / "bench_study"
CURVE, ORDER = "curve", "order"
_FIT_SEED = 70_000
_SEEDS = 2
_SIZES: dict[str, Any] = {
    "steps": 50,  # of the reference
    "repeats": 5,  # measured runs for the step times
    "pictures": 200,  # of the planner's search
    "search_prompts": 4,
    "fit_prompts": 3,
    "iterations": 6,  # halvings of the range of tau
    "backend": "aot",
}
_QUICK: dict[str, Any] = {
    "steps": 10,
    "repeats": 1,
    "pictures": 40,
    "search_prompts": 1,
    "fit_prompts": 1,
    "iterations": 1,
    "backend": "eager",
    "prompts": 2,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    args = parse(argv)
    report = opened(args.out, head(model={"pipeline": "FluxPipeline", "steps": args.steps}))
    for section in (CURVE, ORDER):
        for name in getattr(args, section):
            setting = next(setting for setting in SETTINGS if setting.name == name)
            if args.quick:
                setting = replace(setting, side=64)
            for entry in measured(setting, section, args):
                report["sections"].setdefault(section, {})[name] = stamped(entry, args)
                publish(args.out, report)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings; `--quick` is a smoke run whose figures mean nothing."""
    parser = parser_of(__doc__, RESULT)
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--curve", nargs="*", choices=names, default=[], metavar="NAME")
    parser.add_argument("--order", nargs="*", choices=names, default=[], metavar="NAME")
    parser.add_argument(
        "--levels",
        type=float,
        nargs="+",
        default=[2.0, 1.5, 3.0],
        help="of `order`: how many times cheaper, the main one first (default: 2 1.5 3); beyond "
        "three without a plan of the planner, to tell what else is as close as its plans",
    )
    parser.add_argument("--unit", choices=UNITS, default="tokens", help="of costs")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="of `order`")
    parser.add_argument("--prompts", type=int, default=24, help="2 images of each (default: 24)")
    parser.add_argument("--plot", type=Path, help="PNG of closeness by cost, under --order")
    parser.add_argument("--quick", action="store_true", help="2 prompts, 10 steps, 64 px, eager")
    args = parser.parse_args(argv)
    if not args.curve and not args.order:
        parser.error(f"name settings under --curve or --order: {', '.join(map(repr, names))}")
    vars(args).update(_SIZES, **(_QUICK if args.quick else {}))
    if args.quick and args.out == RESULT:
        args.out = CACHE / "quick.json"
    if args.prompts < 2:
        parser.error("intervals need two prompts or more")
    if FEWER not in args.kinds or min(args.levels) <= 1 or len(args.levels) < LEAST_LEVELS:
        parser.error(f"plans are compared with {FEWER}, at three levels above 1 or more")
    return args


def measured(setting: Setting, section: str, args: argparse.Namespace) -> Iterator[Record]:
    """The entry of a setting, again after each level."""
    started, ordered = time.perf_counter(), section == ORDER
    runs, model = runs_of(setting, args)
    fitted = seeded(model.seen[: args.fit_prompts], _FIT_SEED)
    searched = seeded(model.seen[args.fit_prompts :][: args.search_prompts], SEARCH_SEED)
    call = {**model.arguments, "num_inference_steps": args.steps}
    engine = runs.paths[TRAINING_FREE].engine
    fits = {
        kind: fit_cache(engine, kind, fitted, arguments=call, conditions={})
        for kind in (MAG, "spectrum")
    }
    repeats = args.repeats if args.unit == "ms" else 1
    costs = runs.costs(args.steps, searched[0], repeats, CACHES, args.unit)
    amplitude, decay = fits["spectrum"].values
    planner = Planner(
        runs=runs,
        costs=costs,
        steps=args.steps,
        prompts=searched,
        fit=fits[MAG],
        spectrum=(amplitude, decay),
        levels=tuple(args.levels) if ordered else (2.0,),
        iterations=args.iterations,
        pictures=args.pictures,
    )
    captions = model.reported(args.prompts)
    # No classifier knows the captions of the demo, and nothing is asked by an empty one.
    shows = model.shows if setting.model == STUDY and setting.captions != EMPTY else None
    judge = Judge(
        model=replace(model, shows=shows), runs=runs, costs=costs, captions=captions, seeds=_SEEDS
    )
    entry = {
        "setting": asdict(setting),
        "prompts": list(captions),
        "search_prompts": [prompt.text for prompt in searched],
        "seeds": _SEEDS,
        **{kind: asdict(fit) for kind, fit in fits.items()},
        "unit": args.unit,
        "costs": costs.milliseconds,
        **references(judge, args.steps, ordered=ordered),
        "levels": {},
    }
    for level in planner.levels:
        kinds = args.kinds if ordered else (FEWER, MAG)
        entry["levels"][f"{level:g}"] = rows_of(planner, judge, level, kinds, ordered=ordered)
        seconds = time.perf_counter() - started
        print(f"{setting.name}, {level:g}x: {seconds:.0f} s", file=sys.stderr)
        yield entry
    if ordered and args.plot is not None:
        draw_order(setting.name, entry, args.plot)


def runs_of(setting: Setting, args: argparse.Namespace) -> tuple[Runs, DemoModel]:
    """Runs of a setting, on the engine of its model, and the model."""
    paths = _paths(setting.model, setting.side, args.backend)
    model = model_of(setting, paths[TRAINING_FREE].engine.pipeline)
    # No key of an image holds the schedule: every one has a folder of its own.
    folder = args.cache / f"shift_{setting.shift}"
    folder.mkdir(parents=True, exist_ok=True)
    return Runs(paths=paths, arguments=model.arguments, folder=folder, batch=1), model


@functools.cache
def _paths(model: str, side: int, backend: str) -> dict[str, CoarsePath]:
    pipeline = pipeline_of(model)
    return build_paths(pipeline, backend=backend, height=side, width=side)[0]


def references(judge: Judge, steps: int, *, ordered: bool) -> Record:
    """How close full resolution's images of two seeds are; under `order` also how far apart."""
    count, fine = len(judge.captions), judge.runs.run(reference(steps), judge.prompts).images
    seeds = fine[:count], fine[count:]
    entry = fidelity_entry(fidelity(*seeds), count)
    found: Record = {"two_seeds": {name: entry[name] for name in ("psnr", "ssim")}}
    if ordered:
        whole = {"as_asked": _as_asked(judge, fine), "frechet": frechet(*seeds)}
        found["full_resolution"] = whole
    return found


def rows_of(
    planner: Planner, judge: Judge, level: float, kinds: Sequence[str], *, ordered: bool
) -> list[Record]:
    """A row for the plan of each kind at a cost; of those that can be so cheap."""
    plans = {kind: planner.best(kind, level) for kind in kinds}
    rows = [
        row_of(kind, plan, planner, judge, ordered=ordered)
        for kind, plan in plans.items()
        if plan is not None
    ]
    fewer = rows[0]["psnr_per_prompt"]
    for row in rows[1:]:
        pairs = zip(row["psnr_per_prompt"], fewer, strict=True)
        gains = [own - other for own, other in pairs if None not in (own, other)]
        row["over_fewer"] = interval_entry(gains) if gains else None
    return rows


def row_of(kind: str, plan: Plan, planner: Planner, judge: Judge, *, ordered: bool) -> Record:
    """A plan's row; under `order` also what does not ask for full resolution's own images."""
    made = judge.runs.run(plan, judge.prompts)
    fine = judge.runs.run(reference(planner.steps), judge.prompts).images
    row = {
        "kind": kind,
        "label": plan.label,
        "policy": plan.policy.to_dict(),
        "step_cache": plan.step_cache.to_dict(),
        "steps": plan.num_inference_steps,
        "sigmas": plan.sigmas,
        "share": planner.share(plan, judge.prompts),
        "steps_at": steps_at(made.branches),
        **fidelity_entry(fidelity(made.images, fine), len(judge.captions)),
    }
    if ordered:
        row["frechet"] = frechet(made.images, fine)
        row["as_asked"] = _as_asked(judge, made.images)
    return row


def _as_asked(judge: Judge, images: Sequence[Pixels]) -> float | None:
    shows = judge.model.shows
    return shows and statistics.fmean(shows(images, [prompt.text for prompt in judge.prompts]))


if __name__ == "__main__":
    sys.exit(main())
