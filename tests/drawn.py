"""How hypothesis draws: the same few examples in every run, or many new ones.

`DDIT_RT_EXAMPLES=5000 pytest tests/test_parsers.py` draws as many for each test, other ones in
every run, and prints what fails.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="pip install 'ddit_rt[test]'")
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ASKED = int(os.environ.get("DDIT_RT_EXAMPLES", "0"))

_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([10**30, -(2**63), 2**64, 1e308]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", "p", "2p", "../x", "float32", "cuda", "fine", "\0", "nan"]),
)
JSON = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
"""Any value that JSON can hold, and those that often hurt."""

DEEP = "[" * 100_000
"""Text that a recursive reader cannot read."""


def drawn(examples: int) -> settings:
    """Settings of a test that draws as many examples, where nobody asks for more."""
    return settings(
        max_examples=ASKED or examples,
        derandomize=not ASKED,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def edited(draw: Any, value: Any) -> Any:
    """A value of JSON in which up to three places hold something else, or nothing, or more."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        holder = value
        while True:
            if not isinstance(holder, (dict, list)) or not holder:
                break
            keys = sorted(holder) if isinstance(holder, dict) else range(len(holder))
            key = draw(st.sampled_from(keys))
            inner = holder[key]
            if isinstance(inner, (dict, list)) and inner and draw(st.booleans()):
                holder = inner
                continue
            what = draw(st.sampled_from(["other", "other", "gone", "more"]))
            if what == "gone":
                del holder[key]
            elif what == "more" and isinstance(holder, dict):
                holder[draw(st.text(max_size=8))] = draw(JSON)
            else:
                holder[key] = draw(JSON)
            break
    return value


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """Bytes that were cut off, or in which some were changed, taken out or put in."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "add"]))
        if kind == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[at:]
        elif kind == "drop":
            del changed[at : at + draw(st.integers(1, 16))]
        else:
            changed[at:at] = draw(st.binary(max_size=16))
    return bytes(changed)
