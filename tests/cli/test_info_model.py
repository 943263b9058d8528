"""`ddit-rt info` of diffusers folders, from which it reads no weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import qwen_models
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel, WanPipeline
from models import tiny_pipeline
from wan_image_models import experts_pipeline, ti2v_pipeline
from wan_models import wan_pipeline

from ddit_rt.cli import main
from ddit_rt.engine.cost import step_cost
from ddit_rt.models import family_of
from ddit_rt.steps import StepModel


def saved(pipeline: Any, folder: Path) -> Path:
    """What `save_pretrained` writes, without the weights."""
    pipeline.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a FLUX pipeline."""
    return saved(tiny_pipeline(), tmp_path_factory.mktemp("flux"))


@pytest.mark.parametrize(
    ("make", "family", "passes", "text"),
    [
        (tiny_pipeline, "flux", 1, 512),
        (experts_pipeline, "wan-image", 2, 512),
        (ti2v_pipeline, "wan-ti2v", 2, 512),
        (partial(ti2v_pipeline, WanPipeline), "wan", 2, 512),
        (qwen_models.tiny_pipeline, "qwen-image", 1, 512),
    ],
)
def test_a_supported_pipeline_is_told_with_the_floor_of_every_size(
    make: Any,
    family: str,
    passes: int,
    text: int,
    tmp_path: Path,
    info: Any,
) -> None:
    pipeline = make()
    frames = {"num_frames": 5} if family.startswith("wan") else {}
    size = {"height": 128, "width": 192, **frames}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in size.items()]
    data = info(saved(pipeline, tmp_path / "model"), "--dtype=float32", *options)
    assert data["supported"] is True
    assert (data["family"], data["passes"], data["text_tokens"]) == (family, passes, text)
    assert data["driven"].startswith("the compiled loop")
    default, asked = data["sizes"]
    own = family_of(pipeline.transformer, pipeline)
    assert (default["height"], default["width"]) == own.default_size(pipeline)
    assert (asked["height"], asked["width"]) == (128, 192)
    model = StepModel(family=own, transformer=pipeline.transformer, base={})
    *frames, rows, columns = asked["latent"]
    for multiple, patch in ((1, "p"), (2, "2p")):
        cost = step_cost(
            model,
            height=rows,
            width=columns,
            multiple=multiple,
            batch=1,
            text_tokens=text,
            frames=frames[0] if frames else 0,
        )
        assert asked["costs"][patch] == {
            "flops": cost.flops,
            "weight_bytes": cost.weight_bytes,
            "image_tokens": cost.image_tokens,
            "text_tokens": text,
        }


def test_half_precision_halves_the_weights(flux: Path, info: Any) -> None:
    full, half = (info(flux, f"--dtype={dtype}") for dtype in ("float32", "bfloat16"))
    bytes_of = [one["sizes"][0]["costs"]["p"]["weight_bytes"] for one in (full, half)]
    assert bytes_of[0] == 2 * bytes_of[1]


def test_people_read_the_same(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(flux), "--height", "40", "--width", "24"]) == 0
    text = capsys.readouterr().out
    assert "supported    yes: family flux, FluxTransformer2DModel" in text
    assert "40 x 24: latent 10 x 6" in text
    assert "15 tokens" in text
    assert "4p is not offered at this size" in text


def test_a_scheduler_that_is_no_table_is_driven_by_the_pipelines_own_loop(
    tmp_path: Path, info: Any
) -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    data = info(saved(pipeline, tmp_path / "model"))
    assert data["driven"].startswith("the pipeline's own loop: ")
    assert "noise" in data["driven"]


def test_a_transformer_alone_has_no_pixels(
    flux: Path, info: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = info(flux / "transformer")
    assert (data["supported"], data["family"], data["sizes"]) == (True, "flux", [])
    assert main(["info", str(flux / "transformer"), "--height", "64"]) == 2
    assert "folder of the whole pipeline" in capsys.readouterr().err


def test_what_cannot_be_run_is_told_by_name(tmp_path: Path, info: Any) -> None:
    def reason(folder: Path) -> str:
        data = info(folder)
        assert data["supported"] is False
        assert data["sizes"] == []
        return str(data["problem"])

    PixArtTransformer2DModel(num_layers=1, num_attention_heads=1).save_config(tmp_path / "pixart")
    text = reason(tmp_path / "pixart")
    assert "got a PixArtTransformer2DModel; supported transformer classes" in text
    wan = wan_pipeline()
    wan.register_to_config(boundary_ratio=0.9)
    assert "boundary_ratio without a transformer_2" in reason(saved(wan, tmp_path / "half"))

    def written(name: str, **index: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        return folder

    unet = written("sd", _class_name="StableDiffusionPipeline", unet=["diffusers", "UNet"])
    assert reason(unet) == "StableDiffusionPipeline has no transformer"
    flux = {"transformer": ["diffusers", "FluxTransformer2DModel"]}
    control = written("control", _class_name="FluxControlPipeline", **flux)
    assert "got a FluxControlPipeline; for this transformer the supported" in reason(control)
    assert "transformer/config.json is missing" in reason(
        written("part", _class_name="FluxPipeline", **flux)
    )
    new = written("new", _class_name="NewPipeline", transformer=["diffusers", "NewTransformer"])
    assert "got a NewTransformer, which diffusers" in reason(new)
    quantised = saved(tiny_pipeline(), tmp_path / "quantised")
    config = json.loads((quantised / "transformer/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (quantised / "transformer/config.json").write_text(json.dumps(config))
    assert "quantised by bitsandbytes" in reason(quantised)


def test_a_folder_that_is_none_is_bad_input(
    tmp_path: Path, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(tmp_path)]) == 2
    assert "neither model_index.json of a pipeline nor config.json" in capsys.readouterr().err
    (tmp_path / "model_index.json").write_text("{", encoding="utf-8")
    assert main(["info", str(tmp_path)]) == 2
    assert "cannot be read as a JSON object" in capsys.readouterr().err
    assert main(["info", str(artifact), "--height", "64"]) == 2
    assert "got --height for an artifact" in capsys.readouterr().err
    assert main(["info", "demo", "--model", "demo"]) == 2
    assert "which is no artifact" in capsys.readouterr().err
