"""What an artifact says about itself: `manifest.json`.

The manifest names every file with its size and SHA-256, so the digest of the manifest stands for
the whole artifact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ddit_rt.artifact.calibration import Calibration
from ddit_rt.artifact.environment import Environment
from ddit_rt.artifact.fingerprint import config_hash, public_config, weight_fingerprint
from ddit_rt.artifact.schema import from_plain
from ddit_rt.blocks.inputs import TokenRanges
from ddit_rt.blocks.package import dtype_name
from ddit_rt.errors import ArtifactError
from ddit_rt.models.quantised import QUANTISED
from ddit_rt.policies import CacheFit

SCHEMA_VERSION = 7
_ADDED = {
    "calibrations": 2,
    "step_cache": 3,
    "cache_fits": 3,
    "block_changes": 5,
    "quantization": 7,
}
"""The version that added an entry. A manifest stays what it was until it gets one, since its
digest, which trust hangs on, is that of its text."""

_ADDED_TO_PLANS = {"step_cache": 4, "sigmas": 6}
"""The version that added an entry to calibrated plans, to the same rule."""

_BASE_VERSION = 4
"""The version of a new manifest without entries that were added later."""

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketEntry:
    """One patch size of an artifact.

    Attributes:
        patch: Patch size by name, `p`, `2p`, ...
        method: How the size is reached: `base`, `adapter` or the name of a training-free method.
        variant: Variant of the packages that it runs; None for the plain blocks.
    """

    patch: str
    method: str
    variant: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """A file of an artifact.

    Attributes:
        sha256: Hash sum, in hex.
        bytes: Size.
    """

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PackageEntry:
    """A compiled block of an artifact.

    Attributes:
        sha256: Hash sum, in hex.
        bytes: Size.
        block_type: Class name of the block.
        variant: Name of the block's variant; None for the plain block.
    """

    sha256: str
    bytes: int
    block_type: str
    variant: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationEntry:
    """How an artifact's model was quantised.

    Attributes:
        kind: One of `QUANTIZATIONS`.
        weights: `weight_fingerprint` of the transformer before that.
    """

    kind: str
    weights: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Contents of `manifest.json`.

    Attributes:
        schema_version: Version of this layout.
        project_version: Version of `ddit_rt` that compiled.
        family: Name of the model family.
        transformer_class: Class of the transformer.
        config: The transformer's configuration.
        config_hash: `config_hash(config)`.
        weights: `weight_fingerprint` of the transformer that was compiled.
        dtype: Data type of its weights, e.g. `bfloat16`.
        environment: What the packages were built with.
        ranges: Sizes that they were compiled for.
        buckets: Patch sizes.
        policy: The policy of a call that names none; None for the library's default.
        pipeline_defaults: Arguments of a pipeline call that names none, e.g. `height`.
        packages: Compiled blocks by path, `/`-separated and relative to the artifact.
        files: All other files, e.g. adapters, by path.
        calibrations: Calibrated plans, one entry per number of steps.
        step_cache: The step cache of a call that names none; None: every step computes.
        cache_fits: What was fitted for step caches of this model, one entry per kind.
        block_changes: What the blocks had that the configuration does not say, such as an
            attention processor or quantised weights: a description by class and place.
        quantization: How `compile` quantised the model, which `load` does again; None where the
            model is as it was.
    """

    schema_version: int = SCHEMA_VERSION
    project_version: str
    family: str
    transformer_class: str
    config: dict[str, Any]
    config_hash: str
    weights: str
    dtype: str
    environment: Environment
    ranges: TokenRanges
    buckets: tuple[BucketEntry, ...]
    policy: dict[str, Any] | None = None
    pipeline_defaults: dict[str, Any] = field(default_factory=dict)
    packages: dict[str, PackageEntry] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    calibrations: tuple[Calibration, ...] = ()
    step_cache: dict[str, Any] | None = None
    cache_fits: tuple[CacheFit, ...] = ()
    block_changes: dict[str, str] = field(default_factory=dict)
    quantization: QuantizationEntry | None = None

    @classmethod
    def describe(
        cls,
        transformer: nn.Module,
        *,
        project_version: str,
        family: str,
        ranges: TokenRanges,
        buckets: tuple[BucketEntry, ...],
        policy: Mapping[str, Any] | None = None,
        step_cache: Mapping[str, Any] | None = None,
        pipeline_defaults: Mapping[str, Any] | None = None,
        block_changes: Mapping[str, str] | None = None,
        quantization: QuantizationEntry | None = None,
    ) -> Manifest:
        """A manifest of a transformer and this machine, as yet without files.

        Args:
            transformer: The model whose blocks were compiled.
            project_version: As the attribute.
            family: As the attribute.
            ranges: As the attribute.
            buckets: As the attribute.
            policy: As the attribute.
            step_cache: As the attribute.
            pipeline_defaults: As the attribute.
            block_changes: As the attribute.
            quantization: As the attribute.
        """
        parameter = next(transformer.parameters())
        config = public_config(transformer.config)  # type: ignore[arg-type]
        return cls(
            # As old as its entries allow, so that as many versions as can read it.
            schema_version=max(
                _BASE_VERSION,
                _ADDED["block_changes"] if block_changes else 0,
                _ADDED["quantization"] if quantization else 0,
            ),
            project_version=project_version,
            family=family,
            transformer_class=type(transformer).__name__,
            config=config,
            config_hash=config_hash(config),
            weights=weight_fingerprint(transformer),
            dtype=dtype_name(_dtype(transformer)),
            environment=Environment.current(parameter.device),
            ranges=ranges,
            buckets=buckets,
            policy=dict(policy) if policy else None,
            step_cache=dict(step_cache) if step_cache else None,
            pipeline_defaults=dict(pipeline_defaults or {}),
            block_changes=dict(block_changes or {}),
            quantization=quantization,
        )

    def before_quantization(self) -> Manifest:
        """What it would say of the model that `compile` was given, before it quantised that."""
        assert self.quantization is not None, "it was not"
        plain = {
            place: words
            for place, words in self.block_changes.items()
            if not words.startswith(QUANTISED)
        }
        return replace(self, weights=self.quantization.weights, block_changes=plain)

    def to_json(self) -> str:
        """Stable JSON: equal manifests give equal text."""
        plain = asdict(self)
        for name, version in _ADDED.items():
            if version > self.schema_version:
                del plain[name]
        for name, version in _ADDED_TO_PLANS.items():
            for plan in _plain_plans(plain) if version > self.schema_version else ():
                del plan[name]
        return json.dumps(plain, indent=1, sort_keys=True) + "\n"

    def with_calibration(self, calibration: Calibration) -> Manifest:
        """The manifest with a calibration, in place of one for the same number of steps."""
        others = (
            entry
            for entry in self.calibrations
            if entry.num_inference_steps != calibration.num_inference_steps
        )
        entries = sorted((*others, calibration), key=lambda entry: entry.num_inference_steps)
        plans = [plan for entry in entries for plan in entry.plans]
        needed = [
            version
            for name, version in _ADDED_TO_PLANS.items()
            if any(getattr(plan, name) is not None for plan in plans)
        ]
        version = max(self.schema_version, _ADDED["calibrations"], *needed)
        return replace(self, schema_version=version, calibrations=tuple(entries))

    def with_cache_fit(self, fit: CacheFit) -> Manifest:
        """The manifest with a fit for a step cache, in place of one of the same kind."""
        others = (entry for entry in self.cache_fits if entry.kind != fit.kind)
        entries = sorted((*others, fit), key=lambda entry: entry.kind)
        version = max(self.schema_version, _ADDED["cache_fits"])
        return replace(self, schema_version=version, cache_fits=tuple(entries))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads a manifest.

        Raises:
            ArtifactError: Not JSON, another schema, or a missing, unknown or mistyped entry.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(
                f"{MANIFEST_NAME} is not JSON ({error}): copy the artifact again"
            ) from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        readable = range(1, SCHEMA_VERSION + 1)
        if type(version) is not int or version not in readable:
            raise ArtifactError(
                f"{MANIFEST_NAME} has schema {version!r}, this version reads {list(readable)}: "
                "install the ddit_rt that wrote it, or compile again"
            )
        later = [name for name, added in _ADDED.items() if added > version and name in raw]
        if later:
            raise ArtifactError(
                f"{MANIFEST_NAME}: unknown entries {later} in schema {version}: it was edited"
            )
        manifest = from_plain(cls, raw, MANIFEST_NAME)
        later = [
            name
            for name, added in _ADDED_TO_PLANS.items()
            if added > version and any(name in plan for plan in _plain_plans(raw))
        ]
        if later:
            raise ArtifactError(
                f"{MANIFEST_NAME}: unknown entries {later} of a calibrated plan in schema "
                f"{version}: it was edited"
            )
        if config_hash(manifest.config) != manifest.config_hash:
            raise ArtifactError(
                f"{MANIFEST_NAME}: config does not match config_hash; the file was edited: copy "
                "the artifact again"
            )
        return manifest

    @property
    def digest(self) -> str:
        """SHA-256 of the JSON, in hex: it stands for the whole artifact."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _plain_plans(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calibrated plans of a manifest as JSON has it."""
    return [
        plan
        for entry in manifest.get("calibrations", ())
        for plan in (*entry["presets"].values(), *entry["front"])
    ]


def mismatches(
    manifest: Manifest,
    transformer: nn.Module,
    block_changes: Mapping[str, str] | None = None,
    *,
    family: str | None = None,
) -> list[str]:
    """Why an artifact does not fit a model and this machine.

    Args:
        manifest: The artifact's.
        transformer: The model to run it with.
        block_changes: What its blocks have that its configuration does not say, as
            `Manifest.block_changes`; not compared where None.
        family: Name of the family that runs it; not compared where None.

    Returns:
        One sentence for each reason, with what came, what is needed and what to do; empty when
        it fits.
    """
    name = type(transformer).__name__
    if name != manifest.transformer_class:
        compiled = manifest.transformer_class
        return [f"model: compiled for {compiled}, got {name}; pass such a model, or compile this"]
    if family not in (None, manifest.family):
        return [f"pipeline: compiled for {manifest.family}, got one of {family}; compile that"]
    parameter = next(transformer.parameters())
    problems = _config_mismatches(manifest, public_config(transformer.config))  # type: ignore[arg-type]
    if block_changes is not None:
        problems += _block_mismatches(manifest.block_changes, block_changes)
    dtype = dtype_name(_dtype(transformer))
    if dtype != manifest.dtype:
        problems.append(
            f"data type: the artifact was compiled for {manifest.dtype}, the model is "
            f"{dtype}; load it with torch_dtype=torch.{manifest.dtype}, or "
            "compile again"
        )
    elif not problems and weight_fingerprint(transformer) != manifest.weights:
        problems.append(
            "weights: the artifact was compiled for other weights than this model has (another "
            "checkpoint, or a LoRA fused before or since); load those, unfuse, or compile again"
        )
    return problems + manifest.environment.mismatches(Environment.current(parameter.device))


def _config_mismatches(manifest: Manifest, config: Mapping[str, Any]) -> list[str]:
    names = sorted(manifest.config.keys() | config.keys())
    return [
        f"configuration: {name} was {manifest.config.get(name)!r} when compiled, the model has "
        f"{config.get(name)!r}; load that model, or compile this one"
        for name in names
        if manifest.config.get(name) != config.get(name)
    ]


def _block_mismatches(compiled: Mapping[str, str], live: Mapping[str, str]) -> list[str]:
    """The first of the places where blocks differ: one change shows in several."""
    plain = "as the configuration says"
    places = sorted(compiled.keys() | live.keys(), key=lambda one: (one.count("."), one))
    changed = [place for place in places if compiled.get(place) != live.get(place)]
    return [
        f"blocks: {place} was {compiled.get(place, plain)} when compiled, the model has it "
        f"{live.get(place, plain)}; change it before loading (attention processors: "
        "transformer.set_attn_processor), or compile this model"
        for place in changed[:1]
    ]


def _dtype(transformer: nn.Module) -> torch.dtype:
    """The model's dtype as diffusers has it: that of the first parameter not kept in float32."""
    dtype = transformer.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype
