"""Parses the command line, runs one command, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TextIO

from ddit_rt import checks
from ddit_rt.cli.ab import AB
from ddit_rt.cli.batch import BATCH
from ddit_rt.cli.calibrate import CALIBRATE
from ddit_rt.cli.command import EXIT_CODES, Command, ExitCode
from ddit_rt.cli.compile import COMPILE
from ddit_rt.cli.demo import DEMO
from ddit_rt.cli.doctor import DOCTOR
from ddit_rt.cli.evaluate import EVALUATE
from ddit_rt.cli.generate import GENERATE
from ddit_rt.cli.info import INFO
from ddit_rt.cli.profile import PROFILE
from ddit_rt.cli.serve import SERVE
from ddit_rt.cli.train import TRAIN
from ddit_rt.cli.ui import UI
from ddit_rt.errors import ArtifactError, CompileError, RunCancelled

COMMANDS: tuple[Command, ...] = (
    *(DEMO, COMPILE, TRAIN, CALIBRATE, EVALUATE, AB, GENERATE, INFO),
    *(SERVE, UI, BATCH, PROFILE, DOCTOR),
)

_LEVELS = ("debug", "info", "warning", "error")

_CALLER_ERRORS = (ValueError, OSError, ModuleNotFoundError)
"""What a user can cause: bad values, unreadable or missing files, a missing extra."""


class Parser(argparse.ArgumentParser):
    """An option's bad value is one line; where arguments are missing or unknown, usage helps."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        if not message.startswith("argument ") or message.startswith("argument COMMAND"):
            self.print_usage(sys.stderr)
        self.exit(int(ExitCode.USAGE), f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `ddit-rt`.

    Args:
        argv: Arguments without the program's name; by default those of the process.

    Returns:
        An `ExitCode`.
    """
    try:
        args, unknown = build_parser().parse_known_args(argv)
        if unknown:
            args.parser.error(_unrecognized(unknown, args.parser.format_usage()))
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return _execute(args)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last line of defence
        if args.debug:
            traceback.print_exc()
        code, message = explain(error)
        sys.stderr.write(f"ddit-rt {args.command.name}: {message}\n")
        return int(code)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `ddit-rt` and its commands."""
    from ddit_rt.version import __version__

    parser = Parser(
        prog="ddit-rt",
        description="Low-latency inference for diffusion transformers with dynamic patch sizes.",
        epilog=f"ddit-rt COMMAND --help shows options and examples.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ddit-rt {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.add_argument("--json", action="store_true", help="print the result as JSON")
        subparser.add_argument("--debug", action="store_true", help="show tracebacks")
        subparser.add_argument(
            "--log-level",
            choices=_LEVELS,
            default="warning",
            help="what to log on stderr; info: runs, loading, compiling (default: %(default)s)",
        )
        subparser.set_defaults(command=command, parser=subparser)
    return parser


def _unrecognized(unknown: Sequence[str], usage: str) -> str:
    """What to say of options that a command does not have."""
    advice = checks.did_you_mean(unknown[0], re.findall(r"--[\w-]+", usage))
    return f"unrecognized arguments: {' '.join(unknown)}" + (f" ({advice})" if advice else "")


def _text(error: BaseException) -> str:
    """An error's message; of one of the file system without its number."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"no such file: {error.filename}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error)


def explain(error: BaseException) -> tuple[ExitCode, str]:
    """Exit code and one line for an error."""
    message = " ".join(_text(error).split())
    if isinstance(error, (KeyboardInterrupt, RunCancelled)):
        return ExitCode.INTERRUPTED, "interrupted"
    if isinstance(error, ArtifactError):
        return ExitCode.ARTIFACT, message
    if isinstance(error, _CALLER_ERRORS):
        return ExitCode.USAGE, message
    if isinstance(error, CompileError):
        return ExitCode.INTERNAL, message
    hint = "run again with --debug for the traceback"
    return ExitCode.INTERNAL, f"internal error: {type(error).__name__}: {message}; {hint}"


def _execute(args: argparse.Namespace) -> int:
    command: Command = args.command
    # At import it reports optional image backends that no text-to-image pipeline needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with _plain_warnings(), _logging(args.log_level), contextlib.redirect_stdout(sys.stderr):
        outcome = command.run(args)
    if outcome is None:
        return int(ExitCode.OK)
    if args.json:
        sys.stdout.write(json.dumps(outcome.data, indent=2, allow_nan=False) + "\n")
    else:
        sys.stdout.write(outcome.text.rstrip("\n") + "\n")
    return int(outcome.code)


@contextlib.contextmanager
def _logging(level: str) -> Iterator[None]:
    """Shows what the package logs from a level on, with the time and the part that it is of."""
    logger, handler = logging.getLogger("ddit_rt"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = logger.level
    logger.setLevel(level.upper())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Shows warnings as one line, without the source line that raised them."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        del category, filename, lineno, file, line
        sys.stderr.write(f"warning: {' '.join(str(message).split())}\n")

    with warnings.catch_warnings():
        replaced: Any = show
        warnings.showwarning = replaced
        yield
