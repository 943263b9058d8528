"""Steps of patches of two sizes, and the benchmark that compares them."""

from __future__ import annotations

import json
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import need
from models import CHANNELS, tiny_embeds, tiny_pipeline, tiny_transformer
from torch import Tensor

import ddit_rt
from ddit_rt import ops
from ddit_rt.models.flux import FluxFamily
from ddit_rt.policies import StaticPolicy

SIZE = (16, 16)
SIGMAS = torch.tensor([1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.0])


@pytest.fixture(scope="module")
def transformer() -> Any:
    return tiny_transformer()


def noise(seed: int = 3) -> Tensor:
    return torch.randn(1, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(seed))


def made(transformer: Any, plan: list[Any]) -> Tensor:
    run = begun(transformer, SIGMAS)
    for index, how in enumerate(plan):
        run.step(index, how)
    latents: Tensor = run.latents[0]
    return latents


def begun(transformer: Any, sigmas: Tensor) -> Any:
    model, embeds = import_module("mixed_model"), tiny_embeds(1)
    prompt = model.Prompted(
        text=transformer.context_embedder(embeds["prompt_embeds"]),
        pooled=embeds["pooled_prompt_embeds"],
    )
    subject = model.Subject(transformer=transformer, size=SIZE)
    return import_module("mixed_steps").Run(subject, prompt, noise(), sigmas)


def test_one_part_is_the_models_own_forward(transformer: Any) -> None:
    model, family = import_module("mixed_model"), FluxFamily()
    embeds, level = tiny_embeds(2), torch.tensor([0.4])
    tokens = torch.randn(2, 12, 4 * CHANNELS, generator=torch.Generator().manual_seed(0))
    ids = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)).abs()
    rows = family.embed_time(
        transformer, level, {"pooled_projections": embeds["pooled_prompt_embeds"]}
    )[0]
    text = transformer.context_embedder(embeds["prompt_embeds"])
    no_place = torch.zeros(text.shape[1], 3)
    rotary = transformer.pos_embed(torch.cat((no_place, ids)))
    expected = transformer(
        hidden_states=tokens,
        encoder_hidden_states=embeds["prompt_embeds"],
        pooled_projections=embeds["pooled_prompt_embeds"],
        timestep=level,
        img_ids=ids,
        txt_ids=no_place,
    ).sample
    for counts in ([12], [5, 7]):
        parts = [model.Part(count=count, rows=rows) for count in counts]
        found = model.token_velocity(transformer, tokens, text, parts, rotary)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_part_at_another_level_hears_of_it(transformer: Any) -> None:
    model, family = import_module("mixed_model"), FluxFamily()
    embeds = tiny_embeds(1)
    pooled = {"pooled_projections": embeds["pooled_prompt_embeds"]}
    high, low = family.embed_time(transformer, torch.tensor([0.9, 0.3]), pooled)
    tokens = torch.randn(1, 6, 4 * CHANNELS, generator=torch.Generator().manual_seed(0))
    text = transformer.context_embedder(embeds["prompt_embeds"])
    rotary = transformer.pos_embed(torch.zeros(text.shape[1] + 6, 3))
    alike, apart = (
        model.token_velocity(
            transformer,
            tokens,
            text,
            [model.Part(count=2, rows=high), model.Part(count=4, rows=rows)],
            rotary,
        )
        for rows in (high, low)
    )
    # Both parts differ: the first sees the second, and the second is told another level.
    assert (alike - apart).abs().amax((0, 2)).min() > 1e-4


def test_coarse_steps_are_those_of_the_runtime() -> None:
    steps, pipeline = import_module("mixed_steps"), tiny_pipeline()
    names = ["4p", "p", "2p", "2p", "4p", "p"]
    latents = noise()
    packed = ops.pack(latents, 2)
    engine = ddit_rt.compile(
        pipeline, height=4 * SIZE[0], width=4 * SIZE[1], backend="eager", progress=False
    )
    expected = engine(
        **tiny_embeds(1),
        latents=packed,
        height=4 * SIZE[0],
        width=4 * SIZE[1],
        patch_policy=StaticPolicy(names),
        num_inference_steps=len(names),
        output_type="latent",
    )[0]
    levels = import_module("bench_mixed").noise_levels(pipeline.scheduler, len(names), 64)
    run = begun(pipeline.transformer, levels)
    for index, name in enumerate(names):
        run.step(index, steps.Step(multiple=int(name[:-1] or 1)))
    found = ops.pack(run.latents[0], 2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_guidance_joins_two_passes(transformer: Any) -> None:
    model, embeds = import_module("mixed_model"), tiny_embeds(2)
    text = transformer.context_embedder(embeds["prompt_embeds"])
    pooled = embeds["pooled_prompt_embeds"]
    subject = model.Subject(transformer=transformer, size=SIZE)

    def moved(rows: slice, guidance: float = 1.0) -> Tensor:
        prompt = model.Prompted(text=text[rows], pooled=pooled[rows], guidance=guidance)
        run = import_module("mixed_steps").Run(subject, prompt, noise(), SIGMAS)
        run.step(0, import_module("mixed_steps").FINE)
        change: Tensor = run.latents[0] - noise()
        return change

    first, second = moved(slice(0, 1)), moved(slice(1, 2))
    assert (first - second).abs().max() > 1e-3
    expected = second + 3 * (first - second)
    torch.testing.assert_close(moved(slice(0, 2), 3.0), expected, rtol=1e-4, atol=1e-5)


def test_all_regions_at_p_are_a_step_at_p(transformer: Any) -> None:
    steps = import_module("mixed_steps")
    expected = made(transformer, [steps.FINE] * 6)
    for value in steps.VALUES:
        # Corrected, the first step after one at p would keep that step's clean estimate.
        whole = steps.Step(multiple=2, share=1.0, value=value, corrected=False)
        found = made(transformer, [steps.FINE, whole, whole, steps.FINE, whole, whole])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=value)


def test_fewer_regions_at_p_run_fewer_tokens_and_change_the_picture(transformer: Any) -> None:
    steps = import_module("mixed_steps")
    fine = made(transformer, [steps.FINE] * 6)
    pictures = {}
    for value, corrected in product(steps.VALUES, (True, False)):
        half = steps.Step(multiple=2, share=0.5, value=value, corrected=corrected)
        picture = made(transformer, [steps.FINE, *[half] * 4, steps.FINE])
        assert picture.isfinite().all()
        assert (picture - fine).abs().max() > 1e-3
        pictures[value, corrected] = picture
    # No two ways to give a coarse region its value are the same.
    values = list(pictures.values())
    for place, one in enumerate(values):
        assert all((one - other).abs().max() > 1e-4 for other in values[:place])


def test_a_corrected_step_after_one_at_p_keeps_its_clean_estimate(transformer: Any) -> None:
    steps = import_module("mixed_steps")
    for value in ("matched", "anchor"):
        run = begun(transformer, SIGMAS)
        run.step(0, steps.FINE)
        before, now = run.latents[1], run.latents[0]
        run.step(1, steps.Step(multiple=2, share=0.5, value=value))
        # Both steps go straight to the same estimate, so they lie on one line.
        slope = (now - before) / (SIGMAS[1] - SIGMAS[0])
        expected = now + (SIGMAS[2] - SIGMAS[1]) * slope
        torch.testing.assert_close(run.latents[0], expected, rtol=1e-4, atol=1e-4, msg=value)


@pytest.mark.parametrize("value", ["matched", "anchor"])
def test_tokens_are_counted(transformer: Any, value: str) -> None:
    steps = import_module("mixed_steps")
    run = begun(transformer, SIGMAS)
    run.step(0, steps.FINE)
    assert run.tokens == 64
    run.step(1, steps.Step(multiple=2, share=0.25, value=value))
    assert run.tokens == 64 + 4 * 4 + 12  # of 16 regions four stay at p


def test_regions_with_the_largest_score_stay_at_p(transformer: Any) -> None:
    mixed = import_module("mixed_model")
    regions = mixed.Regions(transformer, SIZE, 2)
    torch.testing.assert_close(
        regions.tokens[:3], torch.tensor([[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13]])
    )
    history = [torch.zeros(1, CHANNELS, *SIZE) for _ in range(4)]
    history[0][:, :, 4:8, 4:8] = torch.randn(
        CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0)
    )
    scores = mixed.deviations(regions, history)
    assert int(scores.argmax()) == 5
    assert scores.count_nonzero() == 1
    # All of them are what the native scores take a quantile of.
    ring = torch.stack([noise(seed) for seed in range(4)])
    native = ops.patch_scores(ring, [4], 0.3)
    own = mixed.deviations(regions, list(ring)).quantile(0.3)
    torch.testing.assert_close(native[0, 0], own)


def test_a_linear_change_is_drawn_out_exactly(transformer: Any) -> None:
    mixed = import_module("mixed_model")
    regions = mixed.Regions(transformer, SIZE, 2)
    places = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    ramp = (3 * places[:, 0] - 2 * places[:, 1])[:, None]
    for anchor in ((0, 0), (1, 0), (1, 1)):
        own = regions.tokens[:, anchor[0] * 2 + anchor[1]]
        found = regions.spread(ramp[own], anchor).reshape(8, 8)
        # Beyond the outermost anchors there is nothing to draw a line through.
        rows = slice(anchor[0], 7 + anchor[0])
        columns = slice(anchor[1], 7 + anchor[1])
        torch.testing.assert_close(found[rows, columns], ramp.reshape(8, 8)[rows, columns])


@pytest.mark.slow
def test_quick_run_of_the_study_model_is_guided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("torchmetrics")
    bench, out = import_module("bench_mixed"), tmp_path / "mixed.json"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert bench.main(["--model", "study", "--quick", "--out", str(out)]) == 0
    report = json.loads(out.read_text(), parse_constant=pytest.fail)
    section, noise = report["sections"].values()
    assert section["scale"] == noise["scale"] == 3.5
    assert len({row["psnr"]["value"] for row in noise["rows"][1:]}) > 10
    assert not noise["verdicts"]
    rows = {row["name"]: row for row in section["rows"]}
    # Three steps at p before, two behind; of 16 regions of 4 x 4 tokens four stay at p.
    assert rows["mixed_4p_25_block_random"]["tokens"] == 5 * 256 + 3 * (4 * 16 + 12)
    assert {"fine", "fewer_steps", "static", "dynamic", "mixed", "control"} == {
        row["kind"] for row in rows.values()
    }
    assert "guidance 3.5" in import_module("tables").TABLES["mixed_study_cpu"](report)


@pytest.mark.slow
def test_quick_run_compares_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("torchmetrics")
    bench, out = import_module("bench_mixed"), tmp_path / "mixed.json"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert bench.main(["--quick", "--out", str(out)]) == 0
    report = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert list(report["sections"]) == ["captions_8", "captions_8_values"]
    others, values = (
        {row["name"]: row for row in section["rows"]} for section in report["sections"].values()
    )
    assert others["fine"]["tokens"] == values["fine"]["tokens"] == 8 * 256
    assert others["fewer_4"]["tokens"] == 4 * 256
    # Three steps at p before, two behind; of 64 regions 32 stay at p.
    assert values["every_50"]["tokens"] == 5 * 256 + 3 * (32 * 4 + 32)
    for section in report["sections"].values():
        rows = {row["name"]: row for row in section["rows"]}
        assert all(row["loop_ms"]["value"] > 0 for row in rows.values())
        kinds = ("mixed", "control", "oracle")
        names = {name for name, row in rows.items() if row["kind"] in kinds}
        assert {entry["name"] for entry in section["verdicts"]} == names
    text = import_module("tables").TABLES["mixed_cpu"](report)
    assert "full resolution" in text
    with pytest.raises(SystemExit):
        bench.main(["--quick"])


def test_plans_are_those_of_the_record() -> None:
    bench = import_module("bench_mixed")
    sections = {
        name: section
        for path in bench.RECORDS.values()
        for name, section in json.loads(path.read_text(encoding="utf-8"))["sections"].items()
    }
    plans = {
        "captions_24": bench.plans_beside_others(24),
        "captions_24_values": bench.plans_of_values(24),
        "study_50": list(bench.plans_of_study(50)),
        "study_50_noise": list(bench.plans_of_noise(50)),
    }
    assert plans.keys() == sections.keys()
    for name, own in plans.items():
        rows = {row["name"]: row for row in sections[name]["rows"]}
        assert {plan.name for plan in own} == rows.keys()
        for plan in own:
            made = plan.to_dict()
            assert made == {key: rows[plan.name][key] for key in made}


def test_verdicts_are_against_the_closest_plan_that_is_no_slower() -> None:
    verdicts = import_module("bench_mixed").verdicts

    def row(name: str, kind: str, ms: float, tokens: int, psnr: list[float]) -> dict[str, Any]:
        entry = {"value": sum(psnr) / len(psnr), "low": 0.0, "high": 0.0}
        shown = {"psnr": entry, "psnr_prompts": psnr, "loop_ms": {"value": ms}}
        shown |= {"signal": "change", "tokens": tokens}
        return {"name": name, "kind": kind, **shown}

    rows = [
        row("slow", "fewer_steps", 103, 40, [50, 50, 50]),
        row("equal", "fewer_steps", 101, 40, [30, 31, 32]),
        row("cheap", "static", 60, 90, [28, 31, 34]),
        row("x_change", "mixed", 100, 50, [31, 32, 33.5]),
        row("x_random", "control", 100, 50, [35, 31, 28]),
    ]
    (mixed, control) = verdicts(rows)
    assert mixed["any_time"]["rival"] == "equal"
    assert mixed["any_time"]["holds"] == "yes"
    assert mixed["any_time"]["speed"] == pytest.approx(1.01)
    assert mixed["any_tokens"]["rival"] == "slow"
    assert mixed["any_tokens"]["holds"] == "no"
    assert mixed["coarse_time"]["rival"] == "cheap"
    assert mixed["coarse_time"]["holds"] == "undecided"
    assert mixed["coarse_tokens"] is None
    assert mixed["control"]["rival"] == "x_random"
    assert control["control"] is None
