"""Training of patch adapters: a frozen model learns to take larger patches from itself."""

from ddit_rt.lab.train.config import (
    DATA_KINDS,
    OPTIMIZERS,
    SCHEDULES,
    WEIGHTINGS,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
)
from ddit_rt.lab.train.trainer import TrainResult, train

__all__ = [
    "DATA_KINDS",
    "OPTIMIZERS",
    "SCHEDULES",
    "WEIGHTINGS",
    "DataConfig",
    "OptimizerConfig",
    "TrainConfig",
    "TrainResult",
    "train",
]
