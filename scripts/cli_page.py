#!/usr/bin/env python3
"""Writes docs/cli.md from the parsers of `ddit-rt`; a test holds the two together."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from ddit_rt.cli.command import Command
from ddit_rt.cli.main import COMMANDS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD = """# Command line

Made by `python scripts/cli_page.py`. Every command also takes `--json` (print the result as JSON),
`--debug` (show tracebacks), `--log-level` (debug, info, warning or error; default: warning) and
`--help`.
Exit codes: 0 done, 1 internal error, 2 bad usage or input, 3 the artifact is missing, damaged, not
trusted or does not fit, 130 interrupted.
"""


def page() -> str:
    """The text of docs/cli.md."""
    return "\n".join([HEAD, *(line for command in COMMANDS for line in _section(command))])


def _section(command: Command) -> Iterator[str]:
    parser = argparse.ArgumentParser(prog=f"ddit-rt {command.name}")
    command.add_arguments(parser)
    yield from (f"## {command.name}", "", command.summary, "")
    yield from ("```sh", *command.examples, "```", "")
    yield from ("| option | meaning |", "|---|---|")
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to list them
        if action.dest != "help":
            yield f"| `{_name(action)}` | {_meaning(action)} |"
    yield ""


def _name(action: argparse.Action) -> str:
    names = ", ".join(action.option_strings)
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    return " ".join([names, *([str(value)] if action.nargs != 0 else [])]).strip()


def _meaning(action: argparse.Action) -> str:
    filled = re.sub(r"%\((\w+)\)s", lambda name: str(getattr(action, name[1])), action.help or "")
    return " ".join(filled.split()).replace("|", "/")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
