"""One page from all records: what ran, what passed, which targets are met."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from battery.stages import load_stages
from battery.targets import TARGETS, Records, Target

_FILES = ("info", "ops", "profile", "flux", "wan")
_MOST_NAMES = 20


def load_records(out: Path) -> dict[str, Any]:
    """All records in a folder."""
    records: dict[str, Any] = {
        name: json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        for name in _FILES
        if (out / f"{name}.json").exists()
    }
    stages = load_stages(out)
    return {**records, "stages": stages} if stages else records


def write_summary(out: Path) -> str:
    """Writes `summary.md` and returns it.

    Raises:
        ValueError: The folder holds no record.
    """
    records = load_records(out)
    if not set(records) - {"stages"} and set(records.get("stages", ())) <= {"summary"}:
        raise ValueError(f"{out} holds no record of the battery; run other stages first")
    sections = (_machine, _stages, _tests, _targets, _profile, _problems)
    lines = ["# GPU battery", ""]
    for section in sections:
        found = list(section(records))
        lines += [*found, ""] if found else []
    text = "\n".join(lines).rstrip() + "\n"
    (out / "summary.md").write_text(text, encoding="utf-8")
    return text


def _machine(records: Records) -> Iterator[str]:
    info = records.get("info")
    if info is None:
        return
    torch = info["torch"] or {}
    gpus = ", ".join(gpu["name"] for gpu in torch.get("gpus", ())) or "no GPU"
    drivers = {entry["driver_version"] for entry in info["driver"]}
    versions = {
        "driver": ", ".join(sorted(drivers)),
        "torch": torch.get("version"),
        "CUDA": torch.get("cuda"),
        "diffusers": info["packages"]["diffusers"],
        "Python": info["python"],
    }
    known = "; ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield f"{gpus}; {known}; {info['cores']} cores of {info['cpu']}"
    if info["ddit_rt"]:
        build = info["ddit_rt"]["build"]
        yield f"ddit_rt {build['version']}, CUDA {build['cuda_version'] or 'off'}, for " + (
            build["cuda_architectures"] or "no GPU"
        )


def _stages(records: Records) -> Iterator[str]:
    stages = records.get("stages")
    if not stages:
        return
    yield from ("## Stages", "", "| stage | outcome | seconds | why |", "|---|---|--:|---|")
    for name, entry in stages.items():
        if "outcome" in entry and name != "summary":  # which is running
            cells = (name, entry["outcome"], entry["seconds"], _cell(entry["reason"]))
            yield f"| {' | '.join(str(cell) for cell in cells)} |"


def _tests(records: Records) -> Iterator[str]:
    runs = records.get("stages", {}).get("tests", {}).get("runs")
    if not runs:
        return
    yield from ("## Tests", "")
    for name, run in runs.items():
        yield (
            f"- {name}: {run['passed']} of {run['tests']} passed, {run['skipped']} skipped, "
            f"{len(run['failed'])} failed"
        )
        yield from (f"  - {test}" for test in run["failed"][:_MOST_NAMES])
        if len(run["failed"]) > _MOST_NAMES:
            yield f"  - and {len(run['failed']) - _MOST_NAMES} more"


def _targets(records: Records) -> Iterator[str]:
    yield from (
        "## Targets",
        "",
        "| target | bound | worst | case | met |",
        "|---|--:|--:|---|---|",
    )
    for target in TARGETS:
        values = list(target.values(records))
        if not values:
            yield f"| {target.name} | {_bound(target)} | | | not measured |"
            continue
        case, value = target.worst(values)
        met = sum(target.met(value) for _, value in values)
        verdict = "yes" if met == len(values) else f"**no**, {met} of {len(values)}"
        number = f"{_number(value)}{target.unit}"
        yield f"| {target.name} | {_bound(target)} | {number} | {_cell(case)} | {verdict} |"


def _bound(target: Target) -> str:
    if target.at_least is not None:
        return f"at least {_number(target.at_least)}{target.unit}"
    assert target.at_most is not None, "a target has a bound"
    return f"at most {_number(target.at_most)}{target.unit}"


def _profile(records: Records) -> Iterator[str]:
    report = records.get("profile")
    if report is None:
        return
    yield from ("## Profile", "", f"{report['device']}, {report['model']['transformer_class']}", "")
    yield from ("| executor | patch | phase | calls | ms | share |", "|---|---|---|--:|--:|--:|")
    for run in report["runs"]:
        for row in run["rows"]:
            cells = (run["executor"], row["patch"], row["phase"], row["calls"])
            yield f"| {' | '.join(map(str, cells))} | {row['ms']:.2f} | {row['share']:.1%} |"


def _problems(records: Records) -> Iterator[str]:
    """Whatever a benchmark could not measure."""
    found = [f"ops {row['op']}, {row['size']}: {row['error']}" for row in _failed_ops(records)]
    found += [
        f"{model} {place}: {error}"
        for model in ("flux", "wan")
        for place, error in _errors(records.get(model, {}), "")
    ]
    if found:
        yield from ("## Not measured", "")
        yield from (f"- {_cell(text)}" for text in found[:_MOST_NAMES])
        if len(found) > _MOST_NAMES:
            yield f"- and {len(found) - _MOST_NAMES} more"


def _failed_ops(records: Records) -> list[Any]:
    return [row for row in records.get("ops", {}).get("results", ()) if "error" in row]


def _errors(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every `error`, `model_error`, ... in nested records, with where it stands."""
    if not isinstance(value, Mapping):
        return
    for name, inner in value.items():
        if name.endswith("error") and isinstance(inner, str):
            yield place, inner
        else:
            where = place if name in ("sections", "rows") else f"{place} {name}".strip()
            yield from _errors(inner, where)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _cell(text: str) -> str:
    """Text that fits into a line of a table."""
    return " ".join(text.split()).replace("|", "/")[:200]
