"""Plans that others have published for a model family, for artifacts that are not calibrated."""

from __future__ import annotations

from ddit_rt.policies.spectral import SpectralPolicy

_DELTA = 0.05
"""Of the figures that were published of all these families: 1.6 to 2.3 times faster."""

_FAMILIES = ("flux", "flux2", "qwen-image", "wan", "z-image")


def published_fast_plan(family: str) -> tuple[SpectralPolicy, str] | None:
    """The plan of `"fast"` before a calibration, and its source; None where none is published.

    Args:
        family: Name of the model's family.
    """
    if family not in _FAMILIES:
        return None
    source = f"SPEED (arXiv 2605.18736, as sglang has it) with delta {_DELTA:g}"
    return SpectralPolicy(_DELTA), source
