from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from extras import need
from strict_json import strict

from ddit_rt.lab.demo import model_path
from ddit_rt.lab.demo.prompts import held_out_prompts

_SHIFT = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
KINDS = [
    "fewer_steps",
    "magcache",
    "seacache",
    "first_block_cache",
    "static_cache",
    "static",
    "mixed",
    "spectral",
    "ddit",
    "planner",
]


def test_open_captions_of_the_demo_say_two_of_four_things() -> None:
    models = import_module("study_models")
    held_out, seen = models.captions_of(models.Setting(name="open"))
    assert len(held_out) >= 24
    for text, full in zip(held_out, held_out_prompts(), strict=True):
        assert set(text.split()) <= {*full.split(), "a", "an", "on"}
        assert text != full
    assert len(seen) >= 8
    assert models.captions_of(models.Setting(name="empty", captions="empty"))[0][0] == ""


@pytest.mark.parametrize("tokens", [256, 1024])
def test_a_setting_shifts_the_schedule_at_every_size(tokens: int) -> None:
    models = import_module("study_models")
    calculate = import_module("diffusers.pipelines.flux.pipeline_flux").calculate_shift
    pipeline = FluxPipeline.from_pretrained(model_path())
    for shift, half in ((0.5, 1 / 3), (2.0, 2 / 3), (1.0, 1 / 2)):
        models.model_of(models.Setting(name="shifted", shift=shift), pipeline)
        scheduler = pipeline.scheduler
        config = [scheduler.config[name] for name in _SHIFT]
        scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=calculate(tokens, *config))
        assert float(scheduler.sigmas[1]) == pytest.approx(half, abs=1e-6)
    # And back to the model's own, which hangs on the size.
    models.model_of(models.Setting(name="own"), pipeline)
    assert pipeline.scheduler.config["max_shift"] == 1.15


def test_a_study_model_that_is_not_there_names_what_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = import_module("study_models")
    monkeypatch.setattr(models, "MODEL", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="train_demo.py scenes all"):
        models.pipeline_of("study")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--order", "unknown"],
        ["--order", "demo: guidance 3.5", "--kinds", "magcache"],
        ["--order", "demo: guidance 3.5", "--levels", "1", "2", "3"],
        ["--order", "demo: guidance 3.5", "--levels", "1.5", "2"],
    ],
)
def test_what_cannot_be_compared_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        import_module("bench_study").parse(arguments)


def test_the_planner_is_compared_with_the_cheapest_way_to_its_closeness() -> None:
    def rows(*values: tuple[str, float, float]) -> list[dict[str, Any]]:
        return [
            {
                "kind": kind,
                "label": kind,
                "share": share,
                "psnr": {"value": psnr, "low": psnr, "high": psnr},
                "ssim": {"value": 0.9, "low": 0.9, "high": 0.9},
                "psnr_per_prompt": [psnr, psnr + (kind == "ddit")],
                "frechet": 0.25,
                "as_asked": None if kind == "static" else 0.5,
            }
            for kind, share, psnr in values
        ]

    levels = {
        "1.5": rows(("fewer_steps", 0.66, 30), ("static", 0.66, 40), ("ddit", 0.66, 40)),
        "2": rows(("fewer_steps", 0.5, 25), ("static", 0.5, 36), ("planner", 0.5, 38)),
        "3": rows(("fewer_steps", 0.33, 20), ("planner", 0.3, 35), ("magcache", 0.32, 50)),
        "5": rows(("fewer_steps", 0.2, 15), ("planner", 0.2, 60)),
    }
    entry = {
        "levels": levels,
        "prompts": ["a", "b"],
        "seeds": 2,
        "unit": "tokens",
        "two_seeds": {"psnr": {"value": 14.0}, "ssim": {"value": 0.5}},
        "full_resolution": {"frechet": 0.125, "as_asked": 0.75},
    }
    report = {"model": {"steps": 50}, "sections": {"order": {"a setting": entry}}}
    text = import_module("tables").TABLES["study_cpu"](report)
    # A static plan reaches 38 dB half way between 0.5 and 0.66, MagCache 35 dB at 0.32 or less, and
    # nothing 60.
    assert "at equal PSNR: 1.15x at 2x (a static plan), at most 1.07x at 3x (MagCache)." in text
    assert "DDiT is closer than the static plan on 50% at 1.5x of the prompts." in text
    assert "Fréchet distance 0.125. Full resolution shows what it is asked for in 75%." in text
    assert text.count("| 0.250 | 50% |") == 9
    assert text.count("| 0.250 |  |") == 2


def test_a_scene_shows_what_is_asked_if_it_shows_all_that_the_caption_names() -> None:
    models = import_module("study_models")
    scenes = models._scenes()
    assert scenes.said("three red fruits on stripes") == {
        "count": 2,
        "colour": scenes.COLOURS.index("red"),
        "noun": scenes.NOUNS.index("fruit"),
        "background": scenes.BACKGROUNDS.index("stripes"),
    }
    assert scenes.said("two blue fish").keys() == {"count", "colour", "noun"}
    assert scenes.said("something red").keys() == {"colour"}
    assert scenes.said("") == scenes.said("drawings") == {}
    for scene in scenes.all_scenes()[::7]:
        own = dict(zip(scenes.SCENE_SIZES, scene.labels, strict=True))
        for phrasing in range(scenes.PHRASINGS):
            said = scenes.said(scenes.phrase(scene, phrasing))
            assert said.items() <= own.items()


@pytest.mark.slow
def test_the_study_model_shows_what_is_asked() -> None:
    models = import_module("study_models")
    study = models.studied()
    captions = ["faces on stripes", "hearts on dots", "green", "checkers", "two faces", "rings"] * 4
    captions = [f"something {one}" if one == "green" else one for one in captions]
    images = study.pipeline(
        captions,
        negative_prompt=[""] * len(captions),
        true_cfg_scale=3.5,
        num_inference_steps=12,
        max_sequence_length=16,
        height=128,
        width=128,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    pixels = list(np.rint(images * 255).astype(np.uint8))
    right = models.shown_as_asked(pixels, captions)
    wrong = models.shown_as_asked(pixels, captions[1:] + captions[:1])
    assert sum(right) >= 12
    assert sum(wrong) <= 6
    assert all(models.shown_as_asked(pixels, [""] * len(captions)))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_quick_run_sets_every_kind_of_plan_beside_fewer_steps_at_its_cost(tmp_path: Path) -> None:
    need("torchmetrics")
    out, name = tmp_path / "quick.json", "demo: guidance 3.5"
    arguments = ["--quick", "--out", str(out), "--cache", str(tmp_path / "cache")]
    bench = import_module("bench_study")
    plot = tmp_path / "plot.png"
    assert bench.main([*arguments, "--order", name, "--plot", str(plot)]) == 0
    entry = strict(out)["sections"]["order"][name]
    assert list(entry["levels"]) == ["2", "1.5", "3"]
    assert entry["unit"] == "tokens"
    assert entry["full_resolution"]["frechet"] > 0
    assert entry["full_resolution"]["as_asked"] is None  # of the demo's captions
    for level, rows in entry["levels"].items():
        check_level(float(level), rows)
    assert plot.stat().st_size > 10_000
    # Another section, into the same file, with measured costs; what was drawn is found again.
    assert bench.main([*arguments, "--unit", "ms", "--curve", name]) == 0
    sections = strict(out)["sections"]
    assert sections["order"][name] == entry
    (rows,) = sections["curve"][name]["levels"].values()
    assert sections["curve"][name]["unit"] == "ms"
    assert [row["kind"] for row in rows][:1] == ["fewer_steps"]
    assert rows[0]["psnr"] == entry["levels"]["2"][0]["psnr"]
    text = import_module("tables").TABLES["study_cpu"](strict(out))
    assert f"**{name}**" in text
    assert "Not measured" not in text


def check_level(level: float, rows: list[dict[str, Any]]) -> None:
    kinds = [row["kind"] for row in rows]
    assert kinds == [kind for kind in KINDS if kind in kinds]
    assert {"fewer_steps", "static", "planner"} <= set(kinds)
    # Of 10 steps 4 compute whatever a static cache says: it cannot be three times as cheap.
    assert ("static_cache" in kinds) == (level < 3)
    fewer = rows[0]
    assert fewer["steps"] == round(10 / level)
    for row in rows:
        assert row["share"] <= 1 / level + 0.08  # steps are whole, and tau is found to 3%
        assert len(row["psnr_per_prompt"]) == 2
        assert row["frechet"] > 0
        if row is not fewer:
            gains = zip(row["psnr_per_prompt"], fewer["psnr_per_prompt"], strict=True)
            mean = sum(own - other for own, other in gains) / 2
            assert row["over_fewer"]["value"] == pytest.approx(mean)
            assert row["steps"] == 10 or row["kind"] == "planner"
    by_kind = {row["kind"]: row for row in rows}
    if "static_cache" in by_kind:
        assert "p reused" in by_kind["static_cache"]["steps_at"]
    if "static" in by_kind:
        assert set(by_kind["static"]["steps_at"]) - {"p"}
