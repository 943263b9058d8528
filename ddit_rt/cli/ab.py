"""`ddit-rt ab`: people compare two plans of an evaluation, blind."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ddit_rt.cli.command import Command, Outcome
from ddit_rt.cli.options import existing_folder, whole

if TYPE_CHECKING:
    from ddit_rt.lab.evaluate.preferences import Study


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("evaluation", type=existing_folder, metavar="DIR", help="what eval wrote")
    parser.add_argument(
        "--plan", metavar="NAME", help="plan that is judged; default: the evaluation's main plan"
    )
    parser.add_argument(
        "--against", metavar="NAME", help="plan that it is judged against; default: fine"
    )
    parser.add_argument(
        "--port",
        type=whole(0, 65535),
        default=8321,
        help="of the page; 0: a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--summary", action="store_true", help="show the shares so far and serve nothing"
    )


def _run(args: argparse.Namespace) -> Outcome:
    from ddit_rt.lab.evaluate.preferences import Study, summary_text

    study = Study(args.evaluation, args.plan, args.against)
    if not args.summary:
        _serve(study, args.port)
    summary = study.summary()
    return Outcome(data=summary, text=summary_text(summary))


def _serve(study: Study, port: int) -> None:
    """Serves the page until the command is interrupted."""
    from ddit_rt.lab.evaluate.server import StudyServer

    with StudyServer(study, port) as server:
        sys.stderr.write(f"open {server.url} on this machine; Ctrl-C ends and shows the shares\n")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            sys.stderr.write("\n")


AB = Command(
    name="ab",
    summary="Compare two plans of an evaluation by people, blind, on a page of this machine.",
    examples=(
        "ddit-rt ab flux-eval",
        "ddit-rt ab flux-eval --plan fast --against equal-steps",
        "ddit-rt ab flux-eval --summary --json",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
