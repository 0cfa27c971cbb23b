"""A GPT in PyTorch, for side-by-side runs only: GPT-2 blocks (LayerNorm, GELU, learned positions) or Llama-like ones
(RMSNorm, RoPE, SwiGLU), scaled_dot_product_attention; and how jaxlm's parameters map onto it."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def rope_tables(seq_len, head_dim, theta):
    """-> (cos, sin), each (T, H/2), float32."""
    angle = torch.arange(seq_len)[:, None] * theta ** -(torch.arange(0, head_dim, 2) / head_dim)
    return angle.cos(), angle.sin()


def rotate(x_BNTH, cos, sin):
    """Halves form, as in Llama and in jaxlm."""
    a, b = x_BNTH.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_BNTH.dtype)


class Norm(nn.Module):
    """RMSNorm or LayerNorm in float32, returned in the type of x."""

    def __init__(self, kind, dim, eps, bias):
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x):
        if self.kind == "rms":
            y = F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)
        else:
            bias = None if self.bias is None else self.bias.float()
            y = F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), bias, self.eps)
        return y.to(x.dtype)


class Block(nn.Module):
    def __init__(self, dim, heads, kv_heads, mlp, norm, gated, bias, eps, gelu):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.gelu = heads, kv_heads, dim // heads, gelu
        self.norm1, self.norm2 = Norm(norm, dim, eps, bias), Norm(norm, dim, eps, bias)
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.up, self.down = nn.Linear(dim, mlp, bias=bias), nn.Linear(mlp, dim, bias=bias)
        self.gate = nn.Linear(dim, mlp, bias=bias) if gated else None

    def forward(self, x, rope):
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        h = self.norm2(x)
        h = F.gelu(self.up(h), approximate=self.gelu) if self.gate is None else F.silu(self.gate(h)) * self.up(h)
        return x + self.down(h)


class GPT(nn.Module):
    """llama: RMSNorm, RoPE and SwiGLU, each of which `norm`, `position`, `gated` sets apart from the others.
    gelu: "none" is exact (nanoGPT), "tanh" GPT-2's. dtype: of the residual stream. remat: each block's activations are computed
    again in the backward pass."""

    def __init__(self, vocab, layers, dim, heads, seq_len, mlp=None, llama=False, tied=True, *, kv_heads=None, norm=None,
                 position=None, gated=None, bias=False, eps=1e-5, theta=10000.0, gelu="none", dtype=torch.float32, remat=False):
        super().__init__()
        norm, position = norm or ("rms" if llama else "layer"), position or ("rope" if llama else "learned")
        self.dtype, self.remat = dtype, remat
        self.embedding = nn.Embedding(vocab, dim)
        self.position = nn.Embedding(seq_len, dim) if position == "learned" else None
        self.rope = position == "rope"
        if self.rope:
            for name, table in zip(("cos", "sin"), rope_tables(seq_len, dim // heads, theta), strict=True):
                self.register_buffer(name, table, persistent=False)
        gated = llama if gated is None else gated
        self.blocks = nn.ModuleList(Block(dim, heads, kv_heads or heads, mlp or 4 * dim, norm, gated, bias, eps, gelu)
                                    for _ in range(layers))
        self.norm = Norm(norm, dim, eps, bias)
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
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens, targets):
        T = tokens.shape[1]
        x = self.embedding(tokens).to(self.dtype)
        if self.position is not None:
            x = x + self.position.weight[:T].to(self.dtype)
        rope = (self.cos[:T], self.sin[:T]) if self.rope else None
        for block in self.blocks:
            x = checkpoint(block, x, rope, use_reentrant=False) if self.remat else block(x, rope)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))


def check_covered(config) -> None:
    """Raises ValueError for a jaxlm config with something that the models here do not have."""
    m = config.model
    plain = {"block": "serial", "attention": "multihead", "qk_norm": False, "attention_softcap": 0.0, "final_softcap": 0.0,
             "value_residual": False, "dropout": 0.0, "embed_scale": 1.0, "embed_norm": False, "ngram_max": 1, "norm_scale": True,
             "head_dim": m.embed_dim // m.num_heads, "attention_bias": m.norm == "layer", "mlp_bias": m.norm == "layer"}
    odd = [f"model.{key}={m[key]!r}" for key, value in plain.items() if m[key] != value]
    odd += [f"model.window_pattern={m.window_pattern!r}"] if "L" in m.window_pattern else []
    odd += [f"model.feedforward={m.feedforward!r}"] if m.feedforward not in ("swiglu", "gelu") else []
    if odd or m.norm not in ("rms", "layer"):
        raise ValueError(f"the PyTorch models do not have {', '.join(odd) or m.norm}")


def gpt_of(config, vocab) -> GPT:
    """The GPT with the architecture of a resolved jaxlm config, whose parameters `from_jaxlm` gives."""
    check_covered(config)
    m = config.model
    return GPT(vocab, m.num_layers, m.embed_dim, m.num_heads, config.seq_len, m.mlp_dim, tied=m.tie_embeddings,
               kv_heads=m.num_kv_heads, norm=m.norm, position=m.position, gated=m.feedforward == "swiglu",
               bias=m.norm == "layer", eps=m.norm_eps, theta=m.rope_theta, gelu="tanh", dtype=getattr(torch, m.compute_dtype),
               remat=m.remat == "full")


def from_jaxlm(arrays) -> dict:
    """{jaxlm path: tensor} -> state_dict of GPT. jaxlm's layers are stacked, its kernels (inputs, outputs)."""
    state = {"embedding.weight": arrays["embedding"], "norm.weight": arrays["final_norm/scale"],
             "head.weight": arrays["head/kernel"].T if "head/kernel" in arrays else arrays["embedding"]}
    if "final_norm/bias" in arrays:
        state["norm.bias"] = arrays["final_norm/bias"]
    if "position/embedding" in arrays:
        state["position.weight"] = arrays["position/embedding"]
    layers = {name.removeprefix("layers/"): a for name, a in arrays.items() if name.startswith("layers/")}
    D = arrays["embedding"].shape[1]
    for i in range(len(layers["norm1/scale"])):
        for name in ("norm1", "norm2"):
            state[f"blocks.{i}.{name}.weight"] = layers[f"{name}/scale"][i]
            if f"{name}/bias" in layers:
                state[f"blocks.{i}.{name}.bias"] = layers[f"{name}/bias"][i]
        qkv = [layers[f"attention/{name}/kernel"][i].reshape(D, -1).T for name in ("query", "key", "value")]
        state[f"blocks.{i}.qkv.weight"] = torch.cat(qkv)
        state[f"blocks.{i}.out.weight"] = layers["attention/out/kernel"][i].reshape(-1, D).T
        if "attention/query/bias" in layers:
            state[f"blocks.{i}.qkv.bias"] = torch.cat([layers[f"attention/{name}/bias"][i].reshape(-1)
                                                       for name in ("query", "key", "value")])
            state[f"blocks.{i}.out.bias"] = layers["attention/out/bias"][i]
        for name in ("up", "gate", "down"):
            if f"feedforward/{name}/kernel" in layers:
                state[f"blocks.{i}.{name}.weight"] = layers[f"feedforward/{name}/kernel"][i].T
            if f"feedforward/{name}/bias" in layers:
                state[f"blocks.{i}.{name}.bias"] = layers[f"feedforward/{name}/bias"][i]
    return state


def adamw_of(config, model):
    """AdamW as jaxlm's default groups have it: matrices and embeddings decay, vectors do not."""
    o = config.optimizer
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps, fused=True)
