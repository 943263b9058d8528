"""What a calibration has measured, line by line, so that a killed one goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddit_rt.lab.measure.report import append_lines, read_lines
from ddit_rt.lab.plans.bench import Bench, Tables
from ddit_rt.lab.plans.candidates import Candidate
from ddit_rt.lab.plans.points import Measurement, Prompt

_Row = tuple[float, float, float | None]


class Journal:
    """The file. Its name tells what its figures hold for, so that no others get into it."""

    def __init__(self, folder: Path, steps: int, conditions: Mapping[str, Any]) -> None:
        """Reads what is there.

        Args:
            folder: Folder of the calibration's files; made with the first entry.
            steps: Steps of the reference.
            conditions: All that measurements hang on beside the plan and the prompt.
        """
        told = json.dumps(conditions, sort_keys=True, default=str)
        digest = hashlib.sha256(told.encode()).hexdigest()[:10]
        self.path = folder / f"measured-{steps}-{digest}.jsonl"
        self._rows = {row["of"]: row["found"] for row in read_lines(self.path)}

    def get(self, of: str) -> Any:
        """What was found of something; None: nothing yet."""
        return self._rows.get(of)

    def add(self, found: Mapping[str, Any]) -> None:
        """Keeps findings, by what they are of."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"of": of, "found": value} for of, value in found.items()]
        append_lines(self.path, rows)
        self._rows |= dict(found)


class RecordedBench:
    """A `Bench` that measures nothing twice."""

    def __init__(self, bench: Bench, journal: Journal) -> None:
        """Wraps a bench.

        Args:
            bench: Runs plans.
            journal: Keeps what they came to.
        """
        self._bench, self._journal = bench, journal

    @property
    def tables(self) -> Tables:
        """See `Bench.tables`."""
        return self._bench.tables

    def evaluate(self, candidate: Candidate, prompts: Sequence[Prompt]) -> Measurement:
        """See `Evaluator.evaluate`."""
        keys = [_key(candidate.key, prompt) for prompt in prompts]
        missing = [place for place, key in enumerate(keys) if self._journal.get(key) is None]
        if missing:
            made = self._bench.evaluate(candidate, [prompts[place] for place in missing])
            self._journal.add(
                {keys[place]: row for place, row in zip(missing, made.rows, strict=True)}
            )
        return Measurement.of([tuple(self._journal.get(key)) for key in keys])

    def confirm(
        self, candidates: Sequence[Candidate], prompts: Sequence[Prompt]
    ) -> list[Measurement]:
        """See `Bench.confirm`. Side by side means on a prompt, which is measured as a whole."""
        beside = json.dumps([candidate.key for candidate in candidates])
        columns: list[list[_Row]] = []
        for prompt in prompts:
            key = _key(beside, prompt)
            if self._journal.get(key) is None:
                made = self._bench.confirm(candidates, [prompt])
                self._journal.add({key: [one.rows[0] for one in made]})
            columns.append([tuple(row) for row in self._journal.get(key)])
        return [Measurement.of(row) for row in zip(*columns, strict=True)]


def _key(what: str, prompt: Prompt) -> str:
    return json.dumps([what, prompt.text, prompt.seed])
