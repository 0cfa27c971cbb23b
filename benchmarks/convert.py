"""`jaxlm convert` both ways on a random Llama checkpoint of 1.1 GB: seconds and peak host memory, against copying the files.

    python benchmarks/convert.py [bfloat16]

A copy is timed as cp alone, which ends in the page cache, and as cp and fsync; convert always ends with its files on the disk.
CPU seconds are of all threads and of the kernel for the process; on a loaded machine they say more than its seconds.
Peak memory is the process's resident high-water mark, as the kernel counts it for a child that has ended. What each command takes
on a model of a few kilobytes (Python, JAX, compiling) stands beside it, and is part of its time.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from record import check_idle, save

from jaxlm.huggingface.tensors import Planned, open_tensors, write_shards

ROOT = pathlib.Path(__file__).parent.parent
REPEATS = 3


def make_checkpoint(folder: pathlib.Path, dtype, layers: int, embed: int, mlp: int, vocab: int) -> int:
    """-> bytes of the tensors."""
    head_dim, kv_heads = 64, max(1, embed // 128)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": embed, "intermediate_size": mlp,
              "num_hidden_layers": layers, "num_attention_heads": embed // head_dim, "num_key_value_heads": kv_heads,
              "head_dim": head_dim, "vocab_size": vocab, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
              "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": dtype.name}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (vocab, embed), "model.norm.weight": (embed,), "lm_head.weight": (vocab, embed)}
    for i in range(layers):
        layer = {"input_layernorm": (embed,), "post_attention_layernorm": (embed,), "self_attn.q_proj": (embed, embed),
                 "self_attn.k_proj": (kv_heads * head_dim, embed), "self_attn.v_proj": (kv_heads * head_dim, embed),
                 "self_attn.o_proj": (embed, embed), "mlp.gate_proj": (mlp, embed), "mlp.up_proj": (mlp, embed),
                 "mlp.down_proj": (embed, mlp)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    numbers = lambda shape: (0.02 * rng.standard_normal(shape, np.float32)).astype(dtype)
    planned = [Planned(name, dtype, shape, lambda shape=shape: numbers(shape)) for name, shape in shapes.items()]
    write_shards(folder, planned, 5 * 10**9)
    return sum(t.bytes for t in planned)


def measure(*command) -> tuple[float, float, int]:
    """-> (seconds, CPU seconds, peak resident bytes)."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{' '.join(map(str, command))}: ended with {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def remove(*folders) -> None:
    subprocess.run(["rm", "-rf", *folders], check=True)
    os.sync()  # what the last one left in the page cache is not this one's to write


def convert(*args) -> tuple[float, float, int]:
    return measure(sys.executable, "-m", "jaxlm.cli", "convert", *args)


def both_ways(source: pathlib.Path, folder: pathlib.Path, repeats: int) -> dict:
    """{"in": [(seconds, CPU seconds, peak)], "out": [...]}"""
    results, run, out = {"in": [], "out": []}, folder / "run", folder / "out"
    for _ in range(repeats):
        remove(run, out)
        results["in"].append(convert(f"--from={source}", f"--workdir={run}"))
        os.sync()
        results["out"].append(convert(f"--workdir={run}", f"--to={out}"))
    before, after = open_tensors(str(source)), open_tensors(str(out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.rows(0, tensor.shape[0]).tobytes() == after[name].rows(0, tensor.shape[0]).tobytes(), name
    return results


def main():
    check_idle()
    dtype = np.dtype(ml_dtypes.bfloat16 if "bfloat16" in sys.argv else np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        size = make_checkpoint(folder / "large", dtype, 18 * 4 // dtype.itemsize, 1024, 2816, 32000)
        make_checkpoint(folder / "small", dtype, 1, 64, 64, 64)
        copies, synced = [], []
        for _ in range(REPEATS):
            remove(folder / "copy")
            copies.append(measure("cp", "-r", folder / "large", folder / "copy")[0])
            began = time.perf_counter()
            for file in (folder / "copy").iterdir():
                with open(file) as opened:
                    os.fsync(opened.fileno())
            synced.append(copies[-1] + time.perf_counter() - began)
        remove(folder / "copy")
        fixed = both_ways(folder / "small", folder, 1 + REPEATS)  # the first fills the compile cache
        runs = both_ways(folder / "large", folder, REPEATS)
    result = {"bytes": size, "dtype": dtype.name, "copy_seconds": copies, "copy_and_fsync_seconds": synced}
    for way, measured in runs.items():
        seconds, start = (statistics.median(s for s, _, _ in m) for m in (measured, fixed[way][1:]))
        peak = max(p for _, _, p in measured)
        result[way] = {"seconds": [s for s, _, _ in measured], "seconds_of_a_tiny_model": start,
                       "cpu_seconds": [c for _, c, _ in measured], "peak_bytes": peak,
                       "peak_of_size": peak / size, "of_copy": seconds / statistics.median(copies),
                       "of_copy_and_fsync": seconds / statistics.median(synced)}
    save(f"convert-{dtype.name}", result)


if __name__ == "__main__":
    main()
