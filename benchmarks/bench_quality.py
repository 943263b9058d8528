"""Quality of plans at equal cost, and cost at equal fidelity, on the demo models, on a CPU.

    python benchmarks/bench_quality.py [--adapters-snr DIR] [--adapters-paper DIR]
        [--tables order tau rho statistic adapters static_dynamic steps video study] [--quick]
    OMP_NUM_THREADS=1 python benchmarks/bench_quality.py --tables caches caches_video caches_study

Images are kept in `--cache`: a run that was cut off, or asked for other tables, goes on from there;
those of another model, adapter or state of the package are never used again. Every image is
compared with that of full resolution of the same prompt, seed and number of steps. Writes a record
for each kind of tables, and the tables of docs/quality.md from them. Run it on idle cores:
the measured cost of a step decides which baselines a plan gets.

- **Ablations** (`quality_demo.json`, and the plot `docs/quality_demo.png`): the tables of the paper
  done again (order of the difference, tau, rho, quantile against mean), ways to take a coarse step,
  static against dynamic plans, and step counts, with fewer steps at equal cost in each, and the
  `claims` that they bear out. A table that is not asked for stays in the file as it was, if it was
  made with the same settings. `loop_ms` is a sum of `costs`, median times of single steps;
  `frechet` is on the demo classifier's features, not FID; `references` tell what to expect of
  images that are as good.
- **`study`** (`quality_study.json`): the ablations but for the adapters on the study model of
  `bench_study.py`, whose captions leave most open, with guidance.
- **`video`** (`quality_demo_video.json`): plans on the video demo's model, with guidance as there,
  compared frame by frame. The demo's tau was found on six of the held-out captions with other
  noise. `flicker` is the mean absolute error of the change from frame to frame, of 1.
- **`caches`, `caches_video`, `caches_study`** (`skip_*.json`): DDiT and step caches, alone and
  together, at equal fidelity. Fits TeaCache and MagCache on prompts of their own; then
  looks, for every SSIM asked for, for the cheapest plan of each kind on a few search prompts, by
  the planner of `ddit-rt calibrate`; the plans found then draw the held-out prompts, taking turns
  prompt by prompt. A kind of which no plan was close enough is missing, and a combined plan runs
  coarse steps and reuses. Where no core is idle, run it with `--clock cpu`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from demo_models import DemoModel, image_model, video_model
from quality_caches import CLOCKS, measure_caches
from quality_paths import (
    LABELS,
    PAPER_TRAINED,
    SNR_TRAINED,
    TRAINING_FREE,
    CoarsePath,
    build_paths,
)
from quality_rows import Judge, Row, features
from quality_runs import Runs, reference
from quality_search import Matcher
from quality_tables import (
    QUICK_GRID,
    QUICK_VIDEO_GRID,
    TABLES,
    Grid,
    VideoGrid,
    claims,
    make_table,
    video_rows,
)
from records import RESULTS, head, parser_of, publish
from study_models import studied

from ddit_rt.lab.measure.figures import new_figure
from ddit_rt.lab.measure.report import model_entry
from ddit_rt.lab.measure.statistics import frechet_distance, gaussian
from ddit_rt.lab.plans.points import Prompt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
RESULT = RESULTS / "quality_demo.json"
PLOTS = ROOT / "docs"
CACHE = ROOT / "build" / "bench_quality"
VIDEO, STUDY = "video", "study"
CACHES, CACHES_VIDEO, CACHES_STUDY = "caches", "caches_video", "caches_study"
OTHERS = {
    VIDEO: "quality_demo_video",
    STUDY: "quality_study",
    CACHES: "skip_demo",
    CACHES_VIDEO: "skip_demo_video",
    CACHES_STUDY: "skip_study",
}
"""Tables with a record of their own."""

_ADAPTERS = "adapters"
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
    "": {"steps": 28, "prompts": 64, "seeds": 2, "search_prompts": 6, "repeats": 5},
    VIDEO: {"steps": 24, "prompts": 24, "seeds": 1, "repeats": 5},
    STUDY: {"steps": 50, "prompts": 16, "seeds": 1, "search_prompts": 3, "repeats": 3},
    CACHES: {"steps": 24, "prompts": 24, "search_prompts": 4, "repeats": 3},
    CACHES_VIDEO: {"steps": 24, "prompts": 24, "search_prompts": 4, "repeats": 2},
    CACHES_STUDY: {"steps": 50, "prompts": 16, "search_prompts": 3, "repeats": 1},
}
_QUICK: dict[str, Any] = {
    "steps": 7,
    "prompts": 2,
    "seeds": 2,
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
_PATH_STYLES = {
    "paper_untrained": ("#999999", "x"),
    TRAINING_FREE: ("#E69F00", "s"),
    "paper_trained": ("#CC79A7", "^"),
    "snr_trained": ("#009E73", "D"),
}
Series = dict[str, tuple[str, str, list[Row]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    args = parse(argv)
    if args.cache is not None:
        args.cache.mkdir(parents=True, exist_ok=True)
    if wanted := [name for name in TABLES if name in args.tables]:
        own = of_table(args, "")
        run_ablations(own, image_model(side=own.size), wanted)
    if STUDY in args.tables:
        run_ablations(
            of_table(args, STUDY), studied(), [name for name in TABLES if name != _ADAPTERS]
        )
    for name in (VIDEO, CACHES, CACHES_VIDEO, CACHES_STUDY):
        if name in args.tables:
            own = of_table(args, name)
            report = run_video(own) if name == VIDEO else run_caches(own, name)
            publish(own.out, report)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings; `--quick` is a smoke run whose figures mean nothing."""
    parser = parser_of(__doc__, RESULT)
    parser.add_argument("--cache", type=Path, default=CACHE)
    tables = [*TABLES, *OTHERS]
    parser.add_argument("--tables", nargs="+", choices=tables, default=[*TABLES, VIDEO])
    parser.add_argument("--adapters-snr", type=Path, help="adapters of the variant snr")
    parser.add_argument("--adapters-paper", type=Path, help="adapters of the variant paper")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="of the caches")
    parser.add_argument("--quick", action="store_true", help="2 prompts, 7 steps, 64 px, eager")
    args = parser.parse_args(argv)
    if args.quick and args.out == RESULT:
        args.out = CACHE / "quick.json"
    if args.clock == "cpu" and torch.get_num_threads() > 1:
        parser.error("--clock cpu adds the threads up; set OMP_NUM_THREADS=1")
    return args


def of_table(args: argparse.Namespace, name: str) -> argparse.Namespace:
    """The settings of a table, and where its record goes."""
    own = {**_ALL, **_OWN[name], **(_QUICK if args.quick else {})}
    if name:
        stem = OTHERS[name] if args.out == RESULT else f"{args.out.stem}_{name}"
        own["out"] = args.out.with_stem(stem)
    return argparse.Namespace(**{**vars(args), **own})


def _head(model: DemoModel) -> dict[str, Any]:
    return head(model=model_entry(model.name, model.pipeline.transformer))


def run_ablations(args: argparse.Namespace, model: DemoModel, wanted: Sequence[str]) -> None:
    """The ablations on a model of images."""
    folders = {SNR_TRAINED: args.adapters_snr, PAPER_TRAINED: args.adapters_paper}
    compares_paths = _ADAPTERS in wanted
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
    settings = settings_entry(args, model, captions, search, paths)
    report = {
        **_head(model),
        "settings": settings,
        "missing": dict(missing) if compares_paths else {},
        "costs": {"milliseconds": costs.milliseconds, "tokens": costs.tokens},
        "references": references(judge, args.steps),
        "tables": make_tables(matcher, grid, wanted, kept_tables(args.out, settings)),
    }
    report["claims"] = claims(report["tables"])
    publish(args.out, report)
    is_record = args.out.parent == RESULTS and not args.quick
    folder = PLOTS if is_record else args.out.parent
    draw_quality(report, folder / f"{args.out.stem}.png")


def run_video(args: argparse.Namespace) -> dict[str, Any]:
    """The report of the table `video`."""
    model = video_model(quick=args.quick)
    captions = model.reported(args.prompts)
    paths, _ = build_paths(model.pipeline, {}, untrained=False, backend=args.backend, **model.size)
    # One video at a time: both passes of guidance fill the batch that an engine is compiled for.
    runs = Runs(paths=paths, arguments=model.arguments, folder=args.cache, batch=1)
    costs = runs.costs(args.steps, Prompt(text=model.seen[0], seed=_SEARCH_SEED), args.repeats)
    judge = Judge(model=model, runs=runs, costs=costs, captions=captions, seeds=args.seeds)
    grid = QUICK_VIDEO_GRID if args.quick else VideoGrid()
    names = ("steps", "backend", "seeds", "repeats")
    tables = {VIDEO: video_rows(judge, args.steps, grid)}
    return {
        **_head(model),
        "settings": {
            **{name: getattr(args, name) for name in names},
            **model.arguments,
            "prompts": list(captions),
        },
        "costs": {"milliseconds": costs.milliseconds, "tokens": costs.tokens},
        "tables": tables,
        "claims": claims(tables),
    }


def run_caches(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The report of one of the tables of step caches."""
    if name == CACHES_STUDY:
        model = studied()
    else:
        model = (video_model if name == CACHES_VIDEO else image_model)(quick=args.quick)
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


def make_tables(
    matcher: Matcher, grid: Grid, wanted: Sequence[str], kept: Mapping[str, list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """The ablations that were asked for, and those that are there already."""
    made: dict[str, list[dict[str, Any]]] = {}
    for name in TABLES:
        if name in wanted:
            before, started = matcher.judge.runs.generated, time.perf_counter()
            made[name] = make_table(name, matcher, grid)
            images = matcher.judge.runs.generated - before
            seconds = time.perf_counter() - started
            print(f"{name}: {images} images in {seconds:.0f} s", file=sys.stderr)
        elif name in kept:
            made[name] = kept[name]
    return made


def kept_tables(out: Path, settings: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Tables of an earlier run with the same settings."""
    if not out.exists():
        return {}
    report = json.loads(out.read_text(encoding="utf-8"))
    tables: dict[str, list[dict[str, Any]]] = report["tables"]
    return tables if report["settings"] == settings else {}


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
    """Policies, and beside them ways of a coarse step: SSIM above Fréchet distance.

    Args:
        report: The results; a table that is missing leaves its panels out.
        path: PNG to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    steps = report["settings"]["steps"]
    titled = {
        f"static and dynamic plans, {steps} steps": _policy_series(report),
        "coarse steps, the same static plans": _path_series(report),
    }
    shown = {title: series for title, series in titled.items() if series.keys() - {"fewer steps"}}
    shown = shown or titled
    figure = new_figure((1.6 + 4.7 * len(shown), 7.4))
    panels = figure.subplots(2, len(shown), sharex=True, sharey="row", squeeze=False)
    for column, (title, series) in enumerate(shown.items()):
        panels[0][column].set_title(title, fontsize=11)
        _draw(panels[0][column], series, "ssim")
        _draw(panels[1][column], series, "frechet")
        panels[1][column].set_xlabel("time of the denoising loop, ms")
        panels[0][column].legend(fontsize=8, loc="lower right")
    panels[0][0].set_ylabel("SSIM to full resolution")
    panels[1][0].set_ylabel("Fréchet distance, classifier's features")
    panels[1][0].set_yscale("symlog", linthresh=1e-3)
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


def _path_series(report: Mapping[str, Any]) -> Series:
    rows = report["tables"].get("adapters", [])
    series: Series = {}
    fewer = _fewer(report)
    if fewer:
        series["fewer steps"] = (*_STYLES["fewer steps"], fewer)
    for name, style in _PATH_STYLES.items():
        found = [row for row in rows if row["name"].endswith(f"/{name}")]
        if found:
            series[LABELS[name]] = (*style, found)
    return series


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
