"""The arms of compare.py. Each is a process of its own, so that one framework's memory and threads are not another's:

    python benchmarks/arms.py ARM SIZE BATCH_SIZE MICRO_BATCH FOLDER

It reads one JSON object a line, such as {"do": "train", "steps": 20}, and answers each with one. The first arm, jaxlm, writes
its initial parameters to FOLDER; the others start from them. All train on the same batches, which lie on the device (those of
hf_trainer on the host: its loop has a loader of its own), by micro-batches of MICRO_BATCH sequences; 0: the whole batch at once.
"""

import contextlib
import json
import os
import pathlib
import re
import resource
import sys
import time
import traceback

import numpy as np
from step_time_cpu import SIZES as CPU_SIZES

TEXT = pathlib.Path(__file__).parent.parent / "jaxlm/data/shakespeare/input.txt"
ARMS = {"gpu": ("jaxlm", "torch_cudnn", "torch_default", "hf", "hf_trainer"),
        "cpu": ("jaxlm", "torch_eager", "torch_compile", "hf", "hf_trainer")}
SIZES = {"gpu": {"124M": 20, "1.2B": 10, "8B": 5}, "cpu": {"shakespeare": 20, "8x256": 4}}  # steps of a timed block
NUM_BATCHES = 8


def config_of(size: str, batch_size: int = 0, micro_batch: int = 0):
    """-> resolved jaxlm config; `batch_size` 0 is the size's own, `micro_batch` 0 the whole batch. Every arm takes its
    architecture, AdamW and number of micro-batches from it."""
    from configs import default, gpt2_124m, llama3_8b, llama_1b
    from jaxlm.config import resolve

    if size in CPU_SIZES:
        s, c = CPU_SIZES[size], default.get_config()
        c.batch_size, c.seq_len = s["B"], s["T"]
        c.model.num_layers, c.model.embed_dim, c.model.num_heads = s["layers"], s["dim"], s["heads"]
        c.model.mlp_dim, c.model.tie_embeddings, c.model.vocab_size = s["mlp"], s["tied"], s["vocab"]
        c.model.feedforward = "swiglu" if s["gated"] else "gelu"
        c.optimizer.learning_rate = 1e-3
    elif size == "124M":
        c = gpt2_124m.get_config()
        c.batch_size, c.model.vocab_size = 64, 50_304  # 50,257 padded to a multiple of 128, in every arm
    elif size == "1.2B":
        c = llama_1b.get_config()
        c.batch_size, c.model.scan_layers, c.model.remat = 8, False, "none"
    else:
        c = llama3_8b.get_config()
        c.batch_size = 1
        # 4 bytes each for parameter, gradient and moments would be 128 GB, before any activation.
        c.model.param_dtype = c.optimizer.moment_dtype = "bfloat16"
    if size not in CPU_SIZES:
        c.optimizer.learning_rate = 1e-4  # no warm-up here: the presets' rates would drive equal runs apart in bfloat16
    c.batch_size = batch_size or c.batch_size
    c.grad_accum_steps = c.batch_size // (micro_batch or c.batch_size)
    c.data.isolate_documents = False
    c.schedule.name, c.schedule.warmup_steps = "constant", 0
    resolve(c)
    return c


def batches_of(config) -> list:
    """[(tokens_BT, targets_BT) int32, ...]: Shakespeare by character, or for a large vocabulary by word, so that tokens come
    with natural frequencies and can be predicted. Random tokens would hide a wrong attention from the parity gate."""
    text, vocab = TEXT.read_text(), config.model.vocab_size
    pieces = list(text) if vocab < 1000 else re.findall(r"\w+|\W", text)
    names, counts = np.unique(pieces, return_inverse=True, return_counts=True)[1:]
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    ids = rank[names] % vocab
    B, T = config.batch_size, config.seq_len
    starts = np.random.default_rng(0).integers(0, len(ids) - T - 1, (NUM_BATCHES, B))
    rows = ids[starts[..., None] + np.arange(T + 1)].astype(np.int32)
    return [(batch[:, :-1], batch[:, 1:]) for batch in rows]


class JaxlmArm:
    """The train step of `jaxlm train`, on one device."""

    def __init__(self, name, config, folder):
        import jax
        import jax.numpy as jnp

        from jaxlm.observe.throughput import flops_per_token, peak_flops
        from jaxlm.parallel.rules import replicated
        from jaxlm.train.state import flatten_paths
        from jaxlm.train.step import build_program

        self.program = program = build_program(config, config.model.vocab_size, jax.devices()[:1])
        self.state = jax.jit(program.init, out_shardings=program.shardings)(config.seed)
        arrays = {path: np.asarray(a) for path, a in flatten_paths(self.state["params"]).items()}
        bits = lambda a: a.view(np.uint16) if a.dtype == jnp.bfloat16 else a  # .npz has no bfloat16
        np.savez(folder / "parameters.npz", **{path: bits(a) for path, a in arrays.items()})
        ones = np.ones((config.batch_size, config.seq_len), np.int32)
        fixed = {"segment_ids": ones, "positions": np.arange(config.seq_len, dtype=np.int32) * ones,
                 "loss_mask": ones.astype(np.float32)}
        self.batches = [program.feed.put({"tokens": t, "targets": y, **fixed}) for t, y in batches_of(config)]
        self.hyper = jax.device_put(program.hyper, replicated(program.mesh))
        self.compiled, self.done = None, 0
        flops, kind = flops_per_token(config, program.model.num_matmul_parameters), jax.devices()[0].device_kind
        self.facts = {"parameters": program.model.num_parameters, "attention": f"{program.backend}: {program.why}",
                      "platform": jax.default_backend(), "device": kind, "peak_flops": peak_flops(kind),
                      "flops_per_token": flops[0], "flops_per_token_palm": flops[1]}

    def train(self, steps):
        import jax

        if self.compiled is None:
            self.compiled, _ = self.program.compile()
        metrics = []
        for _ in range(steps):
            self.state, out = self.compiled(self.state, self.batches[self.done % NUM_BATCHES], self.hyper)
            metrics.append((out["loss"], out["grad_norm"]))
            self.done += 1
        jax.block_until_ready((self.state, metrics))
        return metrics

    def matmul(self, n, repeats):
        import jax
        import jax.numpy as jnp

        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.dtype(dtype)) for i in (0, 1))
        product = jax.jit(jnp.matmul)
        jax.block_until_ready(product(a, b))
        began = time.perf_counter()
        jax.block_until_ready([product(a, b) for _ in range(repeats)])
        return time.perf_counter() - began

    def peak_memory(self):
        from jaxlm.observe.throughput import peak_memory_bytes

        return peak_memory_bytes()

    def release(self):
        """XLA's allocator keeps what it has."""


class TorchArm:
    """torch_gpt.GPT, or a model of transformers (hf), in a plain loop: bfloat16 autocast over float32 parameters, or bfloat16
    parameters, as the config has it."""

    def __init__(self, name, config, folder):
        import torch

        self.gpu = torch.cuda.is_available()
        device = torch.device("cuda" if self.gpu else "cpu")
        torch.set_float32_matmul_precision("high")
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.name, self.config, self.folder, self.torch, self.done = name, config, folder, torch, 0
        if name in ("hf", "hf_trainer"):
            from hf_gpt import from_jaxlm
            from hf_gpt import hf_of as build
        else:
            from torch_gpt import from_jaxlm
            from torch_gpt import gpt_of as build
        from torch_gpt import adamw_of

        with device:
            model = build(config, config.model.vocab_size)
        if config.model.param_dtype == "bfloat16":
            for p in model.parameters():  # not model.to(): RoPE's tables stay float32
                p.data = p.data.bfloat16()
        as_tensor = lambda a: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if a.dtype == np.uint16 \
            else torch.from_numpy(a)
        with np.load(folder / "parameters.npz") as file:
            model.load_state_dict(from_jaxlm({path: as_tensor(file[path]) for path in file.files}))
        self.model = model.train()
        self.optimizer = adamw_of(config, model)
        self.autocast = config.model.compute_dtype == "bfloat16"
        self.facts = {"parameters": sum(p.numel() for p in model.parameters()), "platform": "gpu" if self.gpu else "cpu",
                      "attention": "cudnn, then flash" if name == "torch_cudnn" else "default SDPA"}
        self.prepare(device)

    def prepare(self, device):
        name, micro = self.name, self.config.batch_size // self.config.grad_accum_steps
        self.forward = self.model if name == "torch_eager" else self.torch.compile(self.model, fullgraph=name != "hf")
        on_device = lambda a: self.torch.from_numpy(a.astype(np.int64)).to(device)
        self.batches = [[(on_device(tokens[i : i + micro]), on_device(targets[i : i + micro]))
                         for i in range(0, len(tokens), micro)] for tokens, targets in batches_of(self.config)]

    def attention(self):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if self.name != "torch_cudnn":
            return contextlib.nullcontext()
        return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)

    def train(self, steps):
        torch, metrics = self.torch, []
        for _ in range(steps):
            micros, total = self.batches[self.done % NUM_BATCHES], 0.0
            self.optimizer.zero_grad(set_to_none=True)
            for tokens, targets in micros:
                with self.attention(), torch.autocast("cuda" if self.gpu else "cpu", torch.bfloat16, enabled=self.autocast):
                    loss = self.forward(tokens, targets) / len(micros)
                loss.backward()
                total = total + loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
            self.optimizer.step()
            metrics.append((total, norm))
            self.done += 1
        if self.gpu:
            torch.cuda.synchronize()
        if self.name != "torch_eager":  # all has been seen: a recompilation inside a block must not pass for a step
            torch._dynamo.config.error_on_recompile = True
        return metrics

    def matmul(self, n, repeats):
        torch = self.torch
        a, b = (torch.randn(n, n, device="cuda" if self.gpu else "cpu", dtype=torch.bfloat16 if self.gpu else torch.float32)
                for _ in range(2))
        wait = torch.cuda.synchronize if self.gpu else lambda: None
        a @ b
        wait()
        began = time.perf_counter()
        for _ in range(repeats):
            a @ b
        wait()
        return time.perf_counter() - began

    def peak_memory(self):
        return self.torch.cuda.max_memory_allocated() if self.gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def release(self):
        """Memory free for the other arms while this one waits."""
        if self.gpu:
            self.torch.cuda.empty_cache()


def train(arm, steps, timed):
    """A timed block has one step before it, in which memory and threads come back."""
    if timed:
        arm.train(1)
    wall, cpu = time.perf_counter(), time.process_time()
    metrics = arm.train(steps)
    out = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    out["losses"], out["grad_norms"] = ([float(m[i]) for m in metrics] for i in (0, 1))
    arm.release()
    return {**out, "peak_memory_bytes": arm.peak_memory()}


def matmul(arm, n, repeats):
    """The best of 5, in TFLOP/s: what this framework gets out of this machine at most."""
    out = 2 * n**3 * repeats / min(arm.matmul(n, repeats) for _ in range(5)) / 1e12
    arm.release()
    return {"tflops": out}


def kind_of(name):
    if name == "hf_trainer":
        from hf_trainer import TrainerArm

        return TrainerArm
    return JaxlmArm if name == "jaxlm" else TorchArm


def main():
    name, size, batch_size, micro_batch, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    from jaxlm.train.heap import keep_freed_memory
    from jaxlm.verbs.start import start_jax

    config, arm = config_of(size, int(batch_size), int(micro_batch)), None
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        try:
            if do == "build":
                start_jax(config) if name == "jaxlm" else keep_freed_memory()  # every arm has the same malloc
                arm = kind_of(name)(name, config, pathlib.Path(folder))
                answer = arm.facts
            else:
                answer = {"train": train, "matmul": matmul}[do](arm, **command)
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
            full = "out of memory" in str(error).lower() or "RESOURCE_EXHAUSTED" in str(error)
            answer = {"error": text, "out_of_memory": full}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
