"""Bad input gets a `ValueError` that begins with the argument's name, in every op and before anything runs."""

from collections.abc import Callable

import pytest
import torch

from dancegrpo_fast import backends, gaussian_noise, policy_loss, transition_log_prob, transition_step
from dancegrpo_fast.transitions import TransitionTable

from .cases import BACKENDS, TABLES

FLOW, DDIM = TABLES["flow"], TABLES["ddim"]
X = torch.zeros(3, 4, 5)
PER_SAMPLE = torch.zeros(3)


STEPPED = {"latents": X, "model_output": X, "table": FLOW, "step": 1}


def step(**changed):
    return transition_step(**STEPPED | changed)


def score(**changed):
    return transition_log_prob(**STEPPED | {"next_latents": X} | changed)


def loss(**changed):
    return policy_loss(**STEPPED | {"next_latents": X, "old_log_prob": PER_SAMPLE, "advantages": PER_SAMPLE} | changed)


def noise(**changed):
    return gaussian_noise(**{"shape": (4,), "seed": 0, "sample_ids": torch.arange(3), **changed})


# Of no argument: an object of the wrong kind, a word, and what looks like a number.
ODD = (object(), "abc", [1.0], {}, X.numpy(), 1 + 2j)
# What no `[B, ...]` tensor may be.
NO_SAMPLES = (X[:2], X.flatten(1), X.int(), X.to("meta"), X.to_sparse(), X.to(torch.float8_e5m2), *ODD)
NO_NUMBERS = (PER_SAMPLE[:2], PER_SAMPLE[:, None], PER_SAMPLE.bfloat16(), PER_SAMPLE.long(), PER_SAMPLE.to("meta"))
NO_NUMBERS += (PER_SAMPLE.to_sparse(), [1.0] * 3, *ODD)
LEAF = X.clone().requires_grad_()
NAN, INF, LARGE = float("nan"), float("inf"), 10**400
# Steps, which are int64.
LONG = torch.arange(3)


def bad(name: str, *values, **others) -> list[tuple[str, dict]]:
    return [(name, {name: value, **others}) for value in values]


SHARED = [
    *bad(
        "latents",
        None,
        [[0.0]],
        X.int(),
        X[:0],
        X[:, :0],
        torch.zeros(3),
        torch.zeros(()),
        torch.zeros((1,) * 10),
        *ODD,
    ),
    *bad("model_output", None, *NO_SAMPLES),
    *bad("table", None, FLOW.a, [FLOW], *ODD),
    *bad(
        "step", -1, 4, 2**70, 1.0, True, None, [1], LONG[:2], LONG.int(), torch.zeros(3), LONG[:, None], LONG.to("meta")
    ),
    *bad("step", *ODD),
    *bad("uncond_output", None, *NO_SAMPLES, guidance_scale=2.0),
    *bad("guidance_scale", None, True, X, NAN, INF, LARGE, *ODD, uncond_output=X),
    *bad("rounding", None, 1, X, "bf16", *ODD),
    *bad("rounding", "reference", table=DDIM),
    *bad("backend", None, 1, X, torch.device("cpu"), "gpu", "cuda", *ODD),
]
SCORED = [*SHARED, *bad("next_latents", None, *NO_SAMPLES)]
STEP = [
    *SHARED,
    *bad("noise", 1, LEAF, *NO_SAMPLES),
    *bad("noise", X, torch.Generator(), seed=1),
    *bad("seed", -1, 2**63, True, 1.0, torch.tensor(1), 2**70, *ODD),
    *bad("sample_ids", LONG),
    *bad("sample_ids", LONG[:2], LONG.int(), [0, 1, 2], *ODD, seed=0),
    *bad("out_dtype", "float32", 1, X, torch.int32, *ODD),
    *bad("out_dtype", torch.bfloat16, out=X.clone()),
    *bad("out", 1, LEAF, torch.nn.Parameter(X), torch.zeros(3, 4, 1).expand(3, 4, 5), *NO_SAMPLES),
    *bad("return_denoised", None, 1, X, *ODD),
    *bad("return_denoised", True, table=TransitionTable.from_coefficients([1.0, 1.0], -0.1, 0.3)),
    *bad("latents", LEAF),
    *bad("model_output", LEAF),
]
LOSS = [
    *SCORED,
    *bad("old_log_prob", None, *NO_NUMBERS),
    *bad("advantages", None, *NO_NUMBERS),
    *bad("weight", None, True, NAN, INF, LARGE, *NO_NUMBERS),
    *bad("reference_output", *NO_SAMPLES),
    *bad("reference_output", None, kl_weight=0.1),
    *bad("old_output", *NO_SAMPLES),
    *bad("old_output", None, ratio_norm=True),
    *bad("kl_weight", None, True, X, -0.1, NAN, INF, *ODD, reference_output=X),
    *bad("ratio_norm", None, 1, "yes", X, *ODD, old_output=X),
    *bad("table", DDIM, ratio_norm=True, old_output=X),
    *bad("table", TABLES["ode"]),
    *bad("step", 0, table=TABLES["mixed"]),
    *bad("clip_range", -1e-4, NAN, None, True, X, "1e-4", (), (1e-4,), (1e-4,) * 3, *ODD),
    *bad("clip_range", *((1e-4, value) for value in (-1e-4, NAN, None, "x")), (-1e-4, 1e-4), (NAN, 0.1)),
    *bad("advantage_clip", -1.0, NAN, None, True, X, (1.0, 1.0), "x", *ODD),
]
NOISE = [
    *bad("shape", None, 4, (), (4, 0), (4, 2.0), (4, "a"), (True,), X, (1,) * 9, (2**40,), (2**70,), *ODD),
    *bad("sample_ids", None, [0, 1], LONG.int(), LONG.to_sparse(), LONG[:, None], torch.zeros(3), LONG[:0], *ODD),
    *bad("seed", -1, 2**63, None, True, 1.0, torch.tensor(1), *ODD),
    *bad("dtype", None, "float32", 1, X, torch.int64, *ODD),
    *bad("backend", None, 1, X, "gpu", *ODD),
]


def described(case) -> str | None:
    """Short names that do not change from run to run."""
    if not isinstance(case, dict):
        return getattr(case, "__name__", None)

    def kind(value) -> str:
        if isinstance(value, torch.Tensor):
            return f"{tuple(value.shape)} {value.dtype} {value.layout} {value.device}"
        return str(value) if isinstance(value, (int, float, str, list, torch.dtype)) else type(value).__name__

    return ", ".join(f"{name}={kind(value)}" for name, value in case.items())


EVERY = ((step, STEP), (score, SCORED), (loss, LOSS), (noise, NOISE))


@pytest.mark.parametrize(
    ("call", "name", "changed"), [(call, *each) for call, cases in EVERY for each in cases], ids=described
)
def test_bad_input(call: Callable, name: str, changed: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call(**changed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", [step, score, loss])
@pytest.mark.parametrize("value", [-1, 4, 2**40])
def test_a_step_of_one_sample_out_of_range(call: Callable, value: int, backend: str) -> None:
    with pytest.raises(ValueError, match=r"^step: "):
        call(step=torch.tensor([0, value, 1]), backend=backend)


def test_backend_that_cannot_run_the_device() -> None:
    assert backends.pick("auto", torch.device("meta")) == "reference"
    with pytest.raises(ValueError, match=r"^backend: "):
        backends.pick("cpu", torch.device("meta"))


def test_compiled_module_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` falls back, asking for it by name says why."""
    monkeypatch.setattr(backends, "_cpu", lambda: (None, "the compiled module does not load: no such file"))
    assert backends.pick("auto", torch.device("cpu")) == "reference"
    assert bool(step(backend="auto").log_prob.isfinite().all())
    with pytest.raises(ValueError, match=r"^backend: .*no such file"):
        step(backend="cpu")


def test_model_output_with_gradient_is_fine_without_grad_mode() -> None:
    with torch.no_grad():
        result = step(model_output=X.clone().requires_grad_())
    assert not result.latents.requires_grad and not result.log_prob.requires_grad
