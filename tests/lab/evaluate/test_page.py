"""The page as a browser's parser reads it."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddit_rt.lab.evaluate.cases import data_uri
from ddit_rt.lab.evaluate.plots import Mark, front, marks, pareto_plot, timeline

VOID = {"meta", "img", "input", "br"}


class Reader(HTMLParser):
    """Elements with attributes, text, and whether every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(evaluation: Path) -> Reader:
    reader = Reader((evaluation / "report.html").read_text(encoding="utf-8"))
    assert not reader.open
    return reader


def test_page_refers_to_nothing_outside(page: Reader) -> None:
    assert not page.all("link")
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert all("src" not in attributes for attributes in page.all("script"))
    (policy,) = (m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert "default-src 'none'" in policy


def test_worst_cases_have_slider_images_and_timelines(page: Reader, evaluation: Path) -> None:
    assert len(page.all("article")) == 2  # of three, as asked for
    assert "2 of 3 prompts" in page.text
    sliders = page.all("input")
    assert len(sliders) == 2
    assert all(slider["type"] == "range" and slider["aria-label"] for slider in sliders)
    images = [image["src"] for image in page.all("img") if "src" in image]
    assert len(images) == 2 * 4
    # Small images are the very ones of the folder.
    worst = json.loads((evaluation / "report.json").read_text())["worst"][0]
    with Image.open(io.BytesIO(base64.b64decode(images[0].partition(",")[2]))) as image:
        first = np.asarray(image)
    found = [evaluation / "pictures" / "fine" / f"{worst:05d}-{repeat}.png" for repeat in (0, 1)]
    assert any(np.array_equal(first, np.asarray(Image.open(file))) for file in found)
    timelines = [svg for svg in page.all("svg") if svg["class"] == "timeline"]
    assert len(timelines) == 2 * 4
    assert timelines[0]["aria-label"] == "8 steps: 8 at p"


def test_page_names_what_is_not_there(page: Reader) -> None:
    assert "TeaCache: there are no teacache coefficients for this" in page.text
    assert "LPIPS: not installed: <torchvision>" in page.text


def test_large_image_becomes_a_smaller_jpeg() -> None:
    image = np.zeros((1000, 2000, 3), np.uint8)
    uri = data_uri(image)
    assert uri.startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert image.size == (768, 384)


def mark(title: str, x: float, y: float) -> Mark:
    return Mark(title=title, colour="#000000", x=(x, x, x), y=(y, y, y))


def test_front_is_what_nothing_beats() -> None:
    points = [mark("a", 1, 0.5), mark("b", 2, 0.4), mark("c", 3, 0.9), mark("d", 3, 0.8)]
    assert [p.title for p in front(points, higher_is_better=True)] == ["a", "c"]
    assert [p.title for p in front(points, higher_is_better=False)] == ["a", "b"]


def test_plot_places_points_in_their_order() -> None:
    plot = Reader(
        pareto_plot(
            [mark("slow & good", 3, 0.9), mark("fast", 1, 0.5)],
            x_label="s",
            y_label="SSIM",
            higher_is_better=True,
        )
    )
    slow, fast = plot.all("circle")
    assert float(slow["cx"]) > float(fast["cx"])
    assert float(slow["cy"]) < float(fast["cy"])  # up is better
    assert "slow & good" in plot.text


def test_single_plan_and_score_still_plot() -> None:
    plot = pareto_plot([mark("a", 0.0, 0.0)], x_label="s", y_label="LPIPS", higher_is_better=False)
    assert "nan" not in plot


def test_plan_without_a_score_is_not_marked() -> None:
    one = {"value": 1.0, "low": None, "high": None}
    plans = [
        {"name": "fine", "title": "all fine", "seconds": one, "scores": {}},
        {"name": "a", "title": "a", "seconds": one, "scores": {"psnr": {**one, "value": None}}},
        {"name": "b", "title": "b", "seconds": one, "scores": {"psnr": one}},
    ]
    (found,) = marks(plans, "psnr")
    assert found.title == "b"
    assert found.y == (1, 1, 1)


def test_timeline_counts_sizes() -> None:
    strip = Reader(timeline(["p", "4p", "4p", "2p"]))
    assert strip.all("svg")[0]["aria-label"] == "4 steps: 1 at 2p, 2 at 4p, 1 at p"
    assert [float(bar["height"]) for bar in strip.all("rect")] == [100, 50, 50, 70.7]
