"""Names of patch sizes: "p" is the model's own, "2p" and "4p" are two and four times that."""

from __future__ import annotations

import re

_PATTERN = re.compile(r"([1-9][0-9]*)?p")


def parse_patch(patch: str | int) -> int:
    """The multiple of p that a name stands for: `"p"` is 1, `"4p"` is 4; an int is itself.

    Raises:
        ValueError: Not a patch name, or not a power of two.
    """
    if isinstance(patch, int):
        multiple = patch
    else:
        match = _PATTERN.fullmatch(patch.strip())
        if match is None:
            raise ValueError(f'got the patch size {patch!r}; sizes are written "p", "2p", "4p"')
        multiple = int(match.group(1) or 1)
    if multiple < 1 or multiple & (multiple - 1):
        raise ValueError(f"got the patch size {patch!r}; multiples of p are powers of two")
    return multiple


def patch_name(multiple: int) -> str:
    """`1` is `"p"`, `4` is `"4p"`."""
    return "p" if multiple == 1 else f"{multiple}p"
