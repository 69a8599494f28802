"""`preftune data check | show | convert`: what is wrong with preference files, what of them trains, and one form for all.

`check` needs no model and reads a file once, a record at a time. `show` lays out the tensors of a real batch, never the text that it
came from. Neither loads weights.
"""

from __future__ import annotations

import html
import json
import os
import sys
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import audit, formats
from ..config import DataCheck, DataConvert, DataShow
from ..errors import DataError, UsageError
from ..files import atomic_write, dumps, publish_file
from ..records import Record, pairs
from ..screen import clean, say, with_interval

if TYPE_CHECKING:  # both bring torch
    from ..batches import Batch
    from ..tokens import Codec

# Layouts in which the prompt stands inside the answers' texts and is split off.
SPLIT = ("chosen-rejected-messages", "hh-rlhf", "chose-rejected")


@dataclass(frozen=True)
class Finding:
    """One kind of thing found.

    Args:
        level: 'problem' (training would refuse these or leave them out), 'warning', or 'note'.
        where: 'file:line' of the records concerned, all of them; empty for a number that concerns the whole file.
    """

    name: str
    level: str
    count: int
    text: str
    where: tuple[str, ...] = ()


# --- check --------------------------------------------------------------------------------------------------------------------


@dataclass
class Ids:
    """What encoding met, a record at a time."""

    refused: dict[str, list[DataError]] = field(default_factory=lambda: defaultdict(list))
    cases: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    prompt: array = field(default_factory=lambda: array("i"))
    chosen: array = field(default_factory=lambda: array("i"))
    rejected: array = field(default_factory=lambda: array("i"))
    record: array = field(default_factory=lambda: array("i"))
    longest: int = 0


def _encode(records: Iterable[Record], options: DataCheck) -> Ids:
    """Ids of every record, and what becomes of them. Loads the tokeniser, no weights."""
    from .. import models
    from ..store import kind_of, too_long
    from ..tokens import encode, make_codec

    tokenizer, window = models.load_tokenizer(str(options.model), offline=options.offline)
    codec = make_codec(tokenizer, template=options.template, bos=options.bos, finish=options.finish,
                       control_tokens=options.control_tokens)  # fmt: skip
    limit, ids = options.max_length or window, Ids()
    for number, (record, result) in enumerate(encode(records, codec)):
        if isinstance(result, DataError):
            ids.refused[kind_of(result)].append(result)
            continue
        size = [len(response) for response in result.responses]
        ids.longest = max(ids.longest, len(result.prompt) + max(size))
        if reason := too_long(record, result, limit):
            found = f"{len(result.prompt) + max(size)} tokens; the limit is {limit}"
            ids.refused[reason].append(DataError(found, path=record.where))
        for case in result.cases:
            ids.counts[case] += 1
        for case in set(result.cases) - {"joint"}:
            ids.cases[case].append(record.where)
        ids.prompt.append(len(result.prompt))
        for pair in pairs(record):
            ids.record.append(number)
            ids.chosen.append(size[pair.chosen])
            ids.rejected.append(size[pair.rejected])
    return ids


def _place(error: DataError) -> str:
    return f"{error.path}:{error.line}" if error.line is not None else str(error.path)


def _row_findings(tally: formats.Tally) -> Iterator[Finding]:
    """Unusable rows by reason, each with the first one's own words."""
    groups: dict[str, list[DataError]] = defaultdict(list)
    for error in tally.skipped:
        groups[formats.reason(error)].append(error)
    for reason, errors in groups.items():
        first = errors[0]
        words = f"{first.field + ': ' if first.field else ''}{first.reason.splitlines()[0]}"
        yield Finding(f"row: {reason}", "problem", len(errors), f"unusable rows: {words}", tuple(map(_place, errors)))


def _file_findings(found: audit.Audit, tally: formats.Tally, leaks: Sequence[str]) -> Iterator[Finding]:
    """What needs no tokens."""
    yield Finding("leak", "problem", len(leaks), "held-out prompts that stand in the training data too", tuple(leaks))
    yield Finding("equal", "problem", len(found.equal), "pairs whose two sides are the same text", found.equal)
    words = "records whose pair stands earlier"
    yield Finding("contradicting", "warning", len(found.contradicting), f"{words} the other way round", found.contradicting)
    yield Finding("duplicates", "warning", len(found.duplicates), f"{words} too", found.duplicates)
    yield Finding("cycles", "warning", len(found.cycles), "prompts whose judgements go round in a circle", found.cycles)
    if found.scored:
        words = "records with scores and no judgement: --from-scores best-worst (or all) makes judgements of them"
        yield Finding("scored", "warning", found.scored, words)
    if found.unfinished > 0.5:
        words = f"{found.unfinished:.0%} of the responses do not end like a sentence; if they were cut, train with --finish never"
        yield Finding("unfinished", "warning", 1, words)
    yield Finding("shared_prompts", "note", len(found.shared_prompts), "records whose prompt an earlier one has; training merges them",
                  found.shared_prompts)  # fmt: skip
    yield Finding("unjudged", "note", found.unjudged - found.scored, "records of which nothing is said: for sft")
    split = sum(tally.layouts.get(layout, 0) for layout in SPLIT)
    yield Finding("split", "note", split, "records whose prompt was split off the answers' texts")
    yield Finding("unranked_rows", "note", tally.counts.get("rows_without_records", 0), "message trees without a ranked list")
    yield Finding("blank_lines", "note", tally.counts["blank_lines"], "blank lines")


def _id_findings(ids: Ids) -> Iterator[Finding]:
    """What the tokens say."""
    for reason, errors in ids.refused.items():
        level = "warning" if reason.endswith("too long") else "problem"
        words = f"left out of training: {errors[0].reason}" if level == "warning" else f"cannot be encoded: {errors[0].reason}"
        yield Finding(reason, level, len(errors), f"{reason}, {words}" if level == "warning" else words, tuple(map(_place, errors)))
    for case, where in ids.cases.items():
        level = "warning" if "split" in case else "note"
        words = f"responses whose ids are found {case.replace('+', ', ')} ({ids.counts['joint']} jointly with their prompt)"
        words += ": text that spells a control token is read as text" if "split" in case else ""
        yield Finding(f"ids: {case}", level, ids.counts[case], words, tuple(where))


def _measures(found: audit.Audit, tally: formats.Tally, ids: Ids | None) -> list[tuple[str, str]]:
    """(name, text) of what is not a fault but worth knowing."""
    rows = [("records", f"{found.records:,}  " + ", ".join(f"{name} {n:,}" for name, n in tally.layouts.items()))]
    if found.pairs:
        judges = ", ".join(f"{name or 'not said'} {n:,}" for name, n in list(found.judges.items())[:5])
        more = f" and {len(found.judges) - 5} more" if len(found.judges) > 5 else ""
        gap = with_interval(found.length_gap, found.length_gap_low, found.length_gap_high, "+.1f")
        rule = with_interval(found.longer_chosen, found.longer_low, found.longer_high)
        rows += [("pairs", f"{found.pairs:,}"), ("judged by", judges + more),
                 ("length", f"chosen {found.chosen_characters:.1f} characters, rejected {found.rejected_characters:.1f}; "
                  f"unequal pairs differ by {gap}"),
                 ("length rule", f"'the longer is better' predicts {rule} of the unequal pairs")]  # fmt: skip
    if found.labels:
        rows.append(("labels", f"{found.labels:,}"))
    if ids is not None and len(ids.prompt):
        prompt = np.frombuffer(ids.prompt, np.int32)
        rows.append(("prompt tokens", f"mean {prompt.mean():.1f}, longest {prompt.max()}; longest record {ids.longest}"))
    if ids is not None and len(ids.chosen):
        chosen, rejected = np.frombuffer(ids.chosen, np.int32), np.frombuffer(ids.rejected, np.int32)
        mean, error = audit.mean_of((chosen - rejected).astype(float), np.frombuffer(ids.record, np.int32))
        low, high = (None, None) if error is None else (mean - audit.Z95 * error, mean + audit.Z95 * error)
        gap = with_interval(mean, low, high, "+.1f")
        rows.append(("answer tokens", f"chosen {chosen.mean():.1f}, rejected {rejected.mean():.1f}; differ by {gap}"))
    return rows


def check(options: DataCheck) -> int:
    """Read, count, list. 0 where nothing would stop or thin out training, 3 where something would (--strict: or warns)."""
    found = checked(options)
    if options.json:
        print(dumps(found, "data check", indent=1))
    elif sys.stdout.isatty():
        _print_table(found)
    else:
        print(plain(found))
    return 0 if found["clean"] else DataError.exit_code


def checked(options: DataCheck) -> dict[str, Any]:
    """What --json prints: files, clean, counts, layouts, audit, judges, measures, findings. Reads a file once, a record at a time."""
    tally, ledger = formats.Tally(), audit.Ledger()

    def entered(paths: list[str], book: audit.Ledger, met: formats.Tally) -> Iterator[Record]:
        """Every record, after it was entered; a file without any usable row is a list of findings, not an end."""
        try:
            for record in formats.stream(paths, met, format=options.format, skip_bad=True, max_records=options.max_records):
                book.add(record)
                yield record
        except DataError:
            if not met.skipped or met.counts["records"]:
                raise

    records = entered(options.data, ledger, tally)
    ids = _encode(records, options) if options.model else None
    for _ in records:
        pass
    held, held_tally = audit.Ledger(), formats.Tally()
    for _ in entered(options.eval_data, held, held_tally) if options.eval_data else ():
        pass
    found = ledger.close()
    findings = [*_row_findings(tally), *_row_findings(held_tally), *_file_findings(found, tally, held.leaks(ledger)),
                *(_id_findings(ids) if ids else ())]  # fmt: skip
    findings = sorted((f for f in findings if f.count), key=lambda f: ("problem", "warning", "note").index(f.level))
    wrong = [f for f in findings if f.level == "problem" or (options.strict and f.level == "warning")]
    measures = _measures(found, tally, ids)
    return {"files": options.data, "clean": not wrong, "counts": tally.counts, "layouts": tally.layouts, "audit": found.numbers(),
            "judges": dict(found.judges), "measures": dict(measures), "findings": [vars(f) for f in findings],
            "problems": sum(f.count for f in wrong)}  # fmt: skip


COLOURS = {"problem": "bold red", "warning": "yellow", "note": "cyan"}


def _end(found: Mapping[str, Any]) -> str:
    count, warned = found["problems"], sum(f["count"] for f in found["findings"] if f["level"] == "warning")
    if count:
        return f"{count:,} problem{'s' * (count > 1)}; exit code {DataError.exit_code}"
    return f"no problem, {warned:,} warning{'s' * (warned > 1)}" if warned else "clean"


def plain(found: Mapping[str, Any]) -> str:
    """What was checked as lines of text, hostile characters made visible."""
    lines = [f"{name:<14}{clean(text)}" for name, text in found["measures"].items()]
    for f in found["findings"]:
        where = f": {clean(audit.sample_lines(f['where']))}" if f["where"] else ""
        lines.append(f"{f['level']:<14}{f['count']:,} {clean(f['text'])}{where}")
    return "\n".join([*lines, _end(found)])


def _print_table(found: Mapping[str, Any]) -> None:
    """The same for a terminal, in colour."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in found["measures"].items():
        table.add_row(Text(name, style="dim"), "", Text(clean(text)))
    for f in found["findings"]:
        lines = Text(f"\n{clean(audit.sample_lines(f['where']))}" if f["where"] else "", style="dim")
        table.add_row(Text(f["level"], style=COLOURS[f["level"]]), Text(f"{f['count']:,}", justify="right"), Text(clean(f["text"])) + lines)
    console = Console(no_color=bool(os.environ.get("NO_COLOR")), highlight=False)
    console.print(table)
    console.print(Text(_end(found), style="bold green" if found["clean"] else "bold red"))


# --- show ---------------------------------------------------------------------------------------------------------------------

KINDS = {  # kind: (what it means, colour on a terminal, colours on a page)
    "prompt": ("read, never trained", "cyan", "#24527a;background:#e4eef8"),
    "trained": ("the model has to produce it", "green", "#1d5a2b;background:#dff3e3"),
    "masked": ("part of the answer, not trained", "white on grey35", "#555;background:#e4e4e4"),
    "special": ("control token, not trained", "magenta", "#6d2077;background:#f3e2f6"),
    "end": ("control token that is trained: the answer ends", "bold white on red", "#fff;background:#b3261e"),
}


@dataclass(frozen=True)
class Token:
    """One token of a batch as it is shown; a character of several tokens is shown by the last of them."""

    id: int
    text: str
    kind: str


@dataclass(frozen=True)
class Part:
    """A segment of a batch: a prompt, or a response with what is said of it."""

    title: str
    tokens: tuple[Token, ...]


def pieces(codec: Codec, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; joined they are the decoded ids."""
    out, begun, read = [], 0, 0
    for i in range(len(ids)):
        before = codec.backend.decode(list(ids[begun:read]), skip_special_tokens=False)
        now = codec.backend.decode(list(ids[begun : i + 1]), skip_special_tokens=False)
        whole = not now.endswith("\ufffd") or i == len(ids) - 1
        out.append(now[len(before) :] if whole else "")
        if whole:
            begun, read = read, i + 1
    return out


def parts(batch: Batch, codec: Codec) -> list[Part]:
    """The segments of a batch with shared prompts, read off its tensors: tokens, segment table, targets and pairs."""
    ids, table = batch.tokens.tolist(), batch.segments
    answers = [s for s, prefix in enumerate(table.prefix) if prefix >= 0]
    trained = set()
    for hidden, target, response in zip(batch.hidden.tolist(), batch.target.tolist(), batch.response.tolist(), strict=True):
        segment = answers[response]
        at = table.starts[segment] if hidden == table.ends[table.prefix[segment]] - 1 else hidden + 1
        assert ids[at] == target and table.starts[segment] <= at < table.ends[segment], "a target that is not its token"
        trained.add(at)
    special = {number for number, token in codec.tokenizer.added_tokens_decoder.items() if token.special}
    roles: dict[int, list[str]] = defaultdict(list)
    for chosen, rejected in batch.table.pair.tolist():
        roles[chosen].append(f"better than {rejected}")
        roles[rejected].append(f"worse than {chosen}")
    for response, good in zip(batch.table.verdict.tolist(), batch.table.verdict_good.tolist(), strict=True):
        if not len(batch.table.pair):
            roles[response].append("desirable" if good else "undesirable")
    found = []
    for segment, (start, end) in enumerate(zip(table.starts, table.ends, strict=True)):
        chain = [i for s in table.chain(segment) for i in range(table.starts[s], table.ends[s])]
        texts = pieces(codec, [ids[i] for i in chain])[-(end - start) :]
        kinds = [_kind(ids[i] in special, i in trained, segment in answers) for i in range(start, end)]
        number = answers.index(segment) if segment in answers else -1
        said = f"response {number}" + (f": {', '.join(dict.fromkeys(roles[number]))}" if roles[number] else "")
        tokens = tuple(Token(ids[i], text, kind) for i, text, kind in zip(range(start, end), texts, kinds, strict=True))
        found.append(Part(said if number >= 0 else "prompt", tokens))
    return found


def _kind(special: bool, trained: bool, answer: bool) -> str:
    if special:
        return "end" if trained else "special"
    return "trained" if trained else "masked" if answer else "prompt"


def show(options: DataShow) -> int:
    """Encode one record, make its batch, print or write it. DataError with the reason where it would be left out."""
    from .. import models
    from ..batches import make_batch
    from ..store import build
    from ..tokens import make_codec

    tally = formats.Tally()
    records = formats.stream(options.data, tally, format=options.format, skip_bad=options.skip_bad, max_records=options.row)
    record = next(islice(records, options.row - 1, None), None)
    if record is None:
        raise UsageError(f"--row {options.row}: there are {tally.counts['records']} records")
    tokenizer, window = models.load_tokenizer(str(options.model), offline=options.offline)
    codec = make_codec(tokenizer, template=options.template, bos=options.bos, finish=options.finish,
                       control_tokens=options.control_tokens)  # fmt: skip
    store, intake = build([record], codec, max_length=options.max_length or window)
    if not len(store):
        raise intake.refused[0]
    batch = make_batch(store, [0])
    found = parts(batch, codec)
    title = f"{record.where}: {len(batch.tokens):,} tokens, {len(batch.target):,} trained"
    if options.html:
        atomic_write(options.html, page(title, found))
        say(f"written {options.html}")
    else:
        _print_parts(title, found)
    return 0


def visible(text: str) -> str:
    """Hostile characters as symbols; line ends and tabs marked as well as kept."""
    return clean(text).replace("\n", "⏎\n").replace("\t", "⇥\t")


def _print_parts(title: str, found: Sequence[Part]) -> None:
    """Colours on a terminal; elsewhere a line for every run of one kind, with its number of tokens."""
    from rich.console import Console
    from rich.text import Text

    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        print(clean(title))
        for part in found:
            print(f"{part.title} ({len(part.tokens)})")
            run: list[Token] = []
            for token in [*part.tokens, None]:
                if run and (token is None or token.kind != run[0].kind):
                    print(f"  {run[0].kind:<9}{len(run):>5}  {json.dumps(clean(''.join(t.text for t in run)), ensure_ascii=False)}")
                    run = []
                run += [token] if token else []
        return
    console = Console(highlight=False)
    console.print(Text(clean(title), style="bold"))
    console.print(Text("  ").join(Text(f" {kind} ", style=colour) + Text(f" {meaning}") for kind, (meaning, colour, _) in KINDS.items()))
    for part in found:
        console.print(Text(f"\n{part.title} ({len(part.tokens)})", style="bold"))
        console.print(Text.assemble(*((visible(t.text), KINDS[t.kind][1] + " underline" * (i % 2)) for i, t in enumerate(part.tokens))))


def page(title: str, found: Sequence[Part]) -> str:
    """One self-contained page; every text escaped, no script, no outside address."""
    style = "body{font:16px sans-serif;max-width:60em;margin:2em auto}pre{white-space:pre-wrap;line-height:1.8}span{padding:1px 0}"
    style += "".join(f".{kind}{{color:{css}}}" for kind, (_, _, css) in KINDS.items()) + "span:nth-child(even){text-decoration:underline}"
    legend = " ".join(f'<li><b class="{kind}">{kind}</b> {html.escape(meaning)}</li>' for kind, (meaning, _, _) in KINDS.items())
    body = "".join(
        f"<h2>{html.escape(part.title)} ({len(part.tokens)})</h2><pre>"
        + "".join(f'<span class="{t.kind}" title="{t.id}">{html.escape(visible(t.text))}</span>' for t in part.tokens) + "</pre>"
        for part in found)  # fmt: skip
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
            f"<title>{html.escape(clean(title))}</title><style>{style}</style><h1>{html.escape(clean(title))}</h1><ul>{legend}</ul>{body}</html>\n")


# --- convert ------------------------------------------------------------------------------------------------------------------


def convert(options: DataConvert) -> int:
    """Canonical JSONL of any layout, a record at a time. Nothing is written where a row is refused."""
    output = Path(str(options.output))
    if output.exists():
        raise UsageError(f"--output {output}: exists already; name a new file")
    tally = formats.Tally()
    records = formats.stream(options.data, tally, format=options.format, skip_bad=options.skip_bad, max_records=options.max_records,
                             from_scores=options.from_scores)  # fmt: skip

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8") as out:
            for record in records:
                out.write(dumps(formats.to_json(record), record.where) + "\n")

    publish_file(output, write)
    for reason, count in tally.counts.items():
        if reason.startswith("skipped: "):
            say(f"left out {count}: {clean(reason.removeprefix('skipped: '))}")
    say(f"{tally.counts['records']} records ({', '.join(tally.layouts)}) -> {output}")
    return 0
