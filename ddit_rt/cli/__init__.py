"""The command line, `ddit-rt`: one module per command, and what the commands share."""

from ddit_rt.cli.main import main

__all__ = ["main"]
