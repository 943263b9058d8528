"""A model's own forward over compiled blocks, with what does not change from step to step held.

The bound model is a shallow copy of the user's: its own tables of children, and in them copies of
the blocks and of a few children whose `forward` is another. Parameters and buffers are the user's,
so LoRAs fused in place and moves act at once; the user's model is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.base import Runner
from ddit_rt.models.block_calls import Arrange, CallForm, as_called, flatten_call
from ddit_rt.models.family import Family
from ddit_rt.models.probe import ReadBlockType
from ddit_rt.steps.first_block import FirstBlock
from ddit_rt.steps.residual import Residual


class BoundModel:
    """One transformer, for one pass at one patch size.

    Attributes:
        module: The shallow copy. Its forward runs a step.
        step: The step in progress, `[1]`, read on the device by what hangs on the time.
        residual: What the blocks added to the image tokens when they last ran; None where steps do
            not reuse.
        reuse: Whether that stands for the blocks.
        stops: Whether the forward ends at the first block.
        first_block: That block, where it runs ahead of the others; the residual is then theirs.
        begins: Whether the forward runs that block alone.
        arrange: See `Arrange`.
    """

    def __init__(
        self,
        transformer: nn.Module,
        types: Sequence[ReadBlockType],
        runners: Mapping[str, Sequence[Runner]],
        *,
        held: Sequence[str],
        timed: Sequence[str],
        residual: Residual | None = None,
        first_block: FirstBlock | None = None,
        image_first: bool = False,
        arrange: Arrange = as_called,
    ) -> None:
        """Copies the model.

        Args:
            transformer: The user's.
            types: Its blocks.
            runners: Those blocks, ready to run.
            held: Paths of children whose outputs are the same at every step of a run; those that
                this model does not have count for nothing.
            timed: Paths of children whose outputs hang on the time alone, likewise.
            residual: See above; empty yet.
            first_block: See above; empty yet.
            image_first: Whether image tokens come before text tokens where blocks take both as one.
            arrange: See `Arrange`.
        """
        self.arrange = arrange
        self.module = _shallow(transformer)
        self.step: Tensor | None = None
        self.residual = residual
        self.first_block = first_block
        self._image_first = image_first
        self.reuse = False
        self.stops = False
        self.begins = False
        self._entered: Tensor | None = None
        self._held = [_Held(self, path, timed=False) for path in _known(transformer, held)]
        self._timed = [_Held(self, path, timed=True) for path in _known(transformer, timed)]
        self._blocks(types, runners)

    def _blocks(
        self, types: Sequence[ReadBlockType], runners: Mapping[str, Sequence[Runner]]
    ) -> None:
        paths = list(dict.fromkeys(one.path for one in types))
        blocks: list[_Block] = []
        for path in paths:
            kinds = [one for one in types if one.path == path and one.key in runners]
            left = {one.key: iter(runners[one.key]) for one in kinds}
            copies = vars(_own_child(self.module, path))["_modules"]
            like = next(iter(copies.values()))
            for index, (name, block) in enumerate(list(copies.items())):
                own = {
                    one.form: (one, next(left[one.key]))
                    for one in kinds
                    if one.members is None or index in one.members
                }
                copies[name] = copy = _shallow(block)
                vars(copy)["forward"] = stand_in = _Block(self, like, own)
                blocks.append(stand_in)
        blocks[0].first, blocks[-1].last = True, True

    def hold(self, run: Callable[[Tensor], Any], levels: Tensor, steps: int) -> None:
        """Computes what stays, and what hangs on the time for every step.

        Args:
            run: Calls `module` at a noise level `[1]`.
            levels: Noise level of every step, `[M]`.
            steps: Rows of them that are read.
        """
        for row in range(steps):
            recording = (*self._held, *self._timed) if row == 0 else self._timed
            if not recording:
                return
            self._record(recording, run, levels[row : row + 1])
            for one in recording:
                one.keep(row, len(levels))

    def hold_again(self, run: Callable[[Tensor], Any], level: Tensor, step: int) -> None:
        """The same anew for one step, in place."""
        recording = (*self._held, *self._timed)
        self._record(recording, run, level)
        for one in recording:
            one.write(step)

    def _record(
        self, recording: Sequence[_Held], run: Callable[[Tensor], Any], level: Tensor
    ) -> None:
        """Runs what comes before the first block, with some children recording."""
        for one in (*self._held, *self._timed):
            one.rewind(recording=one in recording)
        self.stops = True
        try:
            run(level)
        except _Reached:
            pass
        finally:
            self.stops = False

    def tensors(self) -> tuple[Tensor, ...]:
        """What it holds, in an order that does not change."""
        return self.held_tensors() + self.timed_tensors()

    def held_tensors(self) -> tuple[Tensor, ...]:
        """What is the same at every step."""
        return tuple(tensor for one in self._held for tensor in one.tensors())

    def timed_tensors(self) -> tuple[Tensor, ...]:
        """What hangs on the time, with a row for every step."""
        return tuple(tensor for one in self._timed for tensor in one.tensors())

    def __call__(self, arguments: Mapping[str, Any], step: Tensor, *, reuse: bool) -> Any:
        """Runs a step.

        Args:
            arguments: Arguments of the forward.
            step: k, `[1]`.
            reuse: Whether the latest residual stands for the blocks.
        """
        self.step, self.reuse = step, reuse
        for one in (*self._held, *self._timed):
            one.rewind(recording=False)
        return self.run(arguments)

    def begin(self, arguments: Mapping[str, Any], step: Tensor) -> None:
        """Runs what a step begins with, up to the first block and that, into `first_block`."""
        self.begins = True
        try:
            self(arguments, step, reuse=False)
        except _Reached:
            pass
        finally:
            self.begins = False

    def run(self, arguments: Mapping[str, Any]) -> Any:
        """The forward of the copy."""
        forward: Callable[..., Any] = type(self.module).forward
        return forward(self.module, **arguments)

    def enter(self, hidden: Tensor) -> None:
        """Notes the image tokens that the first block is given."""
        if self.residual is not None:
            self._entered = hidden

    def leave(self, hidden: Tensor) -> None:
        """Keeps what the blocks have added to the image tokens."""
        entered, self._entered = self._entered, None
        if entered is None or self.reuse:
            return
        assert self.residual is not None, "what entered is noted for it"
        assert self.step is not None, "a step is in progress"
        self.residual.keep(entered, self._image_tokens(hidden, entered), self.step)

    def with_residual(self, hidden: Tensor) -> Tensor:
        """What the last block is given; its image tokens with all that was added since the first.

        That is more than the blocks' own where the forward adds something between them.
        """
        entered, residual = self._entered, self.residual
        assert entered is not None, "the first block comes before the last"
        assert residual is not None, "what entered is noted for it"
        assert self.step is not None, "a step is in progress"
        hidden = hidden.clone()
        self._image_tokens(hidden, entered).copy_(residual.added_to(entered, self.step))
        return hidden

    def _image_tokens(self, hidden: Tensor, like: Tensor) -> Tensor:
        """Of tokens that may hold text too, as many as `like` has."""
        image, tokens = like.shape[1], hidden.shape[1]
        return hidden.narrow(1, 0 if self._image_first else tokens - image, image)


class _Reached(Exception):
    """The first block: all that was to run has run."""


class _Block:
    """Stands for the forward of a block."""

    first = False
    last = False

    def __init__(
        self,
        owner: BoundModel,
        like: nn.Module,
        forms: Mapping[CallForm, tuple[ReadBlockType, Runner]],
    ) -> None:
        """`like` is a block of the same class."""
        self._owner, self._like, self._forms = owner, like, forms

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._owner.stops:
            raise _Reached
        form, inputs = flatten_call(self._like, args, kwargs, self._owner.arrange)
        if form not in self._forms:
            raise UnsupportedModelError(_unknown(self._like, form, list(self._forms)))
        kind, runner = self._forms[form]
        image = inputs[kind.sources[kind.image]]
        first_block = self._owner.first_block if self.first else None
        if first_block is not None and self._owner.begins:
            first_block.take(image, runner(*(tensor.contiguous() for tensor in inputs)), kind.image)
            raise _Reached
        begun = None if first_block is None else first_block.given(len(image))
        if self.first:
            self._owner.enter(image if begun is None else begun[kind.image])
        if begun is not None:
            outputs = begun
        elif self._owner.reuse:
            outputs = self._pass_on(kind, inputs)
        else:
            outputs = runner(*(tensor.contiguous() for tensor in inputs))
        if self.last:
            self._owner.leave(outputs[kind.image])
        return kind.given(outputs)

    def _pass_on(self, kind: ReadBlockType, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What came in, and in the last block what all have added when they last ran."""
        outputs = [inputs[source] for source in kind.sources]
        if self.last:
            outputs[kind.image] = self._owner.with_residual(outputs[kind.image])
        return tuple(outputs)


def _unknown(block: nn.Module, form: CallForm, known: Sequence[CallForm]) -> str:
    return (
        f"{type(block).__name__} is called with {list(form.names)}; it was compiled for "
        f"{' or '.join(str(list(one.names)) for one in known)}, and leaving something out would "
        "be to guess: leave out what asks for it, or call the diffusers pipeline itself"
    )


class _Held:
    """Stands for the forward of a child: records what it gives, then gives that.

    A child may be called several times in one forward.
    """

    def __init__(self, owner: BoundModel, path: str, *, timed: bool) -> None:
        self._owner, self._timed = owner, timed
        # The child itself: a copy of it would be another key to caches that its class keeps.
        self._child = owner.module.get_submodule(path)
        self._own = type(self._child).forward
        vars(_own_child(owner.module, path))["forward"] = self
        self._recording = False
        self._calls: list[tuple[list[Any], Any]] = []
        self._buffers: list[tuple[list[Any], Any]] = []
        self._next = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._recording:
            given = self._own(self._child, *args, **kwargs)
            self._calls.append(pytree.tree_flatten(given))
            return given
        leaves, spec = self._buffers[self._next]
        self._next += 1
        if self._timed:
            step = self._owner.step
            assert step is not None, "a step is in progress"
            leaves = [leaf.index_select(0, step).squeeze(0) for leaf in leaves]
        return pytree.tree_unflatten(leaves, spec)

    def rewind(self, *, recording: bool) -> None:
        """A forward begins, in which the child itself runs, or its buffers stand for it."""
        self._next, self._recording, self._calls = 0, recording, []

    def keep(self, row: int, rows: int) -> None:
        """Keeps what was recorded: as a row of many where it hangs on the time."""
        if not self._buffers:
            self._buffers = [
                ([self._buffer(leaf, rows) for leaf in leaves], spec)
                for leaves, spec in self._calls
            ]
        self.write(row)

    def _buffer(self, leaf: Any, rows: int) -> Tensor:
        if not isinstance(leaf, Tensor):
            raise UnsupportedModelError(
                f"{type(self._child).__name__} gives a {type(leaf).__name__}; what is held for a "
                "run must be tensors"
            )
        shape = (rows, *leaf.shape) if self._timed else leaf.shape
        return torch.empty(shape, dtype=leaf.dtype, device=leaf.device)

    def write(self, row: int) -> None:
        """Writes what was recorded in place; what stays has no rows."""
        for (targets, _), (leaves, _) in zip(self._buffers, self._calls, strict=True):
            for target, leaf in zip(targets, leaves, strict=True):
                (target[row] if self._timed else target).copy_(leaf)

    def tensors(self) -> Iterator[Tensor]:
        """Its buffers."""
        for leaves, _ in self._buffers:
            yield from leaves


def _shallow(module: nn.Module) -> Any:
    """A module of the same class, over the same tensors, with a table of children of its own."""
    copy = object.__new__(type(module))
    vars(copy).update(vars(module))
    vars(copy)["_modules"] = dict(vars(module)["_modules"])
    vars(copy).pop("forward", None)
    vars(copy)["_compiled_call_impl"] = None
    return copy


def _known(module: nn.Module, paths: Sequence[str]) -> list[str]:
    """Those paths of children that a model has: some variants of a class lack some."""

    def has(path: str) -> bool:
        own: nn.Module | None = module
        for name in path.split("."):
            own = None if own is None else vars(own)["_modules"].get(name)
        return own is not None

    return [path for path in paths if has(path)]


def _own_child(module: nn.Module, path: str) -> Any:
    """A child that may be changed: copied, and all modules on the way to it."""
    for name in path.split("."):
        children = vars(module)["_modules"]
        module = children[name] = _shallow(children[name])
    return module


def without_data(
    family: Family, twin: nn.Module, shape: tuple[int, ...], text: int, steps: int = 1
) -> tuple[BoundModel, dict[str, Any]]:
    """A bound model on the meta device, whose blocks pass on what they are given: for counts.

    Args:
        family: The model's.
        twin: A model on the meta device.
        shape: Shape of the latents, batch included.
        text: Text tokens.
        steps: Rows of what hangs on the time.

    Returns:
        The bound model, and the arguments of its forward.
    """
    types = family.read_blocks(twin)
    runners = {kind.key: [_PassOn(kind)] * len(kind.blocks(twin)) for kind in types}
    bound = BoundModel(
        twin,
        types,
        runners,
        held=family.held,
        timed=family.timed,
        arrange=family.block_call,
    )
    latents = torch.empty(shape, dtype=family.first_weight(twin).dtype, device="meta")
    levels = torch.empty(steps, dtype=torch.float32, device="meta")
    example = family.example(twin, 0, shape[0], text)
    if family.soundtrack:
        example |= family.sound_example(twin, shape[0], family.sound_tokens(twin, shape[2]))
    arguments = family.forward_arguments(latents, levels[:1], example)
    bound.hold(lambda _: bound.run(arguments), levels, 1)
    return bound, arguments


class _PassOn:
    """A block that adds nothing."""

    def __init__(self, kind: ReadBlockType) -> None:
        self._sources = kind.sources

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors[source] for source in self._sources)

    def stale(self) -> bool:
        """Never: it reads no weights."""
        return False

    def rebind(self) -> None:
        """Does nothing."""
