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
    adapter_bucket,
    embed_adapted,
    snr_tokens,
)
from ddit_rt.adapters.padding import pack_padded, unpack_cut
from ddit_rt.adapters.store import load_adapters, lora_config, save_adapters, untrained_lora

__all__ = [
    "VARIANTS",
    "AdapterBucket",
    "AdapterConfig",
    "AdapterSet",
    "PatchAdapter",
    "SnrAdapterBucket",
    "adaptable_layers",
    "adapter_bucket",
    "embed_adapted",
    "load_adapters",
    "lora_config",
    "pack_padded",
    "save_adapters",
    "snr_tokens",
    "unpack_cut",
    "untrained_lora",
]
