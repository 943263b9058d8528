"""Tables of README.md and docs/, generated from the records of the benchmarks.

    python benchmarks/tables.py

rewrites what stands between `<!-- table: NAME -->` and `<!-- /table -->` for every NAME that has a
file `benchmarks/results/NAME.json` and a function in `made_tables`. NAME may end in `:VIEW`, for
another table of the same file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from made_tables.cpu import (
    cpu_demo,
    cpu_short,
    drivers_cpu,
    ops_cpu,
    overhead_cpu,
    serving_cpu,
    soak,
)
from made_tables.quality import ablations, caches, mixed
from made_tables.real_size import blocks_cuda, lowered_cuda, ops_cuda, real_size
from made_tables.study import study

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "adapters_demo": ablations,
    "blocks_cuda": blocks_cuda,
    "cpu_demo:short": cpu_short,
    "cpu_demo": cpu_demo,
    "cpu_demo_int8": cpu_demo,
    "drivers_cpu": drivers_cpu,
    "flux_cuda": real_size,
    "lowered_cuda": lowered_cuda,
    "mixed_cpu": mixed,
    "ops_cpu": ops_cpu,
    "ops_cuda": ops_cuda,
    "overhead_cpu": overhead_cpu,
    "quality_study": ablations,
    "serving_cpu": serving_cpu,
    "skip_study": caches,
    "soak_cpu": soak,
    "study_cpu": study,
    "study_order_cpu": study,
    "study_far_cpu": study,
    "wan_cpu": real_size,
    "wan_cuda": real_size,
}


def main() -> int:
    """Updates every table whose record exists."""
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
        report: The record.
        documents: Files with the markers.

    Raises:
        ValueError: No document has a marker of one of the tables.
    """
    for name, table in TABLES.items():
        if name.partition(":")[0] == record:
            replace_table(name, table(report), documents)


def replace_table(name: str, table: str, documents: Sequence[Path]) -> None:
    """Replaces one table in every document that has its markers; see `update_tables`."""
    marker = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- /table -->)", re.DOTALL)
    holders = [path for path in documents if marker.search(path.read_text(encoding="utf-8"))]
    if not holders:
        names = [path.name for path in documents]
        raise ValueError(f"'<!-- table: {name} -->' ... '<!-- /table -->' is in none of {names}")
    for path in holders:
        text = path.read_text(encoding="utf-8")
        replaced = marker.sub(lambda found: f"{found[1]}{table}{found[2]}", text)
        path.write_text(replaced, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
