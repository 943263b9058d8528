"""Patch policies and step caches as they are written on the command line."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from ddit_rt.cli.options import number, text

if TYPE_CHECKING:
    from ddit_rt.planning.request import PolicyChoice
    from ddit_rt.policies import PatchPolicy

Tau = float | dict[str, float]


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `--policy`, `--tau` and `--rho`."""
    group = parser.add_argument_group("patch policy")
    group.add_argument(
        "--policy",
        type=policy_text,
        metavar="POLICY",
        help="fine (the unmodified model), static (the plan "
        "2p:0.4,p), dynamic (a score per step and prompt), spectral or spectral:DELTA (2p until "
        "the noise lets through what it lacks), mixed:SHARE (dynamic, with that share of the "
        "regions at p in coarse steps; mixed:SHARE:PLAN for another plan), or a plan of your own "
        'as shares of the steps, "4p:0.2,2p:0.4,p"; default: the policy of the artifact',
    )
    group.add_argument(
        "--tau",
        type=parse_tau,
        metavar="TAU",
        help="threshold of the dynamic policy, one for all sizes (0.001) or one per size "
        "(2p=0.002,4p=0.0005); larger is faster and coarser",
    )
    group.add_argument(
        "--rho", type=number(0, 1), metavar="RHO", help="quantile over patches, 0 to 1, of the same"
    )


def add_step_cache_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """Declares `--step-cache`.

    Args:
        parser: The parser that gets the option.
        default: What happens without the option, for its help.
    """
    parser.add_argument(
        "--step-cache",
        type=step_cache,
        metavar="CACHE",
        help="steps that reuse instead of compute: teacache:THRESHOLD, teacache-ret:THRESHOLD "
        "(Wan, with use_ret_steps), magcache:THRESHOLD, and without a fit "
        "seacache:THRESHOLD, firstblockcache:THRESHOLD, static:STEPS (from one that computes to "
        "the next); each with :1 behind it to extrapolate what is reused from two steps, with :0 "
        f"not to; or none; larger numbers are faster and less faithful (default: {default})",
    )


@text
def step_cache(value: str) -> str:
    """The text of `--step-cache`, once it is known to stand for one."""
    from ddit_rt.policies import parse_step_cache

    parse_step_cache(value)
    return value


@text
def policy_text(value: str) -> str:
    """The text of `--policy`, which can be read; what it stands for hangs on the artifact."""
    from ddit_rt.planning.request import parse_choice
    from ddit_rt.policies import DDiTPolicy

    parse_choice(value, DDiTPolicy())
    return value


@text
def patch_sizes(value: str) -> str:
    """The text of `--patch-sizes`, which can be read."""
    from ddit_rt.engine.inputs import parse_multiples

    parse_multiples(value)
    return value


def parse_tau(value: str) -> Tau:
    """`"0.001"` to 0.001, `"2p=0.002,4p=0.0005"` to a dict.

    Raises:
        argparse.ArgumentTypeError: Anything else.
    """
    from ddit_rt.policies import DDiTPolicy

    try:
        if "=" not in value:
            tau: Tau = float(value)
        else:
            entries = (entry.split("=") for entry in value.split(","))
            tau = {size.strip(): float(threshold) for size, threshold in entries}
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"got {value!r}; write one number (0.001) or one per size (2p=0.002,4p=0.0005)"
        ) from error
    try:
        DDiTPolicy(tau)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return tau


def choose_policy(
    name: str | None, tau: Tau | None, rho: float | None, default: PatchPolicy
) -> PolicyChoice:
    """The policy that the options describe; a preset or a speed is left to the engine.

    Args:
        name: Value of `--policy`.
        tau: Value of `--tau`.
        rho: Value of `--rho`.
        default: The artifact's policy. `dynamic` starts from it where it is a dynamic one.

    Raises:
        ValueError: An unknown policy, or thresholds for a policy that has none.
    """
    from ddit_rt.planning.request import parse_choice
    from ddit_rt.policies import DDiTPolicy

    if tau is None and rho is None:
        return default if name is None else parse_choice(name, default)
    if name not in (None, "dynamic"):
        raise ValueError(f"--tau and --rho belong to --policy dynamic; got --policy {name}")
    policy = default if isinstance(default, DDiTPolicy) else DDiTPolicy()
    if tau is not None:
        policy = replace(policy, tau=tau)
    return policy if rho is None else replace(policy, rho=rho)
