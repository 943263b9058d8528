"""Artifacts on disk: a folder, by custom `name.ddit`, written whole or not at all.

    name.ddit/
      manifest.json
      FluxTransformerBlock/package.pt2
      FluxTransformerBlock.lora32/package.pt2
      adapter/2p/...

Layout and file names are such that the folder can live on the Hugging Face Hub as it is. Opening
an artifact verifies every file before any of its code is loaded. Who may be loaded at all is the
subject of `trust`: an artifact is opened only if this user saved it on this machine, or if the
caller passes `trust_code=True`.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ddit_rt import checks
from ddit_rt.artifact.calibration import Calibration
from ddit_rt.artifact.manifest import MANIFEST_NAME, FileEntry, Manifest, PackageEntry
from ddit_rt.artifact.trust import require_trust, require_trust_list, trust
from ddit_rt.blocks.package import package_path
from ddit_rt.errors import ArtifactError
from ddit_rt.folder import replace_folder, sync, unwritable
from ddit_rt.policies import CacheFit

LOG = logging.getLogger("ddit_rt.artifact")

NATIVE_CODE = {".pt2", ".so"}
"""Endings of files that are code, which a manifest must list."""


@dataclass(frozen=True)
class Artifact:
    """A sound artifact: verified when it was opened, or just made.

    Attributes:
        directory: Folder with its files; None if nothing was compiled.
        manifest: What the artifact says about itself.
    """

    directory: Path | None
    manifest: Manifest

    @classmethod
    def unsaved(cls, directory: Path | None, manifest: Manifest) -> Artifact:
        """An artifact of what was just compiled: every file under `directory`, hashed.

        Args:
            directory: Folder of packages, named by `package_path`, and other files. It has to
                stay until the artifact is saved. None: an artifact that cannot be saved.
            manifest: The manifest without its files.
        """
        packages: dict[str, PackageEntry] = {}
        files: dict[str, FileEntry] = {}
        if directory is None:
            return cls(None, manifest)
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory).as_posix()
            if not path.is_file() or name == MANIFEST_NAME:
                continue
            entry = FileEntry(sha256=_sha256(path), bytes=path.stat().st_size)
            if path.suffix == ".pt2":
                block, _, variant = PurePosixPath(name).parts[0].partition(".")
                packages[name] = PackageEntry(
                    sha256=entry.sha256,
                    bytes=entry.bytes,
                    block_type=block,
                    variant=variant or None,
                )
            else:
                files[name] = entry
        return cls(directory, replace(manifest, packages=packages, files=files))

    def package(self, block: str, variant: str | None = None) -> Path:
        """Path of a compiled block.

        Args:
            block: Class name of the block.
            variant: Which variant of it.

        Raises:
            ArtifactError: The artifact has no such package.
        """
        name = package_path(block, variant)
        if self.directory is None or name not in self.manifest.packages:
            raise ArtifactError(
                f"the artifact has no {name}, only {sorted(self.manifest.packages)}: compile again "
                "with that variant"
            )
        return self.directory / name

    def with_calibration(self, calibration: Calibration) -> Artifact:
        """The artifact with a calibration in its manifest; `save` writes it."""
        return replace(self, manifest=self.manifest.with_calibration(calibration))

    def with_cache_fit(self, fit: CacheFit) -> Artifact:
        """The artifact with a fit for a step cache in its manifest; `save` writes it."""
        return replace(self, manifest=self.manifest.with_cache_fit(fit))

    def save(self, path: str | Path) -> Path:
        """Writes the artifact to a folder and adds it to the user's trust list.

        The folder appears complete or not at all; an artifact that was there stays as it was
        until the new one takes its place in one step.

        Args:
            path: Where to; an artifact already there is replaced.

        Returns:
            The path.

        Raises:
            ArtifactError: Nothing was compiled; the disk is full or fails; or, as of
                `require_savable`, before any work.
            TypeError, ValueError: No path.
        """
        directory, path = self.directory, checks.path("path", path)
        if directory is None:
            raise ArtifactError(
                'nothing was compiled, so there is nothing to save: compile with backend="aot"'
            )
        require_savable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replace_folder(path) as staging:
                self._write(directory, staging)
        except OSError as error:
            raise ArtifactError(
                f"cannot write {path} ({error.strerror or error}); what was there is as it was: "
                "make room, or choose another path"
            ) from error
        trust(self.manifest.digest)
        LOG.info("saved %s; this user trusts its digest %s", path, self.manifest.digest)
        return path

    def _write(self, directory: Path, staging: Path) -> None:
        for name in all_files(self.manifest):
            target = staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory / name, target)
            sync(target)
        (staging / MANIFEST_NAME).write_text(self.manifest.to_json(), encoding="utf-8")
        sync(staging / MANIFEST_NAME)


def require_savable(path: str | Path) -> None:
    """Refuses a path at which no artifact can be saved.

    Args:
        path: Path that an artifact is to be written to.

    Raises:
        ArtifactError: Something else is there, its parent cannot be written, or the list of
            trusted artifacts cannot; the message says what to set.
    """
    path = Path(path)
    _check_replaceable(path)
    if problem := unwritable(path.parent):
        raise ArtifactError(f"{path} would go to {path.parent}, {problem}: choose another path")
    require_trust_list()


def open_artifact(path: str | Path, *, trust_code: bool = False) -> Artifact:
    """Opens and verifies an artifact. Nothing of it is executed.

    Args:
        path: The folder.
        trust_code: Load it although it was not saved by this user on this machine.

    Raises:
        ArtifactError: It is missing, truncated, tampered with, or of another schema.
        UntrustedArtifactError: It is sound, but nobody vouches for it.
    """
    root = Path(path)
    manifest = read_manifest(root)
    if not trust_code:
        require_trust(manifest.digest, str(root))
    files = all_files(manifest)
    for name, entry in files.items():
        _verify(root, name, entry)
    for found in root.rglob("*"):
        name = found.relative_to(root).as_posix()
        if found.suffix in NATIVE_CODE and name not in files:
            raise ArtifactError(f"{root}: {name} is not in the manifest: remove it")
    LOG.info(
        "opened %s, %d files of %.1f MiB, all as their hashes say; digest %s, %s",
        *(root, len(files), sum(one.bytes for one in files.values()) / 2**20, manifest.digest),
        "vouched for by the caller" if trust_code else "trusted by this user",
    )
    return Artifact(root, manifest)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of an artifact, without looking at its files.

    Raises:
        ArtifactError: There is none, or it cannot be read.
    """
    root = checks.path("path", path)
    if not root.exists():
        raise ArtifactError(f"no such file: {root}; give the folder that `compile` wrote")
    if not root.is_dir():
        raise ArtifactError(f"{root} is a file; an artifact is a folder: give what `compile` wrote")
    try:
        text = (root / MANIFEST_NAME).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{root} is not an artifact: it has no {MANIFEST_NAME}; give the folder that `compile` "
            "wrote"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read {root / MANIFEST_NAME} ({error})") from error
    manifest = Manifest.from_json(text)
    for name in all_files(manifest):
        _check_name(name)
    return manifest


def all_files(manifest: Manifest) -> dict[str, FileEntry | PackageEntry]:
    """Every file of an artifact but its manifest, by its path inside the folder."""
    return {**manifest.packages, **manifest.files}


def _check_name(name: str) -> None:
    """Refuses names that could lead out of the artifact."""
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or ".." in parts or "\\" in name or "\0" in name:
        raise ArtifactError(
            f"{MANIFEST_NAME} names the file {name!r}, which is not a plain path inside the "
            "artifact: do not use this artifact"
        )
    if name.startswith("/") or name == MANIFEST_NAME:
        raise ArtifactError(f"{MANIFEST_NAME} must not list {name!r}: do not use this artifact")


def _verify(root: Path, name: str, entry: FileEntry | PackageEntry) -> None:
    path = root / name
    if not path.is_file():
        raise ArtifactError(f"{root}: {name} is missing: copy the artifact again")
    size = path.stat().st_size
    if size != entry.bytes:
        raise ArtifactError(
            f"{root}: {name} has {size} bytes, the manifest says {entry.bytes}: it is "
            f"{'truncated' if size < entry.bytes else 'altered'}; copy the artifact again"
        )
    if _sha256(path) != entry.sha256:
        raise ArtifactError(
            f"{root}: {name} does not have the SHA-256 of the manifest: it was altered; copy the "
            "artifact again"
        )


def _check_replaceable(path: Path) -> None:
    if not path.exists() and not path.is_symlink():
        return
    is_folder = path.is_dir() and not path.is_symlink()
    if not is_folder or (any(path.iterdir()) and not (path / MANIFEST_NAME).is_file()):
        raise ArtifactError(f"{path} exists and is not an artifact: choose another path")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
