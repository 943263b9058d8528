"""Times FLUX.1-dev at its real size with random weights on a GPU, or a small FLUX on a CPU.

    python benchmarks/bench_flux.py [--sections buckets loops memory compile overhead] [--out FILE]

Each section fits into some minutes when it is called alone, with one size at a time where need be;
results of earlier calls in `--out` are kept, so several calls fill one file. Within `loops`,
`--contenders 'ddit_rt_loop_*' 'compile_regional'` runs a part of them, always beside diffusers
eager: ratios are only ever taken within one call. Repeats stop early at `--budget-s`. A contender
that fails leaves its error in the record, and the others go on.

Weights are random (`flux_model.py`), so speed is real and quality is not: the distance to diffusers
eager says that the same thing was computed where all steps run at p, and nothing for other plans;
what DDiTPolicy chooses, and when FirstBlockCache hits, is as arbitrary as the weights are. Only the
time of a run with those choices means something, beside the choices, which stand in its row.

All contenders make the same call of the same pipeline class, without text encoders and VAE. Seconds
are of that call: on CUDA between two events, with the wall time beside it; two calls warm up. On
CUDA a step's time is by the device's clock.

Schema, version 1. `spread` is `median`, `min`, `max`, `lower_quartile`, `upper_quartile`, `count`.

- `schema_version`; `machine`, `versions`; `model` (`preset`, `config`, `parameters`, `dtype`,
  `weight_bytes`, `text_tokens`); `notes`: what the figures do not mean.
- `sections`: by section, by case (`1024x1024/batch1`, for loops and overhead `.../steps28`), a
  record with `measured_at`, `repeats`, `warm_up_calls` and, by section:
  - `buckets`: `rates` (matrix product and copy, measured in the same call); `rows` by `p`, `2p`,
    `4p`, `skip` (decision and update, no model): `seconds` (spread over steps), `flops`,
    `weight_bytes` or `moved_bytes`, `floor_seconds`, `bound`, `over_floor`, `ran_on`, `notes`.
  - `loops`: `flops_per_step`; `rows` by contender: `label`, `schedule` (`fine`; `paper_...`, see
    `flux_plans.py`; `mixed` = 4p:0.2,2p:0.4,p; `dynamic` = DDiTPolicy()), `executor`, `seconds`,
    `wall_seconds`, `first_call_seconds` (compilers' caches may be warm), `baseline_seconds`
    (diffusers eager in the same call), `speedup` (over it), `counted_speedup` (by operations),
    `relative_error` (of the final latents), `finite`, and for ours `ran_on`, `patch_sizes`,
    `tokens`, `notes`, `late_captures`; for FirstBlockCache `computed_steps`.
  - `memory`: `weight_bytes`; `diffusers_eager` and `ddit_rt`: `peak_bytes` (of tensors; on a CPU of
    the resident set), `used_bytes` (of the device); `growth_by_load_bytes`, `growth_by_runs_bytes`,
    `captures`; `ratio_of_peak_bytes`, `ratio_of_used_bytes`.
  - `compile`: `compile_seconds` with empty caches, `artifact_bytes`, `load_seconds`,
    `first_run_seconds`, `load_to_first_image_seconds` (weights in memory, no VAE),
    `second_run_seconds`, `captures` (capture, instantiation, upload, memory, graph nodes).
  - `overhead`: `rows` by patch size of all steps: `model_seconds` (from a profile), `executors`: by
    form `wall_seconds` (of the call) and `loop_seconds` (of its steps), with `..._overhead_seconds`
    and `..._overhead_share` beside the model; on CUDA counts of what the host called: `host_calls`,
    `host_calls_during_work` (between the first and the last kernel), `host_calls_in_loop`.
- Whatever failed is `{"error": text}` in place of its record or row, or `latest_error` beside what
  an earlier call measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flux_buckets import buckets
from flux_costs import compiling, memory
from flux_loops import loops
from flux_model import PRESETS, Case
from flux_overhead import overhead
from flux_setup import Setup
from hardware import device_name, machine_entry
from tables import update_readme
from timing import Deadline, attempt

from ddit_rt.demo.report import model_entry, versions

SCHEMA_VERSION = 1
SECTIONS = ("buckets", "loops", "memory", "compile", "overhead")
RESULTS = Path(__file__).resolve().parent / "results"
NO_TIME = "no time was left; call this section alone, or give a larger budget"
NOTES = (
    "weights are random: times are real, quality is not measured",
    "relative_error is meaningful for schedule 'fine' and for compiled diffusers only",
    "the choices of schedule 'dynamic' and the hits of first_block_cache are arbitrary",
)

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections and merges their records into the file."""
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="ddit_rt-") as scratch:
        setup = setup_from(args, Path(scratch))
        report = opened(args.out, header(args.preset, setup))
        for section in args.sections:
            for key, run in jobs(section, setup, args):
                print(f"{section} {key}", file=sys.stderr, flush=True)
                record, problem = attempt(run) if setup.deadline.left > 0 else (None, NO_TIME)
                merge(report, section, key, stamped(record or {"error": problem}, args))
                write(args.out, report)
    if args.out.resolve() == RESULTS / "flux_cuda.json":
        update_readme("flux_cuda", report)
    print(f"wrote {args.out}", file=sys.stderr)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings, with those that depend on device and preset filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: flux-dev on CUDA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--height", type=int, nargs="+", help="picture heights in pixels")
    parser.add_argument("--width", type=int, nargs="+", help="one for each height; default: square")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--contenders", nargs="+", default=["*"], help="patterns of names in loops")
    parser.add_argument("--executors", nargs="+", choices=("auto", "loop", "step", "host"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget-s", type=float, default=480.0, help="no new repeat after this")
    parser.add_argument("--warm-up-limit-s", type=float, default=300.0, help="of one contender")
    parser.add_argument("--backend", choices=("aot", "eager"), default="aot")
    parser.add_argument("--artifact", type=Path, help="loaded if it exists, else compiled to it")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    cuda = torch.device(args.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error(f"got --device {args.device}, but torch sees no CUDA device")
    args.preset = args.preset or ("flux-dev" if cuda else "small")
    preset = PRESETS[args.preset]
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.height = args.height or list(preset.sizes)
    args.width = args.width or args.height
    if len(args.width) != len(args.height):
        parser.error(f"got {len(args.height)} heights and {len(args.width)} widths")
    args.batch = args.batch or list(preset.batches)
    args.steps = args.steps or list(preset.steps)
    args.executors = args.executors or (["loop", "step", "host"] if cuda else ["auto"])
    args.out = args.out or RESULTS / f"flux_{torch.device(args.device).type}.json"
    return args


def setup_from(args: argparse.Namespace, scratch: Path) -> Setup:
    """What all sections share; nothing is built yet."""
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    return Setup(
        preset=PRESETS[args.preset],
        device=device,
        dtype=getattr(torch, args.dtype),
        artifact=args.artifact or scratch / "flux.ddit",
        backend=args.backend,
        repeats=args.repeats,
        deadline=Deadline(args.budget_s),
        warm_up_limit=args.warm_up_limit_s,
        executors=tuple(args.executors),
    )


def jobs(
    section: str, setup: Setup, args: argparse.Namespace
) -> list[tuple[str, Callable[[], Record]]]:
    """Key and call of every record of a section.

    Loops run at every number of steps; the others at the first, on which they hardly depend. To
    compile is the same for all cases, so the first stands for them; the overhead of a step does not
    grow with the batch, so the first batch size stands for it.
    """
    sizes = list(zip(args.height, args.width, strict=True))
    cases = [
        Case(height=height, width=width, batch=batch, steps=steps)
        for height, width in (sizes[:1] if section == "compile" else sizes)
        for batch in (args.batch[:1] if section in ("compile", "overhead") else args.batch)
        for steps in (args.steps if section == "loops" else args.steps[:1])
    ]
    calls: Mapping[str, Callable[[Case], Record]] = {
        "buckets": lambda case: buckets(setup, case),
        "loops": lambda case: loops(setup, case, args.contenders),
        "memory": lambda case: memory(setup, case),
        "compile": lambda case: compiling(setup, case),
        "overhead": lambda case: overhead(setup, case),
    }
    keyed = section in ("loops", "overhead", "compile")
    return [
        (case.key if keyed else case.size_key, lambda case=case: calls[section](case))  # type: ignore[misc]
        for case in cases
    ]


def header(preset: str, setup: Setup) -> Record:
    """All but the sections."""
    transformer = setup.pipeline.transformer
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine_entry(setup.device),
        "versions": versions(),
        "model": {
            "preset": preset,
            **model_entry("FLUX, random weights", transformer),
            "weight_bytes": sum(parameter.nbytes for parameter in transformer.parameters()),
            "text_tokens": setup.preset.text_tokens,
            "config": dict(setup.preset.config),
        },
        "notes": list(NOTES),
    }


def opened(path: Path, head: Record) -> Record:
    """The report to add to: the one in the file, if there is one.

    Raises:
        ValueError: It is of another machine, model or version.
    """
    if not path.exists():
        return {**head, "sections": {}}
    report: Record = json.loads(path.read_text(encoding="utf-8"))
    stored = identity(report)
    for name, ours in identity(head).items():
        if stored.get(name) != ours:
            raise ValueError(
                f"{path} holds results with {name} {stored.get(name)}, and this run has {ours}; "
                "they do not belong in one file: give another --out, or remove it"
            )
    return {**report, **head}


def identity(report: Record) -> Record:
    """What must agree for results to stand beside each other, as it reads from a file."""
    values = {
        "schema_version": report["schema_version"],
        "device": device_name(report["machine"]),
        **report["versions"],
        **report["model"],
    }
    plain: Record = json.loads(json.dumps(values))
    return plain


def merge(report: Record, section: str, key: str, record: Record) -> None:
    """Puts a record into its place.

    Rows of an earlier call that this one did not run stay, and so does what was measured before and
    failed now, with `latest_error` beside it.
    """
    records = report["sections"].setdefault(section, {})
    before = records.get(key, {})
    merged = kept(before, record)
    rows = dict(before.get("rows", {}))
    for name, row in record.get("rows", {}).items():
        rows[name] = kept(rows.get(name, {}), row)
    records[key] = {**merged, **({"rows": rows} if rows else {})}


def kept(before: Record, now: Record) -> Record:
    """What was measured before where it failed now, else what it is now."""
    if "error" in now and before and "error" not in before:
        return {**before, "latest_error": now["error"]}
    return now


def stamped(record: Record, args: argparse.Namespace) -> Record:
    """The record with the circumstances of its call."""
    return {
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "repeats": args.repeats,
        "warm_up_calls": 2,
        **record,
    }


def write(path: Path, report: Record) -> None:
    """Replaces the file, whole or not at all: the command may be killed at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    text = json.dumps(report, indent=1, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
