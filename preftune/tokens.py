"""Text to ids: the one place where a tokeniser or a chat template is used to make training data.

`Codec` holds a tokeniser, a template and the rules for BOS and EOS; `encode` turns records into ids. The text of a record and the
decoded ids are equal, always, or the record is refused with a reason. Touches records, templating and the `tokenizers` backend;
no model, no file.

    codec = make_codec(tokenizer)                     # transformers' fast tokeniser
    for record, result in encode(records, codec): ... # Encoded, or DataError with the reason
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .errors import DataError, ModelError, UsageError
from .records import Message, Record, Response, Text
from .templating import DATE, Renderer

# For dialogues when the tokeniser brings no template. The space before an answer is part of the answer's text, so that word-piece
# and byte-level tokenisers see the word start where it was when they were trained.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].capitalize() }}: {{ m['content'] }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


# Patterns of byte-level tokenisers (GPT-2; Llama 3; Qwen 2) by which a new word begins at a space between two letters, whatever
# follows: they look at most one character ahead and never back. Text that is cut there has the ids of its two parts.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD_PATTERNS = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", _WORDS % "{1,3}", _WORDS % "")
LAST_WORD = re.compile(r".*[A-Za-z](?= [A-Za-z])", re.DOTALL)

DISGUISE = 0xF0000  # the first of the private-use characters that stand for control tokens


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of one record.

    Args:
        prompt: ids of the prompt, BOS included.
        responses: per response its ids, the end token included where `finished`.
        trained: per response, per id: does the model have to produce it (False for a user's turn inside a response).
        finished: per response.
        cases: per response how its ids were found: 'joint' or 'apart', with '+trimmed' where the template stripped the text, '+split'
            where its text or the prompt's spells a control token and was encoded as ordinary text.
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
        control_tokens: what becomes of text that spells a control token: 'refuse', or 'split' into ordinary tokens.
    """

    tokenizer: Any
    template: str
    template_name: str
    bos: int | None
    eos: int
    finish: str = "auto"
    control_tokens: str = "refuse"

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
    def disguises(self) -> dict[str, str]:
        """Control token -> a text of its length in private-use characters, which stands for it where it is not meant as one."""
        names = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        return {name: chr(DISGUISE + i) * len(name) for i, name in enumerate(names)}

    @cached_property
    def swaps(self) -> tuple[tuple[dict[str, str], re.Pattern[str]], ...]:
        """(what stands for what, a pattern of the former): disguises to control tokens; both ways at the same time."""
        back = {other: name for name, other in self.disguises.items()}
        tables = (back, back | self.disguises)
        return tuple((t, re.compile("|".join(map(re.escape, sorted(t, key=len, reverse=True))) or r"(?!)")) for t in tables)

    @cached_property
    def innocent(self) -> Tokenizer:
        """The same tokeniser, but for names: its control tokens are spelt as their disguises, so that text cannot spell one."""
        spec = json.loads(self.backend.to_str())
        for token in spec["added_tokens"]:
            token["content"] = self.disguises.get(token["content"], token["content"])
        model, vocab = spec["model"], spec["model"]["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {self.disguises.get(piece, piece): number for piece, number in vocab.items()}
        else:
            model["vocab"] = [[self.disguises.get(piece, piece), score] for piece, score in vocab]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self.disguises.get(model["unk_token"], model["unk_token"])
        out = Tokenizer.from_str(json.dumps(spec | {"post_processor": None}))
        if any(out.token_to_id(other) != self.backend.token_to_id(name) for name, other in self.disguises.items()):
            raise ModelError("--control-tokens split: this tokeniser keeps its control tokens where they cannot be renamed; use refuse")
        return out

    @cached_property
    def innocent_apart(self) -> Tokenizer:
        return Tokenizer.from_str(json.dumps(_without_dummy_prefix(json.loads(self.innocent.to_str()))))

    @cached_property
    def control_ids(self) -> frozenset[int]:
        return frozenset(number for number, t in self.tokenizer.added_tokens_decoder.items() if t.special)

    @cached_property
    def words_stand_alone(self) -> bool:
        """Whether the ids of 'one two' are those of 'one' and those of ' two', between any two letters: BPE within known words."""
        spec = json.loads(self.backend.to_str())
        normaliser, splits = spec["normalizer"], spec["pre_tokenizer"]
        parts = splits["pretokenizers"] if splits and splits["type"] == "Sequence" else [splits]
        last, pattern = parts[-1] or {}, WORD_PATTERNS[0]
        if len(parts) == 2:
            split = parts[0]
            plain = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
            pattern = split["pattern"].get("Regex", "") if plain else ""
        return (
            spec["model"]["type"] == "BPE" and not spec["model"].get("dropout") and len(parts) <= 2 and pattern in WORD_PATTERNS
            and (normaliser is None or normaliser["type"] == "NFC")
            and last.get("type") == "ByteLevel" and not last["add_prefix_space"] and last["use_regex"] == (len(parts) == 1)
            and not any(re.search(r"^\w|\w \w|\w$", token["content"]) for token in spec["added_tokens"])
        )  # fmt: skip

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.template)

    def describe(self) -> dict[str, Any]:
        """What the fingerprint and the manifest say of this codec."""
        return {"template": self.template, "template_name": self.template_name, "template_date": DATE, "bos": self.bos,
                "eos": self.eos, "finish": self.finish, "control_tokens": self.control_tokens}  # fmt: skip


def make_codec(tokenizer: Any, *, template: str = "auto", bos: str = "auto", finish: str = "auto",
               control_tokens: str = "refuse") -> Codec:  # fmt: skip
    """The codec of a fast tokeniser.

    Args:
        tokenizer: transformers tokeniser with a `tokenizers` backend.
        template: 'auto' (the tokeniser's own, else plain), 'plain', or the path of a Jinja file.
        bos: 'always', 'never', or 'auto': where the tokeniser adds it by itself or has a BOS that is not its EOS.
        finish: 'auto', 'always', 'never' for responses that do not say whether they are finished.
        control_tokens: 'refuse' or 'split' text that spells a control token.

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
    adds = own is not None and tokenizer.backend_tokenizer.encode("a").ids[:1] == [own]
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
    return Codec(tokenizer, source, name, own if wanted else None, tokenizer.eos_token_id, finish, control_tokens)


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


def render(codec: Codec, messages: Iterable[Message], *, generation: bool) -> str:
    """Messages through the template, in a process of its own. `generation` adds what stands before an assistant's answer.

    Raises:
        DataError: the template refuses these messages. ModelError: it cannot be read, or takes too much time, memory or room.
    """
    token = codec.tokenizer
    plain = [{"role": m.role, "content": m.content} for m in messages]
    return codec.renderer(messages=plain, add_generation_prompt=generation, bos_token=token.bos_token or "",
                          eos_token=token.eos_token or "", pad_token=token.pad_token or "")  # fmt: skip


# ---------------------------------------------------------------- encoding


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where an answer stands in its text: `text[len(prompt):]` is the answer, `spans` the character ranges that are trained."""

    text: str
    spans: tuple[tuple[int, int], ...]
    ends: tuple[int, ...]  # character ends after which the end token belongs, one per trained turn
    end_id: int
    trimmed: bool = False

    @property
    def whole(self) -> bool:
        """Whether every token after the prompt is trained."""
        return len(self.spans) == 1 and self.spans[0][1] == len(self.text)


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
        before = prompt_text if history is prompt else render(codec, history, generation=True)
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


def _spelt(codec: Codec, text: Text, field: str) -> Text:
    """The text, with a disguise in place of what spells a control token. DataError unless `--control-tokens split` asks for that."""

    def disguised(part: str) -> str:
        found = codec.control.search(part)
        if found and codec.control_tokens == "refuse":
            raise DataError(f"the text spells the control token {found.group()!r} (--control-tokens split reads it as text)", field=field)
        if codec.control_tokens == "split" and re.search(f"[{chr(DISGUISE)}-{chr(DISGUISE + len(codec.disguises))}]", part):
            raise DataError("the text holds private-use characters that control tokens are told apart by", field=field)
        return codec.control.sub(lambda match: codec.disguises[match.group()], part) if found else part

    if isinstance(text, str):
        return disguised(text)
    messages = tuple(Message(m.role, disguised(m.content)) for m in text)
    return text if messages == text else messages


def _swap(codec: Codec, text: str, *, control: bool) -> str:
    """Disguises back into what they stand for; with `control`, what is meant as a control token into its disguise at the same time."""
    if codec.control_tokens == "refuse":
        return text
    meaning, found = codec.swaps[control]
    return found.sub(lambda match: meaning[match.group()], text)


def _with_text(response: Response, text: Text) -> Response:
    return replace(response, text=text)


def _read(codec: Codec, text: str, *, apart: bool, split: bool) -> Any:
    """Ids of a text; with `split` of a disguised one, in which only what is not disguised may become a control token."""
    if split:
        return (codec.innocent_apart if apart else codec.innocent).encode(_swap(codec, text, control=True), add_special_tokens=False)
    return (codec.apart if apart else codec.backend).encode(text, add_special_tokens=False)


def _require_control(codec: Codec, ids: Sequence[int], disguised: str, field: str) -> None:
    """Raises DataError where ids hold more control tokens than the template wrote."""
    if sum(i in codec.control_ids for i in ids) > len(codec.control.findall(disguised)):
        raise DataError("the tokeniser makes a control token of text that spells none", field=field)


def _layouts(codec: Codec, record: Record) -> tuple[str, list[_Layout]]:
    """The prompt's text and each answer's, disguised where they spell a control token, or DataError with the reason."""
    texts = _spelt(codec, record.prompt, "prompt"), [_spelt(codec, r.text, "responses") for r in record.responses]
    if texts != (record.prompt, [r.text for r in record.responses]):
        record = replace(record, prompt=texts[0], responses=tuple(map(_with_text, record.responses, texts[1])))
    if isinstance(record.prompt, str):
        base, size = record.prompt, len(record.prompt)
        answers = [r.text for r in record.responses if isinstance(r.text, str)]
        if len(answers) < len(record.responses):
            raise DataError("the prompt is text but a response is a list of messages", field="responses")
        return base, [_Layout(base + a, ((size, size + len(a)),), (size + len(a),), codec.eos) for a in answers]
    prompt = render(codec, record.prompt, generation=True)
    return prompt, [_dialogue(codec, record.prompt, prompt, r) for r in record.responses]


def _cut(codec: Codec, prompt: str, layouts: Sequence[_Layout]) -> int:
    """Where the prompt may be cut so that its first part is encoded once for all of its answers; 0 where nowhere."""
    if not codec.words_stand_alone or not all(layout.whole for layout in layouts):
        return 0
    found = LAST_WORD.match(prompt)
    return found.end() if found else 0


@dataclass(frozen=True, slots=True)
class _Whole:
    """Ids of a prompt with an answer, as if they had been encoded in one piece; None for offsets that nobody asks for."""

    ids: list[int]
    offsets: Sequence[tuple[int, int]] | None = None


def _response_ids(
    codec: Codec, prompt: str, prompt_ids: list[int], layout: _Layout, joint: Any
) -> tuple[list[int], list[bool], str]:
    """Ids of one answer, which of them are trained, and how they were found. Raises DataError('boundary')."""
    size, text = len(prompt_ids), _swap(codec, layout.text, control=False)
    split, ids, begin = text != layout.text, joint.ids, 0
    if ids[:size] == prompt_ids:
        ids, case = ids[size:], "joint"
    else:  # a token straddles the boundary: encode the answer apart, and only if the text survives
        joint, begin, size = _read(codec, layout.text[len(prompt) :], apart=True, split=split), len(prompt), 0
        ids, case = joint.ids, "apart"
    if codec.backend.decode(prompt_ids + ids, skip_special_tokens=False) != text:
        raise DataError(
            "the tokeniser cannot reproduce this text (an unknown character, or a normaliser that changes it)", field="responses"
        )
    if split:
        case += "+split"
        _require_control(codec, prompt_ids + ids, layout.text, "responses")
    if layout.whole:
        return ids, [True] * len(ids), case
    trained = [any(a + begin >= start and b + begin <= stop for start, stop in layout.spans) for a, b in joint.offsets[size:]]
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
    otherwise encoded apart without the dummy prefix; otherwise refused. Works through `chunk` records at a time, and reads one chunk
    ahead: the tokeniser, which needs no interpreter, runs on a thread of its own beside what is done with the chunk before. Where words
    stand alone, all of a prompt but its last word is encoded once, not once for each answer: the ids are the same.
    """
    stream = iter(records)
    with ThreadPoolExecutor(1) as thread:
        laid: list[_Laid | tuple[Record, DataError]] = []
        found: Future[list[Any]] | None = None
        while True:
            group = [_lay(codec, record) for record in islice(stream, chunk)]
            ahead = thread.submit(_read_all, codec, [item for item in group if isinstance(item, _Laid)]) if group else None
            if found:
                encodings = iter(found.result())
                for item in laid:
                    yield _assembled(codec, item, encodings) if isinstance(item, _Laid) else item
            if not group:
                return
            laid, found = group, ahead


@dataclass(frozen=True, slots=True)
class _Laid:
    """A record's text, ready to be encoded: up to `cut` the prompt is encoded once; `split` where it spells a control token."""

    record: Record
    prompt: str
    layouts: list[_Layout]
    split: bool
    cut: int


def _lay(codec: Codec, record: Record) -> _Laid | tuple[Record, DataError]:
    try:
        prompt, layouts = _layouts(codec, record)
    except DataError as error:
        return record, _located(error, record)
    split = any(_swap(codec, layout.text, control=False) != layout.text for layout in layouts)
    return _Laid(record, prompt, layouts, split, 0 if split else _cut(codec, prompt, layouts))


def _read_all(codec: Codec, laid: list[_Laid]) -> list[Any]:
    """What the tokeniser says of each record that spells no control token: its prompt up to the cut, the rest of it, its answers."""
    texts = [text for x in laid if not x.split for text in (x.prompt[: x.cut], x.prompt[x.cut :], *(y.text[x.cut :] for y in x.layouts))]
    whole = all(layout.whole for x in laid for layout in x.layouts)  # then nobody asks where a token stands
    return (codec.backend.encode_batch_fast if whole else codec.backend.encode_batch)(texts, add_special_tokens=False)


def _assembled(codec: Codec, laid: _Laid, encodings: Iterator[Any]) -> tuple[Record, Encoded | DataError]:
    if laid.split:
        first, *joints = (_read(codec, text, apart=False, split=True) for text in (laid.prompt, *(x.text for x in laid.layouts)))
    else:
        head = next(encodings).ids
        first, *joints = islice(encodings, 1 + len(laid.layouts))
        if laid.cut:
            first, *joints = (_Whole(head + found.ids) for found in (first, *joints))
    try:
        return laid.record, _assemble(codec, laid.record, laid.prompt, laid.layouts, first.ids, joints)
    except DataError as error:
        return laid.record, _located(error, laid.record)


def _located(error: DataError, record: Record) -> DataError:
    """The same fault with the record's file:line."""
    path, _, line = record.where.rpartition(":")
    return DataError(error.reason, path=path or None, line=int(line) if line.isdigit() else None, field=error.field)


def encode_prompt(codec: Codec, prompt: Text) -> tuple[int, ...]:
    """Ids of a prompt alone, BOS included: what sampling starts from. Equal to `Encoded.prompt` of a record with this prompt.

    Raises:
        DataError: the text spells a control token, or leaves nothing to start from.
    """
    prompt = _spelt(codec, prompt, "prompt")
    text = prompt if isinstance(prompt, str) else render(codec, prompt, generation=True)
    ids = _read(codec, text, apart=False, split=_swap(codec, text, control=False) != text).ids
    _require_control(codec, ids, text, "prompt")
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
