from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from extras import need
from strict_json import strict

from ddit_rt.lab.plans.candidates import Candidate, kind_of
from ddit_rt.lab.plans.points import Measurement, Point
from ddit_rt.policies import DDiTPolicy, FinePolicy, MagCache, NoCache, StaticPolicy, TeaCache

KINDS = (
    "fewer_steps",
    "static",
    "ddit",
    "teacache",
    "magcache",
    "ddit_teacache",
    "ddit_magcache",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    need("torchmetrics")
    out = tmp_path_factory.mktemp("skip")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
        runs = import_module("quality_runs")
        measure = runs.Runs._measure_costs
        patch.setattr(runs.Runs, "_measure_costs", lambda *given: by_tokens(measure(*given)))
        arguments = ["--quick", "--tables", "caches", "--out", str(out), "--cache", str(out)]
        assert import_module("bench_quality").main(arguments) == 0
    return strict(out / "skip_study.json")


def by_tokens(costs: Any) -> Any:
    """Costs that no clock decides: those of the demo's steps on a CPU, as a line over tokens."""

    def milliseconds(step: str) -> float:
        size, *reused = step.split()
        return 1.0 if reused else 2.0 + 0.03 * costs.tokens[size]

    tables = {
        name: {step: milliseconds(step) for step in table}
        for name, table in costs.milliseconds.items()
    }
    return replace(costs, milliseconds=tables)


@pytest.mark.slow
def test_rows_are_plans_of_their_kind_that_the_search_found_close_enough(
    report: dict[str, Any],
) -> None:
    fine = report["fine"]
    assert fine["ssim"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert fine["psnr"] is None
    assert fine["speedup"]["value"] == 1
    assert [target["ssim"] for target in report["targets"]] == report["settings"]["targets"]
    for target in report["targets"]:
        kinds = [row["kind"] for row in target["rows"]]
        assert kinds == [kind for kind in KINDS if kind in kinds]
        assert {"ddit", "magcache"} <= set(kinds)
        for row in target["rows"]:
            assert row["search"]["ssim"] >= target["ssim"]
            check_work(row)
            assert row["loop_seconds"]["value"] > 0
            assert len(row["ssim_per_prompt"]) == len(report["settings"]["prompts"])
    # What is not close enough is missing: at the looser target no kind is.
    tight, loose = ({row["kind"] for row in target["rows"]} for target in report["targets"])
    assert loose >= {*tight, *KINDS[:5]}


def check_work(row: dict[str, Any]) -> None:
    """A kind does what its name says, and its steps add up."""
    kind = row["kind"]
    assert sum(row["steps_at"].values()) == pytest.approx(row["steps"])
    reused = sum(count for name, count in row["steps_at"].items() if name.endswith(" reused"))
    assert reused == pytest.approx(row["reused_share"] * row["steps"])
    assert row["step_cache"]["step_cache"] == {
        "teacache": "TeaCache",
        "magcache": "MagCache",
    }.get(kind.removeprefix("ddit_"), "NoCache")
    if "cache" not in kind:
        assert reused == 0
    if kind in ("fewer_steps", "teacache", "magcache"):
        assert row["coarse_share"] == 0


@pytest.mark.slow
def test_looser_target_costs_no_more(report: dict[str, Any]) -> None:
    tight, loose = (
        {row["kind"]: row["search"]["cost_ms"] for row in target["rows"]}
        for target in report["targets"]
    )
    assert all(loose[kind] <= cost for kind, cost in tight.items())
    assert loose["ddit_magcache"] <= loose["ddit"]


@pytest.mark.slow
def test_prompts_of_fit_search_and_report_are_different(report: dict[str, Any]) -> None:
    settings = report["settings"]
    lists = [settings[name] for name in ("prompts", "search_prompts", "fit_prompts")]
    assert len(set().union(*lists)) == sum(map(len, lists))


@pytest.mark.slow
def test_table_has_a_line_per_plan_and_an_answer_per_target(report: dict[str, Any]) -> None:
    text = import_module("tables").TABLES["skip_study"](report)
    lines = text.splitlines()
    assert sum(line.startswith("|") for line in lines) == 3 + sum(
        len(target["rows"]) for target in report["targets"]
    )
    answers = [line for line in lines if line.startswith("- At")]
    assert len(answers) == len(report["targets"])
    assert all("DDiT + MagCache **" in line for line in answers)


def test_more_prompts_than_there_are_held_out_are_refused() -> None:
    model = import_module("demo_models").image_model()
    with pytest.raises(ValueError, match="got 50 prompts; demo has 49"):
        model.reported(50)


def point(policy: Any, cache: Any, ssim: float, cost: float) -> Point:
    """A plan, and what a search measured of it."""
    candidate = Candidate(
        kind=kind_of(policy, cache),
        label="",
        policy=policy,
        num_inference_steps=8,
        step_cache=cache,
    )
    return Point(candidate=candidate, measurement=Measurement.of([(cost, ssim, None)]))


def test_cheapest_plan_meets_the_target_and_a_combined_one_does_both() -> None:
    rule, none, tea = DDiTPolicy(), NoCache(), TeaCache(0.1)
    points = [
        point(rule, none, 0.99, 9.0),
        point(rule, none, 0.96, 5.0),
        point(rule, none, 0.90, 2.0),
        point(rule, tea, 0.96, 3.0),
        point(rule, tea, 0.96, 4.0),
    ]
    cheapest = import_module("quality_caches").cheapest

    def found(kind: str, target: float) -> Any:
        return cheapest(points, kind, target, lambda own: own is not points[3])

    assert found("ddit", 0.95) is points[1]
    assert found("ddit_teacache", 0.95) is points[4]
    assert found("ddit_teacache", 0.97) is None


@pytest.mark.parametrize(
    ("policy", "cache", "kind"),
    [
        (FinePolicy(), NoCache(), "fewer_steps"),
        (StaticPolicy("2p:0.5,p"), NoCache(), "static"),
        (DDiTPolicy(), NoCache(), "ddit"),
        (FinePolicy(), MagCache(), "magcache"),
        (DDiTPolicy(), TeaCache(0.1), "ddit_teacache"),
        (StaticPolicy("2p:0.5,p"), TeaCache(0.1), "static_teacache"),
    ],
)
def test_table_names_plans_by_what_they_do(policy: Any, cache: Any, kind: str) -> None:
    candidate = point(policy, cache, 1.0, 1.0).candidate
    assert import_module("quality_search").table_kind(candidate) == kind


def row(kind: str, seconds: list[float], ssim: list[float]) -> dict[str, Any]:
    mean = {"value": sum(ssim) / len(ssim)}
    return {
        "kind": kind,
        "loop_seconds_per_prompt": seconds,
        "ssim": mean,
        "ssim_per_prompt": ssim,
    }


FAST, SLOW, VARYING = [1.0, 1.1, 0.9], [2.0, 2.2, 1.8], [0.5, 1.1, 1.6]
NEAR, FAR = [0.95, 0.96, 0.94], [0.90, 0.91, 0.89]


@pytest.mark.parametrize(
    ("own", "other", "target", "answer"),
    [
        ((FAST, NEAR), (SLOW, NEAR), 0.95, "yes"),
        ((FAST, NEAR), (SLOW, FAR), 0.95, "yes"),
        ((FAST, FAR), (SLOW, NEAR), 0.95, "not comparable"),
        ((FAST, FAR), (SLOW, NEAR), 0.91, "yes"),
        ((SLOW, NEAR), (FAST, NEAR), 0.95, "no"),
        ((SLOW, FAR), (FAST, NEAR), 0.95, "no"),
        ((SLOW, NEAR), (FAST, FAR), 0.95, "not comparable"),
        ((SLOW, NEAR), (FAST, FAR), 0.91, "no"),
        ((VARYING, NEAR), (FAST, NEAR), 0.95, "undecided"),
        ((VARYING, NEAR), (FAST, FAR), 0.95, "not comparable"),
        ((VARYING, NEAR), (FAST, FAR), 0.91, "undecided"),
    ],
)
def test_faster_counts_at_equal_closeness(
    own: tuple[list[float], list[float]],
    other: tuple[list[float], list[float]],
    target: float,
    answer: str,
) -> None:
    compare = import_module("quality_caches").compare
    found = compare(row("ddit_teacache", *own), row("ddit", *other), target)
    assert found["faster"] == answer
    assert found["ssim"]["value"] == pytest.approx(sum(own[1]) / 3 - sum(other[1]) / 3)


def test_verdict_wants_both_alone_beaten_and_lists_every_rival() -> None:
    verdicts = import_module("quality_caches").verdicts
    rows = {
        "fewer_steps": row("fewer_steps", FAST, NEAR),
        "ddit": row("ddit", SLOW, NEAR),
        "teacache": row("teacache", SLOW, NEAR),
        "magcache": row("magcache", FAST, NEAR),
        "ddit_teacache": row("ddit_teacache", [0.5, 0.6, 0.4], NEAR),
    }
    tea, mag = verdicts(rows, 0.95)
    assert tea["either_alone"] == "yes"
    assert set(tea["against"]) == {"fewer_steps", "ddit", "teacache", "magcache"}
    assert mag["either_alone"] == "no"
    assert mag["reason"] == "none was close enough"
    rows["ddit_teacache"] = row("ddit_teacache", [3.0, 3.0, 3.0], NEAR)
    assert verdicts(rows, 0.95)[0]["either_alone"] == "no"


@pytest.mark.parametrize(
    ("answers", "answer"),
    [
        (["yes", "yes"], "yes"),
        (["yes", "undecided"], "undecided"),
        (["not comparable", "undecided"], "not comparable"),
        (["not comparable", "no"], "no"),
    ],
)
def test_answers_join_to_the_least_favourable(answers: list[str], answer: str) -> None:
    assert import_module("quality_caches").together(answers) == answer
