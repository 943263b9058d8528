"""Z-Image (-Turbo): `ZImageTransformer2DModel` behind `ZImagePipeline`.

Latents are `[B, 16, H/8, W/8]`, as the pipeline has them; the model takes 2 x 2 latent pixels as a
token. Its forward takes lists, one image and one prompt each, and pads both to multiples of 32
tokens. Prompts whose padded lengths differ come with a mask: another package. All of this hangs on
sizes alone, none on a tensor's values, so that a captured step may hold it.

Time runs from 0 at noise to 1, and the model gives the velocity towards the image: both are
turned round. The pipeline runs prompt and negative prompt in one call, v = p + w (p - n): guidance
with the scale 1 + w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.base import TEXT, Guidance
from ddit_rt.models.calls import ModelCall, model_arguments
from ddit_rt.models.family import Family

_PADDED = 32
_LENGTHS = "cap_lengths"
"""Conditioning: text tokens of each prompt, where they differ."""


class ZImageFamily(Family):
    """Z-Image, text to image."""

    name: ClassVar[str] = "z-image"
    transformer_class: ClassVar[str] = "ZImageTransformer2DModel"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("ZImagePipeline",)
    prompt: ClassVar[Mapping[str, tuple[str, ...]]] = {"cap_feats": (TEXT, "cap_feat_dim")}
    guided_by_default: ClassVar[bool] = True
    numbering: ClassVar[tuple[str, ...]] = ("layer_id",)
    tables: ClassVar[tuple[str, ...]] = ("rope_embedder",)
    timed: ClassVar[tuple[str, ...]] = ("t_embedder",)
    text: ClassVar[str] = "cap_feats"
    variants: ClassVar[int] = 2
    image_first: ClassVar[bool] = True

    def check_model(self, transformer: Any, pipeline: Any) -> None:
        """See `Family.check_model`."""
        config = transformer.config
        if list(config.all_patch_size) != [2] or config.siglip_feat_dim is not None:
            raise UnsupportedModelError(
                "got a Z-Image with other patch sizes than 2, or with an image encoder (Omni); "
                "only text to image at patch size 2 is supported"
            )

    def default_size(self, pipeline: Any) -> tuple[int, int]:
        """See `Family.default_size`."""
        return 1024, 1024

    def example(self, transformer: Any, variant: int, batch: int, text: int) -> dict[str, Any]:
        """See `Family.example`: prompts of equal padded lengths, and of others."""
        given = super().example(transformer, variant, batch, text)
        return {**given, **({_LENGTHS: (text, *[0] * (batch - 1))} if variant else {})}

    def forward_arguments(
        self, latents: Tensor, level: Tensor, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Family.forward_arguments`: every sample by itself."""
        rows = zip(arguments["cap_feats"], _lengths(arguments), strict=False)
        return {
            "x": list(latents.unsqueeze(2)),
            "t": ((1000 - level * 1000) / 1000).expand(len(latents)),  # as the pipeline rounds it
            "cap_feats": [one[:tokens] for one, tokens in rows],
            "return_dict": False,
        }

    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """See `Family.scale_of`."""
        if call["guidance_scale"] <= 0:
            return None
        truncation = call["cfg_truncation"]
        if call["cfg_normalization"] or (truncation is not None and truncation < 1):
            raise UnsupportedModelError(
                f"got cfg_normalization={call['cfg_normalization']}, cfg_truncation={truncation}; "
                "the compiled loop has neither: leave them out (`guidance_interval` ends guidance)"
            )
        return 1 + float(call["guidance_scale"])

    def together(self, guidance: Guidance) -> tuple[Mapping[str, Any]] | None:
        """See `Family.together`: one batch where padded prompts are equally long."""
        passes = (guidance.prompt, guidance.negative)
        texts = [one["cap_feats"] for one in passes]
        longest = max(text.shape[1] for text in texts)
        if len({-(-text.shape[1] // _PADDED) for text in texts}) > 1:
            return None
        padded = [F.pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts]
        lengths = tuple(tokens for one in passes for tokens in _lengths(one))
        return ({"cap_feats": torch.cat(padded), _LENGTHS: lengths},)

    def read_output(self, given: Any) -> Tensor:
        """See `Family.read_output`: in float32, in which the pipeline joins passes."""
        return -torch.stack(given[0]).squeeze(2).float()

    def as_called(self, velocities: Sequence[Tensor]) -> list[Tensor]:
        """See `Family.as_called`."""
        return [-one for velocity in velocities for one in velocity.unsqueeze(2)]

    def no_output(self, given: Mapping[str, Any]) -> Any:
        """See `Family.no_output`."""
        return [torch.zeros_like(one) for one in given["x"]]

    def passes_in(self, given: Mapping[str, Any], batch: int) -> Sequence[Mapping[str, Any]]:
        """See `Family.passes_in`."""
        split = ("x", "t", "cap_feats")
        return [
            {**given} | {name: given[name][first : first + batch] for name in split}
            for first in range(0, len(given["x"]), batch)
        ]

    def read_model_call(
        self, transformer: Any, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """See `Family.read_model_call`."""
        given = model_arguments(arguments, ("x", "t", "cap_feats"))
        lengths = tuple(map(len, given["cap_feats"]))
        text = pad_sequence(given["cap_feats"], batch_first=True)
        conditioning: dict[str, Any] = {"cap_feats": text}
        if len(set(lengths)) > 1:
            conditioning[_LENGTHS] = lengths
        latents = torch.stack(given["x"]).squeeze(2)
        return ModelCall(latents=latents, timestep=1 - given["t"][:1], conditioning=conditioning)


def _lengths(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    text = arguments["cap_feats"]
    return arguments.get(_LENGTHS) or (text.shape[1],) * len(text)
