"""Ways to take a coarse step, each as an engine of its own around the demo pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ddit_rt
from ddit_rt.adapters import AdapterConfig, AdapterSet, PatchAdapter, load_adapters
from ddit_rt.models import family_of
from ddit_rt.policies import patch_name

TRAINING_FREE = "training_free"
PAPER_UNTRAINED, PAPER_TRAINED, SNR_TRAINED = "paper_untrained", "paper_trained", "snr_trained"
LABELS = {
    PAPER_UNTRAINED: "paper's initialisation, untrained",
    TRAINING_FREE: "SNR-matched, untrained",
    PAPER_TRAINED: "paper's adapters, trained",
    SNR_TRAINED: "SNR-matched, trained",
}
"""In the order of the tables."""
COARSE = ("2p", "4p")
_VARIANTS = {PAPER_TRAINED: "paper", SNR_TRAINED: "snr"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CoarsePath:
    """One way to take a coarse step.

    Attributes:
        engine: An engine that takes it.
        fingerprint: Of its trained adapters; empty without any.
    """

    engine: Any
    fingerprint: str = ""


def build_paths(
    pipeline: Any,
    folders: Mapping[str, Path | None] | None = None,
    *,
    sizes: Sequence[str] = ("p", *COARSE),
    **compile_arguments: Any,
) -> tuple[dict[str, CoarsePath], dict[str, str]]:
    """Compiles an engine for every path that there is.

    Args:
        pipeline: The demo pipeline.
        folders: Folder of the trained adapters of `PAPER_TRAINED` and `SNR_TRAINED`, or None; None
            for the training-free step alone.
        sizes: Patch sizes.
        compile_arguments: Further arguments of `ddit_rt.compile`.

    Returns:
        The paths, and for each that is missing the reason.

    Raises:
        ValueError: Adapters of another variant, or without one of the sizes.
    """
    sets: dict[str, AdapterSet | None] = {TRAINING_FREE: None}
    fingerprints: dict[str, str] = {}
    missing: dict[str, str] = {}
    if folders is not None:
        sets[PAPER_UNTRAINED] = untrained_paper(pipeline)
    for name, folder in (folders or {}).items():
        if folder is None:
            missing[name] = "no folder of adapters was given"
        else:
            sets[name] = trained(pipeline, folder, _VARIANTS[name])
            fingerprints[name] = fingerprint_of(folder)
    paths = {
        name: CoarsePath(
            engine=ddit_rt.compile(
                pipeline, patch_sizes=sizes, adapter=adapters, progress=False, **compile_arguments
            ),
            fingerprint=fingerprints.get(name, ""),
        )
        for name, adapters in sets.items()
    }
    return paths, missing


def untrained_paper(pipeline: Any) -> AdapterSet:
    """The paper's initialisation: the base model's layers resized, no LoRA, a residual of zero."""
    transformer = pipeline.transformer
    configs = [AdapterConfig(patch=size, rank=1, variant="paper") for size in COARSE]
    made = [PatchAdapter.from_base(c, family_of(transformer), transformer) for c in configs]
    return AdapterSet(
        adapters={adapter.config.multiple: adapter.requires_grad_(False) for adapter in made}
    )


def trained(pipeline: Any, folder: Path, variant: str) -> AdapterSet:
    """Adapters of `ddit-rt train`, checked to be what a table will call them."""
    transformer = pipeline.transformer
    adapters = load_adapters(folder, family_of(transformer), transformer)
    found = {patch_name(m): a.config.variant for m, a in adapters.adapters.items()}
    expected = dict.fromkeys(COARSE, variant)
    if found != expected:
        raise ValueError(f"{folder} holds the adapters {found}; expected {expected}")
    return adapters


def fingerprint_of(folder: Path) -> str:
    """SHA-256 of the weights in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
