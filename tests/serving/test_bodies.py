"""Bodies of requests, drawn: each becomes work for the engine, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from drawn import JSON, drawn, edited
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from served import config, tiny_engine, video_engine

from ddit_rt.serving.errors import ApiError
from ddit_rt.serving.jobs import Work
from ddit_rt.serving.requests import Reader
from ddit_rt.serving.schema import Generation, Video

WHOLE = {
    "prompt": "a fox",
    "size": "64x64",
    "seed": 7,
    "num_inference_steps": 4,
    "guidance_scale": 3.5,
    "patch_policy": {"tau": {"2p": 0.5}, "rho": 0.4},
    "step_cache": "none",
    "lora": {"name": "ink", "scale": 0.5},
}
POLICIES = st.text(alphabet="0123456789p:,.- efnidtcsay", max_size=16)


@pytest.fixture(scope="module")
def readers() -> dict[type[Any], Reader]:
    made = {Generation: tiny_engine(), Video: video_engine()}
    return {kind: Reader(engine, config()) for kind, engine in made.items()}


@drawn(200)
@given(data=st.data(), kind=st.sampled_from([Generation, Video]))
def test_every_body_is_work_or_is_refused(
    readers: dict[type[Any], Reader], data: Any, kind: type[Any]
) -> None:
    body = data.draw(edited(WHOLE) | JSON)
    if isinstance(body, dict) and data.draw(st.booleans()):
        name = data.draw(st.sampled_from(["patch_policy", "step_cache", "size"]))
        body |= {name: data.draw(POLICIES)}
        body.pop("lora", None)
    try:
        asked = kind.model_validate(body)
        work = readers[kind](asked)
    except ValidationError:
        return
    except ApiError as error:
        status = error.status
    else:
        assert isinstance(work, Work)
        assert len(work.seeds) == 1
        status = 200
    assert status < 500
