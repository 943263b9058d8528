"""One model as teacher and student: off, LoRA changes nothing; unloading restores the model."""

from __future__ import annotations

import pytest
import torch
from models import noise, tiny_conditioning, tiny_transformer
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from ddit_rt.adapters import AdapterConfig
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.lab.train.student import Student
from ddit_rt.lab.train.velocities import States
from ddit_rt.models.flux import FluxFamily

FLUX = FluxFamily()
CONFIGS = tuple(AdapterConfig(patch=patch, rank=4, variant="snr") for patch in ("2p", "4p"))


def states_of(transformer) -> States:
    return States(
        latents=noise(2, 4, 16, 16),
        sigmas=torch.tensor([0.9, 0.4]),
        velocity=None,
        conditioning=tiny_conditioning(transformer, 2),
        earlier=None,
    )


def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
    student = Student(FLUX, tiny_transformer(), CONFIGS, checkpointing=checkpointing)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    errors = student.errors(states_of(student.transformer))
    torch.stack([error.mean() for error in errors.values()]).sum().backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def test_both_sizes_train_in_one_backward_pass_and_the_base_does_not() -> None:
    student = Student(FLUX, tiny_transformer(), CONFIGS)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert all(name.startswith("adapters.") or ".lora_" in name for name in trained)
    # A text stream's last feed-forward layer reaches no image token; all else does.
    found = gradients(checkpointing=False)
    assert {name for name in found if ".2p." in name and "lora" in name}
    assert {name for name in found if ".4p." in name and "lora" in name}
    assert set(found) <= trained


def test_gradient_checkpointing_changes_no_gradient() -> None:
    """Blocks are computed again with the LoRA that was on, whichever was switched on since."""
    plain, checkpointed = gradients(checkpointing=False), gradients(checkpointing=True)
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        assert torch.equal(value, checkpointed[name]), name


def test_unloading_gives_the_model_back() -> None:
    transformer = tiny_transformer().requires_grad_(True)
    before = {name: (p, p.detach().clone()) for name, p in transformer.named_parameters()}
    student = Student(FLUX, transformer, CONFIGS)
    student.errors(states_of(transformer))
    student.unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in transformer.modules())
    after = dict(transformer.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, value)
        assert parameter.requires_grad


def test_callers_random_numbers_are_left_alone() -> None:
    transformer = tiny_transformer()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    Student(FLUX, transformer, CONFIGS, seed=9)
    assert torch.equal(torch.rand(4), expected)


def test_seed_decides_the_initial_weights() -> None:
    first, again, other = (
        Student(FLUX, tiny_transformer(), CONFIGS, seed=seed).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_transformer_with_unfused_adapters_is_refused() -> None:
    transformer = tiny_transformer()
    style = LoraConfig(r=2, target_modules=["transformer_blocks.0.attn.to_q"])
    inject_adapter_in_model(style, transformer)
    with pytest.raises(UnsupportedModelError, match="not fused"):
        Student(FLUX, transformer, CONFIGS)
