"""Drawn values for every public argument: each is honoured, or refused by the argument's name.

What runs is compared with the same call in plain Python: a value is not taken for something else.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from models import noise, seeded, tiny_conditioning, tiny_embeds
from torch import Tensor

import ddit_rt
from ddit_rt import DDiTPolicy, Engine, FinePolicy, MagCache, StaticPolicy, TeaCache, TokenRanges
from ddit_rt.errors import DditError

hypothesis = pytest.importorskip("hypothesis", reason="pip install 'ddit_rt[test]'")
HealthCheck, given, settings = hypothesis.HealthCheck, hypothesis.given, hypothesis.settings
st = hypothesis.strategies

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# The same examples in every run, and no files: what fails here fails everywhere.
DRAWN = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
FEW = settings(DRAWN, max_examples=8)

ODD = [
    None,
    True,
    np.True_,
    10**30,
    -(10**30),
    math.nan,
    math.inf,
    1e300,
    np.int64(2),
    np.float32(0.5),
    np.float64("nan"),
    np.ones(2),
    np.ones((2, 2)),
    torch.tensor(2),
    torch.tensor(0.5),
    torch.tensor(True),
    torch.zeros(1, 2),
    torch.zeros(1, 7, 24),
    torch.zeros(1, 20, dtype=torch.float16),
    torch.zeros(1, 7, 24, dtype=torch.complex64),
    torch.zeros(2, device="meta"),
    torch.zeros((), device="meta"),
    3j,
    b"p",
    "",
    "p",
    "2p:0.5,p",
    "fine",
    "balanced",
    "nan",
    "0.5",
    "teacache:0.4",
    "none",
    "\0",
    "no/such/file",
    [],
    [None],
    [True, False],
    ["p"],
    ["a", "b"],
    [1.0, 0.5],
    [0.5, 1.0],
    [[1.0]],
    (0.0, 1.0),
    (0, 0.5),
    {},
    {"2p": 1e-3},
    {"p": None},
    {1},
    object(),
    int,
    FinePolicy,
    TeaCache,
    FinePolicy(),
    StaticPolicy(["p"] * 2),
    TeaCache(0.1, coefficients=(1.0, 0.0)),
    TokenRanges(),
    Path("no/such/file"),
]
ANY = st.one_of(
    st.sampled_from(ODD),
    st.integers(-3, 12),
    st.floats(-1, 2),
    st.text("pf0123.:,", max_size=4),
    st.lists(st.one_of(st.floats(-1, 2), st.sampled_from(["p", "2p", None, 2])), max_size=3),
)

ALSO: Mapping[str, str] = {
    "height": "pixels|latent",
    "width": "pixels|latent",
    "num_images_per_prompt": "batch size|prompt_embeds",
    "patch_policy": "the (static )?plan|the policy|presets and speeds",
    "step_cache": "coefficients|ratios",
    "ranges": "compiled range",
    "prompt": "a prompt",
    "guidance_interval": "classifier-free guidance",
}
"""What else a message may call an argument."""


def plain(value: Any) -> Any:
    """A number of numpy or torch as Python's own."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def outcome(run: Callable[[], Any], name: str) -> Any:
    """What came of it; None where it was refused as it should be."""
    try:
        return run()
    except (ValueError, TypeError, DditError) as error:
        text = f"{type(error).__name__}: {error}"
    assert re.search(f"{name}|{ALSO.get(name, name)}", text), f"{name} is not named: {text}"
    assert len(text) < 600
    return None


def picture(engine: Engine, name: str, value: Any) -> Tensor | None:
    """Latents of a short call."""
    fixed: dict[str, Any] = {"height": 32, "width": 32, "output_type": "latent"}
    if name != "sigmas":
        fixed["num_inference_steps"] = 2
    arguments = {**tiny_embeds(), **fixed, "generator": seeded(), name: value}
    result = engine(**arguments)
    images = getattr(result, "images", None)
    return images if isinstance(images, Tensor) else None


CALL_ARGUMENTS = [
    *(
        name
        for name in list(inspect.signature(FluxPipeline.__call__).parameters)[1:]
        if "ip_adapter" not in name and name != "negative_prompt_2"  # refused; as negative_prompt
    ),
    *("patch_policy", "step_cache", "guidance_interval"),
]


@pytest.mark.parametrize("name", CALL_ARGUMENTS)
@given(value=ANY)
@DRAWN
def test_call(flux: Engine, name: str, value: Any) -> None:
    if isinstance(value, type) and name.startswith("callback"):
        return  # a class can be called; what its own call makes of a step is not ours
    latents = outcome(lambda: picture(flux, name, value), name)
    if latents is None:
        return
    trace = flux.last_trace
    assert trace is not None
    assert len(trace) == (plain(value) if name == "num_inference_steps" else len(trace))
    if name == "num_images_per_prompt":
        assert len(latents) == plain(value)
    if name in ("height", "width", "guidance_scale", "max_sequence_length"):
        assert torch.equal(latents, picture(flux, name, plain(value)))
    if name in ("height", "width"):
        # FLUX rounds down to whole tokens, of 8 pixels with this VAE.
        assert latents.shape[1] == (4 * (plain(value) // 8) if value is not None else 16 * 16)


@pytest.mark.parametrize("name", ["num_frames", "height", "guidance_scale", "guidance_scale_2"])
@given(value=ANY)
@FEW
def test_call_for_a_video(wan: Engine, name: str, value: Any) -> None:
    fixed = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
    fixed |= {"output_type": "latent", "max_sequence_length": 8, name: value}
    outcome(lambda: wan("a cat", generator=seeded(), **fixed), name)


@pytest.mark.parametrize(
    "name",
    [
        *("latents", "scheduler", "num_inference_steps", "sigmas", "patch_policy", "step_cache"),
        *("callback", "guidance_interval", "encoder_hidden_states", "pooled_projections"),
        "true_cfg_scale",
    ],
)
@given(value=ANY)
@FEW
def test_bare_loop(bare: Engine, name: str, value: Any) -> None:
    if name == "callback" and isinstance(value, type):
        return
    transformer = bare._compiled.steps.transformer
    arguments = {"latents": noise(1, 4, 8, 8), **tiny_conditioning(transformer)}
    if name != "sigmas":
        arguments["num_inference_steps"] = 3
    if name != "patch_policy":
        arguments["patch_policy"] = FinePolicy()
    # One half of guidance alone is refused by the name of the other.
    named = "true_cfg_scale|negative_encoder" if name == "true_cfg_scale" else name
    outcome(lambda: bare.denoise(**{**arguments, name: value}), named)


@pytest.mark.parametrize(
    "name",
    [
        *("height", "width", "num_frames", "patch_sizes", "adapter", "patch_policy"),
        *("step_cache", "ranges", "backend", "executor", "progress"),
    ],
)
@given(value=ANY)
@FEW
def test_compile(flux: Engine, name: str, value: Any) -> None:
    arguments = {"backend": "eager", "progress": False, name: value}
    engine = outcome(lambda: ddit_rt.compile(flux.pipeline, **arguments), name)
    if engine is not None and name in ("height", "width") and value is not None:
        assert engine.artifact.manifest.pipeline_defaults == {name: plain(value)}


@pytest.mark.parametrize("name", ["path", "trust_code", "check_weights", "executor", "progress"])
@given(value=ANY)
@DRAWN
def test_load(flux: Engine, name: str, value: Any) -> None:
    arguments = {"path": "no/such.ddit", name: value}
    named = f"{name}|no such file|is not an artifact|is a file"
    outcome(lambda: ddit_rt.load(model=flux.pipeline, **arguments), named)


@given(value=ANY)
@DRAWN
def test_model(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="got a|pass a diffusers pipeline"):
        ddit_rt.compile(value)


@pytest.mark.parametrize("name", ["executor", "annotate", "batched_guidance", "artifact"])
@given(value=ANY)
@DRAWN
def test_attribute(flux: Engine, name: str, value: Any) -> None:
    before = getattr(flux, name)
    outcome(lambda: setattr(flux, name, value), name)
    assert getattr(flux, name) == before or getattr(flux, name) == plain(value)
    setattr(flux, name, before)


@given(value=ANY)
@DRAWN
def test_save(flux: Engine, value: Any) -> None:
    outcome(lambda: flux.save(value), "path|nothing was compiled")


FIELDS: Mapping[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "DDiTPolicy": (
        DDiTPolicy,
        (
            *("tau", "rho", "order", "warmup", "warmup_steps", "dwell", "monotone", "refresh"),
            *("fine_tail", "criterion", "step_exponent"),
        ),
    ),
    "StaticPolicy": (StaticPolicy, ("plan",)),
    "TeaCache": (
        lambda **given: TeaCache(**{"threshold": 0.1, **given}),
        ("threshold", "coefficients", "first", "last", "use_ret_steps"),
    ),
    "MagCache": (
        MagCache,
        ("threshold", "max_skip_steps", "retention_ratio", "mag_ratios"),
    ),
    "TokenRanges": (TokenRanges, ("batch", "image", "text", "sound")),
}


@pytest.mark.parametrize(("kind", "name"), [(k, name) for k in FIELDS for name in FIELDS[k][1]])
@given(value=ANY)
@DRAWN
def test_description(kind: str, name: str, value: Any) -> None:
    make = FIELDS[kind][0]
    named = f"{name}|the plan" if name == "plan" else name
    record = outcome(lambda: make(**{name: value}), named)
    if record is None:
        return
    stored = getattr(record, name)
    again = make(**{name: plain(value)})
    assert again == record
    assert stored is None or isinstance(stored, (bool, int, float, str, tuple, dict))
    if isinstance(stored, float):
        assert stored == pytest.approx(float(value))
