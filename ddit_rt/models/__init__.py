"""Model families: what differs from one diffusion transformer to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.chroma import ChromaFamily
from ddit_rt.models.family import Family
from ddit_rt.models.flux import FluxFamily
from ddit_rt.models.flux2 import Flux2Family
from ddit_rt.models.flux_edit import (
    FluxFillFamily,
    FluxImageFamily,
    FluxInpaintFamily,
    FluxKontextFamily,
)
from ddit_rt.models.krea2 import Krea2Family
from ddit_rt.models.longcat_audio import LongCatAudioFamily
from ddit_rt.models.ltx2 import LTX2Family
from ddit_rt.models.qwen_image import QwenImageFamily
from ddit_rt.models.sd3 import SD3Family
from ddit_rt.models.wan import WanFamily
from ddit_rt.models.wan_image import WanImageFamily
from ddit_rt.models.wan_ti2v import WanTI2VFamily
from ddit_rt.models.wan_vace import WanVACEFamily
from ddit_rt.models.z_image import ZImageFamily

__all__ = ["FAMILIES", "Family", "family_named", "family_of", "family_of_classes"]

FAMILIES: tuple[Family, ...] = (
    FluxFamily(),
    FluxImageFamily(),
    FluxInpaintFamily(),
    FluxKontextFamily(),
    FluxFillFamily(),
    WanFamily(),
    WanTI2VFamily(),
    WanImageFamily(),
    WanVACEFamily(),
    QwenImageFamily(),
    ChromaFamily(),
    SD3Family(),
    Flux2Family(),
    ZImageFamily(),
    Krea2Family(),
    LongCatAudioFamily(),
    LTX2Family(),
)
"""Of several for a transformer class, a bare transformer's is the first."""


def family_of(transformer: nn.Module, pipeline: Any = None) -> Family:
    """The family of a transformer within its pipeline, found by the names of their classes.

    Args:
        transformer: The transformer.
        pipeline: What it is in; without one the family is that of a bare transformer.

    Raises:
        UnsupportedModelError: No family handles the transformer's class, or none of those that do
            handles the pipeline's.
    """
    if pipeline is None:
        return family_of_classes(type(transformer), None)
    config = getattr(pipeline, "config", {})
    return family_of_classes(type(transformer), type(pipeline).__name__, config)


def family_of_classes(
    transformer: type[nn.Module], pipeline: str | None, config: Mapping[str, Any] | None = None
) -> Family:
    """`family_of`, of a transformer's class and the name and configuration of a pipeline's."""
    classes = {cls.__name__ for cls in transformer.__mro__}
    found = [family for family in FAMILIES if family.transformer_class in classes]
    if not found:
        known = list(dict.fromkeys(family.transformer_class for family in FAMILIES))
        raise UnsupportedModelError(
            f"got a {transformer.__name__}; supported transformer classes are {known}"
        )
    if pipeline is None:
        return found[0]
    for family in found:
        own = family.pipeline_config.items()
        if pipeline in family.pipeline_classes and own <= dict(config or {}).items():
            return family
    names = [name for family in found for name in family.pipeline_classes]
    raise UnsupportedModelError(
        f"got a {pipeline}; for this transformer the supported pipelines are {names}. Compile the "
        "bare transformer to run its loop alone"
    )


def family_named(name: str) -> Family:
    """The family that a manifest names.

    Raises:
        UnsupportedModelError: The name is unknown to this version.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    known = [family.name for family in FAMILIES]
    raise UnsupportedModelError(f"got the family {name!r}; this version knows {known}")
