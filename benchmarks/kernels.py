"""Kernels by themselves, on whatever machine this is: which backend is right, and how fast each is.

    python benchmarks/kernels.py

Matmul: the measured ceiling, TFLOP/s of a product of random normal matrices (all zeros would draw less power, and run faster).
Embedding gradient: each backend, ids of a Zipf distribution as of natural text, error against float64 sums; on a GPU the
scatter also with xla_gpu_ftz, without which LLVM may make a loop of each atomic addition.
Projections: a layer's query, key and value, and its gate and up, apart, as one product, and in 8 bits.
Attention: each backend that serves, seconds of forward and backward, error against `plain` in float32, temporary memory.
Every time is the median over blocks of calls that wait only at the end of the block. Small sizes on a CPU.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from record import check_idle, save

from configs import default
from jaxlm.kernels import attention, embedding
from jaxlm.kernels.matmul import dense, dense_together
from jaxlm.verbs.start import start_jax

BLOCKS = 5


def compile_for(function, *args, **compiler_options):
    return jax.jit(function).lower(*args).compile(compiler_options)


def seconds_of(compiled, *args) -> float:
    """Median seconds of a call over blocks of as many calls as take about 0.2 s; of two blocks where one call takes longer."""
    jax.block_until_ready(compiled(*args))
    began = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    calls = round(0.2 / (time.perf_counter() - began))
    blocks, calls = (BLOCKS, calls) if calls else (2, 1)

    def lap():
        began = time.perf_counter()
        for _ in range(calls):
            out = compiled(*args)
        jax.block_until_ready(out)
        return (time.perf_counter() - began) / calls

    return statistics.median(lap() for _ in range(blocks))


def normal(seed: int, shape: tuple, dtype: str):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


def matmul(on_cpu: bool) -> dict:
    size, dtype = (2048, "float32") if on_cpu else (8192, "bfloat16")
    pair = normal(0, (size, size), dtype), normal(1, (size, size), dtype)
    seconds = seconds_of(compile_for(jnp.matmul, *pair), *pair)
    return {"size": size, "dtype": dtype, "seconds": seconds, "tflops": 2 * size**3 / seconds / 1e12}


def zipf_ids(tokens: int, vocab: int) -> np.ndarray:
    """Rank r has probability 1/r, up to a factor; ids are shuffled ranks, as frequent tokens are not neighbours in a table."""
    rng = np.random.default_rng(0)
    odds = 1 / np.arange(1, vocab + 1)
    return rng.permutation(vocab)[rng.choice(vocab, tokens, p=odds / odds.sum())].astype(np.int32)


def embedding_gradients(on_cpu: bool) -> dict:
    tokens, V, D = (4096, 4096, 256) if on_cpu else (65536, 50304, 768)  # GPT-2's: 64 rows of 1,024 tokens
    ids, table, rows = zipf_ids(tokens, V), normal(0, (V, D), "float32"), []
    for dtype in ("float32", "bfloat16"):
        d = normal(1, (tokens, D), dtype)
        d64, order = np.asarray(d, np.float64), np.argsort(ids, kind="stable")
        present, first = np.unique(ids[order], return_index=True)
        exact, size = (np.add.reduceat(a[order], first) for a in (d64, np.abs(d64)))
        ways = [(backend, {}) for backend in embedding.BACKENDS]
        for backend, options in ways if on_cpu else [*ways, ("scatter", {"xla_gpu_ftz": True})]:

            def gradient(table, ids, d, backend=backend, dtype=dtype):
                look_up = functools.partial(embedding.look_up, ids=ids, backend=backend, cotangent_dtype=dtype)
                return jax.vjp(lambda table: look_up(table).astype(dtype), table)[1](d)[0]

            row = {"dtype": dtype, "backend": backend, **options}
            try:
                compiled = compile_for(gradient, table, ids, d, **options)
                found = np.asarray(compiled(table, ids, d), np.float64)[present]
                row |= {"max_relative_error": float((np.abs(found - exact) / size).max()),
                        "seconds": seconds_of(compiled, table, ids, d)}
            except Exception as error:  # a backend that fails here is a result too
                row["skipped"] = reason_of(error)
            print(row, flush=True)
            rows.append(row)
    return {"tokens": tokens, "vocab": V, "embed_dim": D, "most_frequent": int(np.bincount(ids).max()), "rows": rows}


def projections(on_cpu: bool) -> dict:
    rows, D, N, K, H, F = (2048, 256, 2, 2, 128, 1024) if on_cpu else (65536, 2048, 16, 8, 128, 8192)
    dtype, out = "float32" if on_cpu else "bfloat16", []
    x = normal(0, (1, rows, D), dtype)
    layers = {"query, key, value": [(D, K, heads, H) for heads in (N // K, 1, 1)], "gate, up": [(D, 1, F), (D, 1, F)]}

    def apart(x, kernels, form="none"):
        return [dense(x, kernel, form=form) for kernel in kernels]

    ways = {"apart": apart, "together": dense_together} | {form: functools.partial(apart, form=form) for form in ("int8", "fp8")}
    for layer, shapes in layers.items():
        kernels = [normal(i, shape, dtype) for i, shape in enumerate(shapes)]
        for way, run in ways.items():
            row = {"layer": layer, "way": way}
            try:
                total = lambda x, kernels, run=run: sum(jnp.sum(y.astype(jnp.float32) ** 2) for y in run(x, kernels))
                compiled = compile_for(jax.value_and_grad(total, (0, 1)), x, kernels)
                row["seconds"] = seconds_of(compiled, x, kernels)
            except Exception as error:
                row["skipped"] = reason_of(error)
            print(row, flush=True)
            out.append(row)
    return {"tokens": rows, "embed_dim": D, "heads": N, "kv_heads": K, "head_dim": H, "mlp_dim": F, "dtype": dtype, "rows": out}


def attentions(platform: str, lengths: list[int]) -> dict:
    on_cpu = platform == "cpu"
    tokens, N, K, H = (2048, 2, 2, 64) if on_cpu else (65536, 6, 6, 128)
    c, rows = default.get_config(), []
    c.model.head_dim, c.model.compute_dtype = H, "float32" if on_cpu else "bfloat16"
    def loss(q, k, v, weights, backend, dtype):
        out = attention.attend(*(a.astype(dtype) for a in (q, k, v)), backend=backend)
        return jnp.vdot(out.astype(jnp.float32), weights)

    def forward_and_backward(backend, dtype=c.model.compute_dtype):
        return functools.partial(jax.value_and_grad(loss, (0, 1, 2)), backend=backend, dtype=dtype)

    for T in lengths:
        B, c.seq_len = max(1, tokens // T), T
        request = attention.request_of(c, platform)
        inputs = [normal(i, (B, T, heads, H), c.model.compute_dtype) for i, heads in enumerate((N, K, K, N))]
        inputs[3] = inputs[3].astype(jnp.float32)
        wanted = None
        if T == lengths[0]:  # parity where the reference is cheap
            with jax.default_matmul_precision("highest"):
                wanted = jax.jit(forward_and_backward("plain", "float32"))(*inputs)[1]
        for backend in attention.BACKENDS:
            row = {"T": T, "batch": B, "backend": backend}
            reason = attention.BACKENDS[backend].supports(request)
            if not reason and backend == "plain" and 4 * B * N * T * T > 16 * 2**30:
                reason = "its scores would take more than 16 GiB"
            if not reason and on_cpu and backend == "plain" and T > 4096:
                reason = "would take too long on a CPU"
            try:
                if reason:
                    row["skipped"] = reason
                else:
                    compiled = compile_for(forward_and_backward(backend), *inputs)
                    if wanted is not None:
                        found = compiled(*inputs)[1]
                        row["max_gradient_error"] = max(float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
                                                        for a, b in zip(found, wanted, strict=True))
                    row["temporary_mib"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
                    row["seconds"] = seconds_of(compiled, *inputs)
            except Exception as error:
                row["skipped"] = reason_of(error)
            print(row, flush=True)
            rows.append(row)
    return {"heads": N, "kv_heads": K, "head_dim": H, "dtype": c.model.compute_dtype, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="T of the attention rows")
    parser.add_argument("--force", action="store_true", help="measure on a loaded machine all the same")
    args = parser.parse_args()
    check_idle()
    c = default.get_config()
    c.observe.compile_cache = False
    start_jax(c)
    device = jax.devices()[0]
    result = {"device": device.device_kind, "matmul": matmul(device.platform == "cpu")}
    print(result, flush=True)
    save("kernels", result | {"embedding_gradient": embedding_gradients(device.platform == "cpu"),
                              "projections": projections(device.platform == "cpu"),
                              "attention": attentions(device.platform, args.lengths)})


if __name__ == "__main__":
    main()
