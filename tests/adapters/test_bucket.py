"""Buckets with an adapter: the untrained `snr` adapter is the training-free step exactly."""

from __future__ import annotations

import pytest
import torch
from models import noise, tiny_conditioning, tiny_embeds, tiny_pipeline, tiny_transformer

import ddit_rt
from ddit_rt.adapters import (
    AdapterConfig,
    AdapterSet,
    PatchAdapter,
    SnrAdapterBucket,
    untrained_lora,
)
from ddit_rt.models.flux import FluxFamily

FLUX = FluxFamily()


def snr_adapter(transformer, *, trained: bool = False) -> PatchAdapter:
    config = AdapterConfig(patch="2p", rank=4, lora_alpha=8, variant="snr")
    torch.manual_seed(0)
    adapter = PatchAdapter.from_base(config, FLUX, transformer).requires_grad_(False)
    adapter.lora = untrained_lora(FLUX, transformer, config)
    if trained:
        for index, parameter in enumerate(adapter.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=index) * 0.05)
        adapter.lora = {k: noise(*v.shape) * 0.1 for k, v in adapter.lora.items()}
    return adapter


def run(adapters: AdapterSet | None, policy: str, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    pipeline = tiny_pipeline()
    height, width = size
    engine = ddit_rt.compile(
        pipeline, height=height, width=width, adapter=adapters, backend="eager", progress=False
    )
    call = {"num_inference_steps": 10, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    return engine(
        **tiny_embeds(), **call, generator=generator, patch_policy=ddit_rt.StaticPolicy(policy)
    ).images


@pytest.mark.parametrize(
    ("policy", "size"), [("2p:0.6,p", (64, 64)), ("p:0.2,2p:0.3,p:0.2,2p:0.2,p", (72, 56))]
)
def test_untrained_snr_adapter_is_the_training_free_step(
    policy: str, size: tuple[int, int]
) -> None:
    """Bit for bit, with and without memory of a step at p, also where 2p does not divide."""
    adapters = AdapterSet(adapters={2: snr_adapter(tiny_transformer())})
    assert torch.equal(run(adapters, policy, size), run(None, policy, size))


def test_trained_snr_adapter_acts() -> None:
    adapters = AdapterSet(adapters={2: snr_adapter(tiny_transformer(), trained=True)})
    assert not torch.allclose(run(adapters, "2p:0.6,p"), run(None, "2p:0.6,p"), atol=1e-3)


def test_buckets_of_two_runs_list_tensors_of_equal_shapes() -> None:
    """A captured graph is given another run by copying that run's tensors into its own."""
    transformer = tiny_transformer()
    adapter = snr_adapter(transformer)
    first, second = (
        SnrAdapterBucket(*step_context(transformer, seed), adapter, {}) for seed in (1, 2)
    )
    shapes = [tuple(tensor.shape) for tensor in first.tensors()]
    assert shapes == [tuple(tensor.shape) for tensor in second.tensors()]


def step_context(transformer, seed: int):
    from ddit_rt.steps import Detail, Pass, RunContext, StepModel

    conditioning = tiny_conditioning(transformer, seed=seed)
    sigmas = torch.tensor([1.0, 0.5])
    model = StepModel(family=FLUX, transformer=transformer, base={})
    context = RunContext(
        passes=(Pass.of(model, conditioning),),
        height=16,
        width=16,
        sigmas=sigmas,
        timesteps=sigmas,
        detail=Detail((1, 4, 16, 16), torch.device("cpu")),
    )
    return model, context


def test_every_part_of_a_fresh_snr_adapter_can_train() -> None:
    """Zero outputs, but no pair of zeros in a row without another way in."""
    transformer = tiny_transformer()
    adapter = snr_adapter(transformer).requires_grad_(True)
    tokens, base = noise(1, 3, 128), noise(1, 3, 32)
    for _ in range(2):
        hidden = base + adapter.embed_tokens(tokens)
        own = transformer.proj_out(hidden)
        output = adapter.project_tokens(hidden, tokens)
        ((output - 1).square().mean() + (own - 1).square().mean()).backward()
        with torch.no_grad():
            for parameter in adapter.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.1 * parameter.grad)
    assert all(float(p.grad.abs().max()) > 0 for p in adapter.parameters() if p.grad is not None)
