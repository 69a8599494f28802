"""Text to ids: the one place where a tokeniser or a chat template is used to make training data.

`Codec` holds a tokeniser, a template and the rules for BOS and EOS; `encode` turns records into ids. The text of a record and the
decoded ids are equal, always, or the record is refused with a reason. Touches records, the `tokenizers` backend and jinja2;
no model, no file.

    codec = make_codec(tokenizer)                     # transformers' fast tokeniser
    for record, result in encode(records, codec): ... # Encoded, or DataError with the reason
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from tokenizers import Tokenizer

from .errors import DataError, ModelError, UsageError
from .records import Message, Record, Response, Text

# For dialogues when the tokeniser brings no template. The space before an answer is part of the answer's text, so that word-piece
# and byte-level tokenisers see the word start where it was when they were trained.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].capitalize() }}: {{ m['content'] }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
# Templates that print today's date would change the data from day to day; the date is fixed and stored with the fingerprint.
TEMPLATE_DATE = "2025-01-01"
TEMPLATE_LIMIT = 1 << 22  # characters a template may render


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of one record.

    Args:
        prompt: ids of the prompt, BOS included.
        responses: per response its ids, the end token included where `finished`.
        trained: per response, per id: does the model have to produce it (False for a user's turn inside a response).
        finished: per response.
        cases: per response how its ids were found: 'joint' or 'apart', with '+trimmed' where the template stripped the text.
    """

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[bool, ...], ...]
    finished: tuple[bool, ...]
    cases: tuple[str, ...]


@dataclass(frozen=True)
class Codec:
    """The rules by which text becomes ids.

    Args:
        tokenizer: a transformers fast tokeniser (kept for saving beside the model).
        template: Jinja source for messages.
        template_name: 'tokeniser', 'plain' or the file it came from.
        bos: id put before a prompt that does not already begin with it, or None.
        eos: id that ends a finished plain-text response.
        finish: what 'finished' means where the data does not say: 'auto' and 'always' yes, 'never' no.
    """

    tokenizer: Any
    template: str
    template_name: str
    bos: int | None
    eos: int
    finish: str = "auto"

    @cached_property
    def backend(self) -> Tokenizer:
        return self.tokenizer.backend_tokenizer

    @cached_property
    def apart(self) -> Tokenizer:
        """The same tokeniser without the word-start mark that it would put before a text that stands alone."""
        return Tokenizer.from_str(json.dumps(_without_dummy_prefix(json.loads(self.backend.to_str()))))

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Matches any text that would be read as a control token."""
        names = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        return re.compile("|".join(re.escape(n) for n in sorted(names, key=len, reverse=True)) or r"(?!)")

    @cached_property
    def compiled(self) -> Any:
        return compile_template(self.template)

    def describe(self) -> dict[str, Any]:
        """What the fingerprint and the manifest say of this codec."""
        return {"template": self.template, "template_name": self.template_name, "template_date": TEMPLATE_DATE, "bos": self.bos,
                "eos": self.eos, "finish": self.finish}  # fmt: skip


def make_codec(tokenizer: Any, *, template: str = "auto", bos: str = "auto", finish: str = "auto") -> Codec:
    """The codec of a fast tokeniser.

    Args:
        tokenizer: transformers tokeniser with a `tokenizers` backend.
        template: 'auto' (the tokeniser's own, else plain), 'plain', or the path of a Jinja file.
        bos: 'always', 'never', or 'auto': where the tokeniser adds it by itself or has a BOS that is not its EOS.
        finish: 'auto', 'always', 'never' for responses that do not say whether they are finished.

    Raises:
        ModelError: no fast backend, or no EOS. UsageError: bos='always' without a BOS, or a template file that is not there.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the tokeniser {type(tokenizer).__name__} has no 'tokenizers' backend (tokenizer.json); only fast ones are read"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokeniser names no EOS token, so an answer could not end; set eos_token in tokenizer_config.json")
    own = tokenizer.bos_token_id
    adds = own is not None and tokenizer("a").input_ids[:1] == [own]
    wanted = bos == "always" or (bos == "auto" and own is not None and (adds or own != tokenizer.eos_token_id))
    if wanted and own is None:
        raise UsageError("--bos always: this tokeniser has no BOS token; use --bos auto or never")
    if template == "auto":
        source, name = (tokenizer.chat_template, "tokeniser") if tokenizer.chat_template else (PLAIN_TEMPLATE, "plain")
    elif template == "plain":
        source, name = PLAIN_TEMPLATE, "plain"
    else:
        path = Path(template)
        if not path.is_file():
            raise UsageError(f"--template {template}: no such file; expected auto, plain or a Jinja file")
        source, name = path.read_text(encoding="utf-8"), template
    if not isinstance(source, str):
        raise ModelError("the tokeniser carries several chat templates; pass the one to use as a file with --template")
    return Codec(tokenizer, source, name, own if wanted else None, tokenizer.eos_token_id, finish)


def _without_dummy_prefix(spec: Any) -> Any:
    """A tokenizer.json in which no component puts a space or word mark before the text."""
    if isinstance(spec, list):
        return [_without_dummy_prefix(s) for s in spec if not (isinstance(s, dict) and s.get("type") == "Prepend")]
    if not isinstance(spec, dict):
        return spec
    out = {k: _without_dummy_prefix(v) if k in _NESTED else v for k, v in spec.items()}
    if out.get("type") == "Prepend":
        return None
    if out.get("type") == "Metaspace":
        out["prepend_scheme"] = "never"
    if "add_prefix_space" in out:
        out["add_prefix_space"] = False
    return out


_NESTED = ("normalizer", "normalizers", "pre_tokenizer", "pretokenizers")


# ---------------------------------------------------------------- templates


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which stops attribute tricks, plus a limit on `'a' * 10**9`, which it does not."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("powers are not allowed in a chat template")
        for a, b in ((left, right), (right, left)):
            if isinstance(a, (str, list, tuple)) and isinstance(b, int) and len(a) * b > TEMPLATE_LIMIT:
                raise SecurityError("the chat template repeats a text beyond the limit")
        return super().call_binop(context, operator, left, right)


def compile_template(source: str) -> Any:
    """A chat template in a sandbox: no attribute access, no files, limited repetition, a fixed date.

    Raises:
        ModelError: the template is not valid Jinja.
    """

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def date(pattern: str) -> str:
        import datetime

        return datetime.date.fromisoformat(TEMPLATE_DATE).strftime(pattern)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, indent=kw.get("indent"))
    environment.globals.update(raise_exception=refuse, strftime_now=date)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ModelError(f"the chat template cannot be read: {error}") from error


def render(codec: Codec, messages: Iterable[Message], *, generation: bool) -> str:
    """The text of a dialogue. `generation` adds what stands before an answer.

    Raises:
        DataError: the template refuses these messages or breaks the sandbox's limits.
    """
    token = codec.tokenizer
    plain = [{"role": m.role, "content": m.content} for m in messages]
    try:
        parts, size = [], 0
        for part in codec.compiled.generate(messages=plain, add_generation_prompt=generation, bos_token=token.bos_token or "",
                                            eos_token=token.eos_token or "", pad_token=token.pad_token or ""):  # fmt: skip
            size += len(part)
            if size > TEMPLATE_LIMIT:
                raise SecurityError(f"the chat template renders more than {TEMPLATE_LIMIT:,} characters")
            parts.append(part)
        return "".join(parts)
    except (TemplateError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"the chat template refuses this dialogue: {error}") from error


# ---------------------------------------------------------------- encoding


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where an answer stands in its text: `text[len(prompt):]` is the answer, `spans` the character ranges that are trained."""

    text: str
    spans: tuple[tuple[int, int], ...]
    ends: tuple[int, ...]  # character ends after which the end token belongs, one per trained turn
    end_id: int
    trimmed: bool = False


def _end_token(codec: Codec, suffix: str) -> int:
    """The template's end-of-turn token: the first control token after an answer, else EOS."""
    found = codec.control.search(suffix)
    known = codec.backend.token_to_id(found.group()) if found and not suffix[: found.start()].strip() else None
    return codec.eos if known is None else known


def _find(tail: str, content: str) -> tuple[int, bool]:
    """Where the answer's text ends in what the template wrote, and whether it was stripped of white space."""
    for text, trimmed in ((content, False), (content.strip(), True)):
        at = tail.find(text)
        if at >= 0:
            return at + len(text), trimmed
    raise DataError("the chat template rewrites the answer's text", field="responses")


def _dialogue(codec: Codec, prompt: tuple[Message, ...], prompt_text: str, response: Response) -> _Layout:
    """Lay out an answer after a dialogue; the prompt's text must be a stable prefix."""
    turns = (Message("assistant", response.text),) if isinstance(response.text, str) else response.text
    spans, ends, trimmed, end_id = [], [], False, codec.eos
    history: tuple[Message, ...] = prompt
    plain = codec.template_name == "plain"
    text = prompt_text
    for turn in turns:
        if turn.role != "assistant":
            history = (*history, turn)
            continue
        before = render(codec, history, generation=True)
        history = (*history, turn)
        if plain:  # our own template: the answer follows the prompt after one space
            body, suffix, start, stop = f"{before} {turn.content}", "", len(before), len(before) + 1 + len(turn.content)
        else:
            full = render(codec, history, generation=False)
            if not full.startswith(before):
                raise DataError("the chat template changes the prompt when the answer is added", field="prompt")
            to, cut = _find(full[len(before) :], turn.content)
            trimmed |= cut
            body, start, stop = full[: len(before) + to], len(before), len(before) + to
            suffix = full[stop:]
        if not body.startswith(text):
            raise DataError("the chat template changes earlier turns when later ones are added", field="responses")
        end_id = _end_token(codec, suffix)
        spans.append((start, stop))
        ends.append(stop)
        text = body
    if not spans:
        raise DataError("a response of several messages holds no assistant turn", field="responses")
    return _Layout(text, tuple(spans), tuple(ends), end_id, trimmed)


def _refuse_control(codec: Codec, text: Text, field: str) -> None:
    for part in (text,) if isinstance(text, str) else (m.content for m in text):
        if found := codec.control.search(part):
            raise DataError(f"the text spells the control token {found.group()!r}", field=field)


def _layouts(codec: Codec, record: Record) -> tuple[str, list[_Layout]]:
    """The prompt's text and each answer's, or DataError with the reason."""
    _refuse_control(codec, record.prompt, "prompt")
    for response in record.responses:
        _refuse_control(codec, response.text, "responses")
    if isinstance(record.prompt, str):
        base, size = record.prompt, len(record.prompt)
        answers = [r.text for r in record.responses if isinstance(r.text, str)]
        if len(answers) < len(record.responses):
            raise DataError("the prompt is text but a response is a list of messages", field="responses")
        return base, [_Layout(base + a, ((size, size + len(a)),), (size + len(a),), codec.eos) for a in answers]
    prompt = render(codec, record.prompt, generation=True)
    return prompt, [_dialogue(codec, record.prompt, prompt, r) for r in record.responses]


def _response_ids(
    codec: Codec, prompt: str, prompt_ids: list[int], layout: _Layout, joint: Any
) -> tuple[list[int], list[bool], str]:
    """Ids of one answer, which of them are trained, and how they were found. Raises DataError('boundary')."""
    size = len(prompt_ids)
    if joint.ids[:size] == prompt_ids:
        ids, offsets, case = joint.ids[size:], joint.offsets[size:], "joint"
    else:  # a token straddles the boundary: encode the answer apart, and only if the text survives
        alone = codec.apart.encode(layout.text[len(prompt) :], add_special_tokens=False)
        ids, case = alone.ids, "apart"
        offsets = [(a + len(prompt), b + len(prompt)) for a, b in alone.offsets]
    if codec.backend.decode(prompt_ids + ids, skip_special_tokens=False) != layout.text:
        raise DataError(
            "the tokeniser cannot reproduce this text (an unknown character, or a normaliser that changes it)", field="responses"
        )
    if len(layout.spans) == 1 and layout.spans[0][1] == len(layout.text):
        return ids, [True] * len(ids), case
    trained = [any(a >= start and b <= stop for start, stop in layout.spans) for a, b in offsets]
    return ids, trained, case


def _finish(
    codec: Codec, layout: _Layout, response: Response, ids: list[int], trained: list[bool]
) -> tuple[list[int], list[bool], bool]:
    """Append the end token where the answer is finished; earlier turns of a long response already carry theirs in the text."""
    finished = response.finished if response.finished is not None else codec.finish != "never"
    if len(layout.spans) > 1:  # the end-of-turn tokens between turns are the template's text: trained right after a trained turn
        control = layout.end_id
        trained = [t or (i > 0 and trained[i - 1] and ids[i] == control) for i, t in enumerate(trained)]
    return (ids + [layout.end_id], trained + [True], True) if finished else (ids, trained, False)


def _assemble(
    codec: Codec, record: Record, prompt: str, layouts: list[_Layout], prompt_ids: list[int], joints: list[Any]
) -> Encoded:
    responses, masks, ends, cases = [], [], [], []
    for response, layout, joint in zip(record.responses, layouts, joints, strict=True):
        ids, trained, case = _response_ids(codec, prompt, prompt_ids, layout, joint)
        ids, trained, finished = _finish(codec, layout, response, ids, trained)
        if not any(trained):
            raise DataError("a response has no token", field="responses")
        responses.append(tuple(ids))
        masks.append(tuple(trained))
        ends.append(finished)
        cases.append(case + ("+trimmed" if layout.trimmed else ""))
    head = [] if codec.bos is None or prompt_ids[:1] == [codec.bos] else [codec.bos]
    if not head + prompt_ids:
        raise DataError("an empty prompt without BOS leaves no state from which the first token could be read", field="prompt")
    return Encoded((*head, *prompt_ids), tuple(responses), tuple(masks), tuple(ends), tuple(cases))


def encode(records: Iterable[Record], codec: Codec, *, chunk: int = 512) -> Iterator[tuple[Record, Encoded | DataError]]:
    """Ids of each record, in order; a record that cannot be encoded comes with the DataError that says why.

    Response ids are the ids of prompt+response after those of the prompt where the prompt's are a prefix of the joint encoding;
    otherwise encoded apart without the dummy prefix; otherwise refused. Works through `chunk` records at a time.
    """
    stream = iter(records)
    while group := list(islice(stream, chunk)):
        laid: list[tuple[Record, str, list[_Layout]] | tuple[Record, DataError]] = []
        texts: list[str] = []
        for record in group:
            try:
                prompt, layouts = _layouts(codec, record)
                laid.append((record, prompt, layouts))
                texts += [prompt, *(layout.text for layout in layouts)]
            except DataError as error:
                laid.append((record, _located(error, record)))
        encodings = iter(codec.backend.encode_batch(texts, add_special_tokens=False))
        for item in laid:
            record = item[0]
            if len(item) == 2:
                yield record, item[1]
                continue
            prompt_ids = next(encodings).ids
            joints = [next(encodings) for _ in item[2]]
            try:
                yield record, _assemble(codec, record, item[1], item[2], prompt_ids, joints)
            except DataError as error:
                yield record, _located(error, record)


def _located(error: DataError, record: Record) -> DataError:
    """The same fault with the record's file:line."""
    path, _, line = record.where.rpartition(":")
    return DataError(error.reason, path=path or None, line=int(line) if line.isdigit() else None, field=error.field)


def encode_prompt(codec: Codec, prompt: Text) -> tuple[int, ...]:
    """Ids of a prompt alone, BOS included: what sampling starts from. Equal to `Encoded.prompt` of a record with this prompt.

    Raises:
        DataError: the text spells a control token, or leaves nothing to start from.
    """
    _refuse_control(codec, prompt, "prompt")
    text = prompt if isinstance(prompt, str) else render(codec, prompt, generation=True)
    ids = codec.backend.encode(text, add_special_tokens=False).ids
    head = [] if codec.bos is None or ids[:1] == [codec.bos] else [codec.bos]
    if not head + ids:
        raise DataError("an empty prompt without BOS leaves nothing to start from", field="prompt")
    return (*head, *ids)


def end_ids(codec: Codec, prompt: Text) -> tuple[int, ...]:
    """Ids that end an answer to this kind of prompt: EOS, and the template's end-of-turn token for dialogues."""
    if isinstance(prompt, str) or codec.template_name == "plain":
        return (codec.eos,)
    probe = _dialogue(codec, prompt, render(codec, prompt, generation=True), Response("ok"))
    return tuple(dict.fromkeys((probe.end_id, codec.eos)))


def decode_response(codec: Codec, prompt_ids: tuple[int, ...], response_ids: list[int], ends: tuple[int, ...]) -> str:
    """The text of sampled ids, without the end token: decode(prompt + response) minus decode(prompt)."""
    body = response_ids[:-1] if response_ids and response_ids[-1] in ends else response_ids
    skip = 1 if codec.bos is not None and prompt_ids[:1] == (codec.bos,) else 0
    head = codec.backend.decode(list(prompt_ids[skip:]), skip_special_tokens=False)
    whole = codec.backend.decode([*prompt_ids[skip:], *body], skip_special_tokens=False)
    return whole[len(head) :] if whole.startswith(head) else codec.apart.decode(body, skip_special_tokens=False)
