"""Patch adapters: the paper's trained modules for larger patches."""

from ddit_rt.adapters.adapter import AdapterConfig, AdapterSet, PatchAdapter
from ddit_rt.adapters.bucket import AdapterBucket
from ddit_rt.adapters.store import load_adapters, lora_config, save_adapters, untrained_lora

__all__ = [
    "AdapterBucket",
    "AdapterConfig",
    "AdapterSet",
    "PatchAdapter",
    "load_adapters",
    "lora_config",
    "save_adapters",
    "untrained_lora",
]
