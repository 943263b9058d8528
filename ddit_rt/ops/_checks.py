"""Argument checks that several ops share; each message says what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddit_rt.errors import ShapeError

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(tensor: Tensor, dtypes: Sequence[torch.dtype], name: str) -> None:
    """Raises ValueError unless the tensor has one of the dtypes."""
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {tensor.dtype}, expected {expected}: convert it with .to()")


def check_patch_size(patch_size: int, height: int, width: int) -> None:
    """Raises ShapeError unless the patch size is positive and divides both latent sizes."""
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ShapeError(
            f"patch size {patch_size} does not divide the latent size {height} x {width} (height x "
            "width): choose another patch size, or an image size that it divides"
        )


def check_frame_patch(frame_patch: int, frames: int) -> None:
    """Raises ShapeError unless the frame patch is positive and divides the latent frames."""
    if frame_patch < 1 or frames % frame_patch:
        raise ShapeError(
            f"frame_patch {frame_patch} does not divide the {frames} latent frames (an image has "
            "one): choose another frame_patch, or a number of frames that it divides"
        )


def check_shape(tensor: Tensor, shape: Sequence[int], name: str) -> None:
    """Raises ShapeError unless the tensor has this shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def check_in_place(tensor: Tensor, name: str) -> None:
    """Raises ValueError unless the tensor is contiguous, as a buffer that is written must be."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} is not contiguous, and it is used in place: "
            "allocate it as one whole tensor"
        )


def check_step(step: int, steps: int) -> None:
    """Raises ValueError unless the step is one of the table."""
    if not 0 <= step < steps:
        raise ValueError(f"step is {step}, expected 0 to {steps - 1}, the rows of the table")


def check_not_cuda(tensor: Tensor, op: str) -> None:
    """Raises ValueError for a CUDA tensor, which these ops have no kernel for."""
    if tensor.is_cuda:
        raise ValueError(
            f"{op} got tensors on {tensor.device} and runs on the CPU: on CUDA the executor's own "
            "kernels do its work; move the tensors with .cpu()"
        )
