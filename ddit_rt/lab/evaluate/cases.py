"""The images of `report.html`: prompts, worst first, and the image of every plan."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from ddit_rt.lab.evaluate.plans import REFERENCE
from ddit_rt.lab.evaluate.plots import SIZE_COLOURS, timeline
from ddit_rt.lab.measure.timing import Pixels

_LOSSLESS_SIDE = 256
"""Up to this side an image is shown without loss."""

_LARGEST_SIDE = 768

Report = Mapping[str, Any]
Pictures = Callable[[str, int, int], Pixels]
"""The image of a plan, prompt and repeat."""


def cases(report: Report, worst: Sequence[int], image: Pictures) -> str:
    """The section of prompts with their images, each plan's beside the all-fine one.

    Args:
        report: What `build_report` gave.
        worst: Indices of the prompts to show, in this order.
        image: Gives images.
    """
    total = len(report["prompts"])
    title = next(p["title"] for p in report["plans"] if p["name"] == report["main"])
    articles = [_case(report, rank, index, image) for rank, index in enumerate(worst, start=1)]
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


def _case(report: Report, rank: int, index: int, image: Pictures) -> str:
    entry, main = report["prompts"][index], report["main"]
    repeat = min(
        range(len(entry["pictures"][main])),
        key=lambda i: entry["pictures"][main][i]["scores"]["ssim"],
    )
    buttons, lines = [], []
    for plan in report["plans"]:
        made = entry["pictures"][plan["name"]][repeat]
        uri = data_uri(image(plan["name"], index, repeat))
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


def data_uri(image: Pixels) -> str:
    """An image inside the page: without loss where it is small, else as JPEG and made smaller."""
    image, buffer = Image.fromarray(image), io.BytesIO()
    if max(image.size) <= _LOSSLESS_SIDE:
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, format="JPEG", quality=90)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
