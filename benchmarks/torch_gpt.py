"""A nanoGPT-style GPT in PyTorch, for side-by-side runs only: GPT-2 blocks (LayerNorm, GELU, learned positions) or
Llama-like ones (RMSNorm, RoPE, SwiGLU), AdamW, scaled_dot_product_attention."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def rope(x_BNTH, theta=10000.0):
    T, H = x_BNTH.shape[-2:]
    angle = torch.arange(T)[:, None] * theta ** -(torch.arange(0, H, 2) / H)
    cos, sin = angle.cos(), angle.sin()
    a, b = x_BNTH.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    def __init__(self, dim, heads, mlp, llama):
        super().__init__()
        norm = nn.RMSNorm if llama else lambda d: nn.LayerNorm(d, bias=False)
        self.heads, self.llama = heads, llama
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, mlp, bias=False), nn.Linear(mlp, dim, bias=False)
        if llama:
            self.gate = nn.Linear(dim, mlp, bias=False)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(D, dim=2))
        if self.llama:
            q, k = rope(q), rope(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        h = self.norm2(x)
        h = F.silu(self.gate(h)) * self.up(h) if self.llama else F.gelu(self.up(h))
        return x + self.down(h)


class GPT(nn.Module):
    def __init__(self, vocab, layers, dim, heads, seq_len, mlp=None, llama=False, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.position = None if llama else nn.Embedding(seq_len, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp or 4 * dim, llama) for _ in range(layers))
        self.norm = nn.RMSNorm(dim) if llama else nn.LayerNorm(dim, bias=False)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.apply(self._init)
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers))
        if tied:
            self.head.weight = self.embedding.weight

    @staticmethod
    def _init(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
