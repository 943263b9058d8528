"""What every stage needs to know, and the files that stages leave for each other."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

_QUICK_SAMPLES = 12


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings that all stages share.

    Attributes:
        work: Folder of checkpoints, latents and sample grids.
        export: Folder that the trained pipeline is written to.
        device: Torch device, e.g. ``cpu`` or ``cuda``.
        seed: Seed of data, initial weights and noise.
        workers: Processes that draw samples, and that train the transformer on a CPU.
        compile: Whether the transformer's blocks go through `torch.compile`.
        quick: Whether this is a smoke run, whose weights are worth nothing.
    """

    work: pathlib.Path
    export: pathlib.Path
    device: str
    seed: int = 0
    workers: int = 1
    compile: bool = True
    quick: bool = False

    def __post_init__(self) -> None:
        """Check the values and create the work folder."""
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}, expected at least 1")
        self.work.mkdir(parents=True, exist_ok=True)

    def count(self, samples: int) -> int:
        """How many samples to use where a whole training uses this many."""
        return min(samples, _QUICK_SAMPLES) if self.quick else samples

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds. On one CPU thread, processor time: what else the machine does does not count."""
        alone = self.device == "cpu" and self.workers == 1
        return time.process_time if alone else time.perf_counter


def save_checkpoint(path: pathlib.Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill at any moment leaves a whole one behind."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(path: pathlib.Path, device: str) -> dict[str, Any] | None:
    """Read a checkpoint, or return None where there is none yet."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


def finished(settings: Settings, stage: str, device: str) -> dict[str, Any]:
    """The checkpoint of a stage that must have run.

    Raises:
        ValueError: It has not.
    """
    state = load_checkpoint(settings.work / f"{stage}.pt", device)
    if state is None:
        raise ValueError(f"{settings.work} has no {stage}.pt: run the stage {stage!r} first")
    return state


def save_grid(path: pathlib.Path, images: torch.Tensor, columns: int = 8) -> None:
    """Write images ``[N, 3, H, W]`` in [0, 1] as one PNG, row by row."""
    missing = -len(images) % columns
    images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])]).clamp(0, 1)
    rows = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rows.detach().mul(255).round().byte().cpu().numpy()).save(path)
