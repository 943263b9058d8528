"""ddit_rt: a low-latency runtime for diffusion transformers with dynamic patch sizes.

engine = ddit_rt.compile(pipe, height=1024, width=1024)
engine.save("model.ddit")
engine = ddit_rt.load("model.ddit", pipe)
image = engine("a zebra in tall grass", patch_policy=ddit_rt.DDiTPolicy(tau=1e-3)).images[0]
"""

from ddit_rt.artifact import TokenRanges
from ddit_rt.executor import RunTrace, StepRecord
from ddit_rt.patch_scheduler import DDiTPolicy, FinePolicy, PatchPolicy, StaticPolicy
from ddit_rt.pipeline import Engine, compile, load  # noqa: A004
from ddit_rt.version import __version__

__all__ = [
    "DDiTPolicy",
    "Engine",
    "FinePolicy",
    "PatchPolicy",
    "RunTrace",
    "StaticPolicy",
    "StepRecord",
    "TokenRanges",
    "__version__",
    "compile",
    "load",
]
