"""Batches and samples of more than 2^31 elements: real outputs, inputs that repeat through strides of 0."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dancegrpo_fast import policy_loss, transition_log_prob, transition_step

from ..ops.cases import BF16, TABLES, bits
from . import test_block_ops as blocks
from .targets import Target, on_every_target

WIDTH = 4096
ROWS = {"cpu": 5, "cuda": 2**31 // WIDTH + 1000}
TABLE = TABLES["flow"]


def room_for_outputs(target: Target) -> None:
    if target.device == "cuda" and torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("less than 24 GiB of GPU memory are free")


def drawn(target: Target, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(BF16).to(target.device)


def rows_equal(value: Tensor, row: Tensor) -> bool:
    """Whether all rows of [rows, WIDTH] are the same, without a mask of the whole tensor."""
    return all(torch.equal(part, row.expand_as(part)) for part in value.split(1 << 16))


@on_every_target
def test_one_huge_sample(target: Target) -> None:
    """Every row of the sample has the same inputs, and so the same outputs."""
    room_for_outputs(target)
    rows = ROWS[target.device]
    x, v, noise = (drawn(target, 3, 1, 1, WIDTH)[i].expand(1, rows, WIDTH) for i in range(3))
    stepped = transition_step(x, v, TABLE, 1, noise=noise, backend=target.backend)
    small = transition_step(x[:, :1], v[:, :1], TABLE, 1, noise=noise[:, :1], backend=target.backend)
    assert stepped.latents.numel() == rows * WIDTH
    assert rows_equal(stepped.latents[0], small.latents[0])
    # The mean over all rows is that over one, up to the roundings of a float32.
    assert torch.allclose(stepped.log_prob, small.log_prob)
    again = transition_log_prob(x, v, stepped.latents, TABLE, 1, backend=target.backend)
    assert bits(again.cpu()) == bits(stepped.log_prob.cpu())


@on_every_target
def test_the_gradient_of_a_huge_sample(target: Target) -> None:
    room_for_outputs(target)
    rows = ROWS[target.device]
    x, v, x_next = (drawn(target, 3, 1, 1, WIDTH)[i].expand(1, rows, WIDTH) for i in range(3))
    leaf = v.detach().requires_grad_()
    old = transition_log_prob(x, v, x_next, TABLE, 1, backend=target.backend)
    result = policy_loss(x, leaf, x_next, TABLE, 1, old, torch.ones_like(old), backend=target.backend)
    (grad,) = torch.autograd.grad(result.loss, leaf, torch.full_like(result.loss, float(rows)))
    assert bool((result.ratio == 1.0).all()) and bool(grad[0, -1].any())
    assert rows_equal(grad[0], grad[0, :1])


@on_every_target
def test_a_huge_batch_of_small_samples(target: Target) -> None:
    """The last samples, beyond 2^31 elements, are the ones that a batch of them alone gives."""
    room_for_outputs(target)
    batch = ROWS[target.device]
    x, v = (drawn(target, 2, 1, WIDTH)[i].expand(batch, WIDTH) for i in range(2))
    ids = torch.arange(batch, device=target.device)
    stepped = transition_step(x, v, TABLE, 1, seed=3, sample_ids=ids, backend=target.backend)
    for part in (slice(0, 2), slice(batch - 3, batch)):
        few = transition_step(x[part], v[part], TABLE, 1, seed=3, sample_ids=ids[part], backend=target.backend)
        assert bits(few.latents.cpu()) == bits(stepped.latents[part].cpu())
        assert bits(few.log_prob.cpu()) == bits(stepped.log_prob[part].cpu())
    assert bool(stepped.log_prob.isfinite().all())


@on_every_target
def test_many_tiny_samples(target: Target) -> None:
    """More samples than a grid's second or third dimension could count."""
    batch = 70_001 if target.backend != "triton" or target.device != "cpu" else 5
    x, v = drawn(target, batch, 3), drawn(target, batch, 3).neg()
    stepped = transition_step(x, v, TABLE, 1, seed=3, backend=target.backend)
    old = transition_log_prob(x, v, stepped.latents, TABLE, 1, backend=target.backend)
    assert bits(old.cpu()) == bits(stepped.log_prob.cpu())
    result = policy_loss(x, v, stepped.latents, TABLE, 1, old, torch.ones_like(old), backend=target.backend)
    assert bool((result.ratio == 1.0).all()) and int(result.metrics.samples) == batch


class TestMoreThan32Bits:
    """Tensors of more than 2^31 elements: real outputs, inputs that repeat one token through strides of 0."""

    HEADS = (32, 128)

    def tokens(self, target: Target) -> int:
        return 2**31 // WIDTH + 1000 if target.device == "cuda" else 7

    def check(self, target: Target, op: blocks.Op, small: blocks.Op, rows: int) -> None:
        """Every token's results are those of the token alone."""
        room_for_outputs(target)
        leaves, outputs = blocks.forward(op, "fast", target.backend)
        few, wanted = blocks.forward(small, "fast", target.backend)
        ones = [torch.ones_like(w) for w in wanted]
        grads = [g.expand_as(o) for g, o in zip(ones, outputs, strict=True)]
        for value, token in zip(outputs, wanted, strict=True):
            self.assert_repeats(value.detach(), token.detach(), rows)
        found = torch.autograd.grad(outputs, leaves, grads)
        for value, token in zip(found, torch.autograd.grad(wanted, few, ones), strict=True):
            self.assert_repeats(value, token, rows)

    def assert_repeats(self, value: Tensor, token: Tensor, rows: int) -> None:
        if value.shape == token.shape:
            # A sum over all tokens, which are the same.
            torch.testing.assert_close(value, (token.double() * rows).to(value.dtype))
            return
        parts = value[0].flatten(1).split(1 << 16)
        assert all(torch.equal(part, token[0].flatten(1).expand_as(part)) for part in parts)

    @blocks.on_every_target
    @pytest.mark.parametrize("name", ["norm", "gated norm", "gate", "gelu"])
    def test_tokens(self, target: Target, name: str) -> None:
        rows, shape = self.tokens(target), (1, 1, WIDTH)
        small = (
            blocks.norm(blocks.Draw((BF16, BF16), 0), shape).on(target)
            if name == "norm"
            else blocks.make(name, target, shape=shape)
        )
        wide = tuple(t.expand(1, rows, WIDTH) if t.ndim == 3 else t for t in small.tensors)
        self.check(target, replace(small, tensors=wide), small, rows)

    @blocks.on_every_target
    @pytest.mark.parametrize("norm", ["head_twice", "token"])
    def test_queries_and_keys(self, target: Target, norm: str) -> None:
        """Not turned, as no two tokens are turned alike."""
        rows, settings = self.tokens(target), {"streams": 1, "turned": False, "heads": self.HEADS}
        small = blocks.rope(blocks.Draw((BF16, BF16), 0), (1, 1, 1), norm=norm, **settings).on(target)
        wide = tuple(t.expand(1, rows, *self.HEADS) if t.ndim == 4 else t for t in small.tensors)
        self.check(target, replace(small, tensors=wide), small, rows)
