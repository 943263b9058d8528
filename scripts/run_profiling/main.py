r"""Profile a real run: where the time of the denoising loop goes, by patch size and phase.

Examples:
  the embedded model, compiled first; a CPU does (--backend eager starts at once):
    python scripts/profile.py demo
  an artifact, with the table as JSON too:
    python scripts/profile.py flux-dev.ddit --model black-forest-labs/FLUX.1-dev \
        --prompt "a zebra in tall grass" --steps 28 --policy 4p:0.2,2p:0.4,p \
        --out profile_out --json profile_out/profile.json
  under Nsight, or only its command line, for another machine:
    python scripts/profile.py flux-dev.ddit --model ./flux --tool nsys
    python scripts/profile.py flux-dev.ddit --model ./flux --tool ncu --patch 2p --launches 40
    python scripts/profile.py flux-dev.ddit --model ./flux --tool nsys --print-command

--tool torch prints the table and writes a Chrome trace. nsys and ncu run this script again under
Nsight with --tool nvtx, which profiles nothing itself: it marks the run with NVTX ranges and opens
the capture range around it, after the warm-up. On CUDA the run is in its 'host' form, in which the
host sees every phase; --executor loop or step profiles that form as well.

The prompt is encoded before, and the picture is not decoded: only the loop is profiled.
Exit codes are those of ddit-rt: 2 for bad usage or a missing tool, 3 for an artifact that does not
fit.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddit_rt.cli.main import explain
from ddit_rt.cli.models import DEVICES, DTYPES, EMBEDDED, MODEL_HELP
from ddit_rt.cli.policies import add_policy_arguments
from run_profiling.nsight import (
    TOOLS,
    find_tool,
    missing_tool,
    ncu_command,
    nsys_command,
    nsys_stats_command,
)

if TYPE_CHECKING:
    from run_profiling.subject import Subject

_PROMPT = "a red circle on plain blue"
_SCRIPT = Path(__file__).resolve().parents[1] / "profile.py"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "artifact", metavar="ARTIFACT", help=f"what compile wrote, or {EMBEDDED!r}: compiled here"
    )
    parser.add_argument("--model", help=f"the weights: {MODEL_HELP}")
    parser.add_argument(
        "--tool",
        choices=("auto", "torch", *TOOLS, "nvtx"),
        default="auto",
        help="default: nsys on CUDA where it is installed, else torch",
    )
    parser.add_argument(
        "--executor",
        choices=("host", "step", "loop"),
        help="form of the run on CUDA (default: host); step and loop come after it with --tool "
        "torch, and instead of it with the others",
    )
    parser.add_argument("--prompt", nargs="+", default=[_PROMPT], metavar="TEXT", help="a batch")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the pipeline's")
    parser.add_argument("--height", type=int, help="default: as compiled")
    parser.add_argument("--width", type=int, help="default: as compiled")
    parser.add_argument("--max-sequence-length", type=int, help="default: the pipeline's")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as compiled")
    parser.add_argument("--warm-up", type=int, default=2, help="runs before it (default: 2)")
    parser.add_argument(
        "--backend", choices=("aot", "eager"), default="aot", help=f"of ARTIFACT {EMBEDDED}"
    )
    parser.add_argument(
        "--device", choices=("auto", *DEVICES), default="auto", help=f"of ARTIFACT {EMBEDDED}"
    )
    parser.add_argument("--trust-code", action="store_true", help="as for ddit-rt generate")
    parser.add_argument(
        "--out", type=Path, default=Path("profile_out"), help="folder (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON too")
    parser.add_argument("--patch", default="p", help="patch size that ncu looks at (default: p)")
    parser.add_argument("--launches", type=int, default=100, help="kernels for ncu (default: 100)")
    parser.add_argument(
        "--print-command", action="store_true", help="print the command of nsys or ncu, run nothing"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    add_policy_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.warm_up < 1:
        parser.error("--warm-up must be at least 1: the first run allocates and captures")
    if args.print_command and args.tool not in TOOLS:
        parser.error("--print-command needs --tool nsys or ncu; the others run in this process")
    try:
        return _run(args)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last line of defence
        if args.debug:
            traceback.print_exc()
        code, message = explain(error)
        _say(f"error: {message}")
        return int(code)


def _run(args: argparse.Namespace) -> int:
    tool = _choose_tool(args.tool)
    if tool in TOOLS:
        return _run_nsight(tool, args)
    # At import it reports optional image backends that no text-to-image pipeline needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    from run_profiling.subject import load_subject

    # Where there is no device at all, this is known before minutes of compiling.
    _check_executor(args.executor, on_cuda=torch.cuda.is_available())
    subject = load_subject(args)
    forms = _forms(subject, args)
    if tool == "nvtx":
        _run_marked(subject, forms[-1], args.warm_up)
    else:
        _run_torch(subject, forms, args)
    return 0


def _choose_tool(tool: str) -> str:
    if tool not in ("auto", "nvtx"):
        return tool
    import torch

    on_cuda = torch.cuda.is_available()
    if tool == "nvtx":
        if not on_cuda:
            raise ValueError(
                "--tool nvtx marks a run for Nsight, which needs a CUDA device, and torch "
                f"{torch.__version__} sees none: use --tool torch"
            )
        return tool
    if on_cuda and find_tool("nsys") is not None:
        return "nsys"
    reason = "nsys is not installed" if on_cuda else "no CUDA device"
    _say(f"{reason}: using torch.profiler")
    return "torch"


def _check_executor(executor: str | None, *, on_cuda: bool) -> None:
    if executor is not None and not on_cuda:
        raise ValueError(
            f"got --executor {executor}, and the model is on the CPU, which has one executor only: "
            "leave the option out"
        )


def _forms(subject: Subject, args: argparse.Namespace) -> list[str | None]:
    """Executors to run; None is the only one that a CPU has."""
    on_cuda = subject.device.type == "cuda"
    _check_executor(args.executor, on_cuda=on_cuda)
    if not on_cuda:
        return [None]
    return ["host"] if args.executor in (None, "host") else ["host", args.executor]


def _run_torch(subject: Subject, forms: Sequence[str | None], args: argparse.Namespace) -> None:
    from run_profiling.ceilings import measure_ceilings
    from run_profiling.report import report_of, text_of
    from run_profiling.torch_tool import profile_run

    args.out.mkdir(parents=True, exist_ok=True)
    ceilings = measure_ceilings(subject.device, subject.model.dtype)
    runs = [profile_run(subject, form, ceilings, args.warm_up, args.out) for form in forms]
    report = report_of(subject, ceilings, runs)
    sys.stdout.write(text_of(report) + "\n")
    _write_json(args.json, report)


def _run_marked(subject: Subject, form: str | None, warm_up: int) -> None:
    """One run inside the capture range that Nsight waits for."""
    import torch

    if form is None:
        raise ValueError("--tool nvtx needs a model on CUDA, and this one is on the CPU")
    subject.engine.executor = form
    for _ in range(warm_up):
        subject.run()
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        trace = subject.run()
        torch.cuda.synchronize()
    sys.stdout.write(f"{trace}\n")


def _run_nsight(tool: str, args: argparse.Namespace) -> int:
    path = find_tool(tool)
    child = child_command(args)
    if tool == "nsys":
        command = nsys_command(path or tool, child, args.out)
    else:
        command = ncu_command(
            path or tool, child, args.out, patch=args.patch, launches=args.launches
        )
    if args.print_command:
        sys.stdout.write(shlex.join(command) + "\n")
        return 0
    if path is None:
        raise ValueError(missing_tool(tool))
    args.out.mkdir(parents=True, exist_ok=True)
    _say(shlex.join(command))
    code = subprocess.run(command, check=False).returncode  # noqa: S603 - built here
    if code == 0 and tool == "nsys":
        _write_stats(path, args.out)
    files = sorted(str(file) for file in args.out.glob(f"{tool}*"))
    result = {"schema_version": 1, "tool": tool, "command": command, "exit_code": code}
    _write_json(args.json, {**result, "files": files})
    _say(f"{tool} {'wrote' if code == 0 else f'failed with exit code {code};'} {', '.join(files)}")
    return 1 if code else 0


def _write_stats(nsys: str, out: Path) -> None:
    command = nsys_stats_command(nsys, out)
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    sys.stdout.write(done.stdout)
    (out / "nsys-stats.txt").write_text(done.stdout + done.stderr, encoding="utf-8")


def child_command(args: argparse.Namespace) -> list[str]:
    """This script again, for the process that Nsight starts."""
    command = [sys.executable, str(_SCRIPT), args.artifact, "--tool=nvtx"]
    named = {
        "model": args.model,
        "executor": args.executor,
        "seed": args.seed,
        "steps": args.steps,
        "height": args.height,
        "width": args.width,
        "max-sequence-length": args.max_sequence_length,
        "dtype": args.dtype,
        "warm-up": args.warm_up,
        "backend": args.backend,
        "device": args.device,
        "policy": args.policy,
        "tau": _tau_text(args.tau),
        "rho": args.rho,
    }
    command += [f"--{name}={value}" for name, value in named.items() if value is not None]
    if args.trust_code:
        command.append("--trust-code")
    return [*command, "--prompt", *args.prompt]


def _tau_text(tau: float | dict[str, float] | None) -> str | None:
    if isinstance(tau, dict):
        return ",".join(f"{patch}={value}" for patch, value in tau.items())
    return None if tau is None else str(tau)


def _write_json(path: Path | None, data: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    sys.stderr.write(f"profile: {text}\n")
