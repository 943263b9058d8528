"""From a request's body to work for the engine, refused before it waits where it cannot be run."""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from ddit_rt import checks
from ddit_rt.engine import Engine
from ddit_rt.models import family_of
from ddit_rt.models.arguments import call_defaults
from ddit_rt.planning.request import PolicyChoice
from ddit_rt.policies import DDiTPolicy
from ddit_rt.serving.config import ServeConfig
from ddit_rt.serving.errors import ApiError
from ddit_rt.serving.jobs import OnStep, Work
from ddit_rt.serving.schema import Asked, Lora, Tau
from ddit_rt.serving.styles import Styles

DRAWN: ContextVar[int] = ContextVar("drawn")
"""Seed for the request in hand if it names none; where none was drawn for it, one is."""

_OWN_FIELDS = {"num_inference_steps", "guidance_scale", "true_cfg_scale", "negative_prompt"}
"""Fields that the pipeline's call takes under the same name."""

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


class Reader:
    """Reads requests for one engine."""

    def __init__(self, engine: Engine, config: ServeConfig, styles: Styles | None = None) -> None:
        self._styles = styles
        self._engine = engine
        self._config = config
        pipeline = engine.pipeline
        self._known = call_defaults(pipeline)
        self._default = family_of(pipeline.transformer, pipeline).default_size(pipeline)

    def __call__(
        self,
        asked: Asked,
        n: int = 1,
        *,
        alone: bool = False,
        on_step: OnStep | None = None,
        **arguments: Any,
    ) -> Work:
        """Reads a request.

        Args:
            asked: The request's body.
            n: Number of images.
            alone: Whether it shares its run with no other request.
            on_step: Called after every step of the run.
            arguments: Further arguments of the pipeline's call.

        Raises:
            ApiError: It asks for more than the limits admit, or for what the engine cannot run.
        """
        self._check_limits(asked, n)
        style = self._style(asked.lora)
        own_fields = asked.model_dump(include=_OWN_FIELDS, exclude_none=True)
        call = {**self._config.call, **own_fields, **self._size(asked.size), **arguments}
        self._check_known(call)
        self._check_size({**self._engine.artifact.manifest.pipeline_defaults, **call})
        negative = call.pop("negative_prompt", None)
        more = {} if negative is None else {"negative_prompt": negative}
        own: dict[str, Any] = {
            "patch_policy": self._policy(asked.patch_policy),
            "step_cache": asked.step_cache,
        }
        try:
            given, request = self._engine.read_call(asked.prompt, **own, **call, **more)
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error), code="invalid_value") from error
        kind = {k: v for k, v in given.items() if k not in ("prompt", "negative_prompt")}
        shares = (sorted(kind.items()), negative is None, request, style, on_step is None)
        first = DRAWN.get(secrets.randbelow(2**31)) if asked.seed is None else asked.seed
        return Work(
            prompt=asked.prompt,
            seeds=tuple(first + place for place in range(n)),
            arguments={**own, **call},
            negative_prompt=negative,
            style=style,
            key=None if alone else repr(shares),
            on_step=on_step,
        )

    def _check_limits(self, asked: Asked, n: int) -> None:
        limits = self._config.limits
        if asked.model not in (None, self._config.model):
            raise ApiError(
                404,
                f"no such model: {checks.show(asked.model)}; this server has {self._config.model}",
                param="model",
                code="model_not_found",
            )
        for name in ("prompt", "negative_prompt"):
            if len(getattr(asked, name) or "") > limits.prompt:
                raise _beyond(name, f"at most {limits.prompt} characters")
        if n > min(limits.n, self._config.max_queue):
            raise _beyond("n", f"at most {min(limits.n, self._config.max_queue)}")
        if (asked.num_inference_steps or 1) > limits.steps:
            raise _beyond("num_inference_steps", f"at most {limits.steps}")

    def _check_known(self, call: dict[str, Any]) -> None:
        for name in call:
            if name not in self._known:
                raise ApiError(
                    400,
                    f"this model's pipeline takes no {name}; leave it out",
                    param=name,
                    code="unsupported_value",
                )

    def _size(self, size: str | None) -> dict[str, int]:
        if size in (None, "auto"):
            return {}
        found = _SIZE.fullmatch(str(size))
        if found is None:
            raise ApiError(
                400,
                f'got size={checks.show(size)}; expected "WIDTHxHEIGHT", such as "1024x768"',
                param="size",
                code="invalid_value",
            )
        return {"width": int(found[1]), "height": int(found[2])}

    def _check_size(self, given: dict[str, Any]) -> None:
        """Refuses a size of what would run, defaults included, that is beyond the limits."""
        limits, (rows, columns) = self._config.limits, self._default
        if (given.get("height") or rows) * (given.get("width") or columns) > limits.pixels:
            raise _beyond("size", f"at most {limits.pixels} pixels")
        if (given.get("num_frames") or 1) > limits.frames:
            raise _beyond("num_frames", f"at most {limits.frames}")

    def _policy(self, asked: str | float | Tau | None) -> PolicyChoice | None:
        if not isinstance(asked, Tau):
            return asked
        default = self._engine.default_policy
        policy = default if isinstance(default, DDiTPolicy) else DDiTPolicy()
        try:
            policy = replace(policy, tau=asked.tau)
            return policy if asked.rho is None else replace(policy, rho=asked.rho)
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error), param="patch_policy", code="invalid_value") from error

    def _style(self, lora: str | Lora | None) -> Lora | None:
        if lora is None:
            return None
        if self._styles is None:
            told = "this server has no LoRAs; leave lora out"
            raise ApiError(400, told, param="lora", code="lora_not_found")
        style = lora if isinstance(lora, Lora) else Lora(name=lora)
        self._styles.file(style)
        return style


def _beyond(param: str, limit: str) -> ApiError:
    return ApiError(
        400, f"{param} is beyond this server's limit: {limit}", param=param, code="limit"
    )
