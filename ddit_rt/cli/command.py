"""What a command is, and the exit codes that all of them share. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Exit codes of `ddit-rt`."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    ARTIFACT = 3
    INTERRUPTED = 130


EXIT_CODES = """exit codes:
  0    done
  1    internal error (run again with --debug and report the traceback)
  2    bad usage or input: an option, a model, an image size, a missing file or package
  3    the artifact is missing, damaged, not trusted, or does not fit model or machine
  130  interrupted"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a command found or did.

    Attributes:
        data: JSON-ready; printed with `--json`.
        text: The result for people, printed without `--json`.
        code: What the process exits with.
    """

    data: dict[str, Any]
    text: str
    code: ExitCode = ExitCode.OK


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One subcommand.

    Attributes:
        name: Its name, as it is typed.
        summary: What it does, in one line.
        examples: Lines of the section 'examples' of its help.
        add_arguments: Declares its options.
        run: Does the work; None where another process of the same run reports. Progress goes to
            stderr; nothing is printed to stdout.
    """

    name: str
    summary: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Outcome | None]

    @property
    def epilog(self) -> str:
        """The end of the command's help."""
        examples = "\n".join(f"  {line}" for line in self.examples)
        return f"examples:\n{examples}\n\n{EXIT_CODES}"
