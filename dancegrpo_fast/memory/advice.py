"""What one changed setting gives: the plan again with it, and nothing that was not recomputed."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .budget import Advice, Plan
from .phases import kinds_of, resolved
from .settings import GIB, Settings

# Smaller changes are not shown: GiB of the peak, and the share of the iteration.
LEAST_GIB, LEAST_SHARE = 0.01, 0.001


class Knob(NamedTuple):
    """A changed setting in words; whether the checkpoint policy stays as it was picked."""

    text: str
    changes: dict[str, Any]
    same_policy: bool = True


def knobs(plan: Plan, *, thorough: bool) -> Iterator[Knob]:
    """What can be changed; `thorough` also has what needs other traces, which take seconds each."""
    s = plan.settings
    top = plan.peak.name
    for policy in ("none", "full", *(("attention", "matmul") if thorough else ())):
        if policy != plan.policy:
            yield Knob(f"policy {policy}", {"policy": policy}, same_policy=False)
    away = [("denoiser", "weights wait on the host while other models run")]
    away += [("vae", "the VAE waits on the host")] if top != "decode" else []
    away += [("rewards", "reward models wait on the host")] if s.rewards else []
    away += [("optimizer", "states and their step on the host")] if s.lora == 0 else []
    for name, text in away:
        if name not in s.offload:
            yield Knob(f"offload {name}: {text}", {"offload": (*s.offload, name)})
    on_device = "block_inputs" not in s.offload and "host" not in plan.policy and plan.policy != "none"
    if on_device and kinds_of(resolved(s.model)):
        yield Knob("offload block_inputs: they wait on the host", {"offload": (*s.offload, "block_inputs")})
    if s.text_encoders == "resident":
        yield Knob("text encoders freed after encoding", {"text_encoders": "freed"})
    if s.text_encoders != "precomputed" and top == "text encoding":
        yield Knob("text embeddings computed before", {"text_encoders": "precomputed"})
    if not s.vae_tiling and (top == "decode" or thorough):
        yield Knob("VAE tiling", {"vae_tiling": True})
    if s.optimizer == "adamw_foreach":
        yield Knob("AdamW fused instead of foreach", {"optimizer": "adamw_fused"})
    if s.optimizer != "adamw_8bit" and "optimizer" not in s.offload:
        yield Knob("8-bit AdamW", {"optimizer": "adamw_8bit"})
    if s.lora and s.base == "none":
        for base in ("int8", "nf4", "fp8"):
            yield Knob(f"frozen weights in {base} (the cost of dequantising is not counted)", {"base": base})
    if s.base == "none":
        yield Knob(f"{2 * s.fsdp} GPUs under FSDP", {"fsdp": 2 * s.fsdp})
    if s.is_sharded and not s.lora:
        yield Knob("no replica" if s.replica else "a bf16 replica for rollouts", {"replica": not s.replica})
    if thorough:
        if s.lora and s.lora_dtype == "fp32" and s.dtype == "bf16":
            yield Knob(
                "LoRA layers in bf16 (float32 ones keep their inputs in float32)",
                {"lora_dtype": "bf16"},
            )
        if s.block_ops == "off":
            yield Knob("block ops, lossless", {"block_ops": "lossless"})
        if s.micro_batch > 1:
            yield Knob("micro_batch halved", {"micro_batch": s.micro_batch // 2})
        if not s.lora:
            yield Knob("LoRA of rank 32 instead of all weights", {"lora": 32, "replica": False})


def advice(plan: Plan, again: Callable[[Settings, bool], Plan], *, thorough: bool = False) -> tuple[Advice, ...]:
    """Every knob's effect, ranked: if the plan does not fit by GiB, else by time and then GiB.

    Args:
        plan: as asked for.
        again: plans other settings, with the policy that was picked or with theirs.
        thorough: also try what needs other traces.
    """
    found = []
    for knob in knobs(plan, thorough=thorough):
        try:
            other = again(plan.settings.changed(**knob.changes), knob.same_policy)
        except ValueError:
            # The model cannot have it.
            continue
        gib = (other.total_bytes - plan.total_bytes) / GIB
        share = other.seconds / plan.seconds - 1
        if abs(gib) >= LEAST_GIB or abs(share) >= LEAST_SHARE:
            fits = plan.settings.gpu_gib
            change = (
                "" if other.fits(fits) == plan.fits(fits) else ", fits then" if other.fits(fits) else ", does not fit"
            )
            found.append((Advice(knob.text + change, gib, share), other.fits(fits)))
    fitting = plan.fits(plan.settings.gpu_gib)
    # What no longer fits comes last.
    found.sort(key=lambda item: (not item[1] and fitting, item[0].seconds if fitting else item[0].gib, item[0].gib))
    return tuple(item for item, _ in found)
