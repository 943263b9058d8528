"""Whether a small model behaves like large ones: half the steps against step caches, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/bench_study.py [--curve NAME ...] [--order NAME ...]
        [--quick]

On FLUX.1-dev 25 of 50 steps are 16 to 18 dB away from the image of all 50, and MagCache at about
the same cost is at 30 dB (the tables of SeaCache, arXiv 2602.18993). On the demo model fewer steps
beat every cache. This measures where a model stands between the two, and what moves it: captions
that leave things open, guidance, the shift of the noise levels, the size, and training for it
(`scripts/train_demo.py scenes`, `benchmarks/study`). Every image is compared with that of 50 steps
at full resolution from the same noise. Costs are counted, in image tokens that the blocks ran on,
or with `--unit ms` summed from a table of step times that the run measures first;
`study_plans.py` says how plans are chosen. Images are kept in `--cache`: a run that was cut off
goes on from there, and settings that are not asked for stay in the record as they were.

In `study_cpu.json`, beside `machine` and `versions` as in the other records, `sections`:

- `curve`: settings, each with half the steps and MagCache at that cost, on fewer prompts;
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

import numpy as np
from demo_models import DemoModel
from PIL import Image
from quality_paths import TRAINING_FREE, CoarsePath, build_paths
from quality_rows import features, fidelity_entry, steps_at
from quality_runs import Plan, Runs, reference
from records import RESULTS, Record, interval_entry, opened, publish, stamped
from study_models import EMPTY, SETTINGS, STUDY, Setting, model_of, pipeline_of, shown_as_asked
from study_plans import CACHES, FEWER, KINDS, MAG, Planner, token_costs
from study_plot import draw_order

from ddit_rt.lab.calibrate.cache_fit import fit_cache
from ddit_rt.lab.measure.fidelity import fidelity
from ddit_rt.lab.measure.report import machine, versions
from ddit_rt.lab.measure.statistics import frechet_distance, gaussian
from ddit_rt.lab.measure.timing import Pixels
from ddit_rt.lab.plans.bench import UNITS
from ddit_rt.lab.plans.points import Prompt

RESULT = RESULTS / "study_cpu.json"
CACHE = Path(__file__).resolve().parent.parent / "build" / "bench_study"
CURVE, ORDER = "curve", "order"
_SEARCH_SEED, _FIT_SEED = 50_000, 70_000
_SHOWN = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    args = parse(argv)
    head = {
        "schema_version": 1,
        "machine": machine(),
        "versions": versions(),
        "model": {"pipeline": "FluxPipeline", "steps": args.steps},
    }
    report = opened(args.out, head)
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--curve", nargs="*", choices=names, default=[], metavar="NAME")
    parser.add_argument("--order", nargs="*", choices=names, default=[], metavar="NAME")
    parser.add_argument("--steps", type=int, default=50, help="of the reference (default: 50)")
    parser.add_argument(
        "--levels",
        type=float,
        nargs=3,
        default=[2.0, 1.5, 3.0],
        help="of `order`: how many times cheaper, the main one first (default: 2 1.5 3)",
    )
    parser.add_argument("--unit", choices=UNITS, default="tokens", help="of costs")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="of `order`")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs for the step times")
    parser.add_argument("--pictures", type=int, default=200, help="of the planner's search")
    parser.add_argument("--prompts", type=int, default=24, help="of `order` (default: 24)")
    parser.add_argument("--curve-prompts", type=int, default=12, help="of `curve` (default: 12)")
    parser.add_argument("--seeds", type=int, default=2, help="images of each (default: 2)")
    parser.add_argument("--search-prompts", type=int, default=4)
    parser.add_argument("--fit-prompts", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=6, help="halvings of the range of tau")
    parser.add_argument("--backend", choices=["aot", "eager"], default="aot")
    parser.add_argument("--plot", type=Path, help="PNG of closeness by cost, under --order")
    parser.add_argument("--sheet", type=Path, help="PNG of images of the settings under --order")
    parser.add_argument("--quick", action="store_true", help="2 prompts, 10 steps, 64 px, eager")
    args = parser.parse_args(argv)
    if not args.curve and not args.order:
        parser.error(f"name settings under --curve or --order: {', '.join(map(repr, names))}")
    if args.quick:
        quick = {"steps": 10, "prompts": 2, "curve_prompts": 2, "search_prompts": 1}
        quick["repeats"] = 1
        vars(args).update(quick, fit_prompts=1, iterations=1, backend="eager")
        if args.out == RESULT:
            args.out = CACHE / "quick.json"
    if min(args.prompts, args.curve_prompts, args.seeds) < 2:
        parser.error("intervals need two prompts or more, and the scale two seeds")
    if FEWER not in args.kinds or min(args.levels) <= 1:
        parser.error(f"plans are compared with {FEWER}, at levels above 1")
    return args


def measured(setting: Setting, section: str, args: argparse.Namespace) -> Iterator[Record]:
    """The entry of a setting, again after each level."""
    started = time.perf_counter()
    runs, model = runs_of(setting, args)
    searched = prompts_of(model.seen[args.fit_prompts :], args.search_prompts, _SEARCH_SEED)
    fitted = prompts_of(model.seen, args.fit_prompts, _FIT_SEED)
    call = {**model.arguments, "num_inference_steps": args.steps}
    fits = {
        kind: fit_cache(
            runs.paths[TRAINING_FREE].engine, kind, fitted, arguments=call, conditions={}
        )
        for kind in (MAG, "spectrum")
    }
    costs = (
        token_costs(runs, searched[0])
        if args.unit == "tokens"
        else runs.costs(args.steps, searched[0], args.repeats, CACHES)
    )
    amplitude, decay = fits["spectrum"].values
    levels = tuple(args.levels) if section == ORDER else (2.0,)
    planner = Planner(
        model=model,
        runs=runs,
        costs=costs,
        steps=args.steps,
        prompts=searched,
        fit=fits[MAG],
        spectrum=(amplitude, decay),
        levels=levels,
        iterations=args.iterations,
        pictures=args.pictures,
    )
    captions = model.reported(args.prompts if section == ORDER else args.curve_prompts)
    scenes = setting.model == STUDY and setting.captions != EMPTY
    table = Table(planner, captions, args.seeds, scenes=scenes)
    entry = {
        "setting": asdict(setting),
        "prompts": list(captions),
        "search_prompts": [prompt.text for prompt in searched],
        "seeds": args.seeds,
        **{kind: asdict(fit) for kind, fit in fits.items()},
        "unit": args.unit,
        "costs": costs.milliseconds,
        "two_seeds": table.two_seeds(),
        **({"full_resolution": table.full_resolution()} if section == ORDER else {}),
        "levels": {},
    }
    for level in levels:
        kinds = (FEWER, MAG) if section == CURVE else args.kinds
        entry["levels"][f"{level:g}"] = rows = table.rows(level, kinds)
        if section == ORDER:
            table.judge(level, rows)
        seconds = time.perf_counter() - started
        print(
            f"{setting.name}, {level:g}x: {seconds:.0f} s, {runs.generated} images", file=sys.stderr
        )
        yield entry
    if section == ORDER:
        if args.sheet is not None:
            table.sheet(args.sheet)
        if args.plot is not None:
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
    paths, _ = build_paths(pipeline, {}, untrained=False, backend=backend, height=side, width=side)
    return paths


def prompts_of(texts: Sequence[str], count: int, seed: int) -> tuple[Prompt, ...]:
    """The first of some texts, each with a seed of its own."""
    return tuple(Prompt(text=text, seed=seed + place) for place, text in enumerate(texts[:count]))


class Table:
    """Rows of plans on held-out prompts."""

    def __init__(
        self, planner: Planner, captions: Sequence[str], seeds: int, *, scenes: bool
    ) -> None:
        """Draws the reference.

        Args:
            planner: Finds the plans.
            captions: Prompts, by none of which a plan was chosen.
            seeds: Images of each.
            scenes: Whether they are of the study model.
        """
        self.planner, self.captions, self.scenes = planner, captions, scenes
        self.prompts = [
            Prompt(text=text, seed=seed * len(captions) + place)
            for seed in range(seeds)
            for place, text in enumerate(captions)
        ]
        self.plans: dict[str, Plan] = {"fine": reference(planner.steps)}
        self.fine = planner.runs.run(self.plans["fine"], self.prompts).images

    def two_seeds(self) -> Record:
        """Closeness of the images of the first two seeds."""
        count = len(self.captions)
        compared = fidelity(self.fine[:count], self.fine[count : 2 * count])
        entry = fidelity_entry(compared, count)
        return {name: entry[name] for name in ("psnr", "ssim")}

    def full_resolution(self) -> Record:
        """What to expect of a plan: hits, and how far the images of two seeds are apart."""
        count = len(self.captions)
        seeds = (self.fine[:count], self.fine[count : 2 * count])
        return {"as_asked": self._as_asked(self.fine), "frechet": _frechet(*seeds)}

    def judge(self, level: float, rows: Sequence[Record]) -> None:
        """Adds to the rows of a level what does not ask for full resolution's own images."""
        for row in rows:
            made = self.planner.runs.run(self.plans[f"{level:g} {row['kind']}"], self.prompts)
            row["frechet"] = _frechet(made.images, self.fine)
            row["as_asked"] = self._as_asked(made.images)

    def _as_asked(self, images: Sequence[Pixels]) -> float | None:
        if not self.scenes:
            return None
        return statistics.fmean(shown_as_asked(images, [prompt.text for prompt in self.prompts]))

    def rows(self, level: float, kinds: Sequence[str]) -> list[Record]:
        """A row for the plan of each kind at a cost; of those that can be so cheap."""
        found: list[Record] = []
        for kind in kinds:
            plan = self.planner.best(kind, level)
            if plan is not None:
                self.plans[f"{level:g} {kind}"] = plan
                found.append(self._row(kind, plan))
        fewer = found[0]["psnr_per_prompt"]
        for row in found[1:]:
            pairs = zip(row["psnr_per_prompt"], fewer, strict=True)
            gains = [own - other for own, other in pairs if None not in (own, other)]
            row["over_fewer"] = interval_entry(gains) if gains else None
        return found

    def _row(self, kind: str, plan: Plan) -> Record:
        made = self.planner.runs.run(plan, self.prompts)
        compared = fidelity(made.images, self.fine)
        return {
            "kind": kind,
            "label": plan.label,
            "policy": plan.policy.to_dict(),
            "step_cache": plan.cache.to_dict(),
            "steps": plan.steps,
            "sigmas": plan.sigmas,
            "share": self.planner.share(plan, self.prompts),
            "steps_at": steps_at(made.branches),
            **fidelity_entry(compared, len(self.captions)),
        }

    def sheet(self, path: Path) -> None:
        """Writes a PNG: a column for each of some prompts, and a row for each plan.

        Full resolution first, then its images of another seed, then the plans at 2x.
        """
        count = len(self.captions)
        shown = min(count, _SHOWN)
        rows: list[list[Any]] = [self.fine[:shown], self.fine[count : count + shown]]
        for name, plan in self.plans.items():
            if name.startswith("2 "):
                rows.append(self.planner.runs.run(plan, self.prompts).images[:shown])
        whole = np.concatenate([np.concatenate(row, axis=1) for row in rows])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(whole).save(path)


def _frechet(images: Sequence[Pixels], others: Sequence[Pixels]) -> float:
    return frechet_distance(*gaussian(features(images)), *gaussian(features(others)))


if __name__ == "__main__":
    sys.exit(main())
