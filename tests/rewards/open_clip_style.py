"""CLIP in open_clip's layout, written anew in plain torch: fused attention inputs, projections from the right."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .tiny_clip import CONTEXT, HEADS, IMAGE_SIZE, stir


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width: int, patch: int, embed: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((IMAGE_SIZE // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, 3)
        self.proj = nn.Parameter(torch.zeros(width, embed))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """Cosines of images and texts that are paired; texts end at their largest token, as open_clip reads them."""

    def __init__(self, words: int, width: int = 48, embed: int = 24) -> None:
        super().__init__()
        self.visual = Visual(32, 7, embed)
        self.transformer = Transformer(width, 2)
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.zeros(CONTEXT, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, embed))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        stir(self)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        mask = torch.full((CONTEXT, CONTEXT), float("-inf"), dtype=pixels.dtype).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding, mask)
        text = self.ln_final(x)[torch.arange(len(ids)), ids.argmax(dim=1)] @ self.text_projection
        return torch.cosine_similarity(self.visual(pixels), text, dim=1)
