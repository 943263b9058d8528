"""What every training stage needs to know: where its files are, the device, the seed."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings that all stages share.

    Attributes:
        work: Folder of checkpoints, latents and sample grids.
        device: Torch device, e.g. ``cpu`` or ``cuda``.
        seed: Seed of data, initial weights and noise.
        workers: Processes that draw pictures, and that train the transformer on a CPU.
        compile: Whether networks go through `torch.compile`.
    """

    work: pathlib.Path
    device: str
    seed: int = 0
    workers: int = 2
    compile: bool = True

    def __post_init__(self) -> None:
        """Check the values and create the work folder."""
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}, expected at least 1")
        self.work.mkdir(parents=True, exist_ok=True)


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


def save_grid(path: pathlib.Path, pictures: torch.Tensor, columns: int = 8) -> None:
    """Write pictures ``[N, 3, H, W]`` in [0, 1] as one PNG, row by row."""
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    sheet: npt.NDArray[np.uint8] = np.zeros((rows * height, columns * width, 3), dtype=np.uint8)
    pixels = pictures.detach().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for i in range(count):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = pixels[i]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


@contextlib.contextmanager
def evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode without gradients, and back into its mode afterwards."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)
