"""What must hold before Ray is imported."""

from __future__ import annotations

import os
from importlib.util import find_spec

_NEEDED = ("ray", "pandas", "pyarrow", "fastapi", "prometheus_client")
"""Packages that the extra `ray` installs."""


def require_ray(who: str) -> None:
    """Checks that Ray can be imported, and turns its usage reports off for this process.

    Args:
        who: Name of what needs it, for the message.

    Raises:
        ModuleNotFoundError: The extra `ray` is not installed.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{who} needs more (no {missing[0]}); pip install 'ddit_rt[ray]'", name=missing[0]
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
