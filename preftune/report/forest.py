"""Ratings as a forest plot and a page: one self-contained file each. Names are foreign text: shown, never obeyed.

`facts` is what `preftune rate --json` writes, so that a page can be made of a file.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from io import StringIO
from typing import Any

from .charts import COLOURS, Chart, page_svg

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
    import matplotlib
    from matplotlib.figure import Figure

    lines = facts["ratings"][:MOST_LINES]
    places = range(len(lines))
    value = [line["rating"] for line in lines]
    error = [[line["rating"] - line["low"] for line in lines], [line["high"] - line["rating"] for line in lines]]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ratings", "font.size": 9})
        figure = Figure(figsize=(7.2, 0.9 + 0.24 * len(lines)), layout="constrained")
        axes = figure.add_subplot()
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
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(COLOURS["grid"])
        axes.tick_params(color=COLOURS["grid"], labelcolor=COLOURS["axis"])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=COLOURS["grid"], linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(facts["unit"], color=COLOURS["axis"])
        buffer = StringIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a missing glyph: the reader's font will have it
            figure.savefig(buffer, format="svg", transparent=True)
    text = page_svg(buffer.getvalue(), Chart("Ratings with their intervals", "", "", ()))
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
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from . import visible

    page = Environment(
        loader=PackageLoader("preftune"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda found: found if isinstance(found, Markup) else visible(found),
    )
    plain = facts["scale"] == "elo"
    page.filters["number"] = lambda x: f"{x:.0f}" if plain else f"{x:.3f}"
    page.filters["signed"] = lambda x: f"{x:+.0f}" if plain else f"{x:+.3f}"
    shown = facts["differences"] if len(facts["ratings"]) <= MOST_COMPARED else None
    return page.get_template("ratings.html").render(
        facts=facts, plot=Markup(forest_svg(facts)), plotted=min(len(facts["ratings"]), MOST_LINES), differences=shown
    )
