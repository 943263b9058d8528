"""Whole runs at tiny size."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from extras import need
from models import prompting_pipeline, tiny_transformer
from peft import PeftModel
from safetensors.torch import load_file

import ddit_rt
from ddit_rt.adapters import load_adapters
from ddit_rt.errors import ArtifactMismatchError, ShapeError, UnsupportedModelError
from ddit_rt.lab.train import DataConfig, OptimizerConfig, TrainConfig, TrainResult, train
from ddit_rt.lab.train.checkpoint import Checkpoints
from ddit_rt.lab.train.evaluate import TRAINED, TRAINING_FREE, UNTRAINED
from ddit_rt.models.flux import FluxFamily

need("tensorboard")

FLUX = FluxFamily()
CONFIG = TrainConfig(
    rank=4,
    steps=6,
    batch_size=4,
    optimizer=OptimizerConfig(lr=2e-3, warmup_steps=2, ema=0.5),
    sample_every=0,
    checkpoint_every=2,
    log_every=2,
)

# A random model makes nothing of a small image: there the training-free step is worse than the
# paper's initialisation, and a few steps do not change that.
pytestmark = pytest.mark.filterwarnings("ignore:after .* leave the adapter out")


def run(
    pipeline: FluxPipeline, data: DataConfig, out: Path, config: TrainConfig, **options
) -> TrainResult:
    options = {"gain_prompts": [], **options}
    return train(pipeline, data, config, out, progress=False, **options)


def files(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}/{path.name}/{name}": value
        for path in sorted(folder.glob("*p/*.safetensors"))
        for name, value in load_file(path).items()
    }


@pytest.mark.parametrize("variant", ["snr", "paper"])
def test_loss_falls_and_the_base_stays_bit_for_bit(
    variant: str, pipeline: FluxPipeline, own_data: DataConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, variant=variant, steps=25)
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    result = run(pipeline, own_data, tmp_path / "out", config)
    untrained = result.losses[TRAINING_FREE if variant == "snr" else UNTRAINED]
    for multiple, loss in result.losses[TRAINED].items():
        assert loss < 0.95 * untrained[multiple]
    after = pipeline.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_killed_run_ends_as_the_unbroken_one(
    optimizer: str,
    pipeline: FluxPipeline,
    own_data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit: weights, optimizer, average and the data that follow."""
    if optimizer == "prodigy":
        need("prodigyopt")
    settings = OptimizerConfig(name=optimizer, warmup_steps=2, ema=0.5)
    config = dataclasses.replace(CONFIG, optimizer=settings, steps=4, accumulate=2)
    cache = tmp_path / "cache"
    run(pipeline, own_data, tmp_path / "unbroken", config, cache=cache)

    saved = Checkpoints.save

    def killed(self: Checkpoints, accelerator: object, step: int) -> None:
        saved(self, accelerator, step)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(pipeline, own_data, tmp_path / "broken", config, cache=cache)
    assert not files(tmp_path / "broken")
    resumed = run(prompting_pipeline(), own_data, tmp_path / "broken", config, cache=cache)
    assert resumed.seconds_per_step is not None
    expected, found = files(tmp_path / "unbroken"), files(tmp_path / "broken")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_checkpoints_hold_no_base_weights_and_a_finished_run_is_only_written_again(
    pipeline: FluxPipeline, own_data: DataConfig, tmp_path: Path
) -> None:
    run(pipeline, own_data, tmp_path / "out", CONFIG)
    folders = sorted((tmp_path / "out" / "run" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000004", "step-000006"]
    names = load_file(folders[-1] / "trainable.safetensors").keys()
    assert all(name.startswith("adapters.") or ".lora_" in name for name in names)
    assert not list(folders[-1].glob("model*"))
    first = files(tmp_path / "out")
    again = run(pipeline, own_data, tmp_path / "out", CONFIG)
    assert again.seconds_per_step is None
    assert all(torch.equal(first[name], value) for name, value in files(tmp_path / "out").items())


def test_run_with_other_settings_is_refused_with_both_values(
    pipeline: FluxPipeline, own_data: DataConfig, tmp_path: Path
) -> None:
    run(pipeline, own_data, tmp_path / "out", CONFIG)
    other = dataclasses.replace(CONFIG, rank=8)
    with pytest.raises(ValueError, match=r"train.rank: 4 there, 8 now"):
        run(pipeline, own_data, tmp_path / "out", other)
    result = run(pipeline, own_data, tmp_path / "out", other, restart=True)
    assert result.seconds_per_step is not None


def test_folder_loads_in_the_runtime_and_in_peft(
    pipeline: FluxPipeline, own_data: DataConfig, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(pipeline, own_data, out, CONFIG, save_dtype=torch.bfloat16)
    adapters = load_adapters(out, FLUX, pipeline.transformer)
    assert adapters.names == ["2p", "4p"]
    peft_model = PeftModel.from_pretrained(tiny_transformer(), str(out / "2p"))
    state = peft_model.state_dict()
    for name, value in adapters.adapters[2].lora.items():
        peft_name = "base_model.model." + name.replace(".weight", ".default.weight")
        assert torch.equal(state[peft_name], value)
    engine = ddit_rt.compile(
        prompting_pipeline(), height=64, width=64, adapter=out, backend="eager", progress=False
    )
    engine("a fox", num_inference_steps=5, patch_policy=ddit_rt.StaticPolicy("2p:0.4,p"))
    assert engine.last_trace is not None
    assert engine.last_trace.patch_sizes() == ["2p", "2p", "p", "p", "p"]
    with pytest.raises(ArtifactMismatchError, match="made for a base model whose embedding"):
        load_adapters(out, FLUX, tiny_transformer(seed=1))


def test_gain_samples_logs_and_card_are_written(
    pipeline: FluxPipeline, own_data: DataConfig, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = dataclasses.replace(CONFIG, steps=2, sample_every=2, variant="paper")
    data = dataclasses.replace(own_data, sampling_steps=6)
    result = run(pipeline, data, out, config, gain_prompts=["a cat", "a cow"])
    assert [(gain.patch, gain.prompts) for gain in result.gains] == [
        ("2p", 2),
        ("2p", 2),
        ("4p", 2),
        ("4p", 2),
    ]
    assert set(result.gains[0].psnr) == {TRAINING_FREE, UNTRAINED, TRAINED}
    samples = [path.name for path in (out / "run" / "samples").iterdir()]
    assert samples == ["step-000002.png"]
    assert list((out / "run" / "logs").rglob("events.out.tfevents.*"))
    card = (out / "README.md").read_text()
    assert f"| 2p | {result.gains[0].plan} | {result.gains[0].psnr[TRAINING_FREE]:.1f} |" in card
    assert "library_name: peft" in card
    assert "6 samples of the model's own trajectories" in card


def test_images_train_too(pipeline: FluxPipeline, image_folder: Path, tmp_path: Path) -> None:
    data = DataConfig(kind="folder", source=str(image_folder), height=64, width=64)
    config = dataclasses.replace(CONFIG, weighting="clean", gradient_checkpointing=True)
    result = run(pipeline, data, tmp_path / "out", config)
    assert result.samples == 3
    assert sorted(line.partition(":")[0] for line in result.skipped) == ["broken.png", "silent.png"]
    index = json.loads((tmp_path / "out" / "run" / "cache" / "index.json").read_text())
    assert index["skipped"] == result.skipped


def test_bfloat16_model_trains_float32_adapters(
    pipeline: FluxPipeline, own_data: DataConfig, tmp_path: Path
) -> None:
    pipeline.to(torch.bfloat16)
    run(pipeline, own_data, tmp_path / "out", CONFIG)
    assert {value.dtype for value in files(tmp_path / "out").values()} == {torch.float32}
    assert pipeline.transformer.dtype == torch.bfloat16


def test_too_high_a_learning_rate_is_said_loudly(
    pipeline: FluxPipeline, own_data: DataConfig, tmp_path: Path
) -> None:
    wild = OptimizerConfig(lr=3.0, warmup_steps=0, schedule="constant")
    config = dataclasses.replace(CONFIG, optimizer=wild)
    with pytest.warns(UserWarning, match="training has made it worse"):
        result = run(pipeline, own_data, tmp_path / "out", config)
    assert result.warnings


def test_size_that_the_model_cannot_make_is_refused(
    pipeline: FluxPipeline, own_data: DataConfig, tmp_path: Path
) -> None:
    data = dataclasses.replace(own_data, width=4)
    with pytest.raises(ShapeError, match="smallest image is 8 x 8"):
        run(pipeline, data, tmp_path / "out", CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "snr"])
def test_trains_at_a_size_that_no_patch_divides(
    pipeline: FluxPipeline, own_data: DataConfig, tmp_path: Path, variant: str
) -> None:
    """Latents of 18 x 14."""
    data = dataclasses.replace(own_data, height=72, width=56)
    config = dataclasses.replace(CONFIG, variant=variant)
    losses = run(pipeline, data, tmp_path / "out", config).losses["trained"]
    assert all(math.isfinite(value) for value in losses.values())


def test_model_of_another_class_is_refused(own_data: DataConfig, tmp_path: Path) -> None:
    pipeline = prompting_pipeline()
    pipeline.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match="got a Linear"):
        run(pipeline, own_data, tmp_path / "out", CONFIG)
