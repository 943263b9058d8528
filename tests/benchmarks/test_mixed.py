"""The benchmark that sets mixed steps beside everything else."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import need
from models import noise, tiny_conditioning, tiny_transformer

import ddit_rt
from ddit_rt.steps import Detail, Pass, RunContext, SnrBucket, StepModel, mixed

SIGMAS = torch.tensor([0.9, 0.5])


@pytest.fixture(scope="module")
def steps() -> StepModel:
    engine = ddit_rt.compile(tiny_transformer(), backend="eager", progress=False)
    return engine._compiled.steps


def context_of(model: StepModel) -> RunContext:
    """A run in which any kind of coarse step may come."""
    return RunContext(
        passes=(Pass.of(model, tiny_conditioning(model.transformer)),),
        height=16,
        width=16,
        sigmas=SIGMAS,
        timesteps=SIGMAS,
        detail=Detail((1, 4, 16, 16), torch.device("cpu"), mixed=True),
    )


def coarse(model: StepModel, way: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents, and the velocity of a first step at 2p in one of the benchmark's ways."""
    context = context_of(model)
    latents = noise(1, 4, 16, 16)
    with import_module("bench_mixed").coarse_with(way):
        return latents, SnrBucket(model, context, 2).velocity(latents, torch.tensor([1]))


def test_each_way_to_take_a_coarse_step_is_another_and_leaves_the_runtimes_as_it_was(
    steps: StepModel,
) -> None:
    _, usual = coarse(steps, "matched")
    made = [coarse(steps, way)[1] for way in ("noised", "plain", "nearest")]
    for place, one in enumerate(made):
        assert all((one - other).abs().max() > 1e-3 for other in [usual, *made[:place]])
    assert torch.equal(coarse(steps, "matched")[1], usual)


def test_nearest_repeats_what_the_small_image_has(steps: StepModel) -> None:
    latents, velocity = coarse(steps, "nearest")
    clean = (latents - 0.5 * velocity).unflatten(2, (8, 2)).unflatten(4, (8, 2))
    torch.testing.assert_close(clean, clean[:, :, :, :1, :, :1].expand_as(clean))


def test_by_chance_regions_are_others_and_then_as_before() -> None:
    moved = noise(1, 4, 16, 16)
    usual = mixed.movement(moved, 4)
    with import_module("bench_mixed").chosen_by_chance(0):
        drawn = mixed.movement(moved, 4)
    assert drawn.shape == usual.shape
    assert not torch.equal(drawn, usual)
    assert torch.equal(mixed.movement(moved, 4), usual)


def test_an_adapters_blocks_run_in_mixed_steps_alone_and_only_while_asked_for(
    steps: StepModel,
) -> None:
    ran = list[str]()
    watched = {
        name: [lambda *given, own=own: (ran.append("adapter"), own(*given))[1] for own in blocks]
        for name, blocks in steps.base.items()
    }
    context = context_of(steps)
    with import_module("bench_mixed").run_by(watched):
        adapted = mixed.MixedBucket(steps, context, 2, 0.25)
        SnrBucket(steps, context, 4).velocity(noise(1, 4, 16, 16), torch.tensor([0]))
    assert not ran
    adapted.velocity(noise(1, 4, 16, 16), torch.tensor([0]))
    assert len(ran) == sum(map(len, steps.base.values()))
    mixed.MixedBucket(steps, context, 2, 0.25).velocity(noise(1, 4, 16, 16), torch.tensor([0]))
    assert len(ran) == sum(map(len, steps.base.values()))


@pytest.mark.slow
def test_quick_run_compares_what_it_says(tmp_path: Path) -> None:
    need("torchmetrics")
    bench, out = import_module("bench_mixed"), tmp_path / "mixed.json"
    assert bench.main(["--quick", "--out", str(out)]) == 0
    report = json.loads(out.read_text(), parse_constant=pytest.fail)
    section, noises = report["sections"].values()
    assert section["scale"] == noises["scale"] == 6
    assert len({row["psnr"]["value"] for row in noises["rows"][1:]}) > 10
    assert not noises["verdicts"]
    rows = {row["name"]: row for row in section["rows"]}
    assert rows["fewer_4"]["tokens"] == 4 * 64
    # Three steps at p before, two behind; of 4 regions of 4 x 4 tokens one runs whole.
    assert rows["control_4p_25_block"]["tokens"] == 5 * 64 + 3 * (16 + 3)
    kinds = {"fine", "fewer_steps", "static", "dynamic", "mixed", "adapted", "control"}
    assert {row["kind"] for row in rows.values()} == kinds
    # LoRA begins at zero: after two steps of training it changes little, but something.
    plain, adapted = (rows[f"{kind}_2p_50_3"]["psnr"]["value"] for kind in ("mixed", "adapted"))
    assert 0 < abs(plain - adapted) < 0.1
    assert all(row["loop_ms"]["value"] > 0 for row in rows.values())
    judged = {name for name, row in rows.items() if row["kind"] in ("mixed", "adapted", "control")}
    assert {entry["name"] for entry in section["verdicts"]} == judged
    assert "guidance 6" in import_module("tables").TABLES["mixed_cpu"](report)
    with pytest.raises(SystemExit):
        bench.main(["--quick"])


def test_plans_are_those_of_the_record() -> None:
    bench = import_module("bench_mixed")
    sections = json.loads(bench.RESULT.read_text(encoding="utf-8"))["sections"]
    plans = {
        "study_50": list(bench.plans_beside_others(50)),
        "study_50_noise": list(bench.plans_of_noise(50)),
    }
    assert plans.keys() == sections.keys()
    for name, own in plans.items():
        rows = {row["name"]: row for row in sections[name]["rows"]}
        assert {plan.name for plan in own} == rows.keys()
        for plan in own:
            # As the record has it: a list where a policy has a tuple.
            made = json.loads(json.dumps(plan.to_dict()))
            assert made == {key: rows[plan.name][key] for key in made}


def test_verdicts_are_against_the_closest_plan_that_is_no_slower() -> None:
    verdicts = import_module("bench_mixed").verdicts

    def row(name: str, kind: str, ms: float, tokens: int, psnr: list[float]) -> dict[str, Any]:
        entry = {"value": sum(psnr) / len(psnr), "low": 0.0, "high": 0.0}
        shown = {"psnr": entry, "psnr_prompts": psnr, "loop_ms": {"value": ms}, "tokens": tokens}
        return {"name": name, "kind": kind, **shown}

    rows = [
        row("slow", "fewer_steps", 103, 40, [50, 50, 50]),
        row("equal", "fewer_steps", 101, 40, [30, 31, 32]),
        row("cheap", "static", 60, 90, [28, 31, 34]),
        row("mixed_2p", "mixed", 100, 50, [31, 32, 33.5]),
        row("adapted_2p", "adapted", 100, 50, [30, 31, 33]),
        row("control_2p", "control", 100, 50, [35, 31, 28]),
    ]
    first, adapted, control = verdicts(rows)
    assert first["any_time"]["rival"] == "equal"
    assert first["any_time"]["holds"] == "yes"
    assert first["any_time"]["speed"] == pytest.approx(1.01)
    assert first["any_tokens"]["rival"] == "slow"
    assert first["any_tokens"]["holds"] == "no"
    assert first["coarse_time"]["rival"] == "cheap"
    assert first["coarse_time"]["holds"] == "undecided"
    assert first["coarse_tokens"] is None
    assert first["control"]["rival"] == "control_2p"
    assert adapted["untrained"]["rival"] == "mixed_2p"
    assert adapted["untrained"]["holds"] == "no"
    assert first["untrained"] is adapted["control"] is control["control"] is None
