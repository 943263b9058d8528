"""`report.html`: one file that loads nothing from outside it, by Jinja2 and matplotlib."""

from __future__ import annotations

import base64
import io
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ddit_rt.lab.measure.figures import PALETTE, SIZE_COLOURS, new_figure, size_colour
from ddit_rt.lab.measure.timing import Pixels
from ddit_rt.lab.plans.points import pareto_front

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGES = Path(__file__).parent / "pages"
"""Templates, style and scripts."""

_LOSSLESS_SIDE = 256
"""Up to this side an image is shown without loss."""

_LARGEST_SIDE = 768

Report = Mapping[str, Any]
GetImage = Callable[[str, int, int], Pixels | bytes]
"""Gives the image of a plan, prompt and repeat, or the WAV file of a recording."""


def build_page(report: Report, image: GetImage, *, shown: int) -> str:
    """Renders the page.

    Args:
        report: What `build_report` gave.
        image: Gives images.
        shown: Prompts with images at most, worst first.

    Raises:
        ModuleNotFoundError: Jinja2 or matplotlib is not installed; the message names the extra.
    """
    environment = _environment()
    colours = {p["name"]: PALETTE[i % len(PALETTE)] for i, p in enumerate(report["plans"])}
    return str(
        environment.get_template("report.html.j2").render(
            report=report,
            plans={plan["name"]: plan for plan in report["plans"]},
            similarity=next(m for m in report["metrics"] if m["name"] == report["similarity"]),
            colours=colours,
            size_colours=SIZE_COLOURS,
            wins={(win["against"], win["metric"]): win["share"] for win in report["wins"]},
            plots=list(filter(None, (_plot(report, m, colours) for m in report["metrics"]))),
            cases=[_case(report, index, image) for index in report["worst"][:shown]],
            details=_details(report),
            lossless_side=_LOSSLESS_SIDE,
            largest_side=_LARGEST_SIDE,
        )
    )


def _environment() -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the page needs Jinja2 ({error}); pip install 'ddit_rt[eval]'"
        ) from error
    environment = Environment(
        loader=FileSystemLoader(PAGES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = number
    environment.filters["share"] = _share
    environment.filters["size_colour"] = size_colour
    environment.filters["size_counts"] = _size_counts
    environment.filters["side"] = lambda size: int(size.removesuffix("p") or 1)
    return environment


def number(value: float) -> str:
    """Four significant digits; an exponent only below a thousandth."""
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:#.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def _share(share: Mapping[str, float]) -> str:
    return f"{share['value']:.0%} ({share['low']:.0%} to {share['high']:.0%})"


def _size_counts(sizes: Sequence[str]) -> str:
    """Patch sizes of a run in words: `"8 steps: 5 at 2p, 3 at p"`."""
    counts = ", ".join(f"{sizes.count(size)} at {size}" for size in sorted(set(sizes)))
    return f"{len(sizes)} steps: {counts}"


def _case(report: Report, index: int, image: GetImage) -> dict[str, Any]:
    """A prompt with the image of every plan, of the repeat where the main plan is worst."""
    entry = report["prompts"][index]
    own = entry["pictures"][report["main"]]
    repeat = min(range(len(own)), key=lambda i: float(own[i]["scores"][report["similarity"]]))
    return {
        "prompt": entry["prompt"],
        "seed": own[repeat]["seed"],
        "made": [
            {
                **entry["pictures"][plan["name"]][repeat],
                "plan": plan,
                "uri": data_uri(image(plan["name"], index, repeat)),
            }
            for plan in report["plans"]
        ],
    }


def data_uri(image: Pixels | bytes) -> str:
    """An image inside the page: without loss where it is small, else a smaller JPEG.

    A WAV file as it is.
    """
    if isinstance(image, bytes):
        return _uri("audio/wav", image)
    shown, buffer = Image.fromarray(image), io.BytesIO()
    if max(shown.size) <= _LOSSLESS_SIDE:
        shown.save(buffer, format="PNG", optimize=True)
        return _uri("image/png", buffer.getvalue())
    shown.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
    shown.save(buffer, format="JPEG", quality=90)
    return _uri("image/jpeg", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _plot(
    report: Report, metric: Mapping[str, Any], colours: Mapping[str, str]
) -> dict[str, Any] | None:
    """A metric against time; None where no plan has a score."""
    figure = quality_figure(report["plans"], metric, colours, report["makes"])
    if figure is None:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    side = "Up" if metric["higher_is_better"] else "Down"
    return {"uri": _uri("image/svg+xml", buffer.getvalue()), "metric": metric, "side": side}


def quality_figure(
    plans: Sequence[Mapping[str, Any]],
    metric: Mapping[str, Any],
    colours: Mapping[str, str],
    makes: str = "image",
) -> Figure | None:
    """Draws a score against seconds with 95% intervals, and the front that no other plan beats.

    Args:
        plans: The entries `plans` of a report.
        metric: The metric's entry.
        colours: A colour for each plan by name.
        makes: What a run makes.

    Returns:
        None where no plan has a score.
    """
    scores = {plan["name"]: plan["scores"].get(metric["name"]) for plan in plans}
    scored = [p for p in plans if (s := scores[p["name"]]) and s["value"] is not None]
    if not scored:
        return None
    figure = new_figure((5.6, 3.9))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for plan in scored:
        x, y, name = plan["seconds"], scores[plan["name"]], plan["name"]
        axes.errorbar(
            x["value"],
            y["value"],
            xerr=_reach(x),
            yerr=_reach(y),
            fmt="o",
            color=colours[name],
            label=plan["title"],
        )
    sign = 1 if metric["higher_is_better"] else -1
    front = pareto_front(
        scored,
        lambda plan: float(plan["seconds"]["value"]),
        lambda plan: sign * float(scores[plan["name"]]["value"]),
    )
    xs = [plan["seconds"]["value"] for plan in front]
    ys = [scores[plan["name"]]["value"] for plan in front]
    axes.step(xs, ys, where="post", color="#57606a", linestyle="--", lw=1.2, zorder=1)
    axes.margins(0.12)
    axes.grid(visible=True, alpha=0.3)
    axes.set_xlabel(f"seconds of the denoising loop, per {makes}")
    axes.set_ylabel(textwrap.fill(metric["label"], 36))
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return figure


def _reach(interval: Mapping[str, float | None]) -> list[list[float]]:
    """How far an interval reaches below and above its value; a bound that is missing lies on it."""
    value, low, high = (interval.get(name) for name in ("value", "low", "high"))
    assert value is not None, "plans without a value are left out"
    return [[0.0 if low is None else value - low], [0.0 if high is None else high - value]]


def _details(report: Report) -> dict[str, str]:
    policies = {
        plan["title"]: {"steps": plan["num_inference_steps"], **plan["policy"]}
        for plan in report["plans"]
    }
    names = ("settings", "costs", "sessions", "machine", "versions", "model", "artifact")
    parts = {"plans": policies, **{name: report[name] for name in names}}
    return {name: json.dumps(value, indent=1) for name, value in parts.items()}
