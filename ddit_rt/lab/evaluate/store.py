"""The folder of an evaluation: settings, images and scores, written so that a run can go on.

- `settings.json`: what was asked for, and the plans that it came to.
- `sessions.jsonl`: one line for each time that images were made: when, and on which machine.
- `pictures/PLAN/PROMPT-SEED.png`, of recordings `.wav`, and in `pictures.jsonl` a line for each:
  times, tokens, trace.
- `scores.jsonl`: one line for each score of a metric.
- `report.json`, `report.html`: the result; `preferences.jsonl`: answers of `ddit-rt ab`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddit_rt.lab.evaluate.plans import NamedPlan
from ddit_rt.lab.measure.report import append_lines, read_lines, write_json, write_whole
from ddit_rt.lab.measure.sound_file import read_wav, wav_bytes
from ddit_rt.lab.measure.timing import Pixels

SETTINGS_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """One image that was made.

    Attributes:
        plan: Name of its plan.
        prompt: Index of its prompt.
        repeat: Which image of the prompt, from 0.
        seed: Seed of its noise.
        sha256: Hash of its file.
        seconds: Seconds of the denoising loop for this image, median over the repeats.
        seconds_spread: Least and most of the same.
        seconds_call: Seconds of the whole call for this image, median over the repeats.
        tokens: Image tokens over the steps.
        session: Number of the session that made it.
        trace: `RunTrace.to_dict()`.
    """

    plan: str
    prompt: int
    repeat: int
    seed: int
    sha256: str
    seconds: float
    seconds_spread: tuple[float, float]
    seconds_call: float
    tokens: int
    session: int
    trace: dict[str, Any]

    @property
    def place(self) -> tuple[str, int, int]:
        """Plan, prompt and repeat."""
        return self.plan, self.prompt, self.repeat


class Store:
    """The folder of one evaluation.

    Attributes:
        folder: Folder that it lies in.
        records: The images that are there, by plan, prompt and repeat.
    """

    def __init__(self, folder: Path, sample_rate: int | None = None) -> None:
        """Reads what is there; a line that was cut off, or has lost its image, does not count.

        Args:
            folder: The folder.
            sample_rate: Samples a second of recordings, which then stand in the place of images.
        """
        self.folder, self._rate = folder, sample_rate
        rows = [ImageRecord(**row) for row in read_lines(folder / "pictures.jsonl")]
        self.records = {row.place: row for row in rows if self.path(*row.place).is_file()}

    def settle(
        self, request: dict[str, Any]
    ) -> tuple[tuple[NamedPlan, ...], dict[str, Any]] | None:
        """The plans and notes of an earlier run with the same settings; None if there was none.

        Raises:
            ValueError: The folder holds an evaluation with other settings, or other files.
        """
        file = self.folder / "settings.json"
        if not file.is_file():
            self._refuse_other_files()
            return None
        before = json.loads(file.read_text(encoding="utf-8"))
        # As JSON gives it back, so that tuples and lists compare equal.
        now = json.loads(json.dumps(request))
        names = sorted(before["request"].keys() | now.keys())
        pairs = [(name, before["request"].get(name), now.get(name)) for name in names]
        changed = [(name, old, new) for name, old, new in pairs if old != new]
        if changed:
            shown = "; ".join(
                f"{name}: {_short(old)} there, {_short(new)} now" for name, old, new in changed
            )
            raise ValueError(
                f"{self.folder} holds an evaluation with other settings ({shown}); name another "
                "folder with --out, or use the same settings to go on"
            )
        return tuple(NamedPlan.from_dict(plan) for plan in before["plans"]), before["found"]

    def begin(
        self, request: dict[str, Any], plans: Sequence[NamedPlan], found: dict[str, Any]
    ) -> None:
        """Writes the settings of a new evaluation; `found` is what led to the baselines."""
        self.folder.mkdir(parents=True, exist_ok=True)
        data = {
            "schema_version": SETTINGS_VERSION,
            "request": request,
            "plans": [plan.to_dict() for plan in plans],
            "found": found,
        }
        write_json(self.folder / "settings.json", data)

    def sessions(self) -> list[dict[str, Any]]:
        """Every time that images were made."""
        return read_lines(self.folder / "sessions.jsonl")

    def add_session(self, session: dict[str, Any]) -> int:
        """Notes that a session begins; returns its number."""
        number = len(self.sessions())
        append_lines(self.folder / "sessions.jsonl", [session])
        return number

    def path(self, plan: str, prompt: int, repeat: int) -> Path:
        """File of an image."""
        suffix = "png" if self._rate is None else "wav"
        return self.folder / "pictures" / plan / f"{prompt:05d}-{repeat}.{suffix}"

    def save_image(self, image: Pixels, plan: str, prompt: int, repeat: int) -> str:
        """Writes an image without loss; returns its hash."""
        data = _png(image) if self._rate is None else wav_bytes(image.astype(np.int16), self._rate)
        path = self.path(plan, prompt, repeat)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
        return hashlib.sha256(data).hexdigest()

    def add(self, records: Sequence[ImageRecord]) -> None:
        """Notes images whose files are written."""
        append_lines(self.folder / "pictures.jsonl", [asdict(record) for record in records])
        self.records |= {record.place: record for record in records}

    def image(self, plan: str, prompt: int, repeat: int) -> Pixels:
        """An image that was made, `[H, W, 3]` bytes, or a recording, `[channels, samples]`."""
        if self._rate is not None:
            return read_wav(self.path(plan, prompt, repeat))
        return read_image(self.path(plan, prompt, repeat))

    def shown(self, plan: str, prompt: int, repeat: int) -> Pixels | bytes:
        """The same for a page: a recording as its file."""
        if self._rate is not None:
            return self.path(plan, prompt, repeat).read_bytes()
        return self.image(plan, prompt, repeat)

    def scores(self) -> dict[tuple[str, str, str], float | None]:
        """Known scores by the metric's key, the image's hash and what it was compared with."""
        rows = read_lines(self.folder / "scores.jsonl")
        return {(row["metric"], row["picture"], row["reference"]): row["value"] for row in rows}

    def add_scores(self, scores: Iterable[tuple[str, str, str, float | None]]) -> None:
        """Notes scores: the three parts of a key of `scores`, and the value."""
        names = ("metric", "picture", "reference", "value")
        append_lines(
            self.folder / "scores.jsonl", [dict(zip(names, row, strict=True)) for row in scores]
        )

    def _refuse_other_files(self) -> None:
        if self.folder.is_file():
            raise ValueError(f"{self.folder} is a file; --out names a folder")
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} holds files and no evaluation (no settings.json); name a new folder"
            )


def read_image(path: Path) -> Pixels:
    """An image of a file, `[H, W, 3]` bytes."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)


def _png(image: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
