"""The step loop on a real GPU, in the order in which its parts rest on each other.

If the first test that fails is the one about WHILE, everything above it works.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from gpu_loop import assert_as_cpu, capture, loaded, runs_of
from step_loop import (
    emulated_run,
    euler,
    launch,
    mixed_run,
    run_form,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddit_rt import _runtime

pytestmark = pytest.mark.gpu

FORMS = ["loop", "step", "host"]
FLUX_1024 = (1, 16, 1, 128, 128)
WAN_480P = (1, 16, 21, 60, 104)  # 81 frames of 480 x 832

BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}

ALLOWED = {"kernel", "memcpy", "memset", "child graph", "empty"}


@pytest.fixture
def stream() -> Iterator[int]:
    """A stream of the test's own, current while it runs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield side.cuda_stream
        side.synchronize()


@pytest.fixture
def switching() -> ModuleType:
    """The runtime, where graphs can switch on the device."""
    if _runtime.switch_problem():
        pytest.skip(_runtime.switch_problem())
    return _runtime


# Kernels alone: launched by the host, no conditional node.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (FLUX_1024, (4, 8)),
        (WAN_480P, (4,)),
        ((2, 3, 2, 6, 10), (2,)),
        ((1, 2, 1, 12, 36), (6,)),
        ((3, 1, 1, 5, 7), ()),
    ],
)
def test_kernels_have_the_bits_of_the_cpu_ops(
    stream: int, shape: tuple[int, int, int, int, int], sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    run = mixed_run(shape, sizes=sizes, dtype=dtype)
    loop, buckets = loaded(run)
    run_form(loop, "host", buckets, run.plan.steps, stream)
    assert_as_cpu(loop, run)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_scores_choose_the_base_patch_and_raise_the_flag(stream: int, bad: float) -> None:
    run = mixed_run(FLUX_1024)
    run.model.table[:, 3, 0, 5, 0, 70, 90] = bad  # v[3], and so z[4] and all scores from then on
    loop, buckets = loaded(run)
    run_form(loop, "host", buckets, run.plan.steps, stream)
    progress = loop.control.wait(run.plan.steps, 60.0)
    assert progress.finished
    assert progress.nonfinite
    assert (loop.record()[4:, 0] == 0).all()


def test_the_emulator_has_the_bits_of_the_device(stream: int, runtime: ModuleType) -> None:
    """Scores too: the tests that run without a GPU speak for the kernels on one."""
    run = mixed_run((2, 4, 2, 16, 40))
    loop, buckets = loaded(run)
    run_form(loop, "host", buckets, run.plan.steps, stream)
    _, emulated, replayed = emulated_run(runtime, run)
    emulated.run_host(run.plan.steps, replayed.replay)
    expected = emulated.bits()
    assert all(torch.equal(bits, expected[name]) for name, bits in loop.bits().items())


# SWITCH: the step form.


def test_switch_runs_the_body_of_the_bucket(stream: int, switching: ModuleType) -> None:
    run = mixed_run(forced=[0, 1, 2, 2, 1, 0, 0])
    loop, buckets = loaded(run)
    run_form(loop, "step", buckets, run.plan.steps, stream)
    assert buckets.counts.tolist() == runs_of(run) == [3, 2, 2]
    assert_as_cpu(loop, run)


def test_switch_out_of_range_runs_nothing(stream: int, switching: ModuleType) -> None:
    """A cancelled run sets an index beyond the last body."""
    run = mixed_run()
    loop, buckets = loaded(run)
    graph = switching.StepGraph(loop.control, buckets.graphs, "step", owner=buckets)
    loop.control.begin(stream)
    loop.control.cancel()
    for _ in range(run.plan.steps):
        graph.launch(stream)
    loop.control.finish(stream)
    progress = loop.control.wait(run.plan.steps, 60.0)
    assert (progress.decided, progress.finished, progress.cancelled) == (0, True, True)
    assert buckets.counts.tolist() == [0, 0, 0]
    assert torch.equal(loop["latents"].cpu(), run.cpu.latents[0])


@pytest.mark.parametrize("form", ["step", "loop"])
def test_a_bucket_that_no_table_may_choose_has_a_body_that_does_nothing(
    stream: int, switching: ModuleType, form: str
) -> None:
    run = mixed_run(forced=[0, 2, 0, 2, 2, 0, 0])
    loop, buckets = loaded(run)
    graphs = [buckets.graphs[0], ("2p", 0), buckets.graphs[2]]
    run_form(loop, form, buckets, run.plan.steps, stream, graphs=graphs)
    assert buckets.counts.tolist() == runs_of(run) == [4, 0, 3]
    assert_as_cpu(loop, run)


def test_nodes_of_a_captured_bucket_may_stand_in_a_body(stream: int) -> None:
    _, buckets = loaded(mixed_run())
    for _, raw in buckets.graphs:
        counts = _runtime.count_nodes(raw)
        assert set(counts) <= ALLOWED
        assert counts["kernel"] >= 3


def test_dot_file_is_written(stream: int, switching: ModuleType, tmp_path: Path) -> None:
    loop, buckets = loaded(mixed_run())
    graph = switching.StepGraph(loop.control, buckets.graphs, "loop", owner=buckets)
    graph.write_dot(str(tmp_path / "loop.dot"))
    assert "digraph" in (tmp_path / "loop.dot").read_text()


# WHILE: the loop form.


def test_while_runs_every_step_once(stream: int, switching: ModuleType) -> None:
    run = mixed_run(forced=[0, 1, 2, 2, 1, 0, 0])
    loop, buckets = loaded(run)
    run_form(loop, "loop", buckets, run.plan.steps, stream)
    assert buckets.counts.tolist() == runs_of(run)
    assert_as_cpu(loop, run)


@pytest.mark.parametrize("backend", ["math", "efficient", "flash", "cudnn"])
def test_attention_in_a_body_has_the_bits_of_a_replay(
    stream: int, switching: ModuleType, backend: str
) -> None:
    """Clusters and programmatic launches, which some of these use, are not documented there."""
    run = mixed_run((1, 2, 1, 8, 8), forced=[0, 1, 2, 0, 0, 1, 0])
    loop, buckets = loaded(run)
    query = torch.randn(1, 8, 512, 128, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(128, 128, dtype=torch.bfloat16, device="cuda")
    out = torch.zeros_like(query)

    def attend() -> None:
        attended = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        out.copy_(attended @ weight)

    def body() -> None:
        buckets.run(0)
        attend()

    with sdpa_kernel(BACKENDS[backend]):
        try:
            attend()
        except (RuntimeError, UserWarning) as error:
            pytest.skip(f"no {backend} attention here: {error}")
        graph = capture(body)
    graph.replay()
    expected = out.clone()
    out.zero_()
    loop.load(run.plan, run.cpu.latents[0])
    graphs = [("p", graph.raw_cuda_graph()), *buckets.graphs[1:]]
    run_form(loop, "loop", buckets, run.plan.steps, stream, graphs=graphs)
    assert expected.any()
    assert torch.equal(out, expected)
    assert_as_cpu(loop, run)


# All forms agree, whatever the scores decide.


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((2, 3, 1, 16, 16), {"dwell": 2, "order": 2}),
        (FLUX_1024, {"dtype": torch.bfloat16}),
        (WAN_480P, {"sizes": (4,)}),
    ],
    ids=["small", "flux", "wan"],
)
def test_all_forms_have_the_same_bits(
    stream: int,
    switching: ModuleType,
    shape: tuple[int, int, int, int, int],
    changes: dict[str, Any],
) -> None:
    run = mixed_run(shape, **changes)
    loop, buckets = loaded(run)
    results = []
    for form in FORMS:
        loop.load(run.plan, run.cpu.latents[0])
        run_form(loop, form, buckets, run.plan.steps, stream)
        assert_as_cpu(loop, run)
        results.append(loop.bits())
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_in_every_run(stream: int, switching: ModuleType, form: str) -> None:
    """Which block finishes last varies; what it decides must not."""
    run = mixed_run(FLUX_1024)
    loop, buckets = loaded(run)
    first: dict[str, Tensor] = {}
    for _ in range(10):
        loop.load(run.plan, run.cpu.latents[0])
        run_form(loop, form, buckets, run.plan.steps, stream)
        bits = loop.bits()
        first = first or bits
        assert all(torch.equal(first[name], bits[name]) for name in bits)


# What the host may do meanwhile.


@pytest.mark.parametrize("form", ["loop", "step"])
def test_launches_do_not_synchronise(stream: int, switching: ModuleType, form: str) -> None:
    run = mixed_run()
    loop, buckets = loaded(run)
    graph = switching.StepGraph(loop.control, buckets.graphs, form, owner=buckets)
    graph.upload(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch(graph, loop.control, form, run.plan.steps, stream)
        progress = loop.control.wait(run.plan.steps, 60.0)
        rows = loop.control.records()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert progress.finished
    times = [time_ns for time_ns, _ in rows] + [loop.control.end_ns()]
    assert times == sorted(times)
    assert_as_cpu(loop, run)


@pytest.mark.parametrize("form", ["loop", "step"])
def test_cancel_stops_a_run_that_is_under_way_and_not_the_next(
    stream: int, switching: ModuleType, form: str
) -> None:
    """A step spins for about 5 ms, so that the host has seconds to cancel a thousand of them."""
    steps = 1000
    run = mixed_run((1, 2, 1, 8, 8), steps=steps, coefficients=euler(steps, dt=-1e-3))
    loop, buckets = loaded(run, busy_cycles=10_000_000)
    graph = switching.StepGraph(loop.control, buckets.graphs, form, owner=buckets)
    if form == "loop":
        graph.launch(stream)
    else:
        loop.control.begin(stream)
        for _ in range(steps):
            graph.launch(stream)
            if loop.control.progress().decided > 2:  # launches may have to wait for earlier ones
                loop.control.cancel()
        loop.control.finish(stream)
    assert loop.control.wait(2, 60.0).decided > 2
    loop.control.cancel()
    torch.cuda.current_stream().synchronize()
    progress = loop.control.progress()
    assert (progress.finished, progress.cancelled) == (True, True)
    assert 3 <= progress.decided < steps
    assert len(loop.control.records()) == progress.decided == int(buckets.counts.sum())
    assert torch.equal(loop["latents"].cpu(), run.cpu.latents[progress.decided])

    loop.load(run.plan, run.cpu.latents[0])
    loop["settings"][0] = 5  # steps
    run_form(loop, form, buckets, 5, stream)
    assert not loop.control.progress().cancelled
    assert torch.equal(loop["latents"].cpu(), run.cpu.latents[5])


@pytest.mark.parametrize("form", ["loop", "step"])
def test_destroying_waits_for_what_is_still_running(
    stream: int, switching: ModuleType, form: str
) -> None:
    run = mixed_run()
    loop, buckets = loaded(run, busy_cycles=10_000_000)
    latents = loop["latents"]
    run_form(loop, form, buckets, run.plan.steps, stream)
    del loop, buckets  # the graph went at the end of run_form, right after its launch
    assert torch.equal(latents.cpu(), run.cpu.latents[-1])
