"""Reward models by name: how many parameters each has, and where the number comes from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reward:
    """A reward model: how many parameters, bytes of each as the trainer loads it unasked, and the number's source."""

    name: str
    parameters: int
    source: str
    bytes_per_parameter: int = 4

    @property
    def bytes(self) -> int:
        """Of all parameters."""
        return self.parameters * self.bytes_per_parameter


_CLIP_H = "transformers.CLIPModel with the configuration of laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_CLIP_L = "transformers.CLIPModel with the configuration of openai/clip-vit-large-patch14"
REWARDS = {
    reward.name: reward
    for reward in (
        Reward("hps", 986_109_441, _CLIP_H),
        Reward("pickscore", 986_109_441, _CLIP_H),
        Reward("clip_score", 427_616_513, _CLIP_L),
        Reward("clip_score_h", 986_109_441, _CLIP_H),
        Reward(
            "videoalign",
            2_208_987_136,
            "transformers.Qwen2VLModel of Qwen/Qwen2-VL-2B-Instruct and Linear(1536, 1)",
            bytes_per_parameter=2,
        ),
    )
}


# A recipe's rewards by the model that they share; HPS-v2.1 and the three of VideoAlign among them.
REWARD_MODELS = {name: name for name in ("hps", "pickscore", "clip_score")} | {
    f"videoalign_{part}": "videoalign" for part in ("vq", "mq", "ta")
}
