"""Rewards, one file each, behind one protocol: `RewardInput -> float32 [B]`."""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..install import missing
from ..progress import counted
from ..prompts import Prompt
from ..recipe import RewardSettings
from .asking import ask
from .base import Checking as Checking
from .base import Movable as Movable
from .base import Reward as Reward
from .base import RewardInput as RewardInput
from .base import UnscoredError as UnscoredError
from .win_rate import win_rates

BY_NAME = {
    "hps": "dancegrpo_fast.rewards.hps:Hps",
    "clip_score": "dancegrpo_fast.rewards.clip_score:ClipScore",
    "pickscore": "dancegrpo_fast.rewards.pickscore:PickScore",
    "aesthetic": "dancegrpo_fast.rewards.aesthetic:Aesthetic",
    "videoalign_vq": "dancegrpo_fast.rewards.videoalign:VideoQuality",
    "videoalign_mq": "dancegrpo_fast.rewards.videoalign:MotionQuality",
    "videoalign_ta": "dancegrpo_fast.rewards.videoalign:TextAlignment",
    "geneval": "dancegrpo_fast.rewards.geneval:GenEval",
    "http_judge": "dancegrpo_fast.rewards.http_judge:HttpJudge",
    "http_preference": "dancegrpo_fast.rewards.http_judge:HttpPreference",
    "digit_probability": "dancegrpo_fast.demo.rewards.digits:DigitProbability",
    "digit_judge": "dancegrpo_fast.demo.rewards.digits:DigitJudge",
    "motion_alignment": "dancegrpo_fast.demo.rewards.motion:MotionAlignment",
    "motion_quality": "dancegrpo_fast.demo.rewards.motion:MotionQuality",
    "moving_digit": "dancegrpo_fast.demo.rewards.motion:MovingDigit",
    "moving_digit_judge": "dancegrpo_fast.demo.rewards.motion:MovingDigitJudge",
    "first_frame": "dancegrpo_fast.demo.rewards.motion:FirstFrame",
    "ocr": "dancegrpo_fast.rewards.ocr:OcrReward",
    "ocr_exact": "dancegrpo_fast.rewards.ocr:OcrExact",
}


def find_reward(name: str) -> Any:
    """The class or function of a reward of this package, or of `module:callable`.

    Raises:
        ValueError: no such reward or module.
    """
    target = BY_NAME.get(name, name)
    module_name, _, attribute = target.partition(":")
    if not attribute:
        raise ValueError(f'rewards: got "{name}", want one of {sorted(BY_NAME)} or "module:callable"')
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f'rewards: got "{name}", which does not import: {missing(error)}') from error
    factory = getattr(module, attribute, None)
    if factory is None:
        raise ValueError(f'rewards: got "{name}", which {module.__file__} does not have')
    return factory


def check_reward(settings: RewardSettings) -> Any:
    """What the settings name, which takes their arguments; nothing is constructed.

    Raises:
        ValueError: no such reward or module, or arguments its constructor does not take.
    """
    factory = find_reward(settings.name)
    if not isinstance(factory, type):
        if settings.args:
            raise ValueError(f'rewards: got args for "{settings.name}", which is a function and takes none')
        return factory
    try:
        inspect.signature(factory).bind(**settings.args)
    except TypeError as error:
        raise ValueError(f'rewards: "{settings.name}" does not take {settings.args}: {error}') from error
    return factory


def build_reward(settings: RewardSettings) -> Reward:
    """The reward that the settings name, constructed with their arguments.

    Raises:
        ValueError: as `check_reward`, or something is not installed.
    """
    factory = check_reward(settings)
    if not isinstance(factory, type):
        return cast(Reward, factory)
    try:
        return cast(Reward, factory(**settings.args))
    except ImportError as error:
        raise ValueError(f'rewards: "{settings.name}" needs what is not installed: {missing(error)}') from error


class RewardSet:
    """Several rewards, scored together and checked: nothing is scored by default.

    Attributes:
        names: of the rewards, as metrics and tables show them.
        weights: of their advantages.
        compares_groups: a score depends on the other samples of its group, which must be scored together.
    """

    def __init__(self, settings: Sequence[RewardSettings]) -> None:
        self._settings = list(settings)
        self._rewards = [build_reward(one) for one in self._settings]
        self.names = [one.title() for one in self._settings]
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"rewards: got {self.names}, want each one once, or a label for each")
        self.weights = [one.weight for one in self._settings]
        self.compares_groups = any(
            one.win_rate or getattr(reward, "compares_groups", False)
            for one, reward in zip(self._settings, self._rewards, strict=True)
        )

    def __call__(self, inputs: RewardInput) -> Tensor:
        """Scores float32 `[K, B]` on the CPU; NaN where a reward drops a sample.

        Raises:
            RuntimeError: a reward returned something other than B floats, or did not score a sample that its `on_error`
                does not drop.
            ValueError: a win rate is wanted in a group of one.
        """
        rows = []
        for settings, reward in counted(list(zip(self._settings, self._rewards, strict=True)), "rewards"):
            row = ask(reward, settings, inputs)
            if settings.threshold is not None:
                row = torch.where(row.isnan(), row, (row > settings.threshold).float())
            elif settings.win_rate:
                row = win_rates(row, inputs.group.cpu())
            rows.append(row)
        return torch.stack(rows)

    def check_dropped(self, scores: Tensor) -> None:
        """Raises RuntimeError where a reward left out more of all samples `[K, B]` than its `max_dropped`."""
        for settings, name, row in zip(self._settings, self.names, scores, strict=True):
            missing, count = int(row.isnan().sum()), len(row)
            if missing > settings.max_dropped * count:
                raise RuntimeError(
                    f"rewards.max_dropped: {name} left out {missing} of {count} samples, want at most "
                    f"{settings.max_dropped:g} of them"
                )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Asks every reward that can tell whether it can score these prompts.

        Raises:
            ValueError: one cannot.
        """
        texts, meta = [prompt.text for prompt in prompts], [prompt.meta for prompt in prompts]
        for settings, reward in zip(self._settings, self._rewards, strict=True):
            if isinstance(reward, Checking):
                try:
                    reward.check(texts, meta)
                except ValueError as error:
                    raise ValueError(f'rewards: "{settings.name}" cannot score all prompts: {error}') from error

    def to(self, device: str | torch.device) -> None:
        """Moves every reward that holds a model to `device`; the others stay as they are."""
        for reward in self._rewards:
            if isinstance(reward, Movable):
                reward.to(device)
