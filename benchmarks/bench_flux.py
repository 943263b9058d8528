"""Times FLUX.1-dev at its real size with random weights on a GPU, or a small FLUX on a CPU.

    python benchmarks/bench_flux.py [--sections buckets loops kernels ...] [--out FILE]

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
    `weight_bytes` or `moved_bytes`, `floor_seconds`, `bound`, `over_floor`, `ran_on`, `notes`,
    `first_call_seconds`, `provisional` (only the call that warmed it up was timed); `engine`: what
    compiling or loading took.
  - `loops`: `flops_per_step`; `rows` by contender: `label`, `schedule` (`fine`; `paper_...`, see
    `flux_plans.py`; `mixed` = 4p:0.2,2p:0.4,p; `dynamic` = DDiTPolicy()), `executor`, `seconds`,
    `wall_seconds`, `first_call_seconds` (compilers' caches may be warm), `baseline_seconds`
    (diffusers eager in the same call), `speedup` (over it), `counted_speedup` (by operations; a
    step that reuses counts as none), `relative_error` (of the final latents), `finite`, and for
    ours `ran_on`, `patch_sizes` and `computed_sizes` (number of all steps, and of those that did
    not reuse, by patch size), `reused_share` of the steps, `tokens`, `notes`, `late_captures`; for
    a cache of diffusers `computed_steps` and `reused_share`.
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
  - `kernels`: rows `p`, `4p`: `kernels`, of a step in a profile of a run that the host drives, by
    time (`name`, `count`, `seconds` a step, `share` of all of them; on a CPU torch's operators,
    without those that they call), `kernel_seconds`, `kernel_count`; `nodes` of each captured graph;
    and of a run as it is otherwise, on CUDA, `ran_on` and the counts of `overhead`.
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

from flux_buckets import buckets
from flux_costs import compiling, memory
from flux_kernels import kernels
from flux_loops import loops
from flux_model import PRESETS, Case
from flux_overhead import overhead
from flux_setup import Setup
from real_size import RESULTS, complete, header, parser_of, settings
from records import Record, Save, fill, opened
from tables import update_tables

SECTIONS = ("buckets", "loops", "memory", "compile", "overhead", "kernels")
NOTES = (
    "weights are random: times are real, quality is not measured",
    "relative_error is meaningful for schedule 'fine' and for compiled diffusers only",
    "the choices of schedule 'dynamic' and the hits of first_block_cache are arbitrary",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections and merges their records into the file."""
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="ddit_rt-") as scratch:
        setup = Setup(
            preset=PRESETS[args.preset],
            artifact=args.artifact or Path(scratch) / "flux.ddit",
            **settings(args),
        )
        report = opened(args.out, header(args.preset, "FLUX", setup, NOTES))
        for section in args.sections:
            for key, run in jobs(section, setup, args):
                print(f"{section} {key}", file=sys.stderr, flush=True)
                fill(report, section, key, run, setup.deadline, args)
    if args.out.resolve() == RESULTS / "flux_cuda.json":
        update_tables("flux_cuda", report)
    print(f"wrote {args.out}", file=sys.stderr)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings, with those that depend on device and preset filled in."""
    parser = parser_of(__doc__ or "", SECTIONS, sorted(PRESETS), "flux-dev")
    parser.add_argument("--height", type=int, nargs="+", help="picture heights in pixels")
    parser.add_argument("--width", type=int, nargs="+", help="one for each height; default: square")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--steps", type=int, nargs="+")
    args = parser.parse_args(argv)
    complete(parser, args, "flux")
    preset = PRESETS[args.preset]
    args.height = args.height or list(preset.sizes)
    args.width = args.width or args.height
    if len(args.width) != len(args.height):
        parser.error(f"got {len(args.height)} heights and {len(args.width)} widths")
    args.batch = args.batch or list(preset.batches)
    args.steps = args.steps or list(preset.steps)
    return args


def jobs(
    section: str, setup: Setup, args: argparse.Namespace
) -> list[tuple[str, Callable[[Save], Record]]]:
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
    calls: Mapping[str, Callable[[Case, Save], Record]] = {
        "buckets": lambda case, save: buckets(setup, case, save),
        "loops": lambda case, save: loops(setup, case, args.contenders, save),
        "memory": lambda case, _: memory(setup, case),
        "compile": lambda case, _: compiling(setup, case),
        "overhead": lambda case, _: overhead(setup, case),
        "kernels": lambda case, _: kernels(setup, case),
    }
    keyed = section in ("loops", "overhead", "compile")
    return [(case.key if keyed else case.size_key, partial(calls[section], case)) for case in cases]


if __name__ == "__main__":
    sys.exit(main())
