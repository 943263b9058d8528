"""The page: where its controls stand, and its colours.

Fonts are the system's, and nothing is loaded from elsewhere: it works without a network.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr

from ddit_rt.artifact.calibration import PRESETS
from ddit_rt.lab.measure.figures import size_colour
from ddit_rt.policies import POLICY_NAMES
from ddit_rt.serving.playground.events import OWN, REFERENCE, SPEED, Playground, Update

_SYSTEM = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "monospace")

CSS = """
.gradio-container {max-width: 1360px !important; margin: 0 auto !important}
.ddit-title h1 {font-size: 1.5rem; margin: 0; letter-spacing: -.01em}
.ddit-title p {margin: .1rem 0 0; color: var(--body-text-color-subdued); font-size: .86rem}
.ddit-title i {display: inline-block; width: .65em; height: .65em; border-radius: 2px;
  margin: 0 .25em 0 .8em}
.ddit-run {margin: 0 0 .7rem}
.ddit-head {display: flex; justify-content: space-between; gap: 1rem; font-size: .86rem;
  flex-wrap: wrap}
.ddit-head span {color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums}
.ddit-head em {font-style: normal; font-weight: 600; color: var(--color-accent)}
.ddit-strip {display: flex; gap: 2px; height: .8rem; margin-top: .3rem}
.ddit-strip i {flex: 1; border-radius: 2px; background: var(--border-color-primary)}
.ddit-problem {padding: .7rem .9rem; border-radius: 8px; border-left: 4px solid #D55E00;
  background: #D55E0018; font-size: .92rem}
.ddit-timeline {background: white; border-radius: 8px; padding: .4rem; overflow-x: auto}
.ddit-timeline svg {width: 100%; min-width: 640px; height: auto; display: block}
.ddit-notes {margin: .5rem 0 0 1.1rem; font-size: .8rem; color: var(--body-text-color-subdued)}
.ddit-picture img {width: 100%; height: 100%; object-fit: contain}
"""


class Controls(NamedTuple):
    """The components that a run is asked for with; all but the buttons are its inputs, in order."""

    prompt: Any
    plan: Any
    speed: Any
    steps: Any
    seed: Any
    compare: Any
    go: Any
    stop: Any


def theme() -> Any:
    """Colours and fonts."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=_SYSTEM,
        font_mono=_MONO,
        radius_size="md",
    )


def build(playground: Playground, examples: Sequence[str]) -> Any:
    """The page of a playground, with prompts to offer."""
    with gr.Blocks(
        title="ddit_rt playground",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(600, 3600),  # seconds: how often it looks for images, and how old
    ) as page:
        gr.HTML(_title(playground))
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                controls = _controls(playground, examples)
            with gr.Column(scale=9, min_width=480):
                shown = _shown()
        _wire(playground, controls, shown)
    return page.queue(default_concurrency_limit=None)


def _title(playground: Playground) -> str:
    sizes = "".join(
        f'<i style="background:{size_colour(size)}"></i>{size}' for size in playground.sizes
    )
    about = html.escape(playground.about)
    return f'<div class="ddit-title"><h1>ddit_rt</h1><p>{about} · patch sizes{sizes}</p></div>'


def _controls(playground: Playground, examples: Sequence[str]) -> Controls:
    prompt = gr.Textbox(label="Prompt", lines=3, elem_id="prompt", autofocus=True)
    if examples:
        prompt.value = examples[0]
    calibrated = bool(playground.calibrations)
    plan = gr.Dropdown(
        choices=[
            ("the artifact's own", OWN),
            *([("by the speed below", SPEED)] if calibrated else []),
            *((name, name) for name in (PRESETS if calibrated else ())),
            *((name, name) for name in POLICY_NAMES),
        ],
        value=OWN,
        allow_custom_value=True,
        label="Patch sizes",
        info="or a plan as text, such as 4p:0.2,2p:0.4,p",
        elem_id="plan",
    )
    speed = gr.Slider(
        *(0, 1, 0.5),
        step=0.01,
        label="Speed",
        info=playground.describe(OWN, 0.5, None)["info"],
        interactive=calibrated,
        elem_id="speed",
        buttons=[],
    )
    speed.input(None, None, plan, js=f"() => '{SPEED}'", api_visibility="private")
    with gr.Row():
        steps = gr.Number(playground.steps, label="Steps", elem_id="steps", min_width=80)
        seed = gr.Number(7, label="Seed", info="empty: drawn", elem_id="seed", min_width=80)
    compare = gr.Checkbox(label=f"Side by side with {REFERENCE}", elem_id="compare")
    with gr.Row():
        go = gr.Button("Generate", variant="primary", elem_id="go", min_width=120)
        stop = gr.Button("Cancel", variant="stop", interactive=False, elem_id="stop", min_width=80)
    if examples:
        gr.Examples(list(examples), prompt, cache_examples=False, label="Prompts to try")
    return Controls(prompt, plan, speed, steps, seed, compare, go, stop)


def _shown() -> Update:
    message = gr.HTML(elem_id="message", visible=False)
    with gr.Row():
        picture = _picture("picture", "Picture")
        reference = _picture("reference", REFERENCE, visible=False)
    progress = gr.HTML(elem_id="progress")
    timeline = gr.HTML(elem_id="timeline")
    return Update(message, progress, picture, reference, timeline, go=None, stop=None)


def _picture(name: str, label: str, **settings: Any) -> Any:
    return gr.Image(
        label=label,
        elem_id=name,
        elem_classes="ddit-picture",
        interactive=False,
        format="png",
        height=400,
        min_width=220,
        buttons=["download", "fullscreen"],
        **settings,
    )


def _wire(playground: Playground, controls: Controls, shown: Update) -> None:
    *inputs, go, stop = controls
    gr.on(
        [go.click, controls.prompt.submit],
        playground.generate,
        inputs,
        list(shown._replace(go=go, stop=stop)),
        api_name="generate",
        show_progress="hidden",
        trigger_mode="once",
    )
    stop.click(playground.cancel, api_name="cancel", queue=False, show_progress="hidden")
    described = [controls.plan, controls.speed, controls.steps]
    gr.on(
        [control.change for control in described],
        playground.describe,
        described,
        controls.speed,
        api_visibility="private",
        queue=False,
        show_progress="hidden",
        trigger_mode="always_last",
    )
