from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artifacts import ADAPTER, PACKAGE, VARIANT, contents, make_artifact
from diffusers import FluxTransformer2DModel

from ddit_rt.artifact import (
    Artifact,
    is_trusted,
    open_artifact,
    read_manifest,
    trust,
)
from ddit_rt.errors import ArtifactError, UntrustedArtifactError


@pytest.fixture
def artifact(tmp_path: Path, transformer: FluxTransformer2DModel) -> Artifact:
    return make_artifact(tmp_path / "work", transformer)


@pytest.fixture
def saved(artifact: Artifact, tmp_path: Path) -> Path:
    return artifact.save(tmp_path / "model.ddit")


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_open_what_was_saved(artifact: Artifact, saved: Path) -> None:
    opened = open_artifact(saved)
    assert opened.manifest == artifact.manifest
    assert opened.directory == saved
    assert opened.package("FluxTransformerBlock") == saved / PACKAGE
    assert opened.package("FluxTransformerBlock", "lora32x0.5") == saved / VARIANT
    assert sorted(contents(saved)) == sorted([PACKAGE, VARIANT, ADAPTER, "manifest.json"])
    entry = opened.manifest.packages[VARIANT]
    assert (entry.block_type, entry.variant) == ("FluxTransformerBlock", "lora32x0.5")
    assert list(opened.manifest.files) == [ADAPTER]


def test_open_moved_artifact_stays_trusted(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "elsewhere")
    shutil.rmtree(saved)
    open_artifact(tmp_path / "elsewhere")


def test_open_hub_snapshot_of_links(saved: Path, tmp_path: Path) -> None:
    # The Hub's cache holds links to blobs.
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(saved, blobs)
    for name in contents(blobs):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / name)
    open_artifact(snapshot)


def test_package_unknown_variant(saved: Path) -> None:
    with pytest.raises(ArtifactError, match="has no FluxTransformerBlock.lora8/package.pt2"):
        open_artifact(saved).package("FluxTransformerBlock", "lora8")


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (PACKAGE, lambda data: data[:-1], "truncated"),
        (PACKAGE, lambda data: b"\x00" + data[1:], f"{PACKAGE} does not have the SHA-256"),
        (ADAPTER, lambda data: b"\x00" + data[1:], f"{ADAPTER} does not have the SHA-256"),
        (VARIANT, None, "lora32x0.5/package.pt2 is missing"),
        ("Other/package.pt2", lambda _: b"x", "Other/package.pt2 is not in the manifest"),
        ("adapters/2p/evil.so", lambda _: b"x", "adapters/2p/evil.so is not in the manifest"),
    ],
)
def test_open_refuses_files_other_than_those_that_were_saved(
    saved: Path, name: str, edit: Callable[[bytes], bytes] | None, message: str
) -> None:
    path = saved / name
    path.parent.mkdir(exist_ok=True)
    if edit is None:
        path.unlink()
    else:
        path.write_bytes(edit(path.read_bytes() if path.exists() else b""))
    with pytest.raises(ArtifactError, match=message):
        open_artifact(saved)


def test_open_extra_readme_is_fine(saved: Path) -> None:
    (saved / "README.md").write_text("a model card")
    open_artifact(saved)


@pytest.mark.parametrize("section", ["packages", "files"])
def test_open_path_traversal(saved: Path, section: str) -> None:
    entry = {"sha256": "0" * 64, "bytes": 1}
    entry |= {"block_type": "B", "variant": None} if section == "packages" else {}
    outside = ("../outside.pt2", "/etc/passwd", "a/../../b")
    for name in (*outside, "a//b", "./a", "a\\b", "", "manifest.json"):
        edit_manifest(saved, **{section: {name: entry}})
        with pytest.raises(ArtifactError, match="do not use this artifact"):
            open_artifact(saved, trust_code=True)


def test_open_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        open_artifact(tmp_path / "none.ddit")


def test_open_untrusted(saved: Path, own_home: Path) -> None:
    (own_home / "trusted.json").unlink()
    digest = read_manifest(saved).digest
    with pytest.raises(UntrustedArtifactError, match=f"{digest}.*trust_code=True.*compile"):
        open_artifact(saved)
    assert open_artifact(saved, trust_code=True).manifest.digest == digest
    with pytest.raises(UntrustedArtifactError):
        open_artifact(saved)


def test_open_edited_manifest_loses_trust(saved: Path) -> None:
    edit_manifest(saved, project_version="6.6.6")
    with pytest.raises(UntrustedArtifactError):
        open_artifact(saved)


def test_trust_keeps_earlier_entries(own_home: Path) -> None:
    trust("a" * 64)
    trust("b" * 64)
    assert is_trusted("a" * 64)
    assert is_trusted("b" * 64)
    assert not is_trusted("c" * 64)
    assert (own_home / "trusted.json").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in own_home.iterdir()) == ["trusted.json", "trusted.lock"]


def test_trust_list_open_to_others(own_home: Path) -> None:
    trust("a" * 64)
    (own_home / "trusted.json").chmod(0o666)
    with pytest.raises(UntrustedArtifactError, match="chmod 600"):
        is_trusted("a" * 64)


def test_trust_list_damaged(own_home: Path) -> None:
    trust("a" * 64)
    (own_home / "trusted.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        is_trusted("a" * 64)


def test_save_replaces_artifact(
    saved: Path, tmp_path: Path, transformer: FluxTransformer2DModel
) -> None:
    (saved / "stray").write_text("of the old one")
    make_artifact(tmp_path / "second", transformer, salt="2").save(saved)
    assert b"package.pt22" in (saved / PACKAGE).read_bytes()
    assert not (saved / "stray").exists()
    open_artifact(saved)
    assert leftovers(tmp_path) == []


def test_save_onto_itself(saved: Path) -> None:
    before = contents(saved)
    open_artifact(saved).save(saved)
    assert contents(saved) == before


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_save_refuses_what_is_no_artifact(artifact: Artifact, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "precious"
    if kind == "file":
        path.write_text("thesis")
    elif kind == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("thesis")
    else:
        path.symlink_to(tmp_path / "work")
    with pytest.raises(ArtifactError, match="is not an artifact"):
        artifact.save(path)
    assert path.exists()


def test_save_nothing_compiled(artifact: Artifact, tmp_path: Path) -> None:
    eager = Artifact.unsaved(None, artifact.manifest)
    with pytest.raises(ArtifactError, match="nothing was compiled"):
        eager.save(tmp_path / "model.ddit")


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


class Interrupter:
    """Raises KeyboardInterrupt at the n-th call of any of the watched functions."""

    def __init__(self, at: int) -> None:
        self.left = at

    def wrap(self, function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapped


@pytest.mark.parametrize("replacing", [False, True])
def test_save_interrupted_leaves_the_old_one(
    artifact: Artifact, tmp_path: Path, transformer: FluxTransformer2DModel, replacing: bool
) -> None:
    target = tmp_path / "model.ddit"
    old = make_artifact(tmp_path / "old", transformer, salt="old")
    before: dict[str, bytes] = {}
    whole = contents(artifact.save(tmp_path / "whole.ddit"))
    at, interrupted = 0, True
    while interrupted:
        at += 1
        shutil.rmtree(target, ignore_errors=True)
        if replacing:
            before = contents(old.save(target))
        interrupter = Interrupter(at)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "copyfile", interrupter.wrap(shutil.copyfile))
            patch.setattr(os, "fsync", interrupter.wrap(os.fsync))
            for owner in (os, Path):
                patch.setattr(owner, "rename", interrupter.wrap(owner.rename))
            try:
                artifact.save(target)
                interrupted = False
            except KeyboardInterrupt:
                pass
        assert leftovers(tmp_path) == []
        after = contents(target) if target.exists() else {}
        assert after in (before, whole)
        assert interrupted == (interrupter.left <= 0)
    assert after == whole
    assert at > 10


def test_save_where_folders_cannot_be_swapped(
    artifact: Artifact,
    saved: Path,
    tmp_path: Path,
    transformer: FluxTransformer2DModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ddit_rt import folder

    monkeypatch.setattr(folder, "_exchange", folder._exchange_in_two_steps)
    make_artifact(tmp_path / "second", transformer, salt="2").save(saved)
    open_artifact(saved)
    assert leftovers(tmp_path) == []
    before = contents(saved)
    for at in (1, 2, 3):
        interrupter = Interrupter(at)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", interrupter.wrap(Path.rename))
            with pytest.raises(KeyboardInterrupt):
                artifact.save(saved)
        if at < 3:
            assert contents(saved) == before
        assert leftovers(tmp_path) == []


def test_unsaved_ignores_an_old_manifest(artifact: Artifact) -> None:
    assert artifact.directory is not None
    (artifact.directory / "manifest.json").write_text("{}")
    again = Artifact.unsaved(artifact.directory, artifact.manifest)
    assert "manifest.json" not in again.manifest.files
    assert dataclasses.replace(again.manifest) == artifact.manifest


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the user of `docker run --user 12345`, without HOME and without a name."""

    def nowhere(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DDIT_RT_HOME")
    monkeypatch.setattr(Path, "expanduser", nowhere)


@pytest.mark.usefixtures("homeless")
def test_user_without_a_home_saves_nothing_unnoticed(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no home folder.*set DDIT_RT_HOME"):
        artifact.save(tmp_path / "out" / "a.ddit")
    assert not (tmp_path / "out").exists()


def test_user_without_a_home_opens_what_is_vouched_for(
    saved: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("homeless")
    digest = open_artifact(saved, trust_code=True).manifest.digest
    assert not is_trusted(digest)
    with pytest.raises(UntrustedArtifactError, match="trust_code=True"):
        open_artifact(saved)


def test_list_that_cannot_be_written_is_named_before_any_work(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DDIT_RT_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ArtifactError, match="home, which cannot be written.*set DDIT_RT_HOME"):
        artifact.save(tmp_path / "a.ddit")
    assert not (tmp_path / "a.ddit").exists()


def test_full_disk_is_named_before_any_work(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(ArtifactError, match="No space left on device.*choose another path"):
        artifact.save(tmp_path / "a.ddit")
    assert not (tmp_path / "a.ddit").exists()


def test_list_of_another_user_is_named(
    saved: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, *_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    digest = open_artifact(saved, trust_code=True).manifest.digest
    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ArtifactError, match="cannot be read .Permission denied.: set DDIT_RT_HOME"):
        is_trusted(digest)
