"""The result of a profile: a table for a terminal, and JSON.

Schema of the JSON, version 1:

- `tool`: `"torch"`; `machine`, `versions`: as in the report of the demo; `device`: its name.
- `model`: `transformer_class`, `parameters`, `dtype`.
- `settings`: `prompts`, `steps`, `latents` (shape), `text_tokens`, `policy`, `step_cache`.
- `ceilings`: see `Ceilings`.
- `runs`, one per executor:
  - `executor`; `trace`: `RunTrace.to_dict()`; `chrome_trace`: path; `notes`.
  - `unprofiled_ms`: the loop of the run before it, without a profiler.
  - `clock`, `loop_ms`; `rows`: `patch`, `phase`, `calls`, `ms`, `share` of the loop, `flops_per_s`
    and `bytes_per_s` (at least; null where there is nothing to count), and both `of_ceiling`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ddit_rt.lab.measure.report import device_name, machine, model_entry, versions
from ddit_rt.lab.profile.accounting import Row
from ddit_rt.lab.profile.ceilings import Ceilings
from ddit_rt.lab.profile.subject import Subject

SCHEMA_VERSION = 1

_CLOCKS = {
    "device": "device time: from the first kernel of a phase to its last; the loop by its timer",
    "wall": "wall time on the host",
    "trace": "the engine's own time of whole steps; the phases are inside the device's graph",
}


def report_of(
    subject: Subject, ceilings: Ceilings, runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The whole report, JSON-ready.

    Args:
        subject: What ran.
        ceilings: What the machine can do.
        runs: What `profile_run` gave.
    """
    model = model_entry("", subject.model.transformer)
    del model["name"]
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": "torch",
        "machine": machine(),
        "versions": versions(),
        "device": device_name(subject.device),
        "model": model,
        "settings": {
            "prompts": list(subject.prompts),
            "steps": subject.steps,
            "latents": list(subject.latents.shape),
            "text_tokens": subject.text_tokens,
            "policy": subject.policy.to_dict(),
            "step_cache": subject.step_cache.to_dict(),
        },
        "ceilings": asdict(ceilings),
        "runs": list(runs),
    }


def row_entry(row: Row, total: float, ceilings: Ceilings) -> dict[str, Any]:
    """An entry of `rows`, of a loop that took `total` seconds."""
    flops, size = (
        count / row.seconds if count and row.seconds > 0 else None
        for count in (row.flops, row.bytes)
    )
    return {
        "patch": row.patch,
        "phase": row.phase,
        "calls": row.calls,
        "ms": row.seconds * 1e3,
        "share": row.seconds / total,
        "flops_per_s": flops,
        "flops_of_ceiling": flops and flops / ceilings.matmul_flops_per_s,
        "bytes_per_s": size,
        "bytes_of_ceiling": size and size / ceilings.copy_bytes_per_s,
    }


def text_of(report: Mapping[str, Any]) -> str:
    """The tables for a terminal."""
    ceilings, settings = report["ceilings"], report["settings"]
    model, shape = report["model"], " x ".join(str(size) for size in settings["latents"])
    scale, unit = _scale(ceilings["matmul_flops_per_s"])
    peak, copy = ceilings["matmul_flops_per_s"] / scale, ceilings["copy_bytes_per_s"] / 1e9
    lines = [
        f"{model['transformer_class']} {model['dtype']} on {report['device']}",
        f"latents {shape}, {settings['text_tokens']} text tokens, {settings['steps']} steps",
        f"peak, measured now: {peak:.3g} {unit} (product {ceilings['matmul']})",
        f"copy, measured now: {copy:.3g} GB/s (of {ceilings['copy']})",
    ]
    for run in report["runs"]:
        lines += ["", *_table(run, scale, unit)]
    return "\n".join(lines)


def _table(run: Mapping[str, Any], scale: float, unit: str) -> list[str]:
    loops = f"loop {run['loop_ms']:.1f} ms, {run['unprofiled_ms']:.1f} ms without the profiler"
    titles = f"{'patch':<7}{'phase':<8}{'calls':>6}{'ms':>10}{'ms/call':>9}{'share':>8}"
    return [
        f"executor {run['executor']}: {loops}",
        f"{titles}{unit:>10}{'of peak':>9}{'GB/s':>8}{'of copy':>9}",
        *(_line(row, scale) for row in run["rows"]),
        f"({_CLOCKS[run['clock']]}; FLOP/s and GB/s are the least that the phase had to do)",
        *(f"note: {note}" for note in run["notes"]),
        f"wrote {run['chrome_trace']} (open it in ui.perfetto.dev)",
    ]


def _line(row: Mapping[str, Any], scale: float) -> str:
    per_call = f"{row['ms'] / row['calls']:.3f}" if row["calls"] else ""
    return (
        f"{row['patch']:<7}{row['phase']:<8}{row['calls'] or '':>6}{row['ms']:>10.2f}"
        f"{per_call:>9}{row['share']:>8.1%}"
        f"{_number(row['flops_per_s'], scale):>10}{_percent(row['flops_of_ceiling']):>9}"
        f"{_number(row['bytes_per_s'], 1e9):>8}{_percent(row['bytes_of_ceiling']):>9}"
    ).rstrip()


def _number(value: float | None, scale: float) -> str:
    return "" if value is None else f"{value / scale:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _scale(flops_per_s: float) -> tuple[float, str]:
    return (1e12, "TFLOP/s") if flops_per_s >= 1e12 else (1e9, "GFLOP/s")
