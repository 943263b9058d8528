"""Blind comparison by people: which of two images of a prompt, without names and in random order.

An answer is one line of `preferences.jsonl` in the evaluation's folder. Everything about a pair,
its order included, follows from the rater's name, so that a rater can stop and go on.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddit_rt.lab.evaluate.report import interval_entry
from ddit_rt.lab.measure.report import append_lines, read_lines
from ddit_rt.lab.measure.statistics import share_interval

CHOICES = ("left", "equal", "right")
SIDES = ("left", "right")

_LONGEST_NAME = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two images of one prompt, as one rater sees them.

    Attributes:
        number: The pair's place in the evaluation.
        prompt: The text.
        plans: Names of the plans on the left and on the right.
        files: The two images.
    """

    number: int
    prompt: str
    plans: tuple[str, str]
    files: tuple[Path, Path]


class Study:
    """A blind comparison of two plans of an evaluation.

    Attributes:
        plan: Name of the plan that is judged.
        against: Name of the plan that it is judged against.
    """

    def __init__(self, folder: Path, plan: str | None = None, against: str | None = None) -> None:
        """Reads the evaluation.

        Args:
            folder: What `ddit-rt eval` wrote.
            plan: The plan that is judged; by default the evaluation's main plan.
            against: What it is judged against; by default full resolution.

        Raises:
            ValueError: No finished evaluation, or no such plan in it.
        """
        file = folder / "report.json"
        if not file.is_file():
            raise ValueError(f"{folder} holds no report.json; run ddit-rt eval into it first")
        try:
            report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            names = [entry["name"] for entry in report["plans"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no report of ddit-rt eval; run it again") from error
        if report.get("makes", "image") != "image":
            raise ValueError(
                f"got an evaluation of {report['makes']}s; people compare images here: listen to "
                "those of its report.html"
            )
        self.plan, self.against = plan or report["main"], against or names[0]
        unknown = [name for name in (self.plan, self.against) if name not in names]
        if unknown or self.plan == self.against:
            raise ValueError(
                f"got the plans {self.plan!r} and {self.against!r}; choose two different ones of "
                f"{', '.join(names)}"
            )
        self._answers_file = folder / "preferences.jsonl"
        self._lock = threading.Lock()
        self._images = [
            (entry["prompt"], folder / one["file"], folder / other["file"], one["seed"])
            for entry in report["prompts"]
            for one, other in zip(
                entry["pictures"][self.plan], entry["pictures"][self.against], strict=True
            )
        ]

    def __len__(self) -> int:
        return len(self._images)

    def pairs(self, rater: str) -> list[Pair]:
        """Every pair in the rater's own order, sides drawn at random."""
        # A string seeds by its hash in every Python alike, unlike `hash`.
        draw = random.Random(f"{self.plan}/{self.against}/{rater}")  # noqa: S311 - no secret
        order = list(range(len(self)))
        draw.shuffle(order)
        swapped = [draw.random() < 0.5 for _ in order]
        return [self._pair(number, swap=swapped[number]) for number in order]

    def _pair(self, number: int, *, swap: bool) -> Pair:
        prompt, one, other, _ = self._images[number]
        plans, files = (self.plan, self.against), (one, other)
        if swap:
            plans, files = (plans[1], plans[0]), (files[1], files[0])
        return Pair(number=number, prompt=prompt, plans=plans, files=files)

    def pair(self, rater: str, number: int) -> Pair:
        """One pair as a rater sees it.

        Raises:
            ValueError: No such pair.
        """
        found = next((pair for pair in self.pairs(rater) if pair.number == number), None)
        if found is None:
            raise ValueError(f"got the pair {number}; there are 0 to {len(self) - 1}")
        return found

    def answers(self) -> list[dict[str, Any]]:
        """The answers about these two plans; a line that was cut off does not count."""
        return [
            row
            for row in read_lines(self._answers_file)
            if {"left", "right", "pair", "rater"} <= set(row)
            and {row["left"], row["right"]} == {self.plan, self.against}
        ]

    def state(self, rater: str) -> dict[str, Any]:
        """What a rater sees next: `done`, `total`, and `pair` or, at the end, `summary`."""
        answered = {row["pair"] for row in self.answers() if row["rater"] == rater}
        left = [pair for pair in self.pairs(rater) if pair.number not in answered]
        state: dict[str, Any] = {"done": len(self) - len(left), "total": len(self)}
        if left:
            return {**state, "pair": {"number": left[0].number, "prompt": left[0].prompt}}
        return {**state, "summary": self.summary()}

    def record(self, answer: Any) -> None:
        """Appends an answer: `rater`, `pair` and `choice`, one of `CHOICES`.

        The same answer twice, as after a lost reply, is written once.

        Raises:
            ValueError: Anything else than that, or a second, different answer.
        """
        rater, number, choice = _checked(answer)
        pair = self.pair(rater, number)
        with self._lock:
            mine = (row for row in self.answers() if row["rater"] == rater)
            earlier = next((row for row in mine if row["pair"] == number), None)
            if earlier is not None:
                if earlier["choice"] == choice:
                    return
                raise ValueError(f"pair {number} was answered before, with {earlier['choice']!r}")
            append_lines(
                self._answers_file,
                [
                    {
                        "rater": rater,
                        "pair": number,
                        "prompt": pair.prompt,
                        "seed": self._images[number][3],
                        "left": pair.plans[0],
                        "right": pair.plans[1],
                        "choice": choice,
                        "preferred": "equal"
                        if choice == "equal"
                        else pair.plans[SIDES.index(choice)],
                    }
                ],
            )

    def summary(self) -> dict[str, Any]:
        """Shares of the answers: `better`, `equal`, `worse`, and `as_good` (better or equal).

        Each with Wilson's interval, which takes the answers for independent; those of one rater,
        or about one image, are not quite.
        """
        answers = self.answers()
        total = len(answers)
        counts = {
            "better": sum(row["preferred"] == self.plan for row in answers),
            "equal": sum(row["preferred"] == "equal" for row in answers),
            "worse": sum(row["preferred"] == self.against for row in answers),
        }
        counts["as_good"] = counts["better"] + counts["equal"]
        return {
            "plan": self.plan,
            "against": self.against,
            "answers": total,
            "raters": len({row["rater"] for row in answers}),
            "counts": counts,
            "shares": {
                name: interval_entry(share_interval(count, total)) if total else None
                for name, count in counts.items()
            },
        }


def summary_text(summary: Mapping[str, Any]) -> str:
    """A few lines for a terminal."""
    title = f"{summary['plan']} against {summary['against']}"
    if not summary["answers"]:
        return f"{title}: no answers yet"
    lines = [f"{title}: {summary['answers']} answers of {summary['raters']} raters"]
    names = {"as_good": "as good or better", "better": "better", "equal": "equal", "worse": "worse"}
    for name, label in names.items():
        share = summary["shares"][name]
        lines.append(
            f"  {label:<18}{share['value']:>5.0%}  ({share['low']:.0%} to {share['high']:.0%})"
        )
    return "\n".join(lines)


def check_rater(rater: Any) -> str:
    """A rater's name.

    Raises:
        ValueError: Empty, too long, or no text.
    """
    if not isinstance(rater, str) or not 0 < len(rater.strip()) <= _LONGEST_NAME:
        raise ValueError(
            f"got the rater {rater!r:.80}; give a name of 1 to {_LONGEST_NAME} letters"
        )
    return rater.strip()


def _checked(answer: Any) -> tuple[str, int, str]:
    if not isinstance(answer, dict) or set(answer) != {"rater", "pair", "choice"}:
        raise ValueError(f"got {answer!r:.80}; an answer is an object with rater, pair and choice")
    rater, number, choice = check_rater(answer["rater"]), answer["pair"], answer["choice"]
    if type(number) is not int:  # True is an int too
        raise ValueError(f"got the pair {number!r:.80}; it is a whole number")
    if choice not in CHOICES:
        raise ValueError(f"got the choice {choice!r:.80}; it is one of {list(CHOICES)}")
    return rater, number, choice
