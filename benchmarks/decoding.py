"""Tokens/s of greedy decoding, 124M parameters, against `transformers.generate` with the same weights, interleaved.

    python benchmarks/decoding.py [--force]

Both read the same prompts and must write the same tokens before they are timed. Whole calls are timed, prompts included; best of
BLOCKS, as a busy moment only ever adds.
"""

import statistics
import tempfile
import time

import numpy as np
from record import check_idle, save

PROMPT, NEW, BLOCKS, BATCHES = 32, 64, 5, (1, 8)


def main():
    check_idle()
    import jax
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    from jaxlm.generate.decoding import Generator, Request
    from jaxlm.generate.sampling import Sampling
    from jaxlm.huggingface.load import load_params, open_source
    from jaxlm.parallel.mesh import build_mesh
    from jaxlm.train.state import build_model

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None)).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        source = open_source(folder)
        model = build_model(source.config, source.config.model.vocab_size, "plain")
        params = load_params(source, model, build_mesh(source.config))
    generator = Generator(model, source.config.model.vocab_size, 1024)
    prompts = np.random.default_rng(0).integers(0, 50257, (max(BATCHES), PROMPT)).tolist()

    def jaxlm_writes(batch):
        requests = [Request(prompt, NEW, Sampling(temperature=0.0)) for prompt in prompts[:batch]]
        texts = [[] for _ in requests]
        for token in generator.stream(params, requests, rows=batch):
            texts[token.request].append(token.id)
        return texts

    def transformers_writes(batch):
        with torch.no_grad():
            tokens = torch.tensor(prompts[:batch], device=device)
            rows = theirs.generate(tokens, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
        return rows[:, PROMPT:].tolist()

    arms, results = {"jaxlm": jaxlm_writes, "transformers": transformers_writes}, {}
    for batch in BATCHES:
        first = {name: write(batch) for name, write in arms.items()}  # compiles, and must agree
        agreed = sum(a == b for mine, other in zip(*first.values(), strict=True) for a, b in zip(mine, other, strict=True))
        seconds = {name: [] for name in arms}
        for _ in range(BLOCKS):
            for name, write in arms.items():
                began = time.perf_counter()
                write(batch)
                seconds[name].append(time.perf_counter() - began)
        results[f"batch {batch}"] = {"tokens that agree": f"{agreed} of {batch * NEW}", **{
            name: {"tokens_per_second": batch * NEW / min(all_of), "median": batch * NEW / statistics.median(all_of)}
            for name, all_of in seconds.items()}}
    speed = lambda batch: results[f"batch {batch}"]["jaxlm"]["tokens_per_second"]
    save("decoding", {"prompt": PROMPT, "new": NEW, "device": str(jax.devices()[0].device_kind), **results,
                      "batch 8 over batch 1": speed(8) / speed(1)})


if __name__ == "__main__":
    main()
