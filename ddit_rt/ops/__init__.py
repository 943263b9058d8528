"""Native ops: token packing, patch scores, the solver update, decisions, and blocks' products.

Each is a torch op in the namespace `ddit_rt` with a fake, so it works in eager mode, under
`torch.compile` and in `torch.export`. Packing has CUDA kernels too. The others run on the CPU: on
CUDA the step loop launches kernels of its own, which the executor drives without torch, and the
solver's step is plain torch where the host drives. What an op is given is checked once, in
`csrc/binding`.
"""

from ddit_rt.ops._library import load as _load

_load()

# The fakes and gradients can only be attached to ops that exist.
from ddit_rt.ops import _fakes  # noqa: E402, F401
from ddit_rt.ops.functions import (  # noqa: E402
    CACHE_HEADER,
    CACHE_RECORD,
    CacheGrowth,
    CacheReason,
    Reason,
    attention,
    decide_,
    decide_reuse_,
    linear,
    norm_rotate,
    pack,
    patch_scores,
    solver_step_,
    unpack,
)

__all__ = [
    "CACHE_HEADER",
    "CACHE_RECORD",
    "CacheGrowth",
    "CacheReason",
    "Reason",
    "attention",
    "decide_",
    "decide_reuse_",
    "linear",
    "norm_rotate",
    "pack",
    "patch_scores",
    "solver_step_",
    "unpack",
]
