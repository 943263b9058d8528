"""Patch adapters: what a frozen model needs in order to take larger patches.

For one new patch size (arXiv 2602.16968, section 3.1): a patch embedding E and a de-embedding D,
a learned identifier i added to every token, a residual branch R from before the embedding to after
the de-embedding, and LoRA in the feed-forward layers. With x the patches of s p x s p of z, h what
the blocks (with LoRA) make of the tokens, and e, d the base model's own layers (where the patches
do not divide z, it is padded and v is cut: `padding.py`):

`paper`   v = D h + R x, the blocks taking E x + i at the time t. E and D start from the base
          model's, resized; positions are interpolated.
`snr`     a correction on the training-free step of `steps/buckets.py`. The blocks take
          e z' + E y + i at the time t', with z' the small image, t' its level, y = [x, x_fine],
          and x_fine the patches of the clean estimate of the latest step at p, zero before there
          is one; positions are those of z'. Then
              v = v_snr(d h) + D h + R y
          where v_snr makes the training-free velocity of the small image's. E, i, D and the
          last layer of R start at zero: untrained it is the training-free step exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ddit_rt import checks
from ddit_rt.adapters.resize import resize_embedding, resize_projection
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.family import Family
from ddit_rt.models.layered import layered
from ddit_rt.policies import parse_patch, patch_name

VARIANTS = ("paper", "snr")


_LARGEST = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Shape of an adapter.

    Attributes:
        patch: Patch size by name, `"2p"` or `"4p"`.
        rank: LoRA rank r, also the width of the residual branch.
        lora_alpha: LoRA scale times r, as PEFT has it.
        variant: `"paper"`, the published scheme, or `"snr"`, a correction on the training-free
            step.
    """

    patch: str
    rank: int = 32
    lora_alpha: int = 32
    variant: str = "paper"

    def __post_init__(self) -> None:
        """Checks every field."""
        if parse_patch(self.patch) == 1:
            raise ValueError('got patch="p": an adapter is for a larger patch, such as "2p"')
        for name in ("rank", "lora_alpha"):
            checks.whole(name, getattr(self, name), 1, _LARGEST)
        if self.variant not in VARIANTS:
            raise ValueError(f"got variant={self.variant!r}; this version knows {list(VARIANTS)}")

    @property
    def multiple(self) -> int:
        """Patch size as a multiple of p."""
        return parse_patch(self.patch)


class PatchAdapter(nn.Module):
    """Embedding, de-embedding, identifier and residual of one patch size, and its LoRA tensors.

    The LoRA tensors are plain data here, under PEFT's names; the compiled blocks take them as
    constants, and the user's transformer is never modified.

    Attributes:
        config: Shape.
        lora: PEFT state dict without its `base_model.model.` prefix, e.g.
            `transformer_blocks.0.ff.net.2.lora_A.weight`. Empty: no LoRA.
    """

    def __init__(
        self, config: AdapterConfig, *, channels: int, patch_size: int, hidden_size: int
    ) -> None:
        super().__init__()
        features = channels * (patch_size * config.multiple) ** 2
        # The snr variant also sees what the latest step at p found.
        seen = features if config.variant == "paper" else 2 * features
        self.config = config
        self.embed = _linear(seen, hidden_size)
        self.project = _linear(hidden_size, features)
        self.identifier = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32, device="cpu"))
        # Only the last layer starts at zero: with both at zero no gradient would ever flow.
        self.residual_in = _linear(seen, config.rank)
        self.residual_out = _linear(config.rank, features)
        nn.init.zeros_(self.residual_out.weight)
        nn.init.zeros_(self.residual_out.bias)
        self.lora: dict[str, Tensor] = {}

    @classmethod
    def from_base(
        cls, config: AdapterConfig, family: Family, transformer: nn.Module
    ) -> PatchAdapter:
        """An untrained adapter: the base model's layers resized, or zero; see the module."""
        patch = family.patch
        embed, project = adaptable_layers(family, transformer)
        adapter = cls(
            config,
            channels=family.latent_channels(transformer),
            patch_size=patch,
            hidden_size=family.hidden_size(transformer),
        )
        if config.variant == "snr":
            for layer in (adapter.embed, adapter.project):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
            return adapter.to(embed.weight.device, embed.weight.dtype)
        larger = patch * config.multiple
        with torch.no_grad():
            adapter.embed.weight.copy_(resize_embedding(embed.weight, patch, larger))
            adapter.project.weight.copy_(resize_projection(project.weight, patch, larger))
            adapter.embed.bias.copy_(_bias(embed))
            adapter.project.bias.copy_(resize_projection(_bias(project), patch, larger))
        return adapter.to(embed.weight.device, embed.weight.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its weights: the model's, or float32 while it is trained."""
        return self.identifier.dtype

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """`[B, n, C*q*q]` (twice that for `snr`) to `[B, n, d]`, identifier added."""
        hidden: Tensor = self.embed(tokens.to(self.dtype)) + self.identifier
        return hidden

    def project_tokens(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """De-embeds and adds the residual of the tokens that went in: `[B, n, C*q*q]`."""
        residual_in = self.residual_in(tokens.to(self.dtype))
        residual: Tensor = self.residual_out(nn.functional.gelu(residual_in))
        projected: Tensor = self.project(hidden.to(self.dtype))
        return projected + residual


def adaptable_layers(family: Family, transformer: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """The embedding and de-embedding that an adapter starts from.

    Raises:
        UnsupportedModelError: The model embeds patches of a video, which adapters do not do yet, or
            its family does not tell its layers.
    """
    told = layered(family, "trained adapters are not there")
    embed, project = told.embedding_layers(transformer)
    if not isinstance(embed, nn.Linear):
        raise UnsupportedModelError(
            f"this version has no patch adapters for {type(transformer).__name__}, whose patch "
            f"embedding is a {type(embed).__name__}; leave the adapter out: coarse steps need none"
        )
    return embed, project


def _linear(inputs: int, outputs: int) -> nn.Linear:
    # In float32 whatever the process's default is: the base's weights are resized into it.
    return nn.Linear(inputs, outputs, dtype=torch.float32, device="cpu")


def _bias(linear: nn.Linear) -> Tensor:
    bias: Tensor | None = linear.bias
    return linear.weight.new_zeros(linear.out_features) if bias is None else bias


@dataclass(frozen=True, kw_only=True)
class AdapterSet:
    """Adapters by multiple of p; at most one per patch size."""

    adapters: Mapping[int, PatchAdapter] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Patch sizes that have an adapter."""
        return [patch_name(multiple) for multiple in sorted(self.adapters)]
