"""Names of patch sizes: "p" is the model's own, "2p" and "4p" are two and four times that."""

from __future__ import annotations

import re
from typing import Any

from ddit_rt import checks

_PATTERN = re.compile(r"([1-9][0-9]*)?p")


def parse_patch(patch: Any, name: str = "patch_size") -> int:
    """The multiple of p that a name stands for: `"p"` is 1, `"4p"` is 4; an int is itself.

    Args:
        patch: What came.
        name: What the caller calls it, for messages.

    Raises:
        TypeError: Neither text nor a whole number.
        ValueError: Not a patch name, or not a power of two.
    """
    if isinstance(patch, str):
        if not is_patch(patch):
            raise ValueError(f'got {name}={patch!r}; patch sizes are written "p", "2p", "4p"')
        multiple = int(patch.strip()[:-1] or 1)
    else:
        multiple = checks.whole(name, patch)
    if multiple < 1 or multiple & (multiple - 1):
        raise ValueError(f"got {name}={patch!r}; multiples of p are powers of two")
    return multiple


def is_patch(text: str) -> bool:
    """Whether a text is written like a patch size."""
    return _PATTERN.fullmatch(text.strip()) is not None


def patch_name(multiple: int) -> str:
    """`1` is `"p"`, `4` is `"4p"`."""
    return "p" if multiple == 1 else f"{multiple}p"
