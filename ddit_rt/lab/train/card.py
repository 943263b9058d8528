"""The card of an adapter folder: recipe and measured gain, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ddit_rt.lab.train.config import DataConfig, TrainConfig
from ddit_rt.lab.train.evaluate import TRAINED, TRAINING_FREE, UNTRAINED, Gain, Losses
from ddit_rt.lab.train.optimizers import CLIP
from ddit_rt.lab.train.states import MEAN, MINIMUM, STD, UNIFORM_SHARE
from ddit_rt.policies import patch_name

if TYPE_CHECKING:
    from ddit_rt.lab.train.trainer import TrainResult

_INTRODUCTION = """They let the frozen model take larger patches in some steps
([DDiT](https://arxiv.org/abs/2602.16968)). Variant `{variant}`."""

_LOADING = """```python
engine = ddit_rt.compile(pipe, adapter="path/to/this/folder")
```

or `ddit-rt compile MODEL --adapter path/to/this/folder -o model.ddit`. The LoRA part of each size
(`adapter_config.json`, `adapter_model.safetensors`) loads in plain PEFT too."""


def model_card(
    model: str, config: TrainConfig, data: DataConfig, result: TrainResult, gain_prompts: str
) -> str:
    """Markdown.

    Args:
        model: Name of the base model.
        config: The run.
        data: What it was trained on.
        result: What it did.
        gain_prompts: Which prompts the gain was measured on, in words.
    """
    parts = [
        f"---\nbase_model: {model}\nlibrary_name: peft\ntags: [ddit_rt, lora]\n---",
        f"# Patch adapters {', '.join(config.patch_sizes)} for {model}",
        _INTRODUCTION.format(variant=config.variant),
        "## Use",
        _LOADING,
        "## Measured",
        _gain_table(result.gains, gain_prompts),
        _loss_table(result.losses, config),
        "## Recipe",
        _recipe(config, data, result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _gain_table(gains: Sequence[Gain], gain_prompts: str) -> str:
    if not gains:
        return ""
    names = [n for n in (TRAINING_FREE, UNTRAINED, TRAINED) if n in gains[0].psnr]
    title = (
        "PSNR in dB against full resolution from the same noise, mean of "
        f"{gains[0].prompts} prompts ({gain_prompts}):"
    )
    lines = [
        title,
        "",
        f"| size | plan | {' | '.join(names)} |",
        f"|---|---|{'--:|' * len(names)}",
    ]
    for gain in gains:
        values = " | ".join(f"{gain.psnr[name]:.1f}" for name in names)
        lines.append(f"| {gain.patch} | {gain.plan} | {values} |")
    return "\n".join(lines)


def _loss_table(losses: Mapping[str, Losses], config: TrainConfig) -> str:
    heads = [patch_name(multiple) for multiple in config.multiples]
    lines = [
        f"Distillation loss (`{config.weighting}`) on one fixed batch:",
        "",
        f"| path | {' | '.join(heads)} |",
        f"|---|{'--:|' * len(heads)}",
    ]
    for name, by_size in losses.items():
        values = " | ".join(f"{by_size[multiple]:.4g}" for multiple in config.multiples)
        lines.append(f"| {name} | {values} |")
    return "\n".join(lines)


def _recipe(config: TrainConfig, data: DataConfig, result: TrainResult) -> str:
    optimizer = config.optimizer
    adapter = config.adapters()[0]
    source = "the model's own trajectories" if data.kind == "self" else f"images ({data.kind})"
    rows = {
        "data": f"{result.samples} samples of {source}, {data.height} x {data.width}, "
        f"{len(result.skipped)} skipped",
        "steps": f"{config.steps} of {config.batch_size} x {config.accumulate} samples",
        "LoRA": f"rank {adapter.rank}, alpha {adapter.lora_alpha}, feed-forward layers",
        "optimizer": f"{optimizer.name}, lr {optimizer.learning_rate:g}, {optimizer.schedule}, "
        f"warm-up {optimizer.warmup_steps}, clip {CLIP:g}, EMA {optimizer.ema:g}",
        "noise levels": f"sigmoid({MEAN:g} + {STD:g} n), {UNIFORM_SHARE:.0%} uniform, "
        f"above {MINIMUM:g}",
        "loss": f"`{config.weighting}`",
        "samples after a step at p": f"{config.detail_share:.0%}"
        if config.variant == "snr"
        else "not used by this variant",
        "seed": str(config.seed),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])
