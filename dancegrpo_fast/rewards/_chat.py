"""Questions with pictures to an OpenAI-compatible chat server."""

import base64
import io
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any

from torch import Tensor

from .pixels import resize_bicubic

_SHOWN = 120  # characters of a reply that an error quotes
_REPLY_BYTES = 1 << 20  # of an answer that is read
_LONGEST_PAUSE = 30.0  # seconds that doubling leads to
_PASSING = (408, 425, 429)  # with 5xx: of a server that may answer later
_SERVER = (401, 404)  # of the key, the address or the model: no other question fares better


class _NoAnswerError(Exception):
    """This question has none; others may."""


class ChatServer:
    """Ask many questions at a time, through the proxies of the environment as httpx has them.

    Timeouts, broken connections and the statuses 408, 425, 429 and 5xx are tried again after `backoff`, `2 backoff`,
    `4 backoff` ... seconds, or when `Retry-After` says, up to `retries` times and within `total_timeout`. A server that
    cannot be reached is tried until `total_timeout` is over, as it may be starting anew.

    All arguments are those of `HttpJudge`.

    Raises:
        ValueError: an argument is out of range, or the environment variable is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key_env: str | None,
        workers: int,
        timeout: float,
        total_timeout: float,
        retries: int,
        backoff: float,
        options: Mapping[str, Any] | None,
    ) -> None:
        for name, value, least in (("workers", workers, 1), ("retries", retries, 0), ("backoff", backoff, 0)):
            if not value >= least:
                raise ValueError(f"{name}: got {value}, want at least {least}")
        for name, seconds in (("timeout", timeout), ("total_timeout", total_timeout)):
            if not seconds > 0:
                raise ValueError(f"{name}: got {seconds}, want more than 0 seconds")
        headers = {}
        if api_key_env is not None:
            if not os.environ.get(api_key_env):
                raise ValueError(
                    f'api_key_env: got "{api_key_env}", want the name of an environment variable that is set'
                )
            headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        import httpx

        self.url = f"{url.rstrip('/')}/chat/completions"
        self._fields = {"model": model, "temperature": 0, **(options or {})}
        self._workers, self._retries, self._backoff = workers, retries, backoff
        self._timeout, self._total = timeout, total_timeout
        self._client = httpx.Client(headers=headers, limits=httpx.Limits(max_connections=workers))
        self._absent = (httpx.ConnectError, httpx.ConnectTimeout)
        self._passing = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError, httpx.ProxyError)

    def ask_all(
        self, questions: Sequence[Sequence[Mapping[str, Any]]], read: Callable[[str], float]
    ) -> tuple[list[float], dict[int, str]]:
        """Return what `read` makes of the reply to each question (NaN where there is none), and why some have none.

        Args:
            questions: lists of parts (`text_part`, `picture_part`).
            read: raises ValueError for a reply that it cannot read.

        Raises:
            RuntimeError: the server cannot be reached, or refuses the key, the address or the model.
        """
        reasons: dict[int, str] = {}
        stop = Event()

        def answer(number: int) -> float:
            try:
                return read(self._ask(questions[number], stop))
            except (_NoAnswerError, ValueError) as error:
                reasons[number] = str(error)
                return float("nan")

        pool = ThreadPoolExecutor(self._workers)
        try:
            asked = [pool.submit(answer, number) for number in range(len(questions))]
            return [one.result() for one in asked], reasons
        finally:
            # After an error or a signal nobody waits for the answers that are still to come.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, question: Sequence[Mapping[str, Any]], stop: Event) -> str:
        body = {**self._fields, "messages": [{"role": "user", "content": list(question)}]}
        end, answered, attempt = time.monotonic() + self._total, 0, 0
        while True:
            attempt += 1
            asked_for, absent = 0.0, False
            try:
                status, headers, text = self._post(body, end)
                if status == 200:
                    return _message(self.url, text)
                trouble = f"status {status}: {text[:_SHOWN]!r}"
                if status < 400 or status in _SERVER:
                    raise RuntimeError(f"{self.url}: got {trouble} at attempt {attempt}, want a reply")
                if status not in _PASSING and status < 500:
                    raise _NoAnswerError(f"{self.url}: got {trouble} at attempt {attempt}, want a reply")
                asked_for = _seconds(headers.get("Retry-After", ""))
            except self._passing as error:
                absent = isinstance(error, self._absent)
                trouble = f"{type(error).__name__}: {error}"
            answered += not absent
            pause = max(asked_for, min(self._backoff * 2 ** min(attempt - 1, 30), _LONGEST_PAUSE))
            left = end - time.monotonic()
            if stop.is_set() or answered > self._retries or pause >= left:
                more = f", and {pause:.3g} s to wait with {max(left, 0):.3g} left" if pause >= left else ""
                said = f"{self.url}: got {trouble} at attempt {attempt}{more}, want a reply"
                raise RuntimeError(said) if absent else _NoAnswerError(said)
            stop.wait(pause)

    def _post(self, body: Mapping[str, Any], end: float) -> tuple[int, Mapping[str, str], str]:
        """Status, headers and text of one answer, which may pause for `timeout` and must be whole at `end`."""
        timeout = min(self._timeout, max(end - time.monotonic(), 0.001))
        with self._client.stream("POST", self.url, json=body, timeout=timeout) as response:
            found = bytearray()
            for part in response.iter_bytes():
                found += part
                if len(found) > _REPLY_BYTES:
                    raise _NoAnswerError(f"{self.url}: got more than {_REPLY_BYTES} bytes, want a reply")
                if time.monotonic() > end:
                    raise _NoAnswerError(f"{self.url}: got a part of a reply in {self._total:g} s, want the whole")
            return response.status_code, response.headers, found.decode(response.encoding or "utf-8", "replace")


class NumberIn:
    """Read a number from a reply, or raise.

    All arguments are those of `HttpJudge`.

    Raises:
        ValueError: `low` is not less than `high`, or `pattern` has not one group.
    """

    def __init__(self, low: float, high: float, pattern: str | None, json_key: str | None) -> None:
        if not low < high:
            raise ValueError(f"low: got {low}, want less than high, {high}")
        self.low, self.high, self.json_key = low, high, json_key
        self._pattern = re.compile(_number(high) if pattern is None else pattern, re.DOTALL)
        if self._pattern.groups != 1:
            raise ValueError(f"pattern: got {pattern!r} with {self._pattern.groups} groups, want one, the number")

    def __call__(self, reply: str) -> float:
        """Return the number.

        Raises:
            ValueError: the reply is anything but a number within the bounds in the stated form.
        """
        # What a model thinks is no part of its answer, whether or not the chat template has opened it.
        _, _, answer = reply.rpartition("</think>")
        value = None if "<think>" in answer else self._found(answer)
        if value is None or not self.low <= value <= self.high:
            form = f"match {self._pattern.pattern!r}" if self.json_key is None else f"JSON with {self.json_key!r}"
            want = f"{form} and a number from {self.low:g} to {self.high:g}"
            raise ValueError(f"reply: got {reply[:_SHOWN]!r}, want {want}")
        return value

    def _found(self, reply: str) -> float | None:
        try:
            if self.json_key is None:
                match = self._pattern.fullmatch(reply)
                return None if match is None else float(match[1])
            value = json.loads(reply)[self.json_key]
            return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
        except (ValueError, KeyError, TypeError, OverflowError):
            return None


def text_part(text: str) -> dict[str, Any]:
    """A text within a question."""
    return {"type": "text", "text": text}


def picture_part(pixels: Tensor, max_side: int | None = None) -> dict[str, Any]:
    """A picture within a question, uint8 [3, H, W] on the CPU, as lossless PNG; `max_side` is `HttpJudge`'s."""
    from PIL import Image

    longest = max(pixels.shape[1:])
    if max_side is not None and longest > max_side:
        pixels = resize_bicubic(pixels, *(max(1, round(side * max_side / longest)) for side in pixels.shape[1:]))
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def _number(high: float) -> str:
    """A number alone, after "Score:" or "Rating:", or of the highest, as in "8/10"."""
    highest = rf"{re.escape(f'{high:g}')}(?:\.0+)?"
    mark = r"[\s*]*"
    before = rf"(?i:(?:final |overall )?(?:score|rating){mark}[:=]{mark})?"
    return rf"{mark}{before}([+-]?\d+(?:\.\d+)?){mark}(?:/\s*{highest}{mark})?\.?\s*"


def _seconds(after: str) -> float:
    """What `Retry-After` says: seconds, or a date of HTTP; 0 for anything else."""
    try:
        return max(0.0, float(after))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _message(url: str, text: str) -> str:
    """The text of a completion."""
    try:
        choice = json.loads(text)["choices"][0]
        message, why = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part["type"] == "text")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        content = refusal = why = None
    if refusal or why == "content_filter":
        raise _NoAnswerError(f"{url}: refused, {str(refusal or content or why)[:_SHOWN]!r}")
    if not isinstance(content, str):
        raise _NoAnswerError(f"{url}: got {text[:_SHOWN]!r}, want choices[0].message.content")
    return content
