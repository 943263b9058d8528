"""Patch adapters: the paper's trained modules for larger patches."""

from ddit_rt.adapters.adapter import (
    VARIANTS,
    AdapterConfig,
    AdapterSet,
    PatchAdapter,
    adaptable_layers,
)
from ddit_rt.adapters.bucket import (
    AdapterBucket,
    SnrAdapterBucket,
    adapted_tokens,
    adapter_bucket,
    snr_tokens,
)
from ddit_rt.adapters.store import load_adapters, lora_config, save_adapters, untrained_lora

__all__ = [
    "VARIANTS",
    "AdapterBucket",
    "AdapterConfig",
    "AdapterSet",
    "PatchAdapter",
    "SnrAdapterBucket",
    "adaptable_layers",
    "adapted_tokens",
    "adapter_bucket",
    "load_adapters",
    "lora_config",
    "save_adapters",
    "snr_tokens",
    "untrained_lora",
]
