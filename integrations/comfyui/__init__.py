"""ComfyUI nodes: load an artifact, sample with a patch policy, draw the timeline of the run."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

import ddit_rt
from ddit_rt.engine.watch import RunWatch

if TYPE_CHECKING:
    from ddit_rt import Engine, RunTrace

_PIPELINES_OWN = -1.0
Inputs = dict[str, dict[str, tuple[Any, ...]]]


class LoadArtifact:
    """An engine: an artifact on the weights of its model."""

    RETURN_TYPES = ("DDIT_ENGINE",)
    RETURN_NAMES = ("engine",)
    FUNCTION = "load"
    CATEGORY = "ddit_rt"
    DESCRIPTION = "Loads a compiled model. An artifact is code: trust those alone that you built."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802 - ComfyUI's name
        """What ComfyUI asks for."""
        return {
            "required": {
                "artifact": ("STRING", {"default": "demo", "tooltip": "folder, or 'demo'"}),
                "model": (
                    "STRING",
                    {"default": "", "tooltip": "diffusers folder or Hub name; of a demo none"},
                ),
                "trust_code": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "run code that was not compiled on this machine"},
                ),
            }
        }

    def load(self, artifact: str, model: str, trust_code: bool) -> tuple[Engine]:
        """See `ddit_rt.sources.load_engine`."""
        from ddit_rt.sources import load_engine

        engine = load_engine(
            artifact.strip(), model.strip() or None, command="ui", trust_code=trust_code
        )
        return (engine,)


class Sample:
    """Images of a prompt, or the frames of a video."""

    RETURN_TYPES = ("IMAGE", "DDIT_TRACE")
    RETURN_NAMES = ("images", "trace")
    FUNCTION = "sample"
    CATEGORY = "ddit_rt"
    DESCRIPTION = "Runs the whole pipeline: text encoders, denoising loop and VAE."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802 - ComfyUI's name
        """What ComfyUI asks for."""
        size = {"default": 0, "min": 0, "max": 16384, "step": 8, "tooltip": "0: as compiled"}
        policy = "fine, static, dynamic, 4p:0.2,2p:0.4,p, a preset, or a speed from 0 to 1"
        return {
            "required": {
                "engine": ("DDIT_ENGINE",),
                "prompt": ("STRING", {"multiline": True, "default": ""}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "steps": ("INT", {"default": 24, "min": 1, "max": 1000}),
                "patch_policy": (
                    "STRING",
                    {"default": "", "tooltip": f"{policy}; empty: the artifact's own"},
                ),
            },
            "optional": {
                "width": ("INT", size),
                "height": ("INT", size),
                "guidance_scale": (
                    "FLOAT",
                    {
                        "default": _PIPELINES_OWN,
                        "min": _PIPELINES_OWN,
                        "max": 100.0,
                        "tooltip": "-1: the pipeline's own",
                    },
                ),
                "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
            },
        }

    def sample(
        self,
        engine: Engine,
        prompt: str,
        seed: int,
        steps: int,
        patch_policy: str,
        width: int = 0,
        height: int = 0,
        guidance_scale: float = _PIPELINES_OWN,
        negative_prompt: str = "",
        batch_size: int = 1,
    ) -> tuple[torch.Tensor, RunTrace]:
        """Images `[B, H, W, C]` from 0 to 1, on the CPU; seeds are `seed`, `seed + 1`, ..."""
        sizes = {"width": width, "height": height}
        given: dict[str, Any] = {name: pixels for name, pixels in sizes.items() if pixels}
        if guidance_scale != _PIPELINES_OWN:
            given["guidance_scale"] = guidance_scale
        if negative_prompt.strip():
            given["negative_prompt"] = [negative_prompt] * batch_size
        stopped, say = _interruption()
        try:
            output = engine(
                [prompt] * batch_size,
                num_inference_steps=steps,
                patch_policy=_policy(patch_policy.strip()),
                generator=[torch.Generator().manual_seed(seed + i) for i in range(batch_size)],
                output_type="np",
                watch=RunWatch(stopped=stopped),
                **given,
            )
        except ddit_rt.RunCancelled:
            say()  # in ComfyUI's own words, which end the workflow quietly
            raise
        images = output.frames if hasattr(output, "frames") else output.images
        trace = engine.last_trace
        assert trace is not None, "a run that returned has a trace"
        pixels = np.asarray(images, dtype=np.float32)
        return torch.from_numpy(pixels.reshape(-1, *pixels.shape[-3:])), trace


class Timeline:
    """Patch size, score against threshold and milliseconds of every step, as an image."""

    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("timeline",)
    FUNCTION = "draw"
    CATEGORY = "ddit_rt"
    DESCRIPTION = "What the run did, step by step; needs ddit_rt[eval]."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802 - ComfyUI's name
        """What ComfyUI asks for."""
        return {"required": {"trace": ("DDIT_TRACE",)}}

    def draw(self, trace: RunTrace) -> tuple[torch.Tensor]:
        """An image `[1, H, W, 3]` from 0 to 1."""
        from ddit_rt.lab.measure.timeline import Run, draw_runs

        label = f"{trace.tokens} tokens\n{trace.latency_ms:.0f} ms"
        file = io.BytesIO()
        draw_runs([Run(label=label, steps=trace.to_dict()["steps"])]).savefig(file, format="png")
        pixels = np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 255
        return (torch.from_numpy(pixels)[None],)


def _policy(text: str) -> str | float | None:
    """A speed, a policy as text, or the artifact's own."""
    try:
        return float(text) if text else None
    except ValueError:
        return text


def _interruption() -> tuple[Callable[[], bool] | None, Callable[[], None]]:
    """Whether ComfyUI's user has cancelled, and what then raises ComfyUI's own error."""
    try:
        from comfy import model_management
    except ModuleNotFoundError:  # the nodes are called from elsewhere
        return None, lambda: None
    return (
        model_management.processing_interrupted,
        model_management.throw_exception_if_processing_interrupted,
    )


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "DditLoadArtifact": LoadArtifact,
    "DditSample": Sample,
    "DditTimeline": Timeline,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "DditLoadArtifact": "Load artifact (ddit_rt)",
    "DditSample": "Sample with a patch policy (ddit_rt)",
    "DditTimeline": "Timeline of a run (ddit_rt)",
}
