"""SPEED's rule: when a coarse beginning ends, by the spectrum of the latents."""

from __future__ import annotations

import math
from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from ddit_rt import DDiTPolicy, SpectralPolicy
from ddit_rt.errors import ShapeError
from ddit_rt.policies import (
    CacheFit,
    Schedule,
    parse_policy,
    published_spectrum,
)

WAN = {"out_channels": 16}


def flux(steps: int = 50, offered: tuple[int, ...] = (1, 2, 4), **more: Any) -> Schedule:
    """FLUX.1's noise levels at 1024 x 1024, as its pipeline sets them for 4096 tokens."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)], mu=1.15)
    return Schedule(sigmas=tuple(scheduler.sigmas.tolist()), offered=offered, **more)


def sizes(policy: SpectralPolicy, schedule: Schedule) -> list[int]:
    return [schedule.offered[bucket] for bucket in policy.resolve(schedule).forced]


@pytest.mark.parametrize(("delta", "coarse"), [(0.01, 18), (0.05, 28)])
def test_flux_switches_where_it_was_published_to(delta: float, coarse: int) -> None:
    assert sizes(SpectralPolicy(delta), flux()) == [2] * coarse + [1] * (50 - coarse)


def test_the_level_by_hand() -> None:
    # P = 8 / 8 = 1 at the highest frequency 8 / 2 of 2p, half of 16 / 2; d = 1/2:
    # t = 1 / (1 + sqrt(0.5 / (1 * 1.5))) = 0.634.
    schedule = Schedule(sigmas=(1.0, 0.64, 0.63, 0.2, 0.0), offered=(1, 2), size=(32, 16))
    policy = SpectralPolicy(0.5, amplitude=4.0, decay=1.0)
    assert sizes(policy, schedule) == [2, 2, 1, 1]
    note = "spectral policy, delta 0.5: 2p above 0.634; spectrum passed"
    assert policy.resolve(schedule).note == note


def test_it_begins_with_4p_where_that_is_wanted() -> None:
    plan = sizes(SpectralPolicy(0.05, coarsest="4p"), flux())
    assert plan == sorted(plan, reverse=True)
    assert set(plan) == {1, 2, 4}
    assert plan.count(1) == 22


def test_sizes_that_a_shape_does_not_offer_are_left_out() -> None:
    assert set(sizes(SpectralPolicy(0.05), flux(offered=(1, 4)))) == {1}
    assert "no coarse size" in SpectralPolicy(0.05).resolve(flux(offered=(1,))).note
    assert sizes(SpectralPolicy(0.05, coarsest="4p"), flux(offered=(1, 2))) == [2] * 28 + [1] * 22
    assert SpectralPolicy(coarsest="4p").sizes == {4}


def test_the_last_step_is_at_p() -> None:
    assert sizes(SpectralPolicy(0.9), flux(steps=2)) == [2, 1]
    assert sizes(SpectralPolicy(0.9), flux(steps=1)) == [1]


def test_a_larger_delta_is_never_slower() -> None:
    counts = [sizes(SpectralPolicy(d), flux()).count(2) for d in (0.001, 0.01, 0.02, 0.05, 0.1)]
    assert counts == sorted(counts)
    assert len(set(counts)) == 5


def test_the_spectrum_is_the_models_then_the_published_one() -> None:
    own = CacheFit(kind="spectrum", values=(1.0, 1.0), source="measured on this model: 2 prompts")
    measured = SpectralPolicy(0.05).resolve(flux(spectrum=own))
    assert measured.note.endswith("spectrum measured on this model: 2 prompts")
    assert measured.forced != SpectralPolicy(0.05).resolve(flux()).forced
    sources = {
        name: published_spectrum(name, config).source
        for name, config in (
            ("FluxTransformer2DModel", {}),
            ("WanTransformer3DModel", WAN),
            ("WanTransformer3DModel", {"out_channels": 48}),
            ("SD3Transformer2DModel", {}),
        )
    }
    assert sources["FluxTransformer2DModel"] == "published for the VAE of FLUX.1"
    assert sources["SD3Transformer2DModel"].endswith("FLUX.1, and not measured for this model's")
    assert published_spectrum("WanTransformer3DModel", WAN).values == (219.484718, 2.422687)


def test_audio_has_one_side() -> None:
    one_row, square = (flux(size=size) for size in ((1, 250), (250, 250)))
    assert one_row.highest == square.highest == 125


@pytest.mark.parametrize("text", ["spectral:", "spectral:fast", "spectral:0", "spectral:1"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"got patch_policy='{text}'; expected spectral:DELTA"):
        parse_policy(text, DDiTPolicy())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"delta": 0}, "delta=0"),
        ({"delta": 1.0}, "delta=1.0; expected a number above 0 and below 1"),
        ({"delta": math.nan}, "delta=nan"),
        ({"amplitude": 1.0}, "decay=None; pass both"),
        ({"amplitude": -1.0, "decay": 1.0}, "amplitude=-1.0"),
        ({"amplitude": 1.0, "decay": "2"}, "decay='2'"),
        ({"coarsest": "p"}, "coarsest='p'; expected a coarse size"),
        ({"coarsest": "3p"}, "coarsest='3p'"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        SpectralPolicy(**fields)


def test_a_size_that_was_not_compiled_is_refused_by_the_engine() -> None:
    from ddit_rt.planning.request import check_policy

    with pytest.raises(ShapeError, match="asks for 4p"):
        check_policy(SpectralPolicy(coarsest="4p"), [1, 2])
