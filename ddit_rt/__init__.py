"""ddit_rt: a low-latency runtime for diffusion transformers with dynamic patch sizes.

    engine = ddit_rt.compile(pipe, height=1024, width=1024)
    engine.save("model.ddit")
    engine = ddit_rt.load("model.ddit", pipe)
    image = engine("a zebra in tall grass", patch_policy=ddit_rt.DDiTPolicy(tau=1e-3)).images[0]

Names are imported when they are first used: `ddit-rt --help` need not wait for torch.
"""

from importlib import import_module
from logging import NullHandler, getLogger
from typing import TYPE_CHECKING, Any

from ddit_rt.errors import (
    ArtifactError,
    ArtifactMismatchError,
    CaptureError,
    CompileError,
    DditError,
    RunCancelled,
    ScheduleError,
    ShapeError,
    StallError,
    UnsupportedModelError,
    UntrustedArtifactError,
)
from ddit_rt.version import __version__

if TYPE_CHECKING:
    from ddit_rt import ops
    from ddit_rt.adapters import AdapterSet, load_adapters, save_adapters
    from ddit_rt.artifact import Artifact
    from ddit_rt.blocks import TokenRanges
    from ddit_rt.engine import Engine, compile, load  # noqa: A004 - the field's word
    from ddit_rt.loop import CaptureReport, RunTrace, StepRecord
    from ddit_rt.policies import (
        CacheFit,
        DDiTPolicy,
        FinePolicy,
        FirstBlockCache,
        MagCache,
        NoCache,
        PatchPolicy,
        SeaCache,
        SpectralPolicy,
        StaticCache,
        StaticPolicy,
        StepCache,
        TeaCache,
    )

_HOMES = {
    "AdapterSet": "adapters",
    "Artifact": "artifact",
    "CacheFit": "policies",
    "CaptureReport": "loop",
    "DDiTPolicy": "policies",
    "Engine": "engine",
    "FinePolicy": "policies",
    "FirstBlockCache": "policies",
    "MagCache": "policies",
    "NoCache": "policies",
    "PatchPolicy": "policies",
    "RunTrace": "loop",
    "SeaCache": "policies",
    "SpectralPolicy": "policies",
    "StaticCache": "policies",
    "StaticPolicy": "policies",
    "StepCache": "policies",
    "StepRecord": "loop",
    "TeaCache": "policies",
    "TokenRanges": "blocks",
    "compile": "engine",
    "load": "engine",
    "load_adapters": "adapters",
    "save_adapters": "adapters",
}

__all__ = [
    "AdapterSet",
    "Artifact",
    "ArtifactError",
    "ArtifactMismatchError",
    "CacheFit",
    "CaptureError",
    "CaptureReport",
    "CompileError",
    "DDiTPolicy",
    "DditError",
    "Engine",
    "FinePolicy",
    "FirstBlockCache",
    "MagCache",
    "NoCache",
    "PatchPolicy",
    "RunCancelled",
    "RunTrace",
    "ScheduleError",
    "SeaCache",
    "ShapeError",
    "SpectralPolicy",
    "StallError",
    "StaticCache",
    "StaticPolicy",
    "StepCache",
    "StepRecord",
    "TeaCache",
    "TokenRanges",
    "UnsupportedModelError",
    "UntrustedArtifactError",
    "__version__",
    "compile",
    "load",
    "load_adapters",
    "ops",
    "save_adapters",
]


# A library says nothing by itself; whoever wants to hear it sets up logging for "ddit_rt".
getLogger(__name__).addHandler(NullHandler())


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module(f"{__name__}.ops")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    own = {"Any", "NullHandler", "TYPE_CHECKING", "getLogger", "import_module"}
    return sorted({*__all__, *globals()} - own)
