"""Errors that a caller can cause. Each message says what came, what was expected, what to do."""

from __future__ import annotations


class DditError(Exception):
    """Base class of every error that `ddit_rt` raises on purpose."""


class UnsupportedModelError(DditError, ValueError):
    """The model, pipeline, scheduler or argument is one that no family or solver handles."""


class ShapeError(DditError, ValueError):
    """A size, token count or tensor shape is outside what the engine can run."""


class ScheduleError(DditError, ValueError):
    """A noise schedule whose levels or steps are NaN or infinite."""


class ArtifactError(DditError, ValueError):
    """An artifact cannot be read: missing, truncated, tampered with, or of another schema."""


class ArtifactMismatchError(ArtifactError):
    """A sound artifact that does not fit this model, machine or torch build."""


class UntrustedArtifactError(ArtifactError):
    """An artifact that was not built on this machine and that the caller has not vouched for."""


class CompileError(DditError, RuntimeError):
    """Ahead-of-time compilation of a block failed."""


class RunCancelled(DditError, RuntimeError):
    """A run was cancelled between two steps."""


class CaptureError(DditError, RuntimeError):
    """A step cannot be captured in a CUDA graph, or not run in the form that was asked for."""


class StallError(DditError, RuntimeError):
    """The device went without progress for longer than `DDIT_RT_STALL_SECONDS` allows."""
