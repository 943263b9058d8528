"""`report.html`: one file without anything outside it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from PIL import Image

from ddit_rt.demo.measure import Picture
from ddit_rt.evaluation.plans import REFERENCE
from ddit_rt.evaluation.plots import (
    SIZE_COLOURS,
    colours,
    marks,
    pareto_plot,
    timeline,
)

_LOSSLESS_SIDE = 256
"""Up to this side a picture is shown without loss."""

_LARGEST_SIDE = 768

_LONG = 40
"""Characters above which the head of a column is made wide."""

Report = Mapping[str, Any]
Pictures = Callable[[str, int, int], Picture]
"""The picture of a plan, prompt and repeat."""


def page_file(name: str) -> str:
    """A file of `pages/`."""
    return (files("ddit_rt.evaluation") / "pages" / name).read_text(encoding="utf-8")


def build_page(report: Report, picture: Pictures, *, shown: int) -> str:
    """The page.

    Args:
        report: What `build_report` gave.
        picture: Gives pictures.
        shown: Prompts with pictures at most, worst first.
    """
    worst = report["worst"][:shown]
    body = [
        _header(report),
        _plan_table(report),
        _win_table(report),
        _plots(report),
        _cases(report, worst, picture),
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
        prompts += f", {settings['seeds']} pictures each"
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
        f"fine in the denoising loop, at SSIM {ssim} to its pictures."
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
        "for one picture. Speed-up is of the denoising loop over all fine. An arrow says which "
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


def _cases(report: Report, worst: Sequence[int], picture: Pictures) -> str:
    total = len(report["prompts"])
    title = next(p["title"] for p in report["plans"] if p["name"] == report["main"])
    articles = [_case(report, rank, index, picture) for rank, index in enumerate(worst, start=1)]
    legend = "".join(
        f'<span><span class="swatch" style="background:{colour}"></span>{size}</span>'
        for size, colour in SIZE_COLOURS.items()
    )
    return (
        f"<section><h2>Worst cases first</h2><p>{len(worst)} of {total} prompts, by the SSIM of "
        f"{escape(title)}. Choose a plan, and move the edge with the pointer or the arrow keys. "
        f"Pictures larger than {_LOSSLESS_SIDE} pixels are shown as JPEG of at most "
        f"{_LARGEST_SIDE}; the folder holds them all without loss.</p>"
        f'<p class="legend muted">patch size of each step: {legend}</p>'
        f"{''.join(articles)}</section>"
    )


def _case(report: Report, rank: int, index: int, picture: Pictures) -> str:
    entry, main = report["prompts"][index], report["main"]
    repeat = min(
        range(len(entry["pictures"][main])),
        key=lambda i: entry["pictures"][main][i]["scores"]["ssim"],
    )
    buttons, lines = [], []
    for plan in report["plans"]:
        made = entry["pictures"][plan["name"]][repeat]
        uri = data_uri(picture(plan["name"], index, repeat))
        buttons.append(_button(plan, made, uri, main=plan["name"] == main))
        lines.append(f"<span>{escape(plan['title'])}</span>{timeline(made['patch_sizes'])}")
    seed = entry["pictures"][main][repeat]["seed"]
    return (
        f'<article class="case"><h3>{rank}. {escape(entry["prompt"])} '
        f"<small>seed {seed}</small></h3>"
        '<div class="frame"><img alt=""><img class="left" alt="all fine"><span class="edge"></span>'
        '<span class="tag a">all fine</span><span class="tag b"></span>'
        '<input type="range" min="0" max="100" value="50" aria-label="edge"></div>'
        f'<div class="strip">{"".join(buttons)}</div>'
        f'<div class="lines">{"".join(lines)}</div></article>'
    )


def _button(plan: Mapping[str, Any], made: Mapping[str, Any], uri: str, *, main: bool) -> str:
    ssim = made["scores"].get("ssim")
    facts = "" if ssim is None else f"SSIM {ssim:.3f}<br>"
    title = escape(plan["title"])
    inner = (
        f'<img src="{uri}" alt="{title}">{title}<br><small>{facts}{made["seconds"]:.3g} s, '
        f"{made['tokens']} tokens</small>"
    )
    if plan["role"] == REFERENCE:  # always on the left, so there is nothing to choose
        return f"<div>{inner}</div>"
    marked = " data-main" if main else ""
    return (
        f'<button type="button" data-title="{title}" aria-pressed="false"{marked}>{inner}</button>'
    )


def data_uri(picture: Picture) -> str:
    """A picture inside the page: without loss where it is small, else as JPEG and made smaller."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    if max(image.size) <= _LOSSLESS_SIDE:
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, format="JPEG", quality=90)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


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
