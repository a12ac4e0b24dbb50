"""A double-stream block and a single-stream block in a row, as diffusers has them and patched.

Attention is diffusers' native backend without a mask for all. `peak_bytes`: what one call allocates beside what was
there, results and gradients included; `saved_bytes`: what a forward keeps for its backward beside its outputs.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import dancegrpo_fast as dgf
from bench.blocks.configurations import CONFIGURATIONS, Setup, Sizes
from bench.clocks import Clock, DeviceClock
from bench.place import Place, place_of
from bench.rows import Row
from bench.turns import Contest, cross
from tests.patch.models import assert_gradients_within_budget
from tests.tolerances import assert_within_budget

from .bench_qk_norm_rope import tables
from .block_inputs import BOTH, FLUX, FORWARD, HUNYUAN

ATTENTION = "diffusers' native backend (scaled_dot_product_attention), no mask"
# Settings of `accelerate`, None for diffusers' own blocks, and whether they are compiled.
CONTENDERS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "eager": (None, False),
    "compile": (None, True),
    "patched, lossless": ({"mode": "lossless"}, False),
    "patched, fast": ({"mode": "fast"}, False),
    "patched, fast, recompute all": ({"mode": "fast", "recompute": "all"}, False),
    "patched, fast, compile": ({"mode": "fast"}, True),
}
COMPILED = "patched, fast, compile"
# Compiling takes longer than anything else, so each model compiles once before that.
FORMS = {
    "double, single": tuple(name for name in CONTENDERS if name != COMPILED),
    "patched and compiled": ("eager", "patched, fast", COMPILED),
}
_TINY_MODELS: dict[str, dict[str, Any]] = {
    HUNYUAN: {
        "in_channels": 4,
        "out_channels": 4,
        "text_embed_dim": 12,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    },
    FLUX: {"in_channels": 8, "joint_attention_dim": 24, "pooled_projection_dim": 12, "axes_dims_rope": (4, 6, 6)},
}
TINY = Sizes(2, 16, 60, 7)


class Pair(nn.Module):
    """The two blocks, each in a model of its own so that it can be patched."""

    def __init__(self, double: Setup, single: Setup, rotary: tuple[Tensor, Tensor], flux: bool) -> None:
        super().__init__()
        self.models = nn.ModuleList([double.model, single.model])
        self.rotary, self.flux = rotary, flux

    @property
    def blocks(self) -> tuple[Any, Any]:
        """Of the two models."""
        double, single = cast(list[Any], self.models)
        return double.transformer_blocks[0], single.single_transformer_blocks[0]

    def forward(self, image: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        """Image and text tokens."""
        double, single = self.blocks
        name = "image_rotary_emb" if self.flux else "freqs_cis"
        first, second = double(hidden_states=image, encoder_hidden_states=text, temb=temb, **{name: self.rotary})
        image, text = (second, first) if self.flux else (first, second)
        first, second = single(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=self.rotary)
        return (second, first) if self.flux else (first, second)

    def twin(self) -> "Pair":
        """Other modules with the same weights."""
        shared = {id(t): t for t in (*self.parameters(), *self.buffers(), *self.rotary)}
        return copy.deepcopy(self, shared)


@dataclass(frozen=True)
class Case:
    """The pair of one model, one way; HunyuanVideo's block ops come before, and compiled patches last."""

    model: str
    form: str
    way: str

    def __str__(self) -> str:
        return f"{self.form}, {self.model}, {self.way}"

    @property
    def rank(self) -> int:
        """Patched blocks in a compiler have tests of their own."""
        return 3 if COMPILED in FORMS[self.form] else 1

    def sizes(self, place: Place) -> Sizes:
        """The model's, unless it is a dry run."""
        if place.dry:
            return replace(TINY, extra=_TINY_MODELS[self.model])
        return next(c.sizes for c in CONFIGURATIONS if c.model == self.model)


# Of a case, most of it for compiling.
SECONDS = {HUNYUAN: 20.0, FLUX: 15.0}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """HunyuanVideo's and FLUX's; a dry run does without compiled patches."""
    place, form = place_of(metafunc.config.getoption("--device")), list(FORMS)["compiled" in metafunc.function.__name__]
    shown = place.blocks is not None and not (place.dry and COMPILED in FORMS[form])
    cases = []
    for model, seconds in SECONDS.items():
        marks = [pytest.mark.takes(seconds), *([pytest.mark.full] if model == FLUX else [])]
        cases += [pytest.param(Case(model, form, way), marks=marks, id=f"{model}, {way}") for way in (FORWARD, BOTH)]
    cross(metafunc, cases if shown else [], FORMS[form], "blocks are measured on a GPU")


def test_blocks(case: Case, place: Place, contest: Any) -> None:
    """Patched blocks beside diffusers', eager and compiled."""
    contest(lambda: _pairs(case, place))


def test_compiled_blocks(case: Case, place: Place, contest: Any) -> None:
    """Patched blocks in a compiler."""
    contest(lambda: _pairs(case, place))


def build(case: Case, place: Place) -> Pair:
    """Random weights."""
    found, sizes = [], case.sizes(place)
    with torch.device(place.device):
        for block in ("double", "single"):
            (configuration,) = (c for c in CONFIGURATIONS if (c.model, c.block) == (case.model, block))
            found.append(replace(configuration, sizes=sizes).make())
    generator = torch.Generator(place.device).manual_seed(0)
    for setup in found:
        with torch.no_grad():
            for name, value in setup.model.named_parameters():
                around = 1.0 if value.ndim == 1 and name.endswith(("norm_q.weight", "norm_k.weight")) else 0.0
                value.normal_(around, 0.02, generator=generator)
    flux = case.model == FLUX
    rotary = tables(sizes.image + sizes.text if flux else sizes.image, sizes.head_dim, place.device)
    double, single = found
    return Pair(double, single, rotary, flux)


@dataclass(frozen=True)
class Inputs:
    """Leaves, gradients of the two outputs, and everything whose gradient is wanted."""

    leaves: list[Tensor]
    grads: list[Tensor]
    parameters: dict[str, Tensor]


def draw(case: Case, pair: Pair, place: Place) -> Inputs:
    """Random tokens."""
    generator, sizes = torch.Generator(place.device).manual_seed(1), case.sizes(place)
    rows = [(1, n, sizes.channels) for n in (sizes.image, sizes.text)]
    shapes = [*rows, (1, sizes.channels), *rows]
    drawn = [torch.randn(s, generator=generator, device=place.device, dtype=torch.bfloat16) for s in shapes]
    return Inputs([t.requires_grad_() for t in drawn[:3]], drawn[3:], _parameters(pair))


def _parameters(pair: Pair) -> dict[str, Tensor]:
    return {f"{i}.{name}": p for i, block in enumerate(pair.blocks) for name, p in block.named_parameters()}


Run = Callable[[int], tuple[Tensor, ...]]


def call_of(pair: Any, inputs: Inputs, way: str) -> Run:
    """Outputs, or outputs and gradients of tokens, conditioning and all weights."""

    def forward(i: int) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found: tuple[Tensor, ...] = pair(*inputs.leaves)
            return found

    def both(i: int) -> tuple[Tensor, ...]:
        outputs = pair(*inputs.leaves)
        found = torch.autograd.grad(outputs, [*inputs.leaves, *inputs.parameters.values()], inputs.grads)
        return *(out.detach() for out in outputs), *found

    return both if way == BOTH else forward


def modules(case: Case, pair: Pair, place: Place) -> dict[str, Any]:
    """Contender -> the pair in its way, all with the same weights."""
    found = {}
    for name in FORMS[case.form]:
        settings, is_compiled = CONTENDERS[name]
        module: Any = pair.twin()
        if settings is not None and place.blocks is not None:
            for model in module.models:
                dgf.accelerate(model, trim_text=False, backend=place.blocks, **settings)
        found[name] = torch.compile(module, dynamic=False, backend=place.compiler) if is_compiled else module
    return found


def truth(pair: Pair, inputs: Inputs, way: str) -> tuple[Tensor, ...]:
    """Eager in float32, as float64 has no fused attention: its error is far below a rounding of bfloat16."""
    wide = copy.deepcopy(pair).float()
    leaves = [t.detach().float().requires_grad_() for t in inputs.leaves]
    given = Inputs(leaves, [g.float() for g in inputs.grads], _parameters(wide))
    return tuple(t.detach() for t in call_of(wide, given, way)(0))


def assert_right(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], plain: tuple[Tensor, ...], names: Any) -> None:
    """Outputs and gradients within the budget of eager's own error."""
    for actual, wanted, other in zip(found[:2], exact[:2], plain[:2], strict=True):
        assert_within_budget(actual, wanted.double(), other)
    if len(found) > 2:
        grads, true, rounded = (dict(zip(names, each[2:], strict=True)) for each in (found, exact, plain))
        wide = {name: None if g is None else g.double() for name, g in true.items()}
        assert_gradients_within_budget(grads, wide, rounded)


def _allocated_by(run: Callable[[], Any], peak: bool) -> int:
    """Bytes of one call beside what was there: the most, or what it leaves beside its results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results}
    after: int = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated() - sum(own.values())
    return after - before


class PatientClock(DeviceClock):
    """A block with its backward takes the host tens of milliseconds to queue."""

    TRIES = 10


def _pairs(case: Case, place: Place) -> Contest:
    pair = build(case, place)
    inputs = draw(case, pair, place)
    found = modules(case, pair, place)
    calls = {name: call_of(module, inputs, case.way) for name, module in found.items()}
    known: list[tuple[Tensor, ...]] = []
    cuda = place.device.type == "cuda"

    def check(name: str) -> None:
        if not known:
            known.extend([truth(pair, inputs, case.way), calls["eager"](0)])
        exact, plain = known
        assert_right(calls[name](0), exact, plain, ("image", "text", "temb", *inputs.parameters))

    def info(name: str) -> Row:
        known.clear()
        sizes = case.sizes(place)
        row: Row = {"op": "blocks", "form": case.form, "model": case.model, "pass": case.way, "batch": 1}
        row |= {"tokens": sizes.image + sizes.text, "channels": sizes.channels, "output_dtype": "bfloat16"}
        row |= {"source": "measured", "attention": ATTENTION}
        row["peak_bytes"] = _allocated_by(lambda: calls[name](0), peak=True) if cuda else None
        keeps = cuda and case.way == BOTH
        row["saved_bytes"] = _allocated_by(lambda: found[name](*inputs.leaves), peak=False) if keeps else None
        return row

    clock: Clock = PatientClock(1) if cuda else place.clock(1)
    return Contest(calls, check, info, clock, may_fail=(COMPILED,))
