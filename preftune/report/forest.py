"""Ratings as a forest plot and a page: one self-contained file each. Names are foreign text: shown, never obeyed.

`facts` is what `preftune rate --json` writes, so that a page can be made of a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .charts import COLOURS, plot

MOST_LINES = 80  # of a plot; a longer one is no picture. The table holds all
MOST_COMPARED = 24  # players up to which the page shows all differences
LONGEST_NAME = 44
PALETTE = {"axis": "#6b7280", "grid": "#d9d6ce", "faint": "#b9b5aa", "blue": "#2b6cb0", "orange": "#c05621", "green": "#2f855a"}


def _short(name: str) -> str:
    from . import visible

    name = " ".join(visible(name).split())
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def forest_svg(facts: Mapping[str, Any], *, alone: bool = False) -> str:
    """Rating and interval of each player, best on top, as an SVG element that takes the page's colours; `alone`: as a file of its own.

    At most MOST_LINES players. The same facts give the same bytes.
    """
    lines = facts["ratings"][:MOST_LINES]
    places = range(len(lines))
    value = [line["rating"] for line in lines]
    error = [[line["rating"] - line["low"] for line in lines], [line["high"] - line["rating"] for line in lines]]

    def fill(axes: Any) -> None:
        # An interval of percentiles may leave the estimate out; a bar cannot be negative.
        axes.errorbar(
            value,
            places,
            xerr=[[max(0.0, e) for e in side] for side in error],
            fmt="o",
            color=COLOURS["blue"],
            markersize=4,
            linewidth=1.4,
            capsize=2.2,
        )
        axes.axvline(facts["zero"], color=COLOURS["axis"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_yticks(list(places), [_short(line["name"]) for line in lines], parse_math=False)  # '$' is a letter here
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    text = plot("Ratings with their intervals", (7.2, 0.9 + 0.24 * len(lines)), fill, x=facts["unit"], y="", grid="x")
    return standing_alone(text) if alone else text


def standing_alone(text: str) -> str:
    """An SVG element of a page as a file of its own, with the colours of a page in light."""
    colours = "".join(f"--{name}:{colour};" for name, colour in PALETTE.items())
    style = f"<style>svg{{{colours}background:#fff;font-family:system-ui,sans-serif}}</style>"
    head, body = text.split(">", 1)
    head += "" if "xmlns=" in head else ' xmlns="http://www.w3.org/2000/svg"'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>{style}{body}\n'


def ratings_page(facts: Mapping[str, Any]) -> str:
    """The page: forest plot, table, effects, differences of any two, how it was made."""
    from markupsafe import Markup

    from . import filled

    digits, count = 0 if facts["scale"] == "elo" else 3, len(facts["ratings"])
    shown = {"facts": facts, "plot": Markup(forest_svg(facts)), "plotted": min(count, MOST_LINES),
             "differences": facts["differences"] if count <= MOST_COMPARED else None}  # fmt: skip
    return filled("ratings.html", shown, number=lambda x: f"{x:.{digits}f}", signed=lambda x: f"{x:+.{digits}f}")
