"""Which variants of Wan run, and which are refused by name."""

from __future__ import annotations

from typing import Any


def refused_parts(transformer: Any, pipeline: Any, patch: tuple[int, int, int]) -> list[str]:
    """What a model or its pipeline has that cannot be run, each in a few words.

    Args:
        transformer: A `WanTransformer3DModel`.
        pipeline: A `WanPipeline`, or None.
        patch: The only patch size that is known: frames, rows, columns.
    """
    refused = _refused_config(transformer.config, patch)
    return refused if pipeline is None else refused + refused_experts(transformer, pipeline)


def _refused_config(config: Any, patch: tuple[int, int, int]) -> list[str]:
    """What a transformer has that cannot be run."""
    refused = []
    if tuple(config.patch_size) != patch:
        refused.append(f"patch_size={tuple(config.patch_size)} (expected {patch})")
    if config.image_dim is not None or config.added_kv_proj_dim is not None:
        refused.append("image conditioning (image_dim, added_kv_proj_dim)")
    if config.in_channels != (config.out_channels or config.in_channels):
        refused.append(
            f"in_channels={config.in_channels} with out_channels={config.out_channels} "
            "(image-to-video or control latents)"
        )
    return refused


def refused_experts(transformer: Any, pipeline: Any) -> list[str]:
    """What keeps a pipeline's `transformer_2` from running on what was compiled for the first."""
    if pipeline.config.boundary_ratio is None:
        return []
    second = pipeline.transformer_2
    if second is None:
        return ["boundary_ratio without a transformer_2"]
    differs = sorted(
        name
        for name in {*transformer.config, *second.config}
        if not name.startswith("_") and transformer.config.get(name) != second.config.get(name)
    )
    if differs:
        return [f"a transformer_2 of another configuration ({', '.join(differs)})"]
    weights = [one.patch_embedding.weight for one in (transformer, second)]
    if weights[0].dtype != weights[1].dtype or weights[0].device != weights[1].device:
        first, other = (f"{weight.dtype} on {weight.device}" for weight in weights)
        return [f"a transformer_2 of {other} beside a transformer of {first}"]
    return []
