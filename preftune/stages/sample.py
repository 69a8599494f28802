"""`preftune sample`: responses from a model, as canonical records with their provenance; KL and reward where asked.

Each line is a record: the prompt, k responses with `finished`, `score` (with --reward) and `source` (model, weights, seed, settings,
log-prob, KL). What is finished is on the disk at once; the same command goes on where a stopped one was, and ends with the same file. The
model is a folder, a hub name, or one behind an OpenAI-compatible endpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import endpoints, models
from ..config import Sample
from ..errors import DataError, UsageError
from ..evaluate import clustered, score_samples
from ..files import fingerprint, read_jsonl
from ..formats import read_prompts, to_json
from ..records import Record, Response, Text, as_text
from ..rewards import Scorer, scorer
from ..runs import Draft, draft, versions
from ..sampling import sample
from ..screen import bar, clean, say
from ..store import from_ids
from ..tokens import Codec, decode_response, encode_prompt, end_ids, make_codec

# Options that no number depends on, and those whose content is compared instead.
FREE = ("output", "data", "max_records", "offline", "dry_run", "model", "reference", "reward", "device", "threads", "skip_bad", "template",
        "concurrency", "retries", "timeout", "key_variable", "price_in", "price_out")  # fmt: skip


def run(options: Sample) -> int:
    """Sample and write one canonical record a prompt; prints means with standard errors."""
    if Path(str(options.output)).exists():
        raise UsageError(f"--output {options.output}: exists already; name a new file")
    prompts = read_prompts(options.data, max_records=options.max_records)
    made_from = {name: value for name, value in asdict(options).items() if name not in FREE} | {"preftune": versions()["preftune"]}
    made_from["prompts"] = fingerprint([_plain(p) for p in prompts])
    return (_from_endpoint if str(options.model).startswith("endpoint:") else _from_weights)(options, prompts, made_from)


def _plain(prompt: Text) -> Any:
    return prompt if isinstance(prompt, str) else [[m.role, m.content] for m in prompt]


# --- a model here ---------------------------------------------------------------------------------------------------------------


def _from_weights(options: Sample, prompts: Sequence[Text], made_from: dict[str, Any]) -> int:
    device = models.pick_device(options.device)
    if options.reference and (options.temperature != 1 or options.top_p != 1):
        raise UsageError("--reference: KL is that of the policy itself, so it needs --temperature 1 and --top-p 1")
    if options.dry_run:
        tokenizer, window = models.load_tokenizer(str(options.model), offline=options.offline)
        ids, _ = _encoded(_codec(tokenizer, options), prompts, options, window)
        return _dry(options, len(prompts), sum(map(len, ids)), "tokens")
    scoring = scorer(options.reward, device=device, dtype=options.dtype, offline=options.offline) if options.reward else None
    model, tokenizer = models.load(str(options.model), dtype=options.dtype, device=device, offline=options.offline)
    threads = models.use_threads(model, options.threads)
    codec = _codec(tokenizer, options)
    ids, ends = _encoded(codec, prompts, options, models.window_of(model.config))
    frozen = models.load(options.reference, dtype=options.dtype, device=device, offline=options.offline)[0] if options.reference else None
    weights = models.weights_fingerprint(str(options.model), offline=options.offline)
    made_from |= {"model": weights, "ids": fingerprint([list(p) for p in ids], [list(e) for e in ends]), "device": device,
                  "threads": threads, "reward": _identity(scoring), "versions": versions(),
                  "reference": options.reference and models.weights_fingerprint(options.reference, offline=options.offline)}  # fmt: skip
    source = {"model": str(options.model), "weights": weights, "temperature": float(options.temperature), "top_p": float(options.top_p),
              "seed": options.seed, "max_tokens": options.sample_tokens}  # fmt: skip
    with draft(Path(str(options.output)), made_from) as found, bar("sampling", len(ids)) as advance:
        if found.places:
            say(f"{len(found.places)} of {len(ids)} prompts are done already")
        # The same groups whatever is done already: rounding depends on who shares a pass.
        order, size = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i)), max(1, options.batch_size // options.k)
        for group in (order[a : a + size] for a in range(0, len(order), size)):
            if all(i in found.places for i in group):
                continue
            rows = _group(model, frozen, codec, [prompts[i] for i in group], [ids[i] for i in group], [ends[i] for i in group], scoring,
                          source, group, options, device)  # fmt: skip
            found.add({i: row for i, row in zip(group, rows, strict=True) if i not in found.places})
            advance(len(found.places), len(ids))
        found.publish(lambda: (found.item(i) for i in range(len(ids))))
    _tell_unfit(found.output, codec)
    _tell_means(found.output, ("kl",) * bool(frozen) + ("reward",) * bool(scoring))
    say(f"{len(ids)} prompts x {options.k} -> {options.output}")
    return 0


def _codec(tokenizer: Any, options: Sample) -> Codec:
    return make_codec(tokenizer, template=options.template, bos=options.bos, control_tokens=options.control_tokens)


def _encoded(codec: Codec, prompts: Sequence[Text], options: Sample,
             window: int | None) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:  # fmt: skip
    ids, ends = [encode_prompt(codec, p) for p in prompts], [end_ids(codec, p) for p in prompts]
    long = [i for i, p in enumerate(ids) if window and len(p) + options.sample_tokens > window]
    if long:
        raise DataError(f"{len(long)} prompts plus --sample-tokens {options.sample_tokens} exceed the model's {window} positions "
                        f"(longest prompt: {max(map(len, ids))} tokens)")  # fmt: skip
    return ids, ends


def _identity(scoring: Scorer | None) -> list[str] | None:
    return [scoring.name, scoring.fingerprint] if scoring else None


def _group(model: Any, frozen: Any, codec: Codec, prompts: Sequence[Text], ids: Sequence[tuple[int, ...]],
           ends: Sequence[tuple[int, ...]], scoring: Scorer | None, source: dict[str, Any], numbers: Sequence[int], options: Sample,
           device: str) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of a few prompts: all their samples, in one pass where they fit."""
    samples = sample(model, ids, ends=ends, k=options.k, max_tokens=options.sample_tokens, temperature=options.temperature,
                     top_p=options.top_p, seed=options.seed, rows_at_once=options.batch_size, numbers=numbers)  # fmt: skip
    texts = [[decode_response(codec, p, list(s.ids), e) for s in row] for p, row, e in zip(ids, samples, ends, strict=True)]
    shape = (len(ids), options.k)
    kl = rewards = None
    if frozen is not None:
        store = from_ids(ids, [[s.ids for s in row] for row in samples])
        kl = score_samples(model, frozen, store, micro_tokens=8192, device=device)[0].reshape(shape)
    if scoring:
        plain = [Response(texts[i][j], samples[i][j].finished) for i in range(len(ids)) for j in range(options.k)]
        rewards = scoring([p for p in prompts for _ in range(options.k)], plain).reshape(shape)
    rows = []
    for i, prompt in enumerate(prompts):
        said = [source | ({} if kl is None else {"kl": float(kl[i, j])}) | {"logp": sum(samples[i][j].logps)} for j in range(options.k)]
        responses = tuple(Response(texts[i][j], samples[i][j].finished, None if rewards is None else float(rewards[i, j]), said[j])
                          for j in range(options.k))  # fmt: skip
        rows.append(to_json(Record(prompt, responses)))
    return rows


def _tell_unfit(output: Path, codec: Codec) -> None:
    """Counts what training will refuse or leave out: they are samples all the same, and stay."""
    texts = [response["text"] if isinstance(response, dict) else response for row in read_jsonl(output) for response in row["responses"]]
    spelt, empty = sum(bool(codec.control.search(text)) for text in texts), sum(not text.strip() for text in texts)
    for count, what in ((spelt, "spell a control token: train with --control-tokens split"),
                        (empty, "are empty: score and pair leave their prompts out")):  # fmt: skip
        if count:
            say(f"{count} of {len(texts)} responses {what}")


def _tell_means(output: Path, names: Sequence[str]) -> None:
    """Prints the mean of KL and reward over prompts with its standard error."""
    if not names:
        return
    rows = [row["responses"] for row in read_jsonl(output)]
    of = {"kl": lambda r: r["source"]["kl"], "reward": lambda r: r["score"]}
    for name in names:
        mean, se = clustered(np.array([[of[name](r) for r in row] for row in rows]))
        say(f"{name} {mean:.4f} ± {se:.4f}{' nats a response (Rao-Blackwell)' if name == 'kl' else ''}")


def _dry(options: Sample, prompts: int, size: int, unit: str) -> int:
    """What would be done, printed."""
    say(f"{prompts} prompts of {size:,} {unit} in all, {options.k} responses to each, at most {options.sample_tokens} tokens a response: "
        f"at most {prompts * options.k * options.sample_tokens:,} tokens to write")  # fmt: skip
    say(f"nothing was done; without --dry-run: -> {clean(str(options.output))}")
    return 0


# --- a model behind an endpoint -------------------------------------------------------------------------------------------------


def _from_endpoint(options: Sample, prompts: Sequence[Text], made_from: dict[str, Any]) -> int:
    endpoint = endpoints.connect(str(options.model), options)
    asked = [endpoints.as_asked(prompt, options.api) for prompt in prompts]
    jobs = {i * options.k + j: endpoints.body(endpoint, prompt, temperature=options.temperature, top_p=options.top_p,
                                              max_tokens=options.sample_tokens, seed=endpoints.seed_of(options.seed, i, j))
            for i, prompt in enumerate(asked) for j in range(options.k)}  # fmt: skip
    if options.dry_run:
        read = options.k * sum(endpoints.guess_tokens(p) for p in asked)
        say(f"{len(jobs)} requests to {endpoint.address.url}, {endpoint.concurrency} at a time; about {read:,} tokens to read"
            f"{endpoints.cost_text(endpoint, read, len(jobs) * options.sample_tokens, 'at most')}")  # fmt: skip
        return _dry(options, len(prompts), sum(len(as_text(p)) for p in prompts), "characters")
    scoring = scorer(options.reward, offline=options.offline) if options.reward else None
    made_from |= {"model": str(options.model), "reward": _identity(scoring)}
    source = {"model": endpoint.address.name, "endpoint": endpoint.address.url, "temperature": float(options.temperature),
              "top_p": float(options.top_p), "max_tokens": options.sample_tokens}  # fmt: skip
    with draft(Path(str(options.output)), made_from) as found:
        endpoints.gather(endpoint, jobs, lambda answer: {"text": answer.text, "finished": answer.finished}, found, "sampling",
                         leave_out=options.skip_bad)  # fmt: skip
        found.publish(lambda: _assembled(found, asked, source, scoring, options))
    if scoring and options.k and not options.skip_bad:
        _tell_means(found.output, ("reward",))
    say(f"{len(prompts)} prompts x {options.k} -> {options.output}")
    return 0


def _assembled(found: Draft, asked: Sequence[Text], source: dict[str, Any], scoring: Scorer | None,
               options: Sample) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The records of what was answered; a prompt without any answer has none."""
    for i, prompt in enumerate(asked):
        items = [(j, item) for j in range(options.k) if (item := found.item(i * options.k + j)) is not None]
        said = [Response(item["text"], item["finished"], None, source | {"seed": endpoints.seed_of(options.seed, i, j)})
                for j, item in items]  # fmt: skip
        if scoring and said:
            scores = scoring([prompt] * len(said), said)
            said = [replace(response, score=float(v)) for response, v in zip(said, scores, strict=True)]
        if said:
            yield to_json(Record(prompt, tuple(said)))


