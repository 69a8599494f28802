"""A run's model card: README.md of a published folder, from the files of the run folder alone. Never loads torch.

What was measured, with its error; what was not measured, said so; nothing invented. Folders of the machine never get into a card: a
path becomes its last name. Names and texts are hostile: they are shown as text, never as markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from .. import config, runs
from . import Run, flat, options_class, settings, visible
from .findings import Row, duration, findings, number, percent, signed, value, verdict

PUBLISHED = ("dpo", "online", "ppo", "reward", "sft")
FORMATS = {"fp32": "float32", "bf16": "bfloat16"}


def card(run: Run, title: str, *, adapter: bool = False, dtype: str | None = None) -> str:
    """The card as Markdown with the YAML head that the hub reads. The same files give the same text.

    Args:
        title: name of the published model. adapter: whether only the adapter is published. dtype: what the weights were stored as,
            where not as the run stored them.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    page = Environment(loader=PackageLoader("preftune"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                       keep_trailing_newline=True, finalize=literal, autoescape=False)  # fmt: skip
    page.filters.update(code=code)
    return page.get_template("card.md").render(contents(run, title, adapter=adapter, dtype=dtype))


def contents(run: Run, title: str, *, adapter: bool, dtype: str | None) -> dict[str, Any]:
    """Everything that the template shows."""
    from markupsafe import Markup

    results, manifest = run.results or {}, run.manifest
    stage, records, hardware = str(results.get("stage")), _table(manifest.get("records")), _table(manifest.get("hardware"))
    options = options_of(run, stage)
    shown = public(options, hub=from_hub(manifest))
    before, after = _table(results.get("before")), _table(results.get("after"))
    found, seconds = findings(run.metrics, results), value(results, "seconds")
    files = [f | {"name": bare(str(f.get("name")))} for f in manifest.get("files", []) if isinstance(f, dict)]
    command = visible(runs.command(stage, type(options)(**shown)))
    base = str(shown["model"])
    front = _front(base if from_hub(manifest) else None, stage, files, adapter=adapter)
    return {
        "front": Markup(front), "title": title, "stage": stage, "base": base, "hub": from_hub(manifest), "adapter": adapter,
        "loss": results.get("loss"), "headline": verdict(found)[1], "findings": found, "fingerprints": _table(manifest.get("fingerprints")),
        "files": files, "counts": list(_counts(records)), "left_out": list(_left_out(records)),
        "measured": list(measured(before, after, results)),
        "steps": results.get("steps"), "tokens": results.get("tokens"), "duration": duration(seconds) if seconds is not None else "–",
        "chosen": [(name, text) for name, text, _ in settings(shown, stage)[0] if name not in ("model", "data", "eval_data", "output")],
        "rate": manifest.get("learning_rate"), "reason": manifest.get("learning_rate_reason"), "parameters": manifest.get("parameters"),
        "rule": _rule(records), "seed": manifest.get("seed"), "hardware": flat(hardware), "versions": _table(manifest.get("versions")),
        "limits": list(limits(after, results, records)), "dtype": FORMATS.get(dtype or ""), "lora": options.lora,
        "dates": _table(manifest.get("codec")), "fence": Markup("`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))),
        "command": Markup(command), "reading": _table(results.get("reward")), "classes": list(getattr(options, "classes", [])),
    }  # fmt: skip


def options_of(run: Run, stage: str) -> config.Fitting:
    """The options of the run. Raises UsageError for a stage or an option that this version does not have."""
    known = options_class(stage) if stage in PUBLISHED else None
    if not known or not issubclass(known, config.Fitting):
        raise config.UsageError(f"{run.name}: a run of {stage!r}; only runs of {', '.join(PUBLISHED)} make a model to publish")
    return known(**config.load_yaml(yaml.safe_dump(dict(run.options)), f"{run.name}/config.yaml", known))


def public(options: config.Options, *, hub: bool) -> dict[str, Any]:
    """The options with every path cut to its last name; hub names stay."""
    out = {}
    for spec in config.specs(type(options)):
        found = getattr(options, spec.name)
        if isinstance(found, str) and not (spec.reads == "model" and hub):
            found = bare(found)
        out[spec.name] = [bare(each) for each in found] if isinstance(found, list) else found
    return out


def bare(text: str) -> str:
    """What may be told of a path: 'python:/srv/me/judge.py:judge' -> 'python:judge.py:judge'; of a run's model the run's name too.

    >>> bare("/srv/me/pairs.jsonl:2"), bare("hub:owner/pairs"), bare("/srv/me/runs/first/model/")
    ('pairs.jsonl:2', 'hub:owner/pairs', 'first/model')
    """
    if text.startswith("hub:"):
        return text
    text = text.rstrip("/")
    inside = re.search(r"[^/:]+/(model|adapter)$", text)
    return inside[0] if inside else re.sub(r"[^:]*/", "", text)


def _table(found: Any) -> dict[str, Any]:
    return dict(found) if isinstance(found, Mapping) else {}


def from_hub(manifest: Row) -> bool:
    """Whether the base came from the hub, so that its name means the same everywhere."""
    return _table(manifest.get("base")).get("from") == "hub"


def _front(base: str | None, stage: str, files: Sequence[Row], *, adapter: bool) -> str:
    """The YAML head. Only what the hub can follow is named: a base from a folder is no model there. Never a licence."""
    task = "text-classification" if stage == "reward" else "text-generation"
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": task}
    if base:
        head |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    sets = [
        re.sub(r"(@.*|:[\d.]+)$", "", str(f["name"]).removeprefix("hub:")) for f in files if str(f["name"]).startswith("hub:")
    ]
    if sets:
        head["datasets"] = list(dict.fromkeys(sets))
    head["tags"] = ["preftune", stage, *(["preference-tuning"] if stage != "sft" else []), *(["lora"] if adapter else [])]
    return str(yaml.safe_dump(head, sort_keys=False, allow_unicode=True)).strip()


def _counts(records: Row) -> Iterator[tuple[str, Any]]:
    names = {
        "read": "read",
        "merged": "merged into another of the same prompt",
        "train": "trained on",
        "held_out": "held out, judged",
    }
    for key, name in names.items():
        if records.get(key) is not None:
            yield name, records[key]


def _left_out(records: Row) -> Iterator[tuple[str, Any]]:
    """(reason, how many) of everything that was read and not used."""
    yield from _table(records.get("unreadable_by_reason")).items()
    yield from _table(records.get("dropped")).items()
    for key, reason in {
        "equal_left_out": "two equal sides",
        "nothing_to_learn": "nothing in it that this stage learns from",
    }.items():
        if records.get(key):
            yield reason, records[key]


def _rule(records: Row) -> dict[str, str] | None:
    found = _table(records.get("eval_reward"))
    return {"name": bare(str(found.get("rule"))), "sha256": str(found.get("sha256"))} if found else None


def _with(row: Row, key: str, show: Any = number) -> str:
    """'1.23 ± 0.04', '1.23' without an error, or a dash."""
    mean, error = value(row, key), value(row, f"{key}_se")
    return "–" if mean is None else show(mean) + (f" ± {number(error)}" if error is not None else "")


def _accuracy(row: Row) -> str:
    rate, low, high = (value(row, f"eval/{name}") for name in ("rewards/accuracies", "accuracy_low", "accuracy_high"))
    error = f" [{percent(low)}, {percent(high)}]" if low is not None and high is not None else ""
    return "–" if rate is None else percent(rate) + error


def measured(before: Row, after: Row, results: Row) -> Iterator[tuple[str, str, str, str]]:
    """(quantity, before, after, unit and kind of error) of what was measured, on held-out prompts only."""
    pairs = value(after, "eval/pairs")
    rows = (
        ("eval/loss", "loss on held-out records", _with, "as trained"),
        ("eval/rewards/accuracies", "accuracy on held-out pairs", lambda row, key: _accuracy(row),
         f"share of {pairs:,.0f} pairs; 95% interval, Wilson" if pairs else "share; 95% interval, Wilson"),
        ("eval/labels/accuracies", "held-out labels on the right side of 0", lambda row, key: _with(row, key, percent), "share"),
        ("eval/classes/accuracies", "held-out answers whose likeliest class is right", lambda row, key: _with(row, key, percent), "share"),
        ("reward", "reward of its own answers", _with, "± one standard error over prompts"),
        ("kl_sequence_rb", "KL to the reference, per answer", _with, "nats an answer; Rao-Blackwell, own answers; ± one standard error"),
        ("kl_token_rb", "KL to the reference, per token", _with, "nats a token; ± one standard error"),
        ("eval/displacement", "displacement of preferred answers", lambda row, key: _with(row, key, signed),
         "nats an answer, against the reference; no error estimated"),
        ("sample_length", "length of its own answers", _with, "tokens; ± one standard error"),
        ("sample_finished", "answers that ended by themselves", lambda row, key: _with(row, key, percent), "share"),
    )  # fmt: skip
    for key, name, show, unit in rows:
        if value(after, key) is not None:
            yield name, show(before, key), show(after, key), unit
    change, low, high = (value(_table(results.get("paired_reward")), key) for key in ("difference", "low", "high"))
    if change is not None and low is not None and high is not None:
        yield (
            "change of reward, same prompts",
            "",
            f"{signed(change)} [{signed(low)}, {signed(high)}]",
            "95% interval over prompts",
        )


def limits(after: Row, results: Row, records: Row) -> Iterator[str]:
    """What was not measured, and what the numbers cannot say."""
    if value(after, "eval/loss") is None:
        yield "Nothing was held out: how well it does on prompts that it was not trained on was not measured."
    if results.get("stage") == "reward":
        yield "What becomes of a policy that is trained to please it was not measured: a reward model is a proxy."
    elif value(after, "kl_sequence_rb") is None:
        yield "Its own answers were not sampled: how far it moved from the reference, and what it answers, was not measured."
    elif value(after, "reward") is None:
        yield "Its own answers were not scored: whether they became better was not measured."
    else:
        yield "The reward is that of one rule, named above; what the rule does not see was not measured."
    if records.get("leaks"):
        yield f"{records['leaks']} held-out prompts stand in the training data too: the held-out numbers are too good."
    yield "One run with one seed: how much another seed would differ was not measured."
    yield "No benchmark, no safety evaluation, no comparison with other models: nothing but the table above was measured."
    yield "Who wrote and judged the data, and in which languages, is not recorded by the run."


# ---------------------------------------------------------------- hostile text in Markdown


def literal(text: Any) -> Any:
    """Any text as plain words of Markdown: one line, no markup, no HTML, nothing invisible. Markup is ours and stays."""
    from markupsafe import Markup

    if isinstance(text, Markup):
        return text
    line = " ".join(visible(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(re.sub(r"([\\`*_\[\]#|~$!])", r"\\\1", line))


def code(text: Any) -> Any:
    """A name as a code span, where it can be one; else as plain words."""
    from markupsafe import Markup

    found = str(text)
    return (
        Markup(f"`{found}`") if re.fullmatch(r"[^\s`|]([^\n`|]*[^\s`|])?", found) and visible(found) == found else literal(found)
    )
