"""Packages that other processes compile: the same ones, or an error that says of which block."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import CompiledBlocks, block_inputs
from extras import need
from models import tiny_transformer
from torch._inductor import config

from ddit_rt.blocks import (
    PackageInfo,
    TokenRanges,
    compile_blocks,
    load_runner,
    quantise_blocks,
    read_info,
)
from ddit_rt.blocks import side_by_side as module
from ddit_rt.blocks.compile import traced
from ddit_rt.blocks.side_by_side import SideBySide, spare_processes
from ddit_rt.errors import CompileError
from ddit_rt.models import family_of

BLOCK = "FluxSingleTransformerBlock"
"""The one that is handed over, of the two of FLUX."""


def compiled(folder: Path, transformer: Any = None) -> list[str]:
    """Packages of a tiny FLUX, as `tiny_pipeline` has it."""
    transformer = transformer or tiny_transformer()
    family = family_of(transformer)
    ranges = TokenRanges(**family.default_ranges)
    types = family.block_types(transformer)
    return compile_blocks(transformer, types, folder, ranges=ranges, variants={None: None})


def written(_: Any, info: PackageInfo, target: Path, __: Any) -> PackageInfo:
    """In the place of `compile_program`, in this process."""
    target.write_bytes(b"a package")
    return info


@pytest.mark.slow
def test_a_package_computes_the_bits_of_one_that_this_process_compiled(
    tmp_path: Path, compiled_blocks: CompiledBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "spare_processes", lambda: 1)
    monkeypatch.setattr(module, "compile_program", written)
    compiled(tmp_path)
    packages = [tmp_path / BLOCK / "package.pt2", compiled_blocks.package(BLOCK)]
    beside, alone = (read_info(package) for package in packages)
    assert beside == alone
    transformer = tiny_transformer()
    (single,) = (t for t in family_of(transformer).block_types(transformer) if t.name == BLOCK)
    inputs = block_inputs(single, 2, 12, 5)
    ours, theirs = (
        [tensor.clone() for tensor in load_runner(package, single.blocks(transformer)[0])(*inputs)]
        for package in packages
    )
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_a_quantised_block_is_handed_over_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ops that another package registers, which the process has to know."""
    need("torchao")
    monkeypatch.setattr(module, "spare_processes", lambda: 1)
    monkeypatch.setattr(module, "compile_program", written)
    transformer = tiny_transformer()
    types = family_of(transformer).block_types(transformer)
    quantise_blocks(transformer, types, "int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(tmp_path, transformer)
    assert read_info(tmp_path / BLOCK / "package.pt2").block == BLOCK


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """Lets other code than `work` run in the processes; gives them, as they are started."""
    processes: list[Any] = []
    start = subprocess.Popen

    def remembered(command: list[str], **more: Any) -> Any:
        process = start(command, **more)
        if command[0] == sys.executable:  # and no compiler
            processes.append(process)
        return process

    def begin(code: str) -> list[Any]:
        monkeypatch.setattr(module, "_COMMAND", code)
        monkeypatch.setattr(module, "spare_processes", lambda: 1)
        monkeypatch.setattr(subprocess, "Popen", remembered)
        monkeypatch.setattr(module, "compile_program", written)
        return processes

    return begin


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "-9, .* it said: nothing"),
        ("raise ImportError('no such thing')", "1, .*no such thing"),
        ("pass", "0, .* it said: nothing"),
    ],
)
def test_what_a_process_fails_at_is_compiled_here_and_told(
    tmp_path: Path, started: Callable[[str], list[Any]], code: str, said: str
) -> None:
    processes = started(code)
    with pytest.warns(UserWarning, match=f"(?s){BLOCK} ended with {said}"):
        paths = compiled(tmp_path)
    assert [(tmp_path / path).read_bytes() for path in paths] == [b"a package"] * 2
    (process,) = processes
    assert process.poll() is not None


@pytest.mark.slow
def test_what_can_be_compiled_nowhere_is_an_error_of_its_block(
    tmp_path: Path, started: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    started("raise ValueError('not there')")

    def refuse(program: Any, info: PackageInfo, target: Path, options: Any) -> PackageInfo:
        if info.block == BLOCK:
            assert all(one.numel() > 1 for one in program.state_dict.values())
            raise ValueError("not this one")
        return written(program, info, target, options)

    monkeypatch.setattr(module, "compile_program", refuse)
    refused = pytest.raises(CompileError, match=f"^{BLOCK} cannot be compiled.*: not this one$")
    with pytest.warns(UserWarning, match="ended with 1"), refused:
        compiled(tmp_path)
    assert not list(tmp_path.glob(f"{BLOCK}/*"))


@pytest.mark.slow
def test_a_full_disk_is_an_error_of_the_block_that_was_handed_over(
    tmp_path: Path, started: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    processes = started("import time; time.sleep(600)")
    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(CompileError, match="^FluxSingleTransformerBlock.*No space left on device"):
        compiled(tmp_path)
    assert [process.poll() for process in processes] == [-9]


@pytest.mark.parametrize("executable", ["", "/usr/bin/uwsgi", "/opt/app/blender"])
def test_another_program_that_python_runs_in_is_not_started(
    monkeypatch: pytest.MonkeyPatch, executable: str
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    assert spare_processes() == 0


@pytest.mark.slow
def test_an_error_here_ends_the_others(
    tmp_path: Path, started: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = started("import time; time.sleep(600)")

    def fail(*_: Any) -> PackageInfo:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "compile_program", fail)
    with pytest.raises(KeyboardInterrupt):
        compiled(tmp_path)
    (process,) = processes
    assert process.poll() is not None


def test_processes_without_a_program_end_by_themselves() -> None:
    code = "from ddit_rt.blocks.side_by_side import work; work()"
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0


def test_settings_made_in_code_are_kept_in_this_process() -> None:
    with config.patch({"max_fusion_size": 7}):
        assert spare_processes() == 0


@pytest.mark.slow
def test_more_programs_than_processes_are_shared_among_all(
    tmp_path: Path, started: Callable[[str], list[Any]]
) -> None:
    """A process that has ended makes room for another; equal programs are compiled once."""
    processes = started(
        "import json, sys, pathlib\n"
        "told = json.loads(sys.stdin.read())\n"
        "package = pathlib.Path(told['package'])\n"
        "package.parent.mkdir(parents=True, exist_ok=True)\n"
        "package.write_bytes(b'there')\n"
    )
    transformer = tiny_transformer()
    double, single = family_of(transformer).block_types(transformer)
    wide = replace(single, name="Wide")
    done: list[Path] = []
    with SideBySide(4, done.append) as compiler:
        for block_type, batch in ((double, 4), (single, 4), (wide, 5)):
            block = block_type.blocks(transformer)[0]
            ranges = TokenRanges(batch=(1, batch))
            program, info = traced(block_type, block, ranges)
            compiler.add(program, info, tmp_path / block_type.name / "package.pt2")
        compiler.finish()
    assert sorted(path.parent.name for path in done) == sorted([double.name, single.name, "Wide"])
    written_here = [path for path in done if path.read_bytes() == b"a package"]
    assert len(written_here) + len(processes) == 3
    assert written_here
