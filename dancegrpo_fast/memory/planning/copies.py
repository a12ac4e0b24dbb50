"""What is on the device beside one denoiser and its states: a second expert, other parts, copies of the weights."""

from dataclasses import replace

from .calls import Vector, added
from .cases import Case
from .folders import Part
from .settings import GIB, Settings
from .sharding import REDUCE, Rest, stored_width, weights_of
from .specs import Spec


def has_second(settings: Settings, spec: Spec) -> bool:
    """Whether two denoisers take turns along the steps.

    Raises:
        ValueError: the settings speak of a second one that is not there.
    """
    asked = "expert" in settings.offload or settings.second_expert == "frozen"
    if spec.experts == 1 and asked:
        name, got = ("offload", "expert") if "expert" in settings.offload else ("second_expert", "frozen")
        raise ValueError(f'{name}: got "{got}" for {spec.name}, which has one denoiser')
    return spec.experts > 1 and settings.second_expert != "left_out"


def with_second(rest: Rest, settings: Settings) -> Rest:
    """Of both denoisers, of which one runs; an optimiser steps one after the other."""
    waits, trained = "expert" in settings.offload, settings.second_expert == "trained"

    def twice(vector: Vector, both: bool) -> Vector:
        return added((2 if both else 1, vector))

    return replace(
        rest,
        weights=twice(rest.weights, not waits),
        gradients=twice(rest.gradients, trained),
        reduced=twice(rest.reduced, trained),
        optimizer=twice(rest.optimizer, trained),
        step_traffic=rest.step_traffic * (2 if trained else 1),
    )


def copies(settings: Settings, case: Case, experts: int) -> float:
    """Bytes of the model of a KL, frozen experts and all, and of a moving average, on each device."""
    weights, shards = weights_of(case), settings.fsdp if settings.is_sharded else 1
    trained = experts if settings.second_expert == "trained" else 1
    held = 0.0
    if settings.kl_reference and not settings.lora:
        held += experts * weights.trainable_bytes * stored_width(case)
    if settings.ema:
        held += trained * REDUCE * weights.trainable
    return held / shards


def encoder_bytes(settings: Settings, spec: Spec) -> int:
    """Of what makes the conditions."""
    return sum(part.bytes(settings.frozen_dtype, settings.text_encoder_quantization) for part in spec.text_encoders)


def other_bytes(settings: Settings, spec: Spec) -> int:
    """Of parts that are neither denoiser, VAE nor encoder."""
    return sum(part.bytes(settings.frozen_dtype) for part in spec.others)


def words(settings: Settings, spec: Spec) -> list[str]:
    """What is counted beside the denoiser and the VAE, what is not, and what was assumed."""

    def listed(parts: tuple[Part, ...], quantization: str) -> str:
        return ", ".join(f"{part.name} {part.bytes(settings.frozen_dtype, quantization) / GIB:.2f}" for part in parts)

    found = list(spec.assumed)
    if spec.text_encoders:
        kind = settings.text_encoder_quantization
        stored = settings.frozen_dtype + ("" if kind == "none" else f", linear layers in {kind}")
        found.append(f"encoders, GiB in {stored}: {listed(spec.text_encoders, kind)}")
    if spec.others:
        found.append(f"other parts, GiB, always on the device: {listed(spec.others, 'none')}")
    if spec.missing:
        found.append(f"not counted: {'; '.join(spec.missing)}")
    if has_second(settings, spec):
        turn = "" if spec.boundary_ratio is None else f", the second below {spec.boundary_ratio:g} of the noise"
        where = "the other's weights wait on the host" if "expert" in settings.offload else "both on the device"
        found.append(f"two denoisers take turns{turn}: {where}, the second {settings.second_expert}")
    elif spec.experts > 1:
        found.append("the second denoiser is left out")
    if settings.kl_reference and settings.lora:
        found.append("kl_reference: nothing is held, as LoRA layers are switched off for it")
    if settings.reference_height:
        found.append(
            "a picture to edit: its tokens are in every call; encoding it, and what it adds to the text, are not"
        )
    return found
