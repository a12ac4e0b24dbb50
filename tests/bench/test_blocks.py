"""The counts of bench.blocks on tiny HunyuanVideo blocks."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from bench.blocks.configurations import CONFIGURATIONS, Sizes
from bench.blocks.count import count, stored_bytes
from dancegrpo_fast.ops import gated_residual, gelu_linear, gelu_tanh, norm_modulate, qk_norm_rope

TINY = Sizes(
    2,
    16,
    60,
    7,
    frame=12,
    extra={
        "in_channels": 4,
        "out_channels": 4,
        "text_embed_dim": 12,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    },
)
BLOCKS = [replace(c, sizes=TINY) for c in CONFIGURATIONS if c.model.startswith("HunyuanVideo")]
IDS = [f"{c.model} {c.block}" for c in BLOCKS]
ALL, RELEASE = list(zip(BLOCKS, IDS, strict=True)), pytest.mark.release


def _small(*tensors):
    return sum(stored_bytes(t) for t in tensors if t is not None)


def _rows(parameters, wanted):
    """What a backward reads of parameters, and writes as their gradients."""
    return _small(*parameters) + _small(*(p for p, keep in zip(parameters, wanted, strict=True) if keep))


def _norm_modulate(x, y, gate, *rest):
    cost = norm_modulate.cost(*x.shape, x.element_size(), gated=y is not None)
    return cost.bytes_forward + _small(gate, *rest[:4])


def _norm_modulate_backward(grad_h, grads, h, mean, rstd, y, gate, *rest):
    assert grad_h is not None
    cost = norm_modulate.cost(
        *h.shape, h.element_size(), gated=gate is not None, consumers=len(grads), modulation_grads=y is not None
    )
    bias = h.shape[-1] * h.element_size() if rest[-2][7] else 0
    return cost.bytes_backward + _rows((gate, *rest[:4]), rest[-2][2:7]) + bias


def _streams(arguments):
    query, _, *parameters = arguments[:6]
    query2, _, *more = arguments[6:12]
    tokens = query.shape[1] + (0 if query2 is None else query2.shape[1])
    cost = qk_norm_rope.cost(query.shape[0], tokens, *query.shape[2:], query.element_size())
    return cost, [*parameters[:2], *more[:2]], [*parameters[2:], *more[2:]]


def _qk_norm_rope(*arguments):
    cost, weights, tables = _streams(arguments)
    return cost.bytes_forward + _small(*weights, *tables)


def _qk_norm_rope_backward(grad_query, grad_key, rstd, rstd2, *arguments):
    cost, weights, tables = _streams(arguments)
    # Of both streams; queries and keys come before their weights.
    wanted = [arguments[-2][6 * i + j] for i in range(len(weights) // 2) for j in (2, 3)]
    query = arguments[0]
    biases = sum(arguments[-2][6 * i + j] for i in range(len(weights) // 2) for j in (4, 5))
    biases *= query.shape[2:].numel() * query.element_size()
    return cost.bytes_backward + _rows(weights, wanted) + _small(*tables) + biases


def _gelu_tanh(x, prefix, *rest):
    width = 0 if prefix is None else prefix.shape[-1]
    return gelu_tanh.cost(x.numel() // x.shape[-1], x.shape[-1], x.element_size(), prefix=width).bytes_forward


def _gelu_tanh_backward(grad, x, *rest):
    return gelu_tanh.cost(x.numel() // x.shape[-1], x.shape[-1], x.element_size()).bytes_backward


def _gated_residual(x, y, gate, *rest):
    return gated_residual.cost(*x.shape, x.element_size()).bytes_forward + _small(gate)


def _gated_residual_backward(grad, y, gate, *rest):
    cost = gated_residual.cost(*grad.shape, grad.element_size(), gate_grad=y is not None)
    return cost.bytes_backward + _rows((gate,), rest[2][1:2]) + (_small(grad[0, 0]) if rest[2][2] else 0)


def _gelu_tanh_gradients(grad, x, prefix, bias, mode, *_):
    width = 0 if prefix is None else prefix.shape[-1]
    formula = gelu_linear.cost(
        x.numel() // x.shape[-1], x.shape[-1], x.element_size(), prefix=width, h_bias=bias, mode=mode
    )
    return formula.bytes_backward


EXPECTED = {
    "gelu_tanh_gradients": _gelu_tanh_gradients,
    "norm_modulate": _norm_modulate,
    "norm_modulate_backward": _norm_modulate_backward,
    "qk_norm_rope": _qk_norm_rope,
    "qk_norm_rope_backward": _qk_norm_rope_backward,
    "gelu_tanh": _gelu_tanh,
    "gelu_tanh_backward": _gelu_tanh_backward,
    "gated_residual": _gated_residual,
    "gated_residual_backward": _gated_residual_backward,
}


@pytest.mark.parametrize("block", [pytest.param(b, id=i, marks=RELEASE if "replace" in i else ()) for b, i in ALL])
def test_each_op_moves_what_its_cost_says(block):
    seen = set()

    def observe(name, moved, arguments):
        space, _, op = name.partition(".")
        if space == "dgf":
            # Formulas leave parameters and rotary tables out; they are added here.
            assert moved == EXPECTED[op](*arguments), op
            seen.add(op)

    with FakeTensorMode():
        for frozen in (False, True):
            count(block, "all", frozen, observer=observe)
    assert seen == set(EXPECTED)


OTHERS = [pytest.param(1, frozen, id="frozen" if frozen else "single", marks=RELEASE) for frozen in (False, True)]


@pytest.mark.parametrize(("block", "frozen"), [pytest.param(0, False, id="double"), *OTHERS])
def test_patched_moves_and_saves_less_than_eager(block, frozen):
    with FakeTensorMode():
        eager = count(BLOCKS[block], frozen=frozen)
        patched = {recompute: count(BLOCKS[block], recompute, frozen) for recompute in ("none", "gelu", "all")}
    for counts in patched.values():
        assert counts.forward.bytes < eager.forward.bytes / 3
        assert counts.backward.bytes < eager.backward.bytes / 2
        assert counts.forward.launches < eager.forward.launches
        assert counts.backward.launches < eager.backward.launches
    saved = [patched[recompute].saved for recompute in ("all", "gelu", "none")]
    assert saved == sorted(saved) and saved[-1] < eager.saved
    assert frozen or len(set(saved)) == 3


def test_lora_is_counted_operator_by_operator():
    """What `lora_linear` saves and moves of a double block, beside peft's layers and a block without LoRA."""
    pytest.importorskip("peft")
    block = BLOCKS[IDS.index("HunyuanVideo double")]
    with FakeTensorMode():
        peft, base = count(block, lora=4), count(block, "gelu", frozen=True)
        ours = {mode: count(block, "gelu", mode=mode, lora=4) for mode in ("lossless", "fast")}
    assert ours["fast"].forward.bytes < ours["lossless"].forward.bytes < peft.forward.bytes / 2
    assert ours["fast"].backward.bytes < ours["lossless"].backward.bytes < peft.backward.bytes
    assert base.saved < ours["fast"].saved < ours["lossless"].saved < peft.saved / 2
    # An update is added by a product; what is left are casts of A and B, and sums of x's gradients of several layers.
    added = set(ours["fast"].forward.traffic) - set(base.forward.traffic)
    assert added <= {"aten.to", "aten._to_copy"}
    assert ours["fast"].forward.products < peft.forward.products


def test_saved_bytes_are_those_of_the_tensors_a_double_block_keeps():
    block = BLOCKS[IDS.index("HunyuanVideo double")]
    with FakeTensorMode():
        kept = count(block, "all").kept
    rows = [shape for shape, dtype in kept if dtype == torch.bfloat16 and TINY.image in shape]
    numbers = sum(torch.Size(shape).numel() for shape in rows) / (TINY.image * TINY.channels)
    # Of the image: queries and keys before the norm, what each of two gates multiplies, the residual, 4 C before GELU.
    assert numbers == 2 + 2 + 1 + 4


@pytest.mark.release
def test_compiled_saves_and_moves_between():
    pytest.importorskip("triton")
    from bench.blocks.compiled import count_compiled

    block = BLOCKS[IDS.index("HunyuanVideo single")]
    with FakeTensorMode():
        eager, compiled = count(block), count_compiled(block)
        patched = count(block, "all")
    assert patched.saved < compiled.saved < eager.saved
    assert 0 < compiled.forward.bytes < eager.forward.bytes / 3
    assert 0 < compiled.backward.bytes < eager.backward.bytes / 2
    assert compiled.backward.launches < eager.backward.launches


def test_an_expanded_tensor_is_what_it_stores():
    assert stored_bytes(torch.empty(3, 1).expand(3, 1000)) == 12
    assert stored_bytes(torch.empty(4, 10)[:, :5]) == 80
    assert all(stored_bytes(t) == 0 for t in tree_leaves([torch.empty(0), torch.empty(0, 5)]))
