"""`ddit-rt profile`: where the time of the denoising loop goes, by patch size and phase."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddit_rt.cli.command import Command, Outcome
from ddit_rt.cli.models import DEVICES, add_call_arguments, load_artifact, pipeline_arguments
from ddit_rt.cli.options import folder_to_write, seed, whole
from ddit_rt.cli.policies import add_policy_arguments, add_step_cache_argument, choose_policy
from ddit_rt.sources import (
    EMBEDDED,
    MODEL_HELP,
    check_names,
    embedded_defaults,
    is_embedded,
    load_pipeline,
)

if TYPE_CHECKING:
    from ddit_rt.engine import Engine
    from ddit_rt.lab.profile.subject import Subject

_PROMPT = "a red circle on plain blue"
_NSIGHT = ("nsys", "ncu")
_HANDED_ON = (
    *("model", "executor", "seed", "steps", "height", "width", "audio_duration_s"),
    *("max_sequence_length", "dtype", "warm_up", "backend", "device", "policy", "tau", "rho"),
    "step_cache",
)
_STDERR = 2
"""Where tools print: standard output is the result's."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "artifact", metavar="ARTIFACT", help=f"what compile wrote, or {EMBEDDED!r}: compiled here"
    )
    parser.add_argument("--model", help=f"the weights: {MODEL_HELP}")
    parser.add_argument(
        "--tool",
        choices=("auto", "torch", *_NSIGHT, "nvtx"),
        default="auto",
        help="torch prints a table and writes a Chrome trace; nsys and ncu run this command again "
        "under Nsight with nvtx, which only marks the run (default: nsys on CUDA where it is "
        "installed, else torch)",
    )
    parser.add_argument(
        "--executor",
        choices=("host", "step", "loop"),
        help="form of the run on CUDA (default: host, in which the host sees every phase); step "
        "and loop come after it with --tool torch, and instead of it with the others",
    )
    parser.add_argument("--prompt", nargs="+", default=[_PROMPT], metavar="TEXT", help="a batch")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise (default: 0)")
    parser.add_argument("--steps", type=whole(1), help="denoising steps; default: the pipeline's")
    add_call_arguments(parser, guidance=False)
    parser.add_argument(
        "--warm-up",
        type=whole(1),
        default=2,
        help="runs before it, of which the first allocates and captures (default: 2)",
    )
    parser.add_argument(
        "--backend", choices=("aot", "eager"), default="aot", help=f"of ARTIFACT {EMBEDDED}"
    )
    parser.add_argument(
        "--device", choices=("auto", *DEVICES), default="auto", help=f"of ARTIFACT {EMBEDDED}"
    )
    parser.add_argument("--trust-code", action="store_true", help="as for ddit-rt generate")
    parser.add_argument(
        "--out",
        type=folder_to_write,
        default=Path("profile_out"),
        metavar="DIR",
        help="folder for profile.json and the traces (default: %(default)s)",
    )
    parser.add_argument("--patch", default="p", help="patch size that ncu looks at (default: p)")
    parser.add_argument(
        "--launches", type=whole(1), default=100, help="kernels for ncu (default: 100)"
    )
    parser.add_argument(
        "--print-command", action="store_true", help="print the command of nsys or ncu, run nothing"
    )
    add_policy_arguments(parser)
    add_step_cache_argument(parser, "as compiled")


def _run(args: argparse.Namespace) -> Outcome:
    if args.print_command and args.tool not in _NSIGHT:
        raise ValueError("--print-command needs --tool nsys or ncu; the others run in this process")
    tool = _choose_tool(args.tool)
    if tool in _NSIGHT:
        return _run_nsight(tool, args)
    import torch

    # Where there is no device at all, this is known before minutes of compiling.
    _check_executor(args.executor, on_cuda=torch.cuda.is_available())
    subject = _subject(args)
    forms = _forms(subject, args)
    if tool == "nvtx":
        return _run_marked(subject, forms[-1], args.warm_up)
    return _run_torch(subject, forms, args)


def _choose_tool(tool: str) -> str:
    if tool not in ("auto", "nvtx"):
        return tool
    import torch

    from ddit_rt.lab.profile.nsight import find_tool

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
    _say(f"{'nsys is not installed' if on_cuda else 'no CUDA device'}: using torch.profiler")
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


def _run_torch(subject: Subject, forms: Sequence[str | None], args: argparse.Namespace) -> Outcome:
    from ddit_rt.lab.profile.ceilings import measure_ceilings
    from ddit_rt.lab.profile.report import report_of, text_of
    from ddit_rt.lab.profile.run import profile_run

    args.out.mkdir(parents=True, exist_ok=True)
    ceilings = measure_ceilings(subject.device, subject.model.dtype)
    runs = [profile_run(subject, form, ceilings, args.warm_up, args.out) for form in forms]
    report = report_of(subject, ceilings, runs)
    _write_json(args.out, report)
    return Outcome(data=report, text=text_of(report))


def _run_marked(subject: Subject, form: str | None, warm_up: int) -> Outcome:
    """One run inside the capture range that Nsight waits for."""
    import torch

    if form is None:
        raise ValueError("--tool nvtx needs a model on CUDA, and this one is on the CPU")
    engine: Any = subject.engine
    engine.executor = form
    for _ in range(warm_up):
        subject.run()
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        trace = subject.run()
        torch.cuda.synchronize()
    return Outcome(data=trace.to_dict(), text=str(trace))


def _run_nsight(tool: str, args: argparse.Namespace) -> Outcome:
    from ddit_rt.lab.profile.nsight import (
        find_tool,
        missing_tool,
        ncu_command,
        nsys_command,
        nsys_stats_command,
    )

    path, child = find_tool(tool), child_command(args)
    if tool == "nsys":
        command = nsys_command(path or tool, child, args.out)
    else:
        command = ncu_command(
            path or tool, child, args.out, patch=args.patch, launches=args.launches
        )
    if args.print_command:
        return Outcome(data={"command": command}, text=shlex.join(command))
    if path is None:
        raise ValueError(missing_tool(tool))
    args.out.mkdir(parents=True, exist_ok=True)
    _say(shlex.join(command))
    code = subprocess.run(command, check=False, stdout=_STDERR).returncode  # noqa: S603 - built here
    if code == 0 and tool == "nsys":
        _write_stats(nsys_stats_command(path, args.out), args.out)
    files = sorted(str(file) for file in args.out.glob(f"{tool}*"))
    data = {"schema_version": 1, "tool": tool, "command": command, "exit_code": code}
    data["files"] = files
    _write_json(args.out, data)
    if code:
        raise ChildProcessError(f"{tool} ended with exit code {code} and left {files or 'nothing'}")
    return Outcome(data=data, text=f"{tool} wrote {', '.join(files)}")


def _write_stats(command: Sequence[str], out: Path) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    sys.stderr.write(done.stdout)
    (out / "nsys-stats.txt").write_text(done.stdout + done.stderr, encoding="utf-8")


def child_command(args: argparse.Namespace) -> list[str]:
    """This command again, for the process that Nsight starts."""
    # A checkout in the working directory must not stand in for the installed package.
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    command = [sys.executable, *safe, "-m", "ddit_rt.cli", "profile", args.artifact, "--tool=nvtx"]
    named = {name: getattr(args, name) for name in _HANDED_ON}
    if isinstance(args.tau, dict):
        named["tau"] = ",".join(f"{patch}={value}" for patch, value in args.tau.items())
    for name, value in named.items():
        if value is not None:
            command.append(f"--{name.replace('_', '-')}={value}")
    if args.trust_code:
        command.append("--trust-code")
    return [*command, "--prompt", *args.prompt]


def _subject(args: argparse.Namespace) -> Subject:
    """Loads the artifact, or compiles the embedded model, and encodes the request.

    Raises:
        ValueError: Options that do not fit together, or a model that cannot be run.
        ArtifactError: See `ddit_rt.load`.
    """
    import torch

    from ddit_rt.lab.profile.subject import subject_of
    from ddit_rt.policies import PatchPolicy, as_step_cache

    check_names(args.artifact, args.model)
    embedded = args.artifact == EMBEDDED and is_embedded(EMBEDDED)
    engine = _embedded_engine(args) if embedded else _loaded_engine(args)
    policy = choose_policy(args.policy, args.tau, args.rho, engine.default_policy)
    if not isinstance(policy, PatchPolicy):
        raise ValueError(  # noqa: TRY004 - of a text, not of a type
            f"got --policy {args.policy}, a choice among the artifact's calibrated plans; name a "
            "plan itself, such as static or 4p:0.2,2p:0.4,p"
        )
    cache = engine.default_step_cache if args.step_cache is None else as_step_cache(args.step_cache)
    assert cache is not None, "a text stands for one"
    generator = torch.Generator().manual_seed(args.seed)
    call = {**pipeline_arguments(args), "generator": generator}
    return subject_of(engine, policy, cache, args.prompt, call)


def _embedded_engine(args: argparse.Namespace) -> Engine:
    import ddit_rt
    from ddit_rt.lab.demo.plans import DEMO_POLICY

    pipeline = load_pipeline(EMBEDDED, args.dtype, args.device)
    size = embedded_defaults(EMBEDDED)
    return ddit_rt.compile(
        pipeline,
        height=size["height"],
        width=size["width"],
        patch_policy=DEMO_POLICY,
        backend=args.backend,
    )


def _loaded_engine(args: argparse.Namespace) -> Engine:
    from ddit_rt.artifact import read_manifest

    # Before the model: a missing artifact should not cost the minutes of loading one.
    return load_artifact(args, read_manifest(args.artifact))


def _write_json(out: Path, data: dict[str, Any]) -> None:
    text = json.dumps(data, indent=1, allow_nan=False)
    (out / "profile.json").write_text(text + "\n", encoding="utf-8")


def _say(text: str) -> None:
    sys.stderr.write(f"profile: {text}\n")


PROFILE = Command(
    name="profile",
    summary="Show where the time of the denoising loop goes, by patch size and phase.",
    examples=(
        "ddit-rt profile demo",
        "ddit-rt profile demo --backend eager --out profile_out",
        'ddit-rt profile flux-dev.ddit --model ./flux --prompt "a zebra in tall grass" --steps 28',
        "ddit-rt profile flux-dev.ddit --model ./flux --tool nsys",
        "ddit-rt profile flux-dev.ddit --model ./flux --tool ncu --patch 2p --launches 40",
        "ddit-rt profile flux-dev.ddit --model ./flux --tool nsys --print-command",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
