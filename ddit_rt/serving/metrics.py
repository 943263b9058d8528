"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ddit_rt.loop import RunTrace

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, queue_depth: Callable[[], int], device: torch.device) -> None:
        """Makes them.

        Args:
            queue_depth: Images that wait now.
            device: The model's.
        """
        own = self.registry = CollectorRegistry()
        self.requests = Counter("ddit_rt_requests", "Answers", ["endpoint", "status"], registry=own)
        self.request_seconds = Histogram(
            "ddit_rt_request_seconds",
            "From a request's first byte to its answer's last",
            ["endpoint"],
            buckets=_SECONDS,
            registry=own,
        )
        self.wait_seconds = Histogram(
            "ddit_rt_queue_wait_seconds", "Wait of an image", buckets=_SECONDS, registry=own
        )
        self.step_seconds = Histogram(
            "ddit_rt_step_seconds", "Denoising step", ["patch"], buckets=_STEP_SECONDS, registry=own
        )
        self.steps = Counter("ddit_rt_steps", "Denoising steps", ["patch", "reused"], registry=own)
        self.batch_size = Histogram(
            "ddit_rt_batch_size", "Images of a run", buckets=_BATCHES, registry=own
        )
        self.cancellations = Counter(
            "ddit_rt_cancellations", "Requests that ended early", ["reason"], registry=own
        )
        self.embeddings = Counter(
            "ddit_rt_prompt_embeddings", "Look-ups of prompts", ["result"], registry=own
        )
        depth = Gauge("ddit_rt_queue_depth", "Images that wait", registry=own)
        depth.set_function(queue_depth)
        memory = Gauge("ddit_rt_memory_bytes", "Memory that is held", ["device"], registry=own)
        memory.labels("cpu").set_function(_resident)
        if device.type == "cuda":
            memory.labels(str(device)).set_function(lambda: torch.cuda.memory_reserved(device))

    def ran(self, trace: RunTrace) -> None:
        """Counts a run."""
        self.batch_size.observe(trace.batch)
        for record in trace:
            self.step_seconds.labels(record.patch_size).observe(record.latency_ms / 1e3)
            self.steps.labels(record.patch_size, str(record.reused).lower()).inc()

    def page(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)


def _resident() -> int:
    """Resident bytes of this process; 0 where Linux does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * 4096
