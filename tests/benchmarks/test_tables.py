from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest


def row(name: str, **values: Any) -> dict[str, Any]:
    seconds = {"median": 0.5, "min": 0.4, "max": 0.6}
    fields = {"tokens": None, "psnr": None, "ssim": 1.0, "speedup_denoise": 1.0}
    entry = {"name": name, "label": name, "seconds_denoise": seconds, "seconds": seconds}
    return {**entry, **fields, "speedup_end_to_end": 1.0, **values}


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "machine": {"cpu": "Test CPU", "threads": 2},
        "versions": {"torch": "2.13", "diffusers": "0.42"},
        "settings": {"prompts": ["a", "b"], "repeats": 3},
        "batches": {
            "1": [row("eager"), row("dynamic", tokens=1920.0, speedup_denoise=2.0, psnr=25.14)],
            "4": [row("eager"), row("dynamic", tokens=1920.0, speedup_denoise=3.0, psnr=25.14)],
        },
    }


def test_table_replaces_what_stands_between_its_markers(
    report: dict[str, Any], tmp_path: Path
) -> None:
    readme = tmp_path / "README.md"
    other = "<!-- table: other -->\nkept\n<!-- /table -->\n"
    readme.write_text(f"a\n<!-- table: cpu_demo -->\nold\n<!-- /table -->\nb\n{other}")
    tables = import_module("tables")
    for _ in range(2):  # a second time changes nothing
        tables._replace("cpu_demo", tables.cpu_demo(report), [readme])
        text = readme.read_text()
        assert "old" not in text
        assert (
            "| dynamic | 1920 | 500 (400 to 600) | 2.00x | 1.00x | 3.00x | 25.1 | 1.000 |" in text
        )
        assert text.startswith("a\n<!-- table: cpu_demo -->\n|")
        assert text.endswith(f"<!-- /table -->\nb\n{other}")
        assert text.count("Test CPU, 2 threads") == 1


def test_missing_marker_is_an_error(report: dict[str, Any], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing here")
    with pytest.raises(ValueError, match="table: cpu_demo"):
        import_module("tables").update_tables("cpu_demo", report, [readme])


def test_documents_have_a_place_for_every_table_and_say_what_was_not_measured() -> None:
    # Or the table of a run of many minutes would find no place at its end.
    tables = import_module("tables")
    text = "\n".join(path.read_text(encoding="utf-8") for path in tables.DOCUMENTS)
    for name in tables.TABLES:
        content = text.partition(f"<!-- table: {name} -->\n")[2].partition("<!-- /table -->")[0]
        record = name.partition(":")[0]
        measured = (tables.ROOT / "benchmarks" / "results" / f"{record}.json").exists()
        assert content, name
        assert content.startswith("Not measured yet") == (not measured)


def test_the_short_table_is_of_the_same_record(report: dict[str, Any]) -> None:
    tables = import_module("tables")
    report["batches"]["1"][0]["name"] = "diffusers"
    lines = tables.cpu_short(report).splitlines()
    assert lines[2:4] == [
        "| eager |  | 500 | 1.00x | 1.000 |",
        "| dynamic | 1920 | 500 | 2.00x | 1.000 |",
    ]
