"""Calibration: one closed-loop search for the plans of an artifact."""

from ddit_rt.lab.calibrate.confirm import Confirmation
from ddit_rt.lab.calibrate.journal import Journal, RecordedBench
from ddit_rt.lab.calibrate.run import CalibrationConfig, calibrate
from ddit_rt.lab.plans.candidates import Candidate
from ddit_rt.lab.plans.points import Evaluator, Measurement, Prompt
from ddit_rt.lab.plans.target import Target

__all__ = [
    "CalibrationConfig",
    "Candidate",
    "Confirmation",
    "Evaluator",
    "Journal",
    "Measurement",
    "Prompt",
    "RecordedBench",
    "Target",
    "calibrate",
]
