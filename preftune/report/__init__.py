"""One self-contained page about a run: what was learned, how sure that is, what it cost, how to do it again.

This room reads a run folder's files and writes `report.html`; it never loads torch. `findings` turns numbers into sentences,
`charts` turns them into curves, `templates/report.html` is everything else. The page needs no script and no network. Text of
models and data is hostile: it is escaped, and what cannot be seen is made visible.

    preftune report runs/x
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from .. import config
from ..errors import DataError, UsageError, nearest
from ..files import atomic_write, read_json, read_jsonl
from ..screen import clean
from .charts import CALIBRATION, CHARTS, Chart, draw, gate_charts
from .evaluated import reliability_svg
from .findings import (
    Z95,
    Finding,
    Row,
    duration,
    evaluations,
    findings,
    finite,
    gate_sentence,
    number,
    percent,
    signed,
    trainings,
    value,
    verdict,
)
from .frontiers import frontier_svg

__all__ = ["Finding", "findings", "gate_sentence", "summary", "verdict", "visible", "write"]
ORDINARY = 6  # prompts shown in the data's order, beside the largest gain and the largest loss
LONGEST_TEXT = 1500  # characters shown of a sample or a prompt
MOST_ROWS = 200  # rows of a table
IN_SUMMARY = ("Loss", "Accuracy", "Reward of sampled answers", "Distance from the reference")


@dataclass(frozen=True)
class Run:
    """What a run folder holds. `faults` names the files that could not be read."""

    name: str
    options: Row
    manifest: Row
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    results: Row | None
    extra: Row
    faults: tuple[str, ...]


def read_run(folder: Path) -> Run:
    """Every file of the run folder that is there; an unreadable one is named, not fatal.

    Raises UsageError where the folder is missing or was not made by a run.
    """
    if not folder.is_dir():
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise UsageError(f"{folder}: no such run folder{nearest(folder.name, beside)}")
    if not any((folder / name).exists() for name in ("config.yaml", "manifest.json", "metrics.jsonl", "results.json")):
        raise UsageError(f"{folder}: not a run folder: none of config.yaml, manifest.json, metrics.jsonl, results.json is there")
    faults: list[str] = []

    def get(name: str, read: Callable[[Path], Any], kind: type) -> Any:
        if not (folder / name).exists():
            return kind()
        try:
            found = read(folder / name)
        except DataError as error:
            faults.append(str(error).replace(f"{folder}/", ""))
            return kind()
        if not isinstance(found, kind):
            faults.append(f"{name}: holds no {kind.__name__}")
        return found if isinstance(found, kind) else kind()

    options, manifest = get("config.yaml", _read_yaml, dict), get("manifest.json", read_json, dict)
    metrics, samples = get("metrics.jsonl", read_jsonl, list), get("samples.jsonl", read_jsonl, list)
    results, extra = get("results.json", read_json, dict), get("extra.json", read_json, dict)
    return Run(folder.resolve().name, options, manifest, metrics, samples, results or None, extra, tuple(faults))


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"not readable as YAML: {str(error).splitlines()[0]}", path=path) from error


@dataclass(frozen=True)
class Shown:
    """One prompt with what the model said to it at the start and at the end (None: not sampled)."""

    label: str
    prompt: str
    before: Row
    after: Row | None


def side_by_side(samples: Sequence[Row]) -> tuple[list[Shown], int, int | None, list[float]]:
    """Which samples to show: the first few, the largest gain and the largest loss.

    Returns:
        what to show; of how many; the last step that was sampled, or None; per prompt the mean change of its reward.
    """
    steps: dict[int, dict[tuple[str, int], Row]] = {}
    for row in samples:
        at, prompt = steps.setdefault(row.get("step", 0), {}), _turns(row.get("prompt", ""))
        at[prompt, sum(key[0] == prompt for key in at)] = row
    last = max(steps, default=0)
    keys = [key for key in steps.get(0, {}) if key in steps[last]]
    pairs = [(prompt, steps[0][prompt, k], steps[last][prompt, k] if last else None) for prompt, k in keys]
    gains: dict[int, float] = {}
    by_prompt: dict[str, list[float]] = {}
    for i, (prompt, before, after) in enumerate(pairs):
        if (a := value(before, "reward")) is not None and (b := value(after, "reward")) is not None:
            gains[i] = b - a
            by_prompt.setdefault(prompt, []).append(b - a)
    labels = {i: f"Sample {i + 1}" for i in range(min(ORDINARY, len(pairs)))}
    for pick, sign, what in ((max, 1, "largest gain"), (min, -1, "largest loss")):
        best = pick(gains, key=gains.__getitem__, default=None)
        if best is not None and sign * gains[best] > 0:
            labels[best] = f"Sample {best + 1}: the {what}, {signed(gains[best])}"
    shown = [Shown(label, *pairs[i]) for i, label in labels.items()]
    return shown, len(pairs), last or None, [sum(g) / len(g) for g in by_prompt.values()]


def _turns(prompt: Any) -> str:
    if isinstance(prompt, list):
        return "\n\n".join(
            f"{turn.get('role')}: {turn.get('content')}" if isinstance(turn, dict) else str(turn) for turn in prompt
        )
    return str(prompt)


UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2028\u2029\u3164\ufe00-\ufe0e\uffa0\U000e0100-\U000e01ef]")


def visible(text: object) -> str:
    """Text in which nothing hides: control, bidi, zero-width and other invisible characters as <U+XXXX>; not yet escaped."""
    return UNSEEN.sub(lambda m: f"<U+{ord(m[0]):04X}>", clean(str(text).replace("\r\n", "\n")))


def marked(text: object, limit: int = LONGEST_TEXT) -> Any:
    """HTML of hostile text: escaped, invisible characters as marked symbols, cut at `limit` characters with the rest counted."""
    from markupsafe import Markup, escape

    whole, html = str(text).replace("\r\n", "\n"), Markup("")
    for hidden, group in groupby(whole[:limit], key=lambda c: visible(c) != c):
        if hidden:
            html += Markup("").join(Markup("<b>U+{:04X}</b>").format(ord(c)) for c in group)
        else:
            html += escape("".join(group))
    return html if len(whole) <= limit else html + Markup("<i> … {:,} more characters</i>").format(len(whole) - limit)


# ---------------------------------------------------------------- the page


@dataclass(frozen=True)
class Tile:
    """A key number. `low`, `high`, `mark` (0 to 1): where its interval and its point of comparison lie on a strip, or None."""

    name: str
    value: str
    text: str
    low: float | None = None
    high: float | None = None
    mark: float | None = None


def tiles(before: Row, after: Row, results: Row) -> Iterator[Tile]:
    """The numbers that a reader looks for first."""
    rate, low, high = (value(after, f"eval/{name}") for name in ("rewards/accuracies", "accuracy_low", "accuracy_high"))
    if rate is not None and low is not None and high is not None:
        yield Tile("held-out accuracy", percent(rate), f"95%: {percent(low)} to {percent(high)}; chance 50%", low, high, 0.5)
    paired = results.get("paired_reward")
    change, least, most = (value(paired, key) for key in ("difference", "low", "high"))
    if change is not None and least is not None and most is not None:
        reach = max(abs(least), abs(most)) or 1.0
        yield Tile("change of sampled reward", signed(change), f"95%: {signed(least)} to {signed(most)}; no change 0",
                   0.5 + 0.45 * least / reach, 0.5 + 0.45 * most / reach, 0.5)  # fmt: skip
    if (kl := value(after, "kl_sequence_rb")) is not None:
        se, token = value(after, "kl_sequence_rb_se"), value(after, "kl_token_rb")
        error = f", ± {number(se)} (one SE)" if se is not None else ""
        each = f"; {number(token)} per token" if token is not None else ""
        yield Tile("KL to the reference", number(kl), f"nats per answer{error}{each}")
    if (moved := value(after, "eval/displacement")) is not None:
        yield Tile("displacement", signed(moved), "nats: log-probability of preferred held-out answers against the reference")
    if (length := value(after, "sample_length")) is not None:
        start = value(before, "sample_length")
        yield Tile(
            "sampled length", number(length), f"tokens per answer{f'; {number(start)} before' if start is not None else ''}"
        )
    if (steps := value(results, "steps")) is not None:
        seconds = value(results, "seconds")
        yield Tile("training", f"{steps:,.0f}", f"steps{f' in {duration(seconds)}' if seconds is not None else ''}")


def plain(found: Any) -> str:
    """Any value of the run's files as text: numbers short, nothing as a dash."""
    if found is None or found == "":
        return "–"
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, int):
        return f"{found:,}"
    if isinstance(found, float):
        return f"{found:.6g}".replace("-", "−")
    if isinstance(found, (list, tuple)):
        return ", ".join(map(plain, found)) or "–"
    text = str(found)
    return text if len(text) <= 500 else f"{text[:500]} … {len(text) - 500:,} more characters"


def flat(table: Any, name: str = "") -> list[tuple[str, str]]:
    """(name, text) rows of nested tables, names joined by dots; at most MOST_ROWS."""
    rows: list[tuple[str, str]] = []
    for key, found in table.items() if isinstance(table, Mapping) else ():
        label = f"{name}.{key}" if name else str(key)
        rows += flat(found, label) if isinstance(found, Mapping) and found else [(label, plain(found))]
    return rows[:MOST_ROWS]


STAGE_OPTIONS = {"online": "OnlineDpo"}  # where the class of a verb's options is not called like the verb


def options_class(stage: str) -> type[config.Options] | None:
    """The class of a verb's options, if this version has the verb."""
    known = vars(config).get(STAGE_OPTIONS.get(stage, stage.capitalize()))
    return known if isinstance(known, type) and issubclass(known, config.Options) else None


def settings(options: Row, stage: str) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """(name, value, meaning) of the options that differ from their defaults, and of those that do not."""
    known = options_class(stage)
    specs = {spec.key: spec for spec in config.specs(known)} if known else {}
    chosen: list[tuple[str, str, str]] = []
    default: list[tuple[str, str, str]] = []
    for key, found in options.items():
        spec = specs.get(key)
        same = spec is not None and found == spec.default
        shown = ", ".join(f"{name} {text}" for name, text in flat(found)) if isinstance(found, Mapping) else plain(found)
        (default if same else chosen).append((str(key), shown or "–", spec.help if spec else ""))
    return chosen, default


def extras(extra: Row, faults: list[str]) -> Row | None:
    """extra.json if it has the documented form: title, paragraphs, tables of caption, columns and rows, perhaps the facts of a frontier
    (`frontiers.frontier_svg`), which are drawn; a fault otherwise."""
    paragraphs, tables = extra.get("paragraphs", []), extra.get("tables", [])
    sound = isinstance(paragraphs, list) and isinstance(tables, list) and all(
        isinstance(table, dict) and isinstance(table.get("columns"), list) and isinstance(table.get("rows"), list)
        and all(isinstance(row, list) for row in table["rows"]) for table in tables)  # fmt: skip
    if extra and not sound:
        faults.append("extra.json: expected title, paragraphs [text], tables [{caption, columns, rows}]")
    if not extra or not sound:
        return None
    cell = lambda found: "" if found == "" else plain(found)  # noqa: E731
    shown = [{"caption": table.get("caption", ""), "columns": [cell(c) for c in table["columns"]],
              "rows": [[cell(c) for c in row] for row in table["rows"][:MOST_ROWS]]} for table in tables]  # fmt: skip
    return {"title": extra.get("title", ""), "paragraphs": [plain(text) for text in paragraphs], "tables": shown,
            "figure": _figure(extra["frontier"], faults) if "frontier" in extra else None}  # fmt: skip


def _figure(facts: Any, faults: list[str]) -> Any:
    """The frontier as a picture, from its numbers, or None and a fault."""
    from markupsafe import Markup

    try:
        if any(visible(name) != name or "$" in name for name in facts["methods"]):
            raise ValueError("a method's name")
        return Markup(frontier_svg(facts))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        faults.append(f"extra.json: frontier cannot be drawn: {type(error).__name__}")
        return None


def measured(gains: Sequence[float]) -> Row | None:
    """The paired change of reward from the samples themselves, for a run that has no results."""
    if len(gains) < 2:
        return None
    mean = sum(gains) / len(gains)
    half = Z95 * (sum((g - mean) ** 2 for g in gains) / (len(gains) - 1) / len(gains)) ** 0.5
    return {"difference": mean, "low": mean - half, "high": mean + half}


def contents(run: Run, folder: Path, charts: Sequence[Chart] = CHARTS) -> dict[str, Any]:
    """Everything that a template shows."""
    from markupsafe import Markup

    results = run.results or {}
    published = (results.get("published") or {}).get("step", math.inf)  # the samples of the model that was kept
    shown, in_all, last, gains = side_by_side([row for row in run.samples if row.get("step", 0) <= published])
    scored, training = evaluations(run.metrics), trainings(run.metrics)
    start = value(scored[0], "eval/logps/rejected") if scored else None
    for row in scored:
        if start is not None and (now := value(row, "eval/logps/rejected")) is not None:
            row["displacement/rejected"] = now - start
    if results.get("paired_reward") is None and (paired := measured(gains)):
        results = {**results, "paired_reward": paired}
    found = findings(run.metrics, results)
    charts = (*gate_charts(results.get("gate") or {}, scored), *charts)
    level, headline = verdict(found)
    before = results.get("before") or (scored[0] if scored and scored[0]["step"] == 0 else {})
    after = results.get("after") or (scored[-1] if scored and scored[-1]["step"] else {})
    stage = str(results.get("stage", "dpo"))
    chosen, default = settings(run.options, stage)
    faults, records = list(run.faults), run.manifest.get("records")
    records = records if isinstance(records, Mapping) else {}
    names = sorted({*before, *after} - {"step", "epoch"})
    about = {key: run.manifest.get(key) for key in ("versions", "hardware", "seed", "parameters", "self_check")}
    return {
        "name": run.name, "stage": stage, "level": level, "headline": headline, "findings": found,
        "finished": run.results is not None, "tiles": list(tiles(before, after, results)),
        "extra": extras(run.extra, faults), "faults": faults,
        "charts": [(chart, Markup(svg)) for chart, svg in (*((c, draw(c, training, scored)) for c in charts),
                                                           (CALIBRATION, _reliability(results.get("reward")))) if svg],
        "samples": shown, "samples_of": in_all, "sampled_at": last, "best_step": results.get("best_step"),
        "numbers": [(name, plain(before.get(name)), plain(after.get(name))) for name in names],
        "chosen": chosen, "default": default, "model": run.options.get("model"), "loss": run.options.get("loss"),
        "counts": flat({key: found for key, found in records.items() if key != "dropped" and not isinstance(found, list)}),
        "train": records.get("train"), "held_out": records.get("held_out"), "dropped": flat(records.get("dropped")),
        "refused": [line for found in records.values() if isinstance(found, list) for line in found],
        "audit": flat(run.manifest.get("audit")), "machine": flat(about),
        "fingerprints": flat(run.manifest.get("fingerprints")), "next": results.get("next"),
        "command": results.get("command") or f"preftune {stage} --resume {shlex.quote(str(folder))}",
    }  # fmt: skip


def _reliability(reward: Any) -> str:
    """The figure of a reward model's calibration, or ''."""
    found = reward.get("calibration") if isinstance(reward, Mapping) else None
    rows = found.get("bins") if isinstance(found, Mapping) else None
    bins = [{key: value(row, key) for key in ("said", "came", "low", "high")} for row in rows or () if isinstance(row, Mapping)]
    bins = [row for row in bins if row["said"] is not None and row["came"] is not None]
    return reliability_svg(bins) if bins else ""


def write(run_folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run, from the files of its folder alone; the same files give the same bytes.

    A run that was interrupted or has no samples, reward or evaluation gets the report that its files allow.
    Raises UsageError for a folder that no run made, DiskError where the page cannot be written.
    """
    folder = Path(run_folder)
    path = folder / "report.html" if output is None else Path(output)
    atomic_write(path, _render("report.html", contents(read_run(folder), folder)))
    return path


def summary(run_folder: str | Path) -> str:
    """The run as an HTML fragment for a notebook: verdict, key numbers, four curves, answers before and after. Needs no network.

    Raises UsageError for a folder that no run made.
    """
    folder = Path(run_folder)
    return _render("summary.html", contents(read_run(folder), folder, [chart for chart in CHARTS if chart.title in IN_SUMMARY]))


def key_numbers(run: Run) -> list[Tile]:
    """The tiles of a run's page."""
    results = run.results or {}
    return list(tiles(results.get("before") or {}, results.get("after") or {}, results))


def _render(template: str, shown: Mapping[str, Any]) -> str:
    return filled(template, shown, plain=plain, short=lambda x: plain(x) if finite(x) is None else number(x))


def filled(template: str, shown: Mapping[str, Any], **filters: Callable[..., Any]) -> str:
    """A template with its contents; every text that is not markup of ours is shown, never obeyed."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    page = Environment(loader=PackageLoader("preftune"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                       finalize=lambda found: found if isinstance(found, Markup) else visible(found))  # fmt: skip
    page.filters |= {"marked": marked, "percent": percent} | filters
    return page.get_template(template).render(shown)
