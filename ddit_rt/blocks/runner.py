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

from ddit_rt.blocks.constants import Binding, ConstantSpec
from ddit_rt.blocks.inputs import InputCheck, TokenRanges
from ddit_rt.blocks.machine import TORCH, unpack_folder
from ddit_rt.blocks.package import input_dtypes, read_info
from ddit_rt.blocks.template import BlockTemplate, LoraSpec, canonical_name
from ddit_rt.errors import ArtifactError, ArtifactMismatchError
from ddit_rt.folder import no_place_for_code
from ddit_rt.models.base import BlockType

if TYPE_CHECKING:
    from torch.export.pt2_archive._package import AOTICompiledModel


_WAITS = (2, 13)
"""From this torch on, the first run after a change of tensors waits for its stream
(`AOTInductorModelBase::run_const_fold`), which no capture allows."""


class LoadedPackage:
    """The code of a package in this process, computing with one block's tensors at a time.

    Blocks of one type may share it: it takes the tensors of whoever runs next, by their addresses.
    That costs 13 to 41 us for a FLUX block (14 and 32 tensors), up to a tenth of a small block's
    time on a CPU, where each block therefore has its own. On CUDA it happens only while a graph is
    captured, which keeps the addresses, and copies for 57 blocks would be 57 sets of GPU modules.

    Attributes:
        info: What the package expects.
        device: Device of the blocks that it serves.
    """

    def __init__(self, package: Path, *, device: torch.device) -> None:
        """Loads a package. This executes native code of it.

        Args:
            package: Path of a `.pt2` file.
            device: Device of the blocks that it will be bound to.

        Raises:
            ArtifactError: The file is missing or is no package of this project.
            ArtifactMismatchError: It was compiled for another kind of device.
        """
        self.info = read_info(package)
        self.device = device
        if self.info.device != device.type:
            raise ArtifactMismatchError(
                f"{package} was compiled for {self.info.device}, the block is on {device}: move "
                "the pipeline, or compile for that device"
            )
        self._model = _load(package, device)
        self._fqns = {canonical_name(fqn): fqn for fqn in self._model.get_constant_fqns()}
        self._run: Callable[[Sequence[Tensor]], list[Tensor]] = self._model.loader.run  # type: ignore[assignment] # its stub is wrong
        self._bound: Binding | None = None

    @property
    def shared(self) -> bool:
        """Whether blocks should share it: on CUDA, where torch can change tensors in a capture."""
        return self.device.type == "cuda" and TORCH < _WAITS

    def resolve(self, block: nn.Module, lora: Mapping[str, Tensor] | None) -> Binding:
        """A block's tensors, checked; arguments and errors as of `CompiledRunner.bind`."""
        specs = {name: self._spec(name) for name in self._fqns}
        return Binding(self.info.block, specs, block, lora, self.info.fused)

    def run(self, binding: Binding, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Runs the code on checked inputs, with the tensors of a binding."""
        if self._bound is not binding:
            constants = {self._fqns[name]: tensor for name, tensor in binding.tensors.items()}
            self._model.load_constants(constants, check_full_update=True, user_managed=True)
            self._bound = binding
        return self._run(tensors)

    def _spec(self, name: str) -> ConstantSpec:
        try:
            return self.info.constants[name]
        except KeyError:
            raise ArtifactError(
                f"{self.info.block}: the package asks for {name}, which its metadata does not "
                "list: compile the block again"
            ) from None


class CompiledRunner:
    """A compiled block, bound to one block of a transformer.

    Attributes:
        info: What the package expects.
    """

    def __init__(self, package: LoadedPackage) -> None:
        """Prepares the runner; `bind` has to follow.

        Args:
            package: The code, which other runners may use as well.
        """
        self.info = info = package.info
        self._package = package
        self._check = InputCheck(
            info.block, info.inputs, info.ranges, info.input_dtypes, package.device
        )
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
        if self._binding is None:
            raise RuntimeError(f"{self.info.block}: bind the runner to a block before running it")
        return tuple(self._package.run(self._binding, tensors))

    def bind(self, block: nn.Module, lora: Mapping[str, Tensor] | None = None) -> None:
        """Makes the package compute with a block's own tensors.

        Args:
            block: A block of the user's transformer.
            lora: Factors by canonical name, for a variant that carries LoRA.

        Raises:
            ArtifactMismatchError: Tensors are missing or of another shape or type.
        """
        self._binding = self._package.resolve(block, lora)
        self._source = block, lora

    def stale(self) -> bool:
        """Whether the module has moved a bound tensor to other storage since `bind`."""
        return self._binding is not None and self._binding.stale()

    def rebind(self) -> None:
        """Binds again to the tensors that the module holds now."""
        if self._source is not None:
            self.bind(*self._source)


class EagerRunner:
    """A block executed by PyTorch, with the calling convention and checks of a compiled one."""

    def __init__(
        self,
        block_type: BlockType,
        block: nn.Module,
        *,
        ranges: TokenRanges,
        lora_spec: LoraSpec | None = None,
        lora: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Prepares and binds the runner.

        Args:
            block_type: How the block is called.
            block: A block of the user's transformer.
            ranges: Sizes to accept.
            lora_spec: The branch that the variant carries, if any.
            lora: Its factors, by canonical name.

        Raises:
            ArtifactMismatchError: Factors are missing or of another shape or type.
        """
        template = BlockTemplate(block_type, block, lora_spec)
        self._fqns = {canonical_name(fqn): fqn for fqn, _ in template.tensors()}
        self._specs = constant_specs(template)
        weight = next(block.parameters())
        dtypes = input_dtypes(block_type.inputs, block_type.dtype(block))
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
    runner = CompiledRunner(LoadedPackage(package, device=next(block.parameters()).device))
    runner.bind(block, lora)
    return runner


def constant_specs(template: BlockTemplate) -> dict[str, ConstantSpec]:
    """Shape and type of all tensors of a template, by canonical name."""
    return {
        canonical_name(name): ConstantSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in template.tensors()
    }


def _load(package: Path, device: torch.device) -> AOTICompiledModel:
    # Imported here: it takes a second. `aoti_load_package` would do the same, but first compile a
    # program to find out about the processor; the manifest has that checked already.
    from torch.export.pt2_archive._package import AOTICompiledModel

    index = -1 if device.type == "cpu" else device.index
    try:
        return AOTICompiledModel(
            torch._C._aoti.AOTIModelPackageLoader(str(package), "model", True, 1, index)  # noqa: SLF001
        )
    except RuntimeError as error:
        raise ArtifactError(f"{package} cannot be loaded {_advice(package, error)}") from error


def _advice(package: Path, error: RuntimeError) -> str:
    folder, remedy = unpack_folder()
    problem = no_place_for_code(folder, 2 * package.stat().st_size)
    return f"from {folder}, {problem}: {remedy}" if problem else f"({error}): compile it again"
