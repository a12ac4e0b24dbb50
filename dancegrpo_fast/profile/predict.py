"""What a trainer's phases will take: on the CPU its own code on fake tensors, on a GPU the planner."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..memory.planning.settings import GIB
from ..memory.trace.result import Peak, Trace
from ..memory.trace.tracer import collected, trace
from ..models import Conditioning, decode
from ..optimizers import ADAMW
from ..train.calls import Item, Policy, plan_calls
from ..train.collect import Batch
from ..train.draw import Draw, shared_step
from ..train.trajectory import Trajectory
from .books import sums

if TYPE_CHECKING:
    from ..train.loop import Trainer

# Of a trace's categories, those with other names in a budget.
_STEPPED = {"optimizer", "master weights"}
_NAMES = {"inputs": "trajectories", "block_inputs": "block inputs"}


@dataclass(frozen=True)
class _Brief(Policy):
    """Calls the model twice for every number of samples; every later call would only do the same again."""

    calls: dict[int, list[tuple[torch.Size | None, torch.dtype]]] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def __call__(
        self, denoiser: nn.Module, latents: Tensor, times: Tensor, conditioning: Conditioning, expert: int
    ) -> tuple[Tensor, Tensor | None]:
        count = len(latents)
        self.counts[count] = self.counts.get(count, 0) + 1
        if self.counts[count] <= 2:
            output, uncond = super().__call__(denoiser, latents, times, conditioning, expert)
            self.calls[count] = [(None if t is None else t.shape[1:], output.dtype) for t in (output, uncond)]
            return output, uncond
        made = [
            None if shape is None else latents.new_empty(self.rows, *shape, dtype=dtype)[:count]
            for shape, dtype in self.calls[count]
        ]
        assert made[0] is not None
        return made[0], made[1]


def _budget(found: Trace, peak: Peak, before: Mapping[str, int], outputs: str) -> dict[str, int]:
    """A traced peak, and what is there before."""
    names = _NAMES | {"outputs": outputs}
    pairs = [(names.get(name, name), size) for name, size in peak.by_category.items()]
    there = {category for category in peak.by_category if category in _STEPPED}
    pairs += [(name, before.get(name, 0)) for name in ("other models", "trajectories", *(_STEPPED - there))]
    return sums(pairs)


def _traced(*args: Any, **kwargs: Any) -> Trace:
    """A trace of what is given and made: what it meets beside that is there before, or on the host."""
    found = trace(*args, **kwargs)
    for storage in found.storages:
        if storage.op == "existing":
            storage.size = 0
    return found


@collected()
def predict(trainer: "Trainer", before: Mapping[str, int], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bytes by category at the peaks of "rollout", "decode", "replay forward", "replay backward" and "optimizer".

    Args:
        trainer: on the CPU.
        before: bytes by category before the iteration; other models and data of it are taken as they are.
        rows: of iterations that ran, for how many model calls an update has.
    """
    recipe, train, sampler = trainer.recipe, trainer.recipe.train, trainer.recipe.sampler
    batch, shape = train.prompts_per_iteration * train.group_size, trainer.model.latent_shape
    prompts = (list(trainer.reached) * train.prompts_per_iteration)[: train.prompts_per_iteration]
    conditioning = dict(trainer.model.encode(prompts))
    starts = len(prompts) if sampler.shared_noise else batch
    noise = torch.empty(starts, *shape, dtype=sampler.torch_dtype(), device="meta")
    ids = torch.empty(batch, dtype=torch.int64, device="meta")
    brief = _Brief(**{f.name: getattr(trainer.policy, f.name) for f in fields(Policy)})

    # Depends on the table's numbers, which fake tensors do not have.
    first = shared_step(trainer.table) if sampler.shared_noise else 0

    def drawn(noise: Tensor, conditioning: Conditioning, ids: Tensor) -> Trajectory:
        draw = Draw(brief, trainer.table, conditioning, recipe.seed, train.ratio_norm)
        start = draw.start(noise, first) if sampler.shared_noise else noise
        return draw.samples(start, torch.arange(batch, device=noise.device) // train.group_size, ids)

    # States of masters and of other optimisers are taken as they are.
    kind = "fused" if train.optimizer == ADAMW and train.master_dtype is None else None
    inputs = {"noise": noise, "conditioning": conditioning, "ids": ids}
    sampled = _traced(trainer.denoiser, inputs, train=False, attention="cpu", optimizer=kind, call=drawn)
    keeps = {"keep_denoised": trainer.model.decodes_x0, "keep_outputs": train.ratio_norm}
    left = Trajectory.allocate(batch, len(trainer.table), noise, **keeps)

    step = max(step for step in range(len(trainer.table) - 1) if trainer.table.tau[step] > 0)

    def terms(trajectory: dict[str, Tensor], conditioning: Conditioning, advantages: Tensor, **_: Tensor) -> Any:
        rows, places = range(train.micro_batch), range(batch)
        index = [place // train.group_size for place in places]
        data = Batch(
            trajectory=Trajectory(**trajectory),
            conditioning=conditioning,
            prompts=index,
            rows=[place % len(rows) for place in places],
            shared_step=None,
            kept=places,
            chosen=places,
            valid=torch.ones(batch, dtype=torch.bool),
            first=0,
            rewards=advantages[None],
            advantages=advantages,
            own_advantages=advantages,
            seconds={},
        )
        expert = trainer.model.turns(trainer.table)[step]
        items = {row: Item((row,), step, row, expert) for row in rows}
        (call,) = plan_calls([items], len(rows), index, 1 / batch, advantages.device)
        return trainer.updates.terms(data, call)

    replay = _traced(
        trainer.denoiser,
        {
            "trajectory": vars(left),
            "conditioning": conditioning,
            "advantages": torch.empty(batch, device="meta"),
            "ids": ids,
        },
        attention="cpu",
        grads=_calls_per_update(trainer, rows) > 1,
        optimizer=kind,
        loss=lambda found: torch.stack([one.loss for one in found]).sum(),
        call=terms,
    )
    rollout = _budget(sampled, sampled.peak_of("rollout"), before, "trajectories")
    # What a rollout begins and ends with stays until its samples are scored.
    after = {**before, "trajectories": rollout.get("trajectories", 0)}
    found = {
        "rollout": rollout,
        "decode": sums([*after.items(), *_decoded(trainer, left.final)]),
        "replay forward": _budget(replay, replay.peak_of("forward"), before, "saved"),
        "replay backward": _budget(replay, replay.peak_of("backward"), before, "saved"),
    }
    if train.optimizer == ADAMW:
        found["optimizer"] = _stepped(trainer, before, replay.live("load").get("inputs", 0))
    return found


def _decoded(trainer: "Trainer", latents: Tensor) -> list[tuple[str, int]]:
    """Of the decode's peak, what is not there before it."""
    model: Any = trainer.model

    def call(latents: Tensor) -> Tensor:
        return decode(model, latents, trainer.policy.rows)

    found = _traced(model.vae, {"latents": latents}, train=False, attention="cpu", call=call)
    names = {"temporaries": "temporaries", "workspace": "workspace", "outputs": "trajectories"}
    peak = found.peak_of("rollout").by_category
    return [(name, peak.get(category, 0)) for category, name in names.items()]


def _stepped(trainer: "Trainer", before: Mapping[str, int], data: int) -> dict[str, int]:
    """At the peak of clipping the gradients and of the step; `data` are bytes of what is replayed."""

    weights = trainer.optimizer.weights
    masters = sum(w.nbytes for name, w in weights.items() if w is not trainer.parameters[name])
    stepped: nn.Module = nn.ParameterList(weights.values()) if masters else trainer.denoiser

    def clipped() -> Tensor:
        parameters = [p for p in stepped.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(parameters, trainer.recipe.train.max_grad_norm)
        return parameters[0].sum()

    found = _traced(stepped, {}, attention="cpu", optimizer="single", call=clipped)
    peak = max(map(found.peak_of, ("forward", "optimizer")), key=lambda peak: peak.bytes)
    budget = _budget(found, peak, before, "temporaries")
    if masters:
        budget["parameters"] = sum(p.nbytes for p in trainer.denoiser.parameters())
    return sums([*budget.items(), ("trajectories", data)])


def planned(trainer: "Trainer") -> tuple[dict[str, dict[str, int]], list[str]]:
    """Bytes by category at the peaks of the planner's phases, and what is not predicted and why.

    Args:
        trainer: its model is loaded; the planner is told what is known of it.
    """
    from ..memory.planning.planner import plan
    from ..models.planning import uncounted
    from ..models.setup import _settings

    recipe = trainer.recipe
    if recipe.model.dtype == "float32" and recipe.train.mixed_precision == "no":
        return {}, ["not predicted: the planner counts no model in float32 throughout"]
    text_tokens = int(trainer.model.encode(list(trainer.reached)[:1])["prompt_embeds"].shape[1])
    gib = recipe.model.memory_gib or torch.cuda.get_device_properties(trainer.device).total_memory / GIB
    model: Any = trainer.model
    found = plan(_settings(model, recipe, trainer.device, text_tokens, gib), advise=False)
    budgets = {phase.name: phase.budget for phase in found.phases}
    notes = ["predicted by the planner; activations of reward models are not in it"]
    if left_out := uncounted(recipe):
        budgets.pop("rewards", None)
        notes.append(f"rewards are not predicted: the models of {', '.join(left_out)} are not known")
    return budgets, notes


def _calls_per_update(trainer: "Trainer", rows: Sequence[Mapping[str, Any]]) -> float:
    train = trainer.recipe.train
    updates = train.updates_per_rollout * train.inner_epochs * len(rows)
    model_rows: int = sum(row["skipped"]["model_rows"] for row in rows)
    return model_rows / train.micro_batch / updates
