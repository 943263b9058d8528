"""What every run of the tests does first; the fixtures are in `shared_fixtures.py`."""

from __future__ import annotations

import gc

import pytest

pytest.register_assert_rewrite("family_suite")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Brings the fixtures in, and with them torch, but where workers run the tests instead."""
    plugins = session.config.pluginmanager
    if not plugins.hasplugin("dsession"):
        plugins.import_plugin("shared_fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none; lets one file compile before others need it."""
    compiling = [item.path for item in items if "packages" in getattr(item, "fixturenames", ())]
    later = set(compiling[1:]) - set(compiling[:1])
    items.sort(key=lambda item: (item.path not in compiling[:1], item.path in later))
    reason = _no_gpu()
    if reason:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Lets tests that collect garbage pass by what has been imported, which stays."""
    gc.collect()
    gc.freeze()


def _no_gpu() -> str:
    import torch

    from ddit_rt import _runtime

    if not torch.cuda.is_available():
        return f"no CUDA device for torch {torch.__version__}"
    if not _runtime.build_info()["cuda"]:
        return "ddit_rt was built without CUDA"
    return ""
