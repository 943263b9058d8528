"""Patch policies and step caches as they are written on the command line."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddit_rt.patch_scheduler import DDiTPolicy, PatchPolicy
    from ddit_rt.pipeline.presets import PolicyChoice
    from ddit_rt.step_cache import StepCache

DEFAULT_STATIC_PLAN = "2p:0.4,p"
"""The plan of `--policy static`: layout at 2p, then detail at p."""

Tau = float | dict[str, float]


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `--policy`, `--tau` and `--rho`."""
    group = parser.add_argument_group("patch policy")
    group.add_argument(
        "--policy",
        metavar="POLICY",
        help="fine (the unmodified model), static (the plan "
        f"{DEFAULT_STATIC_PLAN}), dynamic (a score per step and prompt), or a plan of your own as "
        'shares of the steps, "4p:0.2,2p:0.4,p"; default: the policy of the artifact',
    )
    group.add_argument(
        "--tau",
        type=parse_tau,
        metavar="TAU",
        help="threshold of the dynamic policy, one for all sizes (0.001) or one per size "
        "(2p=0.002,4p=0.0005); larger is faster and coarser",
    )
    group.add_argument(
        "--rho", type=float, metavar="RHO", help="quantile over patches, 0 to 1, of the same"
    )


def add_step_cache_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """Declares `--step-cache`.

    Args:
        parser: Where to.
        default: What happens without the option, for its help.
    """
    parser.add_argument(
        "--step-cache",
        metavar="CACHE",
        help="steps that reuse instead of compute: teacache:THRESHOLD, teacache-ret:THRESHOLD "
        "(Wan, with use_ret_steps), magcache:THRESHOLD, or none; larger thresholds are faster and "
        f"less faithful (default: {default})",
    )


def parse_step_cache(text: str | None) -> StepCache | None:
    """The step cache of `--step-cache`; None: the option was left out.

    Raises:
        ValueError: An unknown cache, or no threshold.
    """
    from ddit_rt.step_cache import MagCache, NoCache, TeaCache

    if text is None:
        return None
    name, _, number = text.partition(":")
    threshold = _number(number)
    if name == "none" and not number:
        return NoCache()
    if name == "magcache" and threshold is not None:
        return MagCache(threshold=threshold)
    if name in ("teacache", "teacache-ret") and threshold is not None:
        return TeaCache(threshold, use_ret_steps=name == "teacache-ret")
    raise ValueError(
        f"got --step-cache {text}; use teacache:0.4, teacache-ret:0.1, magcache:0.06, or none"
    )


def parse_tau(text: str) -> Tau:
    """`"0.001"` to 0.001, `"2p=0.002,4p=0.0005"` to a dict.

    Raises:
        argparse.ArgumentTypeError: Anything else.
    """
    try:
        if "=" not in text:
            return float(text)
        entries = (entry.split("=") for entry in text.split(","))
        return {size.strip(): float(tau) for size, tau in entries}
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; write one number (0.001) or one per size (2p=0.002,4p=0.0005)"
        ) from error


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
    from ddit_rt.artifact import PRESETS
    from ddit_rt.patch_scheduler import FinePolicy, StaticPolicy

    tuned = tau is not None or rho is not None
    if name == "dynamic" or (name is None and tuned):
        return _dynamic(tau, rho, default)
    if tuned:
        raise ValueError(f"--tau and --rho belong to --policy dynamic; got --policy {name}")
    if name is None:
        return default
    if name == "fine":
        return FinePolicy()
    if name in PRESETS:
        return name
    if (speed := _number(name)) is not None:
        return speed
    if name != "static" and not any(character in name for character in "p:,"):
        raise ValueError(
            f"got --policy {name}; use fine, static, dynamic, a plan such as 4p:0.2,2p:0.4,p, or "
            f"of a calibration {', '.join(PRESETS)} or a speed from 0 to 1"
        )
    return StaticPolicy(DEFAULT_STATIC_PLAN if name == "static" else name)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _dynamic(tau: Tau | None, rho: float | None, default: PatchPolicy) -> DDiTPolicy:
    from ddit_rt.patch_scheduler import DDiTPolicy

    policy = default if isinstance(default, DDiTPolicy) else DDiTPolicy()
    if tau is not None:
        policy = replace(policy, tau=tau)
    return policy if rho is None else replace(policy, rho=rho)
