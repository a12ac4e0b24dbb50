"""`evaluation:` of a recipe."""

from dataclasses import dataclass, field, replace

from .checks import at_least, check_fields, positive
from .rewards import RewardSettings
from .sampler import SamplerSettings

# Fields of a row of `evaluations.jsonl` that are no scores.
FIELDS = ("iteration", "sampler", "dropped", "diversity", "diversity_accepted", "accepted_prompts")


@dataclass
class EvaluationSettings:
    """Samples from fixed prompts and noises, scored but never trained on.

    Args:
        every: iterations between evaluations; the first and the last are always evaluated.
        prompts: file of the prompts; null takes the training prompts.
        samples_per_prompt: fixed noises of each prompt; at least 2 in training, which follows the diversity.
        rewards: scores to report, at least one, trained on or not.
        accepted_by: the one of `rewards`, as tables call it, that accepts a sample by a score above 1/2; the diversity
            of the accepted samples is reported, too. null: it is not.
        grid_samples: samples of each prompt in the pictures; null: 3, or as many as there are.
        grid_prompts: prompts in the pictures, the first of the file.
        samplers: "ode": without noise, as users sample; "sde": as in training.
        num_steps: of a sample; null: the sampler's, as in the four below.
        height: in pixels.
        width: in pixels.
        guidance_scale: of the model.
        guidance_scale_2: of the second of two denoisers.
        ema: of a run with `train.ema_decay`, or a checkpoint of one, the average is evaluated, else what is trained.
    """

    every: int = 10
    prompts: str | None = None
    samples_per_prompt: int = 4
    rewards: list[RewardSettings] = field(default_factory=list)
    accepted_by: str | None = None
    grid_samples: int | None = None
    grid_prompts: int = 10
    samplers: list[str] = field(default_factory=lambda: ["ode", "sde"])
    num_steps: int | None = None
    height: int | None = None
    width: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    ema: bool = True

    def __post_init__(self) -> None:
        check_fields("evaluation", self, ["prompts"])
        at_least("evaluation.every", self.every, 1)
        at_least("evaluation.samples_per_prompt", self.samples_per_prompt, 1)
        at_least("evaluation.grid_prompts", self.grid_prompts, 1)
        if not self.rewards:
            raise ValueError("evaluation.rewards: got none, want at least one score")
        titles = [one.title() for one in self.rewards]
        if taken := sorted(set(titles) & set(FIELDS)):
            raise ValueError(
                f'evaluation.rewards: got "{taken[0]}", which is something else in its rows, want another label'
            )
        if self.accepted_by is not None and self.accepted_by not in titles:
            raise ValueError(f'evaluation.accepted_by: got "{self.accepted_by}", want one of {titles}, or null')
        if self.grid_samples is not None and not 1 <= self.grid_samples <= self.samples_per_prompt:
            raise ValueError(
                f"evaluation.grid_samples: got {self.grid_samples}, "
                f"want 1 to samples_per_prompt, {self.samples_per_prompt}"
            )
        known = ("ode", "sde")
        if not self.samplers or len(set(self.samplers)) < len(self.samplers) or set(self.samplers) - set(known):
            raise ValueError(f"evaluation.samplers: got {self.samplers}, want one or both of {list(known)}")
        if self.num_steps is not None:
            at_least("evaluation.num_steps", self.num_steps, 2)
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                positive(f"evaluation.{name}", getattr(self, name))

    def sampling(self, training: SamplerSettings) -> SamplerSettings:
        """How samples are drawn here: as in training, but for what is set."""
        fields = ("num_steps", "height", "width", "guidance_scale", "guidance_scale_2")
        own = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        try:
            return replace(training, **own)
        except ValueError as error:
            raise ValueError(f"evaluation: {error}") from error
