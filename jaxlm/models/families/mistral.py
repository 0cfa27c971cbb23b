"""Mistral 7B and later (text; arXiv:2310.06825): Llama with a sliding window."""

from jaxlm.models.families.family import Family, register, same
from jaxlm.models.families.llama import SWIGLU, TENSORS
from jaxlm.models.families.rope import rope
from jaxlm.models.families.windows import window_of_all

MISTRAL = register(Family("mistral", "MistralForCausalLM", (
    *SWIGLU, same("rms_norm_eps", "norm_eps", 1e-6), window_of_all(), rope()), TENSORS))
