"""What diffusers' attention backends take and can do, and which families mask.

Of diffusers 0.42.1 (`models/attention_dispatch.py`) and torch 2.13 (`sdp_utils.cpp`).
"""

from dataclasses import dataclass

import torch

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32, torch.float64)
# Any that SDPA takes; one length a sample, packed; one that becomes a full `[batch, heads, tokens, tokens]`.
ANY_MASK, NO_MASK, VARLEN_MASK, COPIED_MASK = "any", "none", "lengths", "copied"


@dataclass(frozen=True)
class Facts:
    """One backend. `mask`: which it takes; `no_backward`: why it cannot train; `capability`: lowest and highest."""

    kernel: str
    package: str = ""
    mask: str = NO_MASK
    no_backward: str = ""
    device: str = "cuda"
    capability: tuple[tuple[int, int], tuple[int, int]] = ((8, 0), (12, 1))
    dtypes: tuple[torch.dtype, ...] = HALF
    head_dims: tuple[int, int] = (8, 256)  # a multiple of, at most
    syncs: str = ""  # "always", or with a mask
    valid_keys_lead: bool = False  # cuts keys to their number, wherever they are
    hub: bool = False


_HOPPER, _BLACKWELL_12 = ((9, 0), (9, 0)), ((12, 0), (12, 1))
_SAGE = "8-bit products without a backward pass"
_UNSTATED = "diffusers names no backward of this kernel"
_FLASH_2, _FLASH_3 = "flash-attn >= 2.6.3", "flash-attn 3 (flash_attn_interface)"
_KERNELS, _SAGE_PACKAGE = "kernels >= 0.12", "sageattention >= 2.1.1"
_ANY_HEAD = (1, 1 << 16)

FACTS = {
    "native": Facts("SDPA", mask=ANY_MASK, device="any", dtypes=FLOATS, head_dims=_ANY_HEAD),
    "_native_cudnn": Facts("cuDNN", mask=ANY_MASK, head_dims=(8, 128)),
    "_native_flash": Facts("FA2", device="cuda or cpu", head_dims=(1, 256)),
    # Multiples of 8 are for 16 bits, of 4 for float32.
    "_native_efficient": Facts(
        "efficient", mask=ANY_MASK, capability=((5, 0), (12, 1)), dtypes=(*HALF, torch.float32), head_dims=(8, 1 << 16)
    ),
    "_native_math": Facts("math", mask=ANY_MASK, device="any", dtypes=FLOATS, head_dims=_ANY_HEAD),
    "flex": Facts("flex", mask=ANY_MASK, device="any", dtypes=FLOATS, head_dims=_ANY_HEAD),
    "flash": Facts("FA2", _FLASH_2),
    "flash_hub": Facts("FA2", _KERNELS, hub=True),
    "flash_varlen": Facts("FA2", _FLASH_2, mask=VARLEN_MASK, syncs="always", valid_keys_lead=True),
    "flash_varlen_hub": Facts("FA2", _KERNELS, mask=VARLEN_MASK, syncs="mask", hub=True),
    "_flash_3": Facts(
        "FA3", _FLASH_3, no_backward="diffusers wraps it in an op without an autograd formula", capability=_HOPPER
    ),
    "_flash_3_hub": Facts("FA3", _KERNELS, capability=_HOPPER, hub=True),
    "_flash_varlen_3": Facts(
        "FA3", _FLASH_3, mask=VARLEN_MASK, capability=_HOPPER, syncs="always", valid_keys_lead=True
    ),
    "_flash_3_varlen_hub": Facts("FA3", _KERNELS, mask=VARLEN_MASK, capability=_HOPPER, syncs="mask", hub=True),
    "flash_4_hub": Facts(
        "FA4", "kernels >= 0.12.3", no_backward=_UNSTATED, capability=((9, 0), (10, 3)), head_dims=(8, 128), hub=True
    ),
    "aiter_fa2_hub": Facts("CK", _KERNELS, no_backward=_UNSTATED, device="an AMD GPU", hub=True),
    # It picks among FA3, FA2 and CUTLASS by itself; its CUTLASS and FA3 end at 9.0.
    "xformers": Facts(
        "xformers", "xformers >= 0.0.29", mask=COPIED_MASK, capability=((5, 0), (9, 0)), dtypes=(*HALF, torch.float32)
    ),
    "_native_npu": Facts("NPU", "torch_npu", mask=ANY_MASK, device="npu"),
    "_native_xla": Facts("XLA", "torch_xla >= 2.2", device="xla", dtypes=FLOATS),
    "sage": Facts("int8", _SAGE_PACKAGE, no_backward=_SAGE, head_dims=(1, 128)),
    "sage_hub": Facts("int8", _KERNELS, no_backward=_SAGE, head_dims=(1, 128), hub=True),
    "sage_blackwell_hub": Facts(
        "fp4", _KERNELS, no_backward=_SAGE, capability=_BLACKWELL_12, head_dims=(64, 128), hub=True
    ),
    "sage_varlen": Facts(
        "int8",
        _SAGE_PACKAGE,
        mask=VARLEN_MASK,
        no_backward=_SAGE,
        head_dims=(1, 128),
        syncs="always",
        valid_keys_lead=True,
    ),
    "_sage_qk_int8_pv_fp8_cuda": Facts(
        "int8", _SAGE_PACKAGE, no_backward=_SAGE, capability=((9, 0), (12, 1)), head_dims=(1, 128)
    ),
    "_sage_qk_int8_pv_fp8_cuda_sm90": Facts(
        "int8", _SAGE_PACKAGE, no_backward=_SAGE, capability=_HOPPER, head_dims=(1, 128)
    ),
    "_sage_qk_int8_pv_fp16_cuda": Facts("int8", _SAGE_PACKAGE, no_backward=_SAGE, head_dims=(1, 128)),
    "_sage_qk_int8_pv_fp16_triton": Facts("int8", _SAGE_PACKAGE, no_backward=_SAGE, head_dims=(1, 128)),
}
# Who goes first among equally fast ones: `native` takes another kernel where one refuses; the rest raise.
PREFERENCE = ("_flash_3_hub", "flash", "native")


@dataclass(frozen=True)
class Mask:
    """When a family hands a mask to attention, and whether its valid keys come first."""

    when: str
    valid_keys_lead: bool = False


MASKS = {
    "HunyuanVideoTransformer3DModel": Mask("always", valid_keys_lead=True),
    "QwenImageTransformer2DModel": Mask("given"),
    "FluxTransformer2DModel": Mask("never"),
    "SD3Transformer2DModel": Mask("never"),
    "WanTransformer3DModel": Mask("never"),
    "UNet2DConditionModel": Mask("never"),
}
