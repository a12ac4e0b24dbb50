"""What accelerate's and launchers' variables ask for is done, or refused by name."""

import pytest
import torch

from dancegrpo_fast.processes import Processes

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, 'got "4", want "1": train.updates_per_rollout'),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, 'got "INDUCTOR", want "no"'),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, 'got "bf16", want "no": train.mixed_precision is "no"'),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, 'got "true", want "false"'),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, 'got "true", want "false"'),
        ({"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"} | FSDP, 'got "HYBRID_SHARD", want "full_shard"'),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"} | FSDP, 'got "SIZE_BASED_WRAP", want "no_wrap"'),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"} | FSDP, 'got "true", want "false": model.checkpointing'),
        ({"FSDP_IGNORED_MODULES": "proj_out"} | FSDP, 'got "proj_out", want ""'),
        # Where accelerate finds no GPU and was not told of CPUs, each process takes itself for the only one.
        ({"WORLD_SIZE": "2"}, "got 2 processes, of which accelerate sees 1; want a GPU for each, or ACCELERATE_USE"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "got 2 processes, of which accelerate sees 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_left_undone_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{next(iter(variables))}: {message}"):
        Processes("no")


def test_what_accelerate_launch_says_unasked_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    unasked = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        # Of FSDP, which is off.
        "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD",
        "WORLD_SIZE": "1",
    }
    for name, value in unasked.items():
        monkeypatch.setenv(name, value)
    processes = Processes("bf16")
    weight = torch.ones(1, requires_grad=True)
    processes.accelerator.backward(weight.sum())
    assert weight.grad is not None and weight.grad.item() == 1.0
    assert processes.accelerator.mixed_precision == "bf16" and processes.name == "one process"
