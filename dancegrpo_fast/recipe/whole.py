"""A run, whole."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ..checks import shown
from .checks import at_least, check_fields
from .evaluation import EvaluationSettings
from .model import ModelSettings
from .rewards import RewardSettings
from .sampler import SamplerSettings
from .train import TrainSettings


@dataclass
class Recipe:
    """A whole run.

    Args:
        name: what the run is called, in its folder and its lines.
        model: the generator.
        sampler: how samples are drawn.
        prompts: a file of prompts, or a folder of them (`dancegrpo_fast.prompts.load_prompts`).
        rewards: what is maximised; several rewards sum their advantages.
        train: the optimisation.
        evaluation: what is measured beside it; null: nothing.
        tracking: who is told: "tensorboard", "wandb", "mlflow", "trackio", "swanlab", "aim", "comet_ml", "clearml",
            "dvclive"; `[]` for none.
        output_dir: of metrics, checkpoints and pictures; null: `runs/<name>`.
        seed: everything random follows from it.
        checkpoint_every: iterations between checkpoints.
        keep_checkpoints: how many of the newest stay.
        threads: torch's CPU threads; null: the processors this process may use.
    """

    name: str
    model: ModelSettings
    sampler: SamplerSettings
    prompts: str
    rewards: list[RewardSettings]
    train: TrainSettings
    evaluation: EvaluationSettings | None = None
    tracking: list[str] = field(default_factory=lambda: ["tensorboard"])
    output_dir: str | None = None
    seed: int = 0
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    threads: int | None = None

    def __post_init__(self) -> None:
        check_fields("", self, ["prompts", "output_dir"])
        if not self.rewards:
            raise ValueError("rewards: got none, want at least one")
        if "block_inputs" in self.train.offload and self.model.checkpointing == "none":
            raise ValueError('train.offload: got "block_inputs" with model.checkpointing "none", want it to checkpoint')
        self._check_expert()
        self._check_passes()
        self._check_compile()
        at_least("seed", self.seed, 0)
        at_least("checkpoint_every", self.checkpoint_every, 1)
        at_least("keep_checkpoints", self.keep_checkpoints, 1)
        if self.threads is not None:
            at_least("threads", self.threads, 1)

    def _check_expert(self) -> None:
        """What `train.offload` moves of denoisers has to stay as it is, and whole."""
        model = self.model
        others = {
            "all weights trained (model.lora null)": model.lora is None,
            f'model.quantization "{model.quantization}"': model.quantization in ("nf4", "int8"),
            f"model.blocks_to_swap {model.blocks_to_swap}": model.blocks_to_swap != 0,
        }
        for what, there in others.items():
            if there and "expert" in self.train.offload:
                raise ValueError(f'train.offload: got "expert" with {what}, want one of them')
        if model.quantization == "int8" and "denoiser" in self.train.offload:
            # bitsandbytes keeps its codes beside the parameters that torch would move.
            raise ValueError(
                'train.offload: got "denoiser" with model.quantization "int8", want "nf4" or "fp8", or not both'
            )

    def _check_passes(self) -> None:
        """A backward of the rollout's own calls comes once, and may come long after its forward."""
        train, model = self.train, self.model
        if train.passes == 2:
            return
        got = f"train.passes: got {shown(train.passes)}"
        if train.passes == "reweight" and model.lora is None:
            raise ValueError(f'{got} without model.lora, want LoRA layers, 2 or "retain"')
        if train.passes == "reweight" and model.block_ops != "off":
            ops = f'model.block_ops "{model.block_ops}"'
            raise ValueError(f'{got} with {ops}, which see LoRA layers whole, want "off", 2 or "retain"')
        if train.passes != 1 and model.checkpointing == "auto":
            raise ValueError(
                f'{got} with model.checkpointing "auto", which has room for one graph only, want a policy by name, or 1'
            )
        if model.dtype == "float16":
            raise ValueError(f"{got} with model.dtype float16, where an update may have to be made again, want 2")
        if model.compile is not None:
            raise ValueError(f'{got} with model.compile "{model.compile}", want 2')
        if model.blocks_to_swap != 0:
            raise ValueError(f"{got} with model.blocks_to_swap {shown(model.blocks_to_swap)}, want 2")
        for what in ("denoiser", "expert", "block_inputs"):
            if what in train.offload:
                raise ValueError(f'{got} with train.offload "{what}", which moves what a backward needs, want 2')

    def _check_compile(self) -> None:
        """What torch.compile would not see, or has not been tried with."""
        model, what = self.model, self.model.compile
        if what is None:
            return
        refused = {
            f'model.quantization "{model.quantization}"': (model.quantization is not None, "null"),
            f"model.blocks_to_swap {model.blocks_to_swap}": (model.blocks_to_swap != 0, "0"),
            f"train.sequence_parallel {self.train.sequence_parallel}": (self.train.sequence_parallel > 1, "1"),
            'model.checkpointing "auto", which the planner finds for a model that is not compiled': (
                model.checkpointing == "auto",
                "a policy by name",
            ),
        }
        if what == "blocks":
            # A compiled block is one operator to the policy.
            single = model.checkpointing in ("attention", "matmul")
            refused[f'model.checkpointing "{model.checkpointing}"'] = (single, '"none", "full", "first:K", or "whole"')
        else:
            waits = "block_inputs" in self.train.offload
            refused['train.offload "block_inputs"'] = (waits, 'no such offload, or "blocks"')
        for other, (there, instead) in refused.items():
            if there:
                raise ValueError(f'model.compile: got "{what}" with {other}, want {instead} beside it, or compile null')

    def check_trained(self) -> None:
        """Raises ValueError where steps of the optimiser would be rounded away, masters hold nothing, or dtypes mix."""
        dtype, masters = self.model.dtype, self.train.master_dtype is not None
        if dtype == "float16" and self.train.mixed_precision != "no":
            raise ValueError(
                f'train.mixed_precision: got "{self.train.mixed_precision}" with model.dtype float16, want "no"'
            )
        narrow = dtype != "float32" and self.model.lora is None
        if narrow and not masters:
            raise ValueError(
                f'model.dtype: got "{dtype}" without model.lora, in which small steps are rounded away, want float32 '
                'with train.mixed_precision bf16, or train.master_dtype "float32"'
            )
        if masters and not narrow:
            which = "LoRA layers" if self.model.lora else "weights"
            raise ValueError(f'train.master_dtype: got "float32" for {which} that are float32, want null')

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as written into checkpoints, with the number of a clip range that is null."""
        found = asdict(self)
        found["train"]["clip_range"] = self.train.ratio_clip()
        return found
