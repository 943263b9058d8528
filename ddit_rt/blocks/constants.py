"""The tensors that a package computes with: found in the user's module, never copied.

Where a package makes one product of several layers, their weights must lie one behind the other.
They are put there once, those of the user's module itself: its parameters and the package's wide
weight are the same memory, so what is written into one is in the other, and no second copy stays.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.dlpack import from_dlpack

from ddit_rt.blocks.template import is_lora_name
from ddit_rt.errors import ArtifactMismatchError
from ddit_rt.models.quantised import is_quantised, plain_tensors
from ddit_rt.models.structure import parts

FUSED = "fused"
"""Where a template keeps the rows of several layers: `to_q.fused.weight`."""

FusedLayers = tuple[tuple[str, ...], ...]
"""Groups of layers by their paths in the block, in the order of their rows, all equally wide."""


@dataclass(frozen=True, slots=True)
class ConstantSpec:
    """Shape and data type that a compiled block expects of one constant."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a module keeps a tensor: it is read anew each time, so a replaced one is seen.

    Attributes:
        registry: Parameters or buffers of a module.
        key: Name of one.
        part: Name of a tensor inside it, where its weight is quantised.
    """

    registry: Mapping[str, Tensor | None]
    key: str
    part: str = ""

    def read(self) -> Tensor | None:
        """The tensor that the module holds now."""
        whole = self.registry.get(self.key)
        return getattr(whole, self.part, None) if self.part else whole


def live_slots(block: nn.Module) -> dict[str, Slot]:
    """Parameters and buffers of a block by canonical name, without those of PEFT's layers."""
    found = {}
    for path, module in parts(block):
        for registry in (module._parameters, module._buffers):  # noqa: SLF001
            for key, tensor in registry.items():
                name = f"{path}.{key}" if path else key
                if tensor is None:
                    continue
                if is_quantised(tensor):
                    for part in plain_tensors(tensor):
                        found[f"{name}.{part}"] = Slot(registry, key, part)
                else:
                    found[name] = Slot(registry, key)
    return found


class Binding:
    """The constants of one runner, resolved against a block of the user's transformer.

    Holds the tensors it handed out, so their storage lives exactly as long as the binding does,
    also after the module moved on to new storage; `stale` tells when that happened.
    """

    def __init__(
        self,
        owner: str,
        names: Mapping[str, ConstantSpec],
        block: nn.Module,
        lora: Mapping[str, Tensor] | None,
        fused: FusedLayers = (),
    ) -> None:
        """Resolves every constant.

        Args:
            owner: Name of the block type, for messages.
            names: The constants that the package asks for, by canonical name.
            block: The user's block.
            lora: Factors of the adapter, by canonical name.
            fused: Layers whose weights are one constant each.

        Raises:
            ArtifactMismatchError: A tensor is missing, superfluous or not as compiled; the block
                is as it was.
        """
        self._slots = live_slots(block)
        found = self._found(owner, names, dict(lora or {}), _parts(fused))
        self.tensors: dict[str, Tensor] = {}
        self._watched: list[tuple[Slot, int]] = []
        self._wholes: list[Tensor] = []
        for name, members in found.items():
            whole, *others = members.values()
            if others:
                whole = joined([whole, *others])
                self._wholes.append(whole)
            self.tensors[name] = whole.detach()
            address = whole.data_ptr()
            for member, tensor in members.items():
                if member in self._slots:
                    self._watched.append((self._slots[member], address))
                address += tensor.nbytes
        weakref.finalize(self, _let_go, list(self.tensors.values())).atexit = False

    def _found(
        self,
        owner: str,
        names: Mapping[str, ConstantSpec],
        lora: dict[str, Tensor],
        parts: Mapping[str, tuple[str, ...]],
    ) -> dict[str, dict[str, Tensor]]:
        """The live tensors, checked, that each constant is made of, by their own names."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, spec in names.items():
            members = parts.get(name, (name,))
            own = _part_of(spec, len(members))
            found[name] = {}
            for member in members:
                tensor = lora.pop(name, None) if is_lora_name(name) else self._live(member)
                if tensor is None:
                    raise ArtifactMismatchError(_missing(owner, member))
                _check_constant(f"{owner}.{member}", tensor, own)
                found[name][member] = tensor
        if lora:
            raise ArtifactMismatchError(
                f"{owner}: the package has no place for {', '.join(sorted(lora))}: "
                "load the variant that was compiled with LoRA, or leave the adapter out"
            )
        return found

    def stale(self) -> bool:
        """Whether the module has put one of the bound tensors into other storage."""
        for slot, pointer in self._watched:
            tensor = slot.read()
            if tensor is None or tensor.data_ptr() != pointer:
                return True
        return False

    def _live(self, name: str) -> Tensor | None:
        slot = self._slots.get(name)
        return None if slot is None else slot.read()


_JOINED: weakref.WeakValueDictionary[tuple[torch.device, int], Tensor] = (
    weakref.WeakValueDictionary()
)
"""What bindings have joined and still hold, by where it lies."""


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor over the rows of several, which are put one behind the other unless they are.

    Every one of them still looks as if it had storage of its own: code that saves models leaves
    out, or refuses, tensors that visibly share one.

    Args:
        tensors: A module's parameters, contiguous, of one data type, equal but for their rows.
            Where they lie apart they are moved, by their `data`.
    """
    place = tensors[0].device, tensors[0].data_ptr()
    known = _JOINED.get(place)
    if known is not None and _is_made_of(known, tensors):
        return known
    with torch.inference_mode(tensors[0].is_inference()):
        whole = torch.cat([tensor.detach() for tensor in tensors])
        parts = torch.split(whole.detach(), [len(tensor) for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.data = from_dlpack(part)
    if whole.is_cuda:
        torch.cuda.empty_cache()  # where they lay before is too small for the next ones
    _JOINED[whole.device, whole.data_ptr()] = whole
    return whole


def _is_made_of(whole: Tensor, tensors: Sequence[Tensor]) -> bool:
    address = whole.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != address:
            return False
        address += tensor.nbytes
    return address == whole.data_ptr() + whole.nbytes


def _parts(fused: FusedLayers) -> dict[str, tuple[str, ...]]:
    """Names of the tensors that make up each constant of several."""
    return {
        f"{group[0]}.{FUSED}.{key}": tuple(f"{path}.{key}" for path in group)
        for group in fused
        for key in ("weight", "bias")
    }


def _part_of(spec: ConstantSpec, count: int) -> ConstantSpec:
    if count == 1:
        return spec
    rows, *others = spec.shape
    return replace(spec, shape=(rows // count, *others))


_LATE: list[Tensor] = []


def _let_go(aliases: Iterable[Tensor]) -> None:
    """Gives storage back that torch's loader would keep for good.

    The loader copies the handles of constants that their user manages, and never deletes a copy
    (`MaybeOwningAtenTensorHandle`), so the aliases stay, with whatever storage they have.
    """
    # An engine may be collected while another one is traced, among tensors without data; and in
    # inference mode aliases of inference tensors can be changed, too.
    waiting = [*_LATE, *aliases]
    _LATE.clear()
    with _disable_current_modes(), torch.inference_mode():
        for alias in waiting:
            try:
                alias.set_()  # type: ignore[call-overload] # its stub lacks this form
            except RuntimeError:  # noqa: PERF203 - inside a kernel of the trace: with the next
                _LATE.append(alias)


def _missing(owner: str, name: str) -> str:
    if is_lora_name(name):
        return f"{owner}: this variant carries LoRA and needs {name}: pass the adapter's factors"
    return f"{owner} has no tensor {name}, but was compiled with one: compile for this model"


def _check_constant(name: str, tensor: Tensor, spec: ConstantSpec) -> None:
    if tuple(tensor.shape) != spec.shape or tensor.dtype is not spec.dtype:
        raise ArtifactMismatchError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}, but the package was compiled for "
            f"{spec.shape} {spec.dtype}: cast the transformer, or compile again"
        )
    if not tensor.is_contiguous():
        raise ArtifactMismatchError(
            f"{name} is not contiguous (strides {tensor.stride()}): the package reads it as dense "
            "memory; store it contiguously"
        )
