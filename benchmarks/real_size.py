"""What the benchmarks of models at their real size share: settings, and the head of their file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from flux_setup import Setup
from hardware import machine_entry
from records import Record
from timing import Deadline

from ddit_rt.lab.measure.report import model_entry, versions

SCHEMA_VERSION = 1
RESULTS = Path(__file__).resolve().parent / "results"


def parser_of(
    description: str, sections: Sequence[str], presets: Sequence[str], full: str
) -> argparse.ArgumentParser:
    """A parser of the settings that all have; a script adds its own.

    Args:
        description: Of the script; its first line is taken.
        sections: Names of what it measures.
        presets: Names of its models.
        full: Of these, the one at its real size, the default on CUDA; on a CPU it is `small`.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--sections", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--preset", choices=presets, help=f"default: {full} on CUDA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--contenders", nargs="+", default=["*"], help="patterns of names in loops")
    parser.add_argument("--executors", nargs="+", choices=("auto", "loop", "step", "host"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget-s", type=float, default=480.0, help="no new repeat after this")
    parser.add_argument("--warm-up-limit-s", type=float, default=300.0, help="of one contender")
    parser.add_argument("--backend", choices=("aot", "eager"), default="aot")
    parser.add_argument("--artifact", type=Path, help="loaded if it exists, else compiled to it")
    parser.add_argument("--out", type=Path)
    parser.set_defaults(full=full)
    return parser


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> None:
    """Fills in what depends on the device.

    Args:
        parser: For errors.
        args: What it parsed; changed.
        name: Of the family, for the file.
    """
    kind = torch.device(args.device).type
    cuda = kind == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error(f"got --device {args.device}, but torch sees no CUDA device")
    args.preset = args.preset or (args.full if cuda else "small")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.executors = args.executors or (["loop", "step", "host"] if cuda else ["auto"])
    args.out = args.out or RESULTS / f"{name}_{kind}.json"


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of a `Setup` that come from the settings alone."""
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    return {
        "device": device,
        "dtype": getattr(torch, args.dtype),
        "backend": args.backend,
        "repeats": args.repeats,
        "deadline": Deadline(args.budget_s),
        "warm_up_limit": args.warm_up_limit_s,
        "executors": tuple(args.executors),
    }


def header(preset: str, family: str, setup: Setup, notes: Sequence[str]) -> Record:
    """All but the sections."""
    transformer = setup.pipeline.transformer
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine_entry(setup.device),
        "versions": versions(),
        "model": {
            "preset": preset,
            **model_entry(f"{family}, random weights", transformer),
            "weight_bytes": sum(parameter.nbytes for parameter in transformer.parameters()),
            "text_tokens": setup.preset.text_tokens,
            "config": dict(setup.preset.config),
        },
        "notes": list(notes),
    }
