"""Torch's global state, kept out of what the runtime computes.

Autocast, the gradient and inference modes, and the default dtype and device belong to whoever
calls. Two kinds of code run on the way, and want opposite things:

- ours (compiling, planning, the step loop) means the same whatever they are: `shielded`,
  `without_autocast` where weights are written, and `plain_defaults` around what makes tensors by
  code that is not ours;
- the user's (text encoders, VAE, callbacks) runs as in diffusers' own call: `callers_modes`.

Modes are a thread's own, so that a shield disturbs no other thread. The default dtype is the
process's: `plain_defaults` changes it only where it is another than float32, and never for as long
as a step loop runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

_DEVICE_TYPES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class _Modes:
    """The modes of a thread.

    Attributes:
        inference: Whether it is in inference mode.
        grad: Whether it records gradients.
        autocast: For each of `_DEVICE_TYPES`: whether it is on, and its dtype.
    """

    inference: bool
    grad: bool
    autocast: tuple[tuple[bool, torch.dtype], ...]

    @classmethod
    def current(cls) -> _Modes:
        return cls(
            inference=torch.is_inference_mode_enabled(),
            grad=torch.is_grad_enabled(),
            autocast=tuple(
                (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in _DEVICE_TYPES
            ),
        )

    def enter(self, stack: ExitStack) -> None:
        stack.enter_context(torch.inference_mode(self.inference))
        # After inference mode, which sets it too.
        stack.enter_context(torch.set_grad_enabled(self.grad))
        for kind, (enabled, dtype) in zip(_DEVICE_TYPES, self.autocast, strict=True):
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))


_CALLERS: ContextVar[_Modes | None] = ContextVar("ddit_rt_callers_modes", default=None)
"""The modes outside of the outermost shield of this thread; None where there is none."""


@contextmanager
def shielded() -> Iterator[None]:
    """No autocast, no gradients, no inference mode; also as a decorator.

    Inference mode is left because tensors that are made in it cannot be written to outside of it,
    and an engine keeps memory from one call to the next.
    """
    modes = _Modes.current()
    token = _CALLERS.set(_CALLERS.get() or modes)
    try:
        with ExitStack() as stack:
            off = tuple((False, dtype) for _, dtype in modes.autocast)
            _Modes(inference=False, grad=False, autocast=off).enter(stack)
            yield
    finally:
        _CALLERS.reset(token)


@contextmanager
def without_autocast() -> Iterator[None]:
    """No autocast, and else the caller's modes: for what makes or changes the caller's own tensors.

    Also as a decorator.
    """
    with ExitStack() as stack:
        for kind in _DEVICE_TYPES:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def callers_modes() -> Iterator[None]:
    """Within `shielded`: the modes that its caller had, for the caller's own code.

    Gradients stay off, as in the call of a diffusers pipeline.
    """
    modes = _CALLERS.get()
    if modes is None:
        yield
        return
    token = _CALLERS.set(None)
    try:
        with ExitStack() as stack:
            _Modes(inference=modes.inference, grad=False, autocast=modes.autocast).enter(stack)
            yield
    finally:
        _CALLERS.reset(token)


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Default dtype float32, default device CPU; also as a decorator."""
    dtype = torch.get_default_dtype()
    try:
        if dtype is not torch.float32:
            torch.set_default_dtype(torch.float32)
        with ExitStack() as stack:
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            yield
    finally:
        if dtype is not torch.float32:
            torch.set_default_dtype(dtype)
