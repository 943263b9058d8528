from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_once import Packages, made_once, shared_folder
from text_encoders import save_tiny

from ddit_rt.cli import main


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny pipeline, text encoders included, as `save_pretrained` writes it."""
    return save_tiny(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights."""
    return save_tiny(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def artifact(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, packages: Packages
) -> Path:
    """An artifact of the model, compiled by the command; use it with `--trust-code`."""
    size = ["--height", "32", "--width", "48", "--patch-sizes", "p,2p"]

    def make(path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch, packages():
            patch.setenv("DDIT_RT_HOME", str(path.with_name("cli-home")))
            assert main(["compile", str(model_folder), "-o", str(path), *size]) == 0

    return made_once(shared_folder(tmp_path_factory) / "cli.ddit", make)


@pytest.fixture
def info(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What `ddit-rt info` prints as JSON."""

    def read(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["info", *map(str, arguments), "--json"]) == 0
        data: dict[str, Any] = json.loads(capsys.readouterr().out)
        return data

    return read
