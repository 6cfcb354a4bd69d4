"""A chat model behind an OpenAI-compatible address: asked once, never twice.

Every reply is on disk before anybody sees it: a run that is killed and started again
goes on where it was. What goes wrong on the way (time-outs, rate limits, server errors,
damaged or empty replies) is tried again with growing pauses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from jaxclt.errors import InputError, check_at_least, check_positive
from jaxclt.files.json_file import COUNT, TEXT, json_schema, named, record
from jaxclt.files.json_text import to_json
from jaxclt.runs.kept import Answers

__all__ = ["BudgetError", "Client", "Completion", "Message"]

Message = dict[str, str]  # role and content
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_LONGEST = 120.0  # seconds of a pause, whatever a server asks for
_REPLY = json_schema(record({"key": TEXT, "text": TEXT}, {"usage": named(COUNT)}))
_AGAIN = (408, 409, 425, 429)  # and all from 500 on


class BudgetError(Exception):
    """Nothing more is asked: the tokens that may be spent are."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """A reply and what it cost."""

    text: str
    usage: dict[str, int]
    from_cache: bool


class _DamagedError(Exception):
    """A reply that is no reply."""


class Client:
    """Asks one model; safe to use from several threads.

    The API key is taken from ``OPENAI_API_KEY`` and written nowhere; servers of one's
    own mostly need none.

    Attributes:
      usage: totals so far: ``prompt_tokens``, ``completion_tokens``, ``requests``
        (those that failed included) and ``cached`` (replies that were on disk).
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        temperature: float | None = 0.0,
        max_tokens: int | None = 1024,
        timeout: float = 120.0,
        tries: int = 6,
        backoff: float = 1.0,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        max_tokens_total: int | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
          url: up to and with ``/v1``.
          model: its name there.
          cache_dir: folder that keeps replies; None keeps them in memory only.
          temperature: None leaves it to the server.
          max_tokens: of a reply; None leaves it to the server.
          timeout: seconds to wait for a reply.
          tries: of a request, the first included.
          backoff: seconds of the first pause; each is twice as long as the one before.
          concurrency: requests under way together.
          requests_per_minute: most that are sent.
          max_tokens_total: after so many tokens, of prompts and replies, nothing more
            is asked. Replies under way by then still come in.
          sleep: pauses.
          clock: seconds that only grow.

        Raises:
          InputError: without the `openai` package, or for an address that is none.
        """
        check_positive(
            timeout=timeout,
            requests_per_minute=requests_per_minute,
            tries=tries,
            concurrency=concurrency,
            max_tokens=max_tokens,
        )
        check_at_least(
            0,
            temperature=temperature,
            backoff=backoff,
            max_tokens_total=max_tokens_total,
        )
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
        self.url, self.model, self.concurrency = url.rstrip("/"), model, concurrency
        self.usage = dict.fromkeys(
            ("prompt_tokens", "completion_tokens", "requests", "cached"), 0
        )
        self._openai = openai
        self._key = os.environ.get("OPENAI_API_KEY") or "none"
        self._remote = openai.OpenAI(
            base_url=self.url, api_key=self._key, timeout=timeout, max_retries=0
        )
        self._options: dict[str, Any] = {}
        if temperature is not None:
            self._options["temperature"] = temperature
        if max_tokens is not None:
            self._options["max_tokens"] = max_tokens
        # What replies are filed under; `_options` may be adapted to the server.
        self._asked = {"model": model, **self._options}
        self._tries, self._backoff = tries, backoff
        self._gap = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next, self._budget = 0.0, max_tokens_total
        self._sleep, self._clock = sleep, clock
        self._lock = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}
        file = Path(cache_dir) / "replies.jsonl" if cache_dir else None
        self._known = Answers(file, _REPLY)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close connections."""
        self._remote.close()

    def complete(self, prompt: str) -> str:
        """The reply to one prompt; empty if the model kept on saying nothing.

        Raises:
          BudgetError: if the tokens that may be spent are.
          InputError: if there is no answer, or the server refuses the request.
        """
        return self.ask([{"role": "user", "content": prompt}]).text

    def each(
        self, prompts: Sequence[str]
    ) -> Iterator[tuple[int, Completion | BudgetError]]:
        """Replies with the number of their prompt, as they come.

        Raises:
          InputError: as `complete`; what came before is yielded first.
        """
        yield from self.map(
            lambda prompt: self.ask([{"role": "user", "content": prompt}]), prompts
        )

    def map(
        self, work: Callable[[_Item], _Result], items: Sequence[_Item]
    ) -> Iterator[tuple[int, _Result | BudgetError]]:
        """Results of work that asks, `concurrency` at a time, as they come."""
        pool = ThreadPoolExecutor(self.concurrency)
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
        """The reply to a conversation, from disk if it is there; see `complete`."""
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
            text, usage = self._request(messages, key)
            if text:
                row = {"key": key, "text": text, "usage": usage, "model": self.model}
                with self._lock:
                    self._known.add(key, row)
            return Completion(text, usage, from_cache=False)

    def _request(
        self, messages: Sequence[Message], key: str
    ) -> tuple[str, dict[str, int]]:
        """A reply that is not on disk, and what all the tries together cost."""
        spent = {"prompt_tokens": 0, "completion_tokens": 0, "requests": 0}
        problem, pause = "", 0.0
        for attempt in range(self._tries):
            if attempt:
                # Threads that failed together should not come back together.
                spread = 0.75 + int(key[:4], 16) / 0xFFFF / 2
                longer = self._backoff * 2 ** (attempt - 1) * spread
                self._sleep(min(max(pause, longer), max(_LONGEST, self._backoff)))
            problem, pause, text = self._try(messages, spent)
            if text is not None:
                return text, spent
        if not problem:
            return "", spent
        raise InputError(
            f"{self.url} gave no answer in {self._tries} tries ({problem}); start "
            "again to go on: what was answered is kept"
        )

    def _try(
        self, messages: Sequence[Message], spent: dict[str, int]
    ) -> tuple[str, float, str | None]:
        """One request: what went wrong, the pause asked for, and the reply or None."""
        openai = self._openai
        self._take_turn()
        spent["requests"] += 1
        options = dict(self._options)
        body: Any = {"model": self.model, "messages": list(messages), **options}
        try:
            reply = self._remote.chat.completions.create(**body)
            text = self._text(reply, spent)
        except openai.APIStatusError as error:
            code = error.status_code
            problem = self._line(error)
            if self._adapt(error, options):
                return problem, -1.0, None
            if code not in _AGAIN and code < 500:
                raise InputError(
                    f"{self.url} refuses requests ({problem}); is the model's name "
                    "right, and does it need OPENAI_API_KEY?"
                ) from None
            return problem, _retry_after(error.response.headers), None
        except (openai.APIConnectionError, openai.APIResponseValidationError) as error:
            return self._line(error), 0.0, None
        except (_DamagedError, ValueError) as error:
            return f"a damaged reply: {self._line(error)}", 0.0, None
        return "", 0.0, text or None

    def _take_turn(self) -> None:
        """Wait for the rate limit, and see that there is something left to spend."""
        with self._lock:
            total = self.usage["prompt_tokens"] + self.usage["completion_tokens"]
            if self._budget is not None and total >= self._budget:
                raise BudgetError(f"the budget of {self._budget} tokens is spent")
            self.usage["requests"] += 1
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + self._gap
        if turn > now:
            self._sleep(turn - now)

    def _text(self, reply: Any, spent: dict[str, int]) -> str:
        """Words of a reply; what it cost is counted even if there are none."""
        usage = getattr(reply, "usage", None)
        for name in ("prompt_tokens", "completion_tokens"):
            n = getattr(usage, name, None)
            if isinstance(n, int):
                spent[name] += n
                with self._lock:
                    self.usage[name] += n
        try:
            content = reply.choices[0].message.content
        except (AttributeError, IndexError, TypeError) as error:
            raise _DamagedError("no choices in it") from error
        return content.strip() if isinstance(content, str) else ""

    def _adapt(self, error: Any, sent: dict[str, Any]) -> bool:
        """Say it as a server wants it that refuses an option; whether to try again.

        Newer models want another name for the length of a reply, and no temperature.
        """
        if error.status_code != 400:
            return False
        said = str(error).lower()
        with self._lock:
            if "max_completion_tokens" in said and "max_tokens" in sent:
                n = self._options.pop("max_tokens", sent["max_tokens"])
                self._options["max_completion_tokens"] = n
                return True
            if "temperature" in said and "temperature" in sent:
                self._options.pop("temperature", None)
                return True
        return False

    def _line(self, error: BaseException) -> str:
        """What an error says, on one line; servers repeat keys in their errors."""
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        return said if self._key == "none" else said.replace(self._key, "***")


def _retry_after(headers: Any) -> float:
    """Seconds that a server asks to wait, said as a number or a date; 0 if none."""
    said = headers.get("retry-after")
    if not said:
        return 0.0
    with contextlib.suppress(ValueError):
        return max(0.0, float(said))
    with contextlib.suppress(ValueError, TypeError):
        return max(
            0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        )
    return 0.0
