"""One line puts the block ops into a diffusers transformer: the same bits, and fewer bytes kept for the backward.

    python examples/accelerate_a_transformer.py

On a CPU the ops are plain torch and cost time, so that this shows what changes and what does not, not the speed.
"""

import torch
from diffusers import FluxTransformer2DModel

import dancegrpo_fast as dgf

torch.manual_seed(0)
model = FluxTransformer2DModel(
    in_channels=16,
    num_layers=2,
    num_single_layers=4,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=32,
    pooled_projection_dim=32,
    axes_dims_rope=(8, 12, 12),
).bfloat16()
B, S, TEXT = 2, 256, 32
inputs = {
    "hidden_states": torch.randn(B, S, 16).bfloat16(),
    "encoder_hidden_states": torch.randn(B, TEXT, 32).bfloat16(),
    "pooled_projections": torch.randn(B, 32).bfloat16(),
    "timestep": torch.full((B,), 0.5).bfloat16(),
    "img_ids": torch.cat([torch.zeros(S, 1), torch.cartesian_prod(torch.arange(16), torch.arange(16))], dim=1),
    "txt_ids": torch.zeros(TEXT, 3),
}


def output_gradients_bytes() -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """A forward and a backward; the bytes are of what autograd keeps between them, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**inputs, return_dict=False)[0]
    gradients = torch.autograd.grad(output.float().square().mean(), list(model.parameters()))
    return output, list(gradients), sum(kept.values())


before = output_gradients_bytes()
undo = dgf.accelerate(model, "lossless", recompute="all")
after = output_gradients_bytes()
undo()  # diffusers' own blocks are back

same = torch.equal(before[0], after[0]) and all(map(torch.equal, before[1], after[1]))
print(f"output and {len(after[1])} gradients: {'the same bits' if same else 'DIFFERENT'}")
print(f"kept for the backward: {before[2] / 2**20:.1f} MiB, then {after[2] / 2**20:.1f} MiB")
