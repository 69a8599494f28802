"""Models behind an OpenAI-compatible address: asked side by side, with patience, and never trusted.

What comes back is bytes of a stranger: limited in size and time, read strictly, counted where it is no answer. Touches the network only at
the address that the user named; no redirect is followed. The key is read from an environment variable and never written or printed.

    endpoint = connect("endpoint:http://127.0.0.1:8000/v1#tiny", options)
    for number, item in ask(endpoint, {0: body(endpoint, "Once upon", ...)}, read=lambda answer: answer.text, tally=Tally()): ...
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import numpy as np

from .config import Address, address
from .errors import EndpointError, UsageError
from .formats import FORBIDDEN
from .records import Message, Text
from .runs import Draft
from .screen import bar, clean, say

try:  # the client that huggingface_hub brings: httpx until its 2.3, httpx2 since
    http: Any = importlib.import_module("httpx2")
except ImportError:
    http = importlib.import_module("httpx")

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before a request is sent again: doubled each time, half of it by lot
LONGEST_ASKED = 600.0  # a Retry-After beyond this is not waited for
MOST_BYTES = 16 << 20  # of one answer
IN_A_ROW = 10  # requests that failed for good, one after the other: the endpoint is down
# What no other request would fare better with.
FATAL = {301: "redirects", 302: "redirects", 307: "redirects", 308: "redirects", 401: "wants a key, or another one: --key-variable NAME",
         403: "forbids this", 404: "has no such path or model", 405: "knows no such request"}  # fmt: skip
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)


class Garbage(ValueError):
    """An answer that cannot be used; the message is the kind under which it is counted."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, how long and how often. `price_*`: of a million tokens read or written."""

    address: Address
    concurrency: int
    retries: int
    timeout: float
    price_in: float
    price_out: float
    key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said. `finished`: it ended by itself, or was cut at max_tokens."""

    text: str
    finished: bool
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, slots=True)
class Fault:
    """No answer, after all retries."""

    reason: str


@dataclass
class Tally:
    """What was met: requests sent, tokens as the endpoint counts them, what was retried and what failed, by reason."""

    requests: int = 0
    answered: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    retried: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    def cost(self, endpoint: Endpoint) -> float:
        """Of the tokens so far."""
        return (self.tokens_in * endpoint.price_in + self.tokens_out * endpoint.price_out) / 1e6


def connect(spec: str, options: Any) -> Endpoint:
    """The endpoint that `spec` names, asked as `options` say. Raises UsageError for a variable that is not set, a key in the clear."""
    place, key = address(spec), ""
    if options.offline and not place.loopback:
        raise UsageError(f"{spec}: --offline refuses an endpoint that is not on this machine")
    if options.key_variable:
        key = os.environ.get(options.key_variable, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise UsageError(f"--key-variable {options.key_variable}: this environment variable is not set, or holds no key")
        if place.url.startswith("http://") and not place.loopback:
            raise UsageError(f"--key-variable: {place.url} would send the key in the clear; use https")
    return Endpoint(place, options.concurrency, options.retries, options.timeout, options.price_in, options.price_out, key)


# --- what is sent ---------------------------------------------------------------------------------------------------------------


def as_asked(prompt: Text, api: str) -> Text:
    """The prompt as the endpoint will see it: with api 'chat' a text is the user's one message.

    Raises UsageError for 'completions' of messages.
    """
    if api == "chat" and isinstance(prompt, str):
        return (Message("user", prompt),)
    if api == "completions" and not isinstance(prompt, str):
        raise UsageError("--api completions: a prompt is a dialogue, whose template only the endpoint knows; use --api chat")
    return prompt


def body(endpoint: Endpoint, prompt: Text, *, temperature: float, top_p: float, max_tokens: int, seed: int) -> dict[str, Any]:
    """One request: a chat for messages, a completion for text."""
    how = {"model": endpoint.address.name, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    if isinstance(prompt, str):
        return {"prompt": prompt} | how
    return {"messages": [{"role": m.role, "content": m.content} for m in prompt]} | how


def seed_of(seed: int, *which: int) -> int:
    """A request's own seed, 31 bits: a function of the run's and of what is asked."""
    return int(np.random.default_rng([seed, *which]).integers(2**31))


def guess_tokens(prompt: Text) -> int:
    """About how many tokens: four characters each. Only for estimates."""
    texts = [prompt] if isinstance(prompt, str) else [m.content for m in prompt]
    return sum(len(text) // 4 + 1 for text in texts)


def cost_text(endpoint: Endpoint, read: int, written: int, word: str) -> str:
    """', at most 1.25 to pay', or '' where no price was given."""
    if not endpoint.price_in and not endpoint.price_out:
        return ""
    return f", {word} {(read * endpoint.price_in + written * endpoint.price_out) / 1e6:,.2f} to pay"


# --- what comes back ------------------------------------------------------------------------------------------------------------


def parse(content: bytes, key: str = "") -> Answer:
    """The one choice of an answer in the form of /chat/completions or /completions. Raises Garbage."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise Garbage("not JSON") from None
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Garbage("not one choice")
    message = choices[0].get("message")
    text = message.get("content") if isinstance(message, dict) else choices[0].get("text")
    if not isinstance(text, str):
        raise Garbage("no text")
    if FORBIDDEN.search(text):
        raise Garbage("text with NUL or a lone surrogate")
    if key and key in text:
        raise Garbage("text that holds the key")
    reason = choices[0].get("finish_reason")
    if reason not in ("stop", "length"):
        raise Garbage("finish_reason is neither stop nor length")
    usage = value.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    tokens = [count if type(count) is int and 0 <= count < 10**9 else 0 for count in counts]
    return Answer(text, reason == "stop", *tokens)


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date. None where it says nothing."""
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


class _Status(Exception):
    """An answer with a status that is not 200."""

    def __init__(self, code: int, wait: float | None, said: str):
        self.code, self.wait, self.said = code, wait, said


async def _once(client: Any, endpoint: Endpoint, request: Mapping[str, Any]) -> Answer:
    """Send one request and read its answer, at most MOST_BYTES of it."""
    url = endpoint.address.url + ("/chat/completions" if "messages" in request else "/completions")
    async with client.stream("POST", url, json=dict(request)) as response:
        content = bytearray()
        async for piece in response.aiter_raw():
            content += piece
            if len(content) > MOST_BYTES:
                raise Garbage("too large")
        if response.status_code == 200:
            return parse(bytes(content), endpoint.key)
        said = content[:300].decode("utf-8", "replace")
        said = said.replace(endpoint.key, "***") if endpoint.key else said
        raise _Status(response.status_code, retry_after(response.headers.get("retry-after")), " ".join(clean(said).split()))


@dataclass
class _Gate:
    """Closed until `opens` (monotonic seconds): one request that is told to wait holds back all."""

    opens: float = 0.0

    async def wait(self) -> None:
        while (left := self.opens - time.monotonic()) > 0:
            await asyncio.sleep(left)


async def _patiently(client: Any, endpoint: Endpoint, request: Mapping[str, Any], read: Callable[[Answer], Any], tally: Tally,
                     gate: _Gate) -> Any:  # fmt: skip
    """What `read` makes of the answer, or a Fault after all retries. Raises EndpointError for what no retry mends."""
    reason = ""
    for attempt in range(endpoint.retries + 1):
        await gate.wait()
        tally.requests += 1
        wait = None
        try:
            async with asyncio.timeout(endpoint.timeout):
                answer = await _once(client, endpoint, request)
            tally.tokens_in, tally.tokens_out = tally.tokens_in + answer.tokens_in, tally.tokens_out + answer.tokens_out
            item = read(answer)
            tally.answered += 1
            return item
        except TimeoutError:
            reason = "no answer in time"
        except Garbage as error:
            reason = str(error)
        except _Status as error:
            reason, wait = f"status {error.code}", error.wait
            if error.code in FATAL:
                raise EndpointError(f"{endpoint.address.url} {FATAL[error.code]} (status {error.code}: {error.said[:120]})") from None
            if error.code not in AGAIN:
                break
        except http.HTTPError as error:
            reason = f"connection: {type(error).__name__}"
        if wait is not None and wait > LONGEST_ASKED:
            raise EndpointError(f"{endpoint.address.url} limits the rate: it says to wait {wait:,.0f} s; the same command goes on later")
        if wait is not None:
            gate.opens = max(gate.opens, time.monotonic() + wait)
        if attempt < endpoint.retries:
            tally.retried[reason] += 1
            if wait is None:
                await asyncio.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * (0.5 + random.random() / 2))
    tally.failed[reason] += 1
    return Fault(reason)


async def _all(endpoint: Endpoint, jobs: Mapping[int, Mapping[str, Any]], read: Callable[[Answer], Any], tally: Tally,
               put: Callable[[Any], None]) -> None:  # fmt: skip
    """Every job, `concurrency` at a time, in order of their numbers; what becomes of each is put as (number, item)."""
    gate, rest, row = _Gate(), iter(jobs.items()), 0
    headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {endpoint.key}"} if endpoint.key else {})
    timeout, limits = http.Timeout(None), http.Limits(max_connections=endpoint.concurrency)  # the whole answer has its time in `_patiently`
    # A proxy of the environment is for the world outside.
    async with http.AsyncClient(headers=headers, timeout=timeout, limits=limits, follow_redirects=False,
                                trust_env=not endpoint.address.loopback) as client:  # fmt: skip

        async def worker() -> None:
            nonlocal row
            for number, request in rest:
                item = await _patiently(client, endpoint, request, read, tally, gate)
                row = row + 1 if isinstance(item, Fault) else 0
                put((number, item))
                if row >= IN_A_ROW:
                    raise EndpointError(f"{endpoint.address.url} gave no answer to {row} requests in a row (the last: {item.reason})")

        workers = [asyncio.ensure_future(worker()) for _ in range(min(endpoint.concurrency, len(jobs)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for each in workers:
                each.cancel()


def ask(endpoint: Endpoint, jobs: Mapping[int, Mapping[str, Any]], *, read: Callable[[Answer], Any],
        tally: Tally) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """Send every job and yield (number, what `read` made of the answer, or a Fault) in the order in which they come.

    Args:
        jobs: number -> request, as `body` makes it. read: may raise Garbage: then the request is sent again.

    Raises:
        EndpointError: the endpoint refuses everybody, is down, or wants to be left alone for long.
    """
    box: queue.SimpleQueue[Any] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()
    everything = loop.create_task(_all(endpoint, jobs, read, tally, box.put))

    def work() -> None:
        try:
            loop.run_until_complete(everything)
            box.put(None)
        except BaseException as error:  # noqa: BLE001  told to whoever waits at the box
            box.put(error)
        finally:
            loop.close()

    thread = threading.Thread(target=work, name="endpoint", daemon=True)
    thread.start()
    try:
        while (item := box.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            loop.call_soon_threadsafe(everything.cancel)
        thread.join()


def gather(endpoint: Endpoint, jobs: Mapping[int, Mapping[str, Any]], read: Callable[[Answer], Any], found: Draft, label: str, *,
           leave_out: bool) -> Tally:  # fmt: skip
    """Ask what the draft lacks and keep every answer at once; prints what was met.

    Raises:
        EndpointError: answers are missing, and `leave_out` does not say to do without them (they are kept as null then).
    """
    rest, tally, start = {n: request for n, request in jobs.items() if n not in found.places}, Tally(), time.monotonic()
    if found.places:
        say(f"{len(found.places)} of {len(jobs)} answers are here already")
    missing: dict[int, str] = {}
    try:
        with bar(label, len(jobs)) as advance:
            for number, item in ask(endpoint, rest, read=read, tally=tally):
                if isinstance(item, Fault):
                    missing[number] = item.reason
                else:
                    found.add({number: item})
                done = tally.answered + len(missing)
                more = (len(rest) - done) / done
                price = f", {tally.cost(endpoint) * more:,.2f} more to pay" if endpoint.price_in or endpoint.price_out else ""
                advance(len(found.places), len(jobs), f"{(time.monotonic() - start) * more:,.0f} s left{price}")
    finally:
        _tell(endpoint, tally, time.monotonic() - start)
    if missing and not leave_out:
        raise EndpointError(f"{len(missing)} of {len(jobs)} answers are missing; the others are kept. The same command asks again for "
                            "these; --skip-bad does without them")  # fmt: skip
    if missing:
        found.add(dict.fromkeys(missing))
    return tally


def _tell(endpoint: Endpoint, tally: Tally, seconds: float) -> None:
    cost = f", {tally.cost(endpoint):,.2f} to pay" if endpoint.price_in or endpoint.price_out else ""
    say(f"{tally.answered} answers to {tally.requests} requests in {seconds:,.1f} s; {tally.tokens_in:,} tokens read, {tally.tokens_out:,} "
        f"written{cost}")  # fmt: skip
    for word, counts in (("sent again", tally.retried), ("failed", tally.failed)):
        for reason, count in counts.most_common():
            say(f"  {word} {count}: {clean(reason)}")
