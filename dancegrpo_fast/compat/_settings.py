"""What `dancegrpo-fast run` was asked for. Needs no torch, and travels to child processes."""

from dataclasses import dataclass

ROUNDINGS = ("exact", "reference")
# As in `backends`, which needs torch.
BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
LATENTS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Settings:
    """Options of `run`; `only` and `skip` are names as the report has them, `None` leaves a thing alone."""

    rounding: str = "exact"
    backend: str = "auto"
    latents: str | None = None
    accelerate: str | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    report: str | None = None
