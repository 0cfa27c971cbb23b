"""Llama 3.2 1B: 1,235,814,400 parameters.

    jaxlm train --config=configs/llama_1b.py --config.data.path=corpus.jsonl --config.data.tokenizer=tokenizer.json
"""

from configs import default


def get_config(arg: str = ""):
    c = default.get_config()
    c.steps = 50_000
    c.batch_size = 256
    c.seq_len = 4096
    c.model.num_layers = 16
    c.model.embed_dim = 2048
    c.model.num_heads = 32
    c.model.num_kv_heads = 8
    c.model.mlp_dim = 8192
    c.model.vocab_size = 128_256
    c.model.norm_eps = 1e-5
    c.model.rope_theta = 500_000.0
    c.model.compute_dtype = "bfloat16"
    c.model.scan_layers = True
    c.model.remat = "full"
    c.data.tokenizer = "tokenizer.json"
    c.data.isolate_documents = True
    c.mesh.data = 1
    c.mesh.fsdp = -1
    return default.debug(c) if arg == "debug" else c
