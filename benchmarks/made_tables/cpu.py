"""Tables of docs/benchmarks.md and README.md from records made on a CPU."""

from __future__ import annotations

from made_tables.markdown import (
    Report,
    block,
    cpu,
    header,
    label,
    line,
    ranged,
    released,
    times,
)

_SHORT = ("diffusers", "torch_compile", "first_block_cache_best", "fine", "dynamic", "fewer_steps")
"""Rows of README.md."""

_MODELS = {"demo": "image", "demo-video": "video, guided"}


def cpu_short(report: Report) -> str:
    """The table of README.md: what a reader wants to know first, of the same record."""
    first, *_ = report["batches"].values()
    by_name = {row["name"]: row for row in first}
    rows = [
        line(
            (
                label(row),
                _tokens(row),
                f"{row['seconds_denoise']['median'] * 1e3:.0f}",
                times(row["speedup_denoise"]),
                f"{row['ssim']:.3f}",
            )
        )
        for row in (by_name[name] for name in _SHORT if name in by_name)
    ]
    table = [*header(("", "tokens", "loop, ms", "speed-up", "SSIM")), *rows]
    return block(table, [f"{cpu(report)}, {released(report, 'torch')}."])


def cpu_demo(report: Report) -> str:
    """The table of `bench_cpu.py`: batch 1, and the speed-up at the largest batch beside it."""
    first, *others = report["batches"]
    last = others[-1] if others else first
    large = {row["name"]: row for row in report["batches"][last]}
    columns = ["", "tokens", "loop, ms (min to max)", "speed-up", "whole call"]
    columns += [f"loop, batch {last}", "PSNR, dB", "SSIM"]
    rows = [_demo_row(row, large[row["name"]]) for row in report["batches"][first]]
    settings = report["settings"]
    note = (
        f"{cpu(report)}; {released(report, 'torch', 'diffusers')}; {len(settings['prompts'])} "
        f"prompts, {settings['repeats']} interleaved repeats; medians per image. Speed-ups are "
        "over the first row: of the denoising loop, of the whole call, and of the loop at the "
        "larger batch."
    )
    return block([*header(columns), *rows], [note])


def _demo_row(row: Report, large: Report) -> str:
    return line(
        (
            label(row),
            _tokens(row),
            ranged(row["seconds_denoise"], 1e3),
            times(row["speedup_denoise"]),
            times(row["speedup_end_to_end"]),
            times(large["speedup_denoise"]),
            "same" if row["psnr"] is None else f"{row['psnr']:.1f}",
            f"{row['ssim']:.3f}",
        )
    )


def _tokens(row: Report) -> str:
    return "" if row["tokens"] is None else f"{row['tokens']:.0f}"


def ops_cpu(report: Report) -> str:
    """The table of `bench_ops.py`: batch 1 on one thread, best times of many calls."""
    rows = []
    for row in report["results"]:
        if row["batch"] == 1 and row["threads"] == 1:
            best = {name: timing["best_us"] for name, timing in row["timings"].items()}
            native = best["native"]
            cells = [row["op"], f"{native:.0f}"]
            cells += [
                f"{best[name] / native:.1f}x" if name in best else ""
                for name in ("eager", "compile")
            ]
            rows.append(line([*cells, f"{native / best['copy']:.1f}x" if "copy" in best else ""]))
    machine = report["machine"]
    note = f"{machine['cpu']}, one thread; torch {machine['torch']}; best of many calls, CPU time."
    columns = ("op", "native, us", "over eager", "over torch.compile", "of a copy")
    return block([*header(columns), *rows], [note])


def drivers_cpu(report: Report) -> str:
    """The table of `bench_drivers.py`: a step of each driver, and their ratio."""
    columns = ("model", "plan", "table-driven", "passes apart", "pipeline-driven", "diffusers")
    rows = [
        line(
            (
                _MODELS.get(run["model"], run["model"]),
                "full resolution" if run["plan"] == "fine" else run["plan"],
                *(
                    f"{run['microseconds'][name]['median'] * 1e-3:.1f}"
                    if name in run["microseconds"]
                    else ""
                    for name in ("table", "table_apart", "pipeline", "diffusers")
                ),
                times(run["ratio"]),
            )
        )
        for run in report["runs"]
    ]
    note = (
        f"Milliseconds a step, {report['runs'][0]['steps']} steps, text encoders included, no VAE; "
        f"medians of interleaved rounds; {cpu(report)}; {released(report, 'torch', 'diffusers')}. "
        "`ratio`: pipeline-driven over table-driven. The final latents of the two differ by at "
        f"most {max(run['relative_error'] for run in report['runs']):.0e} of the largest value."
    )
    return block([*header((*columns, "ratio"), "--"), *rows], [note])


def overhead_cpu(report: Report) -> str:
    """The table of `bench_overhead.py`: a step without a model, and the look at the live model."""
    rows = [
        line(
            (
                " x ".join(map(str, entry["latent_shape"])),
                *(
                    f"{entry['microseconds'][name]['median']:.0f}"
                    for name in ("dynamic", "fine", "diffusers")
                ),
                f"{entry['loop']:.0f}",
            )
        )
        for entry in report["steps"]
    ]
    columns = ("latent", "dynamic", "full resolution", "diffusers", "of dynamic, beside its ops")
    note = (
        f"Microseconds a step with a model that does nothing; {cpu(report)}, "
        f"{released(report, 'torch')}; medians of interleaved rounds."
    )
    if "look" in report:
        look = report["look"]
        note += (
            " Before each run the engine looks at the live model: "
            f"{look['milliseconds']['median']:.1f} ms for one of {look['blocks']} blocks "
            f"({look['modules']} modules, one thread)."
        )
    return block([*header(columns), *rows], [note])
