"""Who has to see an operator does; a call that nobody watches gives the same bits without torch's dispatcher."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from dancegrpo_fast import policy_loss, transition_log_prob, transition_step
from dancegrpo_fast.ops import _library, _quick
from dancegrpo_fast.ops.gated_residual import gated_residual
from dancegrpo_fast.ops.norm_modulate import norm_modulate
from dancegrpo_fast.transitions import dance_sde, mixed, shifted_sigmas

from .cases import BF16, F16, F32, bits

SIGMAS = shifted_sigmas(8, 3.0)
TABLE = dance_sde(SIGMAS, 0.3)


class Seen(TorchDispatchMode):
    """Keeps the names of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dgf":
            self.names.append(func._schema.name.removeprefix("dgf::"))
        return func(*args, **(kwargs or {}))


def tensors(shape: tuple[int, ...] = (2, 3, 5), dtype: torch.dtype = F32, count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def stepped(x: Tensor, v: Tensor, noise: Tensor) -> Tensor:
    return transition_step(x, v, TABLE, 2, noise=noise).latents


def test_a_dispatch_mode_sees_every_operator() -> None:
    x, v, noise, _, _ = tensors()
    leaf = v.clone().requires_grad_()
    with Seen() as seen:
        after, old, _ = transition_step(x, v, TABLE, 2, noise=noise)
        transition_log_prob(x, v, after, TABLE, 2)
        policy_loss(x, leaf, after, TABLE, 2, old, torch.ones(2)).loss.backward()
        norm_modulate(x)
    assert seen.names == [
        "transition_step",
        "transition_log_prob",
        "policy_loss",
        "policy_loss_backward",
        "norm_modulate",
    ]


def test_flop_counters_and_profilers_see_them() -> None:
    x = torch.randn(2, 8, 16)
    with FlopCounterMode(display=False) as counter:
        norm_modulate(x)
    assert counter.get_total_flops() > 0
    with torch.profiler.profile() as profile:
        stepped(*tensors()[:3])
        norm_modulate(x)
    assert {"dgf::transition_step", "dgf::norm_modulate"} <= {event.name for event in profile.events()}


def test_checkpoint_policies_see_them() -> None:
    seen = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.append(op)
        return CheckpointPolicy.MUST_SAVE

    x = torch.randn(2, 8, 16, requires_grad=True)
    out = checkpoint(
        norm_modulate, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    out.sum().backward()
    assert torch.ops.dgf.norm_modulate.default in seen


def test_fake_tensors_meta_tensors_and_subclasses_go_through_the_operator() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, v, noise = (mode.from_tensor(t) for t in tensors()[:3])
        assert stepped(x, v, noise).shape == x.shape
    assert norm_modulate(torch.empty(2, 8, 16, device="meta")).is_meta

    class Own(Tensor):
        pass

    own = torch.randn(2, 8, 16).as_subclass(Own)
    assert _library.watched([None, 3, own]) and not _library.watched([None, 3, torch.zeros(1), [torch.zeros(1)]])
    assert _library.watched([[own]])


def test_function_modes_transforms_and_tangents_watch() -> None:
    assert not _library.modes_watch()
    with TorchFunctionMode():
        assert _library.modes_watch()
    found = []
    torch.func.vmap(lambda x: found.append(_library.modes_watch()) or x)(torch.zeros(2))
    with torch.autograd.forward_ad.dual_level():
        found.append(_library.modes_watch())
    assert found == [True] * len(found) and len(found) == 2


@contextmanager
def by_the_general_path() -> Iterator[None]:
    with Seen():
        yield


def calls(dtype: torch.dtype, guided: bool, step: Any) -> dict[str, Callable[[], list[Tensor]]]:
    x, v, noise, uncond, reference = tensors(dtype=dtype)
    guidance: dict[str, Any] = {"uncond_output": uncond, "guidance_scale": 4.5} if guided else {}
    after, old, _ = transition_step(x, v, TABLE, step, noise=noise, **guidance)
    old, advantages = old + 0.01, torch.tensor([1.5, -7.0])

    def loss(**more: Any) -> list[Tensor]:
        leaf = v.clone().requires_grad_()
        other = {**guidance, "uncond_output": uncond.clone().requires_grad_()} if guided else {}
        found = policy_loss(x, leaf, after, TABLE, step, old, advantages, **other, **more)
        found.loss.backward()
        with torch.no_grad():
            again = policy_loss(x, leaf, after, TABLE, step, old, advantages, **other, **more)
        assert bits(found.loss.detach()) == bits(again.loss)
        grads = [leaf.grad] if not guided else [leaf.grad, other["uncond_output"].grad]
        return [found.loss.detach(), found.log_prob, found.ratio, found.has_grad, *found.metrics, *grads]

    return {
        "step": lambda: list(transition_step(x, v, TABLE, step, noise=noise, **guidance)[:2]),
        "seed": lambda: list(transition_step(x, v, TABLE, step, seed=5, **guidance)[:2]),
        "log_prob": lambda: [transition_log_prob(x, v, after, TABLE, step, **guidance)],
        "loss": loss,
        "loss, weighed, clip-higher": lambda: loss(weight=0.125, clip_range=(0.1, 0.2), advantage_clip=2.0),
        "loss with a KL": lambda: loss(reference_output=reference, kl_weight=0.3),
    }


@pytest.mark.pairs
@pytest.mark.parametrize("step", [2, torch.tensor([2, 4])], ids=["one step", "steps"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("name", calls(F32, False, 2))
def test_quick_calls_have_the_bits_of_the_general_path(name: str, dtype: torch.dtype, guided: bool, step: Any) -> None:
    call = calls(dtype, guided, step)[name]
    quick = call()
    with by_the_general_path():
        wanted = call()
    assert list(map(bits, quick)) == list(map(bits, wanted))


def test_what_the_quick_path_leaves_to_the_general_one() -> None:
    x, v, noise, _, _ = tensors()
    ode = mixed(TABLE, dance_sde(SIGMAS, 0.0), [1, 2])
    given = (x, v, TABLE, 2, noise, None, None, None, "exact", "auto")

    def left(**changed: Any) -> bool:
        fixed = ("latents", "model_output", "table", "step", "noise", "seed", "uncond_output", "guidance_scale")
        names = *fixed, "rounding", "backend"
        return _quick.transition_step(**dict(zip(names, given, strict=True)) | changed) is None

    assert not left()
    assert left(latents=x.double()) and left(model_output=v.transpose(1, 2)) and left(step=True) and left(step=8)
    assert left(seed=3) and left(noise=None) and left(noise=torch.Generator()) and left(guidance_scale=1.0)
    assert left(model_output=v.clone().requires_grad_()) and left(backend="reference") and left(rounding="reference")
    scored = (x, v, x, ode, 0, torch.zeros(2), torch.ones(2), 0.1, 5.0, None, None, None, 0.0, 1.0, "exact", "auto")
    assert _quick.policy_loss(*scored) is None and _quick.policy_loss(*scored[:4], 1, *scored[5:]) is not None


def test_lazy_negations_and_zeros_are_written_out_first() -> None:
    """torch's dispatcher does so; addresses know nothing of them."""
    x, v, noise, _, _ = tensors()
    wanted = transition_step(x, -v, TABLE, 2, noise=noise)
    lazy = torch.complex(noise, v).conj().imag
    assert lazy.is_neg() and not lazy.is_contiguous()
    for output in (torch._neg_view(v), lazy):
        found = transition_step(x, output, TABLE, 2, noise=noise)
        assert bits(found.latents) == bits(wanted.latents)
        for scored in (transition_log_prob, lambda *given: policy_loss(*given, wanted.log_prob, torch.ones(2)).loss):
            assert scored(x, output, wanted.latents, TABLE, 2).equal(scored(x, -v, wanted.latents, TABLE, 2))
    zeros = torch._efficientzerotensor(v.shape)
    found = transition_step(x, zeros, TABLE, 2, noise=noise)
    assert bits(found.latents) == bits(transition_step(x, torch.zeros_like(v), TABLE, 2, noise=noise).latents)


def test_tensors_that_outlive_a_transform_are_unwrapped_first() -> None:
    x, v, noise, _, _ = tensors()
    kept: list[torch.Tensor] = []
    torch.func.grad(lambda output: (kept.append(output.detach()), output.sum())[1])(v)
    [output] = kept
    assert torch._C._functorch.is_dead_tensor_wrapper(output)
    gate = torch.randn(v.shape[0], v.shape[-1], requires_grad=True)
    found = []
    for given in (output, v):
        after, log_prob, _ = transition_step(x, given, TABLE, 2, noise=noise)
        scored = transition_log_prob(x, given, after, TABLE, 2)
        loss = policy_loss(x, given, after, TABLE, 2, log_prob, torch.ones(len(x))).loss
        out = gated_residual(given.flatten(1, -2), given.flatten(1, -2), gate)
        found.append([after, log_prob, scored, loss, out, *torch.autograd.grad(out.sum(), gate)])
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


def test_autograd_is_asked_below_its_python_part_where_nothing_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, original = [], torch.autograd.Function.apply.__func__
    public = classmethod(lambda cls, *arguments: asked.append(cls.__name__) or original(cls, *arguments))
    monkeypatch.setattr(torch.autograd.Function, "apply", public)
    x = torch.randn(2, 8, 16, requires_grad=True)
    quick = norm_modulate(x)
    assert asked == []
    with Seen():
        watched = norm_modulate(x)
    assert asked == ["_NormModulate"] and torch.equal(quick, watched)
    assert quick.grad_fn.name() == watched.grad_fn.name() == "_NormModulateBackward"


def test_tangents_go_to_autograd_which_refuses_them() -> None:
    x = torch.randn(2, 8, 16)
    assert not _library.needs_graph(x, None)
    with torch.autograd.forward_ad.dual_level():
        assert _library.needs_graph(x, None)


def test_sparse_tensors_are_refused_by_name() -> None:
    x, v, noise, _, _ = tensors((2, 8))
    with pytest.raises(ValueError, match=r"^model_output: got torch.float32 \(torch.sparse_coo\)"):
        transition_step(x, v.to_sparse(), TABLE, 2, noise=noise)


def test_checks_are_made_again_for_what_only_looks_equal() -> None:
    x, y, gate = torch.randn(2, 8, 16), torch.randn(2, 8, 16), torch.randn(2, 16)
    norm_modulate(x, eps=1.0)
    with pytest.raises(ValueError, match="eps: got True"):
        norm_modulate(x, eps=True)
    gated_residual(x, y, gate, split=None)
    with pytest.raises(ValueError, match="gate: got shape"):
        gated_residual(x, y, gate[:, :8])
    with pytest.raises(ValueError, match="y: got"):
        gated_residual(x, y.to("meta"), gate)
