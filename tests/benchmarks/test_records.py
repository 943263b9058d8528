"""The file of a benchmark that is filled in several calls."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest


def test_row_that_fails_now_keeps_what_was_measured_before() -> None:
    rows: dict[str, Any] = {"x": {"seconds": 1}, "y": {"error": "old"}}
    report = {"sections": {"loops": {"a": {"rows": rows}}}}
    now = {"rows": {"x": {"error": "new"}, "y": {"error": "new"}, "z": {}}}
    import_module("records").merge(report, "loops", "a", now)
    assert report["sections"]["loops"]["a"]["rows"] == {
        "x": {"seconds": 1, "latest_error": "new"},
        "y": {"error": "new"},
        "z": {},
    }


def test_results_of_another_machine_are_not_mixed_in(tmp_path: Path) -> None:
    records = import_module("records")
    out = tmp_path / "flux.json"
    head = {
        "schema_version": 1,
        "machine": {"cpu": "x", "gpu": {"name": "H100"}},
        "versions": {"torch": "2.11"},
        "model": {"preset": "flux-dev"},
    }
    assert records.opened(out, head) == {**head, "sections": {}}
    records.write_json(out, {**head, "sections": {"buckets": {"a": {}}}})
    assert records.opened(out, head)["sections"] == {"buckets": {"a": {}}}
    with pytest.raises(ValueError, match=r"device H100, and this run has H200.*another --out"):
        records.opened(out, {**head, "machine": {"cpu": "x", "gpu": {"name": "H200"}}})


def test_interval_of_one_value_is_strict_json() -> None:
    records = import_module("records")
    assert records.interval_entry([0.5]) == {"value": 0.5, "low": None, "high": None}
    several = records.interval_entry([0.25, 0.5, 0.75])
    assert several["low"] < several["value"] == 0.5 < several["high"]
