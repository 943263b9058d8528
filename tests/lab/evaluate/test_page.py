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
from evaluations import HOSTILE
from extras import need
from PIL import Image

from ddit_rt.lab.evaluate.page import data_uri, quality_figure

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
    images = [image["src"] for image in page.all("img") if "image/png" in image.get("src", "")]
    assert len(images) == 2 * 4
    # Small images are the very ones of the folder.
    worst = json.loads((evaluation / "report.json").read_text())["worst"][0]
    with Image.open(io.BytesIO(base64.b64decode(images[0].partition(",")[2]))) as image:
        first = np.asarray(image)
    found = [evaluation / "pictures" / "fine" / f"{worst:05d}-{repeat}.png" for repeat in (0, 1)]
    assert any(np.array_equal(first, np.asarray(Image.open(file))) for file in found)
    timelines = [element for element in page.all("div") if element.get("class") == "timeline"]
    assert len(timelines) == 2 * 4
    assert timelines[0]["aria-label"] == "8 steps: 8 at p"
    bars = [bar["style"] for bar in page.all("i")]
    assert len(bars) == sum(int(line["aria-label"].split()[0]) for line in timelines)
    assert bars[0] == "height:100%;background:#0072B2"


def test_page_names_what_is_not_there_and_prompts_are_text(page: Reader, evaluation: Path) -> None:
    assert "TeaCache: there are no teacache coefficients for this" in page.text
    assert "LPIPS: not installed: <torchvision>" in page.text
    written = (evaluation / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in written
    assert "<script>alert" not in written


def test_large_image_becomes_a_smaller_jpeg() -> None:
    image = np.zeros((1000, 2000, 3), np.uint8)
    uri = data_uri(image)
    assert uri.startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert image.size == (768, 384)


def plan(name: str, seconds: float, score: float | None, **bounds: float) -> dict[str, Any]:
    interval = {"value": score, "low": None, "high": None, **bounds}
    return {
        "name": name,
        "title": f"plan {name}",
        "seconds": {"value": seconds, "low": None, "high": None},
        "scores": {"m": interval},
    }


def drawn(plans: list[dict[str, Any]], *, higher_is_better: bool = True) -> Any:
    need("matplotlib")
    metric = {"name": "m", "label": "a score", "higher_is_better": higher_is_better}
    figure = quality_figure(plans, metric, {each["name"]: "#000000" for each in plans})
    return None if figure is None else figure.axes[0]


PLANS = [plan("a", 1, 0.5), plan("b", 2, 0.4), plan("c", 3, 0.9), plan("d", 3, 0.8)]


@pytest.mark.parametrize(
    ("higher_is_better", "front"),
    [(True, [(1, 0.5), (3, 0.9)]), (False, [(1, 0.5), (2, 0.4)])],
)
def test_dashed_line_is_the_front_that_nothing_beats(
    higher_is_better: bool, front: list[tuple[float, float]]
) -> None:
    axes = drawn(PLANS, higher_is_better=higher_is_better)
    (line,) = (line for line in axes.lines if line.get_linestyle() == "--")
    assert [tuple(point) for point in line.get_xydata()] == front


def test_every_plan_with_a_score_is_a_point_with_its_interval() -> None:
    assert drawn([plan("fine", 5, None)]) is None
    axes = drawn([plan("slow", 3, 0.9, low=0.7, high=1.0), plan("fine", 5, None), PLANS[0]])
    found = {container.get_label(): container for container in axes.containers}
    assert found.keys() == {"plan slow", "plan a"}
    ((low, high),) = (segment[:, 1] for segment in found["plan slow"].lines[2][1].get_segments())
    assert (low, high) == pytest.approx((0.7, 1.0))
