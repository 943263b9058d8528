"""Tables of README.md and docs/, generated from the results of the benchmarks.

    python benchmarks/tables.py

rewrites what stands between `<!-- table: NAME -->` and `<!-- /table -->` for every NAME that has a
file `benchmarks/results/NAME.json` and a function here. NAME may end in `:VIEW`, for another table
of the same file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tables_cuda import flux_cuda, ops_cuda
from tables_quality import quality_demo, quality_demo_video
from tables_skip import skip

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def main() -> int:
    """Updates every table whose results exist."""
    for name in sorted({name.partition(":")[0] for name in TABLES}):
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        if path.exists():
            update_tables(name, json.loads(path.read_text(encoding="utf-8")))
    return 0


def update_tables(
    record: str, report: Mapping[str, Any], documents: Sequence[Path] = DOCUMENTS
) -> None:
    """Replaces the tables that are made of one record.

    Args:
        record: Name of its file, without the ending.
        report: The results.
        documents: Files with the markers.

    Raises:
        ValueError: No document has a marker of one of the tables.
    """
    for name, table in TABLES.items():
        if name.partition(":")[0] == record:
            _replace(name, table(report), documents)


def _replace(name: str, table: str, documents: Sequence[Path]) -> None:
    marker = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- /table -->)", re.DOTALL)
    holders = [path for path in documents if marker.search(path.read_text(encoding="utf-8"))]
    if not holders:
        names = [path.name for path in documents]
        raise ValueError(f"'<!-- table: {name} -->' ... '<!-- /table -->' is in none of {names}")
    for path in holders:
        text = path.read_text(encoding="utf-8")
        replaced = marker.sub(lambda found: f"{found[1]}{table}{found[2]}", text)
        path.write_text(replaced, encoding="utf-8")


def cpu_short(report: Mapping[str, Any]) -> str:
    """The table of README.md: what a reader wants to know first, of the same record."""
    (_, rows), *_ = report["batches"].items()
    rows = {row["name"]: row for row in rows}
    shown = [rows[name] for name in SHORT if name in rows]
    lines = ["| | tokens | loop, ms | speed-up | SSIM |", f"|---|{'--:|' * 4}"]
    for row in shown:
        tokens = "" if row["tokens"] is None else f"{row['tokens']:.0f}"
        loop = f"{row['seconds_denoise']['median'] * 1e3:.0f}"
        cells = (row["label"], tokens, loop, f"{row['speedup_denoise']:.2f}x", f"{row['ssim']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    machine = report["machine"]
    note = f"{machine['cpu']}, {machine['threads']} threads, torch {report['versions']['torch']}."
    return "\n".join([*lines, "", note, ""])


def cpu_demo(report: Mapping[str, Any]) -> str:
    """The table of `bench_cpu.py`: batch 1, and the speed-up at the largest batch beside it."""
    first, *others = report["batches"]
    last = others[-1] if others else first
    large = {row["name"]: row for row in report["batches"][last]}
    columns = "tokens | loop, ms (min to max) | speed-up | whole call"
    lines = [
        f"| | {columns} | loop, batch {last} | PSNR, dB | SSIM |",
        f"|---|{'--:|' * 7}",
    ]
    lines += [_cpu_row(row, large[row["name"]]) for row in report["batches"][first]]
    return "\n".join([*lines, "", _conditions(report), ""])


def _conditions(report: Mapping[str, Any]) -> str:
    machine, versions, settings = report["machine"], report["versions"], report["settings"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads; torch {versions['torch']}, diffusers "
        f"{versions['diffusers']}; {len(settings['prompts'])} prompts, {settings['repeats']} "
        "interleaved repeats; medians per picture. Speed-ups are over the first row: of the "
        "denoising loop, of the whole call, and of the loop at the larger batch."
    )


def _cpu_row(row: Mapping[str, Any], large: Mapping[str, Any]) -> str:
    loop = row["seconds_denoise"]
    tokens = "" if row["tokens"] is None else f"{row['tokens']:.0f}"
    psnr = "same" if row["psnr"] is None else f"{row['psnr']:.1f}"
    cells = (
        row["label"],
        tokens,
        f"{loop['median'] * 1e3:.0f} ({loop['min'] * 1e3:.0f} to {loop['max'] * 1e3:.0f})",
        f"{row['speedup_denoise']:.2f}x",
        f"{row['speedup_end_to_end']:.2f}x",
        f"{large['speedup_denoise']:.2f}x",
        psnr,
        f"{row['ssim']:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def ops_cpu(report: Mapping[str, Any]) -> str:
    """The table of `bench_ops.py`: batch 1 on one thread, best times of many calls."""
    lines = [
        "| op | native, us | over eager | over torch.compile | of a copy |",
        f"|---|{'--:|' * 4}",
    ]
    for row in report["results"]:
        if row["batch"] == 1 and row["threads"] == 1:
            best = {name: timing["best_us"] for name, timing in row["timings"].items()}
            native = best["native"]
            cells = [row["op"], f"{native:.0f}"]
            cells += [
                f"{best[name] / native:.1f}x" if name in best else ""
                for name in ("eager", "compile")
            ]
            cells.append(f"{native / best['copy']:.1f}x" if "copy" in best else "")
            lines.append(f"| {' | '.join(cells)} |")
    machine = report["machine"]
    note = f"{machine['cpu']}, one thread; torch {machine['torch']}; best of many calls, CPU time."
    return "\n".join([*lines, "", note, ""])


SHORT = ("diffusers", "torch_compile", "first_block_cache_best", "fine", "dynamic", "fewer_steps")
"""Rows of README.md."""

TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "cpu_demo:short": cpu_short,
    "cpu_demo": cpu_demo,
    "ops_cpu": ops_cpu,
    "flux_cuda": flux_cuda,
    "ops_cuda": ops_cuda,
    "quality_demo": quality_demo,
    "quality_demo_video": quality_demo_video,
    "skip_demo": skip,
    "wan_cpu": flux_cuda,
    "skip_demo_video": skip,
}


if __name__ == "__main__":
    sys.exit(main())
