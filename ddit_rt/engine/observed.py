"""What operators see of a run: a line in the log, and a span. Both come once it is over."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ddit_rt import telemetry
from ddit_rt.engine.table_driven import Loop
from ddit_rt.loop import RunTrace
from ddit_rt.planning.request import Request

LOG = logging.getLogger("ddit_rt.engine")


@contextmanager
def observed(name: str, loop: Loop) -> Iterator[Callable[[Request], None]]:
    """A run of an engine.

    Args:
        name: What was called.
        loop: The engine's; its trace is told of, where the run has left one.

    Yields:
        Takes what the run is asked to do, once that is known.
    """
    before, started = loop.trace, time.perf_counter()
    with telemetry.span(f"ddit_rt.{name}") as span:

        def asked(request: Request) -> None:
            span.set(
                {
                    "ddit_rt.policy": repr(request.policy),
                    "ddit_rt.step_cache": repr(request.step_cache),
                }
            )

        try:
            yield asked
        finally:
            trace = loop.trace
            if trace is not None and trace is not before:
                span.set(attributes(trace))
                seconds = time.perf_counter() - started
                LOG.info("%s: %s; %.3f s in all", name, trace.summary(), seconds)
                LOG.debug("%s\n%s", name, trace)


def attributes(trace: RunTrace) -> dict[str, str | bool | int | float]:
    """A span's attributes of a run: what it did in all, and how many steps at each patch size."""
    sizes = Counter(trace.patch_sizes())
    return {
        "ddit_rt.batch": trace.batch,
        "ddit_rt.executor": trace.executor,
        "ddit_rt.solver": trace.solver,
        "ddit_rt.loop_ms": trace.latency_ms,
        "ddit_rt.tokens": trace.tokens,
        "ddit_rt.nonfinite": trace.nonfinite,
        "ddit_rt.cancelled": trace.cancelled,
        "ddit_rt.steps.all": len(trace),
        "ddit_rt.steps.reused": trace.reused,
        **{f"ddit_rt.steps.{size}": count for size, count in sizes.items()},
    }
