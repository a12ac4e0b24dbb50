"""Hooks on modules of accelerated blocks, offloading around them, and replicas of them: as without block ops."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dancegrpo_fast as dgf

from ..release import release_but
from .models import FAMILIES, TINY, assert_same_bits, run

LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks")
KINDS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
SAID = "has a hook: the block runs as diffusers has it"


def blocks(model: Any) -> list[tuple[str, nn.Module]]:
    """The first of each kind, by name."""
    return [(f"{name}.0", getattr(model, name)[0]) for name in LISTS if hasattr(model, name)]


class Counting:
    """Hooks of every kind on a module, and how often each was called."""

    def __init__(self, module: nn.Module) -> None:
        self.calls = dict.fromkeys(KINDS, 0)
        self.handles = [getattr(module, f"register_{kind}")(partial(self.count, kind)) for kind in KINDS]

    def count(self, kind: str, *_: Any) -> None:
        self.calls[kind] += 1

    def end(self) -> dict[str, int]:
        for handle in self.handles:
            handle.remove()
        return self.calls


@pytest.mark.parametrize("name", release_but(("flux",), TINY))
def test_every_hook_is_called_as_often(name: str) -> None:
    """On each module of a block alone, as a hook elsewhere may be what makes the block run as eager."""
    model, inputs = TINY[name].model(), TINY[name].inputs()
    names = [f"{where}.{part}" for where, block in blocks(model) for part, _ in block.named_modules() if part]
    hooks = {one: Counting(model.get_submodule(one)) for one in names}
    output, _ = run(model, inputs)
    wanted = {one: counting.end() for one, counting in hooks.items()}
    assert sum(calls["forward_hook"] for calls in wanted.values()) > len(names) / 2
    dgf.accelerate(model, "lossless", trim_text=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{SAID}")
        for one in names:
            counting = Counting(model.get_submodule(one))
            assert torch.equal(run(model, inputs)[0], output)
            assert counting.end() == wanted[one], one


def test_what_a_hook_changes_is_changed_and_said() -> None:
    """Once it is removed, the block ops run again."""
    model, inputs = TINY["flux"].model(), TINY["flux"].inputs()
    plain = copy.deepcopy(model)
    untouched = run(plain, inputs)
    undo = dgf.accelerate(model, "lossless")
    where = "transformer_blocks.0.norm1.norm"

    def double(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return 2 * out

    plain.get_submodule(where).register_forward_hook(double)
    wanted = run(plain, inputs)
    assert not torch.equal(wanted[0], untouched[0])
    handle = model.get_submodule(where).register_forward_hook(double)
    with pytest.warns(UserWarning, match=rf"FluxTransformerBlock.norm1.norm {SAID}"):
        assert_same_bits(run(model, inputs), wanted)
    compiled = copy.deepcopy(model)
    compiled.transformer_blocks[0].compile(backend="eager")  # type: ignore[union-attr,operator]  # a list of modules
    with pytest.warns(UserWarning, match=SAID), torch.no_grad():
        assert torch.equal(compiled(**inputs, return_dict=False)[0], wanted[0])
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(run(model, inputs), untouched)
    undo()


def group(model: Any) -> None:
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def blocks_of_group(model: Any) -> None:
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


@pytest.mark.parametrize("offload", [group, blocks_of_group])
@pytest.mark.parametrize("name", release_but(("flux",), FAMILIES))
def test_group_offload_around_an_accelerated_model(name: str, offload: Callable[[Any], None]) -> None:
    model, inputs = TINY[name].model(), TINY[name].inputs()
    wanted = model(**inputs, return_dict=False)[0]
    dgf.accelerate(model, "lossless", trim_text=False)
    offload(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{SAID}")
        assert torch.equal(model(**inputs, return_dict=False)[0], wanted)


def replicated(model: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes one, whose weights are twice the model's so that it is known by them."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, made in copies.items():
        for name, child in module._modules.items():
            made._modules[name] = None if child is None else copies[child]
            setattr(made, name, made._modules[name])
        for name, parameter in module._parameters.items():
            value = None if parameter is None else 2 * parameter
            made._parameters.pop(name, None)
            setattr(made, name, value)
    return copies[model]


# Wan asks itself for its dtype, which diffusers finds in parameters that replicas lack.
@pytest.mark.parametrize("name", release_but(("flux",), [name for name in FAMILIES if name != "wan"]))
def test_replicas_of_data_parallel_have_weights_of_their_own(name: str) -> None:
    model, inputs = TINY[name].model(), TINY[name].inputs()
    wanted = run_replica(replicated(copy.deepcopy(model)), inputs)
    assert not torch.equal(wanted, model(**inputs, return_dict=False)[0])
    undo = dgf.accelerate(model, "lossless", trim_text=False)
    assert torch.equal(run_replica(replicated(model), inputs), wanted)
    undo()
    assert all("_replicate_for_data_parallel" not in vars(module) for module in model.modules())


def run_replica(replica: nn.Module, inputs: dict[str, Any]) -> Tensor:
    found: Tensor = replica(**inputs, return_dict=False)[0]
    return found
