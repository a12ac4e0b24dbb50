"""What the fuzzed calls are drawn from: tensors of any layout, settings, and what no argument may be."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")


@dataclass
class Call:
    """One call of an op, how to judge its result, and for each argument the values that must be refused by name.

    Without `check` the call is one to refuse whatever is drawn; without `refused` it is only judged.
    """

    op: Callable[..., Any]
    arguments: dict[str, Any]
    check: Callable[[Any], None] | None
    refused: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def run(self) -> Any:
        return self.op(**self.arguments)

    def __str__(self) -> str:
        return f"{self.op.__name__}({', '.join(f'{name}={shown(v)}' for name, v in self.arguments.items())})"


def shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    layout = f"strides {value.stride()}" if value.layout == torch.strided else str(value.layout)
    return f"<{value.dtype} {tuple(value.shape)} {layout} on {value.device}>"


class Draw:
    """Everything random of one call; the same number always draws the same."""

    def __init__(self, number: int) -> None:
        self.rng = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)

    def of(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def maybe(self, share: float = 0.5) -> bool:
        return self.rng.random() < share

    def normal(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        """Contiguous normals, exact in `dtype`."""
        return torch.randn(shape, generator=self.generator, dtype=F64).to(dtype)

    def laid_out(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        """Normals with strides as users have them."""
        values = self.normal(*shape, dtype=dtype)
        how = self.rng.randrange(6)
        if how == 0:
            return values.transpose(1, -1).contiguous().transpose(1, -1)
        if how == 1:
            return torch.cat([values, values], dim=-1)[..., : shape[-1]]
        if how == 2:
            return torch.stack([values, values], dim=1)[:, 1]
        if how == 3:
            return torch.stack([values, values], dim=-1)[..., 0]
        if how == 4 and len(shape) > 2:
            return values[:, :1].expand(shape)
        return values

    def integers(self, count: int, low: int, high: int) -> Tensor:
        return torch.tensor([self.rng.randrange(low, high) for _ in range(count)])


ODD = (object(), 1 + 2j, {"a": 1}, "abc")


def no_tensor(good: Tensor, optional: bool = False, any_shape: bool = False) -> tuple[Any, ...]:
    """What a float tensor like `good` may not be; `any_shape`: where nothing else says shape and device."""
    detached = good.detach()
    others = (detached[None, None], torch.cat([detached, detached], dim=-1), detached.to("meta"))
    return (
        *(() if optional else (None,)),
        detached.tolist(),
        detached.float().numpy(),
        detached.to(torch.int32),
        detached.to(torch.complex64),
        detached.contiguous().to_sparse(),
        *(() if any_shape else others),
        1.5,
        *ODD,
    )


def no_number(low: float | None = None, optional: bool = False, infinite: bool = False) -> tuple[Any, ...]:
    below = () if low is None else (low - 1.0, low - 1e-3)
    limits = (-INF,) if infinite else (INF, -INF, 10**400)
    return (*below, *limits, *(() if optional else (None,)), NAN, True, torch.tensor(1.0), [1.0], np.ones(1), *ODD)


def no_int(low: int, high: int | None = None, optional: bool = False) -> tuple[Any, ...]:
    above = () if high is None else (high + 1, 2**70)
    return (low - 1, *above, *(() if optional else (None,)), 1.0, True, torch.tensor(1), [1], np.ones(1), *ODD)


def no_index(rows: int, batch: int) -> tuple[Any, ...]:
    """What a step of a table may not be."""
    good = torch.zeros(batch, dtype=torch.int64)
    outside = [good.clone().index_fill_(0, torch.tensor([0]), value) for value in (-1, rows, 2**40)]
    tensors = (good.int(), good.float(), good[None], torch.cat([good, good]), good.to("meta"), *outside)
    return (-1, rows, 2**70, None, 1.0, True, [0], np.zeros(batch, dtype=np.int64), *tensors, *ODD)


NO_SWITCH: tuple[Any, ...] = (None, 0, 1, "yes", torch.tensor(True), np.bool_(True), *ODD)
NO_WORD: tuple[Any, ...] = (None, 1, True, "", "Auto", ["auto"], torch.zeros(2), np.zeros(2), torch.float32, *ODD)
NO_DTYPE: tuple[Any, ...] = ("float32", 1, torch.int32, torch.complex64, torch.float8_e5m2, float, np.float32, *ODD)
