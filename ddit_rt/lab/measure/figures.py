"""What all figures share: an empty figure, and colours that everybody tells apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers tell apart too.
BLACK, GREY = "#000000", "#999999"
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, RED, YELLOW, BROWN = "#56B4E9", "#D55E00", "#F0E442", "#7F5539"

PALETTE = (GREY, BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW)
"""Colours of a series of things, the first of which is the reference."""

SIZE_COLOURS = {"p": BLUE, "2p": ORANGE, "4p": GREEN}


def size_colour(size: str) -> str:
    """Colour of a patch size."""
    return SIZE_COLOURS.get(size, PINK)


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty white figure of `size` inches, without pyplot's global state.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"figures need matplotlib ({error}); pip install 'ddit_rt[eval]'"
        ) from error
    return Figure(figsize=size, facecolor="white")
