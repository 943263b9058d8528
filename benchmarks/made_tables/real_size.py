"""Tables of docs/benchmarks.md from records with random weights, and from those made on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from made_tables.markdown import Report, block, cpu, ranged, released, table, times

_SHOWN_FORMS = (None, "loop", "auto")
_MEANS_SOMETHING = "fine"
_MOST_KERNELS = 10
_PRODUCTS = ("addmm_out", "mm_out", "bmm_out", "_scaled_mm_out")


def real_size(report: Report) -> str:
    """The tables of `bench_real_size.py`.

    Loops, steps against their floors, and what it takes.
    """
    sections = report["sections"]
    return block(
        _loops_table(_with_rows(sections.get("loops", {}))),
        _buckets_table(_with_rows(sections.get("buckets", {}))),
        [_conditions(report)],
        _needs(sections),
        _uncompiled(sections),
    )


def _uncompiled(sections: Report) -> list[str]:
    """Said of a record of other blocks than `compile` makes."""
    cases = [case for name in ("buckets", "loops") for case in sections.get(name, {}).values()]
    kinds = {case.get("backend", "aot") for case in cases}
    said = {
        "eager": "**ddit_rt's blocks were not compiled** here: they ran as torch runs them, in "
        "captured graphs.",
        "lowered": "ddit_rt's packages were made where there was no GPU, their kernels untuned.",
    }
    return [said[kind] for kind in sorted(kinds & said.keys())]


def _with_rows(cases: Report) -> dict[str, Mapping[str, Any]]:
    """Rows of the cases that have some."""
    return {key: case["rows"] for key, case in cases.items() if "rows" in case}


def _loops_table(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The first case with its spread; of the others the speed-ups."""
    if not cases:
        return []
    (first, rows), *others = cases.items()
    forms = {row["executor"] for row in rows.values()} - {None}
    shown = {*_SHOWN_FORMS, *(forms if len(forms) == 1 else ())}
    skips = any("reused_share" in row for row in rows.values())
    columns = ["", f"{first}, s (min to max)", "speed-up", "by count"]
    columns += [*(["reused"] if skips else []), "error"]
    lines = []
    # diffusers first, then ours; each in the order of the file.
    for name, row in sorted(rows.items(), key=lambda item: item[1]["executor"] is not None):
        if row["executor"] in shown:
            speedups = [times(other.get(name, {}).get("speedup")) for _, other in others]
            lines.append([_label(row), *_loop_cells(row, skips), *speedups])
    return table([*columns, *(key for key, _ in others)], lines)


def _label(row: Report) -> str:
    form = row["executor"]
    return f"{row['label']} ({form})" if form not in _SHOWN_FORMS else str(row["label"])


def _loop_cells(row: Report, skips: bool) -> list[str]:
    if "error" in row:
        return ["failed", *[""] * (4 if skips else 3)]
    reused = row.get("reused_share")
    # With random weights, the distance means something only where the same thing is computed.
    same = row["schedule"] == _MEANS_SOMETHING and "computed_steps" not in row
    error = row.get("relative_error") if same else None
    return [
        ranged(row["seconds"], 1, 2),
        times(row.get("speedup")),
        times(row.get("counted_speedup")),
        *(["" if reused is None else f"{reused:.0%}"] if skips else []),
        "" if error is None else f"{error:.1e}",
    ]


def _buckets_table(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One step at every size of every case."""
    if not cases:
        return []
    columns = ("one step", "measured, ms", "floor, ms", "over the floor", "bound by")
    lines = []
    for key, rows in cases.items():
        for patch, row in rows.items():
            cells = ["failed", "", "", ""]
            if "error" not in row:
                cells = [f"{row['seconds']['median'] * 1e3:.3f}"]
                cells += [f"{row['floor_seconds'] * 1e3:.3f}"]
                cells += [times(row["over_floor"]), row["bound"]]
            lines.append([f"{key}, {patch}", *cells])
    return table(columns, lines, "-:::-")


def _conditions(report: Report) -> str:
    machine, model = report["machine"], report["model"]
    device = machine["gpu"]["name"] if "gpu" in machine else cpu(report)
    return (
        f"{device}; {released(report, 'torch', 'diffusers')}; "
        f"{model['preset']} with random weights, {model['dtype']}, {model['text_tokens']} text "
        "tokens, without text encoders and VAE; medians of interleaved runs, speed-ups over "
        "diffusers eager in the same run. `by count`: operations of all steps at p over those of "
        "the plan. `error`: of the final latents, where the same thing is computed. Random weights "
        f"make the choices of `dynamic` and {_hits(report)}"
    )


def _hits(report: Report) -> str:
    """What of the caches means nothing, and how they were set where that has to be said."""
    loops = report["sections"].get("loops", {}).values()
    if not any(name.endswith("+teacache") for case in loops for name in case.get("rows", {})):
        return "the hits of the cache arbitrary."
    return (
        "which steps reuse arbitrary, but not what these cost: with `+teacache` and with MagCache "
        "every other step reuses, where its size is that of the step before, since TeaCache at "
        "0.08 makes Wan 2.1 1.3B twice as fast."
    )


def _needs(sections: Report) -> list[str]:
    """One line on getting ready, where that was measured."""
    facts = [
        f"compiled in {record['compile_seconds']:.0f} s, loaded in {record['load_seconds']:.1f} s, "
        f"first image {record['load_to_first_image_seconds']:.1f} s after the start of loading"
        for record in sections.get("compile", {}).values()
        if "compile_seconds" in record
    ]
    return [f"What it takes: {'; '.join(facts)}."] if facts else []


def ops_cuda(report: Report) -> str:
    """The table of `bench_ops.py --device cuda`."""
    columns = ("op", "latents", "native, us", "floor, us", "over the floor", "a copy, us")
    rows = []
    for row in report["results"]:
        cells = ["failed", f"{row['floor_us']:.1f}", "", "", ""]
        if "error" not in row:
            medians = {name: value["median"] for name, value in row["microseconds"].items()}
            cells = [f"{medians['native']:.1f}", f"{row['floor_us']:.1f}"]
            cells += [f"{row['over_floor']:.1f}x" if "over_floor" in row else "latency"]
            cells += [f"{medians[n]:.1f}" if n in medians else "" for n in ("copy", "eager")]
        rows.append([row["op"], row["size"], *cells])
    note = (
        f"{report['machine']['gpu']['name']}, a copy moves "
        f"{report['copy_bytes_per_second'] * 1e-12:.2f} TB/s; {released(report, 'torch')}; "
        "launches in one CUDA graph with buffers of their own, medians."
    )
    return block(table((*columns, "torch, us"), rows, "--"), [note])


def blocks_cuda(report: Report) -> str:
    """One block of each class on a GPU, form by form, and where the time of the best one goes."""
    patches = ("p", "2p", "4p")
    forms = [
        [row["block"], row["form"], *(f"{row['seconds'][patch] * 1e3:.3f}" for patch in patches)]
        for row in report["rows"]
    ]
    kernels = []
    for block_name in dict.fromkeys(row["block"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["block"] == block_name and row["kernels"]]
        best = min(rows, key=lambda row: float(row["seconds"]["p"]))
        for kernel in best["kernels"]["p"][:_MOST_KERNELS]:
            cells = [f"`{kernel['name'][:60]}`", f"{kernel['count']}"]
            kernels.append([block_name, *cells, f"{kernel['seconds'] * 1e6:.0f}"])
    card = report["machine"]["gpu"]
    rate = report["rates"]["matrix_flops_per_second"] * 1e-12
    made = (
        f"{card['name']}, {released(report, 'torch', 'diffusers')}; a matrix product at {rate:.0f}"
    )
    parts = (
        table(["one block", "", *(f"{patch}, ms" for patch in patches)], forms, "--"),
        table(["at p", "kernel", "count", "us"], kernels, "--"),
    )
    return block(*parts, [f"{made} TFLOP/s in the same visit; {report['notes'][0]}."])


def lowered_cuda(report: Report) -> str:
    """What a block becomes on CUDA, before (diffusers' forward) and now."""
    columns = ["one block", "", "products", "of them with GELU", "launches", "instructions"]
    rows = []
    states = {"diffusers' forward": "before", "now": "blocks", "now, in fp8": "fp8"}
    for state, found in ((name, report.get(key, {})) for name, key in states.items()):
        for name, counts in found.items():
            kernels = counts["kernels"].values()
            calls = sum(counts["calls"].get(name, 0) for name in _PRODUCTS)
            numbers = [
                calls + counts["gelu_in_product"],
                counts["gelu_in_product"],
                counts["launches"],
                sum(kernel["instructions"] * kernel["launches"] for kernel in kernels),
                sum(kernel["loads_16_bit"] * kernel["launches"] for kernel in kernels),
                len(counts["copies"]),
            ]
            rows.append([name, state, *(f"{number}" for number in numbers)])
    made = f"Lowered for sm_90 without a device, {released(report, 'torch', 'diffusers')}"
    lines = table([*columns, "16-bit loads", "only copies"], rows, "--")
    return block(lines, [f"{made}; generated kernels, each in its first configuration."])
