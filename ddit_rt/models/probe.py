"""The blocks of a model, read off its own forward instead of declared.

The forward runs on the meta device at four sizes, with a recorder in the place of every first
block. How a dimension of a block's input changes from size to size tells what it counts: samples,
image tokens, text tokens, both, or nothing. No number is computed, and no weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.base import BATCH, IMAGE, JOINT, SOUND, TEXT, BlockType, TensorSpec
from ddit_rt.models.block_calls import Arrange, CallForm, as_called, flat_outputs, flatten_call
from ddit_rt.models.structure import parts, reference


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """Sizes of one run on the meta device.

    Attributes:
        batch: Samples.
        rows: Token rows.
        columns: Token columns.
        text: Text tokens.
        sound: Tokens of a soundtrack.
    """

    batch: int
    rows: int
    columns: int
    text: int
    sound: int = 20

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Samples, image tokens, text tokens, sound tokens."""
        return self.batch, self.rows * self.columns, self.text, self.sound


PROBES = (
    Probe(batch=2, rows=8, columns=12, text=32),
    Probe(batch=3, rows=8, columns=12, text=32),
    Probe(batch=2, rows=8, columns=16, text=32),
    Probe(batch=2, rows=8, columns=12, text=96),
)
"""The first, then each with one count changed. Tokens come in 32s, to which some models pad."""

SOUND_PROBES = (*PROBES, Probe(batch=2, rows=8, columns=12, text=32, sound=28))
"""Those of a model with a soundtrack."""

_SYMBOLS: Mapping[tuple[float, ...], str] = {
    (1, 0, 0, 0): BATCH,
    (0, 1, 0, 0): IMAGE,
    (0, 0, 1, 0): TEXT,
    (0, 1, 1, 0): JOINT,
    (0, 0, 0, 1): SOUND,
}

RunProbe = Callable[[nn.Module, Probe, int], Any]
"""Runs a model on the meta device in one of its variants, by number."""

Runs = Sequence[Callable[[], Any]]
"""Runs of one variant, at every probe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadBlockType(BlockType):
    """A block type that was read off a model's forward.

    Attributes:
        form: How the model calls these blocks.
        sources: For each output, the input of equal shape whose place in the next block it takes.
        image: The output that holds image tokens.
        places: For each place in what the model is given back, whether it is an output, or None.
    """

    form: CallForm
    sources: tuple[int, ...]
    image: int
    places: tuple[bool, ...]

    def given(self, outputs: Sequence[Tensor]) -> Any:
        """Flat outputs as the block itself gives them."""
        left = iter(outputs)
        whole = tuple(next(left) if filled else None for filled in self.places)
        return whole if len(whole) > 1 else whole[0]


@dataclass
class _Seen:
    """Calls of the first block of one group in one form, one for each probe."""

    form: CallForm
    places: tuple[bool, ...]
    inputs: list[list[Tensor]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Group:
    """Blocks of one list that have tensors of equal names and shapes.

    Attributes:
        name: The class, the path where several lists hold it, the first place where its list has
            several groups.
        path: Path of the list.
        members: Their places in the list; None for all.
    """

    name: str
    path: str
    members: tuple[int, ...] | None


_KNOWN: dict[Any, tuple[ReadBlockType, ...]] = {}
"""What was read, by all that it hangs on; reading runs the model on the meta device."""


def read_block_types(
    transformer: nn.Module,
    variants: int,
    run: RunProbe,
    repeated: Sequence[str] = (),
    probes: Sequence[Probe] = PROBES,
    arrange: Arrange = as_called,
) -> tuple[ReadBlockType, ...]:
    """The repeated blocks of a model, in the order in which its forward runs them.

    Args:
        transformer: A diffusers model; left as it is.
        variants: In how many ways its forward may be called, such as with a text mask and without.
        run: Runs it at a probe.
        repeated: Class names of the blocks, where the model has no `_repeated_blocks`.
        probes: What it is run at: `PROBES`, or `SOUND_PROBES`.
        arrange: See `Arrange`.

    Raises:
        UnsupportedModelError: A block is called in a way that no package can offer; by name.
    """
    config: Any = transformer.config
    key = (
        frozenset((type(one), type(one).forward) for one in transformer.modules()),
        type(transformer),
        repr([(name, getattr(config, name, value)) for name, value in config.items()]),
        tuple(tensor.dtype for tensor in transformer.parameters()),
        (run, variants, tuple(repeated), tuple(probes), arrange),
    )
    if key not in _KNOWN:
        twin = meta_twin(transformer)
        groups = list(_groups(twin, repeated))
        runs = [
            [partial(run, twin, probe, variant) for probe in probes] for variant in range(variants)
        ]
        _KNOWN[key] = tuple(_read(twin, groups, runs, arrange))
    return _KNOWN[key]


def _read(
    twin: nn.Module, groups: Sequence[_Group], variants: Sequence[Runs], arrange: Arrange
) -> Iterator[ReadBlockType]:
    plain: dict[_Group, CallForm] = {}
    for variant, runs in enumerate(variants):
        for group, calls in _record(twin, groups, runs, arrange).items():
            extra = calls.form.beyond(plain.setdefault(group, calls.form))
            if variant == 0 or extra:
                yield _block_type(group, "+".join(extra), calls)


def _groups(transformer: nn.Module, repeated: Sequence[str]) -> Iterator[_Group]:
    """Of blocks of one class some may have more layers, or the last fewer."""
    paths = list(block_lists(transformer, repeated))
    lists = [list(transformer.get_submodule(path).children()) for path in paths]
    classes = [type(blocks[0]).__name__ for blocks in lists]
    for path, blocks, kind in zip(paths, lists, classes, strict=True):
        alike: dict[Any, list[int]] = {}
        for place, block in enumerate(blocks):
            tensors = tuple((name, tuple(one.shape)) for name, one in block.named_parameters())
            alike.setdefault((type(block), tensors), []).append(place)
        name = f"{kind}.{path}" if classes.count(kind) > 1 else kind
        for places in alike.values():
            if len(alike) == 1:
                yield _Group(name, path, None)
            else:
                yield _Group(f"{name}.{places[0]}", path, tuple(places))


def block_lists(transformer: nn.Module, repeated: Sequence[str]) -> Iterator[str]:
    """Paths of a model's lists of repeated blocks that are not empty."""
    known = set(getattr(transformer, "_repeated_blocks", None) or repeated)
    for path, module in transformer.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            kinds = {type(block).__name__ for block in module}
            if kinds <= known:
                yield path


def meta_twin(transformer: nn.Module) -> nn.Module:
    """What the configuration describes, without memory, in the dtypes of the live model."""
    twin = reference(transformer)
    for path, module in parts(transformer):
        own = twin.get_submodule(path)
        for name, tensor in own._parameters.items():
            live = module._parameters.get(name)
            if tensor is not None and live is not None:
                own._parameters[name] = nn.Parameter(tensor.to(live.dtype), requires_grad=False)
    return twin.eval()


def _record(
    twin: nn.Module, groups: Sequence[_Group], runs: Runs, arrange: Arrange
) -> dict[_Group, _Seen]:
    """Runs all probes of a variant: calls of the first block by group, in the order of the run."""
    seen: dict[_Group, _Seen] = {}
    for group in groups:
        blocks = list(twin.get_submodule(group.path).children())
        first, *others = blocks if group.members is None else map(blocks.__getitem__, group.members)
        recorder = _Recorder(first, group, seen, arrange)
        vars(first)["forward"] = recorder
        for block in others:  # what they give has the same shapes
            vars(block)["forward"] = recorder.again
    try:
        with torch.no_grad():
            for run in runs:
                run()
    except (RuntimeError, ValueError) as error:
        raise UnsupportedModelError(
            f"the forward of {type(twin).__name__} cannot be run without data ({error}), so "
            "nothing tells what its blocks take"
        ) from error
    for group, calls in seen.items():
        if len(calls.inputs) != len(runs):
            raise UnsupportedModelError(
                f"{group.path} of {type(twin).__name__} is called {len(calls.inputs)} times in "
                f"{len(runs)} runs, or in other ways at other sizes; one package cannot serve it"
            )
    return seen


class _Recorder:
    """Stands for the forward of a first block."""

    def __init__(
        self, block: nn.Module, group: _Group, seen: dict[_Group, _Seen], arrange: Arrange
    ) -> None:
        self._block, self._group, self._seen = block, group, seen
        self._arrange = arrange
        self._given: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        form, inputs = flatten_call(self._block, args, kwargs, self._arrange)
        self._given = type(self._block).forward(self._block, *args, **kwargs)
        whole = self._given if isinstance(self._given, tuple) else (self._given,)
        places = tuple(one is not None for one in whole)
        calls = self._seen.setdefault(self._group, _Seen(form, places))
        if (calls.form, calls.places) == (form, places):
            calls.inputs.append(inputs)
            calls.outputs.append(list(flat_outputs(self._given)))
        return self._given

    def again(self, *_: Any, **__: Any) -> Any:
        """What the block gave last."""
        return self._given


def _block_type(group: _Group, variant: str, calls: _Seen) -> ReadBlockType:
    name = group.name
    specs = tuple(
        TensorSpec(
            name=one,
            dims=_dims(f"{name}.{one}", [tensors[place] for tensors in calls.inputs]),
            dtype=calls.inputs[0][place].dtype,
        )
        for place, one in enumerate(calls.form.names)
    )
    outputs = [
        _dims(f"output {place} of {name}", [tensors[place] for tensors in calls.outputs])
        for place in range(len(calls.outputs[0]))
    ]
    sources = tuple(_source(name, specs, dims) for dims in outputs)
    image = [place for place, dims in enumerate(outputs) if {IMAGE, JOINT} & set(dims)]
    return ReadBlockType(
        name=f"{name}.{variant}" if variant else name,
        path=group.path,
        members=group.members,
        variant=variant,
        inputs=specs,
        outputs=len(outputs),
        forward=_Call(calls.form),
        feed_forward=(),
        form=calls.form,
        sources=sources,
        image=image[0] if image else 0,
        places=calls.places,
    )


@dataclass(frozen=True, slots=True)
class _Call:
    """`BlockType.forward` of a form."""

    form: CallForm

    def __call__(self, block: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.form.run(block, *tensors)


def _source(name: str, specs: Sequence[TensorSpec], dims: tuple[str | int, ...]) -> int:
    for place, spec in enumerate(specs):
        if spec.dims == dims:
            return place
    raise UnsupportedModelError(
        f"{name} returns a tensor {list(dims)} that it is given none of; blocks must hand on what "
        "they take"
    )


def _dims(name: str, tensors: Sequence[Tensor]) -> tuple[str | int, ...]:
    """What each dimension counts, by its sizes at the probes."""
    if len({tensor.ndim for tensor in tensors}) > 1:
        raise UnsupportedModelError(f"{name} has another number of dimensions at other sizes")
    return tuple(
        _count(name, axis, [tensor.shape[axis] for tensor in tensors])
        for axis in range(tensors[0].ndim)
    )


def _count(name: str, axis: int, sizes: Sequence[int]) -> str | int:
    first, *others = sizes
    probes = SOUND_PROBES[: len(sizes)]
    counts = probes[0].counts
    weights = tuple(
        (size - first) / (probe.counts[place] - counts[place])
        for place, (size, probe) in enumerate(zip(others, probes[1:], strict=True))
    )
    weights = (*weights, *[0.0] * (len(counts) - len(weights)))
    rest = first - sum(weight * count for weight, count in zip(weights, counts, strict=True))
    if not any(weights):
        return first
    symbol = _SYMBOLS.get(weights)
    if symbol is None or rest:
        raise UnsupportedModelError(
            f"dimension {axis} of {name} is {list(sizes)} at {[p.counts for p in probes]} samples, "
            "image, text and sound tokens; packages know dimensions that count one of these, or "
            "image and text tokens together"
        )
    return symbol
