"""`ddit-rt info` of a diffusers folder: whether it can be run, and what its steps cost at least."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddit_rt.cli.command import Outcome
from ddit_rt.cli.options import number, whole
from ddit_rt.sources import DTYPES, embedded_defaults, embedded_path, is_embedded

SIZES = ("height", "width", "num_frames", "audio_duration_s")
OPTIONS = (*SIZES, "text_tokens", "dtype")
"""Options that say which size and dtype of a diffusers folder is meant."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what may be said of a diffusers folder."""
    of = "of a diffusers folder: "
    parser.add_argument("--height", type=whole(1), help=f"{of}pixel rows to count besides")
    parser.add_argument("--width", type=whole(1), help=f"{of}pixel columns of the same")
    parser.add_argument("--num-frames", type=whole(1), help=f"{of}frames of the same")
    parser.add_argument(
        "--audio-duration-s",
        type=number(0, open_low=True),
        help=f"{of}length of audio to count besides",
    )
    parser.add_argument(
        "--text-tokens", type=whole(1), help=f"{of}default: the most that the pipeline takes"
    )
    parser.add_argument("--dtype", choices=DTYPES, help=f"{of}of the weights (default: bfloat16)")


def is_model(path: Path) -> bool:
    """Whether a path is a diffusers folder, or none of an artifact either."""
    no_artifact = path.is_dir() and not (path / "manifest.json").exists()
    return no_artifact or is_embedded(str(path))


def run_model(args: argparse.Namespace) -> Outcome:
    """Looks at the folder."""
    import torch

    from ddit_rt.engine.support import inspect_folder

    if args.model is not None:
        raise ValueError(
            f"got --model for {args.artifact}, which is no artifact; give a model, or an artifact "
            "and its model"
        )
    name = str(args.artifact)
    embedded = is_embedded(name)
    default = embedded_defaults(name) if embedded else {}
    asked = {size: getattr(args, size) or default.get(size) for size in SIZES}
    found = inspect_folder(
        Path(embedded_path(name)) if embedded else args.artifact,
        **asked,
        text_tokens=args.text_tokens,
        dtype=getattr(torch, args.dtype or "bfloat16"),
    )
    data = {"model": name, "supported": not found.problem, **asdict(found)}
    return Outcome(data=data, text=_text(data))


def _text(data: dict[str, Any]) -> str:
    lines = [f"{data['model']}  ({data['pipeline_class'] or 'a transformer alone'})"]
    if data["problem"]:
        return "\n".join([*lines, "  supported    no", f"    {data['problem']}"])
    lines += [
        f"  supported    yes: family {data['family']}, {data['transformer_class']}",
        f"  driven by    {data['driven']}",
    ]
    if not data["sizes"]:
        return "\n".join([*lines, "  sizes        give the folder of the whole pipeline"])
    passes = {1: "", 2: "; a step has two, for guidance"}
    twice = passes.get(data["passes"], f"; a step has {data['passes']}, for guidance")
    lines.append(
        f"  floor        of one pass of the model{twice}: batch 1, {data['text_tokens']} text "
        f"tokens, {data['dtype']}"
    )
    return "\n".join(lines + [line for size in data["sizes"] for line in _size_lines(size)])


def _size_lines(size: dict[str, Any]) -> list[str]:
    latent = " x ".join(map(str, size["latent"])) or "none"
    return [
        f"  {size_text(size)}: latent {latent}",
        *(
            f"    {patch:<3} {cost['image_tokens']:>7,} tokens  {cost['flops'] / 1e12:>8.3g} TFLOP"
            f"  {cost['weight_bytes'] / 2**20:>9,.1f} MiB of weights"
            for patch, cost in size["costs"].items()
        ),
        *(f"    {reason}" for reason in size["missing"]),
    ]


def size_text(size: dict[str, Any]) -> str:
    """Pixels and frames of an image or video; the length of audio."""
    if size["seconds"] is not None:
        return f"{size['seconds']:.2f} s"
    frames = "" if size["num_frames"] is None else f", {size['num_frames']} frames"
    return f"{size['height']} x {size['width']}{frames}"
