"""Quality of plans at equal cost, and cost at equal fidelity, on a CPU.

    python benchmarks/bench_quality.py [--tables study adapters] [--quick]
        [--adapters-snr DIR] [--adapters-paper DIR]
    OMP_NUM_THREADS=1 python benchmarks/bench_quality.py --tables caches

Images are kept in `--cache`: a run that was cut off goes on from there; those of another model,
adapter or state of the package are never used again. Every image is compared with that of full
resolution of the same prompt, seed and number of steps. Each of the tables writes a record, of
which docs/quality.md is made. Run it on idle cores: the measured cost of a step decides which
baselines a plan gets.

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
  Where no core is idle, run it with `--clock cpu`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from demo_models import DemoModel, image_model
from quality_caches import CLOCKS, measure_caches
from quality_paths import PAPER_TRAINED, SNR_TRAINED, TRAINING_FREE, CoarsePath, build_paths
from quality_rows import Judge, Row, features
from quality_runs import Runs, reference
from quality_search import Matcher
from quality_tables import ADAPTERS, QUICK_GRID, TABLES, Grid, claims, make_table
from records import RESULTS, head, publish
from study_models import studied

from ddit_rt.lab.measure.figures import new_figure
from ddit_rt.lab.measure.report import model_entry
from ddit_rt.lab.measure.statistics import frechet_distance, gaussian
from ddit_rt.lab.plans.points import Prompt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
PLOTS = ROOT / "docs"
CACHE = ROOT / "build" / "bench_quality"
STUDY, CACHES = "study", "caches"
RECORDS = {STUDY: "quality_study", ADAPTERS: "adapters_demo", CACHES: "skip_study"}

_SEARCH_SEED = 50_000
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
    "pictures": 40,
    "targets": [0.97, 0.5],
    "patch_sizes": ["p", "2p"],
}

# Okabe and Ito's palette, told apart by colour-blind readers; markers differ too.
_STYLES: dict[str, tuple[str, str]] = {
    "fewer steps": ("#000000", "-"),
    "static": ("#E69F00", "s"),
    "dynamic, the paper's rule": ("#D55E00", "v"),
    "dynamic, default rule": ("#0072B2", "o"),
}
Series = dict[str, tuple[str, str, list[Row]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    args = parse(argv)
    if args.cache is not None:
        args.cache.mkdir(parents=True, exist_ok=True)
    for name in args.tables:
        own = of_table(args, name)
        if name == STUDY:
            wanted = [table for table in TABLES if table != ADAPTERS]
            run_ablations(own, studied(own.size), wanted)
        elif name == ADAPTERS:
            run_ablations(own, image_model(side=own.size), [ADAPTERS])
        else:
            publish(own.out, run_caches(own, studied(own.size)))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings; `--quick` is a smoke run whose figures mean nothing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the records")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--tables", nargs="+", choices=list(RECORDS), default=[STUDY, ADAPTERS])
    parser.add_argument("--adapters-snr", type=Path, help="adapters of the variant snr")
    parser.add_argument("--adapters-paper", type=Path, help="adapters of the variant paper")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="of the caches")
    parser.add_argument("--quick", action="store_true", help="2 prompts, 7 steps, 64 px, eager")
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = CACHE if args.quick else RESULTS
    if args.clock == "cpu" and torch.get_num_threads() > 1:
        parser.error("--clock cpu adds the threads up; set OMP_NUM_THREADS=1")
    return args


def of_table(args: argparse.Namespace, name: str) -> argparse.Namespace:
    """The settings of a table, and where its record goes."""
    own = {**_ALL, **_OWN[name], **(_QUICK if args.quick else {})}
    own["out"] = args.out / f"{RECORDS[name]}.json"
    return argparse.Namespace(**{**vars(args), **own})


def _head(model: DemoModel) -> dict[str, Any]:
    return head(model=model_entry(model.name, model.pipeline.transformer))


def run_ablations(args: argparse.Namespace, model: DemoModel, wanted: Sequence[str]) -> None:
    """The ablations on a model of images."""
    folders = {SNR_TRAINED: args.adapters_snr, PAPER_TRAINED: args.adapters_paper}
    compares_paths = ADAPTERS in wanted
    paths, missing = build_paths(
        model.pipeline,
        folders if compares_paths else {},
        untrained=compares_paths,
        backend=args.backend,
        **model.size,
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
        search_prompts=tuple(search),
        steps=args.steps,
        path=args.path,
        iterations=args.iterations,
        share=sorted(grid.shares)[len(grid.shares) // 2],
    )
    report = {
        **_head(model),
        "settings": settings_entry(args, model, captions, search, paths),
        "missing": dict(missing) if compares_paths else {},
        "costs": {"milliseconds": costs.milliseconds, "tokens": costs.tokens},
        "references": references(judge, args.steps),
        "tables": {name: make_table(name, matcher, grid) for name in wanted},
    }
    report["claims"] = claims(report["tables"])
    publish(args.out, report)
    if not compares_paths:
        folder = PLOTS if args.out.parent == RESULTS else args.out.parent
        draw_quality(report, folder / f"{args.out.stem}.png")


def run_caches(args: argparse.Namespace, model: DemoModel) -> dict[str, Any]:
    """The report of the step caches."""
    return {**_head(model), **measure_caches(model, caches_runs(model, args), args)}


def caches_runs(model: DemoModel, args: argparse.Namespace) -> Runs:
    """Runs on one engine, prompt by prompt: a batch would share its decisions."""
    paths, _ = build_paths(
        model.pipeline,
        {},
        untrained=False,
        sizes=args.patch_sizes,
        backend=args.backend,
        **model.size,
    )
    return Runs(paths=paths, arguments=model.arguments, folder=args.cache, batch=1)


def captions_of(model: DemoModel, count: int, search: int) -> tuple[list[str], list[Prompt]]:
    """Captions to report on, and prompts to search with: none of the former.

    More than there are held-out captions are made up with ones that the model has seen.
    """
    held_out = list(model.reported(min(count, len(model.held_out))))
    searched = [
        Prompt(text=text, seed=_SEARCH_SEED + i) for i, text in enumerate(model.seen[:search])
    ]
    return held_out + list(model.seen[search:])[: count - len(held_out)], searched


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
    halves = [gaussian(features(part)) for part in (images[:count], images[count:]) if part]
    row = judge.row("fine", reference(steps).label, "fine", reference(steps), steps)
    return {
        "frechet_halves": frechet_distance(*halves[0], *halves[1]) if len(halves) == 2 else None,
        "correct": row["correct"],
    }


def draw_quality(report: Mapping[str, Any], path: Path) -> None:
    """SSIM above Fréchet distance, by the time of the loop, of every kind of plan.

    Args:
        report: The results.
        path: PNG to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    figure = new_figure((6.3, 7.4))
    above, below = figure.subplots(2, 1, sharex=True)
    series = _policy_series(report)
    above.set_title(f"static and dynamic plans, {report['settings']['steps']} steps", fontsize=11)
    _draw(above, series, "ssim")
    _draw(below, series, "frechet")
    above.legend(fontsize=8, loc="lower right")
    above.set_ylabel("SSIM to full resolution")
    below.set_xlabel("time of the denoising loop, ms")
    below.set_ylabel("Fréchet distance, classifier's features")
    below.set_yscale("symlog", linthresh=1e-3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _policy_series(report: Mapping[str, Any]) -> Series:
    rows = report["tables"].get("static_dynamic", [])
    named = {
        "fewer steps": _fewer(report),
        "static": [row for row in rows if row["kind"] == "static"],
        "dynamic, the paper's rule": [
            row
            for row in (*rows, *report["tables"].get("tau", []))
            if row["name"].startswith(("paper_", "tau_"))
        ],
        "dynamic, default rule": [row for row in rows if row["name"].startswith("default_")],
    }
    return {name: (*_STYLES[name], found) for name, found in named.items() if found}


def _fewer(report: Mapping[str, Any]) -> list[Row]:
    """Fewer steps of the main step count, from all tables, each once."""
    steps = report["settings"]["steps"]
    rows = {
        row["name"]: row
        for table in report["tables"].values()
        for row in table
        if row["kind"] == "fewer_steps" and row["reference_steps"] == steps
    }
    return list(rows.values())


def _draw(axes: Axes, series: Series, value: str) -> None:
    for label, (colour, marker, rows) in series.items():
        points = sorted(_points(rows, value))
        x = [point[0] for point in points]
        y = [point[1] for point in points]
        if marker == "-":
            axes.plot(x, y, color=colour, marker=".", lw=1.2, label=label)
            continue
        axes.plot(x, y, color=colour, marker=marker, lw=0, label=label)
        if value == "ssim":
            spread = [(y - low, high - y) for _, y, low, high in points]
            errors = list(zip(*spread, strict=True))
            axes.errorbar(x, y, yerr=errors, color=colour, fmt="none", lw=1)
    axes.grid(visible=True, alpha=0.3)


def _points(rows: list[Row], value: str) -> Iterator[tuple[float, float, float, float]]:
    """Time, value, and the interval's ends."""
    for row in rows:
        if value == "ssim":
            ssim = row["ssim"]
            yield row["loop_ms"], ssim["value"], ssim["low"], ssim["high"]
        else:
            yield row["loop_ms"], row[value], row[value], row[value]


if __name__ == "__main__":
    sys.exit(main())
