"""Ray on this machine for a test: in a process of its own, with workers that can be killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # else a token is written to the user's home
    "RAY_DEDUP_LOGS": "0",
    "RAY_agent_register_timeout_ms": "100000",  # of a process that imports for long
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "100",  # so does its HTTP proxy
    "OMP_NUM_THREADS": "1",
}
MOST_SECONDS = 300.0


def load(*_: Any, **__: Any) -> Any:
    """The tiny engine, in a worker; nothing heavy is imported where this is only named."""
    from served import tiny_engine

    return tiny_engine()


def environment(home: Path) -> dict[str, str]:
    """Of a process that runs Ray, and of its workers."""
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join(map(str, (here, here / "loop")))
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths, "DDIT_RT_HOME": str(home)}


def until(holds: Callable[[], Any], what: str) -> Any:
    """What a condition returns once it holds."""
    end = monotonic() + MOST_SECONDS
    while not (found := holds()):
        assert monotonic() < end, f"not within {MOST_SECONDS:.0f} s: {what}"
        sleep(0.05)
    return found


def workers_below(root: int, name: str) -> list[int]:
    """Process ids of Ray's workers of a name, among the descendants of a process."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
                command = (entry / "cmdline").read_text(encoding="utf-8", errors="replace")
            except OSError:  # it ended meanwhile
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
            names[int(entry.name)] = command
    found = [pid for pid, title in names.items() if title.startswith(f"ray::{name}")]
    return [pid for pid in found if _descends(pid, root, parents)]


def _descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid > 1 and pid != root:
        pid = parents.get(pid, 0)
    return pid == root


def kill(pid: int) -> None:
    """Ends a process at once, and waits until it is gone."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: not running(pid), f"process {pid} ends")


def running(pid: int) -> bool:
    """Whether a process is there, and not only waited for."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
