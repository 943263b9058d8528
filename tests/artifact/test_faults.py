"""A save that is killed or runs out of room: the old artifact or the new one, and whole."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artifacts import contents, make_artifact
from diffusers import FluxTransformer2DModel

from ddit_rt.artifact import open_artifact
from ddit_rt.errors import ArtifactError


def killed(call: Callable[[], Any], at: int) -> bool:
    """Calls in a process that SIGKILL ends before its n-th write, rename or sync of the disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads
        process = os.fork()
    if process:
        return os.WIFSIGNALED(os.waitpid(process, 0)[1])
    left = at

    def wrap(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    try:
        shutil.copyfile, os.fsync, os.rename = map(wrap, (shutil.copyfile, os.fsync, os.rename))
        Path.rename, Path.write_text = wrap(Path.rename), wrap(Path.write_text)  # type: ignore[method-assign]
        call()
    finally:
        os._exit(0)


@pytest.mark.parametrize("replacing", [False, True])
def test_save_killed_at_any_point_leaves_the_old_one_or_the_new_one(
    tmp_path: Path, transformer: FluxTransformer2DModel, replacing: bool
) -> None:
    old = make_artifact(tmp_path / "old", transformer, salt="old")
    new = make_artifact(tmp_path / "new", transformer, salt="new")
    target, whole = tmp_path / "model.ddit", contents(new.save(tmp_path / "whole.ddit"))
    before: dict[str, bytes] = {}
    seen, at, ended = set(), 0, False
    while not ended:
        at += 1
        shutil.rmtree(target, ignore_errors=True)
        if replacing:
            before = contents(old.save(target))
        ended = not killed(lambda: new.save(target), at)
        after = contents(target) if target.exists() else {}
        assert after in (before, whole)
        seen.add(after == whole)
        if after:
            open_artifact(target, trust_code=True)
        new.save(target)  # what a killed one has left beside is in nobody's way
        assert contents(target) == whole
    assert at > 10
    assert seen == {False, True}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_disk_that_fails_midway_is_named_and_the_old_one_stays(
    tmp_path: Path,
    transformer: FluxTransformer2DModel,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    target = make_artifact(tmp_path / "old", transformer, salt="old").save(tmp_path / "model.ddit")
    before, copy, calls = contents(target), shutil.copyfile, []

    def full(source: Path, to: Path) -> Any:
        calls.append(to)
        if len(calls) == 2:
            Path(to).write_bytes(Path(source).read_bytes()[:10])
            raise OSError(code, os.strerror(code), str(to))
        return copy(source, to)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ArtifactError, match=rf"{os.strerror(code)}\); what was there is as it was"):
        make_artifact(tmp_path / "new", transformer, salt="new").save(target)
    assert contents(target) == before
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]
