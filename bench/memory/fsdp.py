"""What FSDP2 brings to one rank's memory: planned, and measured on tiny real models in a process group of fakes.

The group's collectives copy nothing, and FSDP2 allocates, keeps and frees as it does among real ranks.
"""

import contextlib
import gc
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dancegrpo_fast.activations import checkpointing
from dancegrpo_fast.memory.planning import specs
from dancegrpo_fast.memory.planning.blocks import compose
from dancegrpo_fast.memory.planning.iteration import Iteration
from dancegrpo_fast.memory.planning.settings import Settings
from dancegrpo_fast.processes import Processes
from dancegrpo_fast.shards import local

from ..rows import Row, grid, made_with
from .families import FAMILIES, RANK, TARGETS, Family, prepare, real, real_inputs
from .ledger import Ledger

RANKS = 8
# Blocks larger than activations, unlike the families' own.
WIDER = {"num_attention_heads": 8, "num_layers": 3}
MODELS = ("HunyuanVideo", "FLUX", "SD UNet")
PHASES = ("rollout", "forward", "backward")


class ShardLedger(Ledger):
    """Follows storages that FSDP2 empties and fills again, too.

    Args:
        fixed: what outlives the call.
        living: what may be freed in it.
    """

    def __init__(self, fixed: Any, living: Any) -> None:
        super().__init__(fixed)
        self._add(living)
        self.restart()

    def live(self) -> tuple[int, int]:
        """Bytes of all storages as they are now; nothing is on a host."""
        total = self.fixed
        for key, (reference, _) in list(self._known.items()):
            storage = None if reference.expired() else torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._known[key]
            else:
                total += storage.nbytes()
        return total, total

    def restart(self) -> None:
        """The peak is what is there now."""
        self.peak, _ = self.live()

    def _observe(self, *, new: bool) -> None:
        # Also without a new storage: one may have been filled again.
        self.peak = max(self.peak, self.live()[0])


@contextlib.contextmanager
def fake_ranks() -> Iterator[None]:
    """A process group of this process and `RANKS` - 1 that are not there, within the context."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Setting:
    """What is trained and how it is spread."""

    dtype: str = "bf16"
    lora: int = 0
    policy: str = "full"
    strategy: str = "full_shard"
    gradient_sync: str = "call"
    replica: bool = False

    def asked(self) -> dict[str, Any]:
        """In the planner's words."""
        wide = {"dtype": "float32", "mixed_precision": "bf16"} if self.dtype == "fp32_master" else {}
        return wide | {
            "lora": self.lora,
            "checkpointing": self.policy,
            "strategy": self.strategy,
            "gradient_sync": self.gradient_sync,
            "rollout_replica": self.replica,
        }


SETTINGS = (
    Setting(),
    Setting(policy="none"),
    Setting(gradient_sync="update"),
    Setting(strategy="shard_grad_op"),
    Setting(dtype="fp32_master"),
    Setting(dtype="fp32_master", policy="none", gradient_sync="update"),
    Setting(dtype="fp32_master", replica=True),
    Setting(lora=RANK),
    Setting(lora=RANK, dtype="fp32_master", gradient_sync="update"),
)


def family_of(name: str) -> Family:
    """One of the families, with more of it in its weights than in activations."""
    family = next(f for f in FAMILIES if f.name == name)
    return replace(family, config=family.config | {k: v for k, v in WIDER.items() if k in family.config})


def planned(family: Family, folder: Path, setting: Setting) -> dict[str, int]:
    """Bytes at the peaks of `PHASES`, of the denoiser and its call."""
    asked = Settings(
        str(folder),
        family.frames,
        family.height,
        family.width,
        micro_batch=family.rows,
        rollout_batch=family.rows,
        text_tokens=family.text_tokens,
        attention="math",
        fsdp=RANKS,
        **setting.asked(),
        target_modules=TARGETS,
    )
    iteration = Iteration(asked)
    # What the CPU runs.
    iteration.replay = replace(iteration.replay, kernel="cpu")
    phases = (iteration.rollout(), *iteration.training(compose(iteration.replay, setting.policy)))
    apart = ("optimizer", "other models", "trajectories")
    return {
        name: sum(size for category, size in phase.budget.items() if category not in apart)
        for name, phase in zip(PHASES, phases, strict=True)
    }


def processes(setting: Setting) -> Processes:
    """The trainer's, of one rank, without the launcher that it is made from."""
    found = object.__new__(Processes)
    found.sharded = found.distributed = found.is_main = True
    found.index, found.count, found.device = 0, RANKS, torch.device("cpu")
    found._reshard, found._units = setting.strategy == "full_shard", ()
    found._gather_dtype = torch.bfloat16 if setting.dtype == "fp32_master" else None
    return found


def accumulated(model: nn.Module) -> list[Tensor]:
    """Gradients that are not reduced yet."""
    groups = [g for m in model.modules() if isinstance(m, FSDPModule) for g in m._get_fsdp_state()._fsdp_param_groups]
    found = [parameter.unsharded_accumulated_grad for group in groups for parameter in group.fsdp_params]
    return [gradient for gradient in found if gradient is not None]


def measured(family: Family, spec: specs.Spec, setting: Setting) -> dict[str, int]:
    """Peaks of real calls after one like them; of an "update" in the middle and at its end, where it reduces."""
    dtype = torch.float32 if setting.dtype == "fp32_master" else torch.bfloat16
    # LoRA layers are float32, as the trainer makes them.
    model = prepare(real(spec, dtype), torch.float32 if setting.lora else None, "off", setting.lora or RANK)
    ranks = processes(setting)
    ranks._split(model)
    if setting.policy != "none":
        checkpointing.apply(model, setting.policy)
    inputs = real_inputs(spec, family.sizes, dtype)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=setting.dtype == "fp32_master")
    there = [[local(p) for p in model.parameters()], list(model.buffers()), inputs]
    ledger = ShardLedger(there, [])
    with ranks.sampling(model, setting.replica), torch.no_grad(), mixed, ledger.watching():
        for _ in range(2):
            model(**inputs)
    found = dict.fromkeys(PHASES, 0) | {"rollout": ledger.peak}
    reduced = (False, False, True) if setting.gradient_sync == "update" else (True, True)
    for number, last in enumerate(reduced):
        gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
        ledger = ShardLedger([*there, gradients], accumulated(model))
        gc.collect()
        with ranks.reducing(model, last), ledger.watching() if number else contextlib.nullcontext():
            with mixed:
                output: Tensor = model(**inputs)[0]
            found["forward"] = max(found["forward"], ledger.peak)
            ledger.restart()
            output.backward(torch.ones_like(output))
            found["backward"] = max(found["backward"], ledger.peak)
        del output
    return found


def rows(name: str, where: Row, settings: Sequence[Setting] = SETTINGS) -> Iterator[Row]:
    """One line of the results for each: bytes of the phases, and how far the plan lies from what is measured."""
    family = family_of(name)
    with tempfile.TemporaryDirectory() as folder, fake_ranks(), warnings.catch_warnings():
        # Models return views of what they made, which nobody writes into.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        spec = family.spec(Path(folder))
        for setting in settings:
            guess = planned(family, Path(spec.name), setting)
            truth = measured(family, spec, setting)
            yield {
                "op": "fsdp memory",
                "family": family.name,
                "ranks": RANKS,
                **vars(setting),
                **{f"planned_{name}": size for name, size in guess.items()},
                **{f"measured_{name}": size for name, size in truth.items()},
                **{f"{name}_off": round(guess[name] / size - 1, 6) for name, size in truth.items()},
                "environment": where,
            }


def markdown(found: list[Row]) -> str:
    """All rows: MiB that are planned, and how far they lie from what is measured."""
    lines = [
        "# One rank's memory under FSDP2",
        "",
        f"Made by `python -m bench.memory --only fsdp` on a CPU: tiny real models in a group of {RANKS} ranks, of",
        "which one is there; MiB at the peak of a call, planned, and the deviation of the plan from the live storages.",
        made_with(found[0]),
        "",
    ]
    rows = []
    for row in found:
        trained = f"LoRA {row['lora']}" if row["lora"] else "full"
        spread = row["strategy"] + (", replica" if row["replica"] else "")
        cells = [row["family"], row["dtype"], trained, row["policy"], spread, f"each {row['gradient_sync']}"]
        cells += [f"{row[f'planned_{name}'] / 2**20:.2f} ({100 * row[f'{name}_off']:+.2f} %)" for name in PHASES]
        rows.append(cells)
    head = ["model", "dtype", "trained", "policy", "strategy", "gradients", *PHASES]
    return "\n".join([*lines, *grid(head, rows)]) + "\n"
