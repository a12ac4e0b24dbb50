"""Self checks of "lossless" block ops, with a difference planted where Triton's kernels would be launched."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dancegrpo_fast.ops import selfcheck
from dancegrpo_fast.ops.gated_residual import gated_residual
from dancegrpo_fast.ops.norm_modulate import gated_residual_norm_modulate, norm_modulate

from .block_cases import CALLS, Recorder, call_of, draw
from .cases import BF16, F16, F32
from .planted import in_place_of_triton, off_by

B, S, C = 3, 130, 32
OPS = [name for name in CALLS if name != "gelu"]
pytestmark = pytest.mark.usefixtures("nothing_known", "failures_are_errors")


def residual(dtype: torch.dtype = F32, backend: str = "auto") -> tuple[Callable[..., Tensor], list[Tensor]]:
    tensors = [draw(B, S, C, dtype=dtype, seed=i) for i in (0, 1)] + [draw(B, C, dtype=dtype, seed=2)]
    return lambda x, y, gate: gated_residual(x, y, gate, mode="lossless", backend=backend), tensors


def five() -> list[Tensor]:
    return [draw(B, S, C, dtype=F32, seed=i) for i in (0, 1)] + [draw(B, C, dtype=F32, seed=i) for i in (2, 3, 4)]


def gated_norm(backend: str) -> list[Tensor]:
    tensors = five()
    h, out = gated_residual_norm_modulate(*tensors, mode="lossless", backend=backend)
    return [h.detach(), out.detach(), *torch.autograd.grad((h.square() + out.square()).sum(), tensors)]


def gradients(call: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    outputs = call(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = torch.autograd.grad(sum(o.float().square().sum() for o in outputs), tensors, allow_unused=True)
    return [*(o.detach() for o in outputs), *(g for g in found if g is not None)]


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert [torch.equal(*pair) for pair in zip(found, wanted, strict=True)] == [True] * len(wanted)


class TestWhatIsCompared:
    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    @pytest.mark.parametrize("name", OPS)
    def test_the_reference_equals_itself(self, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """Slices of every op's arguments, both ways; each signature once."""
        made = in_place_of_triton(monkeypatch)
        call, tensors = call_of(name, dtype, "lossless")
        for _ in range(2):
            gradients(call, tensors)
        found = selfcheck.records()
        assert {check.direction for check in found} == {"forward", "backward"}
        assert len(found) == len({(c.op, c.direction, c.signature, c.budget) for c in found}) <= 3
        assert all(c.passed and c.equal and c.max_abs_difference == 0 and c.device == "cpu" for c in found)
        launches = sum(sum(module.launches.values()) for module in made.values())
        assert launches == 2 * 2 + len(found)

    @pytest.mark.parametrize(
        ("op", "direction", "place", "call"),
        [
            ("gated_residual", "forward", 0, "gated"),
            ("gated_residual", "backward", 0, "gated"),
            ("gated_residual", "backward", 1, "gated"),
            ("norm_modulate", "forward", 0, "gated norm"),
            ("norm_modulate", "forward", 1, "gated norm in two parts"),
            *(("norm_modulate", "backward", place, "gated norm") for place in range(5)),
            *(("norm_modulate", "backward", place, "affine norm") for place in (5, 6)),
            ("norm_modulate", "backward", 7, "gated norm in two parts"),
            ("qk_norm_rope", "forward", 0, "rope"),
            ("qk_norm_rope", "forward", 1, "rope over tokens"),
            ("qk_norm_rope", "backward", 6, "rope of diffusers' norm"),
            ("qk_norm_rope", "backward", 3, "rope"),
            ("qk_norm_rope", "forward", 0, "rope without norm"),
            ("qk_norm_rope", "backward", 0, "rope without norm"),
        ],
    )
    def test_a_difference_is_found_in_every_output(
        self, op: str, direction: str, place: int, call: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        in_place_of_triton(monkeypatch, off_by(0.5, op, direction, place))
        function, tensors = call_of(call, F32, "lossless")
        with pytest.warns(RuntimeWarning, match=f"{op} {direction} on cpu, .*differs from eager torch by up to 0.5"):
            gradients(function, tensors)
        failed = [check for check in selfcheck.records() if not check.passed]
        assert [(c.op, c.direction) for c in failed] == [(op, direction)]

    def test_one_warning_with_its_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        in_place_of_triton(monkeypatch, off_by(0.25, "gated_residual", "forward", 0))
        call, tensors = residual()
        with pytest.warns(RuntimeWarning) as warned:
            gradients(call, tensors)
        # Two samples, every third of 130 tokens: the first and the last number of the slice.
        text = f"by up to 0.25 in 2 of {2 * 44 * C} elements looked at, want equal bits"
        assert len(warned) == 1 and text in str(warned[0].message)
        forward, backward = selfcheck.records()
        assert (forward.equal, forward.budget, forward.passed) == (False, None, False)
        assert f"{forward.max_abs_difference:.3g}" == "0.25"
        assert backward.passed and backward.budget is not None
        # Other lengths and batches are the same signature.
        gradients(call, [tensors[0][:1, :7], tensors[1][:1, :7], tensors[2][:1]])
        assert len(selfcheck.records()) == 2

    def test_a_last_bit_passes_only_where_an_op_has_a_sum(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def last_bit(op: str, direction: str, place: int, output: Tensor) -> None:
            output.copy_(torch.nextafter(output, torch.tensor(9.0)) if output.dtype == F32 else output)

        in_place_of_triton(monkeypatch, last_bit)
        gradients(*call_of("norm", F32, "lossless"))
        assert [(c.equal, c.passed) for c in selfcheck.records()] == [(False, True)] * 2
        assert all(0 < c.max_abs_difference < c.budget for c in selfcheck.records())
        with pytest.warns(RuntimeWarning, match="want equal bits"):
            residual()[0](*residual()[1])

    def test_numbers_that_are_not_there_are_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        in_place_of_triton(monkeypatch, off_by(float("nan"), "norm_modulate", "forward", 1))
        with pytest.warns(RuntimeWarning, match="by up to inf in 2 of"):
            norm_modulate(*call_of("norm", F32, "lossless")[1], mode="lossless")

    def test_what_eager_torch_has_no_number_for_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        in_place_of_triton(monkeypatch)
        x, scale, shift = call_of("norm", F16, "lossless")[1]
        norm_modulate(x * float("nan"), scale, shift, mode="lossless")
        norm_modulate(x, scale * 6e4, shift, mode="lossless")
        assert all(c.passed for c in selfcheck.records())

    def test_zeros_say_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Advantages of 0 in the first update, say."""
        in_place_of_triton(monkeypatch)
        call, tensors = residual()
        out = call(*tensors)
        torch.autograd.grad(out, tensors, torch.zeros_like(out), retain_graph=True)
        assert [c.direction for c in selfcheck.records()] == ["forward"]
        torch.autograd.grad(out, tensors, torch.ones_like(out))
        assert [c.direction for c in selfcheck.records()] == ["forward", "backward"]

    def test_fast_mode_is_not_compared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = in_place_of_triton(monkeypatch)
        gradients(*call_of("gated norm", F32, "fast"))
        assert selfcheck.records() == [] and made["norm_modulate"].launches == {"forward": 1, "backward": 1}


class TestEagerTakesOver:
    @pytest.mark.parametrize("direction", ["forward", "backward"])
    @pytest.mark.parametrize("name", OPS)
    def test_from_the_failing_call_on(self, name: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def plant(op: str, when: str, place: int, output: Tensor) -> None:
            if when == direction:
                output += 1

        call, tensors = call_of(name, BF16, "lossless")
        build, options = CALLS[name]
        wanted = gradients(call, tensors)
        in_place_of_triton(monkeypatch, plant)
        checked, _ = build(BF16, mode="lossless", backend="checked", **options)
        with pytest.warns(RuntimeWarning, match="eager torch computes it from now on"):
            assert_equal(gradients(checked, tensors), wanted)
        assert_equal(gradients(checked, tensors), wanted)
        kept, _ = build(BF16, mode="lossless", backend="auto", **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = gradients(kept, tensors)
        with pytest.raises(AssertionError):
            assert_equal(found, wanted)

    @pytest.mark.parametrize("place", [0, 1])
    def test_what_is_computed_again_is_what_was(self, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """One kernel makes h and out; the backward makes out again without h, by the same choice."""
        wanted = gated_norm("reference")

        made = in_place_of_triton(monkeypatch, off_by(0.5, "norm_modulate", "forward", place))
        with pytest.warns(RuntimeWarning, match="norm_modulate forward"):
            assert_equal(gated_norm("checked"), wanted)
        # The other half goes on by Triton.
        before = made["norm_modulate"].launches["forward"]
        assert_equal(gated_norm("checked"), wanted)
        assert made["norm_modulate"].launches["forward"] - before == (1 if place == 0 else 0)

        _, out = gated_residual_norm_modulate(*five(), mode="lossless", backend="checked")
        again = out.grad_fn._forward_cls.recompute(out.grad_fn.saved_tensors, out.grad_fn.settings)[0]
        assert torch.equal(again, out)

    def test_a_verdict_is_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What passed once is computed by Triton for good, whatever it computes later."""
        in_place_of_triton(monkeypatch)
        call, tensors = residual(backend="checked")
        wanted = call(*tensors)
        in_place_of_triton(monkeypatch, off_by(0.5, "gated_residual", "forward", 0))
        assert not torch.equal(call(*tensors), wanted)

    def test_every_device_does_what_the_first_did(self, monkeypatch: pytest.MonkeyPatch) -> None:
        subject = selfcheck.Subject("op", "forward", *[lambda *t: t] * 4)
        monkeypatch.setattr(selfcheck, "_compared", lambda subject, triton, place, *rest: found[place[3].index])
        passed, failed = (selfcheck.Check("op", "forward", "", "", ok, 0.0, None, ok) for ok in (True, False))
        found = {0: passed, 1: failed}
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert selfcheck.trusted(subject, None, (1,), torch.device("cuda", 0), "checked")
        with pytest.warns(
            RuntimeWarning, match="failed here, but not where it came first; Triton computes it everywhere"
        ):
            assert selfcheck.trusted(subject, None, (1,), torch.device("cuda", 1), "checked")


class TestNothingNotices:
    @pytest.mark.parametrize("name", OPS)
    def test_modes_see_every_call_alike(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        in_place_of_triton(monkeypatch)
        call, tensors = call_of(name, F32, "lossless")
        seen, counted = [], []
        for _ in range(2):
            with Recorder() as recorder, FlopCounterMode(display=False) as counter:
                gradients(call, tensors)
            seen.append(recorder.names)
            counted.append(counter.get_total_flops())
        assert selfcheck.records() and seen[0] == seen[1] and counted[0] == counted[1] > 0

    def test_what_is_compared_sees_nothing_of_the_caller(self) -> None:
        """Wherever a check is called from, the contexts around it do not reach it."""
        seen: list[Any] = []

        class Functions(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(func)
                return func(*args, **(kwargs or {}))

        def kernel(triton: Any, value: Tensor) -> list[Tensor]:
            assert not torch.is_autocast_enabled("cpu")
            return [value * 1]

        identical = (lambda value: [value], lambda value: (value,), lambda value: (True,))
        subject = selfcheck.Subject("op", "forward", kernel, *identical)
        call = subject, None, (), torch.device("cpu"), torch.ones(1), "auto"
        with torch.autocast("cpu", torch.bfloat16), Recorder() as recorder, Functions():
            assert selfcheck.trusted(*call)
        assert recorder.calls == [] and len(selfcheck.records()) == 1
        assert not any(getattr(func, "__name__", "") in ("mul", "__mul__") for func in seen)

    def test_state_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        in_place_of_triton(monkeypatch)
        call, tensors = residual(BF16)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        for grad in (False, True):
            selfcheck.clear()
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
                out = call(*tensors)
                assert torch.is_autocast_enabled("cpu") and torch.is_grad_enabled() == grad
            assert len(selfcheck.records()) == 1 and out.requires_grad == grad
        with torch.inference_mode():
            selfcheck.clear()
            call(*(t.clone() for t in tensors))
        assert len(selfcheck.records()) == 1 and torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("early_stop", [False, True])
    def test_checkpoints_count_what_is_saved(self, early_stop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first call inside a checkpoint compares, the one that is computed again does not."""
        wanted = gradients(*call_of("gated norm", F32, "lossless"))
        in_place_of_triton(monkeypatch)
        call, tensors = call_of("gated norm", F32, "lossless")

        def again(*given: Tensor) -> Any:
            with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
                return checkpoint(call, *given, use_reentrant=False)

        assert_equal(gradients(again, tensors), wanted)
        assert len(selfcheck.records()) == 3

    def test_hooks_on_saved_tensors_meet_none_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        in_place_of_triton(monkeypatch)
        call, tensors = call_of("norm", F32, "lossless")
        packed: list[int] = []
        counts = []
        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(0) or t, lambda t: t):
                gradients(call, tensors)
            counts.append(len(packed))
        assert counts[1] == 2 * counts[0] > 0


class TestLater:
    def test_not_while_a_graph_is_captured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found: list[str] = []
        check = selfcheck.Check("op", "forward", "", "", False, 1.0, None, False)
        monkeypatch.setattr(selfcheck, "_compared", lambda *arguments: found.append("") or check)
        subject = selfcheck.Subject("op", "forward", *[lambda *t: t] * 4)
        capturing = True
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        call = (subject, None, (1,), torch.device("cuda", 0), "checked")
        assert selfcheck.trusted(*call) and not found
        capturing = False
        assert not selfcheck.trusted(*call) and len(found) == 1
        capturing = True
        assert not selfcheck.trusted(*call) and len(found) == 1

    def test_compiled_calls_compare_when_they_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        in_place_of_triton(monkeypatch, off_by(0.5, "gated_residual", "forward", 0))
        torch._dynamo.reset()
        call, tensors = residual(backend="checked")
        traced: list[int] = []

        def backend(graph: Any, inputs: Any) -> Any:
            traced.append(len(selfcheck.records()))
            return graph.forward

        run = torch.compile(call, fullgraph=True, backend=backend)
        with pytest.warns(RuntimeWarning, match="gated_residual forward"):
            found = run(*tensors)
        assert traced == [0] and torch.equal(found, residual(backend="reference")[0](*tensors))
        torch._dynamo.reset()

    def test_not_while_something_compiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        in_place_of_triton(monkeypatch)
        call, tensors = residual()
        with monkeypatch.context() as inside:
            inside.setattr(torch.compiler, "is_compiling", lambda: True)
            call(*tensors)
        assert selfcheck.records() == []
        call(*tensors)
        assert len(selfcheck.records()) == 1

    def test_not_on_fake_tensors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        in_place_of_triton(monkeypatch)
        call, tensors = residual()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            call(*(mode.from_tensor(t) for t in tensors))
        assert selfcheck.records() == []
