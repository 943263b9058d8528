"""What tables are written with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]

_WORDS = {"all fine": "full resolution", "fine steps": "steps at full resolution"}
"""Labels of records that were made before the words changed, and today's."""


def table(columns: Sequence[str], rows: Iterable[Iterable[str]], align: str = "-") -> list[str]:
    """Titles and rows; the first columns stand as `align` says, the others to the right.

    Args:
        columns: Titles.
        rows: Cells.
        align: Per column `-` for left and `:` for right; for the columns behind, right.
    """
    marks = align.ljust(len(columns), ":")
    rule = "|" + "".join("--:|" if mark == ":" else "---|" for mark in marks)
    titles, *lines = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return [titles, rule, *lines]


def block(*parts: Iterable[str]) -> str:
    """Parts with an empty line between them, and one line break at the end."""
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def label(entry: Report) -> str:
    """The label of a row, in today's words."""
    text = str(entry["label"])
    for old, new in _WORDS.items():
        text = text.replace(old, new)
    return text


def times(ratio: float | None) -> str:
    """A ratio; empty where there is none."""
    return "" if ratio is None else f"{ratio:.2f}x"


def ranged(spread: Report, scale: float, digits: int = 0) -> str:
    """Median with extremes."""
    median, least, most = (f"{spread[n] * scale:.{digits}f}" for n in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def interval(entry: Mapping[str, float | None], digits: int, suffix: str = "") -> str:
    """A mean; its bounds too, where more than one prompt counts."""
    value, *bounds = (
        "" if entry[name] is None else f"{entry[name]:.{digits}f}"
        for name in ("value", "low", "high")
    )
    return f"{value}{suffix} ({' to '.join(bounds)})" if all(bounds) else f"{value}{suffix}"


def psnr(entry: Mapping[str, Any] | None) -> str:
    """A mean PSNR; of images that are those of the reference, `same`."""
    return "same" if entry is None else f"{entry['value']:.1f}"


def cpu(report: Report) -> str:
    """The CPU with the number of threads."""
    machine = report["machine"]
    return f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"


def released(report: Report, *packages: str) -> str:
    """Versions of packages."""
    return ", ".join(f"{name} {report['versions'][name]}" for name in packages)
