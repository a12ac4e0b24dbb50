"""Bytes and seconds of every phase of one GRPO iteration, before there is a GPU."""

import math
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...activations.checkpointing import NAMED
from ..trace.tracer import collected
from . import policy as policies
from . import specs
from .advice import advice, dominated
from .blocks import Blocks, compose
from .budget import CATEGORIES, Advice, Phase, Plan
from .calls import Moment, Vector, added, numbers
from .cases import case_of, kernel, resolved, rows_of
from .decode import Decode, decode
from .margins import limit, margins, untraced
from .quantised import INT8, conversion_bytes, kept_casts, quantised
from .settings import GIB, Settings
from .sharding import REDUCE, Gathers, Rest, rest, weights_of, without
from .verdict import Verdict, verdicts

__all__ = ["CATEGORIES", "Advice", "Phase", "Plan", "plan"]

# How a reason begins that says it of a replay.
BOUND = "launch-bound"


class Iteration:
    """The pieces of one plan."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.spec = resolved(settings.model)
        if self.spec.denoiser == "UNet2DConditionModel" and "block_inputs" in settings.offload:
            raise ValueError(
                f"offload: got block_inputs for {settings.model}, want a transformer, or not to offload them"
            )
        self.grid = specs.latent_grid(self.spec, settings.frames, settings.height, settings.width)
        rows = rows_of(settings, settings.micro_batch)
        equal_text = settings.guidance_scale == 1 or not self.spec.guides_by_batch
        case = case_of(settings, rows, "flash", train=True)
        name, why = kernel(case, settings.attention, settings.device, equal_text)
        self.reasons = [why]
        self.replay = replace(case, kernel=name)
        self.reasons += [INT8] if settings.quantization == "int8" else []
        if settings.optimizer == "other":
            self.reasons.append(
                f"optimizer other: {settings.state_bytes:g} bytes of states for each trained number, and nothing of "
                "what its step takes"
            )
        self.rest: Rest = rest(settings, self.replay)
        self.encoders = 2 * sum(encoder.parameters for encoder in self.spec.text_encoders)
        self.rewards = sum(reward.bytes for reward in settings.rewards)
        self.decode: Decode | None = None
        if self.spec.vae is not None:
            size = settings.frames, settings.height, settings.width
            self.decode = decode(settings.model, *size, settings.rollout_batch, settings.vae_tiling)
        else:
            self.reasons.append("the VAE is not known: decode is not in it")
        latents = math.prod(self.grid) * self.spec.latent_channels
        self.embeddings = settings.prompts * _conditioning(self.spec, settings)
        self.latents = settings.samples * (settings.num_steps + 1) * latents * 4
        self.trajectories = self.latents + self.embeddings
        self.pixels = settings.rollout_batch * settings.frames * 3 * settings.height * settings.width * 4

    def _sizes(self) -> dict[str, int]:
        """Bytes of the models beside the denoiser."""
        vae = self.decode.weights if self.decode else 0
        return {"vae": vae, "rewards": self.rewards, "text_encoders": self.encoders}

    def others(self, *running: str) -> Vector:
        """Weights of other models on the device."""
        s = self.settings
        sizes = self._sizes()
        if s.text_encoders == "precomputed":
            sizes["text_encoders"] = 0
        away = {*s.offload, *(["text_encoders"] if s.text_encoders == "freed" else [])}
        there = sum(size for name, size in sizes.items() if name in running or name not in away)
        return {"other models": there + sum(other.bytes for other in s.others)}

    def resting(self, *, denoiser: bool) -> Vector:
        """Weights and states of the denoiser between its calls."""
        there = denoiser or "denoiser" not in self.settings.offload
        weights = self.rest.weights if there else {}
        return added((1, weights), (1, self.rest.optimizer))

    def _carried(self, *names: str, denoiser: bool = False) -> float:
        """Seconds to bring what waits on the host, and to take the denoiser there and back."""
        s = self.settings
        moved = sum(float(size) for name, size in self._sizes().items() if name in names and name in s.offload)
        if denoiser and "denoiser" in s.offload:
            moved += 2 * sum(self.rest.weights.values())
        return moved / (s.rates.pcie_gb_s * 1e9)

    # Phases.

    def _phase(self, name: str, moments: list[Moment], fixed: Vector, seconds: float) -> Phase:
        whole = [Moment(added((1, m.bytes), (1, fixed)), m.op, m.module) for m in moments]
        top = max(whole, key=lambda moment: sum(moment.bytes.values()))
        places = sorted({round(i * (len(whole) - 1) / 40) for i in range(41)} | {whole.index(top)})
        line = tuple(((i + 0.5) / len(whole), _ordered(whole[i].bytes)) for i in places)
        return Phase(name, _ordered(top.bytes), seconds, top.op, top.module, line)

    def _call(self, name: str, phase: str, blocks: Blocks, fixed: Vector, seconds: float) -> Phase:
        static = blocks.static()
        found = blocks.moments(phase)
        if self.settings.is_sharded:
            found = Gathers(self.settings, weights_of(self.replay), phase).moments(blocks, phase)
        moments = [Moment(without(m.bytes, static), m.op, m.module) for m in found]
        return self._phase(name, moments, fixed, seconds)

    def weights(self) -> Phase:
        """Everything that rests, before anything runs."""
        there = added((1, self.resting(denoiser=True)), (1, self.others()))
        return self._phase("weights", [Moment(there, "load", "")], {}, 0.0)

    def encoding(self) -> Phase:
        """The text encoders; freed ones run before the denoiser is loaded."""
        freed = self.settings.text_encoders == "freed"
        there = {"other models": float(self.encoders)} if freed else self.others("text_encoders")
        if not freed:
            there = added((1, there), (1, self.resting(denoiser=False)))
        tokens = self.settings.prompts * (self.settings.text_tokens or self.spec.text_tokens)
        seconds = self.encoders * tokens / (self.settings.rates.tflops * 1e12)
        seconds += self._carried("text_encoders", denoiser=not freed)
        return self._phase("text encoding", [Moment(there, "load", "text_encoder")], {}, seconds)

    def rollout(self) -> Phase:
        """All sampling steps."""
        s = self.settings
        case = replace(self.replay, rows=rows_of(s, s.rollout_batch), train=False, fresh=False)
        blocks = compose(case, "none")
        fixed = added(
            (1, self.resting(denoiser=True)),
            (1, self.rest.call),
            (1, self.others()),
            (1, {"trajectories": self.trajectories}),
        )
        calls = math.ceil(s.samples / s.rollout_batch) * s.num_steps
        each = self._seconds(blocks, "rollout")
        each += self._conversion_seconds(blocks)[0]
        gathered_once = s.rollout_replica or s.strategy == "shard_grad_op"
        each = max(each, 0.0 if gathered_once else self._gather_seconds(1))
        return self._call("rollout", "rollout", blocks, fixed, calls * each)

    def decoding(self) -> Phase | None:
        """The VAE."""
        if self.decode is None:
            return None
        fixed = added(
            (1, self.resting(denoiser=False)), (1, self.others("vae")), (1, {"trajectories": self.trajectories})
        )
        calls = math.ceil(self.settings.samples / self.settings.rollout_batch)
        seconds = calls * policies.seconds(self.settings, self.decode.flops, self.decode.traffic)
        seconds += self._carried("vae", denoiser=True)
        moments = [
            Moment({}, "load", "vae"),
            Moment(self.decode.peak, self.decode.op, f"vae.{self.decode.module}"),
            Moment({"temporaries": self.pixels / 2}, "load", "vae"),
        ]
        return self._phase("decode", moments, fixed, seconds)

    def rewarding(self) -> Phase:
        """Reward models and the pixels in float32."""
        fixed = added(
            (1, self.resting(denoiser=False)),
            (1, self.others("rewards")),
            (1, {"trajectories": self.trajectories, "temporaries": self.pixels}),
        )
        return self._phase("rewards", [Moment({}, "load", "rewards")], fixed, self._carried("rewards"))

    def _replay_fixed(self, gradients: Vector) -> Vector:
        return added(
            (1, self.resting(denoiser=True)),
            (1, gradients),
            (1, self.others()),
            (1, {"trajectories": self.latents * self.settings.trajectory_copies + self.embeddings}),
        )

    def training(self, blocks: Blocks) -> tuple[Phase, Phase]:
        """One micro-step's bytes, and the seconds of all."""
        s = self.settings
        calls = math.ceil(s.samples * max(1, round(s.num_steps * s.timestep_fraction)) / s.micro_batch)
        forward, backward = self._seconds(blocks, "forward"), self._seconds(blocks, "backward", "recompute")
        converting = self._conversion_seconds(blocks)
        forward, backward = forward + converting[0], backward + converting[1]
        moved = blocks.host_bytes() / (s.rates.pcie_gb_s * 1e9)
        again = 1 if s.strategy == "full_shard" else 0
        reduced = self._gather_seconds(again, reductions=1 if s.gradient_sync == "call" else 1 / calls)
        forward, backward = max(forward, moved, self._gather_seconds(1)), max(backward, moved, reduced)
        there = added((1, self._replay_fixed(self.rest.gradients)), (1, self.rest.call))
        back = there
        if s.quantization == "fp8":
            kept, cast_again = kept_casts(quantised(self.replay, s.quantization), blocks.policies)
            back = added((1, there), (1, {"saved": kept, "recomputation": cast_again}))
            there = added((1, there), (1, {"saved": kept}))
        return (
            self._call("replay forward", "forward", blocks, there, calls * forward),
            self._call("replay backward", "backward", blocks, back, calls * backward),
        )

    def _seconds(self, blocks: Blocks, *parts: str) -> float:
        """Of one call: its work, or what the host takes to start it."""
        s = self.settings
        work = sum(policies.seconds(s, blocks.flops(part), blocks.traffic(part)) for part in parts)
        return max(work, self._starting(blocks, *parts))

    def _starting(self, blocks: Blocks, *parts: str) -> float:
        """Seconds that the host takes to start the operators of one call."""
        return sum(blocks.launches(part) for part in parts) * self.settings.rates.launch_us * 1e-6

    def bound(self, blocks: Blocks) -> list[str]:
        """Says of a replay that the host takes longer to start it than the device to run it."""
        parts = ("forward", "backward", "recompute")
        s, starting = self.settings, self._starting(blocks, *parts)
        work = sum(policies.seconds(s, blocks.flops(part), blocks.traffic(part)) for part in parts)
        if starting <= work:
            return []
        count = round(sum(blocks.launches(part) for part in parts))
        return [
            f"{BOUND}: a replay's {count:,} operators at {s.rates.launch_us:g} us take {1e3 * starting:.0f} ms to"
            f" start and {1e3 * work:.0f} ms to run; a larger micro_batch or a compiled model would be faster"
        ]

    def _conversion_seconds(self, blocks: Blocks) -> tuple[float, float]:
        """Of converting quantised weights in a forward, and in its backward: their bytes over the bandwidth."""
        s = self.settings
        if s.quantization == "none":
            return 0.0, 0.0
        forward, backward = conversion_bytes(quantised(self.replay, s.quantization), s.quantization, blocks.policies)
        bandwidth = s.rates.bandwidth_gb_s * 1e9
        return forward / bandwidth, backward / bandwidth

    def _gather_seconds(self, times: int, reductions: float = 0) -> float:
        """Of gathering all weights and reducing their gradients so often, which overlaps with computing."""
        s = self.settings
        if not s.is_sharded:
            return 0.0
        weights = weights_of(self.replay)
        moved = times * weights.bytes + reductions * REDUCE * weights.trainable
        return moved * (s.fsdp - 1) / s.fsdp / (s.rates.link_gb_s * 1e9)

    def step(self) -> Phase:
        """The optimiser."""
        s = self.settings
        fixed = self._replay_fixed(self.rest.reduced)
        rates = s.rates
        seconds = self.rest.step_traffic / (rates.bandwidth_gb_s * 1e9)
        if "optimizer" in s.offload:
            moved = 2 * sum(self.rest.reduced.values())
            seconds = self.rest.step_traffic / (rates.host_gb_s * 1e9) + moved / (rates.pcie_gb_s * 1e9)
        return self._phase("optimizer", [Moment({}, "load", ""), Moment(self.rest.step, "AdamW", "")], fixed, seconds)

    def pick(self, gib: float | None = None) -> policies.Picked:
        """The policy; `auto` solves for what the device, or another of so many GiB, has left.

        Raises:
            ValueError: a policy that the model cannot have.
        """
        s = self.settings
        if s.checkpointing != "auto":
            return policies.named(s, self.replay)
        room = limit(s, gib or s.gpu_gib)

        def peak(blocks: Blocks) -> float:
            return max(phase.bytes for phase in self.training(blocks))

        def replay_seconds(blocks: Blocks) -> float:
            return sum(phase.seconds for phase in self.training(blocks))

        # For another capacity the named policies are enough to say whether it fits, and are traced already.
        found = policies.automatic(s, self.replay, peak, replay_seconds, room, NAMED if gib else None)
        resting = sum(self._replay_fixed(self.rest.gradients).values())
        if resting <= room:
            return found
        why = (
            f"weights, gradients and states take {resting / GIB:.1f} GiB, and {room / GIB:.1f} GiB are there:"
            " smaller ones (lora, quantization, fsdp, offload, adamw8bit) would help"
        )
        return replace(found, reasons=(*found.reasons, why))


def _ordered(vector: Vector) -> dict[str, int]:
    whole = numbers(vector)
    return {name: whole[name] for name in CATEGORIES if name in whole}


def _conditioning(spec: specs.Spec, settings: Settings) -> int:
    """Bytes that one prompt is encoded to."""
    given = specs.inputs(spec, settings.frames, settings.height, settings.width, 1, settings.text_tokens)
    kept = [
        value for key, value in given.items() if isinstance(value, Tensor) and ("encoder" in key or "pooled" in key)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def plan(settings: Settings | str, *, advise: bool = True, thorough: bool = False, **changes: Any) -> Plan:
    """Predicts one GRPO iteration on one GPU: `plan("flux-dev", height=720, width=720, lora=32)`.

    Args:
        settings: what is run, or a model, as `Settings` takes it.
        advise: also recompute the plan with each knob changed.
        thorough: also with knobs that need other traces, which takes longer.
        changes: fields of `Settings`.

    Raises:
        ValueError: settings that the model cannot have.
    """
    asked = Settings(settings, **changes) if isinstance(settings, str) else settings.changed(**changes)
    with collected():
        iteration = Iteration(asked)
        picked = iteration.pick()
        found = _plan(iteration, picked)
        found = replace(found, cards=_cards(iteration, found))
        if not advise:
            return found
        advised = _advised(iteration, found, picked, thorough)
        return replace(found, advice=advised, reasons=(*found.reasons, *dominated(found, advised)))


def _cards(iteration: Iteration, found: Plan) -> tuple[Verdict, ...]:
    return verdicts(found, lambda gib: _plan(iteration, iteration.pick(gib)))


def _advised(iteration: Iteration, found: Plan, picked: policies.Picked, thorough: bool) -> tuple[Advice, ...]:
    def again(changed: Settings, same_policy: bool) -> Plan:
        other = Iteration(changed)
        if not same_policy:
            return _plan(other, other.pick())
        chosen = list(picked.blocks.policies) if picked.blocks.kinds else picked.blocks.policies[0]
        host = picked.blocks.host_inputs or "block_inputs" in changed.offload
        return _plan(other, replace(picked, blocks=compose(other.replay, chosen, host_inputs=host)))

    def mixed(each: list[Hashable]) -> Plan:
        blocks = compose(iteration.replay, each, host_inputs=picked.blocks.host_inputs)
        return _plan(iteration, replace(picked, blocks=blocks))

    return advice(found, picked.blocks, again, mixed, thorough=thorough)


def _plan(iteration: Iteration, picked: policies.Picked) -> Plan:
    settings = iteration.settings
    phases: list[Phase | None] = [iteration.weights()]
    if settings.text_encoders != "precomputed" and iteration.encoders:
        phases.insert(0 if settings.text_encoders == "freed" else 1, iteration.encoding())
    phases += [iteration.rollout(), iteration.decoding()]
    if settings.rewards:
        phases.append(iteration.rewarding())
    phases += [*iteration.training(picked.blocks), iteration.step()]
    there = tuple(phase for phase in phases if phase is not None)
    held = margins(settings, max(phase.bytes for phase in there)) | untraced(there)
    return Plan(
        settings,
        there,
        held,
        {name.replace("_", " "): size for name, size in numbers(picked.blocks.saved()).items()},
        picked.name,
        (*picked.reasons, *iteration.reasons, *iteration.bound(picked.blocks)),
    )
