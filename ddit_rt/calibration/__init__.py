"""Calibration: a closed-loop search for the plans of an artifact, against the plainest rivals."""

from ddit_rt.calibration.confirm import Confirmation
from ddit_rt.calibration.families import Family
from ddit_rt.calibration.plans import CacheRange, Candidate
from ddit_rt.calibration.points import Evaluator, Measurement, Prompt
from ddit_rt.calibration.run import CalibrationConfig, calibrate
from ddit_rt.calibration.search import search
from ddit_rt.calibration.target import Target

__all__ = [
    "CacheRange",
    "CalibrationConfig",
    "Candidate",
    "Confirmation",
    "Evaluator",
    "Family",
    "Measurement",
    "Prompt",
    "Target",
    "calibrate",
    "search",
]
