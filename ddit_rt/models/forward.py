"""A family whose model's own forward runs every step: what is left to say about a model.

The forward is the model, with its repeated blocks replaced by compiled ones; a coarse step is the
same forward on a smaller latent. So a family says how the pipeline lays its latents out, which
arguments of the forward hang on their size, how time enters, how guidance joins two passes, and
what of the forward need not be computed at every step. What the blocks take is read off
(`probe.py`), and the pipeline's own call runs around the loop.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

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
from ddit_rt.models.base import BATCH, IMAGE, JOINT, BlockType, Family, Grid, Guidance
from ddit_rt.models.block_calls import parameters_of
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
from ddit_rt.models.probe import (
    PROBES,
    SOUND_PROBES,
    Probe,
    ReadBlockType,
    read_block_types,
)

NEGATIVE = "negative_"
"""Before the name of an argument of the forward: that of the pass with the negative prompt."""

REFERENCE = "reference_tokens"
"""Conditioning behind the latents' tokens: of other pictures, the same at every step and size."""

REFERENCE_SHAPES = "reference_shapes"
"""What `resized` must know of those pictures."""

_OWN = ("hidden_states", "timestep", "return_dict")
"""Arguments of a forward that every step makes anew."""


class ForwardFamily(Family):
    """See above. Latents are `[B, C, H, W]`, of a video `[B, C, F, H, W]`.

    Attributes:
        patch: p, the side of the square of latent pixels that becomes a token.
        held: Children of the transformer whose outputs are the same at every step of a run; one
            that a model has None in the place of is left out.
        timed: Children whose outputs hang on the time alone.
        sized: Arguments of the forward that hang on the latents' size; `resized` makes them.
        unbatched: Tensor arguments of the forward without a batch dimension.
        text: The argument that holds text tokens, `[B, T, D]`.
        repeated: Class names of its repeated blocks, where it has no `_repeated_blocks`.
        variants: In how many ways the forward may be called; see `example`.
        extra: Conditioning that is no argument of the forward; `forward_arguments` takes it in.
        exact: Tensor arguments that keep their own dtype, such as times and positions.
        image_first: Whether image tokens come before text tokens where blocks take both as one.
        scale: Conditioning that is the scale of classifier-free guidance.
        embeds: Embeddings that the pipeline's call takes and does not repeat for several of a
            prompt, by the arguments of the forward that they become.
    """

    patch: ClassVar[int] = 2
    held: ClassVar[tuple[str, ...]] = ()
    timed: ClassVar[tuple[str, ...]] = ()
    sized: ClassVar[tuple[str, ...]] = ()
    unbatched: ClassVar[tuple[str, ...]] = ()
    text: ClassVar[str] = "encoder_hidden_states"
    repeated: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[int] = 1
    extra: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[tuple[str, ...]] = ()
    image_first: ClassVar[bool] = False
    scale: ClassVar[str] = "guidance_scale"
    embeds: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def example(self, transformer: Any, variant: int, batch: int, text: int) -> dict[str, Any]:
        """Arguments of the forward that carry the prompt, as tensors without data, on `meta`.

        Args:
            transformer: The model.
            variant: Which of the ways: with a text mask or without, say.
            batch: Samples.
            text: Text tokens.
        """

    def sound_example(self, transformer: Any, batch: int, tokens: int) -> dict[str, Any]:
        """The same of what carries a soundtrack, `tokens` long."""
        return {}

    def sound_tokens(self, transformer: Any, frames: int) -> int:
        """Tokens of the soundtrack of a video of so many latent frames at its usual speed."""
        return 0

    def resized(self, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """The arguments named by `sized`, for latents of a shape.

        Positions are those of a picture of that size, as the pipeline would make them.

        Args:
            arguments: Those that carry the prompt.
            shape: Shape of the latents.
        """
        return {}

    def forward_arguments(
        self, latents: Tensor, level: Tensor, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """All arguments of the forward.

        Args:
            latents: `[B, C, h, w]` in the model's dtype, of whatever size.
            level: t in [0, 1], `[1]`, float32.
            arguments: Those that carry the prompt.
        """
        time = self.time(level, latents.dtype).expand(len(latents))
        hidden = self.pack_latents(latents)
        if REFERENCE in arguments:
            hidden = torch.cat((hidden, arguments[REFERENCE]), dim=1)
        references = (REFERENCE, REFERENCE_SHAPES)
        return {
            **{name: one for name, one in arguments.items() if name not in references},
            **self.resized(arguments, tuple(latents.shape)),
            "hidden_states": hidden,
            "timestep": time,
            "return_dict": False,
        }

    def time(self, level: Tensor, dtype: torch.dtype) -> Tensor:
        """The forward's `timestep`: by default t in [0, 1], rounded as the pipeline rounds 1000 t.

        Args:
            level: t in [0, 1], `[1]`, float32.
            dtype: Dtype of the latents.
        """
        return level if dtype == torch.float32 else (level * 1000).to(dtype) / 1000

    def read_output(self, given: Any) -> Tensor:
        """The velocity, in the pipeline's layout, of what the forward returns."""
        velocity: Tensor = given[0]
        return velocity

    def block_call(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a block's call by name, as its package is to take them."""
        return given

    def read_sound(self, given: Any) -> Tensor | None:
        """The velocity of the soundtrack in what the forward returns; None without one."""
        return None

    def no_output(self, given: Mapping[str, Any]) -> Any:
        """Stands for what a call of the forward with these arguments gives: zeros.

        A tuple where it gives more than a velocity.
        """
        return torch.zeros_like(given["hidden_states"])

    def join(self, prompt: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        """Velocity of a guided step, from those of its passes, in the pipeline's layout."""
        return negative + scale * (prompt - negative)

    @abstractmethod
    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """Scale of classifier-free guidance of a pipeline's call; None for a single pass.

        Args:
            pipeline: The pipeline.
            call: All arguments of its call.
        """

    def scales_of(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[float, ...]:
        """That of each expert; empty for a single pass."""
        scale = self.scale_of(pipeline, call)
        return () if scale is None else (scale,)

    def ignored(
        self, pipeline: Any, given: Mapping[str, Any], call: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Arguments that the pipeline ignores too, each with what makes it count.

        Args:
            pipeline: The pipeline.
            given: What the caller gave.
            call: All arguments, defaults filled in.
        """
        return ()

    def size_of(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width that the pipeline makes of a call's."""
        return self.call_size(pipeline, call)

    def call_shape(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
        """Latent shape of a pipeline's call."""
        size = self.size_of(pipeline, call)
        return self.latent_shape(pipeline, *size, batch_of(call), call.get("num_frames"))

    def given_latents(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in which a pipeline's call takes `latents`; by default in its own layout."""
        return tuple(
            self.pack_latents(torch.empty(shape, dtype=torch.float32, device="meta")).shape
        )

    def more_tokens(self, conditioning: Mapping[str, Any]) -> int:
        """Tokens that a pass has beside the picture's, such as those of reference pictures."""
        del conditioning
        return 0

    def mu(self, scheduler: Any, tokens: int, steps: int) -> float:
        """Shift that the pipeline gives its scheduler; by default FLUX's."""
        del steps
        config = scheduler.config
        least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return float(low + (high - low) * (tokens - least) / (most - least))

    def pack_latents(self, latents: Tensor) -> Tensor:
        """See `Family.pack_latents`: by default the pipeline has them as they are."""
        return latents

    def unpack_latents(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """See `Family.unpack_latents`."""
        return latents

    # What follows from these.

    def base_patch_size(self, transformer: nn.Module) -> int:
        """See `Family.base_patch_size`."""
        return self.patch

    def first_weight(self, transformer: nn.Module) -> Tensor:
        """See `Family.first_weight`: the first parameter that is not kept in float32 for itself.

        As diffusers says of what dtype a model is.
        """
        kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
        named = transformer.named_parameters()
        return next(one for path, one in named if not kept & set(path.split(".")))

    def hidden_size(self, transformer: nn.Module) -> int:
        """See `Family.hidden_size`."""
        for kind in self.block_types(transformer):
            for spec in kind.inputs:
                tokens = spec.dims[:2] in ((BATCH, IMAGE), (BATCH, JOINT))
                if tokens and isinstance(spec.dims[-1], int):
                    return spec.dims[-1]
        raise UnsupportedModelError(f"no block of {type(transformer).__name__} takes image tokens")

    def block_types(self, transformer: nn.Module) -> tuple[BlockType, ...]:
        """See `Family.block_types`."""
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
        """See `Family.check_conditioning`: by the names of the forward's own arguments."""
        names = tuple(dict.fromkeys((*self.conditioning_names, *self.prompt_names(transformer))))
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

    def check_sizes(self, shape: tuple[int, ...], conditioning: Mapping[str, Any]) -> None:
        """See `Family.check_sizes`: of pictures, which coarse steps alone make smaller."""
        expected = self.extra_size(shape)
        for name in (prefix + name for name in self.extra for prefix in ("", NEGATIVE)):
            given = conditioning.get(name)
            if given is not None and given.ndim == len(shape) and given.shape[2:] != expected:
                raise ShapeError(
                    f"`{name}` has shape {list(given.shape)}; beside latents {list(shape)} its "
                    f"last dimensions are {list(expected)}"
                )

    def extra_size(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Rows and columns, of a video frames before them, of pictures beside latents."""
        return shape[2:]

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
        """Conditioning that a model of this class takes beside `conditioning_names`."""
        own = (*_OWN, *self.sized)
        forward = inspect.unwrap(type(transformer).forward)
        return (*(name for name in parameters_of(forward) if name not in own), *self.extra)

    def guidance(self, conditioning: Mapping[str, Any]) -> Guidance | None:
        """See `Family.guidance`."""
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

    def default_size(self, pipeline: Any) -> tuple[int, int]:
        """See `Family.default_size`."""
        size = int(pipeline.default_sample_size * pipeline.vae_scale_factor)
        return size, size

    def tokens_of(self, shape: tuple[int, ...]) -> int:
        """Size of the second dimension of latents of a shape in the pipeline's layout."""
        return self.pack_latents(torch.empty(shape, dtype=torch.float32, device="meta")).shape[1]

    def latent_shape(
        self, pipeline: Any, height: int, width: int, batch: int, num_frames: int | None = None
    ) -> tuple[int, ...]:
        """See `Family.latent_shape`. Odd sizes round down to whole tokens, as the pipeline does."""
        if num_frames is not None:
            raise ShapeError(f"got num_frames={num_frames}; {self.name} makes images: leave it out")
        unit = pipeline.vae_scale_factor * self.patch
        if height < unit or width < unit:
            raise ShapeError(
                f"got {height} x {width} pixels; this pipeline's smallest image is {unit} x {unit}"
            )
        channels = self.latent_channels(pipeline.transformer)
        return batch, channels, self.patch * (height // unit), self.patch * (width // unit)

    def set_timesteps(
        self, scheduler: Any, num_inference_steps: int, sigmas: Sequence[float] | None, grid: Grid
    ) -> None:
        """See `Family.set_timesteps`: the pipelines' way, with the family's own shift."""
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
        """See `Family.read_call`. The pipeline's own checks come with its own call."""
        call = bind_call(pipeline, arguments)
        refuse_ignored(call)
        self._check_prompts(pipeline, call)
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

    def _check_prompts(self, pipeline: Any, call: Mapping[str, Any]) -> None:
        """What a pipeline would take and fail at, or take for something else."""
        check_texts(call, prompts_of(call))
        check_output(pipeline, call)
        batch, transformer = batch_of(call), pipeline.transformer
        per_prompt = next((name for name in PER_PROMPT if name in call), "")
        one, longer = (self.example(transformer, 0, batch, text) for text in (1, 2))
        for name, argument in self.embeds.items():
            shape = _dims(one[argument], longer[argument])[1:]
            for full in (name, NEGATIVE + name):
                check_given_embeds(full, call.get(full), shape, batch, per_prompt)

    def read_model_call(
        self, transformer: nn.Module, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """See `Family.read_model_call`."""
        given = {
            name: value
            for name, value in arguments.items()
            if value is not None and value != {} and name not in (*self.sized, "return_dict")
        }
        hidden, tokens = given.pop("hidden_states"), self.tokens_of(shape)
        latents = self.unpack_latents(hidden[:, :tokens], shape)
        if hidden.shape[1] > tokens:
            given[REFERENCE] = hidden[:, tokens:]
        timestep = self.level_of(given.pop("timestep").reshape(-1)[:1])
        conditioning = {
            name: value.expand(shape[0], *value.shape[1:])
            if isinstance(value, Tensor) and name not in self.unbatched
            else value
            for name, value in given.items()
        }
        return ModelCall(latents=latents, timestep=timestep, conditioning=conditioning)

    def level_of(self, timestep: Tensor) -> Tensor:
        """T in [0, 1], float32, of the forward's `timestep`; the inverse of `time`."""
        return timestep.float()


def _dims(like: Tensor, longer: Tensor) -> list[int | str]:
    """Sizes of an example, with a name for what another text length changes."""
    return [
        size if size == other else "text tokens"
        for size, other in zip(like.shape, longer.shape, strict=True)
    ]
