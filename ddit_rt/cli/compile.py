"""`ddit-rt compile`: a model into an artifact."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ddit_rt.cli.command import Command, Outcome
from ddit_rt.cli.models import DEVICES
from ddit_rt.cli.options import whole, writable
from ddit_rt.cli.policies import add_step_cache_argument, patch_sizes
from ddit_rt.sources import (
    DTYPES,
    EMBEDDED,
    MODEL_HELP,
    embedded_defaults,
    embedded_policy,
    load_pipeline,
)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "-o", "--output", required=True, type=writable, metavar="OUT.ddit", help="artifact to write"
    )
    parser.add_argument("--height", type=whole(1), help="image height; default: the model's own")
    parser.add_argument("--width", type=whole(1), help="image width; default: the model's own")
    parser.add_argument("--num-frames", type=whole(1), help="of a video; default: the model's own")
    parser.add_argument(
        "--patch-sizes",
        type=patch_sizes,
        default="p,2p,4p",
        metavar="SIZES",
        help="patch sizes to offer, multiples of the model's own p (default: %(default)s)",
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="trained patch adapters (safetensors folder), or 'demo' for those of the demo model",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to load the model in")
    parser.add_argument(
        "--quantization",
        choices=("int8", "fp8"),
        help="quantise the blocks, weights and inputs, with torchao; fp8 needs an H100 or its kin",
    )
    parser.add_argument(
        "--device",
        choices=("auto", *DEVICES),
        default="auto",
        help="device to compile for; auto is cuda where torch can use it (default: %(default)s)",
    )

    add_step_cache_argument(parser, "none")


def _run(args: argparse.Namespace) -> Outcome:
    _check_output(args.output)
    adapter = None if args.adapter is None else _adapter_folder(args.adapter)
    pipeline = load_pipeline(args.model, args.dtype, args.device)
    import ddit_rt
    from ddit_rt.models import family_of

    family = family_of(pipeline.transformer, pipeline)
    height, width = family.default_size(pipeline)
    size: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_frames": family.default_frames(pipeline),
    }
    size |= {name: embedded_defaults(args.model).get(name, size[name]) for name in size}
    if family.audio:
        size = dict.fromkeys(size)
    size |= {name: given for name in size if (given := getattr(args, name)) is not None}
    engine = ddit_rt.compile(
        pipeline,
        **size,
        patch_sizes=args.patch_sizes,
        quantization=args.quantization,
        adapter=adapter,
        patch_policy=embedded_policy(args.model),
        step_cache=args.step_cache,
    )
    path = engine.save(args.output)
    written = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    data = {"artifact": str(path), "bytes": written}
    return Outcome(data=data, text=f"wrote {path} ({written / 2**20:.1f} MiB)")


def _adapter_folder(name: str) -> Path:
    if name == EMBEDDED:
        from ddit_rt.lab.demo import adapters_path

        return adapters_path()
    if not Path(name).is_dir():
        raise ValueError(f"no such folder: {name}; --adapter names one with adapters")
    return Path(name)


def _check_output(path: Path) -> None:
    """Refuses, before minutes of work, a path that cannot become an artifact."""
    if path.is_file():
        raise ValueError(f"{path} is a file; an artifact is a folder, by custom named NAME.ddit")
    if path.is_dir() and any(path.iterdir()) and not (path / "manifest.json").is_file():
        raise ValueError(
            f"{path} holds other files and is no artifact; name a new folder such as {path}.ddit"
        )
    from ddit_rt.artifact import require_savable

    require_savable(path)


COMPILE = Command(
    name="compile",
    summary="Compile a model ahead of time into an artifact.",
    examples=(
        "ddit-rt compile demo -o demo.ddit",
        "ddit-rt compile demo --adapter demo -o demo.ddit",
        "ddit-rt compile demo-video -o clip.ddit",
        "ddit-rt compile black-forest-labs/FLUX.1-dev -o flux.ddit --dtype bfloat16",
        "ddit-rt compile ./my-flux -o my-flux.ddit --height 768 --width 1024 --patch-sizes p,2p",
        "ddit-rt compile ./wan -o wan.ddit --dtype bfloat16 --height 512 --num-frames 81",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
