"""Whatever is loaded, set, unloaded and run, in whichever order, the base is never lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_files import (
    State,
    check_unchanged,
    eager,
    everything,
    factors,
    norms,
    run,
    speaking_pipeline,
    style,
    words,
)

pytest.importorskip("hypothesis", reason="pip install 'ddit_rt[test]'")
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

NAMES = st.sampled_from(["ink", "oil", "chalk"])
WEIGHTS = st.one_of(st.sampled_from([0, 1, -1]), st.floats(-2, 2, width=32))


def with_alphas(state: State) -> State:
    """The same at half the strength: alpha is half the rank."""
    layers = {name.rsplit(".lora_", 1)[0] for name in state}
    ranks = {one: state[f"{one}.lora_A.weight"].shape[0] for one in layers}
    return state | {f"{one}.alpha": torch.tensor(rank / 2) for one, rank in ranks.items()}


def files(pipeline: Any) -> list[State]:
    """Ranks 1, 4 and 16, layers in common and apart, both models, norms."""
    model = pipeline.transformer
    return [
        style(pipeline),
        with_alphas(factors("transformer", model, "attn.to_q", "ff.net.2", rank=1)),
        factors("transformer", model, "attn.to_q", "proj_mlp", rank=16, scale=0.1),
        words(pipeline) | norms(pipeline),
    ]


def changes(state: State, base: State) -> State:
    """What a file adds to each parameter, in float64, by definition."""
    found: State = {}
    for name, value in state.items():
        path = name.removesuffix(".lora_A.weight")
        if path != name:
            scale = float(state.get(f"{path}.alpha", value.shape[0])) / value.shape[0]
            found[f"{path}.weight"] = (
                scale * state[f"{path}.lora_B.weight"].double() @ value.double()
            )
        elif name in base:
            found[name] = value.double() - base[name].double()
    return found


class Anything(RuleBasedStateMachine):
    """One engine, and what its weights have to be."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.pipeline = speaking_pipeline().to(dtype)
        self.files = files(self.pipeline)
        self.engine = eager(self.pipeline)
        self.before = everything(self.pipeline)
        self.plain = run(self.engine)
        self.base = {k: v.clone() for k, v in self.parameters().items()}
        self.changes = [changes(one, self.base) for one in self.files]
        self.loaded: dict[str, int] = {}
        self.weights: dict[str, float] = {}

    def parameters(self) -> State:
        models = {name: getattr(self.pipeline, name) for name in ("transformer", "text_encoder")}
        return {
            f"{prefix}.{name}": one
            for prefix, model in models.items()
            for name, one in model.named_parameters()
        }

    @rule(name=NAMES, which=st.integers(0, 3), weight=WEIGHTS)
    def load(self, name: str, which: int, weight: float) -> None:
        if name in self.loaded:
            with pytest.raises(ValueError, match="is loaded already"):
                self.engine.load_lora(self.files[which], weight, name)
            return
        assert self.engine.load_lora(self.files[which], weight, name) == name
        self.loaded[name], self.weights[name] = which, weight

    @rule(weights=st.dictionaries(NAMES, WEIGHTS))
    def set(self, weights: dict[str, float]) -> None:
        if weights.keys() <= self.loaded.keys():
            self.engine.set_loras(weights)
            self.weights = weights
        else:
            with pytest.raises(ValueError, match="no LoRA named"):
                self.engine.set_loras(weights)

    @rule(name=NAMES | st.none())
    def unload(self, name: str | None) -> None:
        if name in self.loaded or name is None:
            self.engine.unload_loras(name)
            for gone in list(self.loaded) if name is None else [name]:
                del self.loaded[gone]
                self.weights.pop(gone, None)

    @rule()
    def run(self) -> None:
        assert torch.equal(run(self.engine), self.plain) or any(self.weights.values())

    @invariant()
    def the_weights_are_the_base_and_the_weighted_sum(self) -> None:
        for name, now in self.parameters().items():
            added = [
                (self.weights[key], self.changes[which][name])
                for key, which in self.loaded.items()
                if name in self.changes[which] and self.weights.get(key, 0)
            ]
            if not added:
                assert torch.equal(now, self.base[name]), name
                continue
            exact, size = self.base[name].double(), self.base[name].double().abs()
            for weight, change in added:
                exact = exact + weight * change
                # Ranks up to 16 and three terms: below 32 roundings of the largest part.
                size = size + abs(weight) * (change.abs() + 1)
            error = (now.double() - exact).abs()
            rounded = torch.finfo(now.dtype).eps / 2 * exact.abs()
            in_float32 = 32 * 2**-24 * size
            assert bool((error <= rounded + in_float32).all()), name

    def teardown(self) -> None:
        self.engine.unload_loras()
        check_unchanged(self.pipeline, self.before)
        assert torch.equal(run(self.engine), self.plain)


def check(dtype: torch.dtype, *, steps: int, examples: int) -> None:
    run_state_machine_as_test(
        lambda: Anything(dtype),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_short_sequence_is_always_the_base_and_the_weighted_sum(dtype: torch.dtype) -> None:
    check(dtype, steps=20, examples=1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_200_calls_end_at_the_base_to_the_bit(dtype: torch.dtype) -> None:
    check(dtype, steps=200, examples=3)
