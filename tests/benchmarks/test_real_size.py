from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from strict_json import strict

from ddit_rt.lab.profile.events import Event

# Seconds of compiling are left to one slow test; the records are the same without.
TINY = ["--model", "flux", "--preset", "tiny", "--device", "cpu"]
TINY += ["--backend", "eager", "--repeats", "2"]


def run(out: Path, *arguments: str) -> dict[str, Any]:
    assert import_module("bench_real_size").main([*TINY, "--out", str(out), *arguments]) == 0
    return strict(out)


def test_steps_stand_beside_their_floors(tmp_path: Path) -> None:
    report = run(tmp_path / "flux.json", "--sections", "buckets")
    record = report["sections"]["buckets"]["128x128/batch1"]
    rows, rates = record["rows"], record["rates"]
    assert list(rows) == ["p", "2p", "4p", "skip"]
    assert rows["p"]["flops"] > rows["2p"]["flops"] > rows["4p"]["flops"]
    for patch in ("p", "2p", "4p"):
        row = rows[patch]
        floors = {
            "operations": row["flops"] / rates["matrix_flops_per_second"],
            "weights": row["weight_bytes"] / rates["copy_bytes_per_second"],
        }
        assert row["floor_seconds"] == max(floors.values()) == floors[row["bound"]]
    # Latents of 4 x 16 x 16, float32: three of them and the velocity in, the next latents out.
    assert rows["skip"]["moved_bytes"] == 5 * 4 * 4 * 16 * 16
    assert rows["skip"]["floor_seconds"] == pytest.approx(
        rows["skip"]["moved_bytes"] / rates["copy_bytes_per_second"]
    )
    for row in rows.values():
        assert row["seconds"]["count"] == 2 * 5  # calls x steps after those that warm up
        assert row["over_floor"] == row["seconds"]["median"] / row["floor_seconds"]
        assert row["ran_on"] == "cpu"


def test_loops_compare_methods_with_the_baseline(tmp_path: Path) -> None:
    out = tmp_path / "flux.json"
    report = run(out, "--sections", "loops", "--methods", "ddit_rt_*")
    record = report["sections"]["loops"]["128x128/batch1/steps8"]
    rows = record["rows"]
    schedules = ("fine", "paper_2.18x", "paper_3.52x", "dynamic")
    assert set(rows) == {
        "diffusers_eager",
        *(f"ddit_rt_auto_{schedule}" for schedule in schedules),
    }
    baseline = rows["diffusers_eager"]
    assert baseline["speedup"] == 1
    assert baseline["relative_error"] == 0
    for row in rows.values():
        assert row["finite"]
        assert row["seconds"]["count"] == 2
        assert row["baseline_seconds"] == baseline["seconds"]
        assert row["speedup"] == baseline["seconds"]["median"] / row["seconds"]["median"]
    fine = rows["ddit_rt_auto_fine"]
    # The unmodified model: rounding of float32 over 8 steps apart, the same latents.
    assert fine["relative_error"] < 1e-5
    assert fine["patch_sizes"] == {"p": 8}
    assert fine["counted_speedup"] == 1
    for schedule in ("paper_2.18x", "paper_3.52x"):
        wanted = float(schedule[6:10])
        counted = rows[f"ddit_rt_auto_{schedule}"]["counted_speedup"]
        assert counted == pytest.approx(wanted, rel=0.02)
    assert sum(rows["ddit_rt_auto_dynamic"]["patch_sizes"].values()) == 8


def test_method_without_a_plan_leaves_its_error_beside_the_others(tmp_path: Path) -> None:
    arguments = ["--sections", "loops", "--methods", "ddit_rt_auto_*x", "--steps", "2"]
    report = run(tmp_path / "flux.json", *arguments)
    rows = report["sections"]["loops"]["128x128/batch1/steps2"]["rows"]
    failed = rows["ddit_rt_auto_paper_3.52x"]
    assert failed["error"].startswith("ValueError: no plan of 2 steps")
    assert failed["label"]
    assert "seconds" not in failed
    assert "seconds" in rows["diffusers_eager"]


def test_later_call_adds_to_the_file_and_keeps_other_rows(tmp_path: Path) -> None:
    out = tmp_path / "flux.json"
    fine = ["--sections", "loops", "--steps", "4", "--methods", "ddit_rt_auto_fine"]
    other = ["--sections", "loops", "--steps", "4", "--methods", "*_dynamic"]
    before = run(out, *fine)["sections"]["loops"]["128x128/batch1/steps4"]["rows"]
    rows = run(out, *other)["sections"]["loops"]["128x128/batch1/steps4"]["rows"]
    assert set(rows) == {"diffusers_eager", "ddit_rt_auto_fine", "ddit_rt_auto_dynamic"}
    # A ratio stays one of the call in which it was taken.
    assert rows["ddit_rt_auto_fine"] == before["ddit_rt_auto_fine"]
    assert rows["ddit_rt_auto_dynamic"]["baseline_seconds"] == rows["diffusers_eager"]["seconds"]


def test_section_that_fails_keeps_what_an_earlier_call_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, known = tmp_path / "flux.json", import_module("bench_real_size").SECTIONS
    monkeypatch.setitem(known, "buckets", lambda *_: {"rows": {"p": {"seconds": 1.0}}})
    before = run(out, "--sections", "buckets")["sections"]["buckets"]["128x128/batch1"]

    def no_room(*_: Any) -> None:
        raise MemoryError("no room")

    for section in ("buckets", "blocks"):
        monkeypatch.setitem(known, section, no_room)
    sections = run(out, "--sections", "buckets", "blocks")["sections"]
    assert sections["buckets"]["128x128/batch1"] == {
        **before,
        "latest_error": "MemoryError: no room",
    }
    assert sections["blocks"]["128x128/batch1"]["error"] == "MemoryError: no room"


def test_what_was_measured_is_written_before_the_command_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill loses what is under way, not what has been measured."""
    setup = import_module("real_setup")
    turns = setup.take_turns

    def killed(*arguments: Any, on_news: Any, **settings: Any) -> None:
        def note(measured: Any) -> None:
            on_news(measured)
            if len(measured["diffusers_eager"].results) == 2:
                raise KeyboardInterrupt

        turns(*arguments, on_news=note, **settings)

    monkeypatch.setattr(setup, "take_turns", killed)
    out = tmp_path / "flux.json"
    with pytest.raises(KeyboardInterrupt):
        run(out, "--sections", "loops", "--methods", "ddit_rt_auto_fine")
    rows = strict(out)["sections"]["loops"]["128x128/batch1/steps8"]["rows"]
    for row in rows.values():
        assert row["seconds"]["count"] == 2
        assert row["speedup"] > 0


def test_kernels_of_a_step_are_listed_with_their_share(tmp_path: Path) -> None:
    report = run(tmp_path / "flux.json", "--sections", "kernels")
    rows = report["sections"]["kernels"]["128x128/batch1"]["rows"]
    assert list(rows) == ["p", "4p"]
    for row in rows.values():
        seconds = [kernel["seconds"] for kernel in row["kernels"]]
        assert seconds == sorted(seconds, reverse=True)
        # The rest is what the list is too short for.
        assert 0.9 < sum(kernel["share"] for kernel in row["kernels"]) <= 1 + 1e-9
        names = {kernel["name"] for kernel in row["kernels"]}
        # FLUX's blocks run eagerly here: products, and attention.
        assert "aten::addmm" in names
        assert any("attention" in name for name in names)


def test_kernels_count_where_their_step_ran() -> None:
    """Not those of another patch size; shares are of a mean step."""
    table, event = import_module("real_sections").kernel_table, Event
    events = [
        event("user_annotation", "ddit_rt/model/p", 0, 5),
        event("cuda_runtime", "cudaGraphLaunch", 1, 2, 7),
        event("user_annotation", "ddit_rt/model/2p", 5, 8),
        event("cuda_runtime", "cudaGraphLaunch", 6, 7, 8),
        event("kernel", "gemm", 10, 13, 7),
        event("kernel", "norm", 13, 14, 7),
        event("kernel", "gemm", 20, 29, 8),
    ]
    found = table(events, "ddit_rt/model/p", cuda=True)
    assert found["kernel_count"] == 2
    assert [(one["name"], one["count"], one["share"]) for one in found["kernels"]] == [
        ("gemm", 1, pytest.approx(0.75)),
        ("norm", 1, pytest.approx(0.25)),
    ]
    with pytest.raises(RuntimeError, match="4p"):
        table(events, "ddit_rt/model/4p", cuda=True)


def test_an_engine_that_cannot_be_made_leaves_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, tried = import_module("real_setup"), []

    def fail(*_: object, **__: object) -> None:
        tried.append(1)
        raise RuntimeError("the compiler crashed")

    monkeypatch.setattr(setup.ddit_rt, "compile", fail)
    rows = run(tmp_path / "flux.json", "--sections", "buckets")["sections"]["buckets"][
        "128x128/batch1"
    ]["rows"]
    assert "the compiler crashed" in rows["p"]["error"]
    assert len(tried) == 1  # once for all rows
    assert "seconds" in rows["skip"]  # needs no engine


def test_section_without_time_left_is_not_started(tmp_path: Path) -> None:
    sections = run(tmp_path / "flux.json", "--sections", "buckets", "--budget-s", "0")["sections"]
    assert "no time was left" in sections["buckets"]["128x128/batch1"]["error"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("compiled_before")
def test_compiled_methods_and_the_cost_of_compiling(tmp_path: Path) -> None:
    bench = import_module("bench_real_size")
    out = tmp_path / "flux.json"
    arguments = ["--model", "flux", "--preset", "tiny", "--device", "cpu"]
    arguments += ["--repeats", "1", "--steps", "4"]
    arguments += ["--methods", "compile_*", "ddit_rt_auto_fine", "--out", str(out)]
    assert bench.main([*arguments, "--sections", "loops", "compile"]) == 0
    sections = strict(out)["sections"]
    rows = sections["loops"]["128x128/batch1/steps4"]["rows"]
    assert set(rows) == {
        "diffusers_eager",
        "compile_regional",
        "compile_full",
        "ddit_rt_auto_fine",
    }
    # Compilers reorder sums: rounding of float32 over 4 steps.
    assert all(row["relative_error"] < 1e-4 for row in rows.values())
    record = sections["compile"]["128x128/batch1/steps4"]
    assert record["load_to_first_image_seconds"] >= record["first_run_seconds"]
    assert record["load_to_first_image_seconds"] >= record["load_seconds"]
    assert record["compile_seconds"] > record["load_seconds"]
    assert record["artifact_bytes"] > 0


def test_blocks_are_those_of_torch_at_every_patch_size(tmp_path: Path) -> None:
    report = run(tmp_path / "flux.json", "--sections", "blocks")
    rows = report["sections"]["blocks"]["128x128/batch1"]["rows"]
    classes = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    assert list(rows) == [f"{name} {patch}" for name in classes for patch in ("p", "2p", "4p")]
    assert all(row["relative_error"] < 1e-5 and row["seconds"] > 0 for row in rows.values())
