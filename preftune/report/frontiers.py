"""The frontier as a figure and a page: one self-contained file each. `facts` is what `preftune frontier` writes as frontier.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .charts import COLOURS, plot
from .forest import standing_alone

# A method is a colour and a mark, so that it can be told without colour; as many methods as pairs of them.
PAINT = [(colour, mark) for mark in "osD^v" for colour in ("blue", "orange", "green")]
EXACT = "the best there is"


def _paint(facts: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    return {name: PAINT[i % len(PAINT)] for i, name in enumerate(facts["methods"])}


def frontier_svg(facts: Mapping[str, Any], *, alone: bool = False) -> str:
    """Reward against KL: every point small, where runs ended large with 95% bars, each method's hull as a line. The same facts give the
    same bytes. `alone`: as a file of its own."""

    def fill(axes: Any) -> None:
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
        axes.legend(frameon=False, labelcolor=COLOURS["axis"], fontsize=8, loc="lower right")

    text = plot("Reward against KL from the start, by method", (7.2, 4.6), fill, x="KL from the start, nats a response", y="reward")
    return standing_alone(text) if alone else text


def frontier_page(facts: Mapping[str, Any]) -> str:
    """The page: figure, table of methods, differences, what failed, how it was made."""
    from markupsafe import Markup

    from . import filled

    order = sorted(facts["methods"].items(), key=lambda item: -item[1]["area"]["mean"])
    shown = {"facts": facts, "order": order, "plot": Markup(frontier_svg(facts))}
    return filled("frontier.html", shown, number=lambda x: f"{x:.3f}", signed=lambda x: f"{x:+.3f}")
