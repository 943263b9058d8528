"""What a user calls: `compile`, `load`, the `Engine`, and the two ways to drive a run."""

from ddit_rt.engine.build import compile, load  # noqa: A004
from ddit_rt.engine.engine import Engine

__all__ = ["Engine", "compile", "load"]
