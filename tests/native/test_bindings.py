"""The compiled modules called as Python's checks never would: what is missing is named, and no call can hang."""

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.transitions import cps, shifted_sigmas

from ..ops.cases import BUILD_LEVEL

BATCH, NUMEL = 3, 24
# Row 3 adds no noise.
TABLE = cps(shifted_sigmas(4, 3.0), 0.8).packed()


@pytest.fixture(scope="module", params=[*BUILD_LEVEL, "_cuda"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    level = importlib.import_module("dancegrpo_fast._cpu").processor_level()
    if BUILD_LEVEL.get(request.param, 1) > level:
        pytest.skip(f"the processor is x86-64-v{level}")
    if request.param == "_cuda" and torch.cuda.is_available():
        pytest.skip("addresses of the host are none of the GPU's")
    return pytest.importorskip(f"dancegrpo_fast.{request.param}", reason="the CUDA module is not built: no nvcc")


KEPT: list[Tensor] = []


def tensor(*shape: int) -> Tensor:
    """Kept, as only its address is passed on."""
    KEPT.append(torch.full(shape, 0.5))
    return KEPT[-1]


def whole() -> tuple:
    return tensor(BATCH, NUMEL).data_ptr(), 0, NUMEL


def strided() -> tuple:
    return tensor(BATCH, 2 * NUMEL).data_ptr(), 0, 2 * NUMEL, (4, 6), (12, 2)


def numbers(count: int = BATCH) -> int:
    return tensor(count).data_ptr()


class Call:
    """Valid arguments of an entry point, each by its name."""

    def __init__(self, module: ModuleType, name: str, **rest: object) -> None:
        self.run = getattr(module, name)
        launch = 1 if "_cpu" in module.__name__ else (0, numbers(BATCH + 1), numbers(4096))
        self.step = {"latents": whole(), "model_output": strided(), "uncond_output": whole(), "next_latents": strided()}
        self.step |= {"batch": BATCH, "numel": NUMEL, "table": TABLE.data_ptr(), "table rows": len(TABLE)}
        self.step |= {"steps": 0, "step": 1, "guidance": 2.0, "rounding": False, "double": False, "launch": launch}
        self.rest = rest

    def __call__(self, **changed: object) -> None:
        step = tuple(changed.get(name, value) for name, value in self.step.items())
        self.run(step, *(changed.get(name, value) for name, value in self.rest.items()))


def calls(module: ModuleType) -> dict[str, Call]:
    outputs = (numbers(1), numbers(), numbers(), numbers(8), numbers(), numbers(), numbers())
    grads = {"grad_output": strided(), "grad_uncond": whole()}
    scales = {"grad_loss": numbers(1), "step_scale": numbers(), "pull_scale": numbers()}
    loss = {"reference_output": whole(), "old_output": strided(), "old_log_prob": numbers(), "advantages": numbers()}
    loss |= {"weight": 0, "clip_low": 0.1, "clip_high": 0.2, "advantage_clip": 5.0, "kl_weight": 0.1}
    loss |= {"ratio_norm": True, "out": outputs}
    sampled = {"noise": whole(), "seed": None, "sample_ids": 0, "denoised": strided(), "log_prob": numbers()}
    return {
        "sample": Call(module, "transition_sample", **sampled),
        "score": Call(module, "transition_log_prob", log_prob=numbers()),
        "score gradient": Call(module, "transition_log_prob_gradient", grad_log_prob=numbers(), **grads),
        "loss": Call(module, "policy_loss", **loss),
        "loss gradient": Call(module, "policy_loss_gradient", **scales, pull=whole(), mean_output=strided(), **grads),
    }


NAMES = ("sample", "score", "score gradient", "loss", "loss gradient")
OPERANDS = ("latents", "model_output", "next_latents")
# What a call cannot do without, beside the step's operands.
OTHERS = {
    "sample": ("log_prob",),
    "score": ("log_prob",),
    "score gradient": ("grad_log_prob",),
    "loss": ("old_log_prob", "advantages"),
    "loss gradient": ("grad_loss", "step_scale", "pull_scale"),
}
BAD_OPERANDS: tuple[tuple[str, Callable[[], object]], ...] = (
    ("no address", lambda: (0, *whole()[1:])),
    ("no such dtype", lambda: (whole()[0], 4, NUMEL)),
    ("a dtype below 0", lambda: (whole()[0], -1, NUMEL)),
    ("no dimensions", lambda: (*strided()[:3], (), ())),
    ("a size of 0", lambda: (*strided()[:3], (0, 24), (24, 1))),
    ("an inner size of 0", lambda: (*strided()[:3], (24, 0), (1, 1))),
    ("sizes below 0", lambda: (*strided()[:3], (-4, -6), (6, 1))),
    ("too few elements", lambda: (*strided()[:3], (4, 5), (5, 1))),
    ("too many elements", lambda: (*strided()[:3], (5, 6), (6, 1))),
    ("a product beyond 64 bits", lambda: (*strided()[:3], (2**62, 2**62), (1, 1))),
    ("one stride", lambda: (*strided()[:3], (4, 6), (6,))),
    ("nine dimensions", lambda: (*strided()[:3], (*(1,) * 8, 24), (1,) * 9)),
    ("a length of its own", lambda: strided()[:4]),
    ("a number", lambda: 3),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_valid_call_is_not_refused(name: str, module: ModuleType) -> None:
    call = calls(module)[name]
    if "_cpu" in module.__name__:
        call()
        return
    with pytest.raises(RuntimeError, match=r"^CUDA: "):
        call()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_operand_is_named(name: str, module: ModuleType) -> None:
    call = calls(module)[name]
    for operand in (*OPERANDS, *(n for n in call.rest if n in ("grad_output", "grad_uncond"))):
        with pytest.raises(ValueError, match=rf"^{operand}: got None"):
            call(**{operand: None})
    for other in ("table", *OTHERS[name]):
        with pytest.raises(ValueError, match=rf"^{other}: got no address"):
            call(**{other: 0})


@pytest.mark.parametrize(("problem", "bad"), BAD_OPERANDS, ids=[problem for problem, _ in BAD_OPERANDS])
@pytest.mark.parametrize("name", NAMES)
def test_an_operand_that_is_no_sample_is_named(
    name: str, problem: str, bad: Callable[[], object], module: ModuleType
) -> None:
    call = calls(module)[name]
    for operand, valid in (call.step | call.rest).items():
        if isinstance(valid, tuple) and operand not in ("launch", "out"):
            with pytest.raises(ValueError, match=rf"^{operand}: got "):
                call(**{operand: bad()})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changed", "value"),
    [("batch", 0), ("batch", -1), ("numel", 0), ("numel", -24), ("table rows", 0), ("step", -1), ("step", 4)],
)
def test_numbers_that_make_no_batch(name: str, changed: str, value: int, module: ModuleType) -> None:
    with pytest.raises(ValueError, match=rf"^{changed.split()[0]}: got "):
        calls(module)[name](**{changed: value})


@pytest.mark.parametrize("name", NAMES)
def test_the_step_has_all_its_parts(name: str, module: ModuleType) -> None:
    call = calls(module)[name]
    with pytest.raises(ValueError, match=r"^transition: got 13 values"):
        call.run(tuple(call.step.values())[:-1], *call.rest.values())


def test_what_the_loss_needs_only_with_its_options(module: ModuleType) -> None:
    loss = calls(module)["loss"]
    with pytest.raises(ValueError, match=r"^reference_output: got None with a KL"):
        loss(reference_output=None)
    with pytest.raises(ValueError, match=r"^old_output: got None with ratio_norm"):
        loss(old_output=None)
    outputs = loss.rest["out"]
    assert isinstance(outputs, tuple)
    for place in range(7):
        with pytest.raises(ValueError, match=r"^out: got no address"):
            loss(out=(*outputs[:place], 0, *outputs[place + 1 :]))
    with pytest.raises(ValueError, match=r"^out: got 6 values"):
        loss(out=outputs[:6])


@pytest.mark.parametrize("module", BUILD_LEVEL, indirect=True)
def test_steps_of_single_samples(module: ModuleType) -> None:
    """On the CPU each is looked at; a GPU's kernels make them NaN."""
    for name, call in calls(module).items():
        for row in (-1, 4, 2**40):
            steps = torch.tensor([0, row, 1])
            with pytest.raises(ValueError, match=rf"^step: got {row}, the table has rows 0 to 3"):
                call(steps=steps.data_ptr())
        if name == "loss":
            noiseless, weight = torch.tensor([0, 3, 1]), torch.tensor([1.0, 0.0, 1.0])
            with pytest.raises(ValueError, match=r"^step: got 3, a row without noise"):
                call(steps=noiseless.data_ptr())
            call(steps=noiseless.data_ptr(), weight=weight.data_ptr())


@pytest.mark.parametrize("module", ["_cuda"], indirect=True)
def test_a_launch_has_room_for_its_sums(module: ModuleType) -> None:
    for name, call in calls(module).items():
        if "gradient" in name:
            continue
        with pytest.raises(ValueError, match=r"^tickets: got no address"):
            call(launch=(0, 0, numbers(64)))
        with pytest.raises(ValueError, match=r"^scratch: got no address"):
            call(launch=(0, numbers(), 0))
        with pytest.raises(ValueError, match=r"^launch: got 2 values"):
            call(launch=(0, 0))
