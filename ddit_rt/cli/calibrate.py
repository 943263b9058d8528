"""`ddit-rt calibrate`: the plans of an artifact, found by running it."""

from __future__ import annotations

import argparse
import inspect
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddit_rt.cli.command import Command, Outcome
from ddit_rt.cli.models import (
    add_call_arguments,
    add_further_arguments,
    add_trust_argument,
    load_artifact,
    pipeline_arguments,
    require_eval,
)
from ddit_rt.cli.options import existing_file, folder_to_write, number, seed, whole
from ddit_rt.sources import EMBEDDED, EMBEDDED_VIDEO, MODEL_HELP, refuse_sound

if TYPE_CHECKING:
    from ddit_rt.artifact import Calibration, Manifest
    from ddit_rt.engine import Engine
    from ddit_rt.lab.calibrate import CalibrationConfig
    from ddit_rt.lab.measure.measures import Measure

_QUALITY = {"residual_rms", "mean_deviation_between_prompts", "log_rms"}
"""What of a fit's evidence says how well it fits."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "artifact", type=Path, metavar="ARTIFACT", help="what compile wrote; the result goes there"
    )
    parser.add_argument("--model", required=True, help=f"the weights: {MODEL_HELP}")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument(
        "--speedup", type=number(), metavar="X", help="of the loop, over as many steps at p"
    )
    group.add_argument(
        "--min-ssim",
        type=number(),
        metavar="S",
        help="mean SSIM to the images at full resolution, or to the frames of the videos",
    )
    group.add_argument(
        "--min-stft",
        type=number(),
        metavar="S",
        help="of models of sound: mean STFT similarity to the recordings at full resolution",
    )
    group.add_argument(
        "--budget-ms",
        type=number(),
        metavar="MS",
        help="of the loop of an image, video or recording",
    )
    group.add_argument(
        "--cache",
        choices=("teacache", "teacache-ret", "magcache"),
        help="instead of plans, fit what this step cache needs of the model, from runs of the "
        "calibration prompts at full resolution",
    )
    group.add_argument(
        "--spectrum",
        action="store_true",
        help="instead of plans, measure the spectrum of the model's latents, by which the spectral "
        "policy decides when to go fine, from such runs",
    )
    parser.add_argument(
        "--steps", type=whole(1), help="denoising steps to calibrate for; default: the pipeline's"
    )
    parser.add_argument(
        "--prompts",
        type=existing_file,
        metavar="FILE",
        help="one prompt a line; default: a built-in list",
    )
    _add_search_arguments(parser)
    add_call_arguments(parser)
    add_further_arguments(parser)
    add_trust_argument(parser, "; saving the result then trusts it for good")
    parser.add_argument(
        "--out",
        type=folder_to_write,
        metavar="DIR",
        help="folder for calibration-N.json, pareto-N.png, front-N.md, and what was measured, "
        "line by line, from which a stopped calibration goes on; default: beside the artifact",
    )


def _add_search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cost",
        choices=("ms", "tokens"),
        default="ms",
        help="milliseconds of the loop, measured here, or image tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration-prompts",
        type=whole(1),
        default=4,
        metavar="N",
        help="prompts that the search uses (default: %(default)s)",
    )
    parser.add_argument(
        "--held-out-prompts",
        type=whole(1),
        default=8,
        metavar="N",
        help="other prompts that confirm the best plans (default: %(default)s)",
    )
    parser.add_argument(
        "--pictures",
        type=whole(1),
        default=200,
        metavar="N",
        help="what the calibration may generate in all: to measure costs, to search over number "
        "of steps, their noise levels, patch sizes and reuse, and to confirm the best plans "
        "(default: %(default)s)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of prompts and noise (default: 0)")


def _run(args: argparse.Namespace) -> Outcome:
    from ddit_rt.lab.measure.measures import measure_of
    from ddit_rt.models import family_named

    if args.cache is not None or args.spectrum:
        return _fit(args)
    require_eval("calibrate", "matplotlib", "torchmetrics")
    manifest = _manifest(args)
    measure = measure_of(family_named(manifest.family))
    config = _config(args, measure)
    config.check(measure)
    engine = _engine(args, manifest)
    arguments = pipeline_arguments(args)
    folder = args.out or args.artifact.with_name(f"{args.artifact.stem}-calibration")
    calibration = _calibrate(engine, config, arguments, folder)
    from ddit_rt.lab.calibrate.report import summary, write_report

    engine.artifact.with_calibration(calibration).save(args.artifact)
    files = write_report(calibration, folder)
    data = {
        "artifact": str(args.artifact),
        "files": [str(file) for file in files],
        "calibration": asdict(calibration),
    }
    wrote = f"wrote {args.artifact} and {', '.join(str(file) for file in files)}"
    return Outcome(data=data, text=f"{summary(calibration)}\n{wrote}")


def _manifest(args: argparse.Namespace) -> Manifest:
    """Of the artifact, which must be one that can be calibrated and saved."""
    from ddit_rt.artifact import read_manifest, require_savable

    manifest = read_manifest(args.artifact)
    refuse_sound(manifest, "calibrate")
    require_savable(args.artifact)
    return manifest


def _engine(args: argparse.Namespace, manifest: Manifest) -> Engine:
    engine = load_artifact(args, manifest)
    engine.pipeline.set_progress_bar_config(disable=True)
    return engine


def _fit(args: argparse.Namespace) -> Outcome:
    """`--cache` and `--spectrum`: a fit into the artifact."""
    from tqdm.auto import tqdm

    from ddit_rt.lab.calibrate import Prompt
    from ddit_rt.lab.calibrate.cache_fit import fit_cache
    from ddit_rt.lab.measure.measures import measure_of
    from ddit_rt.models import family_named

    manifest = _manifest(args)
    measure = measure_of(family_named(manifest.family))
    texts = _prompts(args.prompts, args.model, measure)[: args.calibration_prompts]
    if len(texts) < args.calibration_prompts:
        raise ValueError(
            f"got {len(texts)} prompts and --calibration-prompts {args.calibration_prompts}; give "
            "more, or ask for fewer"
        )
    prompts = [Prompt(text=text, seed=args.seed + place) for place, text in enumerate(texts)]
    engine, arguments = _engine(args, manifest), pipeline_arguments(args)
    with tqdm(total=len(prompts), desc="calibrate", unit="run", leave=False) as bar:
        fit = fit_cache(
            engine,
            "spectrum" if args.spectrum else args.cache,
            prompts,
            arguments=arguments,
            conditions=_conditions(engine, arguments),
            advance=bar.update,
        )
    engine.artifact.with_cache_fit(fit).save(args.artifact)
    values = ", ".join(f"{value:.6g}" for value in fit.values)
    found = {name: fit.evidence[name] for name in fit.evidence.keys() & _QUALITY}
    quality = "; ".join(f"{name} {value:.3g}" for name, value in found.items())
    text = f"{fit.kind}: {values}\n{fit.source}; {quality}\nwrote {args.artifact}"
    return Outcome(data={"artifact": str(args.artifact), "fit": asdict(fit)}, text=text)


def _conditions(engine: Engine, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the figures hold for: machine, versions, and the call with its size and guidance."""
    from ddit_rt.lab.measure.report import machine, versions

    own = inspect.signature(type(engine.pipeline).__call__).parameters
    defaults = {
        "guidance_scale": own["guidance_scale"].default,
        **engine.artifact.manifest.pipeline_defaults,
    }
    return {
        "machine": machine(),
        "versions": versions(),
        "arguments": {**defaults, **arguments},
    }


def _config(args: argparse.Namespace, measure: Measure) -> CalibrationConfig:
    from ddit_rt.lab.calibrate import CalibrationConfig

    if args.steps is not None and args.steps < 2:
        raise ValueError(f"got --steps {args.steps}; of fewer than 2 steps none can be saved")
    names = ("speedup", "min_ssim", "min_stft", "budget_ms")
    return CalibrationConfig(
        request={n: value for n in names if (value := getattr(args, n)) is not None},
        prompts=_prompts(args.prompts, args.model, measure),
        calibration_prompts=args.calibration_prompts,
        held_out_prompts=args.held_out_prompts,
        pictures=args.pictures,
        cost_unit=args.cost,
        seed=args.seed,
    )


def _prompts(file: Path | None, model: str, measure: Measure) -> tuple[str, ...]:
    if file is not None:
        from ddit_rt.lab.plans.points import prompt_lines

        return tuple(prompt_lines(file))
    if model == EMBEDDED:
        from ddit_rt.lab.demo.prompts import held_out_prompts

        return tuple(held_out_prompts())
    if model == EMBEDDED_VIDEO:
        from ddit_rt.lab.demo.prompts import held_out_video_prompts

        return tuple(held_out_video_prompts())
    from ddit_rt.lab.calibrate.prompts import PROMPTS, SOUNDS

    return SOUNDS if measure.makes == "recording" else PROMPTS


def _calibrate(
    engine: Engine, config: CalibrationConfig, arguments: dict[str, Any], folder: Path
) -> Calibration:
    from tqdm.auto import tqdm

    from ddit_rt.artifact.manifest import SCHEMA_VERSION
    from ddit_rt.lab.calibrate import Journal, RecordedBench, calibrate
    from ddit_rt.lab.plans.bench import EngineBench
    from ddit_rt.planning.request import requested_steps

    steps, _ = requested_steps(engine.pipeline, arguments)
    others = {name: value for name, value in arguments.items() if name != "num_inference_steps"}
    conditions, manifest = _conditions(engine, others), engine.artifact.manifest
    probe = config.split()[0][0]
    measured_with = {
        # What an earlier calibration left in the manifest changes nothing that is measured.
        "artifact": replace(manifest, calibrations=(), schema_version=SCHEMA_VERSION).digest,
        "cost_unit": config.cost_unit,
        "probe": [probe.text, probe.seed],
        **conditions,
    }
    journal = Journal(folder, steps, measured_with)
    with tqdm(total=config.pictures, desc="calibrate (at most)", unit="run", leave=False) as bar:
        bench = EngineBench(
            engine,
            steps=steps,
            probe=probe,
            arguments=others,
            unit=config.cost_unit,
            skipping=True,
            known=journal.get("tables"),
            advance=bar.update,
        )
        if journal.get("tables") is None:
            journal.add({"tables": bench.tables.to_dict()})
        for note in bench.tables.notes:
            sys.stderr.write(f"{note}\n")
        return calibrate(RecordedBench(bench, journal), config, conditions).calibration


CALIBRATE = Command(
    name="calibrate",
    summary="Find the plans of an artifact by running it, over steps, patch sizes and reuse.",
    examples=(
        "ddit-rt calibrate demo.ddit --model demo --steps 24 --speedup 2",
        "ddit-rt calibrate flux.ddit --model black-forest-labs/FLUX.1-dev --steps 50 \\",
        "    --min-ssim 0.9 --prompts prompts.txt",
        "ddit-rt calibrate flux.ddit --model ./flux --budget-ms 900 --pictures 300",
        "ddit-rt calibrate clip.ddit --model demo-video --steps 24 --speedup 2 --guidance-scale 3",
        "ddit-rt calibrate sound.ddit --model ./longcat --steps 20 --min-stft 0.8",
        "ddit-rt calibrate demo.ddit --model demo --steps 24 --cache teacache",
        "ddit-rt generate demo.ddit --model demo --steps 24 --policy balanced \\",
        '    --prompt "a red circle on plain blue"',
    ),
    add_arguments=_add_arguments,
    run=_run,
)
