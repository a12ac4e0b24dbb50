"""`dancegrpo-fast rates`: what the device at hand does in a second, measured and kept for plans."""

import datetime
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence

ROWS = {
    "tflops": "matrix products, TFLOP/s",
    "attention_tflops": "attention, TFLOP/s",
    "bandwidth_gb_s": "copy in its memory, GB/s",
    "pcie_gb_s": "to and from the host, GB/s",
    "link_gb_s": "between devices, GB/s",
    "launch_us": "start of an operator, us",
}


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise ArgumentTypeError(f"got {text}, want a finite number above 0")
    return found


def main(arguments: Sequence[str]) -> int:
    """Measures the device at hand in about 20 seconds, prints it beside what plans assume, and keeps it for plans."""
    parser = ArgumentParser(prog="dancegrpo-fast rates", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda where torch sees one, or cpu)")
    parser.add_argument("--seconds", type=_seconds, default=20.0, help="that it takes, about (default: 20)")
    asked = parser.parse_args(arguments)
    import torch

    from ..memory.planning.cards import CARDS, named
    from ..memory.planning.measured import keep, kept, name_of, planned
    from ..memory.speeds import measure
    from ..progress import say, working

    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = name_of(device)
    if name is None:
        seen = f"cpu, or one of the {torch.cuda.device_count()} CUDA devices that torch sees"
        print(f"dancegrpo-fast rates: device: got {device}, want {seen}", file=sys.stderr)
        return 2
    # Refuses a file that is not ours before the time is spent.
    kept(name)
    cuda = device != "cpu"
    card = named(name, torch.cuda.get_device_properties(device).total_memory / 2**30) if cuda else None
    assumed = CARDS[card].rates if card else None
    with working(f"measuring {name}"):
        link = assumed.link_gb_s if assumed else None
        reached = measure(torch.device(device), seconds=asked.seconds, link_gb_s=link)
    counted = planned(reached, name)
    rows = [["", "measured", "in plans", f"{CARDS[card].label}, assumed" if card else "assumed"]]
    for rate, what in ROWS.items():
        shown = "-" if rate == "link_gb_s" else f"{getattr(reached, rate):.4g}"
        rows.append([what, shown, f"{getattr(counted, rate):.4g}", f"{getattr(assumed, rate):.4g}" if assumed else "-"])
    # Before anything is printed, as the reader of a pipe may go.
    file = keep(name, reached, torch.__version__, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    say(f"{name}, torch {torch.__version__}, bfloat16")
    for what, *cells in rows:
        say(f"{what:28}" + "".join(f"{cell:>24}" if i == 2 else f"{cell:>12}" for i, cell in enumerate(cells)))
    say(f"kept in {file}: plans for this {'device' if cuda else 'CPU (--device cpu)'} count with them, and say so")
    return 0
