"""The step loop on a real GPU, with buckets that torch captures: for tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from step_loop import MixedRun, RandomModel, StepLoop

from ddit_rt import _runtime


def capture(body: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Captures `body` on the current stream, which it was warmed up on."""
    for _ in range(2):
        body()
    current = torch.cuda.current_stream()
    current.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, stream=current):
        body()
    graph.instantiate()
    return graph


class TorchBuckets:
    """`RandomModel` as graphs captured by torch, which count their runs.

    Attributes:
        counts: Runs of each bucket, `[S + 1]` int32.
        graphs: Names and addresses, as `StepGraph` takes them.
    """

    def __init__(self, loop: StepLoop, model: RandomModel, busy_cycles: int = 0) -> None:
        self._buffers = loop.buffers
        self._table = model.table.cuda()
        self._busy_cycles = busy_cycles
        self.counts = torch.zeros(len(self._table), dtype=torch.int32, device="cuda")
        loop["latents"].zero_()  # the warm-up reads it, and row 0 of the table
        self._captured = [capture(partial(self.run, i)) for i in range(len(self._table))]
        self.graphs = [
            (f"{2**index}p", graph.raw_cuda_graph()) for index, graph in enumerate(self._captured)
        ]
        self.counts.zero_()

    def run(self, index: int) -> None:
        """What is captured for a bucket."""
        if self._busy_cycles:
            torch.cuda._sleep(self._busy_cycles)
        step = self._buffers["state"][:1]
        row = self._table[index].index_select(0, step)[0]
        velocity = torch.add(row, self._buffers["latents"], alpha=0.125)
        self._buffers["velocity"].copy_(velocity)
        self.counts[index].add_(1)

    def replay(self, index: int) -> None:
        """Runs one bucket by itself."""
        self._captured[index].replay()


def loaded(run: MixedRun, **options: Any) -> tuple[StepLoop, TorchBuckets]:
    """A loop on the current device, ready to run, and its buckets."""
    device = torch.cuda.current_device()
    loop = StepLoop(_runtime, run.plan, device="cuda", index=device)
    buckets = TorchBuckets(loop, run.model, **options)
    loop.load(run.plan, run.cpu.latents[0])
    return loop, buckets


def runs_of(run: MixedRun) -> list[int]:
    """How often the CPU's run takes each bucket."""
    return [run.cpu.buckets.count(index) for index in range(len(run.plan.sizes) + 1)]


def assert_as_cpu(loop: StepLoop, run: MixedRun) -> None:
    """Latents to the bit, and the trace."""
    assert torch.equal(loop["latents"].cpu(), run.cpu.latents[-1])
    record = loop.record()
    assert torch.equal(record[:, :3], run.cpu.record[:, :3])
    # Kernel and CPU op sum the same float32 values in different orders: a few units in the last
    # place (6e-8 each).
    torch.testing.assert_close(record, run.cpu.record, rtol=2e-6, atol=0.0, equal_nan=True)
