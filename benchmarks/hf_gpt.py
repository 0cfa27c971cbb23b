"""Hugging Face's GPT2LMHeadModel and LlamaForCausalLM with the architecture and the parameters of a jaxlm config."""

import torch
import torch.nn.functional as F
from torch import nn
from torch_gpt import check_covered
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


class HuggingFace(nn.Module):
    """(tokens, targets) -> loss. The loss is taken here: the models' own `labels` drop the last token of a row."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, targets):
        logits = self.model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))


def hf_of(config, vocab) -> HuggingFace:
    """Raises ValueError where transformers has no such architecture."""
    check_covered(config)
    m = config.model
    kind = (m.norm, m.position, m.feedforward)
    if kind == ("layer", "learned", "gelu"):
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=vocab, n_positions=config.seq_len, n_embd=m.embed_dim, n_layer=m.num_layers, n_head=m.num_heads,
            n_inner=m.mlp_dim, activation_function="gelu_new", layer_norm_epsilon=m.norm_eps, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, tie_word_embeddings=m.tie_embeddings, attn_implementation="sdpa"))
    elif kind == ("rms", "rope", "swiglu"):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab, hidden_size=m.embed_dim, intermediate_size=m.mlp_dim, num_hidden_layers=m.num_layers,
            num_attention_heads=m.num_heads, num_key_value_heads=m.num_kv_heads, max_position_embeddings=config.seq_len,
            rms_norm_eps=m.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
            rope_theta=m.rope_theta, tie_word_embeddings=m.tie_embeddings, attn_implementation="sdpa"))
    else:
        raise ValueError(f"transformers has no model with {' + '.join(kind)}")
    if m.remat == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return HuggingFace(model)


def from_jaxlm(arrays) -> dict:
    """{jaxlm path: tensor} -> state_dict of HuggingFace."""
    layers = {name.removeprefix("layers/"): a for name, a in arrays.items() if name.startswith("layers/")}
    head = arrays["head/kernel"].T if "head/kernel" in arrays else arrays["embedding"]
    D, L = arrays["embedding"].shape[1], len(layers["norm1/scale"])
    state = {"lm_head.weight": head}
    if "position/embedding" in arrays:  # GPT-2: kernels are (inputs, outputs), as here
        state |= {"transformer.wte.weight": arrays["embedding"], "transformer.wpe.weight": arrays["position/embedding"],
                  "transformer.ln_f.weight": arrays["final_norm/scale"], "transformer.ln_f.bias": arrays["final_norm/bias"]}
        for i in range(L):
            qkv = [(layers[f"attention/{name}/kernel"][i].reshape(D, -1), layers[f"attention/{name}/bias"][i].reshape(-1))
                   for name in ("query", "key", "value")]
            layer = {"ln_1.weight": layers["norm1/scale"], "ln_1.bias": layers["norm1/bias"],
                     "ln_2.weight": layers["norm2/scale"], "ln_2.bias": layers["norm2/bias"],
                     "attn.c_proj.weight": layers["attention/out/kernel"].reshape(L, -1, D),
                     "attn.c_proj.bias": layers["attention/out/bias"],
                     "mlp.c_fc.weight": layers["feedforward/up/kernel"], "mlp.c_fc.bias": layers["feedforward/up/bias"],
                     "mlp.c_proj.weight": layers["feedforward/down/kernel"], "mlp.c_proj.bias": layers["feedforward/down/bias"]}
            state |= {f"transformer.h.{i}.{name}": a[i] for name, a in layer.items()}
            state[f"transformer.h.{i}.attn.c_attn.weight"] = torch.cat([kernel for kernel, _ in qkv], dim=1)
            state[f"transformer.h.{i}.attn.c_attn.bias"] = torch.cat([bias for _, bias in qkv])
    else:
        state |= {"model.embed_tokens.weight": arrays["embedding"], "model.norm.weight": arrays["final_norm/scale"]}
        for i in range(L):
            layer = {"input_layernorm": layers["norm1/scale"][i], "post_attention_layernorm": layers["norm2/scale"][i],
                     "self_attn.o_proj": layers["attention/out/kernel"][i].reshape(-1, D).T}
            layer |= {f"self_attn.{short}_proj": layers[f"attention/{name}/kernel"][i].reshape(D, -1).T
                      for short, name in (("q", "query"), ("k", "key"), ("v", "value"))}
            layer |= {f"mlp.{name}_proj": layers[f"feedforward/{name}/kernel"][i].T for name in ("up", "gate", "down")}
            state |= {f"model.layers.{i}.{name}.weight": a for name, a in layer.items()}
    return {f"model.{name}": a for name, a in state.items()}
