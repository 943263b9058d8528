"""Settings that cannot work are refused before any work."""

from __future__ import annotations

import pytest

from ddit_rt.lab.train import DataConfig, OptimizerConfig, TrainConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(patch_sizes=("p",)), 'got patch="p"'),
        (lambda: TrainConfig(patch_sizes=("2p", "2p")), "name each size once"),
        (lambda: TrainConfig(variant="x"), "got variant='x'"),
        (lambda: TrainConfig(rank=0), "rank=0"),
        (lambda: TrainConfig(steps=0), "steps=0"),
        (lambda: TrainConfig(sample_every=-1), "sample_every=-1"),
        (lambda: TrainConfig(weighting="x"), "got weighting='x'"),
        (lambda: TrainConfig(detail_share=2.0), "detail_share=2.0"),
        (lambda: OptimizerConfig(name="sgd"), "got optimizer='sgd'"),
        (lambda: OptimizerConfig(lr=-1.0), "lr=-1.0"),
        (lambda: OptimizerConfig(ema=1.0), "ema=1.0"),
        (lambda: DataConfig(kind="x", source="", height=1, width=1), "got data='x'"),
        (lambda: DataConfig(kind="self", source="", height=0, width=1), "0 x 1 pixels"),
        (lambda: DataConfig(kind="self", source="", height=1, width=1, limit=0), "limit=0"),
    ],
)
def test_bad_settings_are_refused_with_their_value(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
