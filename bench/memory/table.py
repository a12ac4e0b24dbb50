"""Rows of what is predicted and what is measured, and the tables made of them."""

import gc
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dancegrpo_fast.activations import checkpointing
from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.memory.planning.blocks import Blocks, compose
from dancegrpo_fast.memory.planning.cases import Case, kinds_of
from dancegrpo_fast.memory.planning.policy import Picked, automatic, seconds
from dancegrpo_fast.memory.planning.settings import Settings
from dancegrpo_fast.memory.trace.tracer import trace

from ..rows import Row
from .families import FAMILIES, RANK, TARGETS, Family, prepare, real, real_inputs
from .ledger import Account, measure

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float32, autocast": torch.float32}
FIRST = 2
OFFLOADED = "full, offloaded inputs"
AUTO = "auto"
POLICIES: dict[str, checkpointing.Policy] = {
    "none": "none",
    "full": "full",
    "attention": "attention",
    "matmul": "matmul",
    f"first {FIRST}": checkpointing.FirstBlocks(FIRST),
    OFFLOADED: "full",
}
EVERY = (*POLICIES, AUTO)


@dataclass(frozen=True)
class Setting:
    """One call of one family's model: a rollout where `policy` is "rollout"."""

    dtype: str
    trained: str
    patch: str
    policy: str

    @property
    def train(self) -> bool:
        """Whether there is a backward."""
        return self.policy != "rollout"

    @property
    def lora(self) -> torch.dtype | None:
        """Of the LoRA layers: the model's, as diffusers makes them."""
        return None if self.trained == "full" else DTYPES[self.dtype]

    @property
    def autocast(self) -> torch.dtype | None:
        """Around the forward."""
        return torch.bfloat16 if self.dtype.endswith("autocast") else None


def settings(patched: bool) -> Iterator[Setting]:
    """Every dtype, policy and kind of training; patches, autocast and rollouts where they bring something else."""
    for dtype, trained, policies in (
        ("float32", "full", (*EVERY, "rollout")),
        ("float32", "LoRA", EVERY),
        ("bfloat16", "full", (*EVERY, "rollout")),
        ("bfloat16", "LoRA", EVERY),
        ("float32, autocast", "full", ("none", "full", AUTO)),
    ):
        yield from (Setting(dtype, trained, "off", policy) for policy in policies)
    for dtype, trained, patch, policies in (
        ("bfloat16", "full", "lossless, gelu", ("none",)),
        ("bfloat16", "LoRA", "fast, all", ("none", "full", "rollout")),
    ):
        yield from (Setting(dtype, trained, patch, policy) for policy in policies if patched)


@dataclass(frozen=True)
class Checkpoints:
    """A policy as `checkpointing` takes it; of `auto`, its name and the bytes that it was to stay under."""

    policy: checkpointing.Policy
    offload: bool = False
    name: str = ""
    limit: int = 0

    def apply(self, model: nn.Module) -> None:
        """Sets it."""
        if self.policy != "none":
            checkpointing.apply(model, self.policy, offload=self.offload)


def case_of(family: Family, spec: specs.Spec, setting: Setting) -> Case:
    """What the planner traces for it."""
    mode, _, recompute = setting.patch.partition(", ")
    return Case(
        spec.name,
        *family.sizes,
        dtype="fp32_master" if setting.autocast else "bf16",
        lora=0 if setting.lora is None else RANK,
        lora_targets=() if setting.lora is None else TARGETS,
        lora_dtype="bf16" if setting.lora is torch.bfloat16 else "fp32",
        kernel="cpu",
        block_ops=mode,
        recompute=recompute or "gelu",
        train=setting.train,
    )


def _peak(blocks: Blocks, train: bool = True) -> float:
    phases = ("forward", "backward") if train else ("rollout",)
    return max(sum(blocks.peak(phase).bytes.values()) for phase in phases)


def _chosen(case: Case) -> tuple[Picked, int]:
    """What `auto` takes where half of what full checkpointing saves is there, and the bytes that it is given."""
    limit = round((_peak(compose(case, "none")) + _peak(compose(case, "full"))) / 2)
    asked = Settings(
        case.spec, case.frames, case.height, case.width, case.rows, micro_batch=case.rows, text_tokens=case.text_tokens
    )

    def takes(blocks: Blocks) -> float:
        moved = 2 * blocks.host_bytes() / (asked.rates.pcie_gb_s * 1e9)
        parts = ("forward", "recompute", "backward")
        return max(moved, sum(seconds(asked, blocks.flops(part), blocks.traffic(part)) for part in parts))

    return automatic(asked, case, _peak, takes, limit), limit


def checkpoints(family: Family, spec: specs.Spec, setting: Setting) -> Checkpoints:
    """What the setting's policy is; `auto` chooses for float32 as for bfloat16, as the planner has no float32."""
    if setting.policy == "rollout":
        return Checkpoints("none")
    if setting.policy != AUTO:
        return Checkpoints(POLICIES[setting.policy], setting.policy == OFFLOADED)
    as_planned = replace(setting, dtype="bfloat16") if setting.dtype == "float32" else setting
    picked, limit = _chosen(case_of(family, spec, as_planned))
    policies: Any = picked.blocks.policies
    policy = checkpointing.PerBlock(policies) if picked.blocks.kinds else policies[0]
    return Checkpoints(policy, picked.blocks.host_inputs, picked.name, limit if setting == as_planned else 0)


def predicted(family: Family, spec: specs.Spec, setting: Setting, policy: Checkpoints) -> tuple[int, int]:
    """Bytes at the peak and kept, of the whole model on fake tensors."""
    dtype = DTYPES[setting.dtype]
    model = prepare(specs.build(spec, dtype), setting.lora, setting.patch)
    policy.apply(model)
    inputs = specs.inputs(spec, *family.sizes, dtype=dtype)
    found = trace(model, inputs, train=setting.train, attention="cpu", autocast=setting.autocast)
    return found.peak.bytes, found.kept_bytes


def planned(family: Family, spec: specs.Spec, setting: Setting, policy: Checkpoints) -> tuple[int, int]:
    """The same as the planner composes it of models with one or two blocks of each kind."""
    kinds = kinds_of(spec)
    policies: Any = policy.policy
    if kinds and isinstance(policies, checkpointing.FirstBlocks):
        policies = ["full"] * FIRST + ["none"] * (sum(kind.blocks for kind in kinds) - FIRST)
    elif kinds and isinstance(policies, checkpointing.PerBlock):
        policies = list(policies.policies)
    blocks = compose(case_of(family, spec, setting), policies, host_inputs=policy.offload)
    return round(_peak(blocks, setting.train)), round(sum(blocks.saved().values()))


def measured(family: Family, spec: specs.Spec, setting: Setting, policy: Checkpoints) -> Account:
    """Of the real model."""
    dtype = DTYPES[setting.dtype]
    model = prepare(real(spec, dtype), setting.lora, setting.patch)
    policy.apply(model)
    return measure(model, real_inputs(spec, family.sizes, dtype), train=setting.train, autocast=setting.autocast)


def _off(guess: int, truth: int, fixed: int = 0) -> float | None:
    """Relative deviation; None where there is nothing to deviate from."""
    return round((guess - fixed) / (truth - fixed) - 1, 6) if truth > fixed else None


def row(family: Family, spec: specs.Spec, setting: Setting, where: Row) -> Row:
    """One line of the results: bytes, and how far what is predicted lies from what is measured."""
    policy = checkpoints(family, spec, setting)
    account = measured(family, spec, setting, policy)
    peak, saved = predicted(family, spec, setting, policy)
    train = setting.train
    found: Row = {
        "op": "memory",
        "family": family.name,
        "dtype": setting.dtype,
        "trained": setting.trained,
        "patch": setting.patch,
        "policy": setting.policy,
        "offload": policy.offload,
        "chosen": policy.name or None,
        "limit": policy.limit or None,
        "predicted_peak": peak,
        "predicted_saved": saved,
        **{f"measured_{name}": value for name, value in vars(account).items()},
        "peak_off": _off(peak, account.peak),
        "activations_off": _off(peak, account.peak, account.fixed),
        "saved_off": _off(saved, account.saved) if train else None,
        "allocator_off": _off(peak, account.allocator_peak),
        "allocator_saved_off": _off(saved, account.allocator_saved) if train else None,
    }
    # The planner knows no weights in float32 without autocast.
    if setting.dtype != "float32":
        try:
            peak, saved = planned(family, spec, setting, policy)
        except Exception as error:
            # That there is no plan is a result.
            return found | {"planned_error": f"{type(error).__name__}: {error}", "environment": where}
        found |= {
            "planned_peak": peak,
            "planned_saved": saved,
            "planned_off": _off(peak, account.device_peak),
            "planned_saved_off": _off(saved, account.saved) if train else None,
        }
    return found | {"environment": where}


def family_rows(name: str, where: Row, threads: int) -> list[Row]:
    """All rows of one family, in a process of its own."""
    torch.set_num_threads(threads)
    # What is imported is not looked through again and again; cycles are collected around each call.
    gc.collect()
    gc.disable()
    gc.freeze()
    family = next(f for f in FAMILIES if f.name == name)
    with tempfile.TemporaryDirectory() as folder:
        spec = family.spec(Path(folder))
        return [row(family, spec, setting, where) for setting in settings(family.patched)]


def rows(names: list[str], where: Row, jobs: int) -> Iterator[list[Row]]:
    """Those of each family, as they come."""
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(family_rows, names, [where] * len(names), [1] * len(names))
