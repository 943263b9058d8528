"""The tests' own modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
# What the extras bring beside pytest and accelerate, which comes with peft.
OPTIONAL = (
    *("av", "datasets", "fastapi", "gradio", "gradio_client", "hypothesis", "matplotlib", "openai"),
    *(
        "opentelemetry",
        "playwright",
        "prodigyopt",
        "prometheus_client",
        "ray",
        "tensorboard",
        "torchmetrics",
    ),
    *("torchvision", "uvicorn"),
)
BLOCKED = f"""
import sys
import pytest
sys.modules.update(dict.fromkeys({OPTIONAL}))
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_every_module_is_collected_without_the_optional_packages() -> None:
    """On a machine with a GPU and few packages, one module that fails would end the whole run."""
    plain = ["-p", "no:cacheprovider", "--collect-only", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *plain, str(TESTS)],
        check=False,
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        # some of the packages bring plugins, which are out of reach as well
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    # The packages were out of reach: a module that is of no use without one says so.
    assert "not installed: tensorboard" in done.stdout
