"""What is counted: every kernel at the sizes of FLUX, HunyuanVideo and Wan, and the ops of reinforcement learning."""

import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from dancegrpo_fast import backends
from dancegrpo_fast.ops import _triton_gelu_tanh as gelu
from dancegrpo_fast.ops import _triton_norm_modulate as norm_launcher
from tests.triton import offline
from tests.triton import test_compiled_norm_modulate as norms
from tests.triton import test_compiled_qk_norm_rope as heads

from .launches import APART, Launch, of_cuda, of_triton

BF16, F32 = torch.bfloat16, torch.float32
# Tokens, channels, width of the feed-forward layer, heads of 128 channels, and how queries and keys are prepared.
MODELS = {
    "FLUX": (4608, 3072, 12288, 24, "heads"),
    "HunyuanVideo": (17056, 3072, 12288, 24, "heads"),
    "Wan": (32760, 5120, 13824, 40, "tokens"),
}
Mix = tuple[torch.dtype, torch.dtype, torch.dtype]
# Samples of a video's latents, and elements of each.
BATCH, NUMEL = 8, 806_400
# The shapes that every architecture is counted at, and the architecture that all are counted on.
COUNTED = ("HunyuanVideo", "float32, outputs bfloat16")
EVERY_SHAPE = 90
TILE = 8192


@dataclass(frozen=True)
class Case:
    """A call of an op; of how many elements its kernels' instructions are told, and how many programs are followed."""

    name: str
    shape: str
    elements: int
    launches: Callable[[int], list[Launch]]
    samples: int = 1

    @property
    def id(self) -> str:
        """As it stands in the results."""
        return f"{self.name}, {self.shape}"


@cache
def _folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory()


def _compiled(run: Callable[[], object], architecture: int) -> list[Launch]:
    with offline.compiling(architecture, Path(_folder().name)) as found:
        run()
        return [of_triton(one, architecture) for one in found]


def _first(run: Callable[[], object], architecture: int) -> list[Launch]:
    return _compiled(run, architecture)[:1]


def _new(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norms(model: str) -> Iterator[Case]:
    tokens, channels, *_ = MODELS[model]
    size: dict[str, Any] = {"channels": channels, "tokens": tokens, "batch": 1}
    calls: dict[str, Callable[[], object]] = {
        "norm forward": partial(norms.forward, gated=False, **size),
        "gated norm forward": partial(norms.forward, **size),
        "norm forward, lossless": partial(norms.forward, gated=False, mode="lossless", **size),
        "gated norm forward, lossless": partial(norms.forward, mode="lossless", **size),
        "norm backward": partial(norms.backward, gated=False, **size),
        "norm backward, 3 consumers": partial(norms.backward, gated=False, grads=3, **size),
        "norm backward, adapters alone": partial(norms.backward, gated=False, frozen=True, **size),
        "gated norm backward": partial(norms.backward, **size),
        "gated norm backward with a bias": partial(norms.backward, biased=True, **size),
        "gated residual forward": partial(norms.residual_forward, channels, tokens=tokens // norms.BATCH),
        "gated residual backward": partial(norms.residual_backward, channels, tokens=tokens // norms.BATCH),
        "gated residual backward with a bias": partial(
            norms.residual_backward, channels, tokens=tokens // norms.BATCH, biased=True
        ),
    }
    if channels > norm_launcher.LONG:
        # The sum for the bias is torch's there.
        del calls["gated norm backward with a bias"]
    for name, call in calls.items():
        yield Case(name, model, tokens * channels, partial(_compiled, call))


def _heads(model: str) -> Iterator[Case]:
    tokens, channels, _, count, kind = MODELS[model]
    shape = replace(heads.SHAPES[kind], heads=count, tokens=tokens, batch=1)
    yield Case("qk norm and rope, forward", model, 2 * tokens * channels, partial(_first, partial(heads.run, shape)))

    for name, summed in (("backward", False), ("backward with biases", True)):
        if summed and kind == "tokens":
            continue

        def backward(architecture: int, summed: bool = summed) -> list[Launch]:
            return _compiled(partial(heads.run, replace(shape, biases=summed)), architecture)[1:]

        yield Case(f"qk norm and rope, {name}", model, 2 * tokens * channels, backward)


def _gelu(model: str) -> Iterator[Case]:
    tokens, channels, width, *_ = MODELS[model]
    prefix = channels if model == "FLUX" else 0

    def forward() -> None:
        head = _new(1, tokens, prefix) if prefix else None
        gelu.forward(_new(1, tokens, width), head, _new(1, tokens, prefix + width))

    def backward() -> None:
        gelu.backward(_new(1, tokens, prefix + width)[..., prefix:], _new(1, tokens, width), _new(1, tokens, width))

    def gradients() -> None:
        grad, out = _new(1, tokens, prefix + width), _new(1, tokens, prefix + width)
        x, grad_x = _new(1, tokens, width), _new(1, tokens, width)
        head = _new(1, tokens, prefix) if prefix else None
        gelu.gradients(grad[..., prefix:], x, head, out, grad_x, _new(width))

    for name, run in (("forward", forward), ("backward", backward), ("activation and gradients", gradients)):
        # A row's programs are those of the prefix and those of GELU, whose last one may be part of a block.
        block = gelu.ROWS_BLOCK if run is gradients else gelu.BLOCK
        parts = 1 if width % block == 0 and not prefix else -(-prefix // block) + -(-width // block)
        yield Case(f"gelu {name}", model, tokens * width, partial(_compiled, run), parts)


def _steps(dtypes: Mix, label: str) -> Iterator[Case]:
    calls: dict[str, Callable[[offline.Tensors], object]] = {
        "seeded step": offline.sample,
        "step, noise given": partial(offline.sample, seeded=False),
        "log-probability": offline.log_prob,
        "gradient": offline.log_prob_gradient,
        "loss": offline.policy_loss,
    }
    for name, call in calls.items():

        def run(call: Callable[[offline.Tensors], object] = call) -> None:
            # As many samples as these arguments have; a program's way does not depend on it.
            call(offline.Tensors(dtypes, shape=(offline.BATCH, BATCH * NUMEL // offline.BATCH), device="meta"))

        yield Case(f"{name}, Triton", label, BATCH * NUMEL, partial(_compiled, run))


_CODES = {F32: 0, BF16: 2, torch.float16: 3}


class Arguments:
    """The CUDA kernels' arguments as `kernels/transition/call.h` and `kernels/policy_loss/call.h` lay them out."""

    def __init__(self, batch: int, numel: int, dtypes: Mix, guided: bool = False):
        self.batch, self.numel = batch, numel
        self._pointers = 0
        latents, output, following = dtypes
        self.uncond = output if guided else None
        # The operands of the step.
        self.dtypes = (latents, output, self.uncond, following)
        self.moved = 0

    def pointer(self) -> bytes:
        """An address of its own."""
        self._pointers += 1
        return struct.pack("<Q", self._pointers * APART)

    def operand(self, dtype: torch.dtype | None) -> bytes:
        """One contiguous tensor, or none."""
        if dtype is None:
            return bytes(160)
        self.moved += self.batch * self.numel * dtype.itemsize
        head = self.pointer() + struct.pack("<iiqii", _CODES[dtype], 0, self.numel, 1, 0)
        return head + struct.pack("<q56xq56x", self.numel, 1)

    def call(self) -> bytes:
        """TransitionCall."""
        operands = b"".join(self.operand(dtype) for dtype in self.dtypes)
        table = self.pointer() + struct.pack("<qqqd?7x", 4, 0, 1, 4.5, False)
        return struct.pack("<qq", self.batch, self.numel) + operands + table

    def noise(self, given: bool) -> bytes:
        """NoiseSource."""
        return self.operand(F32 if given else None) + struct.pack("<?7xQQ", not given, 7, 0)

    def workspace(self) -> bytes:
        """Workspace."""
        return self.pointer() + self.pointer()

    def pointers(self, count: int) -> bytes:
        """Addresses of results."""
        return b"".join(self.pointer() for _ in range(count))


_PACKETS = struct.pack("<?7x", True)


def _cuda_parts(name: str, a: Arguments) -> tuple[str, list[bytes]]:
    call = a.call()
    if "seeded" in name:
        # As the compiler spells UsualStep.
        state, output = _CODES[a.dtypes[0]], _CODES[a.dtypes[1]]
        usual = rf"usual_sample_kernelINS_9UsualStepILNS_5DTypeE{state}ELS\d_{output}ELb{int(a.uncond is not None)}E"
        return usual, [call, a.noise(False), a.workspace(), a.pointers(1)]
    if name.startswith("step"):
        noise = a.noise(True)
        parts = [call, noise, a.operand(None), _PACKETS, a.workspace(), a.pointers(1)]
        return "transition_sample_kernelIf", parts
    if name == "log-probability":
        return "transition_log_prob_kernelIf", [call, _PACKETS, a.workspace(), a.pointers(1)]
    if name == "gradient":
        grads = a.operand(a.dtypes[1]) + a.operand(a.uncond) + bytes(2 * 160)
        scales = a.pointers(1) + bytes(16) + a.pointers(1)
        return "transition_gradient_kernelIf", [call, grads + scales, _PACKETS]
    loss = call + bytes(2 * 160) + a.pointers(2) + bytes(8) + struct.pack("<dddd?7x", 1e-4, 1e-4, 5.0, 0.0, False)
    return "policy_loss_kernelIf", [loss, _PACKETS, a.workspace(), a.pointers(7)]


def cuda_launch(name: str, dtypes: Mix, guided: bool, architecture: int) -> list[Launch]:
    """Of the CUDA module, where it was built."""
    module = Path(str(backends.cuda_module().__file__))
    a = Arguments(BATCH, NUMEL, dtypes, guided)
    kernel, parts = _cuda_parts(name, a)
    # An operand is what 16-byte moves want of it, so the kernels take their way in packets.
    whole = [b"".join(parts)]
    programs = BATCH * -(-NUMEL // TILE)
    op = "policy_loss" if name == "loss" else "transition"
    return [of_cuda(module, op, kernel, architecture, programs, whole, a.moved)]


def _cuda(dtypes: Mix, label: str) -> Iterator[Case]:
    names = ("seeded step", "step, noise given", "log-probability", "gradient", "loss")
    for name in names:
        launches = partial(cuda_launch, name, dtypes, False)
        yield Case(f"{name}, CUDA", label, BATCH * NUMEL, launches)
    guided = partial(cuda_launch, "seeded step", dtypes, True)
    yield Case("guided seeded step, CUDA", label, BATCH * NUMEL, guided)


# Latents, model output and next latents.
MIXES: dict[str, Mix] = {
    "float32, outputs bfloat16": (F32, BF16, F32),
    "float32": (F32, F32, F32),
    "bfloat16": (BF16, BF16, BF16),
}


def cases(cuda: bool) -> Iterable[Case]:
    """All of them; with those of the CUDA module where it is built."""
    for model in MODELS:
        yield from _norms(model)
        yield from _heads(model)
        yield from _gelu(model)
    for label, dtypes in MIXES.items():
        if cuda:
            yield from _cuda(dtypes, label)
        if label in COUNTED:
            yield from _steps(dtypes, label)
