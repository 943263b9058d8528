from __future__ import annotations

import pytest

from ddit_rt import MagCache, NoCache, StepCache, TeaCache
from ddit_rt.policies import parse_step_cache


@pytest.mark.parametrize(
    ("text", "cache"),
    [
        ("teacache:0.4", TeaCache(0.4)),
        ("teacache-ret:0.1", TeaCache(0.1, use_ret_steps=True)),
        ("magcache:0.06", MagCache(0.06)),
        (" none ", NoCache()),
    ],
)
def test_texts_and_their_caches(text: str, cache: StepCache) -> None:
    assert parse_step_cache(text) == cache


@pytest.mark.parametrize(
    "text",
    ["", "teacache", "teacache:", "teacache:fast", "teacache:nan", "magcache:-1", "none:1", "fb:1"],
)
def test_other_texts_are_refused_with_the_forms(text: str) -> None:
    forms = r"teacache:0\.4, teacache-ret:0\.1, magcache:0\.06, or none"
    with pytest.raises(ValueError, match=f"got step_cache='{text}'; expected {forms}"):
        parse_step_cache(text)


def test_misspelt_name_is_told() -> None:
    with pytest.raises(ValueError, match="did you mean 'teacache'"):
        parse_step_cache("teacach:0.4")
