from __future__ import annotations

import pytest

from ddit_rt.blocks import TokenRanges
from ddit_rt.errors import ShapeError
from ddit_rt.models.base import BATCH, IMAGE, JOINT, TEXT


def test_ranges_of_joint_is_the_sum() -> None:
    ranges = TokenRanges(batch=(1, 2), image=(4, 100), text=(1, 10))
    assert ranges.of(JOINT) == (5, 110)
    assert ranges.of(BATCH) == (1, 2)


@pytest.mark.parametrize("bounds", [(0, 4), (5, 4), (-1, 3)])
def test_ranges_wrong_bounds(bounds: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match=f"range of image: got {bounds[0]}..{bounds[1]}"):
        TokenRanges(image=bounds)


def test_ranges_check_names_the_range() -> None:
    ranges = TokenRanges(image=(4, 100))
    ranges.check({IMAGE: 4, TEXT: 512, BATCH: 8})
    with pytest.raises(ShapeError, match=r"image is 101, .* 4\.\.100: choose"):
        ranges.check({IMAGE: 101})


def test_ranges_default_keeps_32_bit_indexing() -> None:
    ranges = TokenRanges()
    widest = 5 * 3072  # attention and feed-forward of a FLUX.1 single block, concatenated
    assert ranges.batch[1] * ranges.of(JOINT)[1] * widest < 2**31
