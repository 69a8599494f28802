"""The frontier as a figure and a page: one self-contained file each. `facts` is what `preftune frontier` writes as frontier.json."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import Any

from .charts import COLOURS, Chart, page_svg
from .forest import standing_alone

# A method is a colour and a mark, so that it can be told without colour; as many methods as pairs of them.
PAINT = [(colour, mark) for mark in "osD^v" for colour in ("blue", "orange", "green")]
EXACT = "the best there is"


def _paint(facts: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    return {name: PAINT[i % len(PAINT)] for i, name in enumerate(facts["methods"])}


def frontier_svg(facts: Mapping[str, Any], *, alone: bool = False) -> str:
    """Reward against KL: every point small, where runs ended large with 95% bars, each method's hull as a line. The same facts give the
    same bytes. `alone`: as a file of its own."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "frontier", "font.size": 9})
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.add_subplot()
        if facts["exact"]:
            x, y = zip(*facts["exact"], strict=True)
            axes.plot(x, y, color=COLOURS["axis"], linewidth=1.1, linestyle=(0, (4, 3)), label=EXACT)
        for name, (tint, mark) in _paint(facts).items():
            colour = COLOURS[tint]
            own = [p for p in facts["points"] if p["method"] == name]
            path, ends = [p for p in own if not p["last"]], [p for p in own if p["last"]]
            axes.plot([p["kl"] for p in path], [p["reward"] for p in path], mark, color=colour, markersize=2.4, alpha=0.45, linewidth=0)
            axes.errorbar([p["kl"] for p in ends], [p["reward"] for p in ends], yerr=[1.96 * (p["reward_se"] or 0) for p in ends],
                          xerr=[1.96 * (p["kl_se"] or 0) for p in ends], fmt=mark, color=colour, markersize=5, elinewidth=0.7,
                          label=name)  # fmt: skip
            x, y = zip(*facts["methods"][name]["curve"], strict=True)
            axes.plot(x, y, color=colour, linewidth=1.3)
        axes.set_xlim(left=min(0.0, *(p["kl"] for p in facts["points"])))
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(COLOURS["grid"])
        axes.tick_params(color=COLOURS["grid"], labelcolor=COLOURS["axis"])
        axes.grid(color=COLOURS["grid"], linewidth=0.5)
        axes.set_axisbelow(True)
        axes.set_xlabel("KL from the start, nats a response", color=COLOURS["axis"])
        axes.set_ylabel("reward", color=COLOURS["axis"])
        axes.legend(frameon=False, labelcolor=COLOURS["axis"], fontsize=8, loc="lower right")
        buffer = StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    text = page_svg(buffer.getvalue(), Chart("Reward against KL from the start, by method", "", "", ()))
    return standing_alone(text) if alone else text


def frontier_page(facts: Mapping[str, Any]) -> str:
    """The page: figure, table of methods, differences, what failed, how it was made."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from . import visible

    page = Environment(loader=PackageLoader("preftune"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                       finalize=lambda found: found if isinstance(found, Markup) else visible(found))  # fmt: skip
    page.filters["number"] = lambda x: f"{x:.3f}"
    page.filters["signed"] = lambda x: f"{x:+.3f}"
    order = sorted(facts["methods"].items(), key=lambda item: -item[1]["area"]["mean"])
    return page.get_template("frontier.html").render(facts=facts, order=order, plot=Markup(frontier_svg(facts)))
