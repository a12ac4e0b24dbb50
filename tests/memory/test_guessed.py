"""Denoisers of classes that have no specification."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo_fast.memory.planning import guessed, specs
from dancegrpo_fast.memory.planning.blocks import compose
from dancegrpo_fast.memory.planning.cases import Kind, kinds_of
from dancegrpo_fast.memory.planning.planner import plan
from dancegrpo_fast.memory.planning.settings import Settings

from ..release import release_but
from ..tolerances import COMPOSED
from .pipelines import write
from .small import case_of
from .test_planner_composed import composed, whole_trace

pytest.importorskip("diffusers")

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
AURA = HEADS | {
    "_class_name": "AuraFlowTransformer2DModel",
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_mmdit_layers": 3,
    "num_single_dit_layers": 5,
    "joint_attention_dim": 8,
    "caption_projection_dim": 32,
    "pos_embed_max_size": 1024,
}
PACKED = HEADS | {
    "_class_name": "OvisImageTransformer2DModel",
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "joint_attention_dim": 8,
    "axes_dims_rope": [4, 6, 6],
}
LUMINA = {
    "_class_name": "Lumina2Transformer2DModel",
    "sample_size": 32,
    "in_channels": 4,
    "hidden_size": 32,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "cap_feat_dim": 8,
    "axes_dim_rope": [4, 6, 6],
}
VIDEO = HEADS | {
    "_class_name": "WanVACETransformer3DModel",
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 4,
    "vace_layers": [0, 2],
    "vace_in_channels": 12,
    "rope_max_seq_len": 32,
}
CONFIGS = {"AURA": AURA, "LUMINA": LUMINA, "VIDEO": VIDEO}


def folder(path: Path, config: dict[str, Any], vae: dict[str, Any] | None = None) -> Path:
    return write(path, None, transformer=config, **({} if vae is None else {"vae": vae}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of a configuration, the same for all tests: what is guessed is guessed once."""
    return cache(lambda name: folder(tmp_path_factory.mktemp(name), CONFIGS[name]))


@pytest.mark.parametrize(
    ("config", "vae", "layout", "kinds"),
    [
        pytest.param(
            *(AURA, None, "[B, C, H, W]", (("joint_transformer_blocks", 3), ("single_transformer_blocks", 5))),
            marks=pytest.mark.release,
        ),
        (
            PACKED,
            {"latent_channels": 4},
            "[B, tokens, C]",
            (("transformer_blocks", 2), ("single_transformer_blocks", 3)),
        ),
        pytest.param(
            *(LUMINA, None, "[B, C, H, W]", (("noise_refiner", 1), ("context_refiner", 1), ("layers", 3))),
            marks=pytest.mark.release,
        ),
        # Its blocks of one list run within the other's, so that all of it is traced.
        pytest.param(
            *(VIDEO, {"temperal_downsample": [False, True, True]}, "[B, C, T, H, W]", ()), marks=pytest.mark.release
        ),
    ],
)
def test_inputs_and_blocks_are_found(
    tmp_path: Path, config: dict[str, Any], vae: Any, layout: str, kinds: tuple[tuple[str, int], ...]
) -> None:
    spec = specs.resolve(folder(tmp_path, config, vae))
    [assumed] = spec.assumed
    assert config["_class_name"] in assumed and f"latents as {layout}" in assumed
    assert kinds_of(spec) == tuple(Kind(path, 0, count, 1) for path, count in kinds)


@pytest.mark.usefixtures("collected_once")
@pytest.mark.parametrize("name", release_but(("AURA",), CONFIGS))
def test_few_blocks_say_what_all_do(folders: Callable[[str], Path], name: str) -> None:
    case = case_of(folders(name), 128)
    assert composed(compose(case, "full")) == pytest.approx(whole_trace(case, "full"), rel=COMPOSED)


def test_the_plan_says_what_was_assumed(folders: Callable[[str], Path]) -> None:
    found = plan(Settings(str(folders("AURA")), 1, 64, 64, checkpointing="full"), advise=False)
    assert any("has no specification: assumed to be called with" in reason for reason in found.reasons)
    assert any("there is no model_index.json" in reason for reason in found.reasons)


def test_what_cannot_be_guessed_is_refused_by_name(tmp_path: Path) -> None:
    config = {"_class_name": "GlmImageTransformer2DModel"}
    with pytest.raises(ValueError, match="nothing is known of its prior_token_id, prior_token_drop"):
        specs.resolve(folder(tmp_path / "a", config))
    with pytest.raises(
        ValueError, match=r"which no guess of its inputs runs.*latents as .*no width of text embeddings"
    ):
        specs.resolve(folder(tmp_path / "b", {"_class_name": "PRXTransformer2DModel"}))
    with pytest.raises(ValueError, match='model: got a "AutoencoderKL" in'):
        specs.resolve(folder(tmp_path / "c", {"_class_name": "AutoencoderKL"}))


def test_masks_count_as_valid() -> None:
    mask, x = torch.tensor([True, False, True]), torch.arange(3)
    lengths = []

    class Picks(torch.nn.Module):
        def forward(self) -> torch.Tensor:
            lengths.extend(mask[None].long().sum(1).tolist())
            return torch.cat([x[mask], x[~mask]])

    model = Picks()
    guessed.count_masked(model)
    assert model().tolist() == [0, 1, 2]
    assert Picks()().tolist() == [0, 2, 1] and lengths[-1] == 2
