from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

TINY = ["--model", "wan", "--preset", "tiny", "--device", "cpu"]
TINY += ["--backend", "eager", "--repeats", "1"]


def run(out: Path, *arguments: str) -> dict[str, Any]:
    assert import_module("bench_real_size").main([*TINY, "--out", str(out), *arguments]) == 0
    data: dict[str, Any] = json.loads(out.read_text())
    return data


@pytest.mark.slow
def test_quick_run_has_a_row_of_everything(tmp_path: Path) -> None:
    chosen = ["--sections", "buckets", "loops", "--methods", "ddit_rt_*", "mag_cache"]
    report = run(tmp_path / "wan.json", *chosen)
    sections, key = report["sections"], "128x128x5/batch1"
    rows = sections["buckets"][key]["rows"]
    assert list(rows) == ["p", "2p", "4p"]
    assert rows["p"]["flops"] > rows["2p"]["flops"] > rows["4p"]["flops"]
    for row in rows.values():
        assert row["over_floor"] == row["seconds"]["median"] / row["floor_seconds"]
    loops = sections["loops"][f"{key}/steps16"]["rows"]
    names = ("fine", "paper_1.60x", "paper_2.10x", "paper_3.20x", "dynamic")
    skipping = ("fine+teacache", "paper_2.10x+teacache")
    ours = {f"ddit_rt_auto_{name}" for name in (*names, *skipping)}
    assert set(loops) == {"diffusers_eager", "mag_cache", *ours}
    assert all(row["finite"] for row in loops.values())
    # The unmodified model: guidance multiplies rounding of float32 by up to ten.
    assert loops["ddit_rt_auto_fine"]["relative_error"] < 1e-4
    for name in names[1:4]:
        wanted = float(name[6:10])
        counted = loops[f"ddit_rt_auto_{name}"]["counted_speedup"]
        assert counted == pytest.approx(wanted, rel=0.02)
    check_skipped(loops)
    table = import_module("tables").TABLES["wan_cpu"](report)
    assert "| speed-up | by count | reused | error |" in table
    assert re.search(r"\| ddit_rt, fine\+teacache \| .* \| 2\.00x \| 50% \|  \|", table)
    assert re.search(
        r"\| diffusers \+ MagCache \(every other step\) \| .* \|  \| 50% \|  \|", table
    )
    assert "every other step reuses" in table


def check_skipped(loops: dict[str, Any]) -> None:
    fine, paper = (loops[f"ddit_rt_auto_{name}+teacache"] for name in ("fine", "paper_2.10x"))
    other = loops["mag_cache"]
    assert fine["computed_sizes"] == {"p": 8}
    assert fine["patch_sizes"] == {"p": 16}
    assert fine["counted_speedup"] == 2
    assert other["computed_steps"] == 8
    assert fine["reused_share"] == other["reused_share"] == 0.5
    # The same steps reuse: they are as far from those that compute all, but for rounding.
    assert fine["relative_error"] > 0.01
    assert fine["relative_error"] == pytest.approx(other["relative_error"], rel=1e-3)
    # A step at another size than the one before computes, so some fewer reuse.
    plain = loops["ddit_rt_auto_paper_2.10x"]
    assert 0.3 < paper["reused_share"] < 0.5
    assert paper["patch_sizes"] == plain["patch_sizes"] == plain["computed_sizes"]
    assert paper["counted_speedup"] > 1.3 * plain["counted_speedup"]
    assert plain["reused_share"] == 0


def test_a_step_is_timed_at_the_sizes_that_a_video_offers(tmp_path: Path) -> None:
    sections = run(tmp_path / "wan.json", "--sections", "buckets", "--videos", "96x128x5")
    assert list(sections["sections"]["buckets"]["96x128x5/batch1"]["rows"]) == ["p", "2p"]


def test_unreadable_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'480x832'; write height x width x frames"):
        run(tmp_path / "wan.json", "--videos", "480x832")
