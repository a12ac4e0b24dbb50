"""What GPUs that share a sample's tokens send each other between a denoiser's blocks."""

from . import specs
from .cases import Case, kinds_of, resolved
from .settings import Settings

# Of an element of queries, keys, values and results, and of a ring's gradients.
WIDTH, SUMMED = 2, 4


def exchanged(case: Case) -> tuple[float, float]:
    """Bytes that one GPU sends in a forward and in its backward.

    Ulysses' queries, keys, values and results, or in a backward their gradients, but for the N-th that stays. In
    diffusers' ring each gets the keys and values of all others, in a backward again; there their gradients go round
    once, in float32.
    """
    count, spec = case.sequence_parallel, resolved(case.spec)
    if count == 1:
        return 0.0, 0.0
    heads = spec.config["num_attention_heads"] * spec.config["attention_head_dim"]
    own = specs.tokens(spec, case.frames, case.height, case.width, case.reference)
    if spec.denoiser != "WanTransformer3DModel":
        own += case.text_tokens or spec.text_tokens
    one = case.rows * own / count * heads * sum(kind.blocks for kind in kinds_of(spec))
    if case.sequence_kind == "ring":
        gathered = 2 * one * WIDTH * (count - 1)
        return gathered, gathered + 2 * one * SUMMED * count
    moved = 4 * one * WIDTH * (count - 1) / count
    return moved, moved


def exchange_seconds(settings: Settings, case: Case) -> tuple[float, float]:
    """Of a forward and its backward, in which nothing else runs meanwhile."""
    forward, backward = exchanged(case)
    return forward / (settings.rates.link_gb_s * 1e9), backward / (settings.rates.link_gb_s * 1e9)


def told(settings: Settings, case: Case) -> list[str]:
    """What a plan says of it."""
    count, spec = settings.sequence_parallel, resolved(case.spec)
    if count == 1:
        return []
    tokens = specs.tokens(spec, case.frames, case.height, case.width, case.reference)
    text = case.text_tokens or spec.text_tokens
    shared = spec.denoiser != "WanTransformer3DModel"
    forward, backward = (seconds * 1e3 for seconds in exchange_seconds(settings, case))
    return [
        f"sequence_parallel {count} by {settings.sequence_kind}: a GPU has {tokens // count} of {tokens} tokens and "
        f"{text // count if shared else text} of {text} of text; a call of {case.rows} rows waits "
        f"{forward:.1f} ms for the others, its backward {backward:.1f}"
    ]
