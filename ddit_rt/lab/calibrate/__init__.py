"""Calibration: one closed-loop search for the plans of an artifact."""

from ddit_rt.lab.calibrate.journal import Journal, RecordedBench
from ddit_rt.lab.calibrate.run import CalibrationConfig, calibrate
from ddit_rt.lab.plans.candidates import Candidate
from ddit_rt.lab.plans.points import Measurement, Prompt

__all__ = [
    "CalibrationConfig",
    "Candidate",
    "Journal",
    "Measurement",
    "Prompt",
    "RecordedBench",
    "calibrate",
]
