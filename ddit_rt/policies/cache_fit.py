"""What was fitted for a model, so that a step cache or a policy can serve it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CACHE_KINDS = ("teacache", "teacache-ret", "magcache")
"""Polynomials of TeaCache, of TeaCache with `use_ret_steps`, and the ratios of MagCache."""

KINDS = (*CACHE_KINDS, "spectrum")
"""These, and the spectrum of the VAE's latents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheFit:
    """One fit.

    Attributes:
        kind: One of `KINDS`.
        values: Polynomial coefficients, highest power first; one ratio per step, the first
            being 1; or A and b of `SpectralPolicy`.
        source: Where the values come from, in a few words.
        evidence: Prompts, steps, versions, residual of the fit.
    """

    kind: str
    values: tuple[float, ...]
    source: str
    evidence: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the kind and that there are finite values."""
        if self.kind not in KINDS:
            raise ValueError(f"got the kind {self.kind!r}; a fit is one of {list(KINDS)}")
        if not self.values or not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"got the values {self.values} for {self.kind}; they must be finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Published:
    """A fit of others, and the model that it is for."""

    transformer_class: str
    config: Mapping[str, Any]
    fit: CacheFit


_FLUX_DEV = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "guidance_embeds": True,
}
_WAN = {"in_channels": 16, "out_channels": 16, "image_dim": None, "attention_head_dim": 128}
_WAN_SMALL = {**_WAN, "num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
_WAN_LARGE = {**_WAN, "num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}


def _published(
    transformer_class: str, config: Mapping[str, Any], kind: str, name: str, *values: float
) -> _Published:
    fit = CacheFit(kind=kind, values=values, source=f"published with TeaCache for {name}")
    return _Published(transformer_class=transformer_class, config=config, fit=fit)


# Source of all: the repository of TeaCache (arXiv 2411.19108), TeaCache4FLUX and TeaCache4Wan2.1.
# fmt: off
_PUBLISHED = (
    _published(
        "FluxTransformer2DModel", _FLUX_DEV, "teacache", "FLUX.1-dev",
        498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861,
    ),
    _published(
        "WanTransformer3DModel", _WAN_SMALL, "teacache", "Wan 2.1 T2V 1.3B",
        2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774,
    ),
    _published(
        "WanTransformer3DModel", _WAN_SMALL, "teacache-ret", "Wan 2.1 T2V 1.3B",
        -52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664,
    ),
    _published(
        "WanTransformer3DModel", _WAN_LARGE, "teacache", "Wan 2.1 T2V 14B",
        -5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404,
    ),
    _published(
        "WanTransformer3DModel", _WAN_LARGE, "teacache-ret", "Wan 2.1 T2V 14B",
        -303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525,
    ),
)
# fmt: on


def published_fits(transformer_class: str, config: Mapping[str, Any]) -> tuple[CacheFit, ...]:
    """Fits that others have published for a model, told by its class and configuration.

    A fine-tune has the configuration of its base model, and gets its fits: so the trace names the
    model that they were made with.

    Args:
        transformer_class: Class name of the transformer.
        config: The model's configuration.
    """
    fits = [
        entry.fit
        for entry in _PUBLISHED
        if entry.transformer_class == transformer_class and _fits(entry.config, config)
    ]
    if transformer_class == "FluxTransformer2DModel" and _fits(_FLUX_DEV, config):
        # Imported here: it pulls in much of diffusers.
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

        ratios = tuple(float(ratio) for ratio in FLUX_MAG_RATIOS)
        source = "published with MagCache for FLUX.1-dev, in diffusers"
        fits.append(CacheFit(kind="magcache", values=ratios, source=source))
    return tuple(fits)


def _fits(wanted: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    return all(config.get(name) == value for name, value in wanted.items())
