"""The curves of a run as SVG elements that follow the page's colours: matplotlib draws, CSS variables paint.

    draw(CHARTS[0], trainings(metrics), evaluations(metrics))
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal

from .findings import Z95, Row, value


@dataclass(frozen=True)
class Line:
    """A curve: its name in the legend, the metric, a colour of the page, and what its band is made of.

    `band`: keys of the lower and upper end, or of a standard error (then 1.96 of them), or nothing.
    """

    name: str
    key: str
    colour: str
    band: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A figure: training lines are drawn thin, evaluation lines with a dot for every evaluation."""

    title: str
    text: str
    unit: str
    lines: tuple[Line, ...]
    x: str = "step"
    rule: float | None = None  # a horizontal line that means something: chance, zero
    rules: tuple[float, ...] = ()  # more of them, known once the run is: a limit, the ends of a band


CHARTS = (
    Chart("Loss", "Training loss per step and held-out loss.", "loss",
        (Line("training", "loss", "faint"), Line("held out", "eval/loss", "blue"))),
    Chart("Accuracy", "Share of pairs in which the model puts the preferred answer first, Wilson's 95% interval. Dashed: chance.",
        "share", (Line("training", "rewards/accuracies", "faint"),
        Line("held out", "eval/rewards/accuracies", "blue", ("eval/accuracy_low", "eval/accuracy_high"))), rule=0.5),
    Chart("Implicit rewards", "Beta times the log-ratio to the reference, held-out pairs; their difference is the margin.",
        "reward",
        (Line("preferred", "eval/rewards/chosen", "blue"), Line("rejected", "eval/rewards/rejected", "orange"),
        Line("margin", "eval/rewards/margins", "green")), rule=0.0),
    Chart("Log-probability against the start", "How much likelier the held-out answers became, nats per answer. Both may fall.",
        "nats",
        (Line("preferred", "eval/displacement", "blue"), Line("rejected", "displacement/rejected", "orange")), rule=0.0),
    Chart("Reward of sampled answers", "Mean reward of the model's own answers to held-out prompts, 95% band.", "reward",
        (Line("sampled", "reward", "green", ("reward_se",)), Line("its truth", "truth", "blue", ("truth_se",)))),
    Chart("Distance from the reference", "KL divergence on the model's own answers, 95% bands. "
        "Rao-Blackwell sums the exact KL of every token's distribution; Monte Carlo is the plain log-ratio.", "nats per answer",
        (Line("Monte Carlo", "kl_sequence_k1", "faint", ("kl_sequence_k1_se",)),
        Line("Rao-Blackwell", "kl_sequence_rb", "orange", ("kl_sequence_rb_se",)))),
    Chart("Reward against distance", "What was gained for how much movement: one dot per evaluation, the first on the left. "
        "A curve that bends down was driven too far.",
        "reward", (Line("sampled", "reward", "green", ("reward_se",)),), x="kl_sequence_rb"),
    Chart("Length of sampled answers", "Tokens per answer, 95% band.", "tokens",
        (Line("sampled", "sample_length", "orange", ("sample_length_se",)),)),
    Chart("Gradient norm", "Before clipping.", "norm", (Line("training", "grad_norm", "blue"),)),
    Chart("Learning rate", "As the schedule set it.", "rate", (Line("training", "learning_rate", "blue"),)),
)  # fmt: skip


def gate_charts(gate: Row, scored: Sequence[Row]) -> tuple[Chart, ...]:
    """What --stop plateau looked at: the reward and the change that counts as none, its fitted change, the KL under its limit."""
    if "reward" not in gate:
        return ()
    unit = "nats a token" if gate["unit"] == "token" else "nats per answer"
    key, band, of = "kl_token_rb" if gate["unit"] == "token" else "kl_sequence_rb", gate["reward"]["band"], gate["of"]
    seen = [x for row in scored if gate["first"] <= row["step"] <= gate["last"] and (x := value(row, of)) is not None]
    middle = sum(seen) / max(1, len(seen))
    return (
        Chart("The reward and its plateau", "Mean reward of the model's own answers, 95% band. The dashed lines lie as far apart as the "
            f"change over {gate['window']} evaluations that counts as none, around the mean of steps {gate['first']:,} to "
            f"{gate['last']:,}.",
            "reward",
            (Line("sampled", of, "green", (f"{of}_se",)),), rules=(middle - band / 2, middle + band / 2)),
        Chart("Is the reward flat?", f"Change of the mean reward along a line through the last {gate['window']} evaluations, 95% interval. "
            "Flat is where the whole interval lies between the dashed lines.", "reward",
            (Line("change over the window", "plateau/reward_change", "green", ("plateau/reward_low", "plateau/reward_high")),),
            rules=(-band, band)),
        Chart("KL against its limit", "KL to the reference on the model's own answers, 95% band. Dashed: the limit; no step above is kept.",
            unit, (Line("Rao-Blackwell", key, "orange", (f"{key}_se",)),), rules=(gate["limit"],)),
    )  # fmt: skip


CALIBRATION = Chart("Calibration", "How often what was predicted of held-out answers was so, by how sure the model was, 95% intervals. "
    "On the dashed line it is right as often as it says.", "share", ())  # fmt: skip
AXES = {"step": "step", "kl_sequence_rb": "KL, nats per answer"}
# Colours stand for CSS variables of the page, so that one drawing reads in light and in dark.
COLOURS = {"axis": "#0a0b01", "grid": "#0a0b02", "faint": "#0a0b03", "blue": "#0a0b04", "orange": "#0a0b05", "green": "#0a0b06"}
MOST_POINTS = 120


def points(rows: Sequence[Row], x: str, line: Line) -> list[tuple[float, float, float, float]]:
    """(x, y, low, high) of a line, at most MOST_POINTS of them: longer ones are averaged in groups of equal size."""
    out = []
    for row in rows:
        at, y = value(row, x), value(row, line.key)
        ends = [value(row, key) for key in line.band]
        if at is None or y is None:
            continue
        if len(ends) == 1:
            ends = [y - Z95 * (ends[0] or 0.0), y + Z95 * (ends[0] or 0.0)]
        low, high = (y if end is None else end for end in (ends or (y, y)))
        out.append((at, y, low, high))
    size = math.ceil(len(out) / MOST_POINTS) or 1
    groups = [out[i : i + size] for i in range(0, len(out), size)]
    return [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]  # type: ignore[misc]


def draw(chart: Chart, training: Sequence[Row], scored: Sequence[Row]) -> str:
    """The chart as an SVG element, or '' where there is nothing to draw. The same rows give the same bytes."""
    found = [(line, points([*training, *scored], chart.x, line)) for line in chart.lines]
    found = [(line, dots) for line, dots in found if len(dots) > 1]
    if not found:
        return ""

    def fill(axes: Any) -> None:
        for line, dots in found:
            x, y, low, high = zip(*dots, strict=True)
            colour, few = COLOURS[line.colour], any(line.key in row for row in scored)
            if line.band:
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(x, y, color=colour, linewidth=1.8 if few else 1.2, marker="o" if few else None, markersize=3.2)
        for rule in (*chart.rules, *(() if chart.rule is None else (chart.rule,))):
            axes.axhline(rule, color=COLOURS["axis"], linewidth=0.9, linestyle=(0, (4, 3)))

    return plot(chart.title, (4.8, 2.7), fill, x=AXES[chart.x], y=chart.unit, grid="y")


def plot(title: str, size: tuple[float, float], fill: Callable[[Any], None], *, x: str, y: str,
         grid: Literal["both", "x", "y"] = "both") -> str:  # fmt: skip
    """What `fill` draws on axes of the page's look, as an SVG element; x, y: their names. The same drawing gives the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a missing glyph: the reader's font will have it
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "path.simplify": True})
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(COLOURS["grid"])
        axes.tick_params(color=COLOURS["grid"], labelcolor=COLOURS["axis"])
        axes.grid(axis=grid, color=COLOURS["grid"], linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(x, color=COLOURS["axis"])
        axes.set_ylabel(y, color=COLOURS["axis"])
        fill(axes)
        buffer = StringIO()
        figure.savefig(buffer, format="svg", transparent=True)  # the date in its metadata is cut out below
    return _element(buffer.getvalue(), title)


def _element(text: str, title: str) -> str:
    """matplotlib's document as an element of the page: colours become variables, fonts and size are the page's."""
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font(-family)?: [^;\"]*?(\d[\d.]*px)?[^;\"]*(?=[;\"])", lambda m: f"font-size: {m[2]}" if m[2] else "", text)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    head, body = text.split(">", 1)
    text = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + body
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1).strip()
