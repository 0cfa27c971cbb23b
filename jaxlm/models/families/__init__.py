"""Model families: what Hugging Face's names mean here. One short file each; importing this registers them."""

from jaxlm.models.families import (  # noqa: F401
    bert,
    deepseek,
    gemma,
    gpt2,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmo,
    phi,
    qwen,
    smollm,
    t5,
)
from jaxlm.models.families.family import MODEL_TYPES, apply, read_config, read_folder  # noqa: F401
