"""ddit_rt: a low-latency runtime for diffusion transformers with dynamic patch sizes.

engine = ddit_rt.compile(pipe, height=1024, width=1024)
engine.save("model.ddit")
engine = ddit_rt.load("model.ddit", pipe)
image = engine("a zebra in tall grass", patch_policy=ddit_rt.DDiTPolicy(tau=1e-3)).images[0]

Names are imported when they are first used: `ddit-rt --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ddit_rt.version import __version__

if TYPE_CHECKING:
    from ddit_rt.blocks import TokenRanges
    from ddit_rt.engine import Engine, compile, load  # noqa: A004 - the field's word
    from ddit_rt.loop import RunTrace, StepRecord
    from ddit_rt.policies import (
        DDiTPolicy,
        FinePolicy,
        MagCache,
        NoCache,
        PatchPolicy,
        StaticPolicy,
        StepCache,
        TeaCache,
    )

__all__ = [
    "DDiTPolicy",
    "Engine",
    "FinePolicy",
    "MagCache",
    "NoCache",
    "PatchPolicy",
    "RunTrace",
    "StaticPolicy",
    "StepCache",
    "StepRecord",
    "TeaCache",
    "TokenRanges",
    "__version__",
    "compile",
    "load",
]

_HOMES = {
    "DDiTPolicy": "policies",
    "Engine": "engine",
    "FinePolicy": "policies",
    "MagCache": "policies",
    "NoCache": "policies",
    "PatchPolicy": "policies",
    "RunTrace": "loop",
    "StaticPolicy": "policies",
    "StepCache": "policies",
    "StepRecord": "loop",
    "TeaCache": "policies",
    "TokenRanges": "blocks",
    "compile": "engine",
    "load": "engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
