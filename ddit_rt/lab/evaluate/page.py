"""`report.html`: one file without anything outside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from ddit_rt.lab.evaluate.cases import Pictures, Report, cases
from ddit_rt.lab.evaluate.plots import colours, marks, pareto_plot

_LONG = 40
"""Characters above which the head of a column is made wide."""


def page_file(name: str) -> str:
    """A file of `pages/`."""
    return (files("ddit_rt.lab.evaluate") / "pages" / name).read_text(encoding="utf-8")


def build_page(report: Report, image: Pictures, *, shown: int) -> str:
    """The page.

    Args:
        report: What `build_report` gave.
        image: Gives images.
        shown: Prompts with images at most, worst first.
    """
    worst = report["worst"][:shown]
    body = [
        _header(report),
        _plan_table(report),
        _win_table(report),
        _plots(report),
        cases(report, worst, image),
        _missing(report),
        _notes(report),
        _details(report),
    ]
    return (
        '<!doctype html><html lang="en" class="no-script"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # The file can load nothing, whatever stands in a prompt.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>ddit-rt eval: {escape(report['model']['name'])}</title>"
        f"<style>{page_file('report.css')}</style></head><body>{''.join(body)}"
        f"<script>{page_file('report.js')}</script></body></html>\n"
    )


def _header(report: Report) -> str:
    settings, machine = report["settings"], report["machine"]
    prompts = f"{settings['prompts']} prompts ({settings['source']})"
    if settings["seeds"] > 1:
        prompts += f", {settings['seeds']} images each"
    return (
        f"<header><h1>Plans of {escape(report['model']['name'])}, side by side</h1>"
        f'<p class="muted">{escape(prompts)}, {settings["steps"]} steps. '
        f"{escape(machine['cpu'])}, {machine['threads']} threads, device "
        f"{escape(report['device'])}; torch {escape(report['versions']['torch'])}, "
        f"ddit_rt {escape(report['versions']['ddit_rt'])}.</p>{_summary(report)}</header>"
    )


def _summary(report: Report) -> str:
    plans = {plan["name"]: plan for plan in report["plans"]}
    main = plans[report["main"]]
    ssim = _number(main["scores"]["ssim"]["value"])
    text = (
        f"<strong>{escape(main['title'])}</strong> runs {main['speedup']:.2f}x as fast as all "
        f"fine in the denoising loop, at SSIM {ssim} to its images."
    )
    for entry in report["wins"]:
        if entry["metric"] == "ssim" and plans[entry["against"]]["role"] == "rival":
            rival = plans[entry["against"]]
            text += (
                f" Against {escape(rival['title'])} ({rival['speedup']:.2f}x) it is closer on "
                f"{_share(entry['share'])} of the prompts."
            )
    return f"<p>{text}</p>"


def _plan_table(report: Report) -> str:
    heads = ["plan", "loop, s", "speed-up", "whole call, s", "tokens"]
    heads += [_headed(metric) for metric in report["metrics"]]
    rows = [_plan_row(report, plan) for plan in report["plans"]]
    return (
        "<section><h2>Plans</h2>"
        + _table(heads, rows)
        + '<p class="muted">Means over prompts, with 95% bootstrap intervals; seconds and tokens '
        "for one image. Speed-up is of the denoising loop over all fine. An arrow says which "
        "way is better.</p></section>"
    )


def _headed(metric: Mapping[str, Any]) -> str:
    arrow = "&uarr;" if metric["higher_is_better"] else "&darr;"
    below = f"<small>to {escape(metric['references'])}</small>" if "references" in metric else ""
    label = f"{escape(metric['label'])} {arrow}{below}"
    return f'<span class="wide">{label}</span>' if len(label) > _LONG else label


def _plan_row(report: Report, plan: Mapping[str, Any]) -> str:
    colour = colours(report["plans"])[plan["name"]]
    name = (
        f'<span class="swatch" style="background:{colour}"></span>{escape(plan["title"])}'
        f"<small>{escape(plan['label'])}</small>"
    )
    cells = [
        _interval(plan["seconds"]),
        f"{plan['speedup']:.2f}x",
        _interval(plan["seconds_call"]),
        _interval(plan["tokens"]),
        *(_score(plan, metric) for metric in report["metrics"]),
    ]
    kind = ' class="main"' if plan["name"] == report["main"] else ""
    return f'<tr{kind}><th scope="row">{name}</th>{_cells(cells)}</tr>'


def _score(plan: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    score = plan["scores"].get(metric["name"])
    if score is None:
        return '<span class="muted">reference</span>'
    if score["value"] is None:
        return "same"
    same = score.get("identical", 0)
    note = f"<small>{same} more are identical</small>" if same and metric["name"] == "psnr" else ""
    return _interval(score) + note


def _win_table(report: Report) -> str:
    if not report["wins"]:
        return ""
    titles = {plan["name"]: plan["title"] for plan in report["plans"]}
    labels = {metric["name"]: metric["label"] for metric in report["metrics"]}
    shares = {(entry["against"], entry["metric"]): entry["share"] for entry in report["wins"]}
    rivals = list(dict.fromkeys(entry["against"] for entry in report["wins"]))
    metrics = list(dict.fromkeys(entry["metric"] for entry in report["wins"]))
    rows = [
        f'<tr><th scope="row">{escape(titles[rival])}</th>'
        + _cells([_win(shares.get((rival, metric))) for metric in metrics])
        + "</tr>"
        for rival in rivals
    ]
    main = escape(titles[report["main"]])
    return (
        f"<section><h2>How often {main} is better</h2>"
        + _table(["against", *(escape(labels[metric]) for metric in metrics)], rows)
        + '<p class="muted">Share of prompts; a tie counts half. 95% intervals by Wilson&#x27;s '
        "formula.</p></section>"
    )


def _win(share: Mapping[str, float] | None) -> str:
    return '<span class="muted">no score</span>' if share is None else _share(share)


def _plots(report: Report) -> str:
    figures = "".join(_plot(report, metric) for metric in report["metrics"])
    return (
        f'<section><h2>Quality against time</h2><div class="plots">{figures}</div>'
        '<p class="muted">Bars are 95% intervals, the dashed line is the front. All fine is the '
        "reference of the scores that compare with it, and has none of them.</p></section>"
    )


def _plot(report: Report, metric: Mapping[str, Any]) -> str:
    points = marks(report["plans"], metric["name"])
    if not points:
        return ""
    better = metric["higher_is_better"]
    plot = pareto_plot(
        points,
        x_label="seconds of the denoising loop, per picture",
        y_label=metric["label"],
        higher_is_better=better,
    )
    side = "Up" if better else "Down"
    return f"<figure>{plot}<figcaption>{side} and to the left is better.</figcaption></figure>"


def _missing(report: Report) -> str:
    rows = [(entry["label"], entry["reason"]) for entry in report["skipped"]]
    rows += [(entry["name"], entry["reason"]) for entry in report["absent"]]
    items = "".join(f"<li><strong>{escape(n)}</strong>: {escape(r)}</li>" for n, r in rows)
    return f"<section><h2>Not in this report</h2><ul>{items}</ul></section>"


def _notes(report: Report) -> str:
    if not report["notes"]:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    return f"<section><h2>Notes</h2><ul>{items}</ul></section>"


def _details(report: Report) -> str:
    policies = {
        plan["title"]: {"steps": plan["num_inference_steps"], **plan["policy"]}
        for plan in report["plans"]
    }
    names = ("settings", "costs", "sessions", "machine", "versions", "model", "artifact")
    parts = {"plans": policies, **{name: report[name] for name in names}}
    blocks = "".join(
        f"<details><summary>{escape(name)}</summary><pre>"
        f"{escape(json.dumps(value, indent=1))}</pre></details>"
        for name, value in parts.items()
    )
    return f"<section><h2>Details</h2>{blocks}</section>"


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"<td>{text}</td>" for text in texts)


def _number(value: float) -> str:
    """Four significant digits, without an exponent."""
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:#.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def _interval(entry: Mapping[str, float | None]) -> str:
    value, low, high = (entry.get(name) for name in ("value", "low", "high"))
    assert value is not None, "the caller shows a missing value by itself"
    if low is None or high is None:
        return _number(value)
    return f"{_number(value)}<small>{_number(low)} to {_number(high)}</small>"


def _share(share: Mapping[str, float]) -> str:
    return f"{share['value']:.0%} ({share['low']:.0%} to {share['high']:.0%})"
