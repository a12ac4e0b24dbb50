"""Why an attention backend must not be used for a call."""

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checks import check_bool, check_int, check_number
from ..patch import _unwrapped
from ..patch._ragged import varlen_place
from .facts import COPIED_MASK, FACTS, FLOATS, MASKS, NO_MASK

GIB = 2**30


@dataclass(frozen=True)
class Shapes:
    """What the model's longest attention gets.

    Attributes:
        batch: samples of one forward.
        tokens: queries, and as many keys: latent tokens, with the text's where the model joins them.
        dtype: of queries, keys and values, float16, bfloat16, float32 or float64; under autocast the autocast dtype.
        equal_text: all prompts of a batch have equally many valid tokens, as within one group of GRPO.
    """

    batch: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    equal_text: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "tokens"):
            check_int(f"shapes.{name}", getattr(self, name), 1)
        if self.dtype not in FLOATS:
            raise ValueError(f"shapes.dtype: got {self.dtype}, want one of {', '.join(map(str, FLOATS))}")
        check_bool("shapes.equal_text", self.equal_text)


@dataclass(frozen=True)
class Case:
    """One question, with everything that was looked up for it."""

    shapes: Shapes
    heads: int
    head_dim: int
    head_dims: tuple[int, ...]
    device: str
    capability: tuple[int, int]
    training: bool
    mask: str
    mask_condition: str
    ragged: bool
    valid_keys_lead: bool
    dispatches: bool
    parallel: str
    max_scores_gib: float

    @property
    def masked(self) -> bool:
        """Whether attention gets a mask."""
        return self.mask == "kept"

    def scores(self, itemsize: int) -> int:
        """Bytes of the score matrix at `itemsize` bytes a number."""
        return self.shapes.batch * self.heads * self.shapes.tokens**2 * itemsize

    @property
    def wide(self) -> int:
        """Bytes of a number in the unfused formula."""
        return max(4, self.shapes.dtype.itemsize)


def _device(device: torch.device | str) -> tuple[str, tuple[int, int]]:
    """Its type and compute capability; (0, 0) on the CPU."""
    described = re.fullmatch(r"cuda:sm_?(\d+)(\d)a?", device) if isinstance(device, str) else None
    if described:
        return "cuda", (int(described[1]), int(described[2]))
    wanted = 'a CPU or NVIDIA device, or a description such as "cuda:sm90"'
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: got {device!r}, want {wanted}") from None
    if found.type == "cpu":
        return "cpu", (0, 0)
    if found.type != "cuda" or torch.version.hip is not None:
        raise ValueError(f"device: got {device!r}, want {wanted}")
    if not torch.cuda.is_available():
        raise ValueError(f"device: got {device!r} where torch sees no CUDA device, want {wanted}")
    return "cuda", torch.cuda.get_device_capability(found)


def _trims_text(model: nn.Module) -> bool:
    """Whether the model was accelerated with `trim_text`."""
    function = getattr(vars(model).get("forward"), "__func__", None)
    return function is not None and inspect.unwrap(function).__qualname__.startswith("trimmed_forward.")


def _mask_of(model: nn.Module, shapes: Shapes, ragged: bool) -> tuple[str, str]:
    """Whether a mask comes (none, kept or dropped), and under what condition."""
    when = MASKS[type(model).__name__].when
    if when == "never":
        return "none", "this family hands none to attention"
    if ragged:
        return "dropped", "each sample attends to its own valid tokens (trim_text), but not in compiled blocks"
    if when == "given" and (shapes.equal_text or shapes.batch == 1):
        return "dropped", "with the text cut to its length and encoder_hidden_states_mask=None"
    why = (
        "prompts of a batch differ in length (equal_text=False)" if when == "given" else "this family always builds one"
    )
    if _trims_text(model):
        return "kept", f"{why}, and context parallelism splits padded text"
    return "kept", f"{why}; accelerate(trim_text=True) goes without"


def attentions(model: nn.Module) -> list[Any]:
    """The attention modules of a diffusers model."""
    return [m for m in model.modules() if hasattr(m, "processor") and hasattr(m, "heads") and hasattr(m, "inner_dim")]


def case_of(
    model: nn.Module,
    shapes: Shapes,
    device: torch.device | str,
    training: bool,
    max_scores_gib: float,
    parallel: str | None = None,
) -> Case:
    """What the rules look at, of a model called with `shapes` on `device`; None: as parallel as it is."""
    if not isinstance(shapes, Shapes):
        raise ValueError(f"shapes: got {shapes!r}, want attention.Shapes(batch, tokens, dtype)")
    check_bool("training", training)
    check_number("max_scores_gib", max_scores_gib, 0.0, wanted="a number of GiB, at least 0")
    model = _unwrapped(model)
    if type(model).__name__ not in MASKS or not attentions(model):
        raise ValueError(f"model: got {type(model).__name__}, want one of diffusers' {', '.join(MASKS)}")
    layers = attentions(model)
    widths = sorted({(m.inner_dim, m.heads, m.inner_dim // m.heads) for m in layers})
    told = [m.processor for m in layers if hasattr(m.processor, "_attention_backend")]
    if parallel is None:
        configs = [c for p in told if (c := getattr(p, "_parallel_config", None)) is not None]
        ring = bool(configs) and configs[0].context_parallel_config.ring_degree > 1
        parallel = "ring" if ring else "ulysses" if configs else ""
    kind, capability = _device(device)
    ragged = _trims_text(model) and not parallel
    mask, condition = _mask_of(model, shapes, ragged)
    return Case(
        shapes,
        heads=widths[0][1],
        head_dim=widths[0][2],
        head_dims=tuple(sorted({width[2] for width in widths})),
        device=kind,
        capability=capability,
        training=training,
        mask=mask,
        mask_condition=condition,
        ragged=ragged,
        valid_keys_lead=MASKS[type(model).__name__].valid_keys_lead,
        dispatches=bool(told),
        parallel=parallel,
        max_scores_gib=max_scores_gib,
    )


def sdpa_kernels(case: Case) -> list[str]:
    """The fused kernels that torch's SDPA tries, in its order, as far as they take the call."""
    if case.device == "cpu":
        return ["CPU flash"]
    # torch prefers cuDNN (newer than 9.15) on these, and elsewhere puts it behind the math fallback.
    order = ["_native_flash", "_native_efficient"]
    if case.capability[0] in (9, 10):
        order.insert(0, "_native_cudnn")
    return [FACTS[name].kernel for name in order if not _kernel_refusal(name, case) and not _mask_refusal(name, case)]


def kernel_of(name: str, case: Case) -> str:
    """What runs under this backend."""
    if name == "native":
        return (sdpa_kernels(case) or ["math"])[0]
    return "CPU flash" if case.device == "cpu" and name == "_native_flash" else FACTS[name].kernel


def shares_call(name: str, case: Case) -> bool:
    """Whether one call of this backend takes samples of unequal length."""
    dtype, dims = case.shapes.dtype, case.head_dims
    return case.ragged and all(varlen_place(name, case.capability, dtype, dim) is not None for dim in dims)


def _kernel_refusal(name: str, case: Case) -> str:
    """Why the kernel cannot run on this device, dtype or head size, or nothing."""
    facts = FACTS[name]
    if facts.device != "any" and case.device not in facts.device.split(" or "):
        return f"runs on {facts.device}, not on {case.device}"
    if case.device == "cpu" or facts.device == "any":
        return ""
    low, high = facts.capability
    if not low <= case.capability <= high:
        return f"needs compute capability {low[0]}.{low[1]} to {high[0]}.{high[1]}, got {_dotted(case.capability)}"
    dtype = case.shapes.dtype
    if dtype not in facts.dtypes or (dtype == torch.bfloat16 and case.capability < (8, 0)):
        return f"does not take {dtype} here"
    step, most = facts.head_dims
    # 16 bytes at a time, so half the numbers in float32.
    step = 4 if facts.kernel in ("efficient", "xformers") and dtype == torch.float32 else step
    for dim in case.head_dims:
        if dim % step or dim > most:
            return f"takes head sizes that are multiples of {step} up to {most}, got {dim}"
    consumer = (8, 6) <= case.capability <= (8, 9) or case.capability[0] == 12
    if name == "_native_flash" and case.training and consumer and any(192 < dim <= 224 for dim in case.head_dims):
        return "cannot train head sizes of 193 to 224 on this device"
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if name == "_native_cudnn" and strict:
        return "is not deterministic, which torch.use_deterministic_algorithms wants"
    return ""


def _mask_refusal(name: str, case: Case) -> str:
    """Why the mask that the model hands over cannot be taken, or nothing."""
    facts = FACTS[name]
    if not case.masked:
        return ""
    if facts.mask == NO_MASK:
        return f"takes no mask, and the model has one: {case.mask_condition}"
    if facts.mask == COPIED_MASK:
        size = case.scores(case.shapes.dtype.itemsize) / GIB
        return f"copies the mask to {size:.3g} GiB a layer, and adds it as 1 and 0 instead of 0 and -inf: wrong results"
    if facts.valid_keys_lead and not case.valid_keys_lead:
        return "keeps the first keys of a masked sample, and this model's padding is in the middle: wrong results"
    return ""


def _scores_refusal(name: str, case: Case) -> str:
    """Why scores may not be held, or nothing."""
    size = case.scores(case.wide) / GIB
    if kernel_of(name, case) not in ("math", "flex") or size <= case.max_scores_gib:
        return ""
    limit = f"{size:.3g} GiB of scores a layer, over max_scores_gib={case.max_scores_gib:g}"
    return f"no fused kernel takes this, and math holds {limit}" if name == "native" else f"holds {limit}"


def refusal(name: str, case: Case) -> str:
    """Why a backend must not be used, or nothing. What installing something would not change comes first."""
    facts = FACTS[name]
    if not case.dispatches and name != "native":
        return "the model's attention processors call torch's SDPA whatever backend is set"
    if case.training and facts.no_backward:
        return f"cannot train: {facts.no_backward}"
    if case.training and name == "flex" and case.device == "cpu":
        return "cannot train on the CPU"
    if reason := _kernel_refusal(name, case) or _mask_refusal(name, case):
        return reason
    if (facts.syncs == "always" and not case.ragged) or (facts.syncs and case.masked):
        return "reads lengths back from the device in every layer, which stops the queue"
    if reason := _scores_refusal(name, case):
        return reason
    if case.parallel and not registry()._is_context_parallel_available(_name(name)):
        return "does not support context parallelism, which the model has enabled"
    if case.parallel == "ring" and name == "native":
        return "gives no log-sum-exp, which ring attention needs"
    return _missing(name)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def registry() -> Any:
    """diffusers' attention backends."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return _AttentionBackendRegistry


def _name(backend: str) -> Any:
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName(backend)


def _missing(name: str) -> str:
    """What the backend needs and diffusers does not find, or nothing."""
    from diffusers.models.attention_dispatch import _check_attention_backend_requirements

    try:
        _check_attention_backend_requirements(_name(name))
    except RuntimeError:
        return f"needs {FACTS[name].package}, which is missing or too old"
    return ""


def known() -> list[str]:
    """Names of diffusers' attention backends."""
    return [backend.value for backend in registry().list_backends()]
