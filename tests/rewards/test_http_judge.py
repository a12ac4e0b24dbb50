"""Judges over HTTP: what is asked, and what replies are scores."""

import json
import os
import signal
import threading
from typing import Any

import pytest
import torch

from dancegrpo_fast.rewards import UnscoredError
from dancegrpo_fast.rewards.http_judge import HttpJudge, HttpPreference
from dancegrpo_fast.stopping import Stop, Stopped

from .judge_server import Server, content, pictures, samples, shown


def test_request(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    asked = {"template": "{low} {high} {prompt} {other}", "low": 1, "high": 5, "api_key_env": "JUDGE_KEY"}
    judge = HttpJudge(**server.args, **asked, options={"max_tokens": 8, "temperature": 0.5})
    inputs = samples("a {low} fox {prompt}")
    assert judge(inputs).tolist() == [5.0]
    assert server.paths == [("/v1/chat/completions", "Bearer secret")]
    (body,) = server.requests
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("judge", 8, 0.5)
    assert [part["type"] for part in content(body)] == ["image_url", "text"]
    assert content(body)[1]["text"] == "1 5 a {low} fox {prompt} {other}"
    assert torch.equal(pictures(body)[0], (inputs.frames[0, 0] * 255).round().byte())


def test_defaults(server: Server) -> None:
    HttpJudge(**server.args)(samples("a fox"))
    (body,) = server.requests
    assert body["temperature"] == 0 and server.paths[0][1] is None
    text = content(body)[-1]["text"]
    assert "a fox" in text and "from 0 to 10" in text and "{" not in text


@pytest.mark.parametrize(("frames", "want"), [("middle", [4]), ("all", list(range(9))), (3, [1, 4, 7])])
def test_frames_of_a_video(server: Server, frames: Any, want: list[int]) -> None:
    inputs = samples("x", length=9)
    HttpJudge(**server.args, frames=frames)(inputs)
    (body,) = server.requests
    expected = (inputs.frames[0, want] * 255).round().byte()
    assert torch.equal(torch.stack(pictures(body)), expected)


def test_a_signal_waits_for_no_answer(server: Server) -> None:
    asked, left, answered = threading.Event(), threading.Event(), []

    def answer(body: dict[str, Any]) -> str:
        asked.set()
        answered.append(left.wait(30))
        return "1"

    def signalled() -> None:
        assert asked.wait(30)
        os.kill(os.getpid(), signal.SIGTERM)

    server.answer = answer
    threading.Thread(target=signalled).start()
    with pytest.raises(Stopped), Stop(at_once=True):
        HttpJudge(**server.args)(samples("x"))
    left.set()
    assert answered in ([], [True])


def test_questions_at_a_time_keep_their_order(server: Server) -> None:
    """No one is answered before three are asked, and the last one is answered first."""
    together = threading.Barrier(3, timeout=30)
    answered = [threading.Event() for _ in range(4)]
    answered[3].set()

    def answer(body: dict[str, Any]) -> str:
        (sample,) = shown(body)
        together.wait()
        assert answered[sample + 1].wait(30)
        answered[sample].set()
        return f" {sample}.5\n"

    server.answer = answer
    assert HttpJudge(**server.args, workers=3)(samples("x", "y", "z")).tolist() == [0.5, 1.5, 2.5]


@pytest.mark.parametrize(
    ("args", "reply", "score"),
    [
        ({}, "7", 7.0),
        ({}, " 2.25\n", 2.25),
        ({}, "8/10", 8.0),
        ({}, "8 / 10.0.", 8.0),
        ({"high": 5}, "**Final Score:** 4/5", 4.0),
        ({}, "Score: 8", 8.0),
        ({}, "rating = 6.5", 6.5),
        ({}, "<think>At most 3? No: 9.</think>\n8", 8.0),
        ({}, "It is not a 3.</think>8", 8.0),
        ({"json_key": "score"}, '<think>{"score": 1}</think>{"score": 2}', 2.0),
        ({"low": -1.0}, "-0.5", -0.5),
        ({"pattern": r".*<score>(\d+)</score>.*"}, "First,\nsecond. <score>3</score>\n", 3.0),
        ({"json_key": "score"}, '{"why": "good", "score": 4.5}', 4.5),
        ({"json_key": "score"}, ' {"score": 4}\n', 4.0),
    ],
)
def test_replies(server: Server, args: dict[str, Any], reply: str, score: float) -> None:
    server.answer = lambda body: reply
    assert HttpJudge(**server.args, **args)(samples("x")).tolist() == [score]


NO_JSON = ("7", '{"grade": 7}', '{"score": "7"}', '{"score": true}', '{"score": NaN}', 'Sure: {"score": 7}', "[7]")


@pytest.mark.parametrize(
    ("args", "reply"),
    [
        *(({}, reply) for reply in ("", "seven", "8/100", "4/5", "The score is 7", "10.1", "-1", "nan", "1e1")),
        *(({}, reply) for reply in ("Score: 7 or 8", "<think>8", "<think>8</think>", "8</think>good", "1/2/10")),
        *(({"pattern": "(.*)"}, reply) for reply in ("nan", "7 of 10")),
        ({"pattern": r".*(\d)"}, "<think>first a 3"),
        *(({"json_key": "score"}, reply) for reply in (*NO_JSON, '{"score": 1' + "0" * 400 + "}")),
    ],
)
def test_replies_that_are_no_scores(server: Server, args: dict[str, Any], reply: str) -> None:
    server.answer = lambda body: reply
    with pytest.raises(UnscoredError) as caught:
        HttpJudge(**server.args, **args)(samples("x"))
    assert caught.value.reasons[0].startswith(f"reply: got {reply[:120]!r}, want")
    assert len(server.requests) == 1


@pytest.mark.parametrize("both_orders", [False, True])
def test_win_rates(server: Server, both_orders: bool) -> None:
    """Strengths decide, in groups whose samples are interleaved."""
    strength = [0, 3, 1, 2, 2, 1]
    server.answer = lambda body: "1" if strength[shown(body)[0]] > strength[shown(body)[1]] else " 2\n"
    inputs = samples("a", "b", "a", "b", "a", "b", group=[4, 1, 4, 1, 4, 1])
    scores = HttpPreference(**server.args, both_orders=both_orders)(inputs)
    assert scores.dtype == torch.float32 and scores.tolist() == [0.0, 1.0, 0.5, 0.5, 1.0, 0.0]
    asked = sorted(tuple(shown(body)) for body in server.requests)
    if both_orders:
        assert asked == sorted((i, j) for i in range(6) for j in range(6) if i != j and (i - j) % 2 == 0)
    else:
        assert sorted(tuple(sorted(pair)) for pair in asked) == [(0, 2), (0, 4), (1, 3), (1, 5), (2, 4), (3, 5)]
    for body in server.requests:
        kinds = [part.get("text", "") for part in content(body)]
        assert kinds[0] == "Result 1:" and kinds[2] == "Result 2:"
        assert {"a": 0, "b": 1}[kinds[4].splitlines()[1]] == shown(body)[0] % 2


def test_a_judge_that_only_sees_positions(server: Server) -> None:
    """In one order its choice depends on the position in the group; in both orders everyone wins half."""
    server.answer = lambda body: "1"
    inputs = samples(*"x" * 4)
    assert HttpPreference(**server.args, both_orders=True)(inputs).tolist() == [0.5] * 4
    server.requests.clear()
    scores = HttpPreference(**server.args)(inputs)
    firsts = [shown(body)[0] for body in server.requests]
    assert torch.equal(scores, torch.tensor([firsts.count(i) / 3 for i in range(4)]))
    assert sorted(shown(body) for body in server.requests) == [[0, 1], [0, 3], [1, 2], [2, 0], [2, 3], [3, 1]]


@pytest.mark.parametrize("reply", ["3", "1.5", "first", "", "1 or 2"])
def test_replies_that_are_no_preferences(server: Server, reply: str) -> None:
    server.answer = lambda body: reply
    with pytest.raises(UnscoredError, match="reply: got"):
        HttpPreference(**server.args, pattern=r"([\d.]+)")(samples("x", "x"))


def test_json_preferences(server: Server) -> None:
    server.answer = lambda body: json.dumps({"winner": 2})
    args = {**server.args, "json_key": "winner"}
    assert HttpPreference(**args)(samples("x", "x")).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("group", "prompts", "message"),
    [
        ([0, 1], "xx", "group: got 1 samples in group 0"),
        ([0, 0], "xy", "group: got 2 samples in group 0, want 2 or more of one prompt"),
        ([0], "xx", r"group: got shape \(1,\)"),
    ],
)
def test_bad_groups(server: Server, group: list[int], prompts: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HttpPreference(**server.args)(samples(*prompts, group=group))
    assert not server.requests


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"low": 1.0, "high": 1.0}, "low: got 1"),
        ({"pattern": r"\d+"}, "pattern: got .* with 0 groups"),
        ({"pattern": r"(\d)(\d)"}, "pattern: got .* with 2 groups"),
        ({"template": "Rate this."}, "template: got 'Rate this.'"),
        ({"frames": 0}, "frames: got 0"),
        ({"workers": 0}, "workers: got 0"),
        ({"retries": -1}, "retries: got -1"),
        ({"backoff": -1.0}, "backoff: got -1"),
        ({"timeout": 0.0}, "timeout: got 0"),
        ({"total_timeout": -1.0}, "total_timeout: got -1"),
        ({"max_side": 0}, "max_side: got 0"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, 'api_key_env: got "NOT_SET_ANYWHERE"'),
    ],
)
def test_bad_arguments(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HttpJudge(**{"url": "http://127.0.0.1:1", "model": "m", **args})
