"""What is asked: what follows `dancegrpo-fast memory` on the command line, the policy being `auto` throughout."""

from typing import NamedTuple


class Scenario(NamedTuple):
    """One question."""

    name: str
    command: str


_HUNYUAN = "hunyuan-video --frames 53 --height 480 --width 640"
_FLUX = "flux-dev --height 720 --width 720"
# As the trainer takes all weights.
_ALL = "--dtype float32 --mixed_precision bf16"
# Nothing that is not running is on the device.
_SMALL = "--quantization nf4 --offload block_inputs,denoiser,vae"
SCENARIOS = (
    Scenario("HunyuanVideo LoRA, 80 GB", f"{_HUNYUAN} --lora 32 --gpu 80"),
    Scenario("HunyuanVideo full fine-tuning, 8 x 80 GB", f"{_HUNYUAN} {_ALL} --fsdp 8 --gpu 80"),
    Scenario("HunyuanVideo LoRA, 24 GB", f"{_HUNYUAN} --lora 32 {_SMALL} --gpu 24"),
    Scenario("FLUX LoRA, 80 GB", f"{_FLUX} --lora 128 --num_steps 12 --timestep_fraction 0.5 --prompts 2 --gpu 80"),
    Scenario("FLUX LoRA, 40 GB", f"{_FLUX} --lora 128 --num_steps 12 --timestep_fraction 0.5 --prompts 2 --gpu 40"),
    Scenario("FLUX LoRA, 16 GB", f"{_FLUX} --lora 32 {_SMALL} --gpu 16"),
    Scenario(
        "SkyReels-I2V full fine-tuning, 8 x 80 GB",
        f"skyreels-i2v --frames 53 --height 400 --width 640 --group_size 8 --guidance_scale 5 {_ALL} --fsdp 8 --gpu 80",
    ),
    Scenario(
        "Stable Diffusion 1.4 full fine-tuning, 80 GB",
        "sd14 --height 512 --width 512 --group_size 16 --prompts 4 --micro_batch 4 --rollout_batch 16 --num_steps 50"
        " --timestep_fraction 0.98 --guidance_scale 5"
        f" {_ALL} --rewards hps --gpu 80",
    ),
    *(
        Scenario(f"{name}, 8 x 80 GB", f"recipes/{name}.yaml --fsdp 8 --group_size {group} --gpu 80")
        for name, group in (
            ("flux_hps", 12),
            ("hunyuan_t2i_hps", 12),
            ("hunyuan_video_vq_mq", 24),
            ("skyreels_i2v_mq", 8),
        )
    ),
    *(
        Scenario(f"{name}, LoRA 128, 80 GB", f"recipes/{name}.yaml --lora 128 --gpu 80")
        for name in ("hunyuan_t2i_hps", "hunyuan_video_vq_mq", "skyreels_i2v_mq")
    ),
    *(
        Scenario(f"{name}, {gb} GB", f"recipes/{name}.yaml --gpu {gb}")
        for name, gb in (
            ("flux_lora_hps", 80),
            ("flux_lora_hps_16gib", 16),
            ("hunyuan_video_lora_24gib", 24),
            ("sd14_hps", 80),
        )
    ),
)
