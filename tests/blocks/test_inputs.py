from __future__ import annotations

import pytest

from ddit_rt.blocks import TokenRanges
from ddit_rt.errors import ShapeError
from ddit_rt.models.base import JOINT


@pytest.mark.parametrize("bounds", [(0, 4), (5, 4), (-1, 3)])
def test_ranges_wrong_bounds(bounds: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match=f"range of image: got {bounds[0]}..{bounds[1]}"):
        TokenRanges(image=bounds)


def test_ranges_default_keeps_32_bit_indexing() -> None:
    ranges = TokenRanges()
    widest = 5 * 3072  # attention and feed-forward of a FLUX.1 single block, concatenated
    assert ranges.batch[1] * ranges.of(JOINT)[1] * widest < 2**31
