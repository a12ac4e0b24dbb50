"""Questions with pictures to an OpenAI-compatible chat server."""

import base64
import io
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

_SHOWN = 120  # characters of a reply that an error quotes


class ChatServer:
    """Ask many questions at a time.

    Connection errors, timeouts and the statuses 429 and 5xx are tried again after `backoff`, `2 backoff`, `4 backoff`
    ... seconds; anything else fails at once.

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
        retries: int,
        backoff: float,
        options: Mapping[str, Any] | None,
    ) -> None:
        for name, value, least in (("workers", workers, 1), ("retries", retries, 0), ("backoff", backoff, 0)):
            if value < least:
                raise ValueError(f"{name}: got {value}, want at least {least}")
        if not timeout > 0:
            raise ValueError(f"timeout: got {timeout}, want more than 0 seconds")
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
        self._client = httpx.Client(headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=workers))
        self._passing = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError)

    def ask_all(self, questions: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
        """Return the reply to each question, a list of parts (`text_part`, `picture_part`).

        Raises:
            RuntimeError: a question got no reply.
        """
        with ThreadPoolExecutor(self._workers) as pool:
            asked = [pool.submit(self._ask, question) for question in questions]
            try:
                return [one.result() for one in asked]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, question: Sequence[Mapping[str, Any]]) -> str:
        body = {**self._fields, "messages": [{"role": "user", "content": list(question)}]}
        trouble = ""
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(self._backoff * 2 ** (attempt - 1))
            try:
                response = self._client.post(self.url, json=body)
            except self._passing as error:
                trouble = f"{type(error).__name__}: {error}"
                continue
            status, text = response.status_code, response.text
            if status == 200:
                return _message(self.url, text)
            trouble = f"status {status}: {text[:_SHOWN]!r}"
            if status != 429 and status < 500:
                break
        raise RuntimeError(f"{self.url}: got {trouble} at attempt {attempt + 1}, want a reply")


class NumberIn:
    """Read a number from a reply, or raise.

    All arguments are those of `HttpJudge`.

    Raises:
        ValueError: `low` is not less than `high`, or `pattern` has not one group.
    """

    def __init__(self, low: float, high: float, pattern: str, json_key: str | None) -> None:
        if not low < high:
            raise ValueError(f"low: got {low}, want less than high, {high}")
        self.low, self.high, self.json_key = low, high, json_key
        self._pattern = re.compile(pattern, re.DOTALL)
        if self._pattern.groups != 1:
            raise ValueError(f"pattern: got {pattern!r} with {self._pattern.groups} groups, want one, the number")

    def __call__(self, reply: str) -> float:
        """Return the number.

        Raises:
            ValueError: the reply is anything but a number within the bounds in the stated form.
        """
        value = self._found(reply)
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


def picture_part(pixels: Tensor) -> dict[str, Any]:
    """A picture within a question, uint8 [3, H, W] on the CPU, as lossless PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def _message(url: str, text: str) -> str:
    try:
        content = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise RuntimeError(f"{url}: got {text[:_SHOWN]!r}, want choices[0].message.content")
    return content
