"""The pieces of one plan: bytes and seconds of every phase of one GRPO iteration."""

import copy
import math
from collections.abc import Collection
from dataclasses import replace

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...quantization import BITSANDBYTES
from . import decoding, passes, specs
from . import policy as policies
from .blocks import Blocks, compose
from .budget import CATEGORIES, Phase
from .calls import Moment, Vector, added, numbers
from .cases import case_of, kernel, resolved, rows_of
from .copies import copies, encoder_bytes, has_second, other_bytes, with_second, words
from .decode import Decode
from .margins import limit
from .quantised import INT8, conversion_bytes, kept_casts, quantised
from .sequences import exchange_seconds, told
from .settings import GIB, Settings
from .sharding import REDUCE, Gathers, Rest, rest, state_bytes, weights_of, without

# How a reason begins that says it of a replay.
BOUND = "launch-bound"
ROUNDED = (
    "all weights in 16 bits alone, as asked; this package's trainer refuses that, as small steps are rounded away: plan"
    " --dtype float32 --mixed_precision bf16, or --master_dtype float32"
)


class Iteration:
    """The pieces of one plan.

    Args:
        settings: what is planned.
        gradient_sync: of "auto", the one that is planned here.
    """

    def __init__(self, settings: Settings, gradient_sync: str = "update") -> None:
        self.asked = settings
        if settings.gradient_sync == "auto":
            settings = settings.changed(gradient_sync=gradient_sync)
        self.settings = settings
        passes.check(settings)
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
        if not settings.optimizer.startswith("adamw"):
            found = ", ".join(f"{state_bytes(settings, dtype):g}" for dtype in set(weights_of(self.replay).dtypes))
            self.reasons.append(
                f"optimizer {settings.optimizer}: {found} bytes of states for each trained number, and nothing of what "
                "its step takes"
            )
        if not settings.lora and settings.precision == "bf16":
            self.reasons.append(ROUNDED)
        self.reasons += told(settings, self.replay)
        self.second = has_second(settings, self.spec)
        self.rest: Rest = rest(settings, self.replay)
        # What a change of the denoiser that runs moves.
        self.expert = sum(self.rest.weights.values())
        self.rest = with_second(self.rest, settings) if self.second else self.rest
        self.reasons += self.rest.swap.reasons()
        self.copies = copies(settings, self.replay, 2 if self.second else 1)
        self.copies += other_bytes(settings, self.spec)
        self.reasons += words(settings, self.spec)
        self.encoders = encoder_bytes(settings, self.spec)
        self.rewards = sum(reward.bytes for reward in settings.rewards)
        self.decode: Decode | None = None
        self.tile: int | None = None
        latents = math.prod(self.grid) * self.spec.latent_channels
        self.embeddings = settings.prompts * _conditioning(self.spec, settings)
        self.latents = settings.samples * (settings.num_steps + 1) * latents * 4
        self.trajectories = self.latents + self.embeddings
        self.pixels = settings.scored_batch * settings.frames * 3 * settings.height * settings.width * 4
        if self.spec.vae is None:
            self.reasons.append("the VAE is not known: decode is not in it")
        else:
            decoding.choose(self)

    def decode_bytes(self, tile: int | None) -> int:
        """Of training's and evaluation's decodes with their margins, in tiles of this side or whole."""
        return decoding.needed(self, tile)

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
        return {"other models": there + self.copies + sum(other.bytes for other in s.others)}

    def resting(self, *, denoiser: bool) -> Vector:
        """Weights and states of the denoiser between its calls."""
        there = denoiser or "denoiser" not in self.settings.offload
        weights = self.rest.weights if there else {}
        return added((1, weights), (1, self.rest.optimizer))

    def _turns(self, passes: int) -> float:
        """Seconds to bring both denoisers, one after the other, where the one that does not run is on the host."""
        if not self.second or "expert" not in self.settings.offload:
            return 0.0
        return 2 * passes * self.expert / (self.settings.rates.pcie_gb_s * 1e9)

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
        if self.settings.quantization in BITSANDBYTES:
            # Quantised on the device, all of it, before what is swapped leaves.
            there = added((1, there), (1, {"parameters": self.rest.swap.saved}))
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
        each = max(each, 0.0 if gathered_once else self._gather_seconds(1), self._link_seconds(self.rest.swap.rollout))
        each += exchange_seconds(s, case)[0]
        turns = self._turns(math.ceil(s.samples / s.rollout_batch))
        return self._call("rollout", "rollout", blocks, fixed, calls * each + turns)

    def decoding(self) -> Phase | None:
        """The VAE."""
        return None if self.decode is None else decoding.phase(self, self.settings, self.tile)

    def evaluating(self) -> list[Phase]:
        """Rollout and decode of an evaluation whose calls are larger than training's."""
        s = self.settings.evaluation
        if s is None:
            return []
        case = replace(case_of(s, rows_of(s, s.rollout_batch), self.replay.kernel, train=False), fresh=False)
        latents = math.prod(specs.latent_grid(self.spec, s.frames, s.height, s.width)) * self.spec.latent_channels
        fixed = added(
            (1, self.resting(denoiser=True)),
            (1, self.rest.call),
            (1, self.others()),
            (1, {"trajectories": s.rollout_batch * latents * 4 + self.embeddings}),
        )
        rollout = self._call("evaluation rollout", "rollout", compose(case, "none"), fixed, 0.0)
        return [rollout] if self.decode is None else [rollout, decoding.phase(self, s, self.tile)]

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

    @property
    def training_calls(self) -> int:
        """Model calls with gradients of an iteration."""
        s = self.settings
        return math.ceil(s.samples * max(1, round(s.num_steps * s.timestep_fraction)) / s.micro_batch)

    def training(self, blocks: Blocks) -> tuple[Phase, Phase]:
        """One micro-step's bytes, and the seconds of all."""
        s = self.settings
        calls = self.training_calls
        forward, backward = self._seconds(blocks, "forward"), self._seconds(blocks, "backward", "recompute")
        converting = self._conversion_seconds(blocks)
        forward, backward = forward + converting[0], backward + converting[1]
        forward *= 2 if s.kl_reference else 1
        inputs, swap = blocks.host_bytes(), self.rest.swap
        # Inputs leave in the forward, beside weights that come, and come with them in the backward.
        carried = self._link_seconds(max(inputs, swap.forward)), self._link_seconds(inputs + swap.backward)
        again = 1 if s.strategy == "full_shard" else 0
        reduced = self._gather_seconds(again, reductions=1 if s.gradient_sync == "call" else 1 / calls)
        forward, backward = max(forward, carried[0], self._gather_seconds(1)), max(backward, carried[1], reduced)
        exchanging = exchange_seconds(s, self.replay)
        recomputed = sum(policy != "none" for policy in blocks.policies) / len(blocks.policies)
        forward, backward = forward + exchanging[0], backward + recomputed * exchanging[0] + exchanging[1]
        there = added((1, self._replay_fixed(self.rest.gradients)), (1, self.rest.call))
        back = there
        if s.quantization == "fp8":
            kept, cast_again = kept_casts(quantised(self.replay, s.quantization), blocks.policies)
            back = added((1, there), (1, {"saved": kept, "recomputation": cast_again}))
            there = added((1, there), (1, {"saved": kept}))
        return (
            self._call("replay forward", "forward", blocks, there, calls * forward + self._turns(1)),
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
        """Of converting fp8 weights in a forward, and in its backward: their bytes over the bandwidth."""
        s = self.settings
        if s.quantization != "fp8":
            return 0.0, 0.0
        forward, backward = conversion_bytes(quantised(self.replay, s.quantization), blocks.policies)
        bandwidth = s.rates.bandwidth_gb_s * 1e9
        return forward / bandwidth, backward / bandwidth

    def _link_seconds(self, size: float) -> float:
        """Of so many bytes on their way to or from the host."""
        return size / (self.settings.rates.pcie_gb_s * 1e9)

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
        seconds = self.rest.step_traffic / (s.rates.bandwidth_gb_s * 1e9)
        return self._phase("optimizer", [Moment({}, "load", ""), Moment(self.rest.step, "AdamW", "")], fixed, seconds)

    def at(self, gib: float) -> "Iteration":
        """The same on a device of so many GiB, at the same speed; its decode in tiles that fit there, if any can."""
        other = copy.copy(self)
        other.asked, other.settings = (each.changed(gpu_gib=gib) for each in (self.asked, self.settings))
        other.reasons = []
        if self.decode is not None and not decoding.is_hopeless(other):
            decoding.choose(other)
        return other

    def pick(self, among: Collection[str] | None = None) -> policies.Picked:
        """The policy; `auto` solves for what the device has left, with policies of these names for the blocks or all.

        Raises:
            ValueError: a policy that the model cannot have.
        """
        s = self.settings
        if s.checkpointing != "auto":
            return policies.named(s, self.replay)
        room = limit(s, s.gpu_gib)

        def peak(blocks: Blocks) -> float:
            return max(phase.bytes for phase in self.training(blocks))

        def replay_seconds(blocks: Blocks) -> float:
            return sum(phase.seconds for phase in self.training(blocks))

        found = policies.automatic(s, self.replay, peak, replay_seconds, room, among)
        resting = sum(self._replay_fixed(self.rest.gradients).values())
        if resting <= room:
            return found
        why = (
            f"weights, gradients and states take {resting / GIB:.1f} GiB, and {room / GIB:.1f} GiB are there:"
            " smaller ones (lora, quantization, blocks_to_swap, fsdp, offload, adamw8bit) would help"
        )
        return replace(found, reasons=(*found.reasons, why))


def _ordered(vector: Vector) -> dict[str, int]:
    whole = numbers(vector)
    return {name: whole[name] for name in CATEGORIES if name in whole}


def _conditioning(spec: specs.Spec, settings: Settings) -> int:
    """Bytes that one prompt is encoded to."""
    given = specs.inputs(spec, settings.frames, settings.height, settings.width, 1, settings.text_tokens)
    kept = tree_leaves(
        [value for key, value in given.items() if any(word in key for word in ("encoder", "pooled", "cap_", "cond_"))]
    )
    return sum(tensor.numel() * tensor.element_size() for tensor in kept if isinstance(tensor, Tensor))
