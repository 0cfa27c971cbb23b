"""Mixtral 8x7B (arXiv:2401.04088): 46,702,792,704 parameters, of which a token uses 12,879,925,248.

    jaxlm train --config=configs/mixtral_8x7b.py --config.data.path=corpus.jsonl --config.data.tokenizer=tokenizer.json
"""

from configs import default


def get_config(arg: str = ""):
    c = default.get_config()
    c.steps = 50_000
    c.batch_size = 256
    c.seq_len = 8192
    c.model.num_layers = 32
    c.model.embed_dim = 4096
    c.model.num_heads = 32
    c.model.num_kv_heads = 8
    c.model.mlp_dim = 14_336
    c.model.feedforward = "moe"
    c.model.num_experts = 8
    c.model.experts_per_token = 2
    c.model.vocab_size = 32_000
    c.model.tie_embeddings = False
    c.model.norm_eps = 1e-5
    c.model.rope_theta = 1_000_000.0
    c.model.compute_dtype = "bfloat16"
    c.model.scan_layers = True
    c.model.remat = "full"
    c.data.tokenizer = "tokenizer.json"
    c.data.isolate_documents = True
    c.mesh.data = 1
    c.mesh.fsdp = -1
    return default.debug(c) if arg == "debug" else c
