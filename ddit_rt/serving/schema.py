"""Bodies of requests: OpenAI's fields, and the engine's own beside them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict

Finite = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Whole = Annotated[int, Strict()]
Seed = Annotated[int, Strict(), Field(ge=0, le=2**63 - 1)]


class Body(BaseModel):
    """A field that is none of these is refused: nothing that a client asks for is ignored."""

    model_config = ConfigDict(extra="forbid")


class Tau(Body):
    """The dynamic policy with thresholds of the request's own."""

    tau: Finite | dict[str, Finite]
    rho: Finite | None = None


class Lora(Body):
    """A style LoRA of the server's folder."""

    model_config = ConfigDict(frozen=True)

    name: str
    scale: Annotated[float, Strict(), Field(allow_inf_nan=False, ge=-4, le=4)] = 1.0


class Asked(Body):
    """What every kind of request may say."""

    prompt: str
    model: str | None = None
    size: str | None = Field(None, description='"WIDTHxHEIGHT" in pixels, or "auto"')
    user: str | None = None
    seed: Seed | None = None
    num_inference_steps: Annotated[int, Strict(), Field(ge=1)] | None = None
    guidance_scale: Finite | None = None
    true_cfg_scale: Finite | None = None
    negative_prompt: str | None = None
    patch_policy: str | Finite | Tau | None = Field(
        None,
        description="a calibrated preset, a speed from 0 to 1, {tau, rho}, or a policy as text: "
        "fine, static, dynamic, 4p:0.2,2p:0.4,p",
    )
    step_cache: str | None = None
    lora: str | Lora | None = None
    return_trace: bool = False


class Picture(Asked):
    """What requests for images say besides."""

    n: Annotated[int, Strict(), Field(ge=1)] = 1
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None


class Generation(Picture):
    """Body of `POST /v1/images/generations`."""

    stream: bool = False
    partial_images: Annotated[int, Strict(), Field(ge=0, le=100)] | None = Field(
        None, description="previews of a stream; by default one a step"
    )


class Edit(Picture):
    """Fields of `POST /v1/images/edits`, beside the uploads `image` and `mask`."""

    strength: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None


class Video(Asked):
    """Fields of `POST /v1/videos`."""

    # A bound far beyond every limit, which keeps its frames a number.
    seconds: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = None
    num_frames: Annotated[int, Strict(), Field(ge=1)] | None = None
