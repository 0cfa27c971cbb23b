"""The data road: how fast text becomes tokens, and tokens become batches.

    python benchmarks/data.py [--text FILE] [--tokenizer PATH] [--megabytes 64]

Tokenising: a jsonl of lines of the text, again and again up to the size asked for. `tokenizers` alone gets the documents as a
list in memory, `encode_batch_fast` on as many threads, ids taken and thrown away; jaxlm hashes, reads, parses, tokenises, writes,
syncs and opens the store. Each arm is a process of its own, its imports not timed; median of three, arms interleaved.
Loading: batches of 8 x 1,024 of the store, and of a mixture of three (a third of the text each, weights 0.5, 0.3, 0.2);
nanoGPT's loader (random windows of a memmap; numpy only, so without its copy to torch), and Hugging Face `datasets` (rows of
1,025 ids, shuffled, numpy format). "training thread" is what a step of 5 ms waits.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from record import check_idle, save

from configs import default
from jaxlm.config import resolve

SHAKESPEARE = pathlib.Path(__file__).parent.parent / "jaxlm/data/shakespeare/input.txt"
B, T = 8, 1024


def config_of(path, tokenizer, store_dir, workers):
    config = default.get_config()
    config.data.path, config.data.tokenizer, config.data.store_dir = str(path), str(tokenizer), str(store_dir)
    config.data.workers, config.data.valid_fraction, config.seq_len, config.batch_size = workers, 0.01, T, B
    resolve(config)
    return config


# ---- Tokenising: each arm in a process of its own ----------------------------------------------------------------------------


def library_arm(path, tokenizer, workers) -> dict:
    """`tokenizers` alone."""
    from jaxlm.data.tokenizer_files import open_tokenizer

    inner = open_tokenizer(tokenizer).inner
    texts = [json.loads(line)["text"] for line in open(path)]
    inner.encode_batch_fast(texts[:10], add_special_tokens=False)
    began, tokens = time.perf_counter(), 0
    for at in range(0, len(texts), 256):  # its best of 256, 1,024, 4,096
        tokens += sum(len(e.ids) for e in inner.encode_batch_fast(texts[at : at + 256], add_special_tokens=False))
    return {"seconds": time.perf_counter() - began, "tokens": tokens}


def jaxlm_arm(path, tokenizer, workers) -> dict:
    from jaxlm.data.store import open_store

    with tempfile.TemporaryDirectory(dir=pathlib.Path(path).parent) as folder:
        began = time.perf_counter()
        stores, _ = open_store(config_of(path, tokenizer, folder, workers))
        tokens = sum(store.num_tokens - len(store.document_starts) for store in stores.values())  # without the end tokens
        return {"seconds": time.perf_counter() - began, "tokens": tokens}


def tokenising(path, tokenizer, workers, rounds: int = 3) -> dict:
    environment = {**os.environ, "RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    times = {"tokenizers": [], "jaxlm": []}
    for _ in range(rounds):
        for arm in times:
            command = [sys.executable, __file__, "--arm", arm, "--text", str(path), "--tokenizer", str(tokenizer),
                       "--workers", str(workers)]
            run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            times[arm].append(json.loads(run.stdout))
    tokens = {arm: found[0]["tokens"] for arm, found in times.items()}
    assert len(set(tokens.values())) == 1, tokens  # the same work
    size = path.stat().st_size
    rates = {arm: [size / 1e6 / t["seconds"] for t in found] for arm, found in times.items()}
    median = {arm: statistics.median(found) for arm, found in rates.items()}
    return {"workers": workers, "megabytes": size / 1e6, "tokens": tokens["jaxlm"], "megabytes_per_second": rates,
            "share_of_tokenizers": median["jaxlm"] / median["tokenizers"]}


# ---- Loading -----------------------------------------------------------------------------------------------------------------


def rate(make, seconds: float = 1.5, rounds: int = 3) -> dict:
    """make(step) -> a batch; tokens/s, median of three rounds."""
    make(0)
    rates, step = [], 1
    for _ in range(rounds):
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            make(step)
            step, count = step + 1, count + 1
        rates.append(count * B * T / (time.perf_counter() - began))
    return {"tokens_per_second": statistics.median(rates), "of": rates}


def waits(batches, steps: int = 400) -> dict:
    """Milliseconds that the training thread spends to get a batch, its steps taking 5 ms."""
    stream, times = batches.prefetched(0, lambda arrays: arrays), []
    for _ in range(steps):
        time.sleep(0.005)
        began = time.perf_counter()
        next(stream)
        times.append(1e3 * (time.perf_counter() - began))
    stream.close()
    return {"median": statistics.median(times), "p95": sorted(times)[int(0.95 * steps)]}


def loading(path, tokenizer, folder, workers) -> dict:
    from jaxlm.data.loader import build_data

    config, out = config_of(path, tokenizer, folder, workers), {}
    store = build_data(config).train.rows.store
    ids = np.asarray(store.tokens(0, store.num_tokens), np.uint16)
    for name, isolate in (("jaxlm", False), ("jaxlm, documents isolated", True)):
        config.data.isolate_documents = isolate
        batches = build_data(config).train
        out[name] = {**rate(batches.batch), "training_thread_milliseconds": waits(batches)}
    lines, shares = pathlib.Path(path).read_text().splitlines(True), (("a", 0.5), ("b", 0.3), ("c", 0.2))
    for i, (name, _) in enumerate(shares):
        pathlib.Path(folder, f"{name}.jsonl").write_text("".join(lines[i::3]))
    config.data.mixture = tuple((name, f"{folder}/{name}.jsonl", share) for name, share in shares)
    config.steps = 100_000
    for name, isolate in (("jaxlm, a mixture of three sources", False), ("jaxlm, the mixture, documents isolated", True)):
        config.data.isolate_documents = isolate
        batches = build_data(config).train
        out[name] = {**rate(batches.batch), "training_thread_milliseconds": waits(batches)}
    file = pathlib.Path(folder, "nanogpt.bin")
    ids.tofile(file)
    rng = np.random.default_rng(0)

    def nanogpt(step):
        data = np.memmap(file, np.uint16, "r")  # made again for each batch, as nanoGPT does
        starts = rng.integers(0, len(data) - T, B)
        return (np.stack([data[i : i + T].astype(np.int64) for i in starts]),
                np.stack([data[i + 1 : i + 1 + T].astype(np.int64) for i in starts]))

    out["nanoGPT's memmap loader"] = rate(nanogpt)
    try:
        import datasets
    except ImportError:
        out["datasets"] = "left out: not installed"
        return out
    rows = ids[: (len(ids) - 1) // T * T].reshape(-1, T)
    rows = np.concatenate([rows, np.append(rows[1:, 0], ids[len(rows) * T])[:, None]], 1)
    datasets.Dataset.from_dict({"ids": list(rows)}).save_to_disk(f"{folder}/dataset")
    loaded = datasets.load_from_disk(f"{folder}/dataset").with_format("numpy").shuffle(seed=0)

    def hugging_face(step):
        ids = loaded[[(step * B + i) % len(loaded) for i in range(B)]]["ids"]
        return ids[:, :-1], ids[:, 1:]

    out["datasets"] = {**rate(hugging_face), "version": datasets.__version__}
    return out


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", default=str(SHAKESPEARE))
    parser.add_argument("--tokenizer", default="", help="a file or folder; default: a BPE of 8,192 trained on the text")
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--arm", default="", help="used by itself")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    if args.arm:
        arm = {"tokenizers": library_arm, "jaxlm": jaxlm_arm}[args.arm]
        print(json.dumps(arm(args.text, args.tokenizer, args.workers)))
        return
    check_idle()
    with tempfile.TemporaryDirectory() as folder:
        texts = filter(str.strip, pathlib.Path(args.text).read_text(encoding="utf-8").splitlines())
        lines = [json.dumps({"text": line}) + "\n" for line in texts]
        path = pathlib.Path(folder, "text.jsonl")
        with open(path, "w") as out:
            while out.tell() < args.megabytes * 1e6:
                out.writelines(lines)
        tokenizer = args.tokenizer
        if not tokenizer:
            from jaxlm.data.tokenizers import build_tokenizer

            tokenizer = f"{folder}/tokenizer.json"
            texts = (json.loads(line)["text"] for line in lines)
            pathlib.Path(tokenizer).write_text(build_tokenizer(config_of(path, "bpe", folder, 1), texts).state)
        result = {"text": pathlib.Path(args.text).name, "tokenizer": pathlib.Path(args.tokenizer).name or "bpe 8192",
                  "tokenising": tokenising(path, tokenizer, args.workers),
                  "loading": loading(path, tokenizer, folder, args.workers)}
    save("data", result)


if __name__ == "__main__":
    main()
