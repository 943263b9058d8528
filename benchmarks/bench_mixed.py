"""Patches of two sizes within a step, against everything else that costs less than full resolution.

    OMP_NUM_THREADS=1 python benchmarks/bench_mixed.py [--model demo | study] [--quick --out FILE]

Draws the same prompts and noise by every plan on the real `FluxTransformer2DModel` of the image
demo, or on the study model with guidance (`bench_study.py`), in eager PyTorch, every plan by the
same code (`mixed_steps.py`), taking turns prompt by prompt. Every image is compared with that of
full resolution at as many steps. That mixed steps are corrected was decided on two of the demo's
prompts, in their favour; nothing else was.

The demo's record has two sections: `captions_24` sets mixed plans beside the others, and
`captions_24_values` tells, on two of the prompts, what else can become of the coarse regions and by
what else they can be picked. The study model's has `study_50`, and `study_50_noise`, of whole
coarse steps, on every second prompt. In a row `control` plans pick regions by nothing, and `oracle`
by what no plan can know; `features` is the mean squared distance of the demo classifier's last
maps, each pixel's of length one. `verdicts` sets every mixed row against the one of the highest
mean PSNR of `any` others, or of the `coarse` ones, that takes no more time or tokens.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from demo_models import DemoModel, image_model
from mixed_model import Prompted, Subject, deviations
from mixed_steps import FINE, SIGNALS, VALUES, Run, Step
from quality_rows import tensor
from records import RESULTS, head, interval_entry, parser_of, publish
from study_models import STUDY, studied
from torch import Tensor

from ddit_rt.lab.demo.classifier import load_classifier
from ddit_rt.lab.demo.prompts import MAX_SEQUENCE_LENGTH
from ddit_rt.lab.measure.fidelity import fidelity
from ddit_rt.lab.measure.report import model_entry
from ddit_rt.lab.measure.timing import Pixels
from ddit_rt.lab.plans.genome import Static
from ddit_rt.policies import DDiTPolicy
from ddit_rt.policies.patch import Schedule

DEMO = "demo"
RECORDS = {DEMO: RESULTS / "mixed_cpu.json", STUDY: RESULTS / "mixed_study_cpu.json"}
EQUAL_COST = 1.02
"""A rival may cost 2% more."""
SIDE, STEPS, STUDY_STEPS, PROMPTS = 128, 24, 50, 24
OF_VALUES = (0, 6)
"""Which of the prompts the section of the values draws."""
FEWER, STATIC, DYNAMIC = "fewer_steps", "static", "dynamic"
MIXED, CONTROL, ORACLE = "mixed", "control", "oracle"
_TAU = 1e-3
NOISES = ("matched", "noised", "plain", "nearest", "anchor")
"""What whole coarse steps are tried with, of `mixed_steps.VALUES`; the runtime's is the first."""
_STUDY_TAUS = (1e-3, 3e-3)
_EVERY_FOURTH = Static(count=1, sizes=("2p",), refresh=3)
_KINDS = {"random": CONTROL, "rotating": CONTROL, "oracle": ORACLE}
_SIGNAL_LABELS = {
    "third_difference": "third difference",
    "energy": "detail of x0",
    "change": "change of x0",
    "rotating": "turns",
    "random": "chance",
    "oracle": "oracle",
}
_EQUAL = 60.0
"""PSNR in dB that stands for images without a difference."""

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    args = parse(argv)
    if args.model == STUDY:
        model = studied()
        steps, count = (8, 2) if args.quick else (STUDY_STEPS, PROMPTS)
        prompts = list(enumerate(model.reported(count)))
        every_other = prompts[:: 1 if args.quick else 2]
        guidance = model.others["true_cfg_scale"]
        sections = {
            f"study_{steps}": section(model, list(plans_of_study(steps)), prompts, guidance),
            f"study_{steps}_noise": section(
                model, list(plans_of_noise(steps)), every_other, guidance
            ),
        }
    else:
        model = image_model()
        steps, count = (8, 2) if args.quick else (STEPS, PROMPTS)
        prompts = list(enumerate(model.reported(count)))
        of_values = [prompts[place] for place in OF_VALUES] if not args.quick else prompts
        sections = {
            f"captions_{steps}": section(model, plans_beside_others(steps), prompts),
            f"captions_{steps}_values": section(model, plans_of_values(steps), of_values),
        }
    report = head(
        model=model_entry(args.model, model.pipeline.transformer),
        settings={"seed": 0, "equal_cost": EQUAL_COST},
        sections=sections,
    )
    publish(args.out or RECORDS[args.model], report)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings; `--quick` is a smoke run whose figures mean nothing."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", choices=[DEMO, STUDY], default=DEMO)
    parser.add_argument("--quick", action="store_true", help="2 prompts, 8 steps")
    args = parser.parse_args(argv)
    if args.quick and args.out is None:
        parser.error("--quick needs an --out of its own: its figures mean nothing")
    if torch.get_num_threads() > 1:
        parser.error("processor time adds the threads up; set OMP_NUM_THREADS=1")
    return args


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One way to make images.

    Attributes:
        name: Identifier within a section.
        label: Name for people.
        kind: `fine`, or one of the constants above.
        how: How each step is taken; for a dynamic plan only their number counts.
        policy: Of a dynamic plan.
    """

    name: str
    label: str
    kind: str
    how: tuple[Step, ...]
    policy: DDiTPolicy | None = None

    def to_dict(self) -> Row:
        """What it does, JSON-ready."""
        mixed = next((step for step in self.how if step.share), None)
        return {
            "name": self.name,
            "label": self.label,
            "kind": self.kind,
            "steps": len(self.how),
            "policy": None if self.policy is None else self.policy.to_dict(),
            "signal": None if mixed is None else mixed.signal,
            "value": None if mixed is None else mixed.value,
            "corrected": None if mixed is None else mixed.corrected,
        }


def plans_beside_others(steps: int) -> list[Plan]:
    """Mixed plans beside plans of every other kind, full resolution first."""
    policy = DDiTPolicy(tau={"2p": _TAU, "4p": _TAU / 2}, criterion="raw")
    ddit = (FINE,) * steps
    return [
        _fine("fine", "full resolution", "fine", steps),
        *(
            _fine(f"fewer_{count}", f"{count} steps at full resolution", FEWER, count)
            for count in (2 * steps // 3, steps // 2)
        ),
        _static_plan(steps),
        Plan(
            name=f"ddit_{_TAU:g}",
            label=f"DDiT, tau {_TAU:g}",
            kind=DYNAMIC,
            how=ddit,
            policy=policy,
        ),
        _by_signal(steps, 0.5, "third_difference"),
        _by_signal(steps, 0.5, "random"),
        _by_signal(steps, 0.25, "third_difference"),
    ]


def plans_of_values(steps: int) -> list[Plan]:
    """Half the regions at p by every signal, and everything that can become of the others."""
    plans = [_fine("fine", "full resolution", "fine", steps), _static_plan(steps)]
    plans += [_by_signal(steps, 0.5, signal) for signal in SIGNALS]
    ways = [("matched", False), *((value, True) for value in VALUES[1:]), ("anchor", False)]
    for value, corrected in ways:
        name = f"{'value' if corrected else 'as_is'}_50_{value}"
        label = f"mixed 50%, {value}{'' if corrected else ', not corrected'}"
        step = Step(multiple=2, share=0.5, value=value, corrected=corrected)
        plans.append(_coarse(name, label, MIXED, steps, step, _EVERY_FOURTH))
    half, anchor = Step(multiple=2, share=0.5), Step(multiple=2, value="anchor")
    every = "mixed 50% at every step from the 4th"
    return [
        *plans,
        _coarse("every_50", every, MIXED, steps, half, replace(_EVERY_FOURTH, refresh=None)),
        _coarse("anchors", "one token in four, anchor", MIXED, steps, anchor, _EVERY_FOURTH),
    ]


def plans_of_study(steps: int) -> Iterator[Plan]:
    """As `plans_beside_others`, after a fifth of the steps at p, down to a quarter of the time."""
    yield _fine("fine", "full resolution", "fine", steps)
    for count in sorted({steps // 2, steps // 3, steps // 4}, reverse=True):
        yield _fine(f"fewer_{count}", f"{count} steps at full resolution", FEWER, count)
    first = max(3, steps // 5)
    for tau in _STUDY_TAUS:
        policy = DDiTPolicy(tau, criterion="raw", warmup_steps=first)
        label, every = f"DDiT after {first} at p, tau {tau:g}", (FINE,) * steps
        yield Plan(name=f"ddit_{tau:g}", label=label, kind=DYNAMIC, how=every, policy=policy)
    refreshed = Static(count=1, sizes=("2p",), head=first, refresh=3)
    block = replace(refreshed, refresh=None)
    for multiple, shape in itertools.product((2, 4), (refreshed, block)):
        size, ending = f"{multiple}p", "block" if shape.refresh is None else "3"
        words = f"after {first} at p" + ("" if shape.refresh is None else ", one at p after 3")
        step = Step(multiple=multiple)
        yield _coarse(f"static_{size}_{ending}", f"{size} {words}", STATIC, steps, step, shape)
        for share, signal in itertools.product((0.5, 0.25), ("third_difference", "random")):
            name = f"mixed_{size}_{100 * share:.0f}_{ending}_{signal}"
            label = f"{share:.0%} at p by {_SIGNAL_LABELS[signal]}, others at {size} {words}"
            step = Step(multiple=multiple, share=share, signal=signal)
            yield _coarse(name, label, _KINDS.get(signal, MIXED), steps, step, shape)


def plans_of_noise(steps: int) -> Iterator[Plan]:
    """Whole coarse steps by what noise the small image has, and how it becomes the large one."""
    yield _fine("fine", "full resolution", "fine", steps)
    late = Static(count=1, sizes=("2p",), head=max(3, steps // 5), refresh=3)
    early = Static(count=1, sizes=("2p",), head=0, tail=steps - 2 * steps // 5, refresh=None)
    for multiple, (shape, words) in itertools.product(
        (2, 4), ((late, f"after {late.head} at p, one at p after 3"), (early, "first of all"))
    ):
        count = len(shape.free(steps))
        for value in NOISES:
            step = Step(multiple=multiple, value=value)
            name = f"{value}_{multiple}p_{shape.head}"
            label = f"{count} of {steps} at {multiple}p {words}: {value}"
            yield _coarse(name, label, STATIC, steps, step, shape)


def _fine(name: str, label: str, kind: str, steps: int) -> Plan:
    return Plan(name=name, label=label, kind=kind, how=(FINE,) * steps)


def _static_plan(steps: int) -> Plan:
    label = f"static, {_filled(_EVERY_FOURTH, steps)}"
    return _coarse("static_2p_3", label, STATIC, steps, Step(multiple=2), _EVERY_FOURTH)


def _by_signal(steps: int, share: float, signal: str) -> Plan:
    name = f"mixed_{100 * share:.0f}_{signal}"
    label = f"mixed {share:.0%}, regions by {_SIGNAL_LABELS[signal]}"
    step = Step(multiple=2, share=share, signal=signal)
    return _coarse(name, label, _KINDS.get(signal, MIXED), steps, step, _EVERY_FOURTH)


def _coarse(name: str, label: str, kind: str, steps: int, step: Step, shape: Static) -> Plan:
    """As many steps of one kind as fit, where a static plan of the shape would run coarse ones."""
    patches = _filled(shape, steps).plan(steps)
    how = tuple(FINE if patch == "p" else step for patch in patches)
    return Plan(name=name, label=label, kind=kind, how=how)


def _filled(shape: Static, steps: int) -> Static:
    return replace(shape, count=len(shape.free(steps)))


class Choice:
    """Which step a dynamic plan takes next, by the rule of its policy.

    The coarsest size is taken of which the rho-quantile of its patches' deviations is below tau.
    """

    def __init__(self, policy: DDiTPolicy, subject: Subject, sigmas: Tensor) -> None:
        schedule = Schedule(sigmas=tuple(sigmas.tolist()), offered=(1, 2, 4), size=subject.size)
        self._table, self._subject = policy.resolve(schedule), subject

    def __call__(self, run: Run, index: int) -> Step:
        """How step `index` is taken."""
        if not self._table.scored(index):
            return Step(multiple=2) if self._table.forced[index] else FINE
        for multiple, tau in zip((4, 2), reversed(self._table.thresholds[index]), strict=True):
            spread = deviations(self._subject.regions(multiple), run.latents)
            if float(spread.quantile(self._table.quantile)) < tau:
                return Step(multiple=multiple)
        return FINE


def noise_levels(scheduler: Any, steps: int, tokens: int) -> Tensor:
    """As `FluxPipeline`'s call sets them for an image of as many tokens, `[steps + 1]`."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    levels: Tensor = scheduler.sigmas
    return levels


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """An image, the image tokens that ran for it, and the processor seconds of its loop."""

    image: Pixels
    tokens: int
    seconds: float


@torch.inference_mode()
def draw(
    pipeline: Any, subject: Subject, plan: Plan, prompt: str, seed: int, guidance: float = 1.0
) -> Made:
    """Draws one image with a `FluxPipeline`; with guidance above 1 against the empty prompt."""
    channels = pipeline.transformer.config.in_channels // 4
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, channels, *subject.size, generator=generator)
    sigmas = noise_levels(pipeline.scheduler, len(plan.how), subject.positions[0].shape[0])
    text, pooled, _ = pipeline.encode_prompt(
        prompt=[prompt, ""] if guidance > 1 else [prompt],
        prompt_2=None,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
    )
    text = pipeline.transformer.context_embedder(text)
    prompted = Prompted(text=text, pooled=pooled, guidance=guidance)
    started = time.process_time()
    run = Run(subject, prompted, noise, sigmas, seed)
    choose = None if plan.policy is None else Choice(plan.policy, subject, sigmas)
    for index, step in enumerate(plan.how):
        run.step(index, step if choose is None else choose(run, index))
    seconds = time.process_time() - started - run.aside
    vae = pipeline.vae
    image = vae.decode(run.latents[0] / vae.config.scaling_factor + vae.config.shift_factor)[0]
    pixels = (image[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    shown: Pixels = (pixels * 255).round().to(torch.uint8).numpy()
    return Made(image=shown, tokens=run.tokens, seconds=seconds)


def section(
    model: DemoModel,
    plans: Sequence[Plan],
    prompts: Sequence[tuple[int, str]],
    guidance: float = 1.0,
) -> Row:
    """All plans on some prompts, each with its seed; the plan that comes first changes."""
    pipeline, edge = model.pipeline, SIDE // model.pipeline.vae_scale_factor
    subject = Subject(transformer=pipeline.transformer, size=(edge, edge))
    made: dict[str, list[Made]] = {plan.name: [] for plan in plans}
    draw(pipeline, subject, plans[0], "", 0, guidance)  # warms up
    for place, (seed, prompt) in enumerate(prompts):
        turn = place * len(plans) // len(prompts)
        for plan in (*plans[turn:], *plans[:turn]):
            made[plan.name].append(draw(pipeline, subject, plan, prompt, seed, guidance))
    rows = [_row(plan, made[plan.name], made["fine"]) for plan in plans]
    return {
        "condition": "captions" if guidance == 1 else "open",
        "steps": len(plans[0].how),
        "side": SIDE,
        "scale": None if guidance == 1 else guidance,
        "prompts": [prompt for _, prompt in prompts],
        "image_tokens": subject.positions[0].shape[0],
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
    kinds = (MIXED, CONTROL, ORACLE)
    others = [row for row in rows if row["kind"] not in (*kinds, "fine")]
    coarse = [row for row in others if row["kind"] in (STATIC, DYNAMIC)]
    found = []
    for row in rows:
        if row["kind"] not in kinds:
            continue
        entry: Row = {"name": row["name"]}
        for key, rivals in (("any", others), ("coarse", coarse)):
            for unit, cost in COSTS.items():
                entry[f"{key}_{unit}"] = best_against(row, rivals, cost)
        control = None
        if row["kind"] == MIXED and row["signal"] is not None:
            control = by_name.get(row["name"].replace(row["signal"], "random"))
        entry["control"] = None if control in (None, row) else against(row, control)
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
