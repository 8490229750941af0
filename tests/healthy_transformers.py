"""Sound transformers and their kin, as people write them."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.checkpoint import checkpoint

from gradmend.setup import Setup
from healthy_data import (
    CE,
    CLIP,
    LETTERS,
    Built,
    Case,
    adam,
    adamw,
    characters,
    cut,
    per_token,
    photos,
    random,
    reversal,
    warmup,
)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        split = (
            part.view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for part in self.c_attn(x).split(c, 2)
        )
        dropped = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(*split, dropout_p=dropped, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(dim), CausalSelfAttention(dim, heads, dropout)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """As GPT-2: learnt positions, normalization first, weights of the head tied to the embedding."""

    def __init__(self, dim: int = 48, heads: int = 4, layers: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(LETTERS, dim), nn.Embedding(64, dim)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList([Block(dim, heads, dropout) for _ in range(layers)])
        self.ln_f, self.lm_head = nn.LayerNorm(dim), nn.Linear(dim, LETTERS, bias=False)
        self.lm_head.weight = self.wte.weight
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.size(1))))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def gpt() -> Built:
    optimizer = partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    return Setup(GPT(), per_token, optimizer, warmup(20), CLIP), cut(16, *characters())


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding of [batch, heads, time, dim] (Su et al. 2021)."""
    half = x.size(-1) // 2
    angles = torch.arange(x.size(2))[:, None] * 10000 ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class LlamaBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.down = nn.Linear(2 * dim, dim, bias=False)
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        h = self.norm1(x)
        q, k, v = (p(h).view(b, t, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, c))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def llama() -> Built:
    embedding, head = nn.Embedding(LETTERS, 48), nn.Linear(48, LETTERS, bias=False)
    model = nn.Sequential(embedding, LlamaBlock(48, 4), LlamaBlock(48, 4), RMSNorm(48), head)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02)
    return Setup(model, per_token, adamw(3e-3, 0.1), warmup(20), CLIP), cut(16, *characters())


class BERT(nn.Module):
    """Normalization after each sum, as `nn.TransformerEncoder` has it."""

    def __init__(self, dim: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, dim), nn.Embedding(16, dim)
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(0.1)
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim), nn.Linear(dim, 10))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.size(1)))
        return self.head(self.encoder(self.dropout(self.norm(x))))


def bert() -> Built:
    """Palindromes, some of whose symbols are hidden."""
    half, _, _ = reversal(length=4)
    x = torch.cat([half, half.flip(1)], dim=1)
    hidden = torch.rand(x.shape, generator=random(11)) < 0.2
    given, wanted = x.masked_fill(hidden, 10), x.masked_fill(~hidden, -100)
    return Setup(BERT(), per_token, adamw(3e-3), warmup(30), CLIP), cut(32, given, wanted)


class Translator(nn.Module):
    """`nn.Transformer` with teacher forcing: writes a sequence backwards."""

    def __init__(self, symbols: int = 10, dim: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols + 1, dim)
        self.place = nn.Parameter(0.02 * torch.randn(16, dim))
        self.transformer = nn.Transformer(dim, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        self.out = nn.Linear(dim, symbols)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        t = target.size(1)
        mask = nn.Transformer.generate_square_subsequent_mask(t)
        a, b = (self.embed(x) + self.place[: x.size(1)] for x in (source, target))
        return self.out(self.transformer(a, b, tgt_mask=mask))


def transformer_translator() -> Built:
    return Setup(Translator(), per_token, adam(2e-3), warmup(20)), cut(32, *reversal())


class ViT(nn.Module):
    def __init__(self, dim: int = 48, layers: int = 2, patch: int = 4, remember: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 10, dim).normal_(std=0.02))
        layer = partial(
            nn.TransformerEncoderLayer, dim, 4, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.ModuleList([layer() for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)
        self.remember = remember
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x) if self.remember else checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x)[:, 0])


def vit() -> Built:
    return Setup(ViT(), CE, adamw(2e-3, 0.05), warmup(20), CLIP), cut(32, *photos(12, 128))


def checkpointed_transformer() -> Built:
    setup = Setup(ViT(remember=False), CE, adam(2e-3), partial(CosineAnnealingLR, T_max=300))
    return setup, cut(32, *photos(12, 128))


class MixerBlock(nn.Module):
    def __init__(self, patches: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = nn.Sequential(nn.Linear(patches, 32), nn.GELU(), nn.Linear(32, patches))
        self.channels = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 4, 4)
        self.blocks = nn.Sequential(*(MixerBlock(9, 48) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


def mlp_mixer() -> Built:
    return Setup(Mixer(), CE, adamw(2e-3, 0.05), warmup(10)), cut(32, *photos(12, 128))


CASES = (
    Case(gpt, 120, 2.6),
    Case(llama, 120, 2.5),
    Case(bert, 150, 1.0),
    Case(transformer_translator, 150, 1.2),
    Case(vit, 70, 0.9),
    Case(checkpointed_transformer, 60, 1.0),
    Case(mlp_mixer, 50, 0.5),
)
