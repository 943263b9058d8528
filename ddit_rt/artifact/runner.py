"""Blocks that run: compiled ones from a package, and the same convention executed eagerly.

A runner computes with the tensors of the user's own module. Nothing is copied: what is fused
into the weights in place is seen by every runner at once, and a second bucket costs no second
model. The price is a rule of lifetime: a runner keeps the storage it was bound to alive. When
the module puts its weights elsewhere (`pipe.to(...)`), the runner goes on with the old values
until `rebind`; `stale` tells, in about 50 ns per tensor.

A runner is not thread-safe and performs no synchronisation, so that a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ddit_rt.artifact.constants import Binding, ConstantSpec
from ddit_rt.artifact.inputs import InputCheck, TokenRanges
from ddit_rt.artifact.package import METADATA_KEY, PackageInfo
from ddit_rt.artifact.package import input_dtypes as resolve_dtypes
from ddit_rt.artifact.template import BlockTemplate, LoraSpec, canonical_name
from ddit_rt.errors import ArtifactError, ArtifactMismatchError
from ddit_rt.families.base import BlockType

if TYPE_CHECKING:
    from torch.export.pt2_archive._package import AOTICompiledModel


class CompiledRunner:
    """A compiled block, bound to one block of a transformer.

    Attributes:
        info: What the package expects.
    """

    def __init__(self, package: Path, *, device: torch.device) -> None:
        """Loads a package; `bind` has to follow. This executes native code of the package.

        Args:
            package: Path of a `.pt2` file.
            device: Device of the block that it will be bound to.

        Raises:
            ArtifactError: The file is missing or is no package of this project.
            ArtifactMismatchError: It was compiled for another kind of device.
        """
        self._model = _load(package, device)
        self.info = PackageInfo.from_json(_metadata(self._model, package))
        if self.info.device != device.type:
            raise ArtifactMismatchError(
                f"{package} was compiled for {self.info.device}, the block is on {device}: move "
                "the pipeline, or compile for that device"
            )
        self._fqns = {canonical_name(fqn): fqn for fqn in self._model.get_constant_fqns()}
        info = self.info
        self._check = InputCheck(info.block, info.inputs, info.ranges, info.input_dtypes, device)
        self._run: Callable[[Sequence[Tensor]], list[Tensor]] = self._refuse
        self._binding: Binding | None = None
        self._source: tuple[nn.Module, Mapping[str, Tensor] | None] | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Runs the block.

        Args:
            tensors: The inputs of the block type, in order, contiguous.

        Raises:
            ShapeError: A tensor is not one that the package can read.
            RuntimeError: No constants are bound.
        """
        self._check(tensors)
        return tuple(self._run(tensors))

    def bind(self, block: nn.Module, lora: Mapping[str, Tensor] | None = None) -> None:
        """Makes the package compute with a block's own tensors.

        Args:
            block: A block of the user's transformer.
            lora: Factors by canonical name, for a variant that carries LoRA.

        Raises:
            ArtifactMismatchError: Tensors are missing or of another shape or type.
        """
        specs = {name: self._spec(name) for name in self._fqns}
        binding = Binding(self.info.block, specs, block, lora)
        constants = {self._fqns[name]: tensor for name, tensor in binding.tensors.items()}
        self._model.load_constants(constants, check_full_update=True, user_managed=True)
        self._binding, self._source = binding, (block, lora)
        self._run = self._model.loader.run  # type: ignore[assignment] # its stub is wrong

    def stale(self) -> bool:
        """Whether the module has moved a bound tensor to other storage since `bind`."""
        return self._binding is not None and self._binding.stale()

    def rebind(self) -> None:
        """Binds again to the tensors that the module holds now."""
        if self._source is not None:
            self.bind(*self._source)

    def _spec(self, name: str) -> ConstantSpec:
        try:
            return self.info.constants[name]
        except KeyError:
            raise ArtifactError(
                f"{self.info.block}: the package asks for {name}, which its metadata does not "
                "list: compile the block again"
            ) from None

    def _refuse(self, _: Sequence[Tensor]) -> list[Tensor]:
        raise RuntimeError(f"{self.info.block}: bind the runner to a block before running it")


class EagerRunner:
    """A block executed by PyTorch, with the calling convention and checks of a compiled one."""

    def __init__(
        self,
        block_type: BlockType,
        block: nn.Module,
        *,
        ranges: TokenRanges,
        input_dtypes: Mapping[str, torch.dtype] | None = None,
        lora_spec: LoraSpec | None = None,
        lora: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Prepares and binds the runner.

        Args:
            block_type: How the block is called.
            block: A block of the user's transformer.
            ranges: Sizes to accept.
            input_dtypes: As for `compile_block`.
            lora_spec: The branch that the variant carries, if any.
            lora: Its factors, by canonical name.

        Raises:
            ArtifactMismatchError: Factors are missing or of another shape or type.
        """
        template = BlockTemplate(block_type, block, lora_spec)
        self._fqns = {canonical_name(fqn): fqn for fqn, _ in template.tensors()}
        self._specs = constant_specs(template)
        weight = next(block.parameters())
        dtypes = resolve_dtypes(block_type.inputs, block_type.dtype(block), input_dtypes)
        self._check = InputCheck(block_type.name, block_type.inputs, ranges, dtypes, weight.device)
        self._template = template.to("meta")
        self._name = block_type.name
        self._block, self._lora = block, lora
        self.rebind()

    @torch.no_grad()
    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Runs the block; see `CompiledRunner.__call__`."""
        self._check(tensors)
        outputs: tuple[Tensor, ...] = torch.func.functional_call(
            self._template, self._constants, tensors, strict=True
        )
        return outputs

    def stale(self) -> bool:
        """Whether the module has moved a bound tensor to other storage since `rebind`."""
        return self._binding.stale()

    def rebind(self) -> None:
        """Binds to the tensors that the module holds now."""
        self._binding = Binding(self._name, self._specs, self._block, self._lora)
        self._constants = {self._fqns[n]: t for n, t in self._binding.tensors.items()}


def load_runner(
    package: Path, block: nn.Module, *, lora: Mapping[str, Tensor] | None = None
) -> CompiledRunner:
    """A package loaded and bound.

    Args:
        package: Path of a `.pt2` file of a trusted artifact: its native code is executed.
        block: The block of the user's transformer whose tensors it computes with.
        lora: Factors by canonical name, for a variant that carries LoRA.

    Raises:
        ArtifactError: The file is no package of this project.
        ArtifactMismatchError: The package does not fit the block.
    """
    runner = CompiledRunner(package, device=next(block.parameters()).device)
    runner.bind(block, lora)
    return runner


def constant_specs(template: BlockTemplate) -> dict[str, ConstantSpec]:
    """Shape and type of all tensors of a template, by canonical name."""
    return {
        canonical_name(name): ConstantSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in template.tensors()
    }


def _load(package: Path, device: torch.device) -> AOTICompiledModel:
    if not package.is_file():
        raise ArtifactError(f"no package at {package}")
    # Imported here: it takes a second.
    from torch._inductor import aoti_load_package

    index = -1 if device.type == "cpu" else device.index
    try:
        return aoti_load_package(str(package), run_single_threaded=True, device_index=index)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ArtifactError(f"{package} cannot be loaded ({error}): compile it again") from error


def _metadata(model: AOTICompiledModel, package: Path) -> str:
    try:
        return model.get_metadata()[METADATA_KEY]
    except KeyError:
        raise ArtifactError(
            f"{package} was not written by ddit_rt: it does not say what it expects"
        ) from None
