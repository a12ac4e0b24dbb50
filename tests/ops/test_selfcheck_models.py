"""Self checks in several processes, and in whole models."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dancegrpo_fast as dgf
from dancegrpo_fast.ops import selfcheck

from ..processes import together
from .cases import BF16
from .planted import in_place_of_triton, off_by
from .test_selfcheck import residual

WORKER = Path(__file__).with_name("selfcheck_worker.py")
pytestmark = pytest.mark.usefixtures("nothing_known", "failures_are_errors")


class TestRanks:
    @pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
    def test_the_first_to_look_decides_for_all(self, tmp_path: Path) -> None:
        """Two processes meet two signatures in opposite orders; each is wrong in its first one, then in its last."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            given = [str(tmp_path / "store"), str(free.getsockname()[1]), str(tmp_path / "found")]
        together([[str(WORKER), str(rank), *given] for rank in range(2)], tmp_path, scripts=True)
        for rank in range(2):
            by_wrong = torch.load(f"{given[2]}.{rank}", weights_only=True)
            for wrong, here, used in ((0, "passed", "eager torch"), (1, "failed", "Triton")):
                assert by_wrong[wrong]["by_triton"] == {width: [wrong == 1] * 2 for width in (16, 24)}
                (warned,) = by_wrong[wrong]["warned"]
                text = f"the self check {here} here, but not where it came first; {used} computes it everywhere"
                assert text in warned

    def test_pretended_ranks_have_no_store(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
        in_place_of_triton(monkeypatch, off_by(0.5, "gated_residual", "forward", 0))
        dist.init_process_group("fake", rank=0, world_size=8, store=fake.FakeStore())
        try:
            call, tensors = residual(backend="checked")
            with pytest.warns(RuntimeWarning, match="gated_residual forward"):
                found = call(*tensors)
        finally:
            dist.destroy_process_group()
        assert torch.equal(found, residual(backend="reference")[0](*tensors))


class TestModels:
    def test_settings(self) -> None:
        models = pytest.importorskip("tests.patch.models")
        model = models.TINY["flux"].model()
        for options, text in (
            ({"on_mismatch": "stop"}, '"stop", want one of warn, eager'),
            ({"on_mismatch": "eager", "mode": "fast"}, '"eager" with mode "fast" and backend "auto"'),
            ({"on_mismatch": "eager", "backend": "triton"}, '"eager" with mode "lossless" and backend "triton"'),
        ):
            with pytest.raises(ValueError, match=f"^on_mismatch: got {text}"):
                dgf.accelerate(model, **options)
        dgf.accelerate(model, on_mismatch="eager", backend="reference")()

    @pytest.mark.parametrize("name", ["flux", "hunyuan token replace", "sd3.5", "qwen", "wan", "wan per token"])
    def test_every_family_becomes_eager(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """All kernels wrong, in both directions, under checkpoints: output and all gradients are diffusers'."""
        models = pytest.importorskip("tests.patch.models")

        def plant(op: str, direction: str, place: int, output: Tensor) -> None:
            output *= 1.5

        tiny = models.TINY[name]
        wanted = models.run(tiny.model(BF16), tiny.inputs(BF16))
        in_place_of_triton(monkeypatch, plant)
        model = tiny.model(BF16)
        dgf.accelerate(model, on_mismatch="eager", recompute="all")
        model.enable_gradient_checkpointing()
        with pytest.warns(RuntimeWarning, match="eager torch"):
            models.assert_same_bits(models.run(model, tiny.inputs(BF16)), wanted)
        models.assert_same_bits(models.run(model, tiny.inputs(BF16)), wanted)
        assert not any(check.passed for check in selfcheck.records())

    @pytest.mark.parametrize("name", ["flux", "hunyuan", "skyreels", "sd3", "qwen two conditions", "wan image"])
    def test_every_family_passes(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        models = pytest.importorskip("tests.patch.models")
        in_place_of_triton(monkeypatch)
        tiny = models.TINY[name]
        model = tiny.model(BF16)
        dgf.accelerate(model, on_mismatch="eager", recompute="all")
        found = models.run(model, tiny.inputs(BF16))
        models.assert_same_bits(found, models.run(tiny.model(BF16), tiny.inputs(BF16)))
        assert all(check.passed and check.equal for check in selfcheck.records()) and selfcheck.records()
