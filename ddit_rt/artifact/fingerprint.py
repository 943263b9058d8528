"""Fingerprints of a model: its configuration and its weights.

The weight fingerprint reads a sample, so it takes seconds for 12 billion parameters. It covers
every tensor's name, shape and type, its first and last values, and an evenly strided sample in
between, 128 values in all. It tells one checkpoint from another, a fine-tune from its base and
fused weights from plain ones: those change nearly every value of a tensor. It does not see a
change that misses all sampled values, so it is no proof of integrity; that is the business of
the hash sums of the weight files. Names are those of the unmodified model: adding a LoRA
without fusing it changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddit_rt.blocks.constants import live_slots

_SAMPLE = 128


def weight_fingerprint(transformer: nn.Module) -> str:
    """SHA-256 over names, shapes, types and a fixed sample of values of all tensors, in hex.

    Equal on every device. Adapters that are loaded but not fused do not count.
    """
    digest = hashlib.sha256()
    samples: list[Tensor] = []
    for name, slot in sorted(live_slots(transformer).items()):
        tensor = slot.read()
        assert tensor is not None
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}\n".encode())
        samples.append(_sample(tensor.detach()))
    # One transfer from the device instead of one for each tensor.
    if samples:
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, in hex; private entries (`_diffusers_version`) left out."""
    text = json.dumps(public_config(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a diffusers configuration defines the model, as plain JSON values."""
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


def _sample(tensor: Tensor) -> Tensor:
    """Bytes of the first, the last and evenly strided values between them."""
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.contiguous().reshape(-1)
    count = flat.numel()
    if count > _SAMPLE:
        # Integer arithmetic: the same positions on every device and in every version.
        steps = torch.arange(_SAMPLE, dtype=torch.int64, device=flat.device)
        flat = flat[steps * (count - 1) // (_SAMPLE - 1)]
    return flat.contiguous().view(torch.uint8)
