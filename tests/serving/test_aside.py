"""What is loaded aside leaves no threads behind to share cores with the engine's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddit_rt.serving.aside import aside

PROGRAM = """
import os, time, torch
from ddit_rt.serving.aside import aside

def computed():
    torch.ones(1 << 22).exp_()
    return tasks()

def tasks():
    return len(os.listdir("/proc/self/task"))

before = tasks()
within = aside(computed)
until = time.monotonic() + 10
while tasks() > before and time.monotonic() < until:
    time.sleep(0.01)  # a thread that ended is listed for a moment
print(before, within, tasks(), computed())
"""


def test_the_threads_that_loading_took_end_with_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    before, within, after, in_main = map(int, done.stdout.split())
    assert within == before + 2, "its own and one of its pool"
    assert after == before
    assert in_main == before + 1, "a pool of a thread that goes on stays"


def test_an_error_reaches_the_caller() -> None:
    def fails() -> None:
        raise FileNotFoundError("no such artifact")

    with pytest.raises(FileNotFoundError, match="no such artifact"):
        aside(fails)
    assert aside(lambda: Path("made")) == Path("made")
