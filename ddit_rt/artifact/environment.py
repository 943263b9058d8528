"""What compiled code depends on: torch build, processor, C and C++ libraries."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch

# Inductor compiles with -march=native, so a package may use any instruction set of the machine
# that built it. The other words of /proc/cpuinfo describe the kernel or the hypervisor.
_INSTRUCTION_SETS = re.compile(
    r"^(sse|ssse|avx|amx|fma|f16c|bmi|abm|lzcnt|movbe|adx|vaes|vpclmul|gfni|sha_ni|pclmul|aes$"
    r"|asimd|sve|bf16|i8mm)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """The machine and libraries that packages are built on or loaded into.

    Attributes:
        torch_version: Version of torch with its build tag, e.g. `2.13.0+cpu`.
        device: Device type, `cpu` or `cuda`.
        machine: Processor architecture, e.g. `x86_64`.
        cpu_capability: Vector level of torch's own kernels, e.g. `AVX512`.
        cpu_features: Instruction sets that native code may use.
        cuda_arch: Compute capability, e.g. `9.0`; empty without CUDA.
        libstdcxx: Version of the C++ library, e.g. `6.0.30`; empty where it cannot be found.
        glibc: Version of the C library, e.g. `2.36`; empty where it cannot be found.
    """

    torch_version: str
    device: str
    machine: str
    cpu_capability: str
    cpu_features: tuple[str, ...]
    cuda_arch: str
    libstdcxx: str
    glibc: str

    @classmethod
    def current(cls, device: torch.device) -> Environment:
        """The environment of this process, for models on a device."""
        on_cuda = device.type == "cuda"
        major, minor = torch.cuda.get_device_capability(device) if on_cuda else (0, 0)
        return cls(
            torch_version=str(torch.__version__),
            device=device.type,
            machine=platform.machine(),
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
            cpu_features=_cpu_features(),
            cuda_arch=f"{major}.{minor}" if on_cuda else "",
            libstdcxx=_libstdcxx_version(),
            glibc=platform.libc_ver()[1],
        )

    def mismatches(self, running: Environment) -> list[str]:
        """Why packages built in this environment cannot run in another one.

        Args:
            running: The environment to run in.

        Returns:
            One sentence for each reason, with what came, what is needed and what to do.
        """
        problems = [
            f"{_LABELS[field.name]}: the artifact was built with {built or 'none'}, this is "
            f"{here or 'none'}; {_REMEDIES.get(field.name, 'compile again here')}"
            for field in fields(self)
            if field.name in _LABELS
            and (built := getattr(self, field.name)) != (here := getattr(running, field.name))
        ]
        missing = sorted(set(self.cpu_features) - set(running.cpu_features))
        if missing:
            problems.append(
                "processor: the artifact may use instructions that this one lacks "
                f"({', '.join(missing)}); compile again here"
            )
        for name in ("libstdcxx", "glibc"):
            built, here = getattr(self, name), getattr(running, name)
            if _version(built) > _version(here):
                problems.append(
                    f"{name}: the artifact was built with {built}, this is {here or 'unknown'}; "
                    "install that version or a newer one, or compile again here"
                )
        return problems


_LABELS = {
    "torch_version": "torch",
    "device": "device",
    "machine": "machine",
    "cpu_capability": "CPU capability",
    "cuda_arch": "CUDA architecture",
}
_REMEDIES = {
    "torch_version": "install that version, or compile again with this one",
    "device": "move the model there, or compile again for this one",
    "cpu_capability": "unset ATEN_CPU_CAPABILITY if it is set, or compile again here",
}


def _cpu_features() -> tuple[str, ...]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return ()
    found = re.search(
        r"^(?:flags|Features)\s*:\s*(.*)$",
        cpuinfo.read_text(encoding="utf-8", errors="replace"),
        re.MULTILINE,
    )
    words = found.group(1).split() if found else []
    return tuple(sorted({word for word in words if _INSTRUCTION_SETS.match(word)}))


def _libstdcxx_version() -> str:
    """Version of the libstdc++ that is loaded into this process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return ""
    found = re.search(
        r"(/\S*libstdc\+\+\.so\S*)", maps.read_text(encoding="utf-8", errors="surrogateescape")
    )
    if not found:
        return ""
    return Path(found.group(1)).resolve().name.rpartition(".so.")[2]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))
