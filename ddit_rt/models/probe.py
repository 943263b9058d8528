"""The blocks of a model, read off its own forward instead of declared.

The forward runs on the meta device at four sizes, with a recorder in the place of every first
block. How a dimension of a block's input changes from size to size tells what it counts: samples,
image tokens, text tokens, both, or nothing. No number is computed, and no weight is read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.base import BATCH, IMAGE, JOINT, TEXT, BlockType, TensorSpec
from ddit_rt.models.block_calls import CallForm, flat_outputs, flatten_call
from ddit_rt.models.structure import parts, reference


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """Sizes of one run on the meta device.

    Attributes:
        batch: Samples.
        rows: Token rows.
        columns: Token columns.
        text: Text tokens.
    """

    batch: int
    rows: int
    columns: int
    text: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """Samples, image tokens, text tokens."""
        return self.batch, self.rows * self.columns, self.text


PROBES = (
    Probe(batch=2, rows=8, columns=12, text=32),
    Probe(batch=3, rows=8, columns=12, text=32),
    Probe(batch=2, rows=8, columns=16, text=32),
    Probe(batch=2, rows=8, columns=12, text=96),
)
"""The first, then each with one count changed. Tokens come in 32s, to which some models pad."""

_SYMBOLS: Mapping[tuple[float, ...], str] = {
    (1, 0, 0): BATCH,
    (0, 1, 0): IMAGE,
    (0, 0, 1): TEXT,
    (0, 1, 1): JOINT,
}

RunProbe = Callable[[nn.Module, Probe, int], Any]
"""Runs a model on the meta device in one of its variants, by number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadBlockType(BlockType):
    """A block type that was read off a model's forward.

    Attributes:
        form: How the model calls these blocks.
        sources: For each output, the input of equal shape whose place in the next block it takes.
        image: The output that holds image tokens.
    """

    form: CallForm
    sources: tuple[int, ...]
    image: int


@dataclass
class _Seen:
    """Calls of the first block at one path in one form, one for each probe."""

    form: CallForm
    inputs: list[list[Tensor]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)


_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Any, tuple[ReadBlockType, ...]]]
_KNOWN = weakref.WeakKeyDictionary()


def read_block_types(
    transformer: nn.Module, variants: int, run: RunProbe
) -> tuple[ReadBlockType, ...]:
    """The repeated blocks of a model, in the order in which its forward runs them.

    Args:
        transformer: A diffusers model with `_repeated_blocks`; left as it is.
        variants: In how many ways its forward may be called, such as with a text mask and without.
        run: Runs it at a probe.

    Raises:
        UnsupportedModelError: A block is called in a way that no package can offer; by name.
    """
    dtypes = tuple(tensor.dtype for tensor in transformer.parameters())
    known = _KNOWN.get(transformer)
    if known is None or known[0] != dtypes:
        found = tuple(_read(transformer, variants, run))
        known = _KNOWN[transformer] = (dtypes, found)
    return known[1]


def _read(transformer: nn.Module, variants: int, run: RunProbe) -> Iterator[ReadBlockType]:
    twin = meta_twin(transformer)
    lists = list(block_lists(twin))
    plain: dict[str, tuple[str, ...]] = {}
    classes = [type(twin.get_submodule(path)[0]).__name__ for path in lists]  # type: ignore[index]
    for variant in range(variants):
        seen = _record(twin, lists, partial(run, twin), variant)
        for path, calls in seen.items():
            kind = type(twin.get_submodule(path)[0]).__name__  # type: ignore[index]
            name = f"{kind}.{path}" if classes.count(kind) > 1 else kind
            first = plain.setdefault(path, calls.form.names)
            extra = [one for one in calls.form.names if one not in first]
            if variant == 0 or extra:
                yield _block_type(name, path, "+".join(extra), calls)


def block_lists(transformer: nn.Module) -> Iterator[str]:
    """Paths of a model's lists of repeated blocks that are not empty."""
    repeated = set(getattr(transformer, "_repeated_blocks", None) or ())
    for path, module in transformer.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            kinds = {type(block).__name__ for block in module}
            if kinds <= repeated:
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
    twin: nn.Module, lists: Sequence[str], run: Callable[[Probe, int], Any], variant: int
) -> dict[str, _Seen]:
    """Runs all probes of a variant: calls of the first block by path, in the order of the run."""
    seen: dict[str, _Seen] = {}
    for path in lists:
        first, *others = twin.get_submodule(path).children()
        recorder = _Recorder(first, path, seen)
        vars(first)["forward"] = recorder
        for block in others:  # what they give has the same shapes
            vars(block)["forward"] = recorder.again
    try:
        with torch.no_grad():
            for probe in PROBES:
                run(probe, variant)
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"the forward of {type(twin).__name__} cannot be run without data ({error}), so "
            "nothing tells what its blocks take"
        ) from error
    for path, calls in seen.items():
        if len(calls.inputs) != len(PROBES):
            raise UnsupportedModelError(
                f"{path} of {type(twin).__name__} is called {len(calls.inputs)} times in "
                f"{len(PROBES)} runs, or in other ways at other sizes; one package cannot serve it"
            )
    return seen


class _Recorder:
    """Stands for the forward of a first block."""

    def __init__(self, block: nn.Module, path: str, seen: dict[str, _Seen]) -> None:
        self._block, self._path, self._seen = block, path, seen
        self._given: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        form, inputs = flatten_call(self._block, args, kwargs)
        self._given = type(self._block).forward(self._block, *args, **kwargs)
        calls = self._seen.setdefault(self._path, _Seen(form))
        if calls.form == form:
            calls.inputs.append(inputs)
            calls.outputs.append(list(flat_outputs(self._given)))
        return self._given

    def again(self, *_: Any, **__: Any) -> Any:
        """What the block gave last."""
        return self._given


def _block_type(name: str, path: str, variant: str, calls: _Seen) -> ReadBlockType:
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
        path=path,
        variant=variant,
        inputs=specs,
        outputs=len(outputs),
        forward=_Call(calls.form),
        feed_forward=(),
        form=calls.form,
        sources=sources,
        image=image[0] if image else 0,
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
    counts = PROBES[0].counts
    weights = tuple(
        (size - first) / (probe.counts[place] - counts[place])
        for place, (size, probe) in enumerate(zip(others, PROBES[1:], strict=True))
    )
    rest = first - sum(weight * count for weight, count in zip(weights, counts, strict=True))
    if not any(weights):
        return first
    symbol = _SYMBOLS.get(weights)
    if symbol is None or rest:
        raise UnsupportedModelError(
            f"dimension {axis} of {name} is {list(sizes)} at {[p.counts for p in PROBES]} samples, "
            "image and text tokens; packages know dimensions that count one of these, or image and "
            "text tokens together"
        )
    return symbol
