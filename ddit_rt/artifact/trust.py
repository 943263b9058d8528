"""Which artifacts this user has built on this machine.

A compiled package is native code and loading it executes it, so an artifact is as dangerous as a
program. It is loaded only if its digest is in the user's own list, which `save` writes, or if the
caller vouches for it with `trust_code=True`. The digest is that of the manifest, which holds the
hash sums of all files, so a trusted artifact stays trusted when it is moved or copied, and stops
being so when a byte of it changes.

The list is `trusted.json` in `$DDIT_RT_HOME`, by default `~/.cache/ddit_rt`.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddit_rt.errors import ArtifactError, UntrustedArtifactError
from ddit_rt.folder import unwritable

HOME_VARIABLE = "DDIT_RT_HOME"


def trust_list_path() -> Path | None:
    """Where the user's list is; None for a user without a home folder, who has none."""
    home = os.environ.get(HOME_VARIABLE)
    try:
        return Path(home or "~/.cache/ddit_rt").expanduser() / "trusted.json"
    except RuntimeError:
        return None


def require_trust_list() -> Path:
    """Where the user's list is, which can be written.

    Raises:
        ArtifactError: It cannot be written; the message names the setting that helps.
        UntrustedArtifactError: It can be written by other users.
    """
    path = trust_list_path()
    if path is None:
        raise ArtifactError(
            "this user has no home folder for the list of artifacts that were built here: set "
            f"{HOME_VARIABLE} to a folder that you can write"
        )
    if problem := unwritable(path.parent):
        raise ArtifactError(
            f"the list of artifacts that were built here is in {path.parent}, {problem}: set "
            f"{HOME_VARIABLE} to a folder that you can write"
        )
    _read(path)
    return path


def trust(digest: str) -> None:
    """Adds an artifact to the user's list.

    Args:
        digest: `Manifest.digest`.
    """
    path = require_trust_list()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        digests = _read(path) | {digest}
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            temporary.touch(mode=0o600)
            temporary.write_text(json.dumps({"digests": sorted(digests)}, indent=1), "utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def is_trusted(digest: str) -> bool:
    """Whether an artifact is in the user's list."""
    path = trust_list_path()
    return path is not None and digest in _read(path)


def require_trust(digest: str, name: str) -> None:
    """Raises `UntrustedArtifactError` unless an artifact is in the user's list.

    Args:
        digest: `Manifest.digest`.
        name: What to call the artifact in the message.
    """
    if not is_trusted(digest):
        raise UntrustedArtifactError(
            f"{name} (digest {digest}) was not built by this user on this machine, and loading it "
            "runs its native code: if you trust whoever built it, pass trust_code=True; otherwise "
            "compile the model here"
        )


def _read(path: Path) -> set[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read ({error.strerror}): set {HOME_VARIABLE} to a folder of yours"
        ) from error
    _check_owner(path)
    try:
        return set(json.loads(text)["digests"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is damaged ({error}): delete it; artifacts built here then need "
            "trust_code=True once, or to be saved again"
        ) from error


def _check_owner(path: Path) -> None:
    """A list that somebody else can write is no proof of anything."""
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UntrustedArtifactError(
            f"{path} can be written by other users, so it proves nothing: make it yours alone "
            "(chown, chmod 600), or delete it"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
