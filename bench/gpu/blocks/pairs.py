"""A double-stream block and a single-stream block in a row, as diffusers has them and patched."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import dancegrpo_fast as dgf
from tests.patch.models import assert_gradients_within_budget
from tests.tolerances import assert_within_budget

from ...blocks.configurations import CONFIGURATIONS, Setup, Sizes
from .ops import FLUX, HUNYUAN, PASSES, tables

ATTENTION = "diffusers' native backend (scaled_dot_product_attention), no mask"
# Key of a call that gives outputs with their graph.
GRAPH = "outputs with their graph"
# Settings of `accelerate`, None for diffusers' own blocks, and whether they are compiled.
CONTENDERS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "eager": (None, False),
    "compile": (None, True),
    "patched, lossless": ({"mode": "lossless"}, False),
    "patched, fast": ({"mode": "fast"}, False),
    "patched, fast, recompute all": ({"mode": "fast", "recompute": "all"}, False),
    "patched, fast, compile": ({"mode": "fast"}, True),
}
COMPILED = "patched and compiled"
# Compiling takes longer than anything else, so each case compiles once.
FORMS = {
    "double, single": tuple(name for name in CONTENDERS if name != "patched, fast, compile"),
    COMPILED: ("eager", "patched, fast", "patched, fast, compile"),
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
class PairCase:
    """The pair of one model."""

    model: str
    form: str
    sizes: Sizes
    seconds: float
    op: str = field(default="blocks", init=False)

    @property
    def tokens(self) -> int:
        """Of image and text."""
        return self.sizes.image + self.sizes.text

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.op}, {self.form}, {self.model}"

    def build(self, device: torch.device) -> Pair:
        """Random weights."""
        found = []
        with torch.device(device):
            for block in ("double", "single"):
                (configuration,) = (c for c in CONFIGURATIONS if (c.model, c.block) == (self.model, block))
                found.append(replace(configuration, sizes=self.sizes).make())
        generator = torch.Generator(device).manual_seed(0)
        for setup in found:
            with torch.no_grad():
                for name, value in setup.model.named_parameters():
                    around = 1.0 if value.ndim == 1 and name.endswith(("norm_q.weight", "norm_k.weight")) else 0.0
                    value.normal_(around, 0.02, generator=generator)
        flux = self.model == FLUX
        rotary = tables(self.tokens if flux else self.sizes.image, self.sizes.head_dim, device)
        double, single = found
        return Pair(double, single, rotary, flux)


def cases(dry: bool) -> list[PairCase]:
    """HunyuanVideo's and FLUX's; compiled patches last."""
    real = {c.model: c.sizes for c in CONFIGURATIONS}
    return [
        PairCase(
            *(model, form, replace(TINY, extra=_TINY_MODELS[model]) if dry else real[model], 0.0 if dry else seconds)
        )
        for form in FORMS
        for model, seconds in ((HUNYUAN, 40.0), (FLUX, 30.0))
    ]


@dataclass(frozen=True)
class Inputs:
    """Leaves, gradients of the two outputs, and everything whose gradient is wanted."""

    leaves: list[Tensor]
    grads: list[Tensor]
    parameters: dict[str, Tensor]


def draw(case: PairCase, pair: Pair, device: torch.device) -> Inputs:
    """Random tokens."""
    generator = torch.Generator(device).manual_seed(1)
    rows = [(1, n, case.sizes.channels) for n in (case.sizes.image, case.sizes.text)]
    shapes = [*rows, (1, case.sizes.channels), *rows]
    drawn = [torch.randn(s, generator=generator, device=device, dtype=torch.bfloat16) for s in shapes]
    parameters = {f"{i}.{name}": p for i, block in enumerate(pair.blocks) for name, p in block.named_parameters()}
    return Inputs([t.requires_grad_() for t in drawn[:3]], drawn[3:], parameters)


Run = Callable[[int], tuple[Tensor, ...]]


def passes(pair: Any, inputs: Inputs) -> dict[str, Run]:
    """Pass -> call; the second one also gives gradients of tokens, conditioning and all weights. And `GRAPH`."""

    def forward(i: int) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found: tuple[Tensor, ...] = pair(*inputs.leaves)
            return found

    def both(i: int) -> tuple[Tensor, ...]:
        outputs = pair(*inputs.leaves)
        found = torch.autograd.grad(outputs, [*inputs.leaves, *inputs.parameters.values()], inputs.grads)
        return *(out.detach() for out in outputs), *found

    return {PASSES[0]: forward, PASSES[1]: both, GRAPH: lambda i: pair(*inputs.leaves)}


def contenders(case: PairCase, pair: Pair, inputs: Inputs, backend: str, compiler: str) -> dict[str, dict[str, Run]]:
    """Name -> pass -> call, all with the same weights."""
    found = {}
    for name in FORMS[case.form]:
        settings, is_compiled = CONTENDERS[name]
        module: Any = pair.twin()
        if settings is not None:
            for model in module.models:
                dgf.accelerate(model, trim_text=False, backend=backend, **settings)
        if is_compiled:
            module = torch.compile(module, dynamic=False, backend=compiler)
        found[name] = passes(module, inputs)
    return found


def _named(results: tuple[Tensor, ...], inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor | None]]:
    """Outputs, and gradients where the pass has them."""
    names = ("image", "text", "temb", *inputs.parameters)
    return results[:2], dict(zip(names, results[2:], strict=True)) if len(results) > 2 else {}


def truth(pair: Pair, inputs: Inputs) -> tuple[Tensor, ...]:
    """Eager in float32, as float64 has no fused attention: its error is far below a rounding of bfloat16."""
    wide = copy.deepcopy(pair).float()
    names = {f"{i}.{name}": p for i, block in enumerate(wide.blocks) for name, p in block.named_parameters()}
    leaves = [t.detach().float().requires_grad_() for t in inputs.leaves]
    results = passes(wide, Inputs(leaves, [g.float() for g in inputs.grads], names))[PASSES[1]](0)
    return tuple(t.detach() for t in results)


def failure(run: dict[str, Run], exact: tuple[Tensor, ...], plain: tuple[Tensor, ...], inputs: Inputs) -> str | None:
    """Where outputs of either pass or gradients are not within the budget of eager's own error."""
    for what in PASSES:
        outputs, grads = _named(run[what](0), inputs)
        (true, true_grads), (rounded, rounded_grads) = (_named(each, inputs) for each in (exact, plain))
        try:
            for actual, wanted, other in zip(outputs, true, rounded, strict=True):
                assert_within_budget(actual, wanted.double(), other)
            if grads:
                wide = {name: None if g is None else g.double() for name, g in true_grads.items()}
                assert_gradients_within_budget(grads, wide, rounded_grads)
        except AssertionError as error:
            return f"{what}: {error}"
    return None


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """The most memory that one call allocates beside what was there, results and gradients included."""
    if device.type != "cuda":
        run(0)
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(0)
    torch.cuda.synchronize()
    del results
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(run: Run, device: torch.device) -> int | None:
    """What `GRAPH` holds for the backward beside its outputs."""
    if device.type != "cuda":
        run(0)
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    outputs = run(0)
    torch.cuda.synchronize()
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in outputs}
    return torch.cuda.memory_allocated() - before - sum(own.values())
