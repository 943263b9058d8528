"""A run that the pipeline's own `__call__` drives, with compiled buckets as its transformer.

Scheduler, guidance, callbacks, dtypes and interrupts are then diffusers' own code, with the user's
own pipeline. For the time of the call alone, two attributes of every transformer instance are
others: `forward` runs a bucket, and `cache_context` notes which pass a call is.

How a call finds its place, from what the pipeline itself says:

- The step: the pipeline calls its step callback once at the end of each, with its index. Ours
  stands before the user's.
- The pass: `cache_context` names it, "cond" or "uncond". A call outside one is no call of the
  pipeline's loop, but a callback's own, and runs the model as it is. Where the pipeline has no
  contexts, its calls within a step are counted, and a callback's are those while it runs.
- Time, prompt and latents: the call carries them. Text and time are embedded again at every call,
  as diffusers' own forward does, so that tensors edited in place are seen; beside a step's blocks
  this costs nothing. The noise level is the scheduler's.

The first call of a step decides its patch size, for every pass. Passes stay apart until the
pipeline joins them, so each keeps detail and residuals of its own. All that a coarse step does to a
clean estimate is linear, so this is the same, but for rounding, as one detail that is joined first,
as long as guidance stays as it is. A pass that a step leaves out takes over what the first one
keeps, as if they had been joined; a coarse step after the end of guidance builds on the prompt's
own estimate.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ddit_rt.engine.callbacks import StepEnd
from ddit_rt.engine.history import SeenLatents
from ddit_rt.engine.table_driven import DrivenRun
from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.loop import StepSession
from ddit_rt.models.calls import ModelCall, PipelineCall
from ddit_rt.planning.compiled import CompiledModel
from ddit_rt.planning.outline import Outline
from ddit_rt.planning.plan import plan_passes
from ddit_rt.solver import falling
from ddit_rt.steps import StepInputs
from ddit_rt.torch_state import callers_modes, shielded


class PipelineRun:
    """One run.

    Attributes:
        rehearsed: Conditioning of every pass, where it was seen in a rehearsal.
    """

    def __init__(
        self,
        pipeline: Any,
        compiled: CompiledModel,
        outline: Outline,
        call: PipelineCall,
        run: DrivenRun,
        seen: SeenLatents,
    ) -> None:
        """Prepares it; nothing of the pipeline is touched.

        Args:
            pipeline: The user's.
            compiled: Its compiled model.
            outline: The run; its solver is `own_steps`.
            call: The checked call.
            run: Where the engine keeps it.
            seen: What enters the history.
        """
        self._pipeline = pipeline
        self._compiled = compiled
        self._outline = outline
        self._call = call
        self._run = run
        self._seen = seen
        self._family = compiled.steps.family
        self._signature = inspect.signature(type(compiled.steps.transformer).forward)
        self._context: str | None = None
        self._names_passes = False
        self._passes: list[str] = []
        self._inputs: dict[int, StepInputs] = {}
        self._timesteps: list[Tensor] = []
        self._shapes: list[dict[str, Sequence[int]]] = []
        self._reachable: list[int] = []
        self._session: StepSession | None = None
        self._step = _Step(0)
        self._computed: set[int] = set()
        self._step_end: StepEnd | None = None
        self._text_tokens: list[int] = []
        self.rehearsed: Sequence[Mapping[str, Any]] = ()

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """Runs the pipeline's own call.

        Args:
            arguments: Its keyword arguments, `callback_on_step_end` as the user gave it.

        Returns:
            What it returns.
        """
        step_end = self._step_end = StepEnd(arguments, self._after_step, self._seen.returned)
        with callers_modes(), self._in_place():
            result = self._pipeline(**{**arguments, **step_end.arguments()})
        if self._seen.rounded and self._outline.scored:
            self._run.notes.append(
                "the pipeline keeps its latents in half precision, whose rounding the policy's "
                "scores contain; it may choose finer sizes than it would otherwise"
            )
        return result

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Stands in for the transformers; and sees texts, and noise before it is rounded."""
        with ExitStack() as stack:
            for expert, model in enumerate(self._compiled.models):
                transformer: Any = model.transformer
                stand_in = partial(self._forward, expert, transformer.forward)
                parts = {"forward": stand_in, "cache_context": self._cache_context}
                # What `nn.Module.compile` leaves would be called instead of `forward`.
                parts |= {"_compiled_call_impl": None}
                stack.enter_context(replaced(transformer, **parts))
            seen = {
                "prepare_latents": partial(self._prepare_latents, self._pipeline.prepare_latents),
                "encode_prompt": partial(self._encode_prompt, self._pipeline.encode_prompt),
            }
            stack.enter_context(replaced(self._pipeline, **seen))
            yield

    @contextmanager
    def _cache_context(self, name: str, **_: Any) -> Iterator[None]:
        before, self._context, self._names_passes = self._context, name, True
        try:
            yield
        finally:
            self._context = before

    def _prepare_latents(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prepared = own(*args, **kwargs)
        self._seen.returned(prepared[0] if isinstance(prepared, tuple) else prepared)
        return prepared

    def _encode_prompt(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Notes the lengths of the texts: that of the prompt, then that of the negative prompt."""
        encoded = own(*args, **kwargs)
        for one in encoded if isinstance(encoded, tuple) else (encoded,):
            if isinstance(one, Tensor) and one.ndim == 3:
                self._text_tokens.append(one.shape[1])
        return encoded

    def _forward(self, expert: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands in the place of a transformer's `forward`."""
        if self._is_callbacks_own():
            return own(*args, **kwargs)
        model = self._compiled.models[expert]
        given = self._signature.bind(model.transformer, *args, **kwargs).arguments
        given.pop("self")
        as_tuple = given.pop("return_dict", True) is False
        places: list[int] = []
        velocities: list[Tensor] = []
        for one in self._family.passes_in(given, self._outline.shape[0]):
            place = self._place(len(places))
            places.append(place)
            call = self._family.read_model_call(model.transformer, self._outline.shape, one)
            velocities.append(self._velocity(expert, place, call))
        outputs = self._family.outputs(velocities, list(map(self._step.sounds.get, places)))
        if as_tuple:
            return outputs
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(*outputs)

    def _is_callbacks_own(self) -> bool:
        """Whether a call of the transformer is none of the pipeline's loop."""
        assert self._step_end is not None, "a run is in progress"
        return self._step_end.running or (self._names_passes and self._context is None)

    @shielded()
    def _velocity(self, expert: int, place: int, call: ModelCall) -> Tensor:
        """The velocity of a call, in the pipeline's layout and dtype."""
        self._run.check_cancelled()
        step, scheduler = self._step, falling(self._pipeline.scheduler)
        inputs = self._inputs[place] = StepInputs(
            sigma=scheduler.sigmas[(getattr(scheduler, "begin_index", None) or 0) + step.index],
            timestep=call.timestep,
            conditioning=call.conditioning,
        )
        if place > 0 and not self._outline.guided[step.index]:
            # So that the pipeline's guidance joins two equal velocities, whatever its scale.
            step.sounds[place] = step.sounds.get(0)
            return step.velocities[0]
        session = self._session or self._open(call)
        if step.branch is None:
            step.branch = self._decide(session, call)
        latents = call.latents.float().contiguous()
        stage = expert * self._call.passes + place
        velocity = self._run_branch(session, stage, inputs, latents)
        model = self._compiled.models[expert]
        packed = self._family.pack_latents(velocity.to(model.dtype))
        step.stages[place], step.velocities[place] = stage, packed
        return packed

    def _place(self, index: int) -> int:
        """Of the pass in a step: 0 is the first that the run asked for, that with the prompt.

        Args:
            index: Of the pass in its call of the transformer.
        """
        context = self._context or f"call {self._step.calls}"
        if index and self._context:
            context += f", pass {index + 1}"
        self._step.calls += 1
        if context not in self._passes:
            self._passes.append(context)
            if len(self._passes) > self._call.passes:
                raise UnsupportedModelError(
                    f"the pipeline ran its transformer for {self._passes} in one run; this call "
                    f"was planned for {self._call.passes} of them: ask for guidance in the call"
                )
        return self._passes.index(context)

    def _open(self, call: ModelCall) -> StepSession:
        """Plans every pass from the first call; the length of a second's text is known by then."""
        conditionings = [call.conditioning, *self.rehearsed[1:]]
        if len(conditionings) < self._call.passes:
            name = self._family.text
            text = call.conditioning[name]
            empty = text.new_zeros(len(text), self._negative_tokens(), text.shape[2])
            conditionings.append({**call.conditioning, name: empty})
        plan = plan_passes(self._compiled, self._outline, conditionings)
        self._shapes = list(map(_shapes, conditionings))
        self._reachable = sorted(plan.policy.reachable())
        self._session = self._run.open(plan, self._seen.entry(call.latents))
        return self._session

    def _negative_tokens(self) -> int:
        """Text tokens of the negative prompt."""
        if len(self._text_tokens) != self._call.passes:
            raise UnsupportedModelError(
                f"the encode_prompt of this {type(self._pipeline).__name__} gave "
                f"{len(self._text_tokens)} text embeddings [B, T, D] for {self._call.passes} "
                "passes, so that nothing tells how long the negative prompt is; let it give the "
                "prompt's and the negative prompt's, or leave guidance out"
            )
        return self._text_tokens[1]

    def _decide(self, session: StepSession, call: ModelCall) -> int:
        step, signal = self._step.index, session.signal()
        self._timesteps.append(call.timestep)
        if signal is not None:
            # Of the step before too, where that is computed again: a pass whose call comes later
            # was not known then.
            first = step if signal.keeps else max(step - 1, 0)
            for row in range(first, step + 1):
                signal.refresh(row, self._latest_inputs(self._timesteps[row], signal.passes))
        branch = session.decide(step, self._seen.entry(call.latents))
        if branch < len(self._outline.offered):
            self._computed.clear()
        return branch

    def _latest_inputs(self, timestep: Tensor, passes: int) -> list[StepInputs | None]:
        """The inputs of every pass at a step's time; None for one not called yet."""
        latest = map(self._inputs.get, range(passes))
        return [inputs and replace(inputs, timestep=timestep) for inputs in latest]

    def _run_branch(
        self, session: StepSession, stage: int, inputs: StepInputs, latents: Tensor
    ) -> Tensor:
        branch, sizes = self._step.branch, len(self._outline.offered)
        assert branch is not None, "the step is decided"
        if branch >= sizes and stage not in self._computed:
            branch -= sizes
            self._run.notes.append(
                f"step {self._step.index}: a pass that was left out before had nothing to reuse, "
                "and computed"
            )
        self._computed.add(stage)
        self._check_shapes(stage, inputs)
        bucket = session.bucket(stage, branch % sizes)
        bucket.refresh(self._step.index, inputs)
        velocity = session.velocity(stage, branch, latents)
        sound = bucket.sound()
        # A copy: the bucket's next velocity overwrites it.
        self._step.sounds[stage % self._call.passes] = None if sound is None else sound.clone()
        return velocity

    def _check_shapes(self, stage: int, inputs: StepInputs) -> None:
        expected = self._shapes[stage % self._call.passes]
        given = _shapes(inputs.conditioning)
        for name in sorted(given.keys() | expected.keys()):
            if given.get(name) != expected.get(name):
                was, now = (_shown(shapes.get(name)) for shapes in (expected, given))
                raise ShapeError(
                    f"step {self._step.index} has {now} as `{name}` in a pass of {was}; give "
                    "prompt and negative prompt alike, and let a callback keep their length"
                )

    @shielded()
    def _after_step(self, index: int, latents: Tensor) -> None:
        """Runs at the end of every step of the pipeline's loop, before the user's callback."""
        step = self._step
        if step.branch is None or index != step.index or self._session is None:
            raise UnsupportedModelError(
                f"{type(self._pipeline).__name__} ended step {index} without a call of its "
                "transformer that is known as one of its loop (by a cache_context, where it has "
                "them), so that it cannot drive a compiled model; use another version of diffusers"
            )
        self._run.end_step(step.branch, lambda: self._seen.unpacked(latents).clone())
        self._seen.stepped(latents, [step.velocities[place] for place in sorted(step.velocities)])
        self._fill_in(self._session, step)
        self._step = _Step(index + 1)

    def _fill_in(self, session: StepSession, step: _Step) -> None:
        """Gives passes that the step left out what the first one keeps."""
        first = min(step.stages)
        for place in range(self._call.passes):
            if place in step.stages:
                continue
            stage = step.stages[first] - first + place
            for index in self._reachable:
                source = session.bucket(step.stages[first], index).state()
                for held, fresh in zip(session.bucket(stage, index).state(), source, strict=True):
                    held.copy_(fresh)


class _Step:
    """What a step of the pipeline's loop has done.

    Attributes:
        index: k.
        branch: What was decided; None before its first call.
        stages: Stage of the plan that each pass ran.
        velocities: What each pass gave, in the pipeline's layout.
        sounds: What came with it for a soundtrack.
        calls: Calls of the transformer so far.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.calls = 0
        self.branch: int | None = None
        self.stages: dict[int, int] = {}
        self.velocities: dict[int, Tensor] = {}
        self.sounds: dict[int, Tensor | None] = {}


def _shapes(conditioning: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """Of tensors; other sequences as they are, which are sizes too."""
    return {
        name: one.shape if isinstance(one, Tensor) else one
        for name, one in conditioning.items()
        if isinstance(one, (Tensor, tuple))
    }


def _shown(shape: Sequence[int] | None) -> str:
    return "nothing" if shape is None else str(list(shape))


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Sets attributes of an instance; puts back afterwards what it had of its own."""
    own = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            vars(owner).pop(name, None)
        vars(owner).update(own)
