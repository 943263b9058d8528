"""Times FLUX.1-dev or Wan 2.1 1.3B at real size with random weights on a GPU, or small on a CPU.

    python benchmarks/bench_real_size.py --model flux|wan [--sections buckets ...] [--out FILE]

Each section fits into some minutes when it is called alone, with one size at a time where need be;
results of earlier calls in `--out` are kept, so several calls fill one file. Within `loops`,
`--methods 'ddit_rt_loop_*' 'compile_regional'` runs a part of them, always beside diffusers
eager: ratios are only ever taken within one call. Repeats stop early at `--budget-s`. A method
that fails leaves its error in the record, and the others go on.

Weights are random (`real_models.py`), so speed is real and quality is not: the distance to
diffusers eager says that the same thing was computed where all steps run at p, and nothing for
other plans; what DDiTPolicy chooses is as arbitrary as the weights are. Only the time of a run with
those choices means something, beside the choices, which stand in its row.

All methods make the same call of the same pipeline class, without text encoders and VAE, Wan's
always guided. Seconds are of that call: on CUDA between two events, with the wall time beside it;
two calls warm up. On CUDA a step's time is by the device's clock. With `--quantization` the model
is quantised in place, for all methods; floors stay those of its dtype.

The record has `sections`, in each a record by case (`1024x1024/batch1`, of loops and compile
`.../steps28`, of videos `480x832x81/batch1`), mostly of `rows`:

- `buckets`: one step by patch size and, of images, `skip` (decision and update, no model), over the
  floor that the machine's `rates` set; with guidance both passes as one batch.
- `loops`: whole loops by method. `counted_speedup` is by operations, a step that reuses counting as
  none; `computed_sizes` are of the steps that did not reuse.
- `blocks`: one compiled block of each class beside the same run by torch.
- `kernels`: kernels of a step (on a CPU torch's operators) in a profile of a run that the host
  drives, by time; and what the host called in a run as it is otherwise.
- `compile`: what it takes with empty caches, from the compile to the second run.

Whatever failed is `{"error": text}` in place of its record or row, or `latest_error` beside what an
earlier call measured. `backend` is `lowered` where the packages were made without a GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from real_loops import loops
from real_models import MODELS, Case
from real_sections import blocks, buckets, compiling, kernels
from real_setup import Setup
from records import RESULTS, Record, Save, fill, head, machine_entry, opened, parser_of, publish

from ddit_rt.lab.measure.report import model_entry

SECTIONS: dict[str, Callable[[Setup, Case, Save], Record]] = {
    "buckets": buckets,
    "loops": loops,
    "compile": compiling,
    "blocks": blocks,
    "kernels": kernels,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections and merges their records into the file."""
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="ddit_rt-") as scratch:
        setup = Setup(args, Path(scratch))
        report = opened(args.out, header(args, setup))
        for section in args.sections:
            for key, case in cases(section, args):
                print(f"{section} {key}", file=sys.stderr, flush=True)
                run = partial(SECTIONS[section], setup, case)
                fill(report, section, key, run, setup.deadline, args)
    publish(args.out, report)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings, with those that depend on device and preset filled in."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", choices=list(MODELS), required=True)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--preset", help="default: the model's real size on CUDA, else small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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
    parser.add_argument("--height", type=int, nargs="+", help="of square images, in pixels")
    parser.add_argument("--videos", nargs="+", metavar="HxWxF", help="sizes, such as 480x832x81")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--steps", type=int, nargs="+")
    args = parser.parse_args(argv)
    complete(parser, args)
    return args


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in what depends on the device and the preset; `parser` reports errors."""
    model, kind = MODELS[args.model], torch.device(args.device).type
    cuda = kind == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error(f"got --device {args.device}, but torch sees no CUDA device")
    args.preset = args.preset or (model.full if cuda else "small")
    if args.preset not in model.presets:
        parser.error(f"got --preset {args.preset}; {args.model} has {list(model.presets)}")
    args.dtype = torch.bfloat16 if cuda else torch.float32
    args.executors = args.executors or (["loop", "step", "host"] if cuda else ["auto"])
    args.out = args.out or RESULTS / f"{args.model}_{kind}.json"
    preset = model.presets[args.preset]
    args.sizes = list(preset.sizes)
    if args.height:
        args.sizes = [(height, height, 0) for height in args.height]
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


def header(args: argparse.Namespace, setup: Setup) -> Record:
    """All but the sections."""
    transformer = setup.pipeline.transformer
    model = {
        "preset": args.preset,
        "quantization": args.quantization,
        **model_entry(f"{setup.model.title}, random weights", transformer),
        "weight_bytes": sum(parameter.nbytes for parameter in transformer.parameters()),
        "text_tokens": setup.preset.text_tokens,
        "config": dict(setup.preset.config),
    }
    return head(machine=machine_entry(setup.device), model=model, notes=list(setup.model.notes))


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
