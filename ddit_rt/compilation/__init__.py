"""Ahead-of-time compilation of the repeated blocks of a transformer."""

from ddit_rt.compilation.blocks import Progress, check_identical, compile_block, compile_blocks

__all__ = ["Progress", "check_identical", "compile_block", "compile_blocks"]
