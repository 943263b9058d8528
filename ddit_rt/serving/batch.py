"""Large offline jobs: which images a file of prompts asks for, and which of them are made.

The file of an image is named by its line and its seed, and an image whose file exists is made: that
is how a job that was killed resumes. The record of an image reaches the disk before its file is
renamed to that name, so that no kill leaves half an image, or one without a record.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, Strict, ValidationError

from ddit_rt.folder import sync
from ddit_rt.serving.schema import Asked

MANIFEST = "manifest.jsonl"
"""One line per image, in the order of the prompts: request, seed, file and trace."""

_OWN = ".job"
"""Folder, within the job's, of what is needed only to resume."""

_NOT_HERE = ("lora", "model", "return_trace", "user")
"""Fields of a request that a line does not have."""

_MOST_SEED = 2**63 - 1


class Line(Asked):
    """A line of the file: the fields of a request, and these."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$")] | None = None
    n: Annotated[int, Strict(), Field(ge=1, le=10_000)] = 1
    num_frames: Annotated[int, Strict(), Field(ge=1)] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """An image, or video, that is to be made.

    Attributes:
        line: Number of its line, from 1.
        file: Name of its file within the job's folder.
        seed: Seed of its noise.
        fields: The line's other fields as JSON.
    """

    line: int
    file: str
    seed: int
    fields: str


def read_items(path: Path, seed: int, ending: str) -> list[Item]:
    """Reads the images that a file asks for.

    Args:
        path: The file, with a JSON object on each line that is not empty.
        seed: Seed of the first image; a line without a seed gets this plus the number of images
            before it.
        ending: Ending of the images' file names.

    Raises:
        ValueError: A line cannot be read, or names the file of another line; the message has its
            number.
        OSError: The file cannot be read.
    """
    items: list[Item] = []
    owners: dict[str, int] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            items += _claimed(_items(text, number, seed + len(items), ending), owners)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not items:
        raise ValueError(f"{path} asks for no image; write an object with a prompt on each line")
    return items


def _items(text: str, number: int, seed: int, ending: str) -> list[Item]:
    try:
        line = Line.model_validate(json.loads(text))
    except ValidationError as error:
        first = max(error.errors(), key=lambda one: len(one["loc"]))
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from error
    for name in _NOT_HERE:
        if name in line.model_fields_set:
            raise ValueError(f"{name}: a line has no such field; leave it out")
    first_seed = seed if line.seed is None else line.seed
    if first_seed + line.n - 1 > _MOST_SEED:
        raise ValueError(f"its last seed would be beyond {_MOST_SEED}")
    fields = line.model_dump_json(exclude={"seed", "n"}, exclude_unset=True)
    stem = line.id or f"{number:06d}"
    return [
        Item(line=number, file=f"{stem}-{one}{ending}", seed=one, fields=fields)
        for one in range(first_seed, first_seed + line.n)
    ]


def _claimed(items: list[Item], owners: dict[str, int]) -> list[Item]:
    """The same items, once `owners`, the line of each file, has their files."""
    for item in items:
        owner = owners.setdefault(item.file, item.line)
        if owner != item.line:
            raise ValueError(
                f"its image would be {item.file}, which line {owner} makes; give lines ids and "
                "seeds that differ"
            )
    return items


def digest(items: Iterable[Item]) -> str:
    """A digest of all that is asked for."""
    found = hashlib.sha256()
    for item in items:
        found.update(f"{item.file}\0{item.line}\0{item.fields}\n".encode())
    return found.hexdigest()


@contextmanager
def opened(out: Path, job: Mapping[str, Any]) -> Iterator[None]:
    """Locks a folder for a job.

    Args:
        out: The folder; it is made if it is missing.
        job: What tells this job from others.

    Raises:
        ValueError: Another job was begun there, or one is running.
    """
    own = out / _OWN
    own.mkdir(parents=True, exist_ok=True)
    with (own / "lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"a job is running in {out}; wait for it, or name another folder"
            ) from error
        _check_job(out, job)
        for left in (*own.glob("*.tmp*"), *own.glob("*.begun")):  # left by a kill
            left.unlink(missing_ok=True)
        yield


def _check_job(out: Path, job: Mapping[str, Any]) -> None:
    path = out / _OWN / "job.json"
    begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    other = [name for name in job if name not in begun or begun[name] != job[name]]
    if not other:
        return
    if begun and any(file.stat().st_size for file in _noted(out)):
        raise ValueError(
            f"{out} has a job with other {' and '.join(other)}; name another folder, or ask for "
            "the same to resume it"
        )
    write_whole(path, (json.dumps(dict(job), indent=2) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file in one step: whatever interrupts it, the file is whole, old or new."""
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    new.write_bytes(data)
    sync(new)
    new.replace(path)
    sync(path.parent)


class Records:
    """The records of one worker, in a file of its own so that workers do not share one."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._own = out / _OWN
        self._part = self._own / f"{secrets.token_hex(8)}.part"

    def begin(self, item: Item) -> int:
        """Notes that an image is begun; returns how often it was begun and not ended before."""
        with self._begun(item).open("a+b") as file:
            before = file.tell()
            file.write(b".")
        return before

    def end(self, item: Item) -> None:
        """Notes that an image is made, or cannot be made."""
        self._begun(item).unlink(missing_ok=True)

    def _begun(self, item: Item) -> Path:
        return self._own / f"{item.file}.begun"

    def room(self, item: Item) -> Path:
        """The path to write an image to before `keep` gives it its name."""
        ending = Path(item.file).suffix
        return self._own / f"{item.file}.{secrets.token_hex(4)}.tmp{ending}"

    def keep(self, item: Item, written: Path, trace: Mapping[str, Any]) -> None:
        """Writes the record of an image, and gives the image its name."""
        record = {"file": item.file, "line": item.line, "seed": item.seed}
        record |= {**json.loads(item.fields), "trace": dict(trace)}
        with self._part.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for path in (self._part, written):
            sync(path)
        written.replace(self._out / item.file)
        sync(self._out)


def done(out: Path, items: Iterable[Item]) -> dict[str, dict[str, Any]]:
    """The records of those images that are made, by their files."""
    records: dict[str, dict[str, Any]] = {}
    for path in _noted(out):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a kill cut it off, and its image has no name yet
                record = json.loads(line)
                records[record["file"]] = record
    return {
        item.file: records[item.file]
        for item in items
        if item.file in records and (out / item.file).exists()
    }


def _noted(out: Path) -> list[Path]:
    """The files with records."""
    manifest = [out / MANIFEST] if (out / MANIFEST).exists() else []
    return [*manifest, *sorted((out / _OWN).glob("*.part"))]


def write_manifest(out: Path, items: Iterable[Item]) -> int:
    """Writes the manifest of the images that are made, and removes the workers' own records.

    No worker may be writing.

    Returns:
        The number of images.
    """
    parts = list((out / _OWN).glob("*.part"))
    found = done(out, items)
    write_whole(out / MANIFEST, "".join(json.dumps(one) + "\n" for one in found.values()).encode())
    for path in parts:
        path.unlink()
    return len(found)
