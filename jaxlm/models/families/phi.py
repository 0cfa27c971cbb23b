"""Phi-3, Phi-3.5 and Phi-4 (text; arXiv:2404.14219): Llama with fused projections."""

from jaxlm.models.families.family import Family, Tensor, only, register, same
from jaxlm.models.families.llama import NORMS, OUTER, SWIGLU, one
from jaxlm.models.families.rope import rope
from jaxlm.models.families.windows import window_of_all

PHI3 = register(Family("phi3", "Phi3ForCausalLM", (
    *SWIGLU, same("rms_norm_eps", "norm_eps", 1e-5), window_of_all(), rope(),
    *(only(field, False, written=False) for field in ("attention_bias", "mlp_bias", "lm_head_bias")),
    *(only(field, 1, written=False) for field in ("full_attn_mod", "interpolate_factor"))),
    OUTER + NORMS + (
        Tensor("layers.{layer}.self_attn.qkv_proj.weight", (
            ("layers/attention/query/kernel", "(N H) D -> D N H"),
            ("layers/attention/key/kernel", "(K H) D -> D K H"),
            ("layers/attention/value/kernel", "(K H) D -> D K H"))),
        one("layers.{layer}.self_attn.o_proj.weight", "layers/attention/out/kernel", "D (N H) -> N H D"),
        Tensor("layers.{layer}.mlp.gate_up_proj.weight", (
            ("layers/feedforward/gate/kernel", "F D -> D F"),
            ("layers/feedforward/up/kernel", "F D -> D F"))),
        one("layers.{layer}.mlp.down_proj.weight", "layers/feedforward/down/kernel", "D F -> F D"),
    )))
