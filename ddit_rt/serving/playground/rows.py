"""Runs as the page shows them, in HTML."""

from __future__ import annotations

import html
import io
import textwrap
import threading
from collections.abc import Sequence

from PIL import Image

from ddit_rt.engine.watch import StepView
from ddit_rt.lab.measure.figures import size_colour
from ddit_rt.lab.measure.timeline import REUSED_ALPHA, Run, draw_runs
from ddit_rt.loop import RunTrace
from ddit_rt.serving.errors import clean
from ddit_rt.serving.jobs import Made
from ddit_rt.serving.preview import Previews
from ddit_rt.serving.worker import Worker

_DRAWING = threading.Lock()
"""matplotlib's settings are the process's."""


class Row:
    """One run, as the page shows it; `on_step` is called in the worker's thread.

    Attributes:
        name: What it is called.
        steps: Steps that it will take; 0 before the first.
        taken: Patch size of every step so far, and whether it reused.
        preview: The latest.
        shown: The image that the page has.
        made: Its image and trace, once it is over.
    """

    def __init__(self, name: str, worker: Worker) -> None:
        self.name = name
        self.steps = 0
        self.taken: list[tuple[str, bool]] = []
        self.preview: Image.Image | None = None
        self.shown: Image.Image | None = None
        self.made: Made | None = None
        self._worker = worker
        self._previews = Previews()

    def on_step(self, view: StepView, place: int) -> None:
        """Follows its run."""
        self.preview = self._previews(self._worker.latent_to_rgb, view, place)
        self.steps = view.steps
        self.taken.append((view.patch_size, view.reused))


def problem(message: str) -> str:
    """HTML of what went wrong."""
    return f'<div class="ddit-problem" role="alert">{html.escape(message)}</div>'


def progress(rows: Sequence[Row], ended: str = "") -> str:
    """HTML of runs: a cell for each step, in the colour of its patch size, and figures.

    Args:
        rows: They.
        ended: What became of those that have made nothing; empty while they still may.
    """
    reference = rows[1].made.trace if len(rows) > 1 and rows[1].made is not None else None
    return "".join(_progress_of(row, reference if row is rows[0] else None, ended) for row in rows)


def _progress_of(row: Row, reference: RunTrace | None, ended: str) -> str:
    cells = "".join(
        f'<i title="step {step}: {size}{", reused" * reused}" style="background:'
        f'{size_colour(size)};opacity:{REUSED_ALPHA if reused else 1}"></i>'
        for step, (size, reused) in enumerate(row.taken)
    )
    cells += "<i></i>" * (row.steps - len(row.taken))
    facts = _state(row, ended) if row.made is None else _facts(row.made, reference)
    return (
        f'<div class="ddit-run"><div class="ddit-head"><b>{html.escape(row.name)}</b>'
        f'<span>{facts}</span></div><div class="ddit-strip">{cells}</div></div>'
    )


def _state(row: Row, ended: str) -> str:
    """Of a run that has made nothing."""
    at = f"step {len(row.taken)} of {row.steps}" if row.taken else ""
    if ended:
        return f"{ended} after {at}" if at else ended
    return at or "waiting"


def _facts(made: Made, reference: RunTrace | None) -> str:
    trace = made.trace
    coarse = sum(record.patch_size != "p" for record in trace)
    facts = [f"{trace.latency_ms:.0f} ms", f"{trace.tokens} tokens"]
    facts.append(f"{coarse} of {len(trace)} steps coarse")
    if trace.reused:
        facts.append(f"{trace.reused} reused")
    facts.append(f"seed {made.seed}")
    if reference is not None:
        facts.insert(0, f"<em>{reference.latency_ms / trace.latency_ms:.2f}x as fast</em>")
    return " · ".join(facts)


def timeline(rows: Sequence[Row]) -> str:
    """HTML of what finished runs did, step by step, and of what their traces note."""
    runs, notes = [], []
    for row in rows:
        assert row.made is not None, "a timeline is of runs that are over"
        trace = row.made.trace
        steps = trace.to_dict()["steps"]
        name = textwrap.fill(row.name, 20)
        label = f"{name}\n{trace.tokens} tokens\n{trace.latency_ms:.0f} ms"
        runs.append(Run(label=label, steps=steps))
        notes += [f"{row.name}: {clean(note)}" for note in trace.notes]
    told = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f'<div class="ddit-timeline">{_drawn(runs)}</div><ul class="ddit-notes">{told}</ul>'


def _drawn(runs: Sequence[Run]) -> str:
    """As SVG, whose text the browser sets."""
    from matplotlib import rc_context

    file = io.StringIO()
    with _DRAWING, rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        draw_runs(runs, width=11.0, labels=1.55).savefig(file, format="svg")
    text = file.getvalue()
    return text[text.index("<svg") :]
