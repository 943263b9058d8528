"""Times the native ops on the CPU against torch eager, torch.compile, oneDNN and their floor.

    python benchmarks/bench_ops.py [--out FILE] [--rounds 8] [--threads 1 2]
    python benchmarks/bench_ops.py --device cuda [--out FILE] [--rounds 8]      see ops_cuda.py

Sizes are those of FLUX at 1024 x 1024: latents 16 x 128 x 128, batch 1 and 4. Methods take turns
within a round, so that a change of the machine's speed meets all of them; every one uses the same
number of threads. With one thread the clock is that thread's CPU time, which other processes do
not inflate; with more it is wall time, which needs an idle machine. `best_us` is the least time of
a call, the figure to compare; `median_us` and the quartiles show the spread. The floor of an op is
a copy that moves as many bytes as the op must read and write at least (`Tensor.clone` for pack,
whose result is new memory too, else `Tensor.copy_`); of a product, its operations at the rate that
a large product reaches. Products are those of the demo model's blocks, at p and at 4p.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from ops_cuda import eager_pack
from ops_cuda import run as run_cuda
from records import RESULTS, parser_of, publish
from torch import Tensor

from ddit_rt import _runtime, ops
from ddit_rt.lab.measure.report import machine
from ddit_rt.lab.profile.ceilings import matrix_rate

LATENTS = (16, 128, 128)
WARM_UP_CALLS = 5
ROUND_SECONDS = 0.02  # of one method in one round
COEFFICIENT_ROWS = {
    "euler": (1.0, 0.0, 0.0, -0.04, 0.0, 0.0),
    "multistep": (0.9, 0.2, -0.1, -0.05, 0.02, 0.0),
}

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One op at one size, and everything that computes the same.

    Attributes:
        name: Op and variant.
        batch: Samples.
        methods: What to time, by name: native, eager, compile, copy, and libraries.
        copy_bytes: Bytes that the copy reads, and writes; 0 where there is none.
        operations: Of a product; a multiply-add is two.
    """

    name: str
    batch: int
    methods: dict[str, Call]
    copy_bytes: int
    operations: int = 0


def eager_scores(history: Tensor, sizes: tuple[int, ...], quantile: float) -> Tensor:
    """Patch scores with torch.std and torch.quantile."""
    z0, z1, z2, z3 = history.unbind(0)
    difference = z0 - 3 * z1 + 3 * z2 - z3
    deviations = [eager_pack(difference, p, False).std(-1) for p in sizes]
    return torch.stack([torch.quantile(own, quantile, dim=-1) for own in deviations], dim=-1)


def eager_solver(
    history: Tensor, velocities: Tensor, velocity: Tensor, row: tuple[float, ...], step: int
) -> None:
    """The solver update with one torch expression, and the ring writes."""
    terms = [row[i] * history[(i - step) % 4] for i in range(3) if row[i]]
    slots = velocities.shape[0]
    terms.append(row[3] * velocity.float())
    terms += [row[3 + j] * velocities[(step - j) % slots] for j in (1, 2) if row[3 + j]]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    history[-(step + 1) % 4].copy_(total)
    if slots:
        velocities[step % slots].copy_(velocity)


def copy_of(size_bytes: int) -> Call:
    """A copy between two buffers of this size."""
    source = torch.zeros(size_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def pack_case(batch: int, dtype: torch.dtype, p: int) -> Case:
    """`pack` at one dtype and patch size."""
    latents = torch.randn(batch, *LATENTS).to(dtype)
    compiled = torch.compile(eager_pack)
    name = f"pack p={p} {str(dtype).removeprefix('torch.')}"
    methods: dict[str, Call] = {
        "native": lambda: ops.pack(latents, p),
        "eager": lambda: eager_pack(latents, p, False),
        "compile": lambda: compiled(latents, p, False),
        "copy": latents.clone,
    }
    return Case(name, batch, methods, latents.nbytes)


def scores_case(batch: int, sizes: tuple[int, ...]) -> Case:
    """`patch_scores`; the copy reads the history's four latents and writes none of them back."""
    history = torch.randn(4, batch, *LATENTS)
    compiled = torch.compile(eager_scores)
    methods: dict[str, Call] = {
        "native": lambda: ops.patch_scores(history, sizes, 0.4),
        "eager": lambda: eager_scores(history, sizes, 0.4),
        "compile": lambda: compiled(history, sizes, 0.4),
        "copy": copy_of(history.nbytes // 2),  # reads and writes count alike
    }
    return Case(f"patch_scores {list(sizes)}", batch, methods, history.nbytes // 2)


def solver_case(batch: int, solver: str, dtype: torch.dtype) -> Case:
    """`solver_step_`; the copy moves as many bytes as the terms and the results have."""
    row = COEFFICIENT_ROWS[solver]
    past = sum(value != 0 for value in row[4:])
    history, velocities = torch.randn(4, batch, *LATENTS), torch.randn(past, batch, *LATENTS)
    velocity = torch.randn(batch, *LATENTS).to(dtype)
    table = torch.tensor(row, dtype=torch.float64).repeat(8, 1)
    compiled = torch.compile(eager_solver)
    # In float32: the terms but the newest velocity, the latent, and the velocity if it is kept.
    floats = sum(value != 0 for value in row) - 1 + 1 + (past > 0)
    moved = floats * history[0].nbytes + velocity.nbytes
    methods: dict[str, Call] = {
        "native": lambda: ops.solver_step_(history, velocities, velocity, table, 5),
        "eager": lambda: eager_solver(history, velocities, velocity, row, 5),
        "compile": lambda: compiled(history, velocities, velocity, row, 5),
        "copy": copy_of(moved // 2),
    }
    name = f"solver_step_ {solver} {str(dtype).removeprefix('torch.')} velocity"
    return Case(name, batch, methods, moved // 2)


def linear_case(tokens: int) -> Case:
    """The widest linear layer of a block of the demo model, with its GELU."""
    values, weight, bias = torch.randn(1, tokens, 128), torch.randn(512, 128), torch.randn(512)
    onednn = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
    methods: dict[str, Call] = {
        "native": lambda: ops.linear(values, weight, bias, gelu=True),
        "eager": lambda: F.gelu(F.linear(values, weight, bias), approximate="tanh"),
        "onednn": lambda: onednn(values, weight, bias, "gelu", [], "tanh"),
    }
    return Case(f"linear {tokens} x 128 x 512, GELU", 1, methods, 0, 2 * tokens * 128 * 512)


def attention_case(tokens: int, heads: int, width: int) -> Case:
    """Self-attention of one sample."""
    query, key, value = torch.randn(3, 1, tokens, heads, width)
    turned = [part.transpose(1, 2) for part in (query, key, value)]
    methods: dict[str, Call] = {
        "native": lambda: ops.attention(query, key, value),
        "eager": lambda: F.scaled_dot_product_attention(turned[0], turned[1], turned[2]),
    }
    operations = 4 * heads * tokens * tokens * width
    return Case(f"attention {tokens} x {heads} x {width}", 1, methods, 0, operations)


def norm_case(tokens: int) -> Case:
    """Norm and rotary embedding of the demo model's queries, 4 heads of 32."""
    values, weight = torch.randn(1, tokens, 4, 32), torch.randn(32)
    cos, sin = torch.rand(2, tokens, 32)

    def eager(values: Tensor) -> Tensor:
        normed = F.rms_norm(values, (32,), weight, 1e-6)
        rotated: Tensor = apply_rotary_emb(normed, (cos, sin), sequence_dim=1)
        return rotated

    compiled, target = torch.compile(eager), torch.empty_like(values)
    methods: dict[str, Call] = {
        "native": lambda: ops.norm_rotate(values, weight, cos, sin, 1e-6),
        "eager": lambda: eager(values),
        "compile": lambda: compiled(values),
        "copy": lambda: target.copy_(values),
    }
    return Case(f"norm_rotate {tokens} x 4 x 32", 1, methods, values.nbytes)


def block_cases() -> list[Case]:
    """What the blocks of a model call on a CPU."""
    return [
        *(linear_case(tokens) for tokens in (272, 32)),
        *(attention_case(tokens, 4, 32) for tokens in (272, 32)),
        attention_case(1040, 12, 128),
        *(norm_case(tokens) for tokens in (272, 4352)),
    ]


def overhead_case() -> Case:
    """`decide_` works on a few numbers: its time is what calling an op costs."""
    scores, limits = torch.rand(1, 2), torch.rand(8, 2)
    forced = torch.full((8,), -1, dtype=torch.int32)
    state, record = torch.tensor([-1, 0, 0, 0], dtype=torch.int32), torch.zeros(8, 5)
    call: Call = lambda: ops.decide_(scores, forced, limits, state, record, 3, 0, False)  # noqa: E731
    return Case("decide_", 1, {"native": call}, 0)


def cases(batch: int) -> list[Case]:
    """All ops at one batch size."""
    return [
        pack_case(batch, torch.float32, 2),
        pack_case(batch, torch.bfloat16, 2),
        pack_case(batch, torch.float32, 4),
        scores_case(batch, (4, 8)),
        scores_case(batch, (2, 4, 8)),
        solver_case(batch, "euler", torch.float32),
        solver_case(batch, "euler", torch.bfloat16),
        solver_case(batch, "multistep", torch.bfloat16),
    ]


def time_calls(call: Call, seconds: float, clock: Callable[[], float]) -> list[float]:
    """Times of single calls, in microseconds, for about this long and at least once."""
    times: list[float] = []
    begin = clock()
    while not times or clock() - begin < seconds:
        start = clock()
        call()
        times.append((clock() - start) * 1e6)
    return times


def measure(case: Case, rounds: int, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    """Warms every method up, then lets them take turns."""
    times: dict[str, list[float]] = {name: [] for name in case.methods}
    for call in case.methods.values():
        for _ in range(WARM_UP_CALLS):
            call()
    for _ in range(rounds):
        for name, call in case.methods.items():
            times[name] += time_calls(call, ROUND_SECONDS, clock)
    return {name: summarise(values) for name, values in times.items()}


def summarise(times: list[float]) -> dict[str, float]:
    """Least, median and quartiles in microseconds, over the calls of all rounds."""
    values = (min(times), *statistics.quantiles(times, n=4))
    names = ("best_us", "lower_quartile_us", "median_us", "upper_quartile_us")
    return {**{n: round(v, 2) for n, v in zip(names, values, strict=True)}, "calls": len(times)}


def entry(
    case: Case, threads: int, timings: dict[str, dict[str, float]], rate: float
) -> dict[str, Any]:
    """One entry of the results, printed too."""
    best = ", ".join(f"{name} {timing['best_us']:.1f}" for name, timing in timings.items())
    print(f"{case.name}, batch {case.batch}, {threads} threads: best us {best}", flush=True)
    return {
        "op": case.name,
        "batch": case.batch,
        "threads": threads,
        "copy_bytes": case.copy_bytes,
        "operations": case.operations,
        "floor_us": case.operations / rate * 1e6 or timings.get("copy", {}).get("best_us"),
        "timings": timings,
    }


def main() -> None:
    """Runs all cases and writes the results."""
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, or a CUDA device")
    parser.add_argument("--rounds", type=int, default=8, help="turns of every method")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU: thread counts")
    arguments = parser.parse_args()
    if torch.device(arguments.device).type == "cuda":
        run_cuda(arguments)
    else:
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Runs the cases of the CPU."""
    entries = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        torch.compiler.reset()  # compiled code is specialised to the number of threads
        clock = time.thread_time if threads == 1 else time.perf_counter
        rate = matrix_rate(torch.device("cpu"), torch.float32)
        for case in (*cases(1), *cases(4), *block_cases(), overhead_case()):
            timings = measure(case, arguments.rounds, clock)
            entries.append(entry(case, threads, timings, rate))
    report = {
        "machine": {
            **machine(),
            "load_average": os.getloadavg(),
            "torch": torch.__version__,
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "build": _runtime.build_info(),
        },
        "warm_up_calls": WARM_UP_CALLS,
        "rounds": arguments.rounds,
        "results": entries,
    }
    publish(arguments.out or RESULTS / "ops_cpu.json", report)


if __name__ == "__main__":
    main()
