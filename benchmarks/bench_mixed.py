"""Patches of two sizes within a step, against everything else that costs less than full resolution.

    OMP_NUM_THREADS=1 python benchmarks/bench_mixed.py [--conditions captions open large]
        [--steps 24 50] [--prompts 24] [--plans NAMES] [--quick]

Draws the same prompts and noise by every plan of `mixed_plans.py` on the image demo's real
`FluxTransformer2DModel`, in eager PyTorch, every plan by the same code (`mixed_steps.py`), taking
turns prompt by prompt. Every picture is compared with that of full resolution at as many steps.
That mixed steps are corrected (`mixed_steps.py`) was decided on two of these prompts, in their
favour; nothing else was. Pictures are kept in `--cache`: a run that was cut off goes on from there,
and several processes may draw for one record (`--share`).

A condition is a size, captions and guidance: `captions` says all that is in a picture, 128 x 128;
`open` leaves things open and is guided, 128 x 128; `large` is 256 x 256, which the model was not
trained on. A section, one for each condition and number of steps, is written when it is complete
and displaces the one before; others stay as they were.

Record: `machine`, `versions`, `model` as in the demo's report; `settings`; `sections` by name:

- `condition`, `steps`, `side`, `scale` (of guidance, or null), `prompts`, `image_tokens` a step.
- `rows`: `name`, `label`, `kind` (`fine`, `fewer_steps`, `static`, `dynamic`, `mixed`; `control`
  picks regions by nothing, `oracle` by what no plan can know), `policy`, `signal`, `value`,
  `corrected`, `tokens` a picture; `loop_ms`, processor time of the denoising loop, and `speedup`
  over full resolution, each `value`, `low`, `high` (means over the prompts, 95% interval); `psnr`
  in dB, `ssim`, and `features`, the mean squared distance of the demo classifier's last maps, each
  pixel's of length one (as LPIPS, with another network): likewise, null for full resolution;
  `..._prompts` the values of each prompt.
- `verdicts`: of every mixed, control and oracle row, against the closest row (mean PSNR) of `any`
  other kind, or of the `coarse` ones (static or dynamic), that takes no more `_time` or `_tokens`
  (2% more at most), and of mixed rows by a signal the `control`, the same with regions by chance:
  `rival`, `speed` (ratio of times), and `psnr`, the mean over the prompts of the difference, with
  its interval. `holds` is `yes` where that is above 0, `no` where below, else `undecided`; null
  where nothing is as cheap.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from demo_models import image_model
from mixed_drawing import Condition, Drawing, Made
from mixed_plans import FINE_PLAN, Plan, all_plans
from mixed_verdicts import EQUAL_COST, Row, verdicts
from quality_rows import tensor
from records import RESULTS, interval_entry, publish

from ddit_rt.lab.demo.classifier import load_classifier
from ddit_rt.lab.measure.fidelity import fidelity
from ddit_rt.lab.measure.report import machine, model_entry, versions
from ddit_rt.lab.measure.timing import Pixels

RESULT = RESULTS / "mixed_cpu.json"
CACHE = Path(__file__).resolve().parent.parent / "build" / "bench_mixed"

CONDITIONS = {
    one.name: one
    for one in (
        Condition(name="captions"),
        Condition(name="open", scale=3.0, open=True),
        Condition(name="large", side=256),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    args = parse(argv)
    model = image_model()
    for name in args.conditions:
        for steps in args.steps:
            started = time.perf_counter()
            section = Bench(model.pipeline, CONDITIONS[name], args).section(steps, model.held_out)
            if args.share[1] > 1:
                continue  # another call makes the record, of what all have drawn
            report = opened(args.out, model.pipeline, args)
            report["sections"]["_".join([name, str(steps), *args.part])] = section
            publish(args.out, report)
            print(f"{name}, {steps} steps: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings; `--quick` is a smoke run whose figures mean nothing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--conditions", nargs="+", choices=list(CONDITIONS), default=["captions"])
    parser.add_argument("--steps", nargs="+", type=int, default=[24, 50])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--plans", nargs="+", help="names, or beginnings of names; default: all")
    parser.add_argument("--part", nargs="*", default=[], help="of a section with plans of its own")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder that keeps pictures")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of a section's drawing")
    parser.add_argument(
        "--share", nargs=2, type=int, default=[0, 1], help="I N: draw every N-th prompt, no record"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt's noise")
    parser.add_argument("--quick", action="store_true", help="2 prompts, 8 steps, a few plans")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(steps=[8], prompts=2)
        if args.out == RESULT:
            parser.error("--quick needs an --out of its own: its figures mean nothing")
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.prompts < 2:
        parser.error("an interval over the prompts needs two of them or more")
    if torch.get_num_threads() > 1:
        parser.error("processor time adds the threads up; set OMP_NUM_THREADS=1")
    return args


def opened(path: Path, pipeline: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The record to add sections to."""
    sections = {}
    if path.exists():
        sections = json.loads(path.read_text(encoding="utf-8"))["sections"]
    return {
        "schema_version": 1,
        "machine": machine(),
        "versions": versions(),
        "model": model_entry("demo", pipeline.transformer),
        "settings": {"seed": args.seed, "equal_cost": EQUAL_COST},
        "sections": sections,
    }


class Bench:
    """One condition."""

    def __init__(self, pipeline: Any, condition: Condition, args: argparse.Namespace) -> None:
        """On a `FluxPipeline`."""
        self._condition, self._args = condition, args
        self._drawing = Drawing(pipeline, condition, args.cache, args.part)
        self._classifier = load_classifier()

    def section(self, steps: int, captions: Sequence[str]) -> Row:
        """All plans on some captions, spread evenly over those that were held out."""
        args, condition = self._args, self._condition
        prompts = chosen(captions, args.prompts, condition)
        plans = [plan for plan in all_plans(steps, args.quick) if wanted(plan, args.plans)]
        made: dict[str, list[Made]] = {plan.name: [] for plan in plans}
        shown: list[str] = []
        began = time.perf_counter()
        for place, prompt in enumerate(prompts):
            tasks = [(plan, prompt, args.seed + place) for plan in plans]
            late = time.perf_counter() - began > args.seconds
            if place % args.share[1] != args.share[0] or (
                late and not all(self._drawing.file(*task).exists() for task in tasks)
            ):
                continue
            turn = place * len(plans) // len(prompts)
            for task in (*tasks[turn:], *tasks[:turn]):
                made[task[0].name].append(self._drawing.kept(*task))
            shown.append(prompt)
        if len(shown) < 2:
            raise RuntimeError(
                f"got {len(shown)} prompts in {args.seconds:g} seconds; two at least"
            )
        rows = [self._row(plan, made[plan.name], made[FINE_PLAN]) for plan in plans]
        return {
            "condition": condition.name,
            "steps": steps,
            "side": condition.side,
            "scale": condition.scale,
            "prompts": shown,
            "image_tokens": self._drawing.tokens,
            "rows": rows,
            "verdicts": verdicts(rows),
        }

    def _row(self, plan: Plan, made: Sequence[Made], whole: Sequence[Made]) -> Row:
        seconds = [one.seconds for one in made]
        ratios = [first.seconds / own for first, own in zip(whole, seconds, strict=True)]
        row = {
            **plan.to_dict(),
            "tokens": statistics.fmean(one.tokens for one in made),
            "loop_ms": interval_entry([1e3 * value for value in seconds]),
            "speedup": interval_entry(ratios),
        }
        if plan.name == FINE_PLAN:
            return {**row, "psnr": None, "ssim": None, "features": None}
        images, references = [one.image for one in made], [one.image for one in whole]
        found = fidelity(images, references)
        values = {
            # Equal to the byte: as far as a byte's rounding lets one see.
            "psnr": [_EQUAL if value is None else value for value in found.psnr],
            "ssim": list(found.ssim),
            "features": self._feature_distances(images, references),
        }
        for name, own in values.items():
            row |= {name: interval_entry(own), f"{name}_prompts": own}
        return row

    def _feature_distances(
        self, images: Sequence[Pixels], references: Sequence[Pixels]
    ) -> list[float]:
        ours, theirs = (
            torch.nn.functional.normalize(self._classifier.feature_maps(tensor(one)), dim=1)
            for one in (images, references)
        )
        distances: list[float] = (ours - theirs).square().sum(1).mean((1, 2)).tolist()
        return distances


_EQUAL = 60.0
"""PSNR in dB that stands for pictures without a difference."""


def wanted(plan: Plan, names: Sequence[str] | None) -> bool:
    """Whether a plan was asked for; full resolution always is."""
    return names is None or plan.name == FINE_PLAN or plan.name.startswith(tuple(names))


def chosen(captions: Sequence[str], count: int, condition: Condition) -> tuple[str, ...]:
    """Captions spread evenly; open ones say nothing of shape and colour."""
    texts = [captions[place * len(captions) // count] for place in range(count)]
    return tuple(text.partition(" on ")[2] if condition.open else text for text in texts)


if __name__ == "__main__":
    sys.exit(main())
