"""Adapters on disk: PEFT's format, exact round trips, and refusals that show both values."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from models import noise, tiny_transformer
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddit_rt.adapters import (
    AdapterConfig,
    AdapterSet,
    PatchAdapter,
    load_adapters,
    save_adapters,
    untrained_lora,
)
from ddit_rt.errors import ArtifactError, ArtifactMismatchError
from ddit_rt.models.flux import FluxFamily

FLUX = FluxFamily()


def saved(folder: Path, variant: str = "paper") -> tuple[Path, PatchAdapter]:
    transformer = tiny_transformer()
    config = AdapterConfig(patch="2p", rank=4, lora_alpha=8, variant=variant)
    adapter = PatchAdapter.from_base(config, FLUX, transformer)
    adapter.lora = untrained_lora(FLUX, transformer, config)
    save_adapters(AdapterSet(adapters={2: adapter}), folder, FLUX, transformer)
    return folder, adapter


@pytest.mark.parametrize("variant", ["paper", "snr"])
def test_adapter_survives_the_disk(tmp_path: Path, variant: str) -> None:
    folder, adapter = saved(tmp_path, variant)
    loaded = load_adapters(folder, FLUX, tiny_transformer()).adapters[2]
    assert loaded.config == adapter.config
    for name, value in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert loaded.lora.keys() == adapter.lora.keys()
    for name, value in adapter.lora.items():
        assert torch.equal(loaded.lora[name], value)


def test_lora_part_loads_in_plain_peft(tmp_path: Path) -> None:
    folder, adapter = saved(tmp_path)
    model = PeftModel.from_pretrained(tiny_transformer(), str(folder / "2p"))
    state = model.state_dict()
    for name, value in adapter.lora.items():
        peft_name = "base_model.model." + name.replace(".weight", ".default.weight")
        assert torch.equal(state[peft_name], value)


def test_untrained_adapter_starts_from_the_base_model() -> None:
    """A bilinearly enlarged patch embeds as its original, and the residual starts at zero."""
    transformer = tiny_transformer()
    adapter = PatchAdapter.from_base(AdapterConfig(patch="2p", rank=4), FLUX, transformer)
    small = noise(1, 4, 2, 2)
    large = torch.nn.functional.interpolate(small, size=(4, 4), mode="bilinear")
    torch.testing.assert_close(
        adapter.embed_tokens(large.reshape(1, 1, -1)),
        transformer.x_embedder(small.reshape(1, 1, -1)),
        rtol=1e-4,
        atol=1e-5,
    )
    hidden = noise(1, 1, 32)
    written = adapter.project_tokens(hidden, large.reshape(1, 1, -1)).reshape(1, 4, 4, 4)
    base = transformer.proj_out(hidden).reshape(1, 4, 2, 2)
    expected = torch.nn.functional.interpolate(base, size=(4, 4), mode="bilinear")
    torch.testing.assert_close(written, expected, rtol=1e-4, atol=1e-5)


def test_every_part_of_a_fresh_adapter_can_train() -> None:
    """With both residual layers at zero, no gradient would ever reach either."""
    transformer = tiny_transformer()
    adapter = PatchAdapter.from_base(AdapterConfig(patch="2p", rank=4), FLUX, transformer)
    tokens = noise(1, 3, 64)
    for _ in range(2):
        output = adapter.project_tokens(adapter.embed_tokens(tokens), tokens)
        (output - 1).square().mean().backward()
        with torch.no_grad():
            for parameter in adapter.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.1 * parameter.grad)
    assert all(float(p.grad.abs().max()) > 0 for p in adapter.parameters() if p.grad is not None)


def test_folder_without_adapters_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no adapter"):
        load_adapters(tmp_path, FLUX, tiny_transformer())


def test_adapter_of_another_width_is_refused_with_both_shapes(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    wider = tiny_transformer(num_attention_heads=3)
    with pytest.raises(ArtifactMismatchError, match=r"\[32\], the model needs \[48\]"):
        load_adapters(folder, FLUX, wider)


def test_lora_of_another_rank_is_refused_with_both_shapes(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    file = folder / "2p" / "adapter_model.safetensors"
    tensors = {k: v[:3].contiguous() if "lora_A" in k else v for k, v in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(ArtifactMismatchError, match=r"\[3, \d+\], rank 4 on this layer needs \[4"):
        load_adapters(folder, FLUX, tiny_transformer())


def test_broken_file_is_named(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    file = folder / "2p" / "patch_adapter.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="missing or broken"):
        load_adapters(folder, FLUX, tiny_transformer())


def test_lora_layers_are_in_the_order_of_the_blocks_in_every_process(tmp_path: Path) -> None:
    """PEFT keeps a set, whose order differs with the hash seed: in the file and random draws."""
    folder, adapter = saved(tmp_path)
    config = json.loads((folder / "2p" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert not any("attn" in target for target in config["target_modules"])
    modules = [name for name, _ in tiny_transformer().named_modules()]
    in_order = [name for name in modules if name in config["target_modules"]]
    assert len(in_order) > 6
    assert config["target_modules"] == in_order
    assert list(adapter.lora)[::2] == [f"{name}.lora_A.weight" for name in in_order]


def test_adapter_of_another_base_model_is_refused_with_both_values(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    other = tiny_transformer(seed=1)
    found, wanted = (
        round(float(model.x_embedder.weight[0, 0]), 5) for model in (other, tiny_transformer())
    )
    with pytest.raises(ArtifactMismatchError, match=rf"begin \[{wanted}.*begin \[{found}"):
        load_adapters(folder, FLUX, other)
    assert load_adapters(folder, FLUX, other, check_base=False).names == ["2p"]


def test_base_model_is_known_again_in_another_dtype(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    loaded = load_adapters(folder, FLUX, tiny_transformer().to(torch.bfloat16))
    assert loaded.adapters[2].embed.weight.dtype == torch.bfloat16


def test_adapter_can_be_stored_in_half_the_size(tmp_path: Path) -> None:
    transformer = tiny_transformer()
    adapter = PatchAdapter.from_base(AdapterConfig(patch="2p", rank=4), FLUX, transformer)
    adapters = AdapterSet(adapters={2: adapter})
    save_adapters(adapters, tmp_path, FLUX, transformer, dtype=torch.float16)
    stored = load_file(tmp_path / "2p" / "patch_adapter.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = load_adapters(tmp_path, FLUX, transformer).adapters[2]
    assert loaded.embed.weight.dtype == torch.float32


@pytest.mark.parametrize("variant", ["paper", "snr"])
def test_snr_adapter_of_a_version_that_averaged_is_announced(tmp_path: Path, variant: str) -> None:
    saved(tmp_path, variant)
    transformer = tiny_transformer()
    load_adapters(tmp_path, FLUX, transformer)  # any warning is an error
    path = tmp_path / "2p" / "patch_adapter.safetensors"
    with safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["ddit_rt_adapter"])
    del fields["small_image"]
    save_file(load_file(path), path, {"ddit_rt_adapter": json.dumps(fields)})
    said = r"trained on small images by 'mean'.*train it again"
    with pytest.warns(UserWarning, match=said) if variant == "snr" else nullcontext():
        load_adapters(tmp_path, FLUX, transformer)
