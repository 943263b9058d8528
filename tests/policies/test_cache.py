"""Step caches as tables: against diffusers' MagCache, closed forms, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddit_rt import MagCache, NoCache, SeaCache, StaticCache, StepCache, TeaCache, ops
from ddit_rt.policies import (
    CacheFit,
    CacheModel,
    CacheTable,
    nearest_ratios,
    published_fits,
    step_cache_from_dict,
)

FLUX_DEV: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "guidance_embeds": True,
}


def model(
    steps: int,
    *fits: CacheFit,
    changes: Sequence[float] | None = None,
    projected: Sequence[float] | None = None,
) -> CacheModel:
    both = {False: changes, True: projected}
    return CacheModel(
        name="Tiny",
        steps=steps,
        fits=fits,
        time_changes=None if changes is None else lambda ret: both[ret] or (),
    )


def run(table: CacheTable) -> str:
    """`c` and `r` per step of a run at one size, by the op."""
    increments, coefficients = table.tensors()
    state, memory = torch.tensor([0, 0, 0, 0], dtype=torch.int32), torch.zeros(3)
    record = torch.zeros(len(increments), 2)
    pattern = ""
    for step in range(len(increments)):
        state[1], state[3] = step + 1, 0
        ops.decide_reuse_(
            torch.zeros(0), increments, coefficients, state, memory, record, step, 3,
            table.threshold, table.limit, table.growth,
        )  # fmt: skip
        pattern += "r" if int(state[3]) else "c"
    return pattern


def diffusers_mag_cache(ratios: Tensor, cache: MagCache, steps: int) -> str:
    """The pattern of diffusers' own hooks on a model of one block that counts its calls."""
    from diffusers.hooks import mag_cache
    from diffusers.hooks.hooks import StateManager

    config = mag_cache.MagCacheConfig(
        threshold=cache.threshold,
        max_skip_steps=cache.max_skip_steps,
        retention_ratio=cache.retention_ratio,
        num_inference_steps=steps,
        mag_ratios=ratios,
    )
    manager = StateManager(mag_cache.MagCacheState, (), {})
    manager.set_context(mag_cache.CacheContext(name="test"))
    head = mag_cache.MagCacheHeadHook(manager, config)
    head._metadata = _Metadata()
    ran: list[int] = []
    head.fn_ref = _Reference(ran)
    state, pattern = manager.get_state(), ""
    for _ in range(steps):
        before = len(ran)
        head.new_forward(torch.nn.Identity(), torch.zeros(1, 2, 3))
        pattern += "c" if len(ran) > before else "r"
        state.previous_residual = torch.zeros(1, 2, 3)
        state.step_index += 1
    return pattern


class _Metadata:
    hidden_states_argument_name = "hidden_states"
    return_encoder_hidden_states_index = None

    def _get_parameter_from_args_kwargs(self, _: str, args: Any, kwargs: Any) -> Tensor:
        result: Tensor = args[0]
        return result


class _Reference:
    def __init__(self, ran: list[int]) -> None:
        self._ran = ran

    def original_forward(self, hidden: Tensor) -> Tensor:
        self._ran.append(1)
        return hidden


@pytest.mark.parametrize("steps", [28, 50, 8, 1])
@pytest.mark.parametrize(
    ("threshold", "skips", "retention"), [(0.06, 3, 0.2), (0.24, 5, 0.1), (0.12, 1, 0.0), (0, 3, 0)]
)
def test_mag_cache_equals_diffusers_hooks(
    steps: int, threshold: float, skips: int, retention: float
) -> None:
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    cache = MagCache(
        threshold=threshold,
        max_skip_steps=skips,
        retention_ratio=retention,
        mag_ratios=FLUX_MAG_RATIOS.tolist(),
    )
    resolved = cache.resolve(model(steps))
    assert run(resolved) == diffusers_mag_cache(FLUX_MAG_RATIOS, cache, steps)


def test_mag_cache_reuses_at_its_threshold() -> None:
    """The error 0.5 is exact in binary: at the threshold diffusers reuses, just above not."""
    for threshold, expected in ((0.5, "cr"), (0.4999999, "cc")):
        cache = MagCache(threshold=threshold, retention_ratio=0, mag_ratios=(1.0, 1.5))
        assert run(cache.resolve(model(2))) == expected


@pytest.mark.parametrize("steps", [1, 2, 5, 28, 29, 50, 100])
def test_ratios_for_other_steps_are_those_of_diffusers(steps: int) -> None:
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, nearest_interp

    expected = nearest_interp(FLUX_MAG_RATIOS, steps).tolist()
    assert list(nearest_ratios(FLUX_MAG_RATIOS.tolist(), steps)) == expected


def test_tea_cache_of_a_signal_leaves_increments_to_it() -> None:
    resolved = TeaCache(0.4, coefficients=(2, 0.5)).resolve(model(5))
    table = resolved
    assert table.coefficients == (2.0, 0.5)
    assert [math.isnan(value) for value in table.increments] == [True, False, False, False, True]
    assert [table.signalled(step) for step in range(5)] == [False, True, True, True, False]


def test_tea_cache_of_the_time_is_a_table() -> None:
    changes = [0.0, 0.1, 0.2, 0.1, 0.3, 0.1]
    resolved = TeaCache(0.35, coefficients=(1, 1, 0)).resolve(model(6, changes=changes))
    table = resolved
    assert table.coefficients == ()
    assert table.increments[1:-1] == pytest.approx([0.11, 0.24, 0.11, 0.39])
    assert run(table) == "crcrcc"


def test_use_ret_steps_takes_the_projected_signal_and_its_own_forced_steps() -> None:
    fit = CacheFit(kind="teacache-ret", values=(1.0, 0.0), source="a test")
    resolved = TeaCache(0.25, use_ret_steps=True).resolve(
        model(9, fit, changes=[9.0] * 9, projected=[0.1] * 9)
    )
    assert run(resolved) == "cccccrrcr"
    assert resolved.note == "TeaCache 0.25, coefficients a test"


def test_first_and_last_may_be_chosen() -> None:
    cache = TeaCache(9.0, coefficients=(1.0, 0.0), first=2, last=0)
    assert run(cache.resolve(model(5, changes=[0.0] * 5))) == "ccrrr"


def test_a_fit_of_the_model_comes_before_a_published_one() -> None:
    own = CacheFit(kind="teacache", values=(7.0,), source="measured")
    other = CacheFit(kind="teacache", values=(8.0,), source="published")
    assert TeaCache(0.1).resolve(model(4, own, other)).coefficients == (7.0,)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (
            TeaCache(0.1),
            r"no teacache coefficients for this Tiny.*calibrate ARTIFACT .*--cache tea",
        ),
        (MagCache(), r"no magcache ratios for this Tiny.*--cache magcache.*mag_ratios="),
    ],
)
def test_a_model_without_a_fit_is_refused(cache: TeaCache | MagCache, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache.resolve(model(4))


def test_a_fit_of_another_kind_is_no_fit_and_is_named() -> None:
    fit = CacheFit(kind="teacache", values=(1.0,), source="a test")
    with pytest.raises(ValueError, match=r"no teacache-ret .*only \['teacache'\]"):
        TeaCache(0.1, use_ret_steps=True).resolve(model(4, fit, changes=[0.0] * 4))


def test_use_ret_steps_without_a_time_signal_is_refused() -> None:
    with pytest.raises(ValueError, match="use_ret_steps=True for a Tiny"):
        TeaCache(0.1, coefficients=(1.0,), use_ret_steps=True).resolve(model(4))


def test_published_fits_are_keyed_by_the_model() -> None:
    found = published_fits("FluxTransformer2DModel", FLUX_DEV)
    assert {fit.kind for fit in found} == {"teacache", "magcache"}
    assert all("FLUX.1-dev" in fit.source for fit in found)
    assert found[0].values == (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
    for name, value in (("guidance_embeds", False), ("in_channels", 384), ("num_layers", 18)):
        assert published_fits("FluxTransformer2DModel", {**FLUX_DEV, name: value}) == ()
    assert published_fits("WanTransformer3DModel", FLUX_DEV) == ()


@pytest.mark.parametrize(
    ("layers", "heads", "width", "name"), [(30, 12, 8960, "1.3B"), (40, 40, 13824, "14B")]
)
def test_published_fits_of_wan(layers: int, heads: int, width: int, name: str) -> None:
    config = {
        "in_channels": 16,
        "out_channels": 16,
        "image_dim": None,
        "attention_head_dim": 128,
        "num_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": width,
    }
    found = published_fits("WanTransformer3DModel", config)
    assert [fit.kind for fit in found] == ["teacache", "teacache-ret"]
    assert all(name in fit.source for fit in found)
    assert published_fits("WanTransformer3DModel", {**config, "in_channels": 36}) == ()


@pytest.mark.parametrize(
    "cache",
    [
        NoCache(),
        TeaCache(0.4),
        TeaCache(0.07, coefficients=[1, 2, 3], first=2, last=0, use_ret_steps=True),
        MagCache(threshold=0.1, max_skip_steps=2, retention_ratio=0.3, mag_ratios=[1.0, 0.9]),
        MagCache(residual_order=1),
        SeaCache(0.3, power_exp=2.0, residual_order=0),
        StaticCache(2.5, first=1),
        StaticCache([True, False, True]),
    ],
)
def test_dict_and_back(cache: StepCache) -> None:
    assert step_cache_from_dict(json.loads(json.dumps(cache.to_dict()))) == cache


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TeaCache(-0.1), "threshold=-0.1"),
        (lambda: TeaCache(math.nan), "threshold=nan"),
        (lambda: TeaCache(0.1, coefficients=()), r"coefficients=\(\); expected at least 1 number"),
        (lambda: TeaCache(0.1, coefficients=(math.inf,)), r"coefficients\[0\]=inf"),
        (lambda: TeaCache(0.1, coefficients=(1.0,) * 8), "8 coefficients; at most 7"),
        (lambda: TeaCache(0.1, first=0), "first=0"),
        (lambda: TeaCache(0.1, last=-1), "last=-1"),
        (lambda: MagCache(max_skip_steps=0), "max_skip_steps=0"),
        (lambda: MagCache(retention_ratio=1.5), "retention_ratio=1.5"),
        (lambda: StaticCache(0.5), "plan=0.5; expected a finite number of at least 1"),
        (lambda: StaticCache("2"), "plan='2'; expected steps from one that computes"),
        (lambda: StaticCache(()), r"plan=\(\); expected steps from one"),
        (lambda: StaticCache((1, 0)), r"plan\[0\]=1"),
        (lambda: StaticCache(2, first=0), "first=0"),
        (lambda: StaticCache(2, residual_order=2), "residual_order=2"),
        (lambda: TeaCache(0.1, residual_order=True), "residual_order=True"),
        (lambda: MagCache(residual_order=-1), "residual_order=-1"),
        (lambda: SeaCache(-1.0), "threshold=-1.0"),
        (lambda: SeaCache(retention_steps=0), "retention_steps=0"),
        (lambda: SeaCache(max_consecutive_cached=-1), "max_consecutive_cached=-1"),
        (lambda: SeaCache(power_exp=0), "power_exp=0"),
        (lambda: CacheFit(kind="tea", values=(1.0,), source=""), "kind 'tea'"),
        (lambda: CacheFit(kind="teacache", values=(), source=""), "must be finite"),
        (lambda: step_cache_from_dict({"step_cache": "Tea"}), "known step caches are"),
        (lambda: step_cache_from_dict({"step_cache": "TeaCache", "tau": 1}), "bad fields"),
    ],
)
def test_refuses_with_what_came(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("cache", "pattern"),
    [
        (StaticCache(1), "cccccccccccc"),
        (StaticCache(1.5), "cccrccrccrcc"),
        (StaticCache(2), "cccrcrcrcrcc"),
        (StaticCache(3, first=1, last=2), "crrcrrcrrccc"),
        (StaticCache(99, first=1, last=0), "crrrrrrrrrrr"),
        (StaticCache([True, False] * 6, first=2, last=0), "cccrcrcrcrcr"),
    ],
)
def test_a_static_cache_is_its_plan(cache: StaticCache, pattern: str) -> None:
    resolved = cache.resolve(model(12))
    assert resolved.residual_order == 1
    assert run(resolved) == pattern


def test_a_sea_cache_is_a_signal_with_a_limit() -> None:
    resolved = SeaCache(0.3, retention_steps=2, max_consecutive_cached=0).resolve(model(5))
    assert [resolved.signalled(step) for step in range(5)] == [False, False, True, True, False]
    assert (resolved.coefficients, resolved.power_exp) == ((1.0, 0.0), 3.0)
    assert resolved.limit > 1000
    assert SeaCache().resolve(model(5)).limit == 2
    assert resolved.note == "SeaCache 0.3, residuals extrapolated"


@pytest.mark.parametrize("cache", [TeaCache(0.1, coefficients=(1.0,)), MagCache(mag_ratios=(1.0,))])
def test_published_caches_extrapolate_only_where_asked(cache: TeaCache | MagCache) -> None:
    plain, more = cache.resolve(model(4)), replace(cache, residual_order=1).resolve(model(4))
    assert plain.residual_order == 0
    assert str(replace(more, residual_order=0, note=plain.note)) == str(plain)
    assert more.note == plain.note + ", residuals extrapolated"
