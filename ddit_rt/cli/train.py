"""`ddit-rt train`: patch adapters for a model, distilled from the model itself."""

from __future__ import annotations

import argparse
import glob
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddit_rt.cli.command import Command, Outcome
from ddit_rt.cli.models import DEVICES
from ddit_rt.cli.options import existing_file, folder_to_write, number, seed, whole
from ddit_rt.sources import DTYPES, MODEL_HELP, embedded_defaults, load_pipeline

if TYPE_CHECKING:
    from ddit_rt.lab.train import DataConfig, TrainConfig, TrainResult


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        type=folder_to_write,
        metavar="DIR",
        help="folder of the adapters",
    )
    _add_data_arguments(parser.add_argument_group("data"))
    _add_recipe_arguments(parser.add_argument_group("recipe"))
    _add_run_arguments(parser.add_argument_group("run"))


def _add_data_arguments(group: Any) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data",
        metavar="SOURCE",
        help="folder of images with captions (name.png + name.txt, or metadata.jsonl), "
        "WebDataset tar or pattern of tars, or hf:NAME for a data set of the Hub",
    )
    source.add_argument(
        "--self",
        dest="prompts",
        type=existing_file,
        metavar="PROMPTS",
        help="train on the model's own trajectories for the prompts in this file, one a line",
    )
    group.add_argument("--height", type=whole(1), help="image height; default: the model's own")
    group.add_argument("--width", type=whole(1), help="image width; default: the model's own")
    group.add_argument("--limit", type=whole(1), help="most images, or number of trajectories")
    group.add_argument(
        "--sampling-steps",
        type=whole(1),
        default=24,
        help="steps of a trajectory, a sample and the measured gain (default: %(default)s)",
    )
    group.add_argument("--guidance-scale", type=number(), help="default: the pipeline's")
    group.add_argument("--max-sequence-length", type=whole(1), help="text tokens")
    group.add_argument("--image-column", default="image", help="of a data set of the Hub")
    group.add_argument("--caption-column", default="text", help="of a data set of the Hub")
    group.add_argument(
        "--encode-batch", type=whole(1), default=8, help="encoded at once (default: %(default)s)"
    )
    group.add_argument(
        "--cache",
        type=folder_to_write,
        metavar="DIR",
        help="latents and embeddings; default: OUT/run/cache",
    )


def _add_recipe_arguments(group: Any) -> None:
    group.add_argument(
        "--variant",
        choices=("snr", "paper"),
        default="snr",
        help="snr: a correction on the training-free step; paper: as published "
        "(default: %(default)s)",
    )
    group.add_argument("--patch-sizes", default="2p,4p", help="default: %(default)s")
    group.add_argument("--rank", type=whole(1), default=32, help="LoRA rank (default: %(default)s)")
    group.add_argument("--steps", type=whole(1), default=2000, help="default: %(default)s")
    group.add_argument("--batch-size", type=whole(1), default=8, help="default: %(default)s")
    group.add_argument("--accumulate", type=whole(1), default=1, help="batches per step")
    group.add_argument("--optimizer", choices=("adamw", "prodigy"), default="adamw")
    group.add_argument(
        "--lr", type=number(0, open_low=True), help="default: 1e-4 for adamw, 1 for prodigy"
    )
    group.add_argument("--schedule", choices=("cosine", "constant"), default="cosine")
    group.add_argument("--warmup-steps", type=whole(0), default=50, help="default: %(default)s")
    group.add_argument("--ema", type=number(0, 1), default=0.99, help="default: %(default)s")
    group.add_argument("--weighting", choices=("velocity", "clean"), default="velocity")
    group.add_argument(
        "--detail-share",
        type=number(0, 1),
        default=0.5,
        help="share of samples that follow a step at p, snr only (default: %(default)s)",
    )
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, slower")
    group.add_argument("--seed", type=seed, default=0)


def _add_run_arguments(group: Any) -> None:
    group.add_argument("--dtype", choices=DTYPES, help="of the frozen model; default: float32")
    group.add_argument(
        "--device", choices=("auto", *DEVICES), default="auto", help="default: %(default)s"
    )
    group.add_argument("--save-dtype", choices=DTYPES, help="of the files; default: float32")
    group.add_argument(
        "--sample-every", type=whole(0), default=500, help="steps; 0: no sample grids"
    )
    group.add_argument("--checkpoint-every", type=whole(1), default=250, help="steps")
    group.add_argument(
        "--gain-prompts",
        type=existing_file,
        metavar="FILE",
        help="prompts to measure the gain on; default: some of the training data",
    )
    group.add_argument(
        "--restart", action="store_true", help="throw an earlier run away; default: continue it"
    )


def _run(args: argparse.Namespace) -> Outcome | None:
    from ddit_rt.lab.plans.points import prompt_lines
    from ddit_rt.lab.train import train

    config = _config(args)
    gain = None if args.gain_prompts is None else prompt_lines(args.gain_prompts)
    if args.prompts is not None:
        prompt_lines(args.prompts)  # before the model: a bad file should not cost loading one
    _source(args)
    pipeline = load_pipeline(args.model, args.dtype, args.device)
    pipeline.set_progress_bar_config(disable=True)
    import torch

    from ddit_rt.adapters import adaptable_layers
    from ddit_rt.models import family_of

    adaptable_layers(family_of(pipeline.transformer, pipeline), pipeline.transformer)
    result = train(
        pipeline,
        _data(args, pipeline),
        config,
        args.out,
        gain_prompts=gain,
        cache=args.cache,
        restart=args.restart,
        save_dtype=None if args.save_dtype is None else getattr(torch, args.save_dtype),
        model_name=args.model,
    )
    return _outcome(result) if result.is_main else None


def _config(args: argparse.Namespace) -> TrainConfig:
    from ddit_rt.lab.train import OptimizerConfig, TrainConfig

    return TrainConfig(
        patch_sizes=tuple(size.strip() for size in args.patch_sizes.split(",")),
        variant=args.variant,
        rank=args.rank,
        steps=args.steps,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        optimizer=OptimizerConfig(
            name=args.optimizer,
            lr=args.lr,
            schedule=args.schedule,
            warmup_steps=args.warmup_steps,
            ema=args.ema,
        ),
        weighting=args.weighting,
        detail_share=args.detail_share,
        gradient_checkpointing=args.gradient_checkpointing,
        seed=args.seed,
        sample_every=args.sample_every,
        checkpoint_every=args.checkpoint_every,
    )


def _data(args: argparse.Namespace, pipeline: Any) -> DataConfig:
    from ddit_rt.lab.train import DataConfig

    kind, source = _source(args)
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    defaults: dict[str, int] = {"height": side, "width": side, **embedded_defaults(args.model)}
    given = {name: getattr(args, name) for name in ("height", "width", "max_sequence_length")}
    defaults.update({name: value for name, value in given.items() if value is not None})
    return DataConfig(
        kind=kind,
        source=source,
        height=defaults["height"],
        width=defaults["width"],
        max_sequence_length=defaults.get("max_sequence_length"),
        guidance_scale=args.guidance_scale,
        limit=args.limit,
        sampling_steps=args.sampling_steps,
        image_column=args.image_column,
        caption_column=args.caption_column,
        encode_batch=args.encode_batch,
        seed=args.seed,
    )


def _source(args: argparse.Namespace) -> tuple[str, str]:
    """Kind and source of the data.

    Raises:
        ValueError: No such file or folder.
    """
    if args.prompts is not None:
        return "self", str(args.prompts)
    source: str = args.data
    if source.startswith("hf:"):
        return "datasets", source.removeprefix("hf:")
    if not Path(source).exists() and not glob.glob(source):  # noqa: PTH207 - it may be absolute
        what = "no file matches" if glob.has_magic(source) else "no such file or folder:"
        raise ValueError(f"{what} {source}; --data names images with captions")
    if source.endswith(".tar"):
        return "webdataset", source
    if (Path(source) / "dataset_info.json").is_file():
        return "datasets", source
    return "folder", source


def _outcome(result: TrainResult) -> Outcome:
    losses = {
        path: {f"{multiple}p": loss for multiple, loss in by_size.items()}
        for path, by_size in result.losses.items()
    }
    data: dict[str, Any] = {
        "adapters": str(result.folder),
        "steps": result.steps,
        "samples": result.samples,
        "skipped": result.skipped,
        "losses": losses,
        "gains": [asdict(gain) for gain in result.gains],
        "warnings": result.warnings,
        "seconds_per_step": result.seconds_per_step,
    }
    lines = [f"wrote {result.folder} ({result.steps} steps on {result.samples} samples)"]
    if result.skipped:
        lines.append(f"{len(result.skipped)} images were skipped:")
        lines += [f"  {reason}" for reason in result.skipped]
    lines += [
        f"{gain.patch}, {gain.plan}: "
        + ", ".join(f"{path} {value:.1f} dB" for path, value in gain.psnr.items())
        for gain in result.gains
    ]
    return Outcome(data=data, text="\n".join(lines))


TRAIN = Command(
    name="train",
    summary="Train patch adapters for a model, distilled from the model itself.",
    examples=(
        "ddit-rt train demo --self prompts.txt --limit 512 --out adapters/",
        "ddit-rt train black-forest-labs/FLUX.1-dev --dtype bfloat16 --data images/ \\",
        "    --gradient-checkpointing --optimizer prodigy --out adapters/",
        "accelerate launch -m ddit_rt.cli train ./flux --data 'shards/*.tar' --out adapters/",
        "torchrun --nproc_per_node 2 -m ddit_rt.cli train demo --self prompts.txt --out adapters/",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
