"""What `compile` writes and `load` reads: compiled blocks, their manifest, and where they live."""

from ddit_rt.artifact.calibration import (
    PRESETS,
    CalibratedPlan,
    Calibration,
    calibration_for,
)
from ddit_rt.artifact.environment import Environment
from ddit_rt.artifact.fingerprint import config_hash, public_config, weight_fingerprint
from ddit_rt.artifact.inputs import InputCheck, TokenRanges
from ddit_rt.artifact.lora import block_lora
from ddit_rt.artifact.manifest import BucketEntry, FileEntry, Manifest, PackageEntry, mismatches
from ddit_rt.artifact.package import PackageInfo, package_path, read_info
from ddit_rt.artifact.runner import CompiledRunner, EagerRunner, LoadedPackage, load_runner
from ddit_rt.artifact.store import Artifact, open_artifact, read_manifest, require_savable
from ddit_rt.artifact.template import BlockTemplate, LoraSpec
from ddit_rt.artifact.trust import is_trusted, trust

__all__ = [
    "PRESETS",
    "Artifact",
    "BlockTemplate",
    "BucketEntry",
    "CalibratedPlan",
    "Calibration",
    "CompiledRunner",
    "EagerRunner",
    "Environment",
    "FileEntry",
    "InputCheck",
    "LoadedPackage",
    "LoraSpec",
    "Manifest",
    "PackageEntry",
    "PackageInfo",
    "TokenRanges",
    "block_lora",
    "calibration_for",
    "config_hash",
    "is_trusted",
    "load_runner",
    "mismatches",
    "open_artifact",
    "package_path",
    "public_config",
    "read_info",
    "read_manifest",
    "require_savable",
    "trust",
    "weight_fingerprint",
]
