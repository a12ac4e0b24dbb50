"""What settings get wrong is said before text is encoded or a denoiser is loaded."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dancegrpo_fast.models import family_of, loading
from dancegrpo_fast.models.base import DiffusersModel
from dancegrpo_fast.recipe import EvaluationSettings, LoraSettings, ModelSettings, RewardSettings
from dancegrpo_fast.train.loop import Trainer

from .tiny import make_recipe, reward

WRONG = [
    ({"family": "sd3"}, 'model.family: got "sd3" for the FluxTransformer2DModel of .*, want "flux"'),
    ({"family": "waltz"}, 'model.family: got "waltz", want one of flux, '),
    ({"kind": "ode"}, 'sampler.kind: got "ode", want one with noise'),
    ({"kind": "ddim"}, 'sampler.kind: got "ddim", want one of .* for a flow model'),
    ({"eta": 0.0}, "sampler.eta: got 0, want more than 0"),
    ({"window": [3]}, r"sampler.window: got \[3\], want at least one step with noise before the last"),
    ({"timestep_fraction": 0.1}, "train.timestep_fraction: got 0.1 of 3 stochastic steps before the last"),
    ({"width": 18}, "sampler: got height 16, width 18, want multiples of 4"),
    ({"lora": LoraSettings(target_modules=["to_q", "to_w"])}, "model.lora.target_modules: got to_w, want endings"),
    ({"rewards": [reward("Nothing")]}, 'rewards: got ".*tiny:Nothing", which .*tiny.py does not have'),
    ({"prompts": "none.txt"}, "prompts: got none.txt, which does not exist"),
]


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing large may be touched."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("too late")

    for name in ("_open_store", "load_from"):
        monkeypatch.setattr(DiffusersModel, name, refuse)


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: "" if isinstance(value, str) else str(*value))
def test_settings_are_refused_before_any_work(
    flux: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Trainer(make_recipe(flux, tmp_path / "run", **changes))


@pytest.mark.usefixtures("lazy")
def test_rewards_of_evaluation_are_looked_up_first(flux: Path, tmp_path: Path) -> None:
    recipe = make_recipe(flux, tmp_path / "run")
    for settings, message in (
        (RewardSettings("nothing"), 'rewards: got "nothing", want one of'),
        (RewardSettings("digit_judge", args={"colour": 1}), 'rewards: "digit_judge" does not take'),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(replace(recipe, evaluation=EvaluationSettings(rewards=[settings])))


def test_a_pipelines_index_is_held_to_the_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    index = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert family_of(ModelSettings("stable_diffusion", str(tmp_path))).family == "stable_diffusion"
    with pytest.raises(ValueError, match=r'got "flux" for the UNet2DConditionModel of .*, want "stable_diffusion"'):
        family_of(ModelSettings("flux", str(tmp_path)))
    larger = {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index | larger))
    with pytest.raises(ValueError, match="a StableDiffusionXLPipeline with text_encoder_2, want the family of that"):
        family_of(ModelSettings("stable_diffusion", str(tmp_path)))
    # Of a name on the hub, the index alone is fetched.
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda name: index)
    with pytest.raises(ValueError, match='got "sd3" for the UNet2DConditionModel of owner/model'):
        family_of(ModelSettings("sd3", "owner/model"))

    def unreachable(name: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", unreachable)
    with pytest.raises(ValueError, match=r"model.path: got owner/model, want .* can be reached \(no network\)"):
        loading.pipeline_index("owner/model")
