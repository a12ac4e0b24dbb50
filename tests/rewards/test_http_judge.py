"""Judges over HTTP against a server in a thread."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dancegrpo_fast.rewards import RewardInput
from dancegrpo_fast.rewards.http_judge import HttpJudge, HttpPreference

Answer = Callable[[dict[str, Any]], tuple[int, str] | str | None]


class Server:
    """Answers each request by `answer(body)`: a reply, or a status with a body, or None to hang up."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.paths: list[tuple[str, str | None]] = []
        self.answer: Answer = lambda body: "5"
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append(body)
                owner.paths.append((self.path, self.headers["Authorization"]))
                answer = owner.answer(body)
                if answer is None:
                    self.close_connection = True
                    return
                status, text = answer if isinstance(answer, tuple) else (200, completion(answer))
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.args = {"url": f"http://127.0.0.1:{self._http.server_port}/v1", "model": "judge", "backoff": 0.0}

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def completion(content: Any) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    yield server
    server.close()


def samples(*prompts: str, group: list[int] | None = None, length: int = 1) -> RewardInput:
    """Random pictures of 5 x 4 pixels; the red of the first pixel of sample i is i."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (len(prompts), length, 3, 5, 4), generator=generator)
    pixels[:, :, 0, 0, 0] = torch.arange(len(prompts))[:, None]
    groups = torch.tensor(group if group is not None else [0] * len(prompts))
    return RewardInput(pixels.float() / 255, prompts, groups, [{} for _ in prompts])


def content(body: dict[str, Any]) -> list[dict[str, Any]]:
    (message,) = body["messages"]
    assert message["role"] == "user"
    parts: list[dict[str, Any]] = message["content"]
    return parts


def pictures(body: dict[str, Any]) -> list[Tensor]:
    """The pictures of a request, uint8 [3, H, W]."""
    found = []
    for part in content(body):
        if part["type"] == "image_url":
            head, _, data = part["image_url"]["url"].partition(",")
            assert head == "data:image/png;base64"
            picture = Image.open(io.BytesIO(base64.b64decode(data)))
            found.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return found


def shown(body: dict[str, Any]) -> list[int]:
    return [int(picture[0, 0, 0]) for picture in pictures(body)]


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
        *(({}, reply) for reply in ("", "seven", "8/10", "The score is 7", "10.1", "-1", "nan", "1e1")),
        *(({"pattern": "(.*)"}, reply) for reply in ("nan", "7 of 10")),
        *(({"json_key": "score"}, reply) for reply in (*NO_JSON, '{"score": 1' + "0" * 400 + "}")),
    ],
)
def test_replies_that_are_no_scores(server: Server, args: dict[str, Any], reply: str) -> None:
    server.answer = lambda body: reply
    with pytest.raises(ValueError, match="want") as caught:
        HttpJudge(**server.args, **args)(samples("x"))
    assert str(caught.value).startswith(f"reply: got {reply[:120]!r}, want")
    assert len(server.requests) == 1


def scripted(server: Server, *answers: tuple[int, str] | str | None) -> None:
    rest = iter(answers)
    server.answer = lambda body: next(rest)


@pytest.mark.parametrize("failure", [(429, "slow down"), (500, "oops"), (503, ""), None])
def test_passing_failures_are_tried_again(server: Server, failure: Any) -> None:
    scripted(server, failure, failure, "6")
    assert HttpJudge(**server.args, retries=2)(samples("x")).tolist() == [6.0]
    assert len(server.requests) == 3 and server.requests[0] == server.requests[2]


@pytest.mark.parametrize(
    ("failure", "message"), [((429, "slow down"), "status 429: 'slow down'"), (None, "(RemoteProtocolError|ReadError)")]
)
def test_retries_end(server: Server, failure: Any, message: str) -> None:
    scripted(server, failure, failure, "6")
    with pytest.raises(RuntimeError, match=rf"{message}.* at attempt 2, want a reply"):
        HttpJudge(**server.args, retries=1)(samples("x"))
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_other_failures_are_not_tried_again(server: Server, status: int) -> None:
    server.answer = lambda body: (status, "no such model")
    with pytest.raises(RuntimeError, match=f"got status {status}: 'no such model' at attempt 1"):
        HttpJudge(**server.args)(samples("x"))
    assert len(server.requests) == 1


@pytest.mark.parametrize("text", ["", "{}", '{"choices": []}', completion(None), completion(["7"])])
def test_answers_that_are_no_completions(server: Server, text: str) -> None:
    server.answer = lambda body: (200, text)
    with pytest.raises(RuntimeError, match=r"want choices\[0\]\.message\.content"):
        HttpJudge(**server.args)(samples("x"))
    assert len(server.requests) == 1


def test_timeout(server: Server) -> None:
    release = threading.Event()

    def answer(body: dict[str, Any]) -> str:
        release.wait(30)
        return "5"

    server.answer = answer
    try:
        with pytest.raises(RuntimeError, match=r"ReadTimeout.* at attempt 2"):
            HttpJudge(**server.args, timeout=0.1, retries=1)(samples("x"))
    finally:
        release.set()


def test_no_server() -> None:
    server = Server()
    server.close()
    with pytest.raises(RuntimeError, match=r"ConnectError.* at attempt 2"):
        HttpJudge(**server.args, retries=1)(samples("x"))


def test_a_failure_stops_the_rest(server: Server) -> None:
    server.answer = lambda body: (400, "no")
    with pytest.raises(RuntimeError, match="status 400"):
        HttpJudge(**server.args, workers=1)(samples(*"x" * 50))
    assert len(server.requests) < 50


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
    with pytest.raises(ValueError, match="reply: got"):
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
        ({"api_key_env": "NOT_SET_ANYWHERE"}, 'api_key_env: got "NOT_SET_ANYWHERE"'),
    ],
)
def test_bad_arguments(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HttpJudge(**{"url": "http://127.0.0.1:1", "model": "m", **args})
