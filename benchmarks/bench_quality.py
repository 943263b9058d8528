"""Quality of plans at equal cost, and cost at equal fidelity, on a CPU.

    python benchmarks/bench_quality.py [--tables study adapters] [--quick]
        [--adapters-snr DIR] [--adapters-paper DIR]
    OMP_NUM_THREADS=1 python benchmarks/bench_quality.py --tables caches

Images are kept in `--cache`: a run that was cut off goes on from there; those of another model,
adapter or state of the package are never used again. Every image is compared with that of full
resolution of the same prompt, seed and number of steps. Each of the tables writes a record into the
folder `--out`, of which docs/quality.md is made. Run it on idle cores: the measured cost of a step
decides which baselines a plan gets.

- **`study`** (`quality_study.json`, and the plot `docs/quality_study.png`): the paper's ablations
  done again (order of the difference, tau, rho, quantile against mean), static against dynamic
  plans, and step counts, with fewer steps at equal cost in each, and the `claims` that they bear
  out; on the study model of `bench_study.py`, whose captions leave most open, with guidance.
  `loop_ms` is a sum of `costs`, median times of single steps; `frechet` is on the demo classifier's
  features, not FID; `references` tell what to expect of images that are as good.
- **`adapters`** (`adapters_demo.json`): ways to take a coarse step, trained and not, on the demo's
  model, for which adapters are trained.
- **`caches`** (`skip_study.json`): DDiT and step caches, alone and together, at equal fidelity, on
  the study model. Fits TeaCache and MagCache on prompts of their own; then looks, for every SSIM
  asked for, for the cheapest plan of each kind on a few search prompts, by the planner of `ddit-rt
  calibrate`; the plans found then draw the held-out prompts, taking turns prompt by prompt. A kind
  of which no plan was close enough is missing, and a combined plan runs coarse steps and reuses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo_models import DemoModel, image_model
from quality_caches import measure_caches
from quality_paths import PAPER_TRAINED, SNR_TRAINED, TRAINING_FREE, CoarsePath, build_paths
from quality_plots import draw_quality
from quality_rows import Judge, frechet
from quality_runs import SEARCH_SEED, Runs, reference, seeded
from quality_search import Matcher
from quality_tables import ADAPTERS, QUICK_GRID, TABLES, Grid, claims
from records import RESULTS, head, parser_of, publish
from study_models import studied

from ddit_rt.lab.measure.report import model_entry
from ddit_rt.lab.plans.points import Prompt

ROOT = Path(__file__).resolve().parent.parent
PLOTS = ROOT / "docs"
CACHE = ROOT / "build" / "bench_quality"
STUDY, CACHES = "study", "caches"
RECORDS = {STUDY: "quality_study", ADAPTERS: "adapters_demo", CACHES: "skip_study"}

_ALL: dict[str, Any] = {
    "path": TRAINING_FREE,
    "size": 128,
    "backend": "aot",
    "iterations": 9,  # halvings of the range of tau
    "fit_prompts": 6,
    "pictures": 200,  # of each search of `caches`
    "targets": [0.97, 0.95, 0.9],
    "patch_sizes": ["p", "2p", "4p"],
}
_OWN: dict[str, dict[str, int]] = {
    STUDY: {"steps": 50, "prompts": 16, "seeds": 1, "search_prompts": 3, "repeats": 3},
    ADAPTERS: {"steps": 28, "prompts": 64, "seeds": 2, "search_prompts": 6, "repeats": 5},
    CACHES: {"steps": 50, "prompts": 16, "search_prompts": 3, "repeats": 1},
}
_QUICK: dict[str, Any] = {
    "steps": 7,
    "prompts": 2,
    "seeds": 1,
    "search_prompts": 1,
    "repeats": 1,
    "size": 64,
    "backend": "eager",
    "iterations": 2,
    "fit_prompts": 1,
    "pictures": 72,
    "targets": [0.97, 0.5],
    "patch_sizes": ["p", "2p"],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    args = parse(argv)
    args.cache.mkdir(parents=True, exist_ok=True)
    for name in args.tables:
        own = of_table(args, name)
        if name == STUDY:
            wanted = [table for table in TABLES if table != ADAPTERS]
            run_ablations(own, studied(own.size), wanted)
        elif name == ADAPTERS:
            run_ablations(own, image_model(side=own.size), [ADAPTERS])
        else:
            run_caches(own, studied(own.size))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings; `--quick` is a smoke run whose figures mean nothing."""
    parser = parser_of(__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--tables", nargs="+", choices=list(RECORDS), default=[STUDY, ADAPTERS])
    parser.add_argument("--adapters-snr", type=Path, help="adapters of the variant snr")
    parser.add_argument("--adapters-paper", type=Path, help="adapters of the variant paper")
    parser.add_argument("--quick", action="store_true", help="2 prompts, 7 steps, 64 px, eager")
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = CACHE if args.quick else RESULTS
    return args


def model_head(model: DemoModel) -> dict[str, Any]:
    """What the records begin with."""
    return head(model=model_entry(model.name, model.pipeline.transformer))


def of_table(args: argparse.Namespace, name: str) -> argparse.Namespace:
    """The settings of a table, and where its record goes."""
    own = {**_ALL, **_OWN[name], **(_QUICK if args.quick else {})}
    own["out"] = args.out / f"{RECORDS[name]}.json"
    return argparse.Namespace(**{**vars(args), **own})


def run_ablations(args: argparse.Namespace, model: DemoModel, wanted: Sequence[str]) -> None:
    """The ablations on a model of images."""
    folders = {SNR_TRAINED: args.adapters_snr, PAPER_TRAINED: args.adapters_paper}
    compares_paths = ADAPTERS in wanted
    paths, missing = build_paths(
        model.pipeline, folders if compares_paths else None, backend=args.backend, **model.size
    )
    captions, search = captions_of(model, args.prompts, args.search_prompts)
    # Both passes of guidance fill the batch that an engine is compiled for.
    batch = 1 if "true_cfg_scale" in model.others else 4
    runs = Runs(paths=paths, arguments=model.arguments, folder=args.cache, batch=batch)
    costs = runs.costs(args.steps, search[0], args.repeats)
    judge = Judge(model=model, runs=runs, costs=costs, captions=tuple(captions), seeds=args.seeds)
    grid = QUICK_GRID if args.quick else Grid()
    matcher = Matcher(
        judge=judge,
        search_prompts=search,
        steps=args.steps,
        iterations=args.iterations,
        share=sorted(grid.shares)[len(grid.shares) // 2],
    )
    report = {
        **model_head(model),
        "settings": settings_entry(args, model, captions, search, paths),
        "missing": missing,
        "costs": {"milliseconds": costs.milliseconds, "tokens": costs.tokens},
        "references": references(judge, args.steps),
        "tables": {name: judge.with_fewer_steps(TABLES[name](matcher, grid)) for name in wanted},
    }
    report["claims"] = claims(report["tables"])
    publish(args.out, report)
    if not compares_paths:
        folder = PLOTS if args.out.parent == RESULTS else args.out.parent
        draw_quality(report, folder / f"{args.out.stem}.png")


def run_caches(args: argparse.Namespace, model: DemoModel) -> None:
    """The step caches, on one engine, prompt by prompt: a batch would share its decisions."""
    paths, _ = build_paths(
        model.pipeline, sizes=args.patch_sizes, backend=args.backend, **model.size
    )
    runs = Runs(paths=paths, arguments=model.arguments, folder=args.cache, batch=1)
    publish(args.out, {**model_head(model), **measure_caches(model, runs, args)})


def captions_of(model: DemoModel, count: int, search: int) -> tuple[list[str], tuple[Prompt, ...]]:
    """Captions to report on, and prompts to search with: none of the former.

    More than there are held-out captions are made up with ones that the model has seen.
    """
    held_out = list(model.reported(min(count, len(model.held_out))))
    made_up = list(model.seen[search:])[: count - len(held_out)]
    return held_out + made_up, seeded(model.seen[:search], SEARCH_SEED)


def settings_entry(
    args: Any,
    model: DemoModel,
    captions: Sequence[str],
    search: Sequence[Prompt],
    paths: Mapping[str, CoarsePath],
) -> dict[str, Any]:
    """The entry `settings`."""
    known = set(model.held_out)
    names = ("steps", "size", "path", "backend", "seeds", "iterations", "repeats")
    return {
        **{name: getattr(args, name) for name in names},
        "prompts": list(captions),
        "held_out": sum(caption in known for caption in captions),
        "search_prompts": [prompt.text for prompt in search],
        "adapters": {name: path.fingerprint[:16] for name, path in paths.items()},
    }


def references(judge: Judge, steps: int) -> dict[str, Any]:
    """The entry `references`."""
    images = judge.runs.run(reference(steps), judge.prompts).images
    count = len(judge.captions)
    halves = images[:count], images[count:]
    return {
        "frechet_halves": frechet(*halves) if all(halves) else None,
        "correct": judge.correct(images),
    }


if __name__ == "__main__":
    sys.exit(main())
