"""Rewards asked of a vision-language model behind any OpenAI-compatible chat server."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ._chat import ChatServer, NumberIn, picture_part, text_part
from .base import RewardInput, UnscoredError
from .frames import Sampling, check_sampling, sampled_bytes

_RATE = """A generator was given this prompt:
{prompt}
Rate its result, the picture above (several pictures are frames of one video, in order), from {low} to {high}: {high} \
means that it shows everything the prompt asks for and has no flaws. Answer with the number alone."""
_PREFER = """A generator was given this prompt twice:
{prompt}
Which of its two results above is better (several pictures are frames of one video, in order): the one that shows more \
of what the prompt asks for and has fewer flaws? Answer with 1 or 2 alone."""

# Arguments that say where and how is asked, not what.
HOW = frozenset({"url", "api_key_env", "workers", "timeout", "total_timeout", "retries", "backoff"})


class HttpJudge:
    """The number that a model answers when it is shown a sample and its prompt.

    Args:
        url: of the API, for example "http://localhost:8000/v1".
        model: name of the model on that server.
        template: the question, after the pictures; {prompt}, {low} and {high} are filled in.
        low: the least number that is accepted.
        high: the largest.
        pattern: regular expression with one group, the number; the whole reply must match (a dot matches newlines too).
            None: a number alone, or as in "8/10" for `high` 10, or after "Score:" or "Rating:". What comes before
            `</think>` is no part of a reply.
        json_key: the reply must be a JSON object that holds the number under this key; `pattern` is not used.
        frames: of a video: "first", "middle", "all", or a count, evenly spaced; an image has one.
        api_key_env: name of the environment variable that holds the key; None: no key.
        workers: questions at a time.
        timeout: seconds for connecting, and for each pause of the server.
        total_timeout: seconds for all attempts at one question; a server that cannot be reached is tried until then.
        retries: further attempts after a timeout, a broken connection or the status 408, 425, 429 or 5xx.
        backoff: seconds before the first of them; doubled before each other, up to half a minute. `Retry-After` of the
            server may say more.
        max_side: pixels; a picture whose longer side has more is shrunk to it. None: pictures are sent as they are.
        options: further fields of every request, for example `{"max_tokens": 64}`.

    Raises:
        ValueError: an argument is out of range, or the environment variable is not set.
    """

    free_args = HOW

    def __init__(
        self,
        url: str,
        model: str,
        template: str = _RATE,
        low: float = 0.0,
        high: float = 10.0,
        pattern: str | None = None,
        json_key: str | None = None,
        frames: Sampling = "middle",
        api_key_env: str | None = None,
        workers: int = 8,
        timeout: float = 60.0,
        total_timeout: float = 180.0,
        retries: int = 3,
        backoff: float = 1.0,
        max_side: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._number = NumberIn(low, high, pattern, json_key)
        self._template = _checked(template).replace("{low}", f"{low:g}").replace("{high}", f"{high:g}")
        self._shown = _Pictures(frames, max_side)
        self._server = ChatServer(url, model, api_key_env, workers, timeout, total_timeout, retries, backoff, options)

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return the numbers, float32 [B].

        Raises:
            ValueError: bad frames.
            UnscoredError: of some samples no reply came, a refusal, or no number within the bounds in the stated form.
            RuntimeError: the server cannot be reached, or refuses the key, the address or the model.
        """
        questions = [
            [*pictures, text_part(self._template.replace("{prompt}", prompt))]
            for pictures, prompt in zip(self._shown(inputs), inputs.prompts, strict=True)
        ]
        numbers, reasons = self._server.ask_all(questions, self._number)
        scores = torch.tensor(numbers, dtype=torch.float32)
        if reasons:
            raise UnscoredError(scores, reasons)
        return scores


class HttpPreference:
    """The share of the other samples of its group that a sample wins against: Pref-GRPO (arXiv 2508.20751).

    `r_i = 1 / (G - 1) sum_{j != i} [x_i preferred to x_j]`, from G (G - 1) / 2 questions a group. The sample that comes
    earlier in the group is shown first where their positions add up to an odd number, second elsewhere.

    Args:
        url: of the API, for example "http://localhost:8000/v1".
        model: name of the model on that server.
        template: the question, after "Result 1:" and "Result 2:" with their pictures; {prompt} is filled in.
        both_orders: ask about every pair in both orders, and share a win that depends on the order.
        pattern: regular expression with one group, 1 or 2; the whole reply must match (a dot matches newlines too).
        json_key: the reply must be a JSON object that holds 1 or 2 under this key; `pattern` is not used.
        frames, api_key_env, workers, timeout, total_timeout, retries, backoff, max_side, options: as for `HttpJudge`.

    Raises:
        ValueError: an argument is out of range, or the environment variable is not set.
    """

    compares_groups = True

    free_args = HOW

    def __init__(
        self,
        url: str,
        model: str,
        template: str = _PREFER,
        both_orders: bool = False,
        pattern: str = r"\s*([12])\s*",
        json_key: str | None = None,
        frames: Sampling = "middle",
        api_key_env: str | None = None,
        workers: int = 8,
        timeout: float = 60.0,
        total_timeout: float = 180.0,
        retries: int = 3,
        backoff: float = 1.0,
        max_side: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._winner = NumberIn(1, 2, pattern, json_key)
        self._template = _checked(template)
        self._both_orders = both_orders
        self._shown = _Pictures(frames, max_side)
        self._server = ChatServer(url, model, api_key_env, workers, timeout, total_timeout, retries, backoff, options)

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Return win rates in [0, 1], float32 [B].

        Where questions have no answer, the samples with most of them are left out, then those with most among the
        others, until every pair of a group is answered; the shares are over these.

        Raises:
            ValueError: bad frames, or a group of one sample or of several prompts.
            UnscoredError: samples are left out, or alone in their group.
            RuntimeError: the server cannot be reached, or refuses the key, the address or the model.
        """
        pictures = self._shown(inputs)
        pairs = self._pairs(inputs)
        questions = [
            [
                *(text_part("Result 1:"), *pictures[first]),
                *(text_part("Result 2:"), *pictures[second]),
                text_part(self._template.replace("{prompt}", inputs.prompts[first])),
            ]
            for first, second in pairs
        ]
        numbers, unanswered = self._server.ask_all(questions, self._winner_of)
        reasons = _left_out(pairs, unanswered)
        wins, asked = torch.zeros(len(pictures)), torch.zeros(len(pictures))
        for (first, second), number in zip(pairs, numbers, strict=True):
            if first not in reasons and second not in reasons:
                wins[first if number == 1.0 else second] += 1
                asked[[first, second]] += 1
        for sample in (asked == 0).nonzero().flatten().tolist():
            reasons.setdefault(sample, "got no other sample of its group to compare with, want one")
        if reasons:
            raise UnscoredError(wins / asked, reasons)
        return wins / asked

    def _winner_of(self, reply: str) -> float:
        number = self._winner(reply)
        if number not in (1.0, 2.0):
            raise ValueError(f"reply: got {reply[:80]!r}, want 1 or 2")
        return number

    def _pairs(self, inputs: RewardInput) -> list[tuple[int, int]]:
        if inputs.group.shape != (len(inputs.prompts),):
            raise ValueError(f"group: got shape {tuple(inputs.group.shape)}, want one number per sample")
        members: dict[int, list[int]] = {}
        for sample, group in enumerate(inputs.group.tolist()):
            members.setdefault(group, []).append(sample)
        pairs = []
        for group, samples in members.items():
            if len(samples) < 2 or len({inputs.prompts[sample] for sample in samples}) > 1:
                raise ValueError(f"group: got {len(samples)} samples in group {group}, want 2 or more of one prompt")
            for (i, one), (j, other) in combinations(enumerate(samples), 2):
                ordered = (one, other) if (i + j) % 2 else (other, one)
                pairs += [ordered, ordered[::-1]] if self._both_orders else [ordered]
        return pairs


def _checked(template: str) -> str:
    if "{prompt}" not in template:
        raise ValueError(f"template: got {template[:80]!r}, want a text with {{prompt}}")
    return template


def _left_out(pairs: Sequence[tuple[int, int]], unanswered: Mapping[int, str]) -> dict[int, str]:
    """Samples without which every pair is answered, each with why one of its pairs is not."""
    rest, found = {pairs[number]: reason for number, reason in unanswered.items()}, dict[int, str]()
    while rest:
        counts = Counter(sample for pair in rest for sample in pair)
        most = {sample for sample, count in counts.items() if count == max(counts.values())}
        for pair, reason in rest.items():
            found |= {sample: reason for sample in pair if sample in most and sample not in found}
        rest = {pair: reason for pair, reason in rest.items() if not most & set(pair)}
    return found


class _Pictures:
    """The pictures of every sample, as parts of a question."""

    def __init__(self, frames: Sampling, max_side: int | None) -> None:
        if max_side is not None and max_side < 1:
            raise ValueError(f"max_side: got {max_side}, want at least 1, or null")
        self._frames, self._max_side = check_sampling(frames), max_side

    def __call__(self, inputs: RewardInput) -> list[list[dict[str, Any]]]:
        sampled = sampled_bytes(inputs, self._frames).cpu()
        with ThreadPoolExecutor() as pool:
            parts = list(pool.map(lambda pixels: picture_part(pixels, self._max_side), sampled.flatten(0, 1)))
        count = sampled.shape[1]
        return [parts[start : start + count] for start in range(0, len(parts), count)]
