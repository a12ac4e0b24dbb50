"""Whether a run fits a card: the answer, margins, launches, and gradients reduced as often as the card wants."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dancegrpo_fast.memory.planning import policy
from dancegrpo_fast.memory.planning.blocks import Blocks
from dancegrpo_fast.memory.planning.cards import CARDS
from dancegrpo_fast.memory.planning.cases import Case, kernel
from dancegrpo_fast.memory.planning.cases import case_of as planned_case
from dancegrpo_fast.memory.planning.iteration import Iteration
from dancegrpo_fast.memory.planning.margins import CONTEXT, limit, margins, with_margins
from dancegrpo_fast.memory.planning.planner import Plan, _asked, plan
from dancegrpo_fast.memory.planning.settings import GIB, Settings

from .small import FLUX, phase_of, tiny

pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("collected_once")


def test_the_answer_comes_first(flux: Plan) -> None:
    """Whether it fits the card, what is spare, and the smallest that holds it, each card with a policy of its own."""
    asked = flux.settings.changed(height=1024, width=1024, checkpointing="auto", rewards=(), vae_tiling="off")
    fits = plan(asked.on("h100"), advise=False)
    mine = next(each for each in fits.cards if each.size == "80 GB")
    assert (mine.state, mine.policy, mine.gib) == ("yes", "none", CARDS["h100"].gib)
    assert mine.spare_bytes == int(mine.gib * GIB) - fits.total_bytes
    first = fits.table().splitlines()[0]
    spare = mine.spare_bytes / GIB
    assert first.startswith(
        f"Fits 80 GB with {spare:.1f} GiB to spare (H100 SXM: 79.10 GiB as torch sees it). Smallest"
    )
    kept = {each.policy: each for each in fits.cards if each.gib > 20}
    assert len(kept) > 4
    for each in kept.values():
        # Without the answers of other cards.
        _, _, alone = _asked(asked.changed(gpu_gib=each.gib))
        assert (each.state == "yes") == alone.fits(each.gib)
        assert each.state != "yes" or alone.seconds <= each.seconds * 1.001
    # With recomputation it is on a smaller card than without.
    bare = plan(asked.changed(checkpointing="none"), advise=False)
    smallest = [min(each.gib for each in found.cards if each.state == "yes") for found in (fits, bare)]
    assert smallest[0] < smallest[1]


def test_gradients_are_reduced_as_often_as_the_card_wants() -> None:
    given = Settings("flux-dev", height=256, width=256, attention="flash", checkpointing="full", fsdp=8)
    update, call = (plan(given.changed(gradient_sync=name), advise=False) for name in ("update", "call"))
    assert update.total_bytes > call.total_bytes
    for gib, wanted in ((update.total_bytes / GIB, update), (update.total_bytes / GIB - 0.1, call)):
        found = plan(given.changed(gpu_gib=gib), advise=False)
        assert found.phases == wanted.phases and found.fits(gib)
        assert any(reason.startswith("gradient_sync call: ") for reason in found.reasons) == (wanted is call)


def test_smaller_cards_reduce_as_often_as_they_want() -> None:
    given = Settings("flux-dev", height=256, width=256, attention="flash", checkpointing="full", fsdp=8)
    call = plan(given.changed(gradient_sync="call"), advise=False)
    found = plan(given, advise=False)
    assert found.gradient_sync == "update" and found.settings.gradient_sync == "auto"
    assert {each.size for each in found.cards if each.state == "yes"} == {
        each.size for each in found.cards if each.gib * GIB >= call.total_bytes
    }
    smallest = next(each for each in found.cards if each.state == "yes")
    assert smallest.gib * GIB < found.total_bytes


@pytest.mark.release
def test_gradients_are_reduced_after_every_call_where_that_is_faster() -> None:
    given = Settings("flux-dev", height=256, width=256, attention="flash", fsdp=8, gradient_sync="update")
    full, none = (plan(given.changed(checkpointing=name), advise=False).total_bytes for name in ("full", "none"))
    given = given.changed(gradient_sync="auto", gpu_gib=(full + none) / 2 / GIB)
    chosen = {}
    for link in (10.0, 1e6):
        found = plan(given.changed(rates=replace(given.rates, link_gb_s=link)), advise=False)
        chosen[found.gradient_sync] = found
    assert list(chosen) == ["update", "call"] and chosen["call"].policy == "none" != chosen["update"].policy
    (why,) = (reason for reason in chosen["call"].reasons if reason.startswith("gradient_sync call: "))
    assert "with more recomputation" in why


def test_flash_says_whose_masks_it_does_not_take() -> None:
    for model, frames, said in (("hunyuan-video", 5, True), ("flux-dev", 1, False), ("sd14", 1, False)):
        given = Settings(model, frames=frames, height=256, width=256, attention="flash")
        _, why = kernel(planned_case(given, 1, "flash", train=True), "flash", "cuda:sm90", True)
        assert ("takes no mask" in why) is said and why.startswith("attention flash: as asked")


@pytest.mark.parametrize("model", ["hunyuan-video", "qwen-image"])
def test_fast_block_ops_go_without_the_mask_of_unequal_prompts(model: str) -> None:
    """The line says so; what is traced has the mask, as lengths are not known."""
    given = Settings(model, frames=5 if model == "hunyuan-video" else 1, height=256, width=256, attention="auto")
    found = {}
    for ops in ("lossless", "fast"):
        case = planned_case(given.changed(block_ops=ops), 2, "flash", train=True)
        found[ops] = kernel(case, "auto", "cuda:sm80", False)
        if ops == "fast":
            assert "takes no mask" not in kernel(case, "flash", "cuda:sm80", False)[1]
    assert found["lossless"][0] == "efficient" and "FA2" not in found["lossless"][1]
    assert found["fast"][0] == "flash"
    assert "FA2" in found["fast"][1] and "prompts of unequal length in" in found["fast"][1]


def test_three_states(flux: Plan) -> None:
    exact, whole = flux.peak_bytes, flux.total_bytes
    between = (exact + CONTEXT * GIB + whole) / 2 / GIB
    at = {gib: plan(flux.settings.changed(gpu_gib=gib), advise=False) for gib in (whole / GIB, between, exact / GIB)}
    found = [next(each.state for each in there.cards if each.gib == gib) for gib, there in at.items()]
    assert found == ["yes", "within the guesses", "no"]
    assert at[between].table().startswith("Within the guesses on ")


def test_a_small_model_is_bound_by_its_launches(flux: Plan, tmp_path: Path) -> None:
    """Twice the host's cost takes twice as long, and the plan says why; a large one does not notice."""
    tiny("unet")[0].save_config(tmp_path / "unet")  # type: ignore[operator]  # diffusers' method
    small = plan(Settings(str(tmp_path), checkpointing="none", attention="flash"), advise=False)
    slow = plan(small.settings.changed(rates=replace(small.settings.rates, launch_us=90.0)), advise=False)
    assert phase_of(slow, "replay forward").seconds == pytest.approx(2 * phase_of(small, "replay forward").seconds)
    assert any(reason.startswith("launch-bound: ") for reason in small.reasons)
    large = plan(flux.settings.changed(height=1024, width=1024, checkpointing="none"), advise=False)
    assert not any(reason.startswith("launch-bound: ") for reason in large.reasons)


def test_memory_beside_tensors(flux: Plan) -> None:
    """Segments that expand reserve less; processes that share weights reserve more."""
    alone = margins(flux.settings, GIB)["fragmentation"]
    assert margins(flux.settings.changed(expandable_segments=False), GIB)["fragmentation"] > alone
    shared = margins(flux.settings.changed(fsdp=8), GIB)
    assert shared["fragmentation"] > alone and "NCCL" in shared
    exact = limit(flux.settings, 24.0)
    assert with_margins(flux.settings, exact) == pytest.approx(24 * GIB)


def test_a_model_by_name_is_planned() -> None:
    by_name = plan("flux-dev", height=256, width=256, lora=16, checkpointing="full", attention="flash", advise=False)
    assert by_name == plan(Settings(**FLUX, lora=16, checkpointing="full"), advise=False)  # type: ignore[arg-type]  # any setting


def test_what_a_model_changes_in_place_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """CogVideoX turns queries in place, and torch refuses policies that keep them."""
    it = Iteration(Settings("flux-dev", height=256, width=256, lora=8, attention="flash"))
    compose = policy.compose

    def refusing(case: Case, policies: Any, **more: Any) -> Blocks:
        if isinstance(policies, list) and set(policies) - {"none", "full"}:
            raise RuntimeError("Tensor cached during selective activation checkpoint has been mutated")
        return compose(case, policies, **more)

    def peak(blocks: Blocks) -> float:
        return max(phase.bytes for phase in it.training(blocks))

    monkeypatch.setattr(policy, "compose", refusing)
    limit = (peak(compose(it.replay, "none")) + peak(compose(it.replay, "full"))) / 2
    found = policy.automatic(it.settings, it.replay, peak, lambda _: 1.0, limit)
    assert set(found.blocks.policies) == {"none", "full"}
    assert peak(found.blocks) <= limit
