"""Calibration: a closed-loop search for the plans of an artifact, against plain baselines."""

from ddit_rt.lab.calibrate.confirm import Confirmation
from ddit_rt.lab.calibrate.run import CalibrationConfig, calibrate
from ddit_rt.lab.calibrate.search import search
from ddit_rt.lab.plans.candidates import CacheRange, Candidate
from ddit_rt.lab.plans.points import Evaluator, Measurement, Prompt
from ddit_rt.lab.plans.target import Target

__all__ = [
    "CacheRange",
    "CalibrationConfig",
    "Candidate",
    "Confirmation",
    "Evaluator",
    "Measurement",
    "Prompt",
    "Target",
    "calibrate",
    "search",
]
