"""Real configs on real machines, for tests of the plan and for the README's table. Compiled facts lie in golden/plans.json."""

LLAMA_1B = ("configs/llama_1b.py", "v5e:4x4", ["batch_size=64", "seq_len=4096"])
LLAMA_8B = ("configs/llama3_8b.py", "v5p:4x4x4", ["batch_size=128", "seq_len=8192"])
LLAMA_70B = ("configs/llama3_8b.py", "v5p:4x4x8", [
    "batch_size=128", "seq_len=8192", "model.num_layers=80", "model.embed_dim=8192", "model.num_heads=64", "model.mlp_dim=28672",
    "mesh.fsdp=32", "mesh.tensor=4"])


def case(base, *overrides, topology=""):
    config, usual, given = base
    return config, topology or usual, [*given, *overrides]


CASES = {
    "1B v5e-16": case(LLAMA_1B),
    "1B v5e-16 save_attention": case(LLAMA_1B, "model.remat=save_attention"),
    "1B v5e-16 minimal, batch 32": case(LLAMA_1B, "model.remat=minimal", "batch_size=32"),
    "1B v5e-16 batch 256": case(LLAMA_1B, "batch_size=256"),
    "1B v5e-16 accumulation": case(LLAMA_1B, "batch_size=256", "grad_accum_steps=4"),
    "1B v6e-16 tensor": case(LLAMA_1B, "mesh.tensor=4", "model.remat=save_dots", topology="v6e:4x4"),
    "1B v6e-16 data, ZeRO-1": case(LLAMA_1B, "mesh.data=4", "mesh.zero_stage=1", topology="v6e:4x4"),
    "8B v5p-128": case(LLAMA_8B),
    "8B v5p-128 minimal": case(LLAMA_8B, "model.remat=minimal"),
    "8B v6e-64": case(LLAMA_8B, "batch_size=64", topology="v6e:8x8"),
    "8B v5p-128 context": case(LLAMA_8B, "seq_len=32768", "batch_size=32", "mesh.context=4"),
    "70B v5p-256": case(LLAMA_70B),
    "70B v5p-256 accumulation": case(LLAMA_70B, "grad_accum_steps=2"),
    "124M v5e-8": ("configs/gpt2_124m.py", "v5e:2x4", [
        "batch_size=128", "grad_accum_steps=1", "model.scan_layers=True", "model.remat=save_attention"]),
}

# Published runs: {name: (topology, slices, changes of configs/llama3_8b.py, MFU in % or None, tokens/s a chip)}. MaxText's
# tiering.md (v6e, v5p) and AXLearn's fuji.py (the rows of several slices). Batch and policy are not always
# told: ours are likely ones.
SEVENTY = ["model.num_layers=80", "model.embed_dim=8192", "model.num_heads=64", "model.mlp_dim=28672"]
OLD = ["seq_len=4096", "model.vocab_size=32000"]
SLICES = ["mesh.data=4", "mesh.dcn_data=4", "mesh.fsdp=256", "batch_size=1024"]
PUBLISHED = {
    "Llama 3.1 8B, 256 v6e, T=8192": ("v6e-256", 1, ["batch_size=768", "model.remat=save_attention"], 45.5, 7207),
    "Llama 3.1 70B, 256 v6e, T=8192": ("v6e-256", 1, SEVENTY, 50.3, 960),
    "Llama 2 70B, 256 v6e, T=4096": ("v6e-256", 1, [*SEVENTY, *OLD, "batch_size=512"], 43.8, 900),
    "Llama 2 70B, 512 v5p, T=4096": ("v5p-1024", 1, [*SEVENTY, *OLD, "batch_size=2048", "model.remat=save_attention"], 65.4, 692),
    "Llama 2 7B, 4 slices of 256 v5e, T=4096": (
        "v5e-256", 4, [*OLD, *SLICES, "model.num_kv_heads=32", "model.mlp_dim=11008"], 46, 1853),
    "Llama 2 70B, 4 slices of 256 v6e, T=4096": ("v6e-256", 4, [*SEVENTY, *OLD, *SLICES], None, 836),
}
