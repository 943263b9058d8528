"""The CUDA executor on the emulated device, against the CPU executor."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from emulated_graphs import EmulatedGraphs
from models import noise
from scripted_runs import (
    FORMS,
    MIXED,
    POLICIES,
    SHAPE,
    ScriptedBucket,
    TinyModel,
    assert_same_run,
    euler,
    scripted_plan,
    unipc,
)

from ddit_rt.errors import CaptureError
from ddit_rt.loop import CpuExecutor, CudaExecutor
from ddit_rt.policies import DDiTPolicy, FinePolicy, PatchPolicy, StaticPolicy
from ddit_rt.solver import SolverTable

HOST_NODE = 3  # cudaGraphNodeTypeHost


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("policy", "solver"), list(zip(POLICIES, (unipc(12), euler(12), unipc(12)), strict=True))
)
def test_equals_the_cpu_executor(
    graphs: EmulatedGraphs, form: str, solver: SolverTable, policy: PatchPolicy
) -> None:
    expected = CpuExecutor().run(scripted_plan(policy, solver), noise(*SHAPE))
    actual = CudaExecutor(graphs, form).run(scripted_plan(policy, solver), noise(*SHAPE))
    assert_same_run(actual, expected)
    assert actual[1].executor == f"cuda-{form}"
    assert len(set(actual[1].patch_sizes())) > 1


@pytest.mark.parametrize(
    ("form", "shape", "offered"),
    [
        ("loop", (3, 4, 24, 40), (1, 2)),
        ("step", (2, 5, 10, 14), (1,)),
        ("host", (1, 3, 8, 8), (1, 4)),
    ],
)
def test_equals_the_cpu_executor_at_other_shapes(
    graphs: EmulatedGraphs, form: str, shape: tuple[int, ...], offered: tuple[int, ...]
) -> None:
    policy, solver = DDiTPolicy(tau=0.02, refresh=3), euler(9)
    arguments = {"shape": shape, "offered": offered}
    expected = CpuExecutor().run(scripted_plan(policy, solver, **arguments), noise(*shape))
    actual = CudaExecutor(graphs, form).run(
        scripted_plan(policy, solver, **arguments), noise(*shape)
    )
    assert_same_run(actual, expected)


@pytest.mark.parametrize("form", FORMS)
def test_stages_have_graphs_of_their_own(graphs: EmulatedGraphs, form: str) -> None:
    """A table says which step belongs to which, and another run may have another."""
    policy, solver, executor = DDiTPolicy(tau=0.05, refresh=3), euler(9), CudaExecutor(graphs, form)
    usual = CpuExecutor().run(scripted_plan(policy, solver), noise(*SHAPE))
    for stages in ((0, 1, 1, 2, 0, 0, 1, 2, 2), (2, 0, 0, 0, 1, 1, 1, 1, 0)):
        plan = scripted_plan(policy, solver, stages=stages)
        expected = CpuExecutor().run(plan, noise(*SHAPE))
        assert_same_run(executor.run(plan, noise(*SHAPE)), expected)
        assert not torch.equal(expected[0], usual[0])
    names = ["p", "2p", "4p"]
    assert graphs.captured == [
        *names, *(f"{name} second" for name in names), *(f"{name} third" for name in names)
    ]  # fmt: skip
    executor.run(scripted_plan(policy, solver), noise(*SHAPE))
    assert len(executor.captures) == 2


@pytest.mark.parametrize("form", FORMS)
def test_nan_falls_back_to_the_base_patch_and_is_reported(
    graphs: EmulatedGraphs, form: str
) -> None:
    plan = scripted_plan(DDiTPolicy(tau=1e9, warmup="coarse", refresh=None, fine_tail=0), euler(8))
    for bucket in plan.buckets[0]:
        assert isinstance(bucket, ScriptedBucket)
        bucket.tensors()[0][4] = math.nan
    _, trace = CudaExecutor(graphs, form).run(plan, noise(*SHAPE))
    assert trace.patch_sizes() == ["4p"] * 5 + ["p"] * 3
    assert trace[5].reason == "score not finite: base patch"
    assert trace.nonfinite


@pytest.mark.parametrize("form", FORMS)
def test_a_captured_model_serves_other_runs_of_its_shape(graphs: EmulatedGraphs, form: str) -> None:
    """Prompt, policy and noise change, and no run knows of another."""
    model, executor = TinyModel(), CudaExecutor(graphs, form)
    runs = [(StaticPolicy(["p", "2p"] * 5), 1), (MIXED, 2), (StaticPolicy(["p", "2p"] * 5), 1)]
    finals = []
    for policy, seed in runs:
        expected = CpuExecutor().run(model.plan(policy, seed=seed), noise(*SHAPE, seed=seed))
        actual = executor.run(model.plan(policy, seed=seed), noise(*SHAPE, seed=seed))
        assert_same_run(actual, expected)
        finals.append(actual[0])
    assert torch.equal(finals[0], finals[2])
    assert graphs.captured == ["p", "2p", "4p"]  # each once, when a policy first reaches it
    (report,) = executor.captures
    assert report.buckets == ("p", "2p", "4p")
    assert report.latents == SHAPE
    assert report.text_tokens == 7
    assert report.nodes == {"p": 1, "2p": 1, "4p": 1}


def test_moved_weights_are_captured_again(graphs: EmulatedGraphs) -> None:
    executor = CudaExecutor(graphs, "loop")
    plan = scripted_plan(FinePolicy(), euler(4))
    executor.run(plan, noise(*SHAPE))
    executor.run(replace(plan, weights=(1, 2)), noise(*SHAPE))
    assert graphs.captured == ["p", "p"]
    executor.forget()
    executor.run(plan, noise(*SHAPE))
    assert graphs.captured == ["p", "p", "p"]
    assert len(executor.captures) == 1


def test_the_shape_that_was_not_used_for_longest_makes_room(graphs: EmulatedGraphs) -> None:
    executor = CudaExecutor(graphs, "loop")

    def run(width: int) -> None:
        shape = (1, 2, 8, 8 * width)
        plan = scripted_plan(FinePolicy(), euler(2), shape=shape, offered=(1,))
        executor.run(plan, noise(*shape))

    for width in range(1, 9):
        run(width)
    run(1)
    run(9)  # takes the place of width 2
    assert len(executor.captures) == 8
    before = len(graphs.captured)
    run(1)
    assert len(graphs.captured) == before
    run(2)
    assert len(graphs.captured) == before + 1


def test_one_launch_and_no_synchronisation_per_image_in_loop_form(graphs: EmulatedGraphs) -> None:
    executor = CudaExecutor(graphs, "loop")
    executor.run(scripted_plan(MIXED, euler(10)), noise(*SHAPE))
    graphs.runtime.clear_calls()
    executor.run(scripted_plan(MIXED, euler(10), seed=3), noise(*SHAPE))
    calls = graphs.runtime.calls()
    assert calls.pop("cudaGraphLaunch") == 1
    assert set(calls) <= {"cudaEventRecord", "cudaEventQuery"}, "nothing that waits"


def test_too_old_a_driver_falls_back_to_the_host_with_one_warning(graphs: EmulatedGraphs) -> None:
    graphs.runtime.set_driver(12040)
    executor = CudaExecutor(graphs)
    plan = scripted_plan(MIXED, euler(8))
    with pytest.warns(UserWarning, match=r"12\.4.*12\.8"):
        _, trace = executor.run(plan, noise(*SHAPE))
    assert trace.executor == "cuda-host"
    assert any("12.8" in note for note in trace.notes)
    _, trace = executor.run(plan, noise(*SHAPE))
    assert any("12.8" in note for note in trace.notes)


@pytest.mark.parametrize("form", ["loop", "step"])
def test_a_form_that_was_asked_for_is_never_replaced(graphs: EmulatedGraphs, form: str) -> None:
    graphs.runtime.set_driver(12040)
    with pytest.raises(CaptureError, match=rf'executor="{form}".*12\.8'):
        CudaExecutor(graphs, form).run(scripted_plan(MIXED, euler(8)), noise(*SHAPE))


def test_a_bucket_that_cannot_be_switched_to_is_named(graphs: EmulatedGraphs) -> None:
    graphs.node_type = HOST_NODE
    with pytest.raises(CaptureError, match=r"bucket p has 1 host function node.*Likely cause"):
        CudaExecutor(graphs, "loop").run(scripted_plan(FinePolicy(), euler(4)), noise(*SHAPE))
    with pytest.warns(UserWarning, match="host function"):
        _, trace = CudaExecutor(graphs).run(scripted_plan(FinePolicy(), euler(4)), noise(*SHAPE))
    assert trace.executor == "cuda-host"


def test_input_latents_are_not_written_to(graphs: EmulatedGraphs) -> None:
    start = noise(*SHAPE)
    final, _ = CudaExecutor(graphs).run(scripted_plan(FinePolicy(), euler(4)), start)
    assert torch.equal(start, noise(*SHAPE))
    again, _ = CudaExecutor(graphs).run(scripted_plan(FinePolicy(), euler(4)), start * 2)
    assert not torch.equal(final, again)


def test_two_executors_interleave(graphs: EmulatedGraphs) -> None:
    """Two engines of one process share the device and nothing else."""
    executors = [CudaExecutor(graphs, "loop"), CudaExecutor(graphs, "step")]
    plans = [scripted_plan(MIXED, euler(8), seed=seed) for seed in (1, 2)]
    expected = [CpuExecutor().run(plan, noise(*SHAPE)) for plan in plans]
    for _ in range(2):
        for executor, plan, reference in zip(executors, plans, expected, strict=True):
            assert_same_run(executor.run(plan, noise(*SHAPE)), reference)
