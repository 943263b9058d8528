"""Tables of docs/benchmarks.md and README.md from records made on a CPU."""

from __future__ import annotations

from made_tables.markdown import Report, block, cpu, label, ranged, released, table, times

_SHORT = ("diffusers", "torch_compile", "first_block_cache_best", "fine", "dynamic", "fewer_steps")
"""Rows of README.md."""

_MODELS = {"demo": "image", "demo-video": "video, guided"}
_MEBI = 2**20
_GROWTH = {
    "rss_bytes": "resident memory, MiB",
    "live_bytes": "allocated from glibc, MiB",
    "objects": "objects that Python's collector knows",
    "blocks": "blocks of Python's allocator",
    "descriptors": "open file descriptors",
    "threads": "threads",
}
_WAYS = {"alone": "a run for each", "batched": "batched"}


def cpu_short(report: Report) -> str:
    """The table of README.md: what a reader wants to know first, of the same record."""
    first, *_ = report["batches"].values()
    by_name = {row["name"]: row for row in first}
    rows = [
        (
            label(row),
            _tokens(row),
            f"{row['seconds_denoise']['median'] * 1e3:.0f}",
            times(row["speedup_denoise"]),
            f"{row['ssim']:.3f}",
        )
        for row in (by_name[name] for name in _SHORT if name in by_name)
    ]
    shown = table(("", "tokens", "loop, ms", "speed-up", "SSIM"), rows)
    return block(shown, [f"{cpu(report)}, {released(report, 'torch')}."])


def cpu_demo(report: Report) -> str:
    """The table of `bench_cpu.py`: batch 1, and the speed-up at the largest batch beside it."""
    first, *others = report["batches"]
    large = {row["name"]: row for last in others[-1:] for row in report["batches"][last]}
    columns = ["", "tokens", "loop, ms (min to max)", "speed-up", "whole call"]
    columns += [*(f"loop, batch {last}" for last in others[-1:]), "PSNR, dB", "SSIM"]
    rows = [_demo_row(row, large.get(row["name"])) for row in report["batches"][first]]
    settings = report["settings"]
    ratios = "of the denoising loop, and of the whole call"
    if others:
        ratios = "of the denoising loop, of the whole call, and of the loop at the larger batch"
    note = (
        f"{cpu(report)}; {released(report, 'torch', 'diffusers')}; {len(settings['prompts'])} "
        f"prompts, {settings['repeats']} interleaved repeats; medians per image. Speed-ups are "
        f"over the first row: {ratios}."
    )
    return block(table(columns, rows), [note])


def _demo_row(row: Report, large: Report | None) -> tuple[str, ...]:
    return (
        label(row),
        _tokens(row),
        ranged(row["seconds_denoise"], 1e3),
        times(row["speedup_denoise"]),
        times(row["speedup_end_to_end"]),
        *(() if large is None else (times(large["speedup_denoise"]),)),
        "same" if row["psnr"] is None else f"{row['psnr']:.1f}",
        f"{row['ssim']:.3f}",
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
                for name in ("eager", "compile", "onednn")
            ]
            floor = row["floor_us"]
            rows.append([*cells, f"{native / floor:.1f}x" if floor else ""])
    machine = report["machine"]
    note = (
        f"{machine['cpu']}, one thread; torch {machine['torch']}; best of many calls, CPU time. "
        "Floor: a copy of the same bytes; of products, their operations at the rate of a product "
        "of 1024 x 1024 x 1024 by the faster of torch's libraries."
    )
    columns = (
        *("op", "native, us", "over eager", "over torch.compile", "over oneDNN"),
        "of its floor",
    )
    return block(table(columns, rows), [note])


def drivers_cpu(report: Report) -> str:
    """The table of `bench_drivers.py`: a step of each driver, and their ratio."""
    columns = ("model", "plan", "table-driven", "passes apart", "pipeline-driven", "diffusers")
    rows = [
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
        for run in report["runs"]
    ]
    note = (
        f"Milliseconds a step, {report['runs'][0]['steps']} steps, text encoders included, no VAE; "
        f"medians of interleaved rounds; {cpu(report)}; {released(report, 'torch', 'diffusers')}. "
        "`ratio`: pipeline-driven over table-driven. The final latents of the two differ by at "
        f"most {max(run['relative_error'] for run in report['runs']):.0e} of the largest value."
    )
    return block(table((*columns, "ratio"), rows, "--"), [note])


def overhead_cpu(report: Report) -> str:
    """The table of `bench_overhead.py`: a step without a model, and the look at the live model."""
    rows = [
        (
            " x ".join(map(str, entry["latent_shape"])),
            *(
                f"{entry['microseconds'][name]['median']:.0f}"
                for name in ("dynamic", "fine", "diffusers")
            ),
            f"{entry['loop']:.0f}",
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
    return block(table(columns, rows), [note])


def soak(report: Report) -> str:
    """What grew, how runs ended, and whether they can be made again."""
    rows = [_soak_row(name, report["growth"][name]) for name in _GROWTH]
    columns = ("", "after the warm-up", "at the end", "end over start", "trend")
    settings, drawn = report["settings"], report["drawn"]
    endings = "; ".join(f"{count} {how}" for how, count in sorted(report["endings"].items()))
    spots = report["spots"]
    equal = sum(spot["equal"] for spot in spots)
    styled = sum(any(spot["loras"].values()) for spot in spots)
    runs = (
        f"{settings['runs']} runs of seed {settings['seed']}, the first {settings['warm_up']} of "
        f"them to warm up: {endings}. Of those that are done {drawn['with LoRAs']} had LoRAs that "
        f"act, {drawn['guided']} were guided, and the pipeline's own loop drove "
        f"{drawn['pipeline-driven']}. Made again in fresh processes, {styled} with LoRAs among "
        f"them, {equal} of {len(spots)} were the same to the bit."
    )
    looks = (
        f"Medians of the first and the last fifth of the looks, one every {settings['cadence']} "
        "runs; `trend`: rise of the least-squares line from the first look to the last."
        f"{_latency(report)} {cpu(report)}; {released(report, 'torch', 'diffusers')}."
        f"{' ' * bool(report['notes'])}{report['notes']}"
    )
    return block(table(columns, rows), [runs], [looks])


def _soak_row(name: str, entry: Report) -> tuple[str, ...]:
    scale, digits = (_MEBI, 1) if name.endswith("_bytes") else (1, 0)
    counts = (f"{entry[end] / scale:.{digits}f}" for end in ("start", "end"))
    shares = (f"{entry[way]:+.2%}" for way in ("by_windows", "by_trend"))
    return (_GROWTH[name], *counts, *shares)


def _latency(report: Report) -> str:
    """The last quarter over the first, where runs of a kind were in both."""
    ratio, cpu_ratio = report["latency"]["ratio"], report["latency"]["cpu_ratio"]
    if ratio is None:
        return ""
    both = " and ".join(
        f"{one['median']:.2f}x (quartiles {one['lower_quartile']:.2f} to "
        f"{one['upper_quartile']:.2f}) in {what}"
        for one, what in ((ratio, "wall time"), (cpu_ratio, "CPU time"))
    )
    return (
        f" Runs of the last quarter after the warm-up took, over those of the first, {both}: "
        f"median over {ratio['count']} kinds of runs."
    )


def serving_cpu(report: Report) -> str:
    """What a request costs beside the engine's own call, and twice the load that can be borne."""
    rows = [_serving_row(way, report) for way in report["load"]]
    columns = ("", "engine", "encoded", "by HTTP", "offered, a second", "made", "refused")
    first = report["load"]["alone"]
    started, lora = report["start"], report["lora"]
    note = (
        "Milliseconds, p50 / p95: of calls one after the other (`engine`, the same and its "
        "image encoded, `by HTTP`), and of "
        f"answers with an image under load (`of images`). Load: {first['seconds'] / 60:.0f} min at "
        "twice the rate that the server reaches, a queue of eight; `refused` by 429 or 503. RSS: "
        "MiB after a warm-up by the same load, at most, and at the end. From the command to the "
        "first image: "
        f"{started['seconds']:.1f} s, of which importing the libraries alone takes "
        f"{started['import_seconds']:.1f} s. An image with a LoRA of {lora['layers']} layers: "
        f"{lora['first']:.0f} ms the first time ({lora['first_of_process']:.0f} ms where it is the "
        f"first LoRA of the process), {lora['next']:.0f} ms the next. "
        f"Demo model, {report['steps']} steps (4 of the calls one after the other), its dynamic "
        "policy; "
        f"{cpu(report)}; {released(report, 'torch', 'diffusers')}."
    )
    return block(table((*columns, "of images", "RSS"), rows), [note])


def _serving_row(way: str, report: Report) -> tuple[str, ...]:
    overhead, load = report["overhead"][way], report["load"][way]
    answers = load["answers"]
    refused = sum(answers[status]["count"] for status in ("429", "503") if status in answers)
    rss = load["rss_mib"]
    return (
        _WAYS[way],
        _both(overhead["engine"]),
        _both(overhead["encoded"]),
        _both(overhead["http"]),
        f"{load['offered_per_second']:.1f}",
        f"{load['images_per_second']:.1f}",
        f"{refused / load['seconds']:.1f}",
        _both(answers["200"]),
        f"{rss[0]:.0f} / {max(rss):.0f} / {rss[-1]:.0f}",
    )


def _both(found: Report) -> str:
    return f"{found['p50']:.0f} / {found['p95']:.0f}"
