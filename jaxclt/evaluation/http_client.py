"""A chat model at an OpenAI-compatible address: asked once, never twice.

Every reply is on disk before anybody sees it: a run that is killed and started again
goes on where it was. Time-outs, rate limits and server errors are tried again by the
`openai` package, which waits as long as the server asks; damaged and empty replies are
asked for again here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from jaxclt.errors import InputError, check_at_least, check_positive
from jaxclt.files.json_file import COUNT, TEXT, json_schema, named, record
from jaxclt.files.json_text import to_json
from jaxclt.runs.kept import Answers

__all__ = ["BudgetError", "Client", "ClientOptions", "Completion", "Message"]

Message = dict[str, str]  # role and content
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_COSTS = ("prompt_tokens", "completion_tokens", "requests")
PAUSE = 0.5  # seconds before a damaged reply is asked for again; then twice as long
_REPLY = json_schema(record({"key": TEXT, "text": TEXT}, {"usage": named(COUNT)}))


class BudgetError(Exception):
    """Nothing more is asked: the tokens that may be spent are."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """A reply and what it cost."""

    text: str
    usage: dict[str, int]
    from_cache: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """How a model is asked.

    Raises:
      InputError: for a value out of its range.
    """

    cache_dir: str | os.PathLike[str] | None = None  # keeps replies; None: memory only
    temperature: float | None = 0.0  # None leaves it to the server
    max_tokens: int | None = 1024  # of a reply; None leaves it to the server
    timeout: float = 120.0  # seconds to wait for a reply
    tries: int = 8  # of a request, the first included
    concurrency: int = 8  # requests under way together
    requests_per_minute: float | None = None  # most that are sent
    # After so many tokens, of prompts and replies, nothing more is asked. Replies under
    # way by then still come in.
    max_tokens_total: int | None = None

    def __post_init__(self) -> None:
        check_positive(
            timeout=self.timeout,
            requests_per_minute=self.requests_per_minute,
            tries=self.tries,
            concurrency=self.concurrency,
            max_tokens=self.max_tokens,
        )
        check_at_least(
            0, temperature=self.temperature, max_tokens_total=self.max_tokens_total
        )


class _Meter:
    """Counts what is asked and spent, in all and by question, and keeps to the rate."""

    def __init__(self, options: ClientOptions) -> None:
        self.options = options
        self.usage: dict[str, int] = dict.fromkeys((*_COSTS, "cached"), 0)
        self.lock = threading.Lock()
        self.next = 0.0
        self.here = threading.local()  # what the question of this thread has cost

    def begin(self) -> dict[str, int]:
        """Costs of a new question of this thread."""
        spent: dict[str, int] = dict.fromkeys(_COSTS, 0)
        self.here.spent = spent
        return spent

    def count(self, name: str, n: int) -> None:
        with self.lock:
            self.usage[name] += n
            self.here.spent[name] += n

    def check_budget(self) -> None:
        most = self.options.max_tokens_total
        total = self.usage["prompt_tokens"] + self.usage["completion_tokens"]
        if most is not None and total >= most:
            raise BudgetError(f"the budget of {most} tokens is spent")

    def take_turn(self, _: Any) -> None:
        """Count a request that is about to be sent, and wait for the rate limit."""
        self.count("requests", 1)
        rate = self.options.requests_per_minute
        if not rate:
            return
        with self.lock:
            now = time.monotonic()
            turn = max(now, self.next)
            self.next = turn + 60 / rate
        if turn > now:
            time.sleep(turn - now)


class Client:
    """Asks one model; safe to use from several threads.

    The API key is taken from ``OPENAI_API_KEY`` and written nowhere; servers of one's
    own mostly need none.

    Attributes:
      usage: totals so far: ``prompt_tokens``, ``completion_tokens``, ``requests``
        (those that failed included) and ``cached`` (replies that were on disk).
    """

    def __init__(
        self, url: str, model: str, options: ClientOptions | None = None
    ) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
          url: up to and with ``/v1``.
          model: its name there.
          options: how to ask.

        Raises:
          InputError: without the `openai` package, or for an address that is none.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not model:
            raise InputError(f"judge {url!r}: give http(s)://host/v1#model")
        if parts.username or parts.password or parts.query:
            raise InputError(
                "keep keys out of the judge's address: put them in OPENAI_API_KEY"
            )
        try:
            import openai
        except ImportError as error:
            raise InputError(
                "asking a chat model needs the openai package: "
                "pip install 'jaxclt[judge]'"
            ) from error
        self.url, self.model = url.rstrip("/"), model
        self.options = options = options or ClientOptions()
        self._meter = _Meter(options)
        self.usage = self._meter.usage
        self._openai = openai
        self._key = os.environ.get("OPENAI_API_KEY") or "none"
        self._remote = openai.OpenAI(
            base_url=self.url,
            api_key=self._key,
            timeout=options.timeout,
            http_client=openai.DefaultHttpxClient(
                event_hooks={"request": [self._meter.take_turn]}
            ),
        )
        weakref.finalize(self, self._remote.close)
        asked = {"temperature": options.temperature, "max_tokens": options.max_tokens}
        self._said = {k: v for k, v in asked.items() if v is not None}
        # What replies are filed under; `_said` may be adapted to the server.
        self._asked = {"model": model, **self._said}
        self._lock = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}
        folder = options.cache_dir
        file = Path(folder) / "replies.jsonl" if folder else None
        self._known = Answers(file, _REPLY)

    def close(self) -> None:
        """Close connections."""
        self._remote.close()

    def map(
        self, work: Callable[[_Item], _Result], items: Sequence[_Item]
    ) -> Iterator[tuple[int, _Result | BudgetError]]:
        """Results of work that asks, `concurrency` at a time, with the item's number.

        Raises:
          InputError: as `ask`; what came before is yielded first.
        """
        pool = ThreadPoolExecutor(self.options.concurrency)
        futures = {pool.submit(work, item): i for i, item in enumerate(items)}
        try:
            failed: BaseException | None = None
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                error = future.exception()
                if error is None:
                    yield futures[future], future.result()
                elif isinstance(error, BudgetError):
                    yield futures[future], error
                elif failed is None:
                    # What is under way is paid for: let it come in.
                    failed = error
                    for waiting in futures:
                        waiting.cancel()
            if failed is not None:
                raise failed
        finally:
            pool.shutdown(cancel_futures=True)

    def ask(self, messages: Sequence[Message]) -> Completion:
        """The reply to a conversation, from disk if it is there.

        Its text is empty if the model kept on saying nothing.

        Raises:
          BudgetError: if the tokens that may be spent are.
          InputError: if there is no answer, or the server refuses the request.
        """
        text = to_json([self._asked, list(messages)], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        with self._lock:
            waiting = self._asking.setdefault(key, threading.Lock())
        # The same question from two threads is asked once.
        with waiting:
            with self._lock:
                if row := self._known.get(key):
                    self.usage["cached"] += 1
                    return Completion(row["text"], row.get("usage", {}), True)
            text, usage = self._request(messages)
            if text:
                row = {"key": key, "text": text, "usage": usage, "model": self.model}
                with self._lock:
                    self._known.add(key, row)
            return Completion(text, usage, from_cache=False)

    def _request(self, messages: Sequence[Message]) -> tuple[str, dict[str, int]]:
        """A reply that is not on disk, and what all the tries together cost."""
        openai = self._openai
        spent = self._meter.begin()
        problem, pause = "", PAUSE
        while (left := self.options.tries - spent["requests"]) > 0:
            self._meter.check_budget()
            said = dict(self._said)
            body: Any = {"model": self.model, "messages": list(messages), **said}
            try:
                remote = self._remote.with_options(max_retries=left - 1)
                reply = remote.chat.completions.create(**body)
                if text := self._text(reply):
                    return text, spent
                problem = ""
            except openai.APIStatusError as error:
                if self._adapt(error, said):
                    continue
                problem, code = self._line(error), error.status_code
                if code < 500 and code not in (408, 409, 429):
                    raise InputError(
                        f"{self.url} refuses requests ({problem}); is the model's name "
                        "right, and does it need OPENAI_API_KEY?"
                    ) from None
                break
            except openai.APIConnectionError as error:
                problem = self._line(error)
                break
            except (openai.APIResponseValidationError, ValueError) as error:
                problem = f"a damaged reply: {self._line(error)}"
            if left > 1:
                time.sleep(pause)
                pause = min(2 * pause, 16 * PAUSE)
        if not problem:
            return "", spent
        raise InputError(
            f"{self.url} gave no answer in {spent['requests']} tries ({problem}); "
            "start again to go on: what was answered is kept"
        )

    def _text(self, reply: Any) -> str:
        """Words of a reply; what it cost is counted even if there are none."""
        usage = getattr(reply, "usage", None)
        for name in ("prompt_tokens", "completion_tokens"):
            n = getattr(usage, name, None)
            if isinstance(n, int):
                self._meter.count(name, n)
        try:
            content = reply.choices[0].message.content
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError("no choices in it") from error
        return content.strip() if isinstance(content, str) else ""

    def _adapt(self, error: Any, said: dict[str, Any]) -> bool:
        """Say it as a server wants it that refuses an option; whether to try again.

        Newer models want another name for the length of a reply, and no temperature.
        """
        if error.status_code != 400:
            return False
        text = str(error).lower()
        with self._lock:
            if "max_completion_tokens" in text and "max_tokens" in said:
                n = self._said.pop("max_tokens", said["max_tokens"])
                self._said["max_completion_tokens"] = n
                return True
            if "temperature" in text and "temperature" in said:
                self._said.pop("temperature", None)
                return True
        return False

    def _line(self, error: BaseException) -> str:
        """What an error says, on one line; servers repeat keys in their errors."""
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        return said if self._key == "none" else said.replace(self._key, "***")
