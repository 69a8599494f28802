"""The pages of `evaluate` and `compare`: one self-contained file each, no script, no request. Text of models and data is hostile: escaped,
and what cannot be seen is made visible.

`facts` is what the verb writes as JSON, so that a page can be made of a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..screen import with_error, with_interval


def _page(template: str, **contents: Any) -> str:
    from . import filled

    return filled(template, contents, shade=shade, interval=with_interval, number=lambda x, se=None: with_error(x, se, ".4g", ".2g"))


def shade(value: float | None, largest: float) -> str:
    """A background for a token: green where it adds to the reward, orange where it takes away, the stronger the more."""
    share = 0.0 if value is None or largest == 0 else min(1.0, abs(value) / largest)
    return f"background: color-mix(in srgb, var(--{'green' if (value or 0) > 0 else 'orange'}) {70 * share:.0f}%, transparent)"


def reliability_svg(bins: Sequence[Mapping[str, Any]]) -> str:
    """What was said against what came true, with intervals; the diagonal is perfect calibration. An SVG element in the page's colours."""
    side, inner = 240, 200
    place = lambda x, y: (30 + inner * 2 * (x - 0.5), 10 + inner * (1 - y))  # noqa: E731  confidence is from 0.5 to 1, shares from 0 to 1
    parts = [f'<svg role="img" aria-label="Reliability: predicted against observed" viewBox="0 0 {side} {side}" width="320">']
    for share in (0, 0.25, 0.5, 0.75, 1):
        _, y = place(0.5, share)
        parts.append(f'<line x1="30" x2="230" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--grid)" stroke-width=".6"/>'
                     f'<text x="26" y="{y + 3:.1f}" text-anchor="end" font-size="9" fill="var(--axis)">{share:g}</text>')  # fmt: skip
    for sure in (0.5, 0.6, 0.7, 0.8, 0.9, 1):
        x, _ = place(sure, 0)
        parts.append(f'<text x="{x:.1f}" y="224" text-anchor="middle" font-size="9" fill="var(--axis)">{sure:g}</text>')
    (x1, y1), (x2, y2) = place(0.5, 0.5), place(1, 1)
    parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="var(--axis)" stroke-dasharray="4 3"/>')
    for row in bins:
        x, y = place(row["said"], row["came"])
        if row["low"] is not None and row["high"] is not None:
            (_, low), (_, high) = place(0.5, row["low"]), place(0.5, row["high"])
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="var(--blue)" stroke-width="1.4"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--blue)"/>')
    return "".join(parts) + "</svg>"


def evaluation_page(facts: Mapping[str, Any]) -> str:
    """The page of an evaluation: a section for each data file."""
    from markupsafe import Markup

    plots = [Markup(reliability_svg(file["calibration"]["bins"])) if file.get("calibration") else None for file in facts["files"]]
    return _page("evaluation.html", facts=facts, plots=plots)


MOST_SHOWN = 500  # comparisons on a page; the files beside it hold all


def comparison_page(facts: Mapping[str, Any], duels: Sequence[Mapping[str, Any]]) -> str:
    """The page of two models: what was found, then the answers side by side, to be filtered by who won.

    Args:
        duels: per comparison 'prompt', 'a', 'b', 'score_a', 'score_b' (or None) and 'won': 'a', 'b', 'tie' or 'open'.
    """
    count = {kind: sum(d["won"] == kind for d in duels) for kind in ("a", "b", "tie", "open")}
    return _page("comparison.html", facts=facts, duels=duels[:MOST_SHOWN], total=len(duels), count=count)
