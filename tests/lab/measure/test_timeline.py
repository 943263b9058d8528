"""The panels of a run say what its trace does."""

from __future__ import annotations

from typing import Any

from extras import need

from ddit_rt.lab.measure.figures import size_colour
from ddit_rt.lab.measure.timeline import REUSED_ALPHA, Run, draw_runs

need("matplotlib")


def step(place: int, size: str, ms: float, **scored: Any) -> dict[str, Any]:
    record = {"step": place, "patch_size": size, "latency_ms": ms, "scores": {}, "thresholds": {}}
    return {**record, **scored}


STEPS = [
    step(0, "p", 4.0),
    step(1, "2p", 2.0, scores={"2p": 1e-3}, thresholds={"2p": 4e-3}),
    step(2, "p", 5.0, scores={"2p": 9e-3}, thresholds={"2p": 4e-3}),
    step(3, "p", 1.0, reused=True),
]


def test_size_score_threshold_and_time_of_every_step_are_drawn() -> None:
    figure = draw_runs([Run(label="a run", steps=STEPS)])
    sizes, scores, times = figure.axes
    assert [text.get_text() for text in sizes.texts] == ["p", "2p", "p", "p", "a run"]
    assert [bar.get_alpha() for bar in sizes.patches] == [1, 1, 1, REUSED_ALPHA]
    score, threshold = scores.lines
    assert list(score.get_ydata()) == [1e-3, 9e-3]
    assert list(threshold.get_ydata()) == [4e-3, 4e-3]
    assert list(score.get_xdata()) == [1, 2]
    assert score.get_color() == size_colour("2p")
    assert [bar.get_height() for bar in times.patches] == [4.0, 2.0, 5.0, 1.0]


def test_runs_share_their_axes_and_one_without_scores_says_so() -> None:
    fine = [step(place, "p", 8.0) for place in range(6)]
    figure = draw_runs([Run(label="coarse", steps=STEPS), Run(label="fine", steps=fine)])
    assert figure.axes[0].get_xlim() == figure.axes[3].get_xlim() == (-0.6, 5.6)
    assert figure.axes[1].get_ylim() == figure.axes[4].get_ylim()
    assert figure.axes[2].get_ylim() == figure.axes[5].get_ylim()
    assert [text.get_text() for text in figure.axes[4].texts] == ["no step was scored"]


def test_a_score_that_is_not_finite_leaves_a_gap() -> None:
    broken = step(4, "p", 1.0, scores={"2p": None}, thresholds={"2p": 4e-3})
    figure = draw_runs([Run(label="a run", steps=[*STEPS, broken])])
    assert list(figure.axes[1].lines[0].get_xdata()) == [1, 2]
