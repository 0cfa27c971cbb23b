"""GPT-2 (Radford et al., 2019). Its kernels are stored (inputs, outputs), as here."""

from jaxlm.models.families.family import Family, Tensor, always, only, register, same
from jaxlm.models.families.llama import one

GPT2 = register(Family("gpt2", "GPT2LMHeadModel", (
    same("vocab_size", "vocab_size"),
    same("n_positions", "seq_len"),
    same("n_embd", "embed_dim"),
    same("n_layer", "num_layers"),
    same("n_head", "num_heads"),
    same("n_inner", "mlp_dim", 0),
    same("layer_norm_epsilon", "norm_eps", 1e-5),
    same("tie_word_embeddings", "tie_embeddings", True),
    only("activation_function", "gelu_new", "gelu_pytorch_tanh"),
    only("scale_attn_weights", True),
    only("scale_attn_by_inverse_layer_idx", False),
    only("reorder_and_upcast_attn", False, True),  # the same numbers
    only("add_cross_attention", False),
    always(norm="layer", position="learned", feedforward="gelu", attention_bias=True, mlp_bias=True),
), (
    one("wte.weight", "embedding", "V D -> V D"),
    one("wpe.weight", "position/embedding", "T D -> T D"),
    one("ln_f.weight", "final_norm/scale", "D -> D"),
    one("ln_f.bias", "final_norm/bias", "D -> D"),
    one("lm_head.weight", "head/kernel", "V D -> D V"),
    one("h.{layer}.ln_1.weight", "layers/norm1/scale", "D -> D"),
    one("h.{layer}.ln_1.bias", "layers/norm1/bias", "D -> D"),
    one("h.{layer}.ln_2.weight", "layers/norm2/scale", "D -> D"),
    one("h.{layer}.ln_2.bias", "layers/norm2/bias", "D -> D"),
    Tensor("h.{layer}.attn.c_attn.weight", tuple((f"layers/attention/{name}/kernel", "D (N H) -> D N H")
                                                 for name in ("query", "key", "value")), axis=1),
    Tensor("h.{layer}.attn.c_attn.bias", tuple((f"layers/attention/{name}/bias", "(N H) -> N H")
                                               for name in ("query", "key", "value"))),
    one("h.{layer}.attn.c_proj.weight", "layers/attention/out/kernel", "(N H) D -> N H D"),
    one("h.{layer}.attn.c_proj.bias", "layers/attention/out/bias", "D -> D"),
    one("h.{layer}.mlp.c_fc.weight", "layers/feedforward/up/kernel", "D F -> D F"),
    one("h.{layer}.mlp.c_fc.bias", "layers/feedforward/up/bias", "F -> F"),
    one("h.{layer}.mlp.c_proj.weight", "layers/feedforward/down/kernel", "F D -> F D"),
    one("h.{layer}.mlp.c_proj.bias", "layers/feedforward/down/bias", "D -> D"),
), prefix="transformer.", left_out=r"h\.\d+\.attn\.(bias|masked_bias)"))
