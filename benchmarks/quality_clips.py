"""Table `video` of `bench_quality.py`: plans on the video demo's model, compared frame by frame."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from quality_metrics import Judge, tensor
from quality_paths import TRAINING_FREE, build_paths
from quality_rivals import with_fewer_steps
from quality_runs import PictureRuns, Pictures, Plan, fine
from quality_tables import paper_rule
from records import interval_entry
from skip_models import SkipModel, clip_model, frame_means

from ddit_rt.lab.demo.plans import VIDEO_POLICY, demo_plans
from ddit_rt.lab.demo.video_hits import video_hits
from ddit_rt.lab.demo.videos import parse_video_caption
from ddit_rt.lab.measure.fidelity import video_fidelity
from ddit_rt.lab.measure.report import machine, model_entry, versions
from ddit_rt.lab.measure.timing import Pixels
from ddit_rt.lab.plans.candidates import Candidate, Static
from ddit_rt.lab.plans.points import Prompt
from ddit_rt.policies import PatchPolicy

VIDEO = "video"
_COARSE = ("2p", "4p")
_SEARCH_SEED = 50_000

Row = dict[str, Any]
Entry = tuple[str, str, str, PatchPolicy]
"""Name, label and kind of a row, and its policy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipGrid:
    """Values that the table goes through.

    Attributes:
        shares: Of the steps, run coarse after three at p and with a step at p after every three.
        block: Share of the steps, run coarse in one block from the first.
        taus: Of 2p in the demo's policy; 4p has half.
        paper_taus: Of the paper's rule.
    """

    shares: tuple[float, ...] = (0.25, 0.5)
    block: float = 0.5
    taus: tuple[float, ...] = (0.01, 0.02, 0.04)
    paper_taus: tuple[float, ...] = (0.003, 0.005, 0.01)


QUICK_CLIP_GRID = ClipGrid(shares=(0.25,), taus=(0.04,), paper_taus=(0.01,))


class ClipJudge(Judge):
    """Rows for plans that make clips `[F, H, W, 3]`."""

    def quality(self, made: Pictures, reference: Pictures) -> Row:
        """Means over the frames of a clip, each frame, and how the clip moves."""
        close = video_fidelity(made.pictures, reference.pictures)
        flicker = [value for value in self.per_prompt(close.flicker) if value is not None]
        return {
            **self.closeness(close.videos),
            "flicker": interval_entry(flicker),
            "frames": frame_means(close.frames),
            "correct": self.correct(made.pictures),
        }

    def hits(self, pictures: Sequence[Pixels]) -> dict[str, torch.Tensor]:
        """See `Judge.hits`; a clip shows a direction too."""
        clips = torch.stack([tensor(list(clip)) for clip in pictures])
        return video_hits(clips, [parse_video_caption(prompt.text) for prompt in self.prompts])


def measure_clips(args: argparse.Namespace) -> dict[str, Any]:
    """The report without its claims.

    Args:
        args: `steps`, `prompts`, `seeds`, `repeats`, `backend`, `cache` and `quick`.
    """
    model = clip_model(quick=args.quick)
    model.pipeline.set_progress_bar_config(disable=True)
    captions = model.reported(args.prompts)
    paths, _ = build_paths(
        model.pipeline, {}, untrained=False, backend=args.backend, progress=False, **model.size
    )
    # One clip at a time: both halves of guidance fill the batch that an engine is compiled for.
    runs = PictureRuns(paths=paths, arguments=model.arguments, cache=args.cache, batch=1)
    searched = Prompt(text=model.seen[0], seed=_SEARCH_SEED)
    costs = runs.costs(args.steps, searched, args.repeats)
    judge = ClipJudge(runs=runs, costs=costs, captions=captions, seeds=args.seeds)
    grid = QUICK_CLIP_GRID if args.quick else ClipGrid()
    return {
        "schema_version": 1,
        "machine": machine(),
        "versions": versions(),
        "model": model_entry(model.name, model.pipeline.transformer),
        "settings": settings_entry(args, model, captions),
        "costs": {"milliseconds": costs.milliseconds, "tokens": costs.tokens},
        "tables": {VIDEO: video_rows(judge, args.steps, grid)},
    }


def settings_entry(
    args: argparse.Namespace, model: SkipModel, captions: Sequence[str]
) -> dict[str, Any]:
    """The entry `settings`."""
    return {
        "steps": args.steps,
        **model.arguments,
        "backend": args.backend,
        "seeds": args.seeds,
        "prompts": list(captions),
        "repeats": args.repeats,
    }


def video_rows(judge: Judge, steps: int, grid: ClipGrid) -> list[Row]:
    """All fine, and every plan followed by its rivals of fewer fine steps."""
    rows = [judge.row("fine", f"{steps} fine steps", "fine", fine(steps), steps)]
    for name, label, kind, policy in clip_plans(steps, grid):
        plan = Plan(policy=policy, steps=steps, path=TRAINING_FREE)
        rows.append(judge.row(name, label, kind, plan, steps))
    return with_fewer_steps(judge, rows)


def clip_plans(steps: int, grid: ClipGrid) -> list[Entry]:
    """The demo's plans, shares of coarse steps, and dynamic plans by tau."""
    _, static, dynamic = demo_plans(steps, VIDEO_POLICY)
    rules: list[Entry] = [
        (f"tau_{tau:g}", f"dynamic, tau {tau:g}", "dynamic", _demo_rule(tau)) for tau in grid.taus
    ]
    rules += [
        (f"paper_{tau:g}", f"dynamic, the paper's rule, tau {tau:g}", "dynamic", paper_rule(tau))
        for tau in grid.paper_taus
    ]
    return [
        ("demo_static", "static, as in the demo", "static", static.policy),
        ("demo_dynamic", "dynamic, as in the demo", "dynamic", dynamic.policy),
        *(_interleaved(steps, size, share) for size in _COARSE for share in grid.shares),
        *(_block(steps, size, grid.block) for size in _COARSE),
        *rules,
    ]


def _demo_rule(tau: float) -> PatchPolicy:
    return replace(VIDEO_POLICY, tau={"2p": tau, "4p": tau / 2})


def _interleaved(steps: int, size: str, share: float) -> Entry:
    template = Static(steps=steps, coarse=(size,))
    level = max(1, min(template.levels, round(share * steps)))
    return _static(f"{size}_{share:g}", template.at(level))


def _block(steps: int, size: str, share: float) -> Entry:
    template = Static(steps=steps, coarse=(size,), head=0, tail=0, refresh=None)
    return _static(f"{size}_{share:g}_block", template.at(round(share * steps)))


def _static(name: str, candidate: Candidate) -> Entry:
    return name, candidate.label, "static", candidate.policy
