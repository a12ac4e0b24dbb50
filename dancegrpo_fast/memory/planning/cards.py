"""Cards: what torch has of their memory, and what they do in a second."""

import re
from dataclasses import dataclass

# Of what single operators were measured to reach, what eager models do. Cards with HBM are too quick for many of them:
# fitted on FLUX.1-dev, 1024, 50 steps in 12 s on an H100. Those with GDDR memory are not: on its forward, 0.5 s on
# an L40. Both are judged on the other rows of docs/how-far-off.md.
EAGER, EAGER_GDDR = 0.73, 1.0
EAGER_RATES = ("tflops", "attention_tflops", "bandwidth_gb_s")
# Of a data sheet's bandwidth, where nobody's measurement was found.
COPIED = 0.88


@dataclass(frozen=True)
class Rates:
    """What a device is assumed to do; seconds are counted work over these, not timings.

    Attributes:
        tflops: of bfloat16 matrix products and convolutions, TFLOP/s.
        attention_tflops: of attention.
        bandwidth_gb_s: of device memory, 10^9 bytes a second.
        pcie_gb_s: to and from host memory, one way.
        link_gb_s: between devices, one way.
        launch_us: that the host takes for each operator of an eager model, in microseconds: 53.7 ms for 1,185 were
            measured in github.com/facebookresearch/sam2/issues/768.
    """

    tflops: float = 577.0
    attention_tflops: float = 270.0
    bandwidth_gb_s: float = 1878.0
    pcie_gb_s: float = 52.8
    link_gb_s: float = 380.0
    launch_us: float = 45.0


@dataclass(frozen=True)
class Card:
    """One kind of card.

    Attributes:
        label: as people call it.
        gb: in its name.
        gib: the least that torch was seen to have of it, by `total_memory` or an out-of-memory message.
        device: for the choice of attention.
        rates: assumed.
    """

    label: str
    gb: int
    gib: float
    device: str
    rates: Rates

    @property
    def size(self) -> str:
        """The name of its size."""
        return f"{self.gb} GB"


def eager(device: str) -> float:
    """What eager models reach of single operators on a device of this name."""
    return EAGER_GDDR if re.search(r"\b(RTX|L40|L40S|L4|A10|A10G|A40)\b", device) else EAGER


def _card(
    label: str,
    gb: int,
    gib: float,
    arch: int,
    tflops: float,
    attention: float,
    bandwidth: float,
    pcie: float = 25.0,
    link: float | None = None,
) -> Card:
    """Of what single operators reach; without links of their own, cards speak over PCIe."""
    share = eager(label)
    products, attended, copied = (round(share * value, 1) for value in (tflops, attention, bandwidth))
    rates = Rates(products, attended, copied, pcie, link or pcie)
    return Card(label, gb, gib, f"cuda:sm{arch}", rates)


# Others' measurements: matrix products of bfloat16 (PyTorch), attention forward without a mask (FlashAttention-2; where
# nobody's was found, as far below products as an H100's), copies in device memory, to the host, and between cards.
# bench/memory/evidence/cards.jsonl has the sources.
CARDS = {
    "h100": _card("H100 SXM", 80, 79.10, 90, 790, 370, 2573, 52.8, 380),
    "h100-pcie": _card("H100 PCIe", 80, 79.11, 90, 496, 230, 1860, 52.8),
    "h200": _card("H200", 141, 139.72, 90, 790, 370, COPIED * 4800, 55.0, 396),
    "h20": _card("H20", 96, 95.0, 90, 142, 84, COPIED * 4000, 52.8, 380),
    "gh200": _card("GH200", 96, 94.5, 90, 790, 370, COPIED * 4000, 300.0, 380),
    "b200": _card("B200", 180, 178.35, 100, 1696, 800, COPIED * 8000, 55.0, 760),
    "b300": _card("B300", 288, 267.69, 103, 1769, 830, COPIED * 8000, 55.0, 760),
    "a100-80": _card("A100", 80, 79.15, 80, 265, 185, 1727, 25.1, 250),
    "a100-40": _card("A100", 40, 39.38, 80, 240, 185, 1355, 25.1, 250),
    "l40s": _card("L40S", 48, 44.52, 89, 269, 126, COPIED * 864),
    "a6000": _card("RTX A6000", 48, 47.53, 86, 123, 80, COPIED * 768),
    "6000-ada": _card("RTX 6000 Ada", 48, 44.43, 89, 269, 126, COPIED * 960),
    "rtx-pro-6000": _card("RTX PRO 6000", 96, 94.96, 120, 410, 190, COPIED * 1792, 55.0),
    "a10g": _card("A10G", 24, 22.06, 86, 70, 50, COPIED * 600, 19.6),
    "l4": _card("L4", 24, 22.03, 89, 71, 45, COPIED * 300),
    "4090": _card("RTX 4090", 24, 23.52, 89, 165, 130, 921, 25.5),
    "3090": _card("RTX 3090", 24, 23.68, 86, 76, 55, COPIED * 936),
    "5090": _card("RTX 5090", 32, 31.36, 120, 220, 187, COPIED * 1792, 56.3),
    "5080": _card("RTX 5080", 16, 15.92, 120, 103, 85, COPIED * 960, 55.0),
    "4080": _card("RTX 4080", 16, 15.67, 89, 97, 75, COPIED * 717),
    "4070-ti-super": _card("RTX 4070 Ti SUPER", 16, 15.56, 89, 91, 70, COPIED * 672),
    "4070": _card("RTX 4070", 12, 11.60, 89, 58, 45, COPIED * 504),
    "3060": _card("RTX 3060", 12, 11.64, 86, 25, 18, COPIED * 360),
}
# Which card is meant by a size alone.
MEANT = ("4070", "4070-ti-super", "4090", "5090", "a100-40", "l40s", "h100", "gh200", "h200", "b200", "b300")
SIZES = {CARDS[name].size: CARDS[name].gib for name in MEANT}
USUAL = "h100"


def card(name: str) -> Card:
    """The card of this name.

    Raises:
        ValueError: it is not known.
    """
    if name not in CARDS:
        raise ValueError(f'card: got "{name}", want one of {", ".join(CARDS)}, or --gpu with its GiB')
    return CARDS[name]


def named(device: str, gib: float) -> str | None:
    """The name of the card that a device of CUDA's is, by the words of its name and its memory, or None.

    Args:
        device: by `torch.cuda.get_device_name`: "NVIDIA H100 80GB HBM3".
        gib: by `total_memory`.
    """
    words = set(re.split(r"[ -]", device.upper()))
    wanted = {name: set(found.label.upper().split()) - {"SXM"} for name, found in CARDS.items()}
    same = [name for name in CARDS if wanted[name] <= words and abs(CARDS[name].gib / gib - 1) < 0.05]
    return max(same, key=lambda name: len(wanted[name]), default=None)


def of_size(gb: float) -> str | None:
    """The name of the card that is meant by so many GB, or None."""
    return next((name for name in MEANT if CARDS[name].gb == gb), None)
