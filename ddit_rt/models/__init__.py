"""Model families: what differs from one diffusion transformer to the next."""

from __future__ import annotations

from torch import nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.base import Family
from ddit_rt.models.flux import FluxFamily
from ddit_rt.models.flux2 import Flux2Family
from ddit_rt.models.qwen_image import QwenImageFamily
from ddit_rt.models.wan import WanFamily
from ddit_rt.models.z_image import ZImageFamily

__all__ = ["FAMILIES", "Family", "family_named", "family_of"]

FAMILIES: tuple[Family, ...] = (
    FluxFamily(),
    WanFamily(),
    QwenImageFamily(),
    Flux2Family(),
    ZImageFamily(),
)


def family_of(transformer: nn.Module) -> Family:
    """The family of a transformer, found by the name of its class.

    Raises:
        UnsupportedModelError: No family handles this class.
    """
    classes = {cls.__name__ for cls in type(transformer).__mro__}
    for family in FAMILIES:
        if family.transformer_class in classes:
            return family
    known = [family.transformer_class for family in FAMILIES]
    raise UnsupportedModelError(
        f"got a {type(transformer).__name__}; supported transformer classes are {known}"
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
