"""Speeds of a device: measured, kept, and counted with by the plans of that device alone."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dancegrpo_fast.cli import main
from dancegrpo_fast.cli.memory import parse
from dancegrpo_fast.memory import speeds
from dancegrpo_fast.memory.planning import cards, measured
from dancegrpo_fast.memory.planning.cards import CARDS, EAGER, Rates
from dancegrpo_fast.memory.planning.settings import Settings
from dancegrpo_fast.models.planning import settings_of

from ..train.tiny import make_recipe

pytest.importorskip("jsonargparse")

CPU = torch.device("cpu")
SMALL = speeds.Sizes(side=32, heads=2, tokens=32, width=16, bytes=1 << 12, blocks=1)
REACHED = Rates(*(float(value) for value in range(1, 7)))
# Before tests put another in its place.
PATH = measured.path


def kept_of_the_cpu() -> str:
    name = measured.name_of("cpu")
    assert name is not None and name.endswith(", 1 threads")
    measured.keep(name, REACHED, "2.13", "2026-01-01")
    return name


def test_a_cpu_is_measured() -> None:
    state = torch.get_rng_state()
    found = speeds.measure(CPU, seconds=0.1, sizes=SMALL)
    assert all(math.isfinite(rate) and rate > 0 for rate in vars(found).values())
    assert found.bandwidth_gb_s == pytest.approx(2 * found.pcie_gb_s)
    assert found.link_gb_s == found.pcie_gb_s
    assert speeds.measure(CPU, seconds=0.1, sizes=SMALL, link_gb_s=5.0).link_gb_s == 5.0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("takes", [0.003, 0.5])
def test_a_call_is_timed_by_a_clock(takes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(speeds.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += takes

    assert speeds.timed(call, CPU, 1.0) == pytest.approx(takes)
    # The first call, spells of twice as many until one is long, and then until the time is over.
    assert 1.0 <= now[0] < 1.0 + takes + 2 * max(speeds.SPELL, takes) * 2


def test_what_is_kept_is_counted_with_as_eager_models_reach_it(unmeasured: Path) -> None:
    assert measured.kept("A card") is None
    measured.keep("A card", REACHED, "2.13", "2026-01-01")
    measured.keep("Another", replace(REACHED, tflops=9.0), "2.13", "2026-01-02")
    found = measured.kept("A card")
    assert found == Rates(EAGER, 2 * EAGER, 3 * EAGER, 4.0, 5.0, 6.0)
    assert measured.kept("A third") is None
    measured.keep("A card", replace(REACHED, launch_us=8.0), "2.14", "2026-01-03")
    assert [measured.kept(name).launch_us for name in ("A card", "Another")] == [8.0, 6.0]  # type: ignore[union-attr]
    assert [file.name for file in unmeasured.parent.iterdir()] == ["rates.json"]


def test_the_file_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert PATH() == tmp_path / "dancegrpo_fast" / "rates.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PATH() == tmp_path / ".cache" / "dancegrpo_fast" / "rates.json"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("not JSON", "no JSON"),
        ("[1]", "no devices"),
        ('{"A card": {"speed": 1}}', 'other entries of "A card"'),
        (json.dumps({"A card": {"rates": vars(REACHED) | {"tflops": 0}}}), 'tflops 0 of "A card"'),
        (json.dumps({"A card": {"rates": vars(REACHED) | {"launch_us": float("inf")}}}), "launch_us inf"),
        (json.dumps({"A card": {"rates": vars(REACHED) | {"more": 1.0}}}), "other entries"),
    ],
)
def test_other_files_are_refused_and_stay(
    text: str, what: str, unmeasured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unmeasured.parent.mkdir()
    unmeasured.write_text(text)
    with pytest.raises(ValueError, match=r"^rates: got .*rates\.json with .*, want what `dancegrpo-fast rates`") as e:
        measured.kept("A card")
    assert what in str(e.value)
    assert main(["rates", "--device", "cpu"]) == 1
    assert main(["memory", "sd14", "--device", "cpu"]) == 2
    shown = capsys.readouterr()
    assert shown.err.count(str(unmeasured)) == 2 and not shown.out
    assert unmeasured.read_text() == text


def test_the_command_prints_and_keeps(
    unmeasured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(speeds.SIZES, "cpu", SMALL)
    assert main(["rates", "--device", "cpu", "--seconds", "0.1"]) == 0
    shown = capsys.readouterr().out
    [(name, entry)] = json.loads(unmeasured.read_text()).items()
    assert name == measured.name_of("cpu") and shown.startswith(f"{name}, torch {torch.__version__}, bfloat16\n")
    assert f"{entry['rates']['tflops']:.4g}" in shown and f"{EAGER * entry['rates']['tflops']:.4g}" in shown
    assert str(unmeasured) in shown
    assert main(["rates", "--device", "cuda:99"]) == 2
    assert "device: got cuda:99, want cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["rates", "--seconds", "0"])
    assert "got 0, want a finite number above 0" in capsys.readouterr().err


def test_plans_of_this_device_count_with_them_and_no_others(diffusion: Path, tmp_path: Path) -> None:
    name = kept_of_the_cpu()
    found = parse(["sd14", "--device", "cpu"]).settings
    assert (found.rates, found.measured) == (measured.planned(REACHED, name), name)
    for other in ([], ["--card", "4090"], ["--gpu", "80"], ["--gpu", "77"], ["--device", "cuda:sm80"]):
        assert parse(["sd14", *other]).settings.measured == ""
    assert parse(["sd14", "--card", "4090"]).settings.rates == CARDS["4090"].rates
    faster = parse(["sd14", "--device", "cpu", "--rates.tflops", "50"]).settings
    assert faster.rates.tflops == 50.0 and faster.rates.launch_us == 6.0 and faster.measured == ""
    recipe = make_recipe(diffusion, tmp_path / "run", mixed_precision="bf16")
    assert settings_of(recipe, device="cpu").measured == name
    assert settings_of(recipe, device="cpu", processes=2).measured == ""
    assert settings_of(recipe).measured == ""
    assert found.on("h100").measured == "" and Settings("sd14").measured == ""


def test_a_gpu_at_hand_is_planned_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = SimpleNamespace(total_memory=150_000_000_000, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: seen)
    assert parse(["sd14"]).settings.measured == ""
    measured.keep("NVIDIA H200", REACHED, "2.13", "2026-01-01")
    found = parse(["sd14"]).settings
    assert (found.measured, found.device, found.gpu_gib) == ("NVIDIA H200", "cuda:sm90", 139.69)
    assert found.rates == measured.planned(REACHED, "NVIDIA H200")
    assert (
        parse(["sd14", "--gpu", "100"]).settings.measured == parse(["sd14", "--card", "h200"]).settings.measured == ""
    )


@pytest.mark.parametrize(
    ("device", "gib", "card"),
    [
        ("NVIDIA H100 80GB HBM3", 79.18, "h100"),
        ("NVIDIA H100 PCIe", 79.11, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", 39.39, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.15, "a100-80"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 15.6, "4070-ti-super"),
        ("NVIDIA GeForce RTX 4090", 23.55, "4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None),
        ("NVIDIA RTX 6000 Ada Generation", 47.4, None),
        ("NVIDIA RTX 6000 Ada Generation", 44.5, "6000-ada"),
        ("NVIDIA L40S", 44.5, "l40s"),
        ("Tesla T4", 14.6, None),
    ],
)
def test_cards_are_known_by_torchs_name_of_them(device: str, gib: float, card: str | None) -> None:
    assert cards.named(device, gib) == card
