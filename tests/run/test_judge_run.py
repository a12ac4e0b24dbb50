"""A long run with a judge that refuses some pictures, and moves while the run is away."""

import json
from pathlib import Path
from typing import Any

import pytest

from dancegrpo_fast.recipe import RewardSettings
from dancegrpo_fast.train.loop import Trainer

from ..rewards.judge_server import Server, pictures
from ..train.tiny import make_recipe


def judged(refused: list[bytes]) -> Any:
    """Answers with the mean red, but refuses the pictures whose shades add up to a multiple of 60."""

    def answer(body: dict[str, Any]) -> tuple[int, str] | str:
        [picture] = pictures(body)
        if int(picture.sum()) % 60 == 0:
            refused.append(picture.numpy().tobytes())
            return 400, "content_policy_violation"
        return f"Score: {picture[0].float().mean() / 25.5:.3f}/10"

    return answer


@pytest.mark.long
def test_twenty_iterations(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    output, refused = tmp_path / "run", list[bytes]()
    changes: dict[str, Any] = {"num_steps": 3, "prompts_per_iteration": 2, "group_size": 6, "micro_batch": 12}
    with pytest.warns(UserWarning, match="gave no score to . of 12 samples, .* 'content_policy_violation'"):
        for iterations, resume in ((10, None), (20, "auto")):
            server = Server()
            server.answer = judged(refused)
            judge = RewardSettings("http_judge", on_error="drop", max_dropped=0.3, args=server.args)
            made = make_recipe(
                flux, output, iterations=iterations, rewards=[judge], checkpoint_every=10, learning_rate=1e-4, **changes
            )
            Trainer(made, resume=resume).run()
            server.close()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, 21))
    # Each was asked for twice.
    assert len(refused) == 2 * len(set(refused)) and sum(row["dropped"] for row in rows) == len(set(refused)) > 0
    assert all(row["ratio_first_update_max_dev"] == 0.0 and row["grad_norm"] > 0 for row in rows)
