"""Compares ddit_rt with diffusers on the embedded demo model, on a CPU, in one run.

    python benchmarks/bench_cpu.py [--quick] [--out benchmarks/results/cpu_demo.json]
    python benchmarks/bench_cpu.py --quantization int8        -> cpu_demo_int8.json

All methods generate the same prompts with the same seeds, threads, dtype and step count, at
batch 1 and 4, taking turns image by image so that machine drift hits all alike; a warm-up of
each is left out. `ddit_rt.lab.measure.timing` says what the denoising loop and the whole call
include. Fidelity is against our full-resolution images at the full step count. Writes the JSON, and
the table of docs/benchmarks.md from it. With `--quantization` the plans of a quantised model stand
beside those of the plain one, and the peers are left out.

Schema, version 1: `machine`, `versions`, `model`, `settings`, `compile` as in the demo's report;
`batches`: by batch size a list of entries `name`, `label`, `seconds_denoise` and `seconds` (per
image: `median`, `min`, `max` over the repeats), `speedup_denoise` and `speedup_end_to_end` over
the first entry, `tokens` (per image; null for diffusers), `psnr`, `ssim`, `psnr_per_prompt`,
`ssim_per_prompt`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo_methods import all_images, all_methods, quantised_methods, with_own_transformer
from diffusers import FluxPipeline
from records import RESULTS, head, parser_of, publish
from timing import extremes
from tqdm.auto import tqdm

from ddit_rt.lab.demo import model_path
from ddit_rt.lab.demo.plans import DEMO_POLICY
from ddit_rt.lab.demo.prompts import DEMO_PROMPTS
from ddit_rt.lab.demo.run import DemoConfig, prepare_engine
from ddit_rt.lab.measure.fidelity import fidelity
from ddit_rt.lab.measure.report import model_entry
from ddit_rt.lab.measure.timing import Batch, Method, Sample, measure

RESULT = RESULTS / "cpu_demo.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    args = parse(argv)
    prompts = DEMO_PROMPTS[: args.prompts]
    config = DemoConfig(
        out=args.out.parent, steps=args.steps, repeats=args.repeats, prompts=prompts
    )
    pipeline = FluxPipeline.from_pretrained(model_path())
    pipeline.set_progress_bar_config(disable=True)
    how = {**config.size(), "patch_policy": DEMO_POLICY}
    with tempfile.TemporaryDirectory(prefix="ddit_rt-") as folder:
        path = Path(folder) / "demo.ddit"
        engine, compiling = prepare_engine(pipeline, path, **how)
        quantised = None
        if args.quantization is not None:
            path = path.with_name("quantised.ddit")
            own = with_own_transformer(pipeline)
            quantised, entry = prepare_engine(own, path, **how, quantization=args.quantization)
            compiling |= {f"quantised_{name}": value for name, value in entry.items()}
        results = {
            str(size): run_batch_size(engine, quantised, size, config) for size in args.batches
        }
    settings = {
        "steps": config.steps,
        **config.call(),
        "seed": config.seed,
        "repeats": config.repeats,
        "prompts": list(config.prompts),
        "quantization": args.quantization,
    }
    model = model_entry("demo", pipeline.transformer)
    publish(args.out, head(model=model, settings=settings, compile=compiling, batches=results))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings; `--quick` is a smoke run whose figures mean nothing."""
    parser = parser_of(__doc__)
    parser.add_argument("--quantization", choices=("int8", "fp8"), help="of the blocks")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=len(DEMO_PROMPTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--quick", action="store_true", help="4 steps, 2 prompts, 1 repeat")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.repeats, args.prompts, args.batches = 4, 1, 2, [1, 2]
    if args.out is None:
        parts = [RESULT.stem, *[args.quantization] * bool(args.quantization)]
        args.out = RESULT.with_name("_".join([*parts, *["quick"] * args.quick]) + ".json")
    return args


def run_batch_size(
    engine: Any, quantised: Any, size: int, config: DemoConfig
) -> list[dict[str, Any]]:
    """Measures every method at one batch size; `quantised` is the other engine, or None."""
    seeds = tuple(range(config.seed, config.seed + len(config.prompts)))  # at any batch size
    batches = [
        Batch(prompts=config.prompts[start : start + size], seeds=seeds[start : start + size])
        for start in range(0, len(seeds), size)
    ]
    arguments = {"num_inference_steps": config.steps, **config.call()}
    methods = (
        all_methods(engine, batches, arguments)
        if quantised is None
        else quantised_methods(engine, quantised, arguments)
    )
    total = len(methods) * (1 + config.repeats * len(batches))
    with tqdm(total=total, desc=f"batch {size}", leave=False) as bar:
        samples = measure(methods, batches, repeats=config.repeats, advance=bar.update)
    return entries(methods, samples)


def entries(
    methods: Sequence[Method], samples: Mapping[str, Sequence[Sample]]
) -> list[dict[str, Any]]:
    """One entry per method; speed-ups are over the first."""
    rows = [entry(method, samples) for method in methods]
    for row in rows:
        for speedup, seconds in (
            ("speedup_denoise", "seconds_denoise"),
            ("speedup_end_to_end", "seconds"),
        ):
            row[speedup] = rows[0][seconds]["median"] / row[seconds]["median"]
    return rows


def entry(method: Method, samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """What was measured of one method."""
    own = samples[method.name]
    fidelities = fidelity(all_images(own), all_images(samples["fine"]))
    traces = [(sample.trace, len(sample.outputs)) for sample in own]
    tokens = sum(trace.tokens * count for trace, count in traces if trace is not None)
    return {
        "name": method.name,
        "label": method.label,
        "seconds_denoise": per_image([sample.denoise for sample in own], len(fidelities.ssim)),
        "seconds": per_image([sample.end_to_end for sample in own], len(fidelities.ssim)),
        "tokens": tokens / len(fidelities.ssim) if tokens else None,
        "psnr": fidelities.mean_psnr,
        "ssim": fidelities.mean_ssim,
        "psnr_per_prompt": list(fidelities.psnr),
        "ssim_per_prompt": list(fidelities.ssim),
    }


def per_image(times: Sequence[Sequence[float]], images: int) -> dict[str, float]:
    """Seconds per image, over the repeats; `times` has those of each batch."""
    return extremes([sum(repeat) / images for repeat in zip(*times, strict=True)])


if __name__ == "__main__":
    sys.exit(main())
