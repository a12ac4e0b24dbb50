"""Bad input gets a `ValueError` that begins with the argument's name, in every op and before anything runs."""

from collections.abc import Callable

import pytest
import torch

from dancegrpo_fast import gaussian_noise, policy_loss, transition_log_prob, transition_step
from dancegrpo_fast.transitions import TransitionTable

from .cases import BACKENDS, TABLES

FLOW, DDIM = TABLES["flow"], TABLES["ddim"]
X = torch.zeros(3, 4, 5)
PER_SAMPLE = torch.zeros(3)


def step(**changed):
    return transition_step(**{"latents": X, "model_output": X, "table": FLOW, "step": 1, **changed})


def score(**changed):
    arguments = {"latents": X, "model_output": X, "next_latents": X, "table": FLOW, "step": 1}
    return transition_log_prob(**{**arguments, **changed})


def loss(**changed):
    arguments = {"latents": X, "model_output": X, "next_latents": X, "table": FLOW, "step": 1}
    return policy_loss(**{**arguments, "old_log_prob": PER_SAMPLE, "advantages": PER_SAMPLE, **changed})


def noise(**changed):
    return gaussian_noise(**{"shape": (4,), "seed": 0, "sample_ids": torch.arange(3), **changed})


def bad_tensors(name: str) -> list[tuple[str, dict]]:
    """What no `[B, ...]` tensor may be."""
    values = (X[:2], X.flatten(1), X.int(), X.to("meta"), X.to_sparse(), X.numpy(), X.to(torch.float8_e5m2))
    return [(name, {name: value}) for value in values]


def bad_per_sample(name: str) -> list[tuple[str, dict]]:
    values = (
        PER_SAMPLE[:2],
        PER_SAMPLE[:, None],
        PER_SAMPLE.bfloat16(),
        PER_SAMPLE.long(),
        PER_SAMPLE.to("meta"),
        PER_SAMPLE.to_sparse(),
        [0.0],
    )
    return [(name, {name: value}) for value in values]


GUIDED = {"uncond_output": X, "guidance_scale": 2.0}
# Of no argument: an object of the wrong kind, a word, and what looks like a number.
ODD = (object(), "abc", [1.0], {}, X.numpy(), 1 + 2j)


def bad(name: str, *values, **others) -> list[tuple[str, dict]]:
    return [(name, {name: value, **others}) for value in values]


SHARED = [
    *bad("latents", None, [[0.0]], *ODD),
    *bad("model_output", None, *ODD),
    *bad("table", None, FLOW.a, [FLOW], *ODD),
    *bad("step", 2**70, [1], *ODD),
    *bad("uncond_output", *ODD, guidance_scale=2.0),
    *bad("guidance_scale", True, X, float("nan"), float("inf"), 10**400, *ODD, uncond_output=X),
    *bad("rounding", None, 1, X, *ODD),
    *bad("backend", None, 1, X, torch.device("cpu"), *ODD),
    ("latents", {"latents": X.int(), "model_output": X}),
    ("latents", {"latents": torch.zeros(3)}),
    ("latents", {"latents": torch.zeros(())}),
    ("latents", {"latents": X[:0], "model_output": X[:0]}),
    ("latents", {"latents": X[:, :0], "model_output": X[:, :0]}),
    ("latents", {"latents": torch.zeros((1,) * 10)}),
    ("latents", {"latents": X.numpy()}),
    *bad_tensors("model_output"),
    *[(name, GUIDED | changed) for name, changed in bad_tensors("uncond_output")],
    ("uncond_output", {"guidance_scale": 2.0}),
    ("guidance_scale", {"uncond_output": X}),
    ("step", {"step": -1}),
    ("step", {"step": 4}),
    ("step", {"step": 1.0}),
    ("step", {"step": True}),
    ("step", {"step": None}),
    ("step", {"step": torch.tensor([0, 1])}),
    ("step", {"step": torch.tensor([0, 1, 2], dtype=torch.int32)}),
    ("step", {"step": torch.zeros(3)}),
    ("step", {"step": torch.zeros(3, 1, dtype=torch.int64)}),
    ("step", {"step": torch.zeros(3, dtype=torch.int64, device="meta")}),
    ("rounding", {"rounding": "bf16"}),
    ("rounding", {"rounding": "reference", "table": DDIM}),
    ("backend", {"backend": "gpu"}),
    ("backend", {"backend": "cuda"}),
]
SCORED = [*SHARED, *bad_tensors("next_latents"), *bad("next_latents", None, *ODD)]
STEP = [
    *SHARED,
    *bad("noise", 1, *ODD),
    *bad("seed", True, 1.0, torch.tensor(1), 2**70, *ODD),
    *bad("sample_ids", *ODD, seed=0),
    *bad("out_dtype", "float32", 1, X, *ODD),
    *bad("out", 1, *ODD),
    *bad("out", X.clone().requires_grad_(), torch.nn.Parameter(X)),
    *bad("return_denoised", None, 1, X, *ODD),
    *bad("return_denoised", True, table=TransitionTable.from_coefficients([1.0, 1.0], -0.1, 0.3)),
    *bad("noise", X.clone().requires_grad_()),
    *bad("latents", X.clone().requires_grad_()),
    *[(name, changed) for name, changed in bad_tensors("noise") if isinstance(changed["noise"], torch.Tensor)],
    *bad_tensors("out"),
    ("noise", {"noise": X, "seed": 1}),
    ("noise", {"noise": torch.Generator(), "seed": 1}),
    ("seed", {"seed": -1}),
    ("seed", {"seed": 2**63}),
    ("sample_ids", {"sample_ids": torch.arange(3)}),
    ("sample_ids", {"seed": 0, "sample_ids": torch.arange(2)}),
    ("sample_ids", {"seed": 0, "sample_ids": torch.arange(3, dtype=torch.int32)}),
    ("sample_ids", {"seed": 0, "sample_ids": [0, 1, 2]}),
    ("out_dtype", {"out_dtype": torch.int32}),
    ("out_dtype", {"out": X.clone(), "out_dtype": torch.bfloat16}),
    ("out", {"out": torch.zeros(3, 4, 1).expand(3, 4, 5)}),
    ("model_output", {"model_output": X.clone().requires_grad_()}),
]
LOSS = [
    *SCORED,
    *bad_per_sample("old_log_prob"),
    *bad_per_sample("advantages"),
    *[b for b in bad_per_sample("weight") if isinstance(b[1]["weight"], torch.Tensor)],
    *bad_tensors("reference_output"),
    *bad_tensors("old_output"),
    *bad("old_log_prob", None, *ODD),
    *bad("advantages", None, *ODD),
    *bad("weight", None, True, float("nan"), float("inf"), 10**400, *ODD),
    *bad("reference_output", *ODD),
    *bad("old_output", *ODD),
    *bad("kl_weight", None, True, X, float("inf"), *ODD, reference_output=X),
    *bad("ratio_norm", None, 1, "yes", X, *ODD, old_output=X),
    *bad("clip_range", None, True, X, (0.1,), (0.1, 0.1, 0.1), (0.1, -1.0), (0.1, None), (float("nan"), 0.1), *ODD),
    *bad("advantage_clip", None, True, X, (1.0, 1.0), *ODD),
    ("reference_output", {"kl_weight": 0.1}),
    ("kl_weight", {"kl_weight": -0.1, "reference_output": X}),
    ("kl_weight", {"kl_weight": float("nan"), "reference_output": X}),
    ("old_output", {"ratio_norm": True}),
    ("table", {"ratio_norm": True, "old_output": X, "table": DDIM}),
    ("clip_range", {"clip_range": -1e-4}),
    *[("clip_range", {"clip_range": value}) for value in (float("nan"), None, "1e-4", X, (), (1e-4,), (1e-4,) * 3)],
    *[("clip_range", {"clip_range": (1e-4, value)}) for value in (-1e-4, float("nan"), None, "x")],
    ("clip_range", {"clip_range": (-1e-4, 1e-4)}),
    *[("kl_weight", {"kl_weight": value, "reference_output": X}) for value in (None, "x", X, float("inf"))],
    *[("ratio_norm", {"ratio_norm": value, "old_output": X}) for value in (None, "yes", 1)],
    *[("weight", {"weight": value}) for value in (None, "x", [1.0] * 3, float("nan"), float("inf"))],
    *[("advantage_clip", {"advantage_clip": value}) for value in (None, "x")],
    ("step", {"table": TABLES["mixed"], "step": 0}),
    ("table", {"table": TABLES["ode"]}),
    ("advantage_clip", {"advantage_clip": -1.0}),
    ("advantage_clip", {"advantage_clip": float("nan")}),
]
NOISE = [
    ("seed", {"seed": -1}),
    ("sample_ids", {"sample_ids": torch.zeros(2, 2, dtype=torch.int64)}),
    ("sample_ids", {"sample_ids": torch.zeros(3)}),
    ("sample_ids", {"sample_ids": torch.arange(0)}),
    ("shape", {"shape": ()}),
    ("shape", {"shape": (4, 0)}),
    *bad("shape", None, 4, (4, 2.0), (4, "a"), (True,), X, (1,) * 9, (2**40,), (2**70,), *ODD),
    *bad("sample_ids", None, [0, 1], torch.arange(3).to(torch.int32), torch.arange(3).to_sparse(), *ODD),
    *bad("seed", None, True, 1.0, 2**63, torch.tensor(1), *ODD),
    *bad("dtype", None, "float32", 1, X, *ODD),
    *bad("backend", None, 1, X, *ODD),
    ("dtype", {"dtype": torch.int64}),
    ("backend", {"backend": "gpu"}),
]


def described(case) -> str | None:
    """Short names that do not change from run to run."""
    if not isinstance(case, dict):
        return None

    def kind(value) -> str:
        if isinstance(value, torch.Tensor):
            return f"{tuple(value.shape)} {value.dtype} {value.layout} {value.device}"
        return str(value) if isinstance(value, (int, float, str, list, torch.dtype)) else type(value).__name__

    return ", ".join(f"{name}={kind(value)}" for name, value in case.items())


@pytest.mark.parametrize(("name", "changed"), STEP, ids=described)
def test_transition_step(name: str, changed: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        step(**changed)


@pytest.mark.parametrize(("name", "changed"), SCORED, ids=described)
def test_transition_log_prob(name: str, changed: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        score(**changed)


@pytest.mark.parametrize(("name", "changed"), LOSS, ids=described)
def test_policy_loss(name: str, changed: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        loss(**changed)


@pytest.mark.parametrize(("name", "changed"), NOISE, ids=described)
def test_gaussian_noise(name: str, changed: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        noise(**changed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", [step, score, loss])
@pytest.mark.parametrize("value", [-1, 4, 2**40])
def test_a_step_of_one_sample_out_of_range(call: Callable, value: int, backend: str) -> None:
    with pytest.raises(ValueError, match=r"^step: "):
        call(step=torch.tensor([0, value, 1]), backend=backend)


def test_backend_that_cannot_run_the_device() -> None:
    from dancegrpo_fast import backends

    assert backends.pick("auto", torch.device("meta")) == "reference"
    with pytest.raises(ValueError, match=r"^backend: "):
        backends.pick("cpu", torch.device("meta"))


def test_compiled_module_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` falls back, asking for it by name says why."""
    from dancegrpo_fast import backends

    monkeypatch.setattr(backends, "_cpu", lambda: (None, "the compiled module does not load: no such file"))
    assert backends.pick("auto", torch.device("cpu")) == "reference"
    assert bool(step(backend="auto").log_prob.isfinite().all())
    with pytest.raises(ValueError, match=r"^backend: .*no such file"):
        step(backend="cpu")


def test_model_output_with_gradient_is_fine_without_grad_mode() -> None:
    with torch.no_grad():
        result = step(model_output=X.clone().requires_grad_())
    assert not result.latents.requires_grad and not result.log_prob.requires_grad
