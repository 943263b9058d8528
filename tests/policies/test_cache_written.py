from __future__ import annotations

import pytest

from ddit_rt import (
    FirstBlockCache,
    MagCache,
    NoCache,
    SeaCache,
    StaticCache,
    StepCache,
    TeaCache,
)
from ddit_rt.policies import parse_step_cache


@pytest.mark.parametrize(
    ("text", "cache"),
    [
        ("teacache:0.4", TeaCache(0.4)),
        ("teacache-ret:0.1", TeaCache(0.1, use_ret_steps=True)),
        ("magcache:0.06", MagCache(0.06)),
        ("magcache:0.06:1", MagCache(0.06, residual_order=1)),
        ("teacache-ret:0.1:0", TeaCache(0.1, use_ret_steps=True)),
        ("seacache:0.2", SeaCache(0.2)),
        ("seacache:0.2:0", SeaCache(0.2, residual_order=0)),
        ("firstblockcache:0.1", FirstBlockCache(0.1)),
        ("firstblockcache:0.1:1", FirstBlockCache(0.1, residual_order=1)),
        ("static:1.5", StaticCache(1.5)),
        ("static:2:0", StaticCache(2, residual_order=0)),
        (" none ", NoCache()),
    ],
)
def test_texts_and_their_caches(text: str, cache: StepCache) -> None:
    assert parse_step_cache(text) == cache


@pytest.mark.parametrize(
    "text",
    [
        *("", "teacache", "teacache:", "teacache:fast", "teacache:nan", "magcache:-1", "none:1"),
        *("fb:1", "static:0.5", "static:inf", "static:2:2", "static:2:1:0", "seacache:0.2:linear"),
    ],
)
def test_other_texts_are_refused_with_the_forms(text: str) -> None:
    forms = r"teacache:0\.4, .*, static:2 .*, or none"
    with pytest.raises(ValueError, match=f"got step_cache='{text}'; expected {forms}"):
        parse_step_cache(text)


def test_misspelt_name_is_told() -> None:
    with pytest.raises(ValueError, match="did you mean 'teacache'"):
        parse_step_cache("teacach:0.4")
