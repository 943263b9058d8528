"""The page in a headless Chromium."""

from __future__ import annotations

import io
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from extras import need
from PIL import Image
from playgrounds import PLAN, AtStep, browsing, playing
from served import PAUSE, process_of, tiny_engine

from ddit_rt import Engine
from ddit_rt.lab.demo.plans import demo_calibration

need("playwright")

from playwright.sync_api import Page, expect  # noqa: E402 - after what skips without it

pytestmark = pytest.mark.slow
expect.set_options(timeout=60_000)

SCREENSHOT = "DDIT_RT_SCREENSHOT"
"""Names the file that a picture of the demo's page goes to."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = tiny_engine()
    engine.artifact = engine.artifact.with_calibration(demo_calibration())
    return engine


@pytest.fixture(scope="module")
def url(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with playing(engine, tmp_path_factory.mktemp("pictures")) as url:
        yield url


@pytest.fixture(scope="module")
def browser(url: str) -> Iterator[Any]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Callable[[], Page]]:
    """Opens a page, all of whose requests are looked at in the end."""
    asked: list[str] = []
    problems: list[str] = []
    pages: list[Page] = []

    def opened() -> Page:
        page: Page = browser.new_page(viewport={"width": 1360, "height": 900})
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        page.get_by_label("Prompt", exact=True).fill("a fox")
        page.get_by_label("Steps").fill("4")
        choose(page, PLAN)
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    hosts = {urlsplit(one).hostname for one in asked if not one.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}, "the page asks for nothing from elsewhere"
    assert problems == []


@pytest.fixture
def page(open_page: Callable[[], Page]) -> Page:
    return open_page()


def choose(page: Page, plan: str) -> None:
    field = page.locator("#plan input")
    field.fill(plan)
    field.press("Enter")
    field.press("Tab")


def press(page: Page, button: str) -> None:
    page.get_by_role("button", name=button, exact=True).click()


def width_of(page: Page, picture: str) -> Callable[[int], None]:
    """Waits for a picture of a width in its own pixels."""

    def shows(width: int) -> None:
        look = f"document.querySelector('#{picture} img')?.naturalWidth === {width}"
        page.wait_for_function(look)

    return shows


def test_a_picture_comes_with_the_timeline_of_its_steps(page: Page) -> None:
    press(page, "Generate")
    width_of(page, "picture")(64)
    timeline = page.locator("#timeline svg")
    expect(timeline).to_be_visible()
    for title in ("patch size of each step", "score (line)", "time per step, ms"):
        expect(timeline).to_contain_text(title)
    expect(page.locator("#progress")).to_contain_text("2 of 4 steps coarse")
    cells = page.locator("#progress .ddit-strip i")
    expect(cells).to_have_count(4)
    assert [cell.get_attribute("title") for cell in cells.all()] == [
        "step 0: 2p",
        "step 1: 2p",
        "step 2: p",
        "step 3: p",
    ]
    expect(page.get_by_role("alert")).to_have_count(0)


def test_previews_and_steps_are_shown_while_it_denoises(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = AtStep(1, monkeypatch)
    press(page, "Generate")
    expect(page.locator("#progress")).to_contain_text("step 2 of 4")
    width_of(page, "picture")(16)
    held.go.set()
    width_of(page, "picture")(64)


def test_full_resolution_is_shown_side_by_side(page: Page) -> None:
    page.get_by_label("Side by side").check()
    press(page, "Generate")
    width_of(page, "picture")(64)
    width_of(page, "reference")(64)
    expect(page.locator("#progress")).to_contain_text("x as fast")
    expect(page.locator("#timeline svg")).to_contain_text("full resolution")
    page.get_by_label("Side by side").uncheck()
    press(page, "Generate")
    expect(page.locator("#reference")).to_be_hidden()


def test_cancel_ends_the_run_within_a_step_and_the_next_one_is_unharmed(
    page: Page, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cancellations(url, "cancel")
    held = AtStep(2, monkeypatch)
    expect(page.get_by_role("button", name="Cancel")).to_be_disabled()
    page.get_by_label("Steps").fill("50")
    press(page, "Generate")
    expect(page.locator("#progress")).to_contain_text("step 3 of 50")
    press(page, "Cancel")
    until(lambda: cancellations(url, "cancel") == before + 1)
    held.go.set()
    expect(page.locator("#progress")).to_contain_text("cancelled after step 3 of 50")
    page.get_by_label("Steps").fill("4")
    press(page, "Generate")
    width_of(page, "picture")(64)
    assert held.taken == [0, 1, 2, 0, 1, 2, 3]


def cancellations(url: str, reason: str) -> float:
    """Of the server's runs, so far."""
    metrics = httpx.get(f"{url}/metrics").text
    sample = re.search(rf'ddit_rt_cancellations_total{{reason="{reason}"}} (\S+)', metrics)
    return float(sample[1]) if sample else 0.0


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(PAUSE)


def test_closing_the_page_ends_its_run(
    open_page: Callable[[], Page], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cancellations(url, "disconnect")
    held = AtStep(2, monkeypatch)
    page, other = open_page(), open_page()
    page.get_by_label("Steps").fill("50")
    press(page, "Generate")
    expect(page.locator("#progress")).to_contain_text("step 3 of 50")
    page.close()
    until(lambda: cancellations(url, "disconnect") == before + 1)
    held.go.set()
    press(other, "Generate")
    width_of(other, "picture")(64)
    assert held.taken == [0, 1, 2, 0, 1, 2, 3]


def test_pages_wait_for_each_other(
    open_page: Callable[[], Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = AtStep(2, monkeypatch)
    first, second = open_page(), open_page()
    press(first, "Generate")
    expect(first.locator("#progress")).to_contain_text("step 3 of 4")
    press(second, "Generate")
    expect(second.locator("#progress")).to_contain_text("waiting")
    held.go.set()
    for page in (first, second):
        width_of(page, "picture")(64)


def test_bad_input_is_told_in_the_page(page: Page) -> None:
    page.get_by_label("Steps").fill("101")
    press(page, "Generate")
    alert = page.get_by_role("alert")
    expect(alert).to_have_text("steps is beyond this server's limit: at most 100")
    assert "Traceback" not in page.content()
    page.get_by_label("Steps").fill("3")
    press(page, "Generate")
    width_of(page, "picture")(64)
    expect(alert).to_have_count(0)


@pytest.mark.filterwarnings("ignore:the plan was calibrated with height=128")
def test_moving_the_slider_chooses_the_plan_and_says_what_it_is(page: Page) -> None:
    page.get_by_label("Steps").fill("24")
    slider = page.locator("#speed input[type=range]")
    slider.fill("0.6")
    expect(page.locator("#plan input")).to_have_value("by the speed below")
    plan = demo_calibration().plan(0.6)
    expect(page.locator("#speed")).to_contain_text(plan.label)
    press(page, "Generate")
    expect(page.locator("#timeline")).to_contain_text("0.6 of the calibration for 24 steps")


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[str]:
    """Base URL of `ddit-rt ui demo`, which ends while a page is open, and leaves nothing behind."""
    log, pictures = tmp_path / "log", tmp_path / "pictures"
    pictures.mkdir()
    command = ["-m", "ddit_rt.cli", "ui", "demo", "--port", "0"]
    with process_of(command, log, TMPDIR=str(pictures)) as (process, url):
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert list(pictures.glob("ddit_rt-ui-*")) == []


def test_the_demo_is_shown(demo: str, browser: Any) -> None:
    """Writes docs/playground.png, if `DDIT_RT_SCREENSHOT` names that."""
    page = browser.new_page(viewport={"width": 1280, "height": 800}, device_scale_factor=1.5)
    page.goto(demo)
    page.get_by_role("button", name="a green triangle on yellow stripes").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(
        "a green triangle on yellow stripes"
    )
    page.get_by_label("Side by side").check()
    for seed in ("8", "7"):  # the first run has allocations of its own in its times
        page.get_by_label("Seed").fill(seed)
        press(page, "Generate")
        expect(page.locator("#progress")).to_contain_text(re.compile(f"x as fast.*seed {seed}.*"))
        expect(page.locator("#timeline svg")).to_contain_text("full resolution")
        width_of(page, "reference")(128)
        expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    if os.environ.get(SCREENSHOT):
        page.mouse.move(0, 0)
        shot = io.BytesIO(page.screenshot(full_page=True, animations="disabled"))
        colours = Image.open(shot).convert("RGB").quantize(128, dither=Image.Dither.NONE)
        colours.save(os.environ[SCREENSHOT], optimize=True)
