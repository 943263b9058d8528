"""What tests do where an extra of the package is not installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def need(*modules: str) -> None:
    """Skips the test, or the module, that calls this, unless all of these can be imported."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        reason = f"not installed: {', '.join(missing)} (pip install 'ddit_rt[test,ray,browser]')"
        pytest.skip(reason, allow_module_level=True)
