"""Times FLUX.1-dev or Wan 2.1 1.3B at real size with random weights on a GPU, or small on a CPU.

    python benchmarks/bench_real_size.py --model flux|wan [--sections buckets ...] [--out FILE]

Each section fits into some minutes when it is called alone, with one size at a time where need be;
results of earlier calls in `--out` are kept, so several calls fill one file. Within `loops`,
`--methods 'ddit_rt_loop_*' 'compile_regional'` runs a part of them, always beside diffusers
eager: ratios are only ever taken within one call. Repeats stop early at `--budget-s`. A method
that fails leaves its error in the record, and the others go on.

Weights are random (`real_models.py`), so speed is real and quality is not: the distance to
diffusers eager says that the same thing was computed where all steps run at p, and nothing for
other plans; what DDiTPolicy chooses, and when a cache of diffusers hits, is as arbitrary as the
weights are. Only the time of a run with those choices means something, beside the choices, which
stand in its row.

All methods make the same call of the same pipeline class, without text encoders and VAE, Wan's
always guided. Seconds are of that call: on CUDA between two events, with the wall time beside it;
two calls warm up. On CUDA a step's time is by the device's clock.

With `--quantization` the model is quantised in place, for all methods; floors stay those of its
dtype.

Schema, version 1. `spread` is `median`, `min`, `max`, `lower_quartile`, `upper_quartile`, `count`.

- `schema_version`; `machine`, `versions`; `model` (`preset`, `quantization`, `config`,
  `parameters`, `dtype`, `weight_bytes`, `text_tokens`); `notes`: what the figures do not mean.
- `sections`: by section, by case (`1024x1024/batch1`, for loops and compile `.../steps28`; of
  videos `480x832x81/batch1`), a record with `measured_at`, `repeats`, `warm_up_calls` and:
  - `buckets`: `rates` (matrix product and copy, measured in the same call); `backend` (`eager`:
    our engine with blocks as torch runs them; `lowered`: with packages made where there was no
    GPU); `rows` by `p`, `2p`, `4p` as far as the latent offers them, and of images `skip`
    (decision and update, no model): `seconds` (spread over steps, with guidance both passes as one
    batch), `flops`, `weight_bytes` or `moved_bytes`, `floor_seconds`, `bound`, `over_floor`,
    `ran_on`, `notes`, `first_call_seconds`, `provisional` (only the call that warmed it up was
    timed); `engine`: what compiling or loading took.
  - `loops`: `backend`; `flops_per_step`; `rows` by method: `label`, `schedule` (`fine`;
    `paper_...`, see `real_plans.py`; `mixed` = 4p:0.2,2p:0.4,p; `dynamic` = DDiTPolicy();
    `...+teacache`: with every other step reusing, where its size is that of the step before),
    `executor`, `seconds`, `wall_seconds`, `first_call_seconds` (compilers' caches may be warm),
    `baseline_seconds` (diffusers eager in the same call), `speedup` (over it), `counted_speedup`
    (by operations; a step that reuses counts as none), `relative_error` (of the final latents),
    `finite`, and for ours `ran_on`, `patch_sizes` and `computed_sizes` (number of all steps, and of
    those that did not reuse, by patch size), `reused_share` of the steps, `tokens`, `notes`,
    `late_captures`; for a cache of diffusers `computed_steps` and `reused_share`.
  - `memory`: `weight_bytes`; `diffusers_eager` and `ddit_rt`: `peak_bytes` (of tensors; on a CPU of
    the resident set), `used_bytes` (of the device); `growth_by_load_bytes`, `growth_by_runs_bytes`,
    `captures`; `ratio_of_peak_bytes`, `ratio_of_used_bytes`; `state`: what the engine keeps beside
    the model, see `ddit_rt.engine.memory`.
  - `compile`: `compile_seconds` with empty caches, `artifact_bytes`, `load_seconds`,
    `first_run_seconds`, `load_to_first_image_seconds` (weights in memory, no VAE),
    `second_run_seconds`, `captures` (capture, instantiation, upload, memory, graph nodes).
  - `blocks`: rows by class and patch size, such as `FluxTransformerBlock 2p`: `seconds` of one
    compiled block, `torch_seconds` of the same run by torch, `speedup`, `relative_error` of its
    outputs, and on CUDA `kernels` (`name`, `count`, `seconds`).
  - `kernels`: rows `p`, `4p`: `kernels`, of a step in a profile of a run that the host drives, by
    time (`name`, `count`, `seconds` a step, `share` of all of them; on a CPU torch's operators,
    without those that they call), `kernel_seconds`, `kernel_count`; `nodes` of each captured graph;
    and of a run as it is otherwise, on CUDA, `ran_on` and counts of what the host called:
    `host_calls`, `host_calls_during_work` (between the first and the last kernel),
    `host_calls_in_loop`.
- Whatever failed is `{"error": text}` in place of its record or row, or `latest_error` beside what
  an earlier call measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from hardware import machine_entry
from real_blocks import blocks
from real_costs import compiling, memory
from real_kernels import kernels
from real_loops import loops
from real_models import MODELS, Case
from real_setup import Setup
from real_steps import buckets
from records import RESULTS, Record, Save, fill, opened, publish
from timing import Deadline

from ddit_rt.lab.measure.report import model_entry, versions

SECTIONS: Mapping[str, Callable[[Setup, Case, argparse.Namespace, Save], Record]] = {
    "buckets": lambda setup, case, _, save: buckets(setup, case, save),
    "loops": lambda setup, case, args, save: loops(setup, case, args.methods, save),
    "memory": lambda setup, case, _, __: memory(setup, case),
    "compile": lambda setup, case, _, __: compiling(setup, case),
    "blocks": lambda setup, case, _, save: blocks(setup, case, save),
    "kernels": lambda setup, case, _, __: kernels(setup, case),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections and merges their records into the file."""
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="ddit_rt-") as scratch:
        setup = setup_of(args, Path(scratch))
        report = opened(args.out, header(args, setup))
        for section in args.sections:
            for key, case in cases(section, args):
                print(f"{section} {key}", file=sys.stderr, flush=True)
                run = partial(SECTIONS[section], setup, case, args)
                fill(report, section, key, run, setup.deadline, args)
    publish(args.out, report)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings, with those that depend on device and preset filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), required=True)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--preset", help="default: the model's real size on CUDA, else small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--methods", nargs="+", default=["*"], help="patterns of names in loops")
    parser.add_argument("--executors", nargs="+", choices=("auto", "loop", "step", "host"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget-s", type=float, default=480.0, help="no new repeat after this")
    parser.add_argument("--warm-up-limit-s", type=float, default=300.0, help="of one method")
    parser.add_argument("--backend", choices=("aot", "eager"), default="aot")
    parser.add_argument(
        "--quantization", choices=("fp8", "int8"), help="of the blocks, see compile"
    )
    parser.add_argument("--lowered", type=Path, help="packages that bench_lowering.py --keep kept")
    parser.add_argument("--artifact", type=Path, help="loaded if it exists, else compiled to it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--height", type=int, nargs="+", help="image heights in pixels")
    parser.add_argument("--width", type=int, nargs="+", help="one for each height; default: square")
    parser.add_argument("--videos", nargs="+", metavar="HxWxF", help="sizes, such as 480x832x81")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--quick", action="store_true", help="the tiny model, eager, on the CPU")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(preset="tiny", backend="eager", repeats=1, device="cpu")
        args.out = args.out or RESULTS / f"{args.model}_quick.json"
    complete(parser, args)
    return args


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in what depends on the device and the preset.

    Args:
        parser: For errors.
        args: What it parsed; changed.
    """
    model, kind = MODELS[args.model], torch.device(args.device).type
    cuda = kind == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error(f"got --device {args.device}, but torch sees no CUDA device")
    args.preset = args.preset or (model.full if cuda else "small")
    if args.preset not in model.presets:
        parser.error(f"got --preset {args.preset}; {args.model} has {list(model.presets)}")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.executors = args.executors or (["loop", "step", "host"] if cuda else ["auto"])
    args.out = args.out or RESULTS / f"{args.model}_{kind}.json"
    preset = model.presets[args.preset]
    args.sizes = list(preset.sizes)
    if args.height:
        widths = args.width or args.height
        if len(widths) != len(args.height):
            parser.error(f"got {len(args.height)} heights and {len(widths)} widths")
        args.sizes = [(height, width, 0) for height, width in zip(args.height, widths, strict=True)]
    if args.videos:
        args.sizes = [video_size(text) for text in args.videos]
    args.batch = args.batch or list(preset.batches)
    args.steps = args.steps or list(preset.steps)


def video_size(text: str) -> tuple[int, int, int]:
    """`"480x832x81"` as numbers.

    Raises:
        ValueError: It cannot be read.
    """
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise ValueError(f"got the size {text!r}; write height x width x frames, as 480x832x81")
    height, width, frames = map(int, parts)
    return height, width, frames


def setup_of(args: argparse.Namespace, scratch: Path) -> Setup:
    """What the sections work with."""
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    model = MODELS[args.model]
    return Setup(
        model=model,
        preset=model.presets[args.preset],
        device=device,
        dtype=getattr(torch, args.dtype),
        artifact=args.artifact or scratch / "model.ddit",
        backend=args.backend,
        quantization=args.quantization,
        lowered=args.lowered,
        repeats=args.repeats,
        deadline=Deadline(args.budget_s),
        warm_up_limit=args.warm_up_limit_s,
        executors=tuple(args.executors),
    )


def header(args: argparse.Namespace, setup: Setup) -> Record:
    """All but the sections."""
    transformer = setup.pipeline.transformer
    return {
        "schema_version": 1,
        "machine": machine_entry(setup.device),
        "versions": versions(),
        "model": {
            "preset": args.preset,
            "quantization": args.quantization,
            **model_entry(f"{setup.model.title}, random weights", transformer),
            "weight_bytes": sum(parameter.nbytes for parameter in transformer.parameters()),
            "text_tokens": setup.preset.text_tokens,
            "config": dict(setup.preset.config),
        },
        "notes": list(setup.model.notes),
    }


def cases(section: str, args: argparse.Namespace) -> list[tuple[str, Case]]:
    """Key and case of every record of a section.

    Loops run at every number of steps; the others at the first, on which they hardly depend. To
    compile is the same for all cases, so the first stands for them.
    """
    once = section == "compile"
    found = [
        Case(height=height, width=width, num_frames=frames, batch=batch, steps=steps)
        for height, width, frames in (args.sizes[:1] if once else args.sizes)
        for batch in (args.batch[:1] if once else args.batch)
        for steps in (args.steps if section == "loops" else args.steps[:1])
    ]
    keyed = section in ("loops", "compile")
    return [(case.key if keyed else case.size_key, case) for case in found]


if __name__ == "__main__":
    sys.exit(main())
