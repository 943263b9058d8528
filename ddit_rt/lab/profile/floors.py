"""The least that each phase of a step must do: operations, and bytes to move."""

from __future__ import annotations

from ddit_rt.engine.cost import step_cost
from ddit_rt.lab.profile.accounting import STEP, Work, WorkOf
from ddit_rt.lab.profile.subject import Subject
from ddit_rt.loop import RunTrace
from ddit_rt.policies import DDiTPolicy, parse_patch


def floors(subject: Subject, trace: RunTrace) -> WorkOf:
    """Counts for one run.

    The model reads its weights (activations are not counted). The solver reads latents and velocity
    and writes new latents and a history. The latents of the finite difference are read by decide
    on a CPU, and on CUDA by the solver of the step before, which is at them anyway. What sits in a
    cache between two phases counts as moved all the same.

    Args:
        subject: What ran.
        trace: Trace of the run.
    """
    model, latents = subject.model, subject.latents
    order = subject.policy.order if isinstance(subject.policy, DDiTPolicy) else 0
    on_cuda = trace.executor.startswith("cuda")
    scored = [bool(record.scores) for record in trace] + [False]
    latents_bytes = latents.numel() * 4
    update_bytes = 3 * latents_bytes + latents.numel() * model.dtype.itemsize
    costs = {
        patch: step_cost(
            model,
            height=latents.shape[2],
            width=latents.shape[3],
            multiple=parse_patch(patch),
            batch=subject.passes * latents.shape[0],
            text_tokens=subject.text_tokens,
        )
        for patch in set(trace.patch_sizes())
    }

    def work_of(phase: str, step: int) -> Work:
        cost = costs[trace[step].patch_size]
        decide = 0 if on_cuda or not scored[step] else (order + 1) * latents_bytes
        solver = update_bytes
        if on_cuda and scored[step + 1]:
            solver += (order - 1) * latents_bytes
        work = {
            "decide": Work(flops=0, bytes=decide),
            "model": Work(flops=cost.flops, bytes=cost.weight_bytes),
            "solver": Work(flops=0, bytes=solver),
        }
        work[STEP] = Work(
            flops=sum(one.flops for one in work.values()),
            bytes=sum(one.bytes for one in work.values()),
        )
        return work[phase]

    return work_of
