"""GPT-2 small: 124,439,808 parameters with the vocabulary at its 50,257.

    jaxlm train --config=configs/gpt2_124m.py --config.data.path=corpus.jsonl --config.data.tokenizer=tokenizer.json
"""

from configs import default


def get_config(arg: str = ""):
    c = default.get_config()
    c.steps = 19_073  # 10B tokens
    c.batch_size = 512
    c.seq_len = 1024
    c.grad_accum_steps = 8
    c.model.num_layers = 12
    c.model.embed_dim = 768
    c.model.num_heads = 12
    c.model.vocab_size = 50_257
    c.model.norm = "layer"
    c.model.norm_eps = 1e-5
    c.model.position = "learned"
    c.model.attention_bias = True
    c.model.mlp_bias = True
    c.model.feedforward = "gelu"
    c.model.compute_dtype = "bfloat16"
    c.data.tokenizer = "tokenizer.json"
    c.optimizer.learning_rate = 6e-4
    c.schedule.warmup_steps = 700
    return default.debug(c) if arg == "debug" else c
