"""Figures of an earlier, independent count of published models at real size, and the planner's answers beside them.

That count, too, was made on fake tensors and not on a GPU: one GPU and batch 1 where nothing else is said, `.grad`
present. It was published with two or three digits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dancegrpo_fast.memory.planning.budget import Phase
from dancegrpo_fast.memory.planning.iteration import Iteration
from dancegrpo_fast.memory.planning.settings import GIB, Settings

from ..rows import Row, grid, made_with

Given = dict[str, Any]
# The share that a figure may be off without a reason.
WITHIN = 0.02
GB = 1e9


def pieces(given: Given) -> Iteration:
    """Phases are made one by one: each costs traces."""
    return Iteration(Settings(attention="flash", **given))


def replay(iteration: Iteration) -> tuple[Phase, Phase]:
    """Forward and backward under the policy that the settings name."""
    return iteration.training(iteration.pick().blocks)


def denoiser(*phases: Phase) -> float:
    """Bytes of the largest of these without trajectories and other models."""
    return max(p.bytes - sum(p.budget.get(name, 0) for name in ("trajectories", "other models")) for p in phases)


def _top(it: Iteration) -> Phase:
    return max(replay(it), key=lambda phase: phase.bytes)


def _kept(it: Iteration) -> float:
    # What autocast makes of masters is in `parameters`.
    names = ("saved", "block inputs", *(["parameters"] if it.settings.dtype == "float32" else []))
    return sum(_top(it).budget.get(name, 0) for name in names) / GIB


def _peak(it: Iteration) -> float:
    return denoiser(_top(it)) / GIB


def _recomputed(it: Iteration) -> float:
    return sum(_top(it).budget[name] for name in ("recomputation", "temporaries")) / GIB


def _rollout(it: Iteration) -> float:
    phase = it.rollout()
    return (denoiser(phase) - phase.budget["optimizer"]) / GIB


def _rollout_kept(it: Iteration) -> float:
    return _rollout(it) - it.rollout().budget["parameters"] / GIB


def _copy(it: Iteration) -> float:
    return it.step().budget.get("temporaries", 0) / GIB


def _states(it: Iteration) -> float:
    budget = it.step().budget
    return (budget["master weights"] + budget["gradients"] + budget["optimizer"]) / GB


def _replica(it: Iteration) -> float:
    return it.rollout().budget["replica"] / GB


def _trajectories(it: Iteration) -> float:
    return it.step().budget["trajectories"] / GB


def _decode(it: Iteration) -> float:
    phase = it.decoding()
    # All of these have a VAE.
    return (phase.budget["temporaries"] + phase.budget["other models"]) / GIB if phase else 0.0


@lru_cache(maxsize=8)
def _seconds(policy: str, given: tuple[tuple[str, Any], ...]) -> float:
    return sum(phase.seconds for phase in replay(pieces({**dict(given), "checkpointing": policy})))


def _share(it: Iteration) -> float:
    s = it.settings
    given = tuple((name, getattr(s, name)) for name in ("model", "frames", "height", "width"))
    return 100 * (1 - _seconds("none", given) / _seconds("full", given))


@dataclass(frozen=True)
class Figure:
    """One number of the earlier count.

    Attributes:
        subject: what is run.
        what: the number's meaning.
        given: settings of the plan that answers it.
        of: reads the answer off the plan's pieces, in `unit`.
        earlier: the number as it was published.
        unit: GiB (2^30), GB (10^9) or a share in %.
        why: the reason, where the two differ by more than `WITHIN` and by more than the rounding.
    """

    subject: str
    what: str
    given: Given
    of: Callable[[Iteration], float]
    earlier: str
    unit: str = "GiB"
    why: str = ""

    @property
    def number(self) -> float:
        """The earlier count's."""
        return float(self.earlier)

    @property
    def rounding(self) -> float:
        """Half a unit of the last digit that was published."""
        return 0.5 * 10.0 ** -len(self.earlier.partition(".")[2])

    def answer(self) -> float:
        """The planner's."""
        return self.of(pieces(self.given))


VIDEO: Given = {"model": "hunyuan-video", "frames": 53, "height": 480, "width": 640}
HD: Given = {"model": "hunyuan-video", "frames": 129, "height": 720, "width": 1280}
FLUX: Given = {"model": "flux-dev", "height": 720, "width": 720}
SD: Given = {"model": "sd14", "micro_batch": 8}
MASTERS: Given = {"dtype": "float32", "mixed_precision": "bf16"}
LORA: Given = {"lora": 32, "lora_dtype": "bfloat16"}
# Generations of one iteration, whose trajectories are kept.
GROUP: Given = {"checkpointing": "full", "group_size": 24}

PARTS = "one digit; its own peak leaves 22.5 beside 41 kept and 95.5 of weights, gradients and states"
ABOUT = "published as about; here counted work over assumed rates"
COPIES = "checkpointing here drops the bf16 copies of a block's weights after it; the earlier count kept all 24 GiB"
CAST = "on CUDA, autocast hands attention bf16 queries, keys and values; the earlier count kept them in float32"


def _policies(subject: str, given: Given, figures: dict[str, tuple[str, str]], why: dict[str, str]) -> Iterator[Figure]:
    """Of each policy what is kept ("" if it was not published) and the peak."""
    for policy, (kept, peak) in figures.items():
        asked = {**given, "checkpointing": policy}
        for what, of, number in (("kept", _kept, kept), ("peak", _peak, peak)):
            if number:
                yield Figure(subject, f"{policy}: {what}", asked, of, number, why=why.get(policy, ""))


def _all() -> Iterator[Figure]:
    video, hd, flux = "HunyuanVideo 53 x 480 x 640", "HunyuanVideo 129 x 720 x 1280", "FLUX.1-dev 720 x 720"
    full = {
        "none": ("157", "253"),
        "full": ("5.9", "105"),
        "attention": ("11.9", "111"),
        "matmul": ("60.6", "159"),
    }
    yield from _policies(f"{video}, all weights", VIDEO, full, {})
    lora = {"none": ("97", "122"), "full": ("5.9", "33"), "attention": ("11.9", "39")}
    yield from _policies(f"{video}, LoRA 32", VIDEO | LORA, lora, {})
    masters = {"none": ("241", "432"), "full": ("32.5", "224")}
    yield from _policies(f"{video}, float32 masters", VIDEO | MASTERS, masters, {"none": CAST, "full": COPIES})
    yield Figure(video, "rollout: kept", VIDEO | GROUP, _rollout_kept, "1.8")
    yield Figure(video, "rollout: peak", VIDEO | GROUP, _rollout, "25.7")
    yield Figure(video, "share of full checkpointing in a micro-step", VIDEO, _share, "25", "%", ABOUT)
    yield from _policies(f"{hd}, all weights", HD, {"full": ("41", "159")}, {})
    yield Figure(f"{hd}, all weights", "full: recomputing a block", HD | GROUP, _recomputed, "20", why=PARTS)
    yield from _policies(f"{hd}, LoRA 32", HD | LORA, {"full": ("41", "85")}, {})
    yield Figure(hd, "rollout: kept", HD | GROUP, _rollout_kept, "12.4")
    yield Figure(hd, "rollout: peak", HD | GROUP, _rollout, "36")
    yield from _policies(f"{flux}, all weights", FLUX, {"none": ("16.6", "105"), "full": ("0.8", "90")}, {})
    yield from _policies(f"{flux}, LoRA 32", FLUX | LORA, {"none": ("", "33"), "full": ("", "24")}, {})
    sd = {"none": ("6.8", "13.5"), "full": ("1.1", "8.2")}
    yield from _policies("Stable Diffusion 1.4 512 x 512, batch 8", SD, sd, {})
    step = FLUX | {"checkpointing": "full"}
    yield Figure(flux, "foreach AdamW: more in its step", step | {"optimizer": "adamw_foreach"}, _copy, "22")
    yield Figure(flux, "fused AdamW: more in its step", step | {"optimizer": "adamw"}, _copy, "0")
    shards = VIDEO | MASTERS | {"rollout_replica": True}
    for count, states in ((4, "51"), (8, "26"), (16, "13"), (32, "6.4")):
        what = "weights, gradients and states a GPU"
        yield Figure(f"{video}, float32 masters on {count} GPUs", what, shards | {"fsdp": count}, _states, states, "GB")
    yield Figure(f"{video}, float32 masters on 8 GPUs", "bf16 replica", shards | {"fsdp": 8}, _replica, "25.6", "GB")
    for subject, given, untiled, tiled in ((video, VIDEO, "11.8", "3.0"), (hd, HD, "35", "3.8")):
        decoded = given | LORA | {"offload": ("denoiser",)}
        yield Figure(subject, "decode, untiled", decoded | {"vae_tiling": "off"}, _decode, untiled)
        yield Figure(subject, "decode, tiled", decoded | {"vae_tiling": "on"}, _decode, tiled)
    for subject, given, size in ((video, VIDEO, "1.75"), (hd, HD, "12.4")):
        yield Figure(subject, "trajectories of 24 generations", given | GROUP, _trajectories, size, "GB")
    indexed = VIDEO | GROUP | {"trajectory_copies": 2}
    yield Figure(video, "the same, indexed into a copy", indexed, _trajectories, "3.5", "GB")


FIGURES = tuple(_all())


def row(figure: Figure, where: Row) -> Row:
    """One line of the results. `off` is the answer over the earlier number, less 1; None where that is 0."""
    answer = figure.answer()
    off = None if figure.number == 0 else round(answer / figure.number - 1, 6)
    why = figure.why
    if off is not None and abs(off) > WITHIN and not why:
        why = "the earlier figure is rounded" if abs(answer - figure.number) <= figure.rounding else "unknown"
    return {
        "op": "earlier count",
        "subject": figure.subject,
        "what": figure.what,
        "settings": figure.given,
        "earlier": figure.earlier,
        "predicted": round(answer, 6),
        "unit": figure.unit,
        "off": off,
        "why": why if off is not None and abs(off) > WITHIN else None,
        "environment": where,
    }


def rows(where: Row, only: str = "") -> list[Row]:
    """Of every figure whose subject contains `only`."""
    return [row(figure, where) for figure in FIGURES if only in figure.subject]


def markdown(found: list[Row]) -> str:
    """All of it."""
    off = [each for each in found if each["why"]]
    lines = [
        "# Memory: the planner beside an earlier count",
        "",
        "Made by `python -m bench.memory --only rows`. Both columns are predictions: the earlier ones were made on",
        "fake tensors by other code, before the planner was written, and published with two or three digits; nothing",
        "here was measured on a GPU. GiB = 2^30, GB = 10^9 bytes. bfloat16 and batch 1 where nothing else is said.",
        "Peaks: of the denoiser's forward and backward with gradients and states there, without other models and",
        "trajectories. Kept: activations at that peak. Decode: the VAE with its weights. Left out are the earlier",
        "count's float32 gathers under FSDP (the planner's are bfloat16), what the cheapest policy gains (no settings",
        "were given), and that FLUX LoRA needs no checkpointing on 80 GB (no number).",
        made_with(found[0]),
        "",
        f"{len(found)} figures, {len(off)} further off than {100 * WITHIN:g} %, each with its reason.",
        "",
    ]
    rows = []
    for each in found:
        percent = "" if each["off"] is None else f"{100 * each['off']:+.1f} %"
        predicted, why = f"{each['predicted']:.2f}", each["why"] or ""
        rows.append([each["subject"], each["what"], each["earlier"], predicted, each["unit"], percent, why])
    head = ["", "figure", "earlier", "predicted", "unit", "off", "why, beyond 2 %"]
    return "\n".join([*lines, *grid(head, rows)]) + "\n"
