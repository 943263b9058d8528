"""The engine, and how it is made."""

from ddit_rt.pipeline.build import compile, load  # noqa: A004
from ddit_rt.pipeline.engine import Engine

__all__ = ["Engine", "compile", "load"]
