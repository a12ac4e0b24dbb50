"""A tiny Qwen2-VL with its tokenizer, and checkpoints of VideoReward for it in every layout."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from dancegrpo_fast.rewards._videoalign_prompt import QUESTION, REWARD_TOKENS
from dancegrpo_fast.rewards.base import RewardInput

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
RANK, ALPHA = 4, 8
LORA_TARGETS = ["q_proj", "v_proj", "down_proj", "qkv", "embed_tokens"]


def make_base(folder: Path) -> Path:
    """Random weights in more rows than the tokenizer has tokens, as Qwen2-VL's; a token is the start of a word."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = dict.fromkeys(word for word, _ in split.pre_tokenize_str(QUESTION))
    merges = dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word)))
    tokens = dict.fromkeys([*sorted(split.alphabet()), *map("".join, merges)])
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [*merges]))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")
    fast.add_tokens(list(SPECIAL), special_tokens=True)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(fast) + 17,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        video_token_id=fast.convert_tokens_to_ids("<|video_pad|>"),
        image_token_id=fast.convert_tokens_to_ids("<|endoftext|>"),
    )
    model = Qwen2VLForConditionalGeneration(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def trained_model(base: Path, rslora: bool = False) -> Any:
    """The base with reward tokens, a head and a LoRA of random weights, built by peft."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.add_tokens(list(REWARD_TOKENS), special_tokens=True)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer))
    model.rm_head = nn.Linear(32, 1, bias=False)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LORA_TARGETS, use_rslora=rslora)
    wrapped = get_peft_model(model, lora)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "rm_head" in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped


def write_config(folder: Path, rslora: bool = False, **changes: Any) -> None:
    """model_config.json, with any of its values changed."""
    scales = {"VQ_mean": 1.0, "VQ_std": 2.0, "MQ_mean": -1.0, "MQ_std": 0.5, "TA_mean": 0.25, "TA_std": 4.0}
    whole: dict[str, Any] = {
        "data_config": {
            "fps": 2.0,
            "max_frame_pixels": 200704,
            "num_frames": None,
            "sample_type": "uniform",
            "prompt_template_type": "detailed_special",
        },
        "model_config": {"use_special_tokens": True, "output_dim": 1},
        "peft_lora_config": {"lora_r": RANK, "lora_alpha": ALPHA, "use_rslora": rslora},
        "inference_config": scales,
    }
    for section in whole.values():
        section.update({key: value for key, value in changes.items() if key in section})
    (folder / "model_config.json").write_text(json.dumps(whole))


def old_layout(name: str) -> str:
    """A parameter's name before transformers 4.52."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def write_checkpoint(folder: Path, model: PeftModel, kind: str, rslora: bool = False) -> Path:
    """As VideoReward's training saves it: "full" or "adapter", "-old" for the names before transformers 4.52."""
    place = folder / "checkpoint-20"
    place.mkdir(parents=True)
    (folder / "checkpoint-3").mkdir()
    write_config(folder, rslora)
    rename = old_layout if kind.endswith("-old") else str
    state: dict[str, Tensor] = {rename(name): tensor.clone() for name, tensor in model.state_dict().items()}
    if kind.startswith("full"):
        torch.save(state, place / "model.pth")
        return folder
    adapter = {name.replace(".default", ""): tensor for name, tensor in state.items() if "lora_" in name}
    others = {
        name: tensor for name, tensor in state.items() if "lora_" not in name and ("rm_head" in name or "embed" in name)
    }
    others = {name.replace(".base_layer", ""): tensor for name, tensor in others.items() if "patch_embed" not in name}
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, place / "adapter_model.safetensors")
    torch.save(others, place / "non_lora_state_dict.pth")
    return folder


def videos(*prompts: str, length: int = 9, height: int = 30, width: int = 44, fps: float | None = 4.0) -> RewardInput:
    """Random bytes."""
    generator = torch.Generator().manual_seed(2)
    bytes_ = torch.randint(0, 256, (len(prompts), length, 3, height, width), generator=generator)
    return RewardInput(bytes_.float() / 255, prompts, torch.zeros(len(prompts)), [{} for _ in prompts], fps)
