"""`ddit-rt eval`: the plans of an artifact side by side, their quality and their cost."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddit_rt.cli.command import Command, Outcome
from ddit_rt.cli.models import (
    add_call_arguments,
    add_trust_argument,
    load_artifact,
    pipeline_arguments,
    refuse_video,
    require_eval,
)
from ddit_rt.cli.options import existing_folder, folder_to_write, seed, whole
from ddit_rt.cli.policies import choose_policy, policy_text
from ddit_rt.sources import EMBEDDED, MODEL_HELP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ddit_rt.engine import Engine
    from ddit_rt.lab.evaluate.config import EvaluationConfig
    from ddit_rt.planning.request import PolicyChoice


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="what compile wrote")
    parser.add_argument("--model", required=True, help=f"the weights: {MODEL_HELP}")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt a line; or demo (captions of the demo model), drawbench, parti, coco, "
        "from the Hub by the package datasets; default for the model demo: demo",
    )
    parser.add_argument(
        "--limit", type=whole(1), metavar="N", help="prompts at most, spread over all"
    )
    parser.add_argument(
        "--out",
        type=folder_to_write,
        metavar="DIR",
        help="folder of images or recordings and report; a run that was cut off goes on there; "
        "default: beside the artifact",
    )
    parser.add_argument(
        "--policy",
        action="append",
        type=policy_text,
        metavar="POLICY",
        help="a plan to evaluate, as for generate; repeatable, the first dynamic one gets "
        "baselines of equal cost; default: the presets of the artifact's calibration, else its "
        "policy",
    )
    _add_run_arguments(parser)
    _add_metric_arguments(parser.add_argument_group("metrics"))


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps",
        type=whole(1),
        help="steps of the full-resolution reference; default: the pipeline's",
    )
    parser.add_argument(
        "--seeds",
        type=whole(1),
        default=1,
        metavar="N",
        help="images of each prompt (default: 1)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the first image (default: 0)")
    parser.add_argument(
        "--batch", type=whole(1), default=1, metavar="N", help="prompts in a call (default: 1)"
    )
    parser.add_argument(
        "--repeats", type=whole(1), default=1, help="timed runs of each image (default: 1)"
    )
    parser.add_argument(
        "--cost",
        choices=("ms", "tokens"),
        default="ms",
        help="what the baselines' cost is equal in: milliseconds of the loop, measured here, or "
        "image tokens (default: %(default)s)",
    )
    add_call_arguments(parser)
    add_trust_argument(parser)
    parser.add_argument(
        "--shown",
        type=whole(1),
        default=12,
        metavar="N",
        help="prompts with images in report.html, worst first (default: %(default)s)",
    )


def _add_metric_arguments(group: Any) -> None:
    group.add_argument(
        "--references",
        type=existing_folder,
        metavar="DIR",
        help="images that FID compares with; default: the full-resolution ones",
    )
    group.add_argument(
        "--clip-model",
        metavar="NAME",
        help="folder or Hub name of a CLIP model; default: openai/clip-vit-large-patch14",
    )
    group.add_argument(
        "--weights",
        type=existing_folder,
        metavar="DIR",
        help="folder with the weights of LPIPS and FID (in checkpoints/, as torch.hub keeps them) "
        "and of ImageReward; default: their own caches",
    )


def _run(args: argparse.Namespace) -> Outcome:
    require_eval("eval", "jinja2", "matplotlib", "torchmetrics")
    from ddit_rt.artifact import read_manifest
    from ddit_rt.lab.evaluate.metrics import weights_folder
    from ddit_rt.models import family_named

    prompts, source = _prompts(args)
    manifest = read_manifest(args.artifact)
    refuse_video(manifest, "eval")
    sound = family_named(manifest.family).audio
    if sound:
        _refuse_image_options(args)
    with weights_folder(args.weights):
        engine = load_artifact(args, manifest)
        engine.pipeline.set_progress_bar_config(disable=True)
        config = _config(args, engine, prompts, source)
        return _evaluate(args, engine, config, sound=sound)


def _refuse_image_options(args: argparse.Namespace) -> None:
    """Refuses what only metrics of images would read."""
    for name in ("references", "clip_model", "weights"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"got --{name.replace('_', '-')} for a model of sound, whose metrics compare "
                "recordings alone; leave it out"
            )


def _prompts(args: argparse.Namespace) -> tuple[tuple[str, ...], str]:
    from ddit_rt.lab.evaluate.prompt_sets import DEMO, NAMES, read_prompts

    source = args.prompts or (DEMO if args.model == EMBEDDED else None)
    if source is None:
        raise ValueError(
            f"name the prompts with --prompts: a file with one a line, or one of {', '.join(NAMES)}"
        )
    return read_prompts(source, args.limit), source


def _config(
    args: argparse.Namespace, engine: Engine, prompts: Sequence[str], source: str
) -> EvaluationConfig:
    from ddit_rt.lab.evaluate.config import EvaluationConfig
    from ddit_rt.planning.request import requested_steps

    arguments = pipeline_arguments(args)
    steps, _ = requested_steps(engine.pipeline, arguments)
    others = {name: value for name, value in arguments.items() if name != "num_inference_steps"}
    return EvaluationConfig(
        out=args.out or args.artifact.with_name(f"{args.artifact.stem}-eval"),
        prompts=tuple(prompts),
        source=source,
        steps=steps,
        policies=_policies(args.policy or [], engine),
        arguments=others,
        seeds=args.seeds,
        seed=args.seed,
        batch=args.batch,
        repeats=args.repeats,
        cost_unit=args.cost,
        references=args.references,
    )


def _policies(texts: Sequence[str], engine: Engine) -> tuple[tuple[str, PolicyChoice], ...]:
    chosen = [(text, choose_policy(text, None, None, engine.default_policy)) for text in texts]
    # A plan's name is a folder's name too: a policy that is written out gets a number.
    return tuple(
        (text if text.isalnum() else f"policy-{number}", policy)
        for number, (text, policy) in enumerate(chosen, start=1)
    )


def _evaluate(
    args: argparse.Namespace, engine: Engine, config: EvaluationConfig, *, sound: bool
) -> Outcome:
    from ddit_rt.lab.evaluate.metrics import CLIP_MODEL, all_metrics, sound_metrics, usable
    from ddit_rt.lab.evaluate.run import Subject, evaluate, summary

    metrics = (
        sound_metrics()
        if sound
        else all_metrics(
            device=str(engine.pipeline.transformer.device),
            clip_model=args.clip_model or CLIP_MODEL,
            weights=args.weights,
            demo=args.model == EMBEDDED,
        )
    )
    can, cannot = usable(metrics)
    for metric in cannot:
        sys.stderr.write(f"without {metric.label}: {metric.reason}\n")
    subject = Subject(model=args.model, artifact=str(args.artifact))
    report, files = evaluate(engine, config, subject, can, cannot, shown=args.shown)
    wrote = f"wrote {' and '.join(str(file) for file in files)}"
    return Outcome(
        data={"files": [str(file) for file in files], "report": report},
        text=f"{summary(report)}\n{wrote}",
    )


EVALUATE = Command(
    name="eval",
    summary="Compare the plans of an artifact side by side: quality, time, images.",
    examples=(
        "ddit-rt eval demo.ddit --model demo --steps 24 --limit 16",
        "ddit-rt eval flux.ddit --model black-forest-labs/FLUX.1-dev --steps 50 \\",
        "    --prompts drawbench --limit 64 --seeds 2 --out flux-eval",
        "ddit-rt eval flux.ddit --model ./flux --prompts prompts.txt --policy balanced \\",
        "    --policy dynamic --references coco-val/ --clip-model ./clip",
        "ddit-rt eval sound.ddit --model ./longcat --prompts prompts.txt --audio-duration-s 5",
        "ddit-rt ab flux-eval   # blind comparison by people",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
