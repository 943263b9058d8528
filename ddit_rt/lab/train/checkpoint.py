"""Checkpoints that a kill at any moment leaves whole, through accelerate.

    checkpoints/step-000250/   trainable.safetensors, optimizer, average of the weights, RNG states
    run.json                   the settings; a run that is continued with others is refused

The frozen base is not stored: one process or DDP keep the trainable weights alone. Under FSDP and
DeepSpeed accelerate stores its own sharded format.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from ddit_rt.lab.measure.report import write_json

_TRAINABLE = "trainable.safetensors"
_NAME = re.compile(r"step-(\d+)")


def register_hooks(accelerator: Any) -> None:
    """Makes accelerate store the trainable weights in place of the whole model."""

    def save(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        # Empty where accelerate has stored the model in its own way already.
        if weights and accelerator.is_main_process:
            trainable = {name for name, p in models[0].named_parameters() if p.requires_grad}
            tensors = {n: v.contiguous() for n, v in weights[0].items() if n in trainable}
            save_file(tensors, Path(folder) / _TRAINABLE)
        weights.clear()

    def load(models: list[nn.Module], folder: str) -> None:
        path = Path(folder) / _TRAINABLE
        if path.is_file():
            models.pop().load_state_dict(load_file(path), strict=False)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def latest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest; None where there is none."""
        found = self._all()
        return found[-1] if found else None

    def save(self, accelerator: Any, step: int) -> None:
        """Stores the state after `step` optimizer steps, and drops the oldest."""
        target = self._folder / f"step-{step:06d}"
        partial = target.with_suffix(".partial")
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for _, old in self._all()[: -self._keep]:
            shutil.rmtree(old)

    def _all(self) -> list[tuple[int, Path]]:
        found = []
        for path in self._folder.glob("step-*"):
            match = _NAME.fullmatch(path.name)
            if match:
                found.append((int(match.group(1)), path))
        return sorted(found)


def check_same_run(path: Path, settings: dict[str, Any]) -> None:
    """Writes down a run's settings, or compares them with those that it was begun with.

    Raises:
        ValueError: They differ; both are shown.
    """
    wanted = json.loads(json.dumps(settings))
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
        return
    found, now = _flat(json.loads(path.read_text(encoding="utf-8"))), _flat(wanted)
    differing = [
        f"{name}: {found.get(name)!r} there, {value!r} now"
        for name, value in now.items()
        if found.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{path.parent} holds a run with other settings, which cannot be continued with these "
            f"({'; '.join(differing)}). Use the same, or start anew with --restart"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
