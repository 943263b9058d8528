"""Named ranges around the work of a run, for profilers.

`ddit_rt/run` holds `ddit_rt/step/{k}`, which holds `ddit_rt/decide`, `ddit_rt/model/{patch}` and
`ddit_rt/solver`; in a step that reuses, `ddit_rt/reuse/{patch}`. An executor whose device decides
alone has the outer ones only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

Ranges = Callable[[str], AbstractContextManager[Any]]
"""Opens a range by its name without `ddit_rt/`."""

_NONE: AbstractContextManager[Any] = nullcontext()


def ranges(annotate: bool) -> Ranges:
    """Ranges that profilers see, or ranges that cost next to nothing.

    torch.profiler sees `record_function`; Nsight sees NVTX. `emit_nvtx` would do for both, but it
    gives every range another name and adds one for each torch op.
    """
    if not annotate:
        return _no_range
    return _range_with_nvtx if torch.cuda.is_available() else _range


def _no_range(name: str) -> AbstractContextManager[Any]:  # noqa: ARG001 - the interface
    return _NONE


def _range(name: str) -> AbstractContextManager[Any]:
    return record_function(f"ddit_rt/{name}")


@contextmanager
def _range_with_nvtx(name: str) -> Iterator[None]:
    with _range(name), torch.cuda.nvtx.range(f"ddit_rt/{name}"):
        yield
