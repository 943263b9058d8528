"""What `compile` writes and `load` reads: compiled blocks, their manifest, and where they live."""

from ddit_rt.artifact.calibration import PRESETS, CalibratedPlan, Calibration, calibration_for
from ddit_rt.artifact.environment import Environment
from ddit_rt.artifact.fingerprint import config_hash, public_config, weight_fingerprint
from ddit_rt.artifact.manifest import (
    BucketEntry,
    FileEntry,
    Manifest,
    PackageEntry,
    QuantizationEntry,
    mismatches,
)
from ddit_rt.artifact.store import Artifact, open_artifact, read_manifest, require_savable
from ddit_rt.artifact.trust import is_trusted, trust

__all__ = [
    "PRESETS",
    "Artifact",
    "BucketEntry",
    "CalibratedPlan",
    "Calibration",
    "Environment",
    "FileEntry",
    "Manifest",
    "PackageEntry",
    "QuantizationEntry",
    "calibration_for",
    "config_hash",
    "is_trusted",
    "mismatches",
    "open_artifact",
    "public_config",
    "read_manifest",
    "require_savable",
    "trust",
    "weight_fingerprint",
]
