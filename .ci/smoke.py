"""Checks that an installed wheel works without the checkout: `python -I smoke.py CHECKOUT`."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch

import ddit_rt
from ddit_rt import _runtime, ops


def check_ops() -> None:
    """Each op once, on the CPU."""
    latents = torch.randn(1, 4, 16, 16)
    tokens = ops.pack(latents, 4)
    assert torch.equal(ops.unpack(tokens, 4, 16, 16), latents)
    history = torch.randn(4, *latents.shape)
    ops.solver_step_(
        history, torch.zeros(1, *latents.shape), latents, torch.tensor([[1.0, 0, 0, 0.5, 0, 0]]), 0
    )
    assert torch.equal(history[3], history[0] + 0.5 * latents)
    scores = ops.patch_scores(history, [4, 8], 0.4)
    state = torch.tensor([-1, 0, 0, 0], dtype=torch.int32)
    record = torch.zeros(1, 5)
    forced = torch.full((1,), -1, dtype=torch.int32)
    ops.decide_(scores, forced, torch.full((1, 2), 100.0), state, record, 0, 0, False)
    assert state.tolist() == [2, 1, 0, 2]
    memory, row = torch.zeros(3), torch.zeros(1, 2)
    never, none = torch.full((1,), float("nan")), torch.zeros(0)
    ops.decide_reuse_(none, never, none, state, memory, row, 0, 3, 1.0, 9, False)
    assert state.tolist() == [2, 1, 0, 2]


def check_files(checkout: Path) -> None:
    """The package is the installed one, and every file of it that git tracks was installed."""
    installed = Path(ddit_rt.__file__).parent
    assert checkout not in installed.parents, f"{installed} is the checkout"
    data = [path for path in (checkout / "ddit_rt").rglob("*") if path.is_file()]
    wanted = {
        path.relative_to(checkout / "ddit_rt")
        for path in data
        if "__pycache__" not in path.parts and path.suffix not in (".pyc", ".so")
    }
    missing = sorted(str(path) for path in wanted if not (installed / path).exists())
    assert not missing, f"not in the wheel: {missing}"


def main() -> None:
    """Runs the checks and prints what was found."""
    check_files(Path(sys.argv[1]))
    check_ops()
    version = importlib.metadata.version("ddit_rt")
    assert version == _runtime.__version__
    print(f"ddit_rt {version}, torch {torch.__version__}: {_runtime.build_info()}")


if __name__ == "__main__":
    main()
