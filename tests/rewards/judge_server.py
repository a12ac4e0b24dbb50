"""A chat server in a thread that answers as a test says, and samples whose first pixel says which they are."""

import base64
import io
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dancegrpo_fast.rewards import RewardInput

Answer = Callable[[dict[str, Any]], tuple[int, str] | str | None]


class Server:
    """Answers each request by `answer(body)`: a reply, or a status with a body, or None to hang up."""

    def __init__(self, port: int = 0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.paths: list[tuple[str, str | None]] = []
        self.headers: dict[str, str] = {}
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
                for name, value in owner.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with suppress(BrokenPipeError):  # the client timed out
                    self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.args = {"url": f"http://127.0.0.1:{self._http.server_port}/v1", "model": "judge", "backoff": 0.0}

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def completion(content: Any) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


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


def scripted(server: Server, *answers: tuple[int, str] | str | None) -> None:
    rest = iter(answers)
    server.answer = lambda body: next(rest)
