"""`jaxlm serve` under load: 64 clients for two minutes, rubbish, floods and lost clients among them.

    python benchmarks/serve.py [--seconds=120] [--clients=64] [--rows=8] [--force]

Each client asks again as soon as it has its answer: 7 of 10 requests are streamed, 1 is whole, 1 is rubbish of some kind, 1 goes
away in the middle. A valid answer must be, letter by letter, what the generator writes when it is alone; rubbish must get its
status. Fails (exit 1) on any wrong answer, an error of the engine, or memory that grows.
"""

import argparse
import collections
import http.client
import json
import os
import pathlib
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import record

ROOT = pathlib.Path(__file__).parent.parent
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
WARM = 0.25  # share of the time after which memory counts: programs of all lengths are compiled by then
GROWTH = 32 * 2**20  # bytes that the memory may grow by from then on
RUBBISH = [(TEXT, b"{", 400), (TEXT, b"\x00" * 100, 400), (TEXT, b"[" * 5000, 400), (TEXT, b"x" * (2**20 + 1), 413),
           (TEXT, b'{"prompt": ""}', 400), (TEXT, b'{"prompt": "a", "temperature": -1}', 400), (CHAT, b'{"messages": [1]}', 400),
           (TEXT, b'{"prompt": "a", "model": "other"}', 404), (TEXT, b'{"prompt": "\\ud800"}', 400),
           (TEXT, json.dumps({"prompt": "a" * 100_000}).encode(), 400), ("/v2", b"{}", 404), (TEXT, None, None)]


def train(folder: pathlib.Path) -> str:
    """A small run of bytes: 4 layers, 128 wide, 256 tokens of context."""
    subprocess.run([sys.executable, "-m", "jaxlm.cli", "train", "--config=configs/shakespeare.py", "--config.steps=60",
                    "--config.data.tokenizer=byte", "--config.seq_len=256", "--config.batch_size=8",
                    "--config.eval.every_steps=0", "--config.observe.report=False",
                    f"--workdir={folder}"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return str(folder)


def expected_answers(workdir: str) -> list[tuple[str, dict, str]]:
    """(path, body, text) of 48 requests, written one at a time."""
    from jaxlm.data.chat import encode_chat, ends_of_answers, open_chat_template
    from jaxlm.generate.decoding import Generator, Request
    from jaxlm.generate.sampling import Sampling
    from jaxlm.generate.write import Written
    from jaxlm.train.restore import open_run

    run, rng = open_run(workdir), random.Random(0)
    tokenizer = run.data.tokenizer
    template = open_chat_template(tokenizer, run.config.data.tokenizer)
    ids, strings = ends_of_answers(template, tokenizer, run.config.data.tokenizer)
    generator, out = Generator(run.model, tokenizer.vocab_size, run.config.seq_len), []
    text = (ROOT / "jaxlm/data/shakespeare/input.txt").read_text()
    for i in range(48):
        at, length = rng.randrange(len(text) - 200), rng.choice([5, 30, 60, 120])
        said, num_tokens, chat = text[at : at + length].strip() or "To be", rng.choice([10, 40, 100]), i % 3 == 0
        sampled = dict(temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.1)
        body = {"max_tokens": num_tokens, "seed": i, **(dict(temperature=0) if i % 2 else sampled),
                **({"stop": ["\n\n", "the the"]} if i % 4 == 0 else {})}
        options = Sampling(temperature=0.0) if i % 2 else Sampling(1.1, 0.8, 40, 0.95, 0.0)
        stop = tuple(body["stop"]) if "stop" in body else ()
        if chat:
            body["messages"] = [{"role": "user", "content": said}]
            prompt, stop = encode_chat(tokenizer, template.render(body["messages"], add_generation_prompt=True)), strings + stop
        else:
            body["prompt"], prompt = said, [int(t) for t in tokenizer.encode(said)]
        ends = ids if chat else frozenset({tokenizer.eos_id})
        written = Written("", tokenizer, stop, ends)
        for token in generator.stream(run.params, [Request(prompt, num_tokens, options, i, ends)], 1):
            if not written.done:
                written.add(token)
        out.append((CHAT if chat else TEXT, body, written.text))
    return out


class Load:
    """What the clients saw."""

    def __init__(self, port: int, answers, until: float):
        self.port, self.answers, self.until = port, answers, until
        self.counts, self.wrong, self.first, self.whole = collections.Counter(), [], [], []

    def connection(self, path: str, body) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        body = body if isinstance(body, bytes) else json.dumps(body)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        return connection

    def client(self, number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < self.until:
            kind = rng.choices(["stream", "at_once", "rubbish", "leave"], [7, 1, 1, 1])[0]
            try:
                getattr(self, kind)(rng)
            except Exception as error:  # a lost connection is a wrong answer too
                self.wrong.append(f"{kind}: {type(error).__name__}: {error}")

    def accepted(self, response, rng) -> bool:
        if response.status == 429:
            response.read()
            self.counts["refused: queue full"] += 1
            time.sleep(float(response.headers["Retry-After"]) * rng.uniform(0.2, 1))
            return False
        return True

    def check(self, got: str, expected: str, what: str) -> None:
        self.counts[what] += 1
        if got != expected:
            self.wrong.append(f"{what}: {got!r} instead of {expected!r}")

    def stream(self, rng) -> None:
        (path, body, expected), began, got = rng.choice(self.answers), time.monotonic(), ""
        response = self.connection(path, {**body, "stream": True}).getresponse()
        if not self.accepted(response, rng):
            return
        first, ended = None, False
        for line in response:
            if line.startswith(b"data: {"):
                value = json.loads(line[6:])
                if "error" in value:
                    got += f"<{value['error']}>"
                    continue
                (choice,) = value["choices"]
                new = choice["delta"]["content"] if path == CHAT else choice["text"]
                first = first or (time.monotonic() if new else None)
                got += new
            ended = ended or line.startswith(b"data: [DONE]")
        self.check(got + "<cut off>" * (not ended), expected, "streamed")
        self.whole.append(time.monotonic() - began)
        if first:
            self.first.append(first - began)

    def at_once(self, rng) -> None:
        path, body, expected = rng.choice(self.answers)
        response = self.connection(path, body).getresponse()
        if self.accepted(response, rng):
            answer = json.loads(response.read())
            choice = answer["choices"][0] if "choices" in answer else {"text": answer, "message": {"content": answer}}
            self.check(choice["message"]["content"] if path == CHAT else choice["text"], expected, "whole")

    def leave(self, rng) -> None:
        path, body, _ = rng.choice(self.answers)
        connection = self.connection(path, {**body, "stream": rng.random() < 0.7})
        if rng.random() < 0.5:
            end = time.monotonic() + rng.uniform(0, 2)
            while (left := end - time.monotonic()) > 0:
                connection.sock.settimeout(left)
                try:
                    if not connection.sock.recv(200):
                        break
                except TimeoutError:
                    break
        connection.close()
        self.counts["went away"] += 1

    def rubbish(self, rng) -> None:
        path, body, status = rng.choice(RUBBISH)
        if body is None:  # no HTTP at all
            with socket.create_connection(("127.0.0.1", self.port)) as connection:
                connection.sendall(rng.randbytes(200))
            got = None
        else:
            try:
                got = self.connection(path, body).getresponse().status
            except ConnectionError:  # told before it had sent all, and sent on
                got = 413 if status == 413 else "a closed connection"
        self.counts["rubbish"] += 1
        if got != status:
            self.wrong.append(f"rubbish {body[:50]}: {got} instead of {status}")


def metrics(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def spread(values: list[float]) -> dict:
    cut = statistics.quantiles(values, n=100)
    return {"median": round(cut[49], 3), "p95": round(cut[94], 3), "max": round(max(values), 3)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--queue", type=int, default=40)
    parser.add_argument("--workdir", default="")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    record.check_idle()
    os.chdir(ROOT)
    workdir = args.workdir or train(pathlib.Path(tempfile.mkdtemp()) / "tiny")
    answers = expected_answers(workdir)
    server = subprocess.Popen([sys.executable, "-m", "jaxlm.cli", "serve", f"--workdir={workdir}", "--port=0",
                               f"--rows={args.rows}", f"--queue={args.queue}"], stdout=subprocess.PIPE, text=True)
    port = int(re.search(r":(\d+)/v1", server.stdout.readline())[1])
    began = time.monotonic()
    load, memory = Load(port, answers, began + args.seconds), []
    clients = [threading.Thread(target=load.client, args=(i,)) for i in range(args.clients)]
    for client in clients:
        client.start()
    while time.monotonic() < load.until:
        time.sleep(min(5, max(0.1, args.seconds / 24)))
        seen = metrics(port)
        memory.append((round(time.monotonic() - began, 1), seen["process_resident_memory_bytes"], seen["process_open_fds"]))
    for client in clients:
        client.join()
    elapsed = time.monotonic() - began
    time.sleep(1)
    after = metrics(port)
    server.send_signal(signal.SIGTERM)
    code = server.wait(60)
    warm = next(size for at, size, _ in memory if at >= WARM * args.seconds)
    result = {
        "seconds": round(elapsed, 1), "clients": args.clients, "rows": args.rows, "queue": args.queue,
        "requests": dict(load.counts), "wrong": len(load.wrong), "first_wrong": load.wrong[:5],
        "tokens_per_second": round(after["jaxlm_generated_tokens_total"] / elapsed, 1),
        "seconds_to_first_token": spread(load.first), "seconds_to_whole_answer": spread(load.whole),
        "resident_bytes": {"at_quarter": warm, "end": after["process_resident_memory_bytes"], "samples": memory},
        "rows_busy_after": after["jaxlm_rows_busy"], "waiting_after": after["jaxlm_waiting"],
        "open_files_after": after["process_open_fds"], "cancelled": after["jaxlm_cancelled_total"],
        "engine_errors": after["jaxlm_engine_errors_total"], "exit_code": code}
    record.save("serve", result)
    grown = result["resident_bytes"]["end"] - warm
    if load.wrong or code or result["engine_errors"] or result["rows_busy_after"] or grown > GROWTH:
        raise SystemExit(f"{len(load.wrong)} wrong, memory grew by {grown / 2**20:.1f} MiB, exit code {code}")


if __name__ == "__main__":
    main()
