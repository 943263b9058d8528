"""Artifacts on the Hugging Face Hub: the same files, at the root of a model repository.

What comes from there is somebody's code like any other: the manifest comes first, and nothing else
is fetched unless this user trusts it, or the caller vouches for it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ddit_rt.artifact.manifest import MANIFEST_NAME
from ddit_rt.artifact.store import NATIVE_CODE, Artifact, all_files, read_manifest
from ddit_rt.artifact.trust import require_trust
from ddit_rt.errors import ArtifactError

LOG = logging.getLogger("ddit_rt.artifact")

_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_ADAPTERS = "adapters/"


def is_repo_id(path: str | Path) -> bool:
    """Whether a text stands for a repository: it looks like `org/name`, and is no place here.

    Where there is a folder `org`, a `name` that is not in it is more likely a mistake.
    """
    is_id = isinstance(path, str) and _REPO_ID.fullmatch(path) is not None
    return is_id and not Path(path).parent.exists()


def fetch(
    repo_id: str,
    *,
    trust_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Folder of an artifact of the Hub, in the Hub's own cache.

    Args:
        repo_id: `org/name`.
        trust_code: As for `open_artifact`.
        revision: A branch, tag or commit; by default the main branch.
        token: Of a user of the Hub; by default the one that is logged in.

    Raises:
        ArtifactError: There is no such repository, revision or artifact, or it cannot be reached.
        UntrustedArtifactError: Nobody vouches for it; then its manifest is all that was fetched.
    """
    try:
        file = hf_hub_download(repo_id, MANIFEST_NAME, revision=revision, token=token)
        root = Path(file).parent
        manifest = read_manifest(root)
        if not trust_code:
            require_trust(manifest.digest, repo_id)
        for name in all_files(manifest):
            # Of the same commit, which the folder is named after.
            hf_hub_download(repo_id, name, revision=root.name, token=token)
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError) as error:
        raise ArtifactError(_why_not(repo_id, revision, error)) from error
    LOG.info("%s of the Hub is in %s", repo_id, root)
    return root


def push(
    artifact: Artifact,
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Writes an artifact to the Hub in one commit; see `Engine.push_to_hub`."""
    directory = artifact.directory
    if directory is None:
        raise ArtifactError(
            'nothing was compiled, so there is nothing to push: compile with backend="aot"'
        )
    files = all_files(artifact.manifest)
    hub = HfApi(token=token)
    hub.create_repo(repo_id, private=private, exist_ok=True)
    there = hub.list_repo_files(repo_id, revision=revision)
    text = artifact.manifest.to_json().encode()
    changes: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(MANIFEST_NAME, text),
        *(CommitOperationAdd(name, directory / name) for name in files),
        # An artifact with code or adapters of another one beside its own would be refused.
        *(CommitOperationDelete(name) for name in there if name not in files and _is_ours(name)),
    ]
    commit = hub.create_commit(
        repo_id,
        changes,
        revision=revision,
        commit_message=commit_message or "Upload a ddit_rt artifact",
    )
    LOG.info("pushed %d files to %s", len(files), commit.commit_url)
    return str(commit.commit_url)


def _is_ours(name: str) -> bool:
    """Whether a file of a repository is one that an artifact brought."""
    return Path(name).suffix in NATIVE_CODE or name.startswith(_ADAPTERS)


def _why_not(repo_id: str, revision: str | None, error: Exception) -> str:
    at = "" if revision is None else f" at {revision}"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated on the Hub: ask for access there, and log in or pass token="
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"no such file: {repo_id}, and no such repository on the Hub that this token may read; "
            "give the folder that `compile` wrote, or org/name of one on the Hub"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} on the Hub has no revision {revision}: give one of its branches or tags"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"no such file: {repo_id}, and the Hub cannot be reached, and its cache has not all of "
            "it: check the network, or give a folder"
        )
    if isinstance(error, EntryNotFoundError):
        reason = _first_line(error)
        return f"{repo_id}{at} on the Hub is not a whole artifact ({reason}): push it again"
    return f"{repo_id}{at} cannot be fetched from the Hub ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")
