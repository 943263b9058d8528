"""Training computes what the buckets compute."""

from __future__ import annotations

import pytest
import torch
from models import noise, tiny_conditioning, tiny_transformer

from ddit_rt.adapters import AdapterConfig, adapter_bucket
from ddit_rt.lab.train.student import Student
from ddit_rt.lab.train.velocities import Earlier, States, coarse_velocity, taught, teacher
from ddit_rt.models.flux import FluxFamily
from ddit_rt.steps import Detail, FineBucket, Pass, RunContext, SnrBucket

FLUX = FluxFamily()
SIGMAS = (0.9, 0.8, 0.7)
# The time embeddings of a whole table and of a batch are matrix products of other shapes.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def student_of(variant: str) -> Student:
    """A student whose adapters do something."""
    config = AdapterConfig(patch="2p", rank=4, lora_alpha=8, variant=variant)
    student = Student(FLUX, tiny_transformer(), (config,))
    with torch.no_grad():
        for index, parameter in enumerate(student.parameters()):
            if parameter.requires_grad:
                parameter.add_(noise(*parameter.shape, seed=index) * 0.05)
    return student


SIZES = [(16, 16), (18, 14)]  # the second is one that no patch divides


def context_of(
    student: Student, batch: int, *, detail: bool, size: tuple[int, int] = SIZES[0]
) -> RunContext:
    conditioning = tiny_conditioning(student.transformer, batch)
    sigmas = torch.tensor(SIGMAS)
    return RunContext(
        passes=(Pass.of(student.model, conditioning),),
        height=size[0],
        width=size[1],
        sigmas=sigmas,
        timesteps=sigmas,
        detail=Detail((batch, 4, *size), torch.device("cpu")) if detail else None,
    )


def states_of(context: RunContext, latents, step: int, earlier: Earlier | None = None) -> States:
    return States(
        latents=latents,
        sigmas=torch.full((len(latents),), SIGMAS[step]),
        velocity=None,
        conditioning=context.passes[0].conditioning,
        earlier=earlier,
    )


@torch.no_grad()
def test_teacher_is_the_fine_bucket() -> None:
    student = student_of("snr")
    context, latents = context_of(student, 2, detail=False), noise(2, 4, 16, 16)
    expected = FineBucket(student.model, context).velocity(latents, torch.tensor([1]))
    found = teacher(
        student.model, latents, torch.full((2,), SIGMAS[1]), context.passes[0].conditioning
    )
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", ["paper", "snr"])
def test_velocity_without_a_past_is_the_buckets(variant: str, size: tuple[int, int]) -> None:
    student = student_of(variant)
    context, latents = context_of(student, 2, detail=False, size=size), noise(2, 4, *size)
    bucket = adapter_bucket(student.model, context, student.adapter(2), student.runners(2))
    states = states_of(context, latents, 1)
    found = coarse_velocity(student.model, states, 2, student.adapter(2), student.runners(2))
    torch.testing.assert_close(found, bucket.velocity(latents, torch.tensor([1])), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "last", "adapted"),
    [
        (SIZES[0], 1, True),
        (SIZES[0], 2, True),
        (SIZES[0], 1, False),
        (SIZES[1], 2, False),
        (SIZES[1], 2, True),
    ],
)
def test_velocity_with_a_past_is_the_buckets(
    size: tuple[int, int], last: int, adapted: bool
) -> None:
    """A step at p, then coarse ones: the bucket's memory against the state's own past."""
    student = student_of("snr")
    context = context_of(student, 2, detail=True, size=size)
    adapter = student.adapter(2) if adapted else None
    runners = student.runners(2) if adapted else student.model.base
    fine = FineBucket(student.model, context)
    coarse = (
        SnrBucket(student.model, context, 2)
        if adapter is None
        else adapter_bucket(student.model, context, adapter, runners)
    )
    latents = [noise(2, 4, *size, seed=seed) for seed in range(3)]
    fine.velocity(latents[0], torch.tensor([0]))
    for step in range(1, last + 1):
        expected = coarse.velocity(latents[step], torch.tensor([step]))
    earlier = Earlier(
        used=torch.tensor([True, True]),
        latents=latents[0],
        sigmas=torch.full((2,), SIGMAS[0]),
        velocity=fine.velocity(latents[0], torch.tensor([0])).float(),
        first_latents=latents[1],
        first_sigmas=torch.full((2,), SIGMAS[1]),
    )
    states = taught(student.model, states_of(context, latents[last], last, earlier))
    found = coarse_velocity(student.model, states, 2, adapter, runners)
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_states_after_a_step_at_p_lie_where_it_leads() -> None:
    student = student_of("snr")
    context, latents = context_of(student, 2, detail=False), noise(2, 4, 16, 16)
    before, sigmas = noise(2, 4, 16, 16, seed=1), torch.full((2,), SIGMAS[0])
    earlier = Earlier(
        used=torch.tensor([True, False]),
        latents=before,
        sigmas=sigmas,
        velocity=None,
        first_latents=None,
        first_sigmas=torch.full((2,), SIGMAS[1]),
    )
    states = taught(student.model, states_of(context, latents, 2, earlier))
    velocity = teacher(student.model, before, sigmas, context.passes[0].conditioning)[0]
    assert states.earlier is not None
    assert states.earlier.velocity is not None
    assert states.earlier.first_latents is not None
    torch.testing.assert_close(states.earlier.velocity[0], velocity, **CLOSE)
    for found, step in ((states.earlier.first_latents, 1), (states.latents, 2)):
        expected = before[0] + (SIGMAS[step] - SIGMAS[0]) * velocity
        torch.testing.assert_close(found[0], expected, **CLOSE)
    assert torch.equal(states.latents[1], latents[1])
    expected = teacher(student.model, states.latents, states.sigmas, context.passes[0].conditioning)
    assert torch.equal(states.velocity, expected)


@torch.no_grad()
def test_unused_past_changes_nothing() -> None:
    student = student_of("snr")
    context, latents = context_of(student, 2, detail=False), noise(2, 4, 16, 16)
    unused = Earlier(
        used=torch.tensor([False, False]),
        latents=noise(2, 4, 16, 16, seed=1),
        sigmas=torch.full((2,), SIGMAS[0]),
        velocity=None,
        first_latents=None,
        first_sigmas=torch.full((2,), SIGMAS[1]),
    )
    velocities = [
        coarse_velocity(
            student.model,
            taught(student.model, states_of(context, latents, 1, earlier)),
            2,
            student.adapter(2),
            student.runners(2),
        )
        for earlier in (None, unused)
    ]
    assert torch.equal(*velocities)
