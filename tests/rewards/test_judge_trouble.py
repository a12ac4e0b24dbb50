"""Judges over HTTP that are slow, away, refuse, or answer something else."""

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dancegrpo_fast.rewards import UnscoredError
from dancegrpo_fast.rewards import _chat as chat
from dancegrpo_fast.rewards.http_judge import HttpJudge, HttpPreference

from .judge_server import Server, completion, pictures, samples, scripted, shown


@pytest.mark.parametrize("failure", [(429, "slow down"), (408, ""), (425, ""), (500, "oops"), (503, ""), None])
def test_passing_failures_are_tried_again(server: Server, failure: Any) -> None:
    scripted(server, failure, failure, "6")
    assert HttpJudge(**server.args, retries=2)(samples("x")).tolist() == [6.0]
    assert len(server.requests) == 3 and server.requests[0] == server.requests[2]


@pytest.mark.parametrize(
    ("failure", "message"), [((429, "slow down"), "status 429: 'slow down'"), (None, "(RemoteProtocolError|ReadError)")]
)
def test_retries_end(server: Server, failure: Any, message: str) -> None:
    scripted(server, failure, failure, "6")
    with pytest.raises(UnscoredError, match=rf"{message}.* at attempt 2, want a reply"):
        HttpJudge(**server.args, retries=1)(samples("x"))
    assert len(server.requests) == 2


@pytest.mark.parametrize(("status", "error"), [(400, UnscoredError), (413, UnscoredError), (403, UnscoredError)])
def test_what_a_question_is_refused_for_is_not_tried_again(server: Server, status: int, error: type) -> None:
    server.answer = lambda body: (status, "no such picture") if shown(body) == [1] else "5"
    with pytest.raises(error, match=f"got status {status}: 'no such picture' at attempt 1") as caught:
        HttpJudge(**server.args)(samples("x", "y", "z"))
    assert caught.value.scores[[0, 2]].tolist() == [5.0, 5.0] and list(caught.value.reasons) == [1]
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [401, 404, 302])
def test_what_all_questions_are_refused_for_stops_the_rest(server: Server, status: int) -> None:
    server.answer = lambda body: (status, "no such model")
    with pytest.raises(RuntimeError, match=f"got status {status}: 'no such model' at attempt 1"):
        HttpJudge(**server.args, workers=1)(samples(*"x" * 50))
    assert len(server.requests) < 50


def refusal(**message: Any) -> str:
    """A completion with these fields of its message, as openai's types have them."""
    return json.dumps({"choices": [{"finish_reason": "stop", "message": {"role": "assistant"} | message}]})


NOTHING = r"got .*want choices\[0\]\.message\.content"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *((text, NOTHING) for text in ("", "{}", '{"choices": []}', "[" * 5000, completion(None), completion(["7"]))),
        ("<html>a proxy's page</html>", NOTHING),
        (refusal(content=None, refusal="I can't help with that."), 'refused, "I can\'t help with that."'),
        (completion("5").replace('"message"', '"finish_reason": "content_filter", "message"'), "refused, '5'"),
    ],
)
def test_answers_that_are_no_completions(server: Server, text: str, reason: str) -> None:
    server.answer = lambda body: (200, text)
    with pytest.raises(UnscoredError, match=reason):
        HttpJudge(**server.args)(samples("x"))
    assert len(server.requests) == 1


def test_a_list_of_parts_is_a_reply(server: Server) -> None:
    server.answer = lambda body: (
        200,
        refusal(content=[{"type": "text", "text": "Score: "}, {"type": "text", "text": "7"}]),
    )
    assert HttpJudge(**server.args)(samples("x")).tolist() == [7.0]


def waiting_is(monkeypatch: pytest.MonkeyPatch, done: Callable[[float], None]) -> None:
    """`done` with the seconds, where the judge would wait between two attempts."""

    class Waiting(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            done(timeout or 0.0)
            return False

    monkeypatch.setattr(chat, "Event", Waiting)


def test_retry_after_is_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """In seconds or as a date; longer than what is left of the time, not at all."""
    waited: list[float] = []
    waiting_is(monkeypatch, waited.append)
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=50), usegmt=True)
    for header, least, most in (("7", 7.0, 7.0), (later, 40.0, 50.0), ("soon", 2.0, 2.0), ("-1", 2.0, 2.0)):
        server.headers = {"Retry-After": header}
        scripted(server, (429, "slow down"), "6")
        waited.clear()
        assert HttpJudge(**server.args | {"backoff": 2.0})(samples("x")).tolist() == [6.0]
        assert len(waited) == 1 and least <= waited[0] <= most
    server.headers = {"Retry-After": "3600"}
    scripted(server, (429, "slow down"), "6")
    with pytest.raises(UnscoredError, match=r"status 429.* at attempt 1, and 3.6e\+03 s to wait with \d+ left, want"):
        HttpJudge(**server.args)(samples("x"))


def test_a_server_that_starts_anew_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few retries there are for one that answers."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    port = int(server.args["url"].split(":")[2].split("/")[0])
    judge = HttpJudge(**server.args | {"backoff": 0.01}, retries=0, workers=1)
    assert judge(samples("x")).tolist() == [5.0]
    server.close()
    started: list[Server] = []
    waiting_is(monkeypatch, lambda seconds: None if started else started.append(Server(port)))
    assert judge(samples("x", "y")).tolist() == [5.0, 5.0]
    started[0].close()


def test_timeout(server: Server) -> None:
    release = threading.Event()

    def answer(body: dict[str, Any]) -> str:
        release.wait(30)
        return "5"

    server.answer = answer
    try:
        with pytest.raises(UnscoredError, match=r"ReadTimeout.* at attempt 2"):
            HttpJudge(**server.args, timeout=0.1, retries=1)(samples("x"))
        with pytest.raises(UnscoredError, match=r"ReadTimeout.* to wait with "):
            HttpJudge(**server.args | {"backoff": 30.0}, timeout=60, total_timeout=0.2)(samples("x"))
    finally:
        release.set()


def test_a_reply_has_a_size_and_a_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_REPLY_BYTES", 1000)
    server.answer = lambda body: "5" + " " * 1000
    with pytest.raises(UnscoredError, match="got more than 1000 bytes, want a reply"):
        HttpJudge(**server.args)(samples("x"))
    monkeypatch.setattr(chat, "time", SimpleNamespace(monotonic=iter([0.0, 0.0, 99.0]).__next__))
    server.answer = lambda body: "5"
    with pytest.raises(UnscoredError, match="got a part of a reply in 50 s, want the whole"):
        HttpJudge(**server.args, total_timeout=50)(samples("x"))


def test_pictures_are_shrunk_where_the_recipe_says_so(server: Server) -> None:
    inputs = samples("x")
    for most, size in ((4, (3, 4, 3)), (5, (3, 5, 4)), (1, (3, 1, 1))):
        HttpJudge(**server.args, max_side=most)(inputs)
        assert pictures(server.requests[-1])[0].shape == size
    assert torch.equal(pictures(server.requests[1])[0], (inputs.frames[0, 0] * 255).round().byte())


def test_a_proxy_of_the_environment_is_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.args["url"].removesuffix("/v1"))
    assert HttpJudge("http://judge.invalid/v1", "judge")(samples("x")).tolist() == [5.0]
    assert server.paths[0][0] == "http://judge.invalid/v1/chat/completions"
    monkeypatch.setenv("NO_PROXY", "judge.invalid,127.0.0.1")
    with pytest.raises(RuntimeError, match="ConnectError"):
        HttpJudge("http://judge.invalid/v1", "judge", total_timeout=0.1)(samples("x"))


def test_no_server() -> None:
    server = Server()
    server.close()
    with pytest.raises(
        RuntimeError, match=r"ConnectError.* at attempt \d+, and 0.05 s to wait with .* left, want a reply"
    ):
        HttpJudge(**server.args | {"backoff": 0.05}, total_timeout=0.04)(samples("x"))


def test_pairs_without_an_answer(server: Server) -> None:
    """A sample that is refused with all others leaves; a lone pair takes both along, as nobody knows whose it is."""
    strength = [0, 3, 1, 2]
    bad: set[tuple[int, ...]] = {(0, 1), (1, 2), (1, 3)}

    def answer(body: dict[str, Any]) -> Any:
        pair = shown(body)
        return (400, "no") if tuple(sorted(pair)) in bad else str(1 + (strength[pair[0]] < strength[pair[1]]))

    server.answer = answer
    with pytest.raises(UnscoredError) as caught:
        HttpPreference(**server.args)(samples(*"x" * 4))
    assert list(caught.value.reasons) == [1] and "status 400" in caught.value.reasons[1]
    assert caught.value.scores[[0, 2, 3]].tolist() == [0.0, 0.5, 1.0]
    bad = {(0, 2)}
    with pytest.raises(UnscoredError) as caught:
        HttpPreference(**server.args, both_orders=True)(samples(*"x" * 4))
    assert sorted(caught.value.reasons) == [0, 2] and caught.value.scores[[1, 3]].tolist() == [1.0, 0.0]
    bad = {(0, 1), (1, 2), (0, 2), (0, 3), (1, 3)}
    with pytest.raises(UnscoredError) as caught:
        HttpPreference(**server.args)(samples(*"x" * 4))
    assert "status 400" in caught.value.reasons[0] and "no other sample" not in caught.value.reasons[1]
    assert caught.value.reasons.keys() == {0, 1} and caught.value.scores[[2, 3]].tolist() == [0.0, 1.0]
    bad = {(0, 1), (0, 2)}
    with pytest.raises(UnscoredError) as caught:
        HttpPreference(**server.args)(samples(*"xxyy", group=[0, 0, 1, 1]))
    assert sorted(caught.value.reasons) == [0, 1] and caught.value.scores[2:].tolist() == [0.0, 1.0]
