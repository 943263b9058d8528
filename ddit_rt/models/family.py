"""A family: what follows from its description, by which everything else is written.

What blocks take is read off the forward (`probe.py`), and the pipeline's own call runs around the
loop, so that a family's calls are read here, before any work, and made there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.models.arguments import (
    check_given_embeds,
    check_output,
    check_tensor,
    check_texts,
    noise_levels,
)
from ddit_rt.models.base import BATCH, IMAGE, JOINT, BlockType, Grid, Guidance
from ddit_rt.models.block_calls import parameters_of
from ddit_rt.models.call_description import CallDescription
from ddit_rt.models.calls import (
    PER_PROMPT,
    ModelCall,
    PipelineCall,
    batch_of,
    bind_call,
    check_known,
    check_shape,
    drop_steps,
    first_step,
    prompts_of,
    refuse_ignored,
)
from ddit_rt.models.description import REFERENCE
from ddit_rt.models.probe import (
    PROBES,
    SOUND_PROBES,
    Probe,
    ReadBlockType,
    read_block_types,
)

NEGATIVE = "negative_"
"""Before the name of an argument of the forward: that of the pass with the negative prompt."""

_OWN = ("hidden_states", "timestep", "return_dict")
"""Arguments of a forward that every step makes anew."""


class Family(CallDescription):
    """A description with what follows from it. One instance of a class, in `models.FAMILIES`."""

    def first_weight(self, transformer: nn.Module) -> Tensor:
        """The weight by which diffusers says what dtype a model is; its device is the model's.

        The first one that is not kept in float32 for itself.
        """
        kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
        named = transformer.named_parameters()
        return next(one for path, one in named if not kept & set(path.split(".")))

    def hidden_size(self, transformer: nn.Module) -> int:
        """Width d of a token inside the blocks."""
        for kind in self.block_types(transformer):
            for spec in kind.inputs:
                tokens = spec.dims[:2] in ((BATCH, IMAGE), (BATCH, JOINT))
                if tokens and isinstance(spec.dims[-1], int):
                    return spec.dims[-1]
        raise UnsupportedModelError(f"no block of {type(transformer).__name__} takes image tokens")

    def block_types(self, transformer: nn.Module) -> tuple[BlockType, ...]:
        """The repeated block classes, in the order in which the forward pass runs them."""
        return self.read_blocks(transformer)

    def read_blocks(self, transformer: nn.Module) -> tuple[ReadBlockType, ...]:
        """The blocks as the forward calls them, read off it."""
        probes = SOUND_PROBES if self.soundtrack else PROBES
        return read_block_types(
            transformer,
            self.variants,
            self._run_probe,
            repeated=self.repeated,
            probes=probes,
            arrange=self.block_call,
        )

    def _run_probe(self, twin: nn.Module, probe: Probe, variant: int) -> Any:
        dtype = self.first_weight(twin).dtype
        frames = (1,) if self.video else ()
        size = (probe.rows * self.patch, probe.columns * self.patch)
        shape = (probe.batch, self.latent_channels(twin), *frames, *size)
        arguments = self.forward_arguments(
            torch.empty(shape, dtype=dtype, device="meta"),
            torch.empty(1, dtype=torch.float32, device="meta"),
            {
                **self.example(twin, variant, probe.batch, probe.text),
                **self.sound_example(twin, probe.batch, probe.sound),
            },
        )
        return type(twin).forward(twin, **arguments)

    def check_conditioning(
        self, transformer: nn.Module, batch: int, conditioning: Mapping[str, Any]
    ) -> None:
        """Raises `ValueError` when a conditioning tensor is missing, unknown or misshapen."""
        names = tuple(dict.fromkeys((*self.prompt, *self.prompt_names(transformer))))
        known = (*names, *(NEGATIVE + name for name in names), self.scale)
        check_known(conditioning, known, f"a {type(transformer).__name__}")
        given = {name: value for name, value in conditioning.items() if value is not None}
        guided = self._check_guided(given)
        one, longer = (self.example(transformer, 0, batch, text) for text in (1, 2))
        for prefix in ("", NEGATIVE) if guided else ("",):
            for name, like in one.items():
                if isinstance(like, Tensor):
                    value = given.get(prefix + name, given.get(name))
                    self._check_like(name, prefix + name, value, (like, longer[name]))

    def _check_guided(self, given: Mapping[str, Any]) -> bool:
        """Whether conditioning asks for guidance: by a scale and a negative prompt, or neither."""
        scale = given.get(self.scale)
        if scale is not None:
            wanted = "without dimensions, or with one for each expert"
            if check_tensor(self.scale, scale, wanted, floating=False).ndim > 1:
                raise ShapeError(
                    f"got `{self.scale}` of shape {list(scale.shape)}; expected a tensor {wanted}"
                )
        negative = NEGATIVE + self.text
        guided = scale is not None or any(name.startswith(NEGATIVE) for name in given)
        for name, other in ((negative, self.scale), (self.scale, negative)):
            if guided and name not in given:
                raise ValueError(
                    f"`{name}` is missing: guidance takes it together with `{other}`; give both or "
                    "neither"
                )
        return guided

    def _check_like(self, name: str, full: str, given: Any, likes: tuple[Tensor, Tensor]) -> None:
        """Refuses what is unlike an example; the second has another text length."""
        like, longer = likes
        shape = _dims(like, longer)
        if name in self.extra:
            shape[2:] = ["frames", "rows", "columns"][-(like.ndim - 2) :]
        check_shape(full, given, shape, floating=like.is_floating_point())
        if not like.is_floating_point() and given.dtype != like.dtype:
            raise TypeError(f"got `{full}` of {given.dtype}; expected {like.dtype}: convert it")

    def prompt_names(self, transformer: nn.Module) -> tuple[str, ...]:
        """Conditioning that a model of this class takes beside `prompt`."""
        own = (*_OWN, *self.sized)
        forward = inspect.unwrap(type(transformer).forward)
        return (*(name for name in parameters_of(forward) if name not in own), *self.extra)

    def check_sizes(self, shape: tuple[int, ...], conditioning: Mapping[str, Any]) -> None:
        """Raises `ShapeError` for images of another size than latents of a shape.

        Coarse steps alone make them smaller.
        """
        expected = self.extra_size(shape)
        for name in (prefix + name for name in self.extra for prefix in ("", NEGATIVE)):
            given = conditioning.get(name)
            if given is not None and given.ndim == len(shape) and given.shape[2:] != expected:
                raise ShapeError(
                    f"`{name}` has shape {list(given.shape)}; beside latents {list(shape)} its "
                    f"last dimensions are {list(expected)}"
                )

    def guidance(self, conditioning: Mapping[str, Any]) -> Guidance | None:
        """How a conditioning asks for two passes a step; None for one pass."""
        if self.scale not in conditioning:
            return None
        prompt = {
            name: value
            for name, value in conditioning.items()
            if name != self.scale and not name.startswith(NEGATIVE)
        }
        device = conditioning[self.text].device
        negative = {name: conditioning.get(NEGATIVE + name, one) for name, one in prompt.items()}
        scale = conditioning[self.scale].to(device, torch.float32)
        return Guidance(prompt=prompt, negative=negative, scale=scale)

    def together(self, guidance: Guidance) -> tuple[Mapping[str, Any]] | None:
        """Both passes as one batch, that with the prompt first; None where they cannot be one."""
        both: dict[str, Any] = {}
        for name, one in guidance.prompt.items():
            other = guidance.negative[name]
            if isinstance(one, Tensor) != isinstance(other, Tensor):
                return None
            both[name] = one
            if isinstance(one, Tensor) and name not in self.unbatched:
                if one.shape != other.shape:
                    return None
                both[name] = torch.cat((one, other))
        return (both,)

    def set_timesteps(
        self, scheduler: Any, num_inference_steps: int, sigmas: Sequence[float] | None, grid: Grid
    ) -> None:
        """Sets the scheduler as the family's pipeline does, its shift included."""
        levels = noise_levels(scheduler, num_inference_steps, sigmas)
        takes = inspect.signature(scheduler.set_timesteps).parameters
        more: dict[str, Any] = {}
        if "mu" in takes:
            more["mu"] = self.mu(scheduler, grid.tokens, num_inference_steps)
        if levels is None:
            scheduler.set_timesteps(num_inference_steps, **more)
        elif "sigmas" in takes:
            scheduler.set_timesteps(sigmas=levels, **more)
        else:
            raise UnsupportedModelError(
                f"{type(scheduler).__name__} takes no noise levels, which this model's pipeline "
                "gives it; use one that does, such as FlowMatchEulerDiscreteScheduler"
            )

    def read_call(
        self, pipeline: Any, scheduler: Any, arguments: Mapping[str, Any]
    ) -> PipelineCall:
        """Reads a pipeline call, before any work, and sets the scheduler's timesteps.

        What the pipeline checks itself comes with its own call.

        Args:
            pipeline: A pipeline of one of `pipeline_classes`.
            scheduler: The copy of the pipeline's scheduler that this run may set.
            arguments: Keyword arguments of the pipeline's `__call__`.
        """
        call = bind_call(pipeline, arguments)
        refuse_ignored(call)
        self.check_prompts(pipeline, call)
        shape = self.call_shape(pipeline, call)
        if call["latents"] is not None:
            check_shape("latents", call["latents"], self.given_latents(shape))
        rows, columns = shape[-2] // self.patch, shape[-1] // self.patch
        grid = Grid(height=rows, width=columns, frames=shape[2] if self.video else 1)
        self.set_timesteps(scheduler, call["num_inference_steps"], call.get("sigmas"), grid)
        drop_steps(scheduler, first_step(call, scheduler))
        scales = self.scales_of(pipeline, call)
        return PipelineCall(
            arguments=call,
            shape=shape,
            scales=scales,
            passes=1 + bool(scales),
            ignored=self.ignored(pipeline, arguments, call),
        )

    def check_prompts(self, pipeline: Any, call: Mapping[str, Any]) -> None:
        """Refuses what a pipeline would take and fail at, or take for something else."""
        check_texts(call, prompts_of(call))
        check_output(pipeline, call)
        embeds = {
            prefix + name: argument
            for prefix in ("", NEGATIVE)
            for name, argument in self.embeds.items()
            if call.get(prefix + name) is not None
        }
        if not embeds and not self.masks:
            return
        batch, transformer = batch_of(call), pipeline.transformer
        self._check_masks(call, self.example(transformer, 0, 1, 1))
        per_prompt = next(name for name in PER_PROMPT if name in call)
        one, longer = (self.example(transformer, 0, batch, text) for text in (1, 2))
        for name, argument in embeds.items():
            shape = _dims(one[argument], longer[argument])[1:]
            check_given_embeds(name, call[name], shape, batch, per_prompt)

    def _check_masks(self, call: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
        """Refuses a mask of another dtype, which attention would read otherwise."""
        for name, argument in (
            (NEGATIVE * side + n, a) for n, a in self.masks.items() for side in (0, 1)
        ):
            mask, expected = call.get(name), like[argument].dtype
            if isinstance(mask, Tensor) and mask.dtype != expected:
                raise TypeError(
                    f"got `{name}` of {mask.dtype}; the blocks are compiled for a mask of "
                    f"{expected}, as the pipeline's encode_prompt makes it: convert it"
                )

    def read_model_call(
        self, transformer: nn.Module, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """A pipeline's call of its transformer, by the arguments of the transformer's `forward`.

        Args:
            transformer: The model.
            shape: Latent shape of the run.
            arguments: Those that were given.

        Raises:
            UnsupportedModelError: One that the compiled blocks could only ignore.
            ShapeError: A misshapen tensor.
        """
        given = {
            name: value
            for name, value in arguments.items()
            if value is not None and value != {} and name not in (*self.sized, "return_dict")
        }
        hidden, tokens = given.pop("hidden_states"), self.tokens_of(shape)
        latents = self.unpack_latents(hidden[:, :tokens], shape)
        if hidden.shape[1] > tokens:
            given[REFERENCE] = hidden[:, tokens:]
            given |= self.reference_places(arguments, tokens)
        timestep = self.level_of(given.pop("timestep").reshape(-1)[:1])
        conditioning = {
            # One sample serves all, as diffusers broadcasts it.
            name: value.expand(shape[0], *value.shape[1:])
            if isinstance(value, Tensor) and name not in self.unbatched and len(value) == 1
            else value
            for name, value in given.items()
        }
        return ModelCall(latents=latents, timestep=timestep, conditioning=conditioning)


def _dims(like: Tensor, longer: Tensor) -> list[int | str]:
    """Sizes of an example, with a name for what another text length changes."""
    return [
        size if size == other else "text tokens"
        for size, other in zip(like.shape, longer.shape, strict=True)
    ]
