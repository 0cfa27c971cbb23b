"""The server: what many get at once is what each would get alone; rubbish, floods, lost clients and errors harm nobody else."""

import asyncio
import concurrent.futures
import http.client
import json
import socket
import string
import threading
import time

import pytest
from test_generate import GREEDY, model_of

from jaxlm.data.tokenizers import CharTokenizer
from jaxlm.errors import UserError
from jaxlm.generate.decoding import Request
from jaxlm.generate.sampling import Sampling
from jaxlm.generate.write import Written
from jaxlm.train.restore import Run

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)
import uvicorn  # noqa: E402

from jaxlm.serve.server import Limits, Service, configure, listen  # noqa: E402

KEY = "open sesame"
TOKENIZER = CharTokenizer("".join(sorted("\n !,.:?" + string.ascii_letters)))
LIMITS = Limits(rows=3, queue=4, max_request_bytes=5000, timeout=60.0)
CHARACTERS = 96  # of context


class Data:
    tokenizer = TOKENIZER


class Serving:
    """A service on a port of its own, in a thread."""

    def __init__(self, run):
        self.run = run
        self.service = Service(run, "tiny", LIMITS, KEY)
        self.server = uvicorn.Server(configure("127.0.0.1", 0, LIMITS, self.service.app))
        bound = listen("127.0.0.1", 0, LIMITS)
        self.port = bound.getsockname()[1]
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve(sockets=[bound])))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def ask(self, path="/v1/completions", body=None, key=KEY, method="POST", headers=None):
        """-> (status, headers, body)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", **(headers or {})}
        connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, headers)
        response = connection.getresponse()
        out = response.status, response.headers, response.read()
        connection.close()
        return out

    def text(self, **body):
        status, _, answer = self.ask(body={"temperature": 0, "max_tokens": 20, **body})
        assert status == 200, answer
        return json.loads(answer)["choices"][0]["text"]

    def stream(self, path="/v1/completions", **body):
        """-> the objects of a stream."""
        status, headers, answer = self.ask(path, {"temperature": 0, "max_tokens": 20, "stream": True, **body})
        lines = answer.decode().split("\n\n")
        assert status == 200 and headers["Content-Type"].startswith("text/event-stream") and lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def alone(self, prompt, num_tokens, options=GREEDY, seed=0, stop=()):
        """What the generator writes with nobody else."""
        written = Written("", TOKENIZER, stop, frozenset())
        request = Request([int(i) for i in TOKENIZER.encode(prompt)], num_tokens, options, seed)
        for token in self.generator.stream(self.run.params, [request], 1):
            if not written.done:
                written.add(token)
        return written.text

    @property
    def generator(self):
        return self.service.protocol.generator

    def metric(self, name):
        text = self.ask("/metrics", method="GET")[2].decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def quiet(self):
        """All rows free, nobody waits."""
        end = time.monotonic() + 20
        while self.service.engine.running or self.service.engine.waiting:
            assert time.monotonic() < end, (self.service.engine.running, self.service.engine.waiting)
            time.sleep(0.01)
        assert self.service.engine.session.free == LIMITS.rows


@pytest.fixture(scope="module")
def serving():
    model, params = model_of(seq_len=CHARACTERS)
    from test_step import tiny

    config = tiny(seq_len=CHARACTERS)
    made = Serving(Run(config, model, params, Data, None, 0))
    yield made
    made.server.should_exit = True
    made.thread.join(20)
    assert not made.thread.is_alive() and not made.service.engine.thread.is_alive()


@pytest.fixture
def gate(serving, monkeypatch):
    """Texts get their first token, and no other before it is set."""
    gate, step = threading.Event(), serving.service.engine.session.step
    monkeypatch.setattr(serving.service.engine.session, "step", lambda: step() if gate.wait(0.005) else [])
    yield gate
    gate.set()
    serving.quiet()


PROMPTS = ["To be", "A", "Once upon a time there was nobody else in here", "Who?", "x" * 33, "The\nend"]


def test_each_gets_what_it_would_get_alone(serving):
    """42 answers in 3 rows, greedy and sampled, whole and streamed, two of a request; retried where the queue is full."""
    options = Sampling(1.0, 0.9, 20, 0.9, 0.0)
    sampled = dict(temperature=0.9, top_k=20, top_p=0.9)

    def ask(i):
        prompt, num_tokens, greedy = PROMPTS[i % len(PROMPTS)], 5 + 2 * i, i % 3 > 0
        body = {"model": "tiny", "prompt": prompt, "max_tokens": num_tokens, "n": 2, "seed": i,
                **({"temperature": 0} if greedy else sampled)}
        expected = [serving.alone(prompt, num_tokens, *((GREEDY,) if greedy else (options, i + k))) for k in (0, 1)]
        while True:
            status, _, answer = serving.ask(body={**body, "stream": i % 2 == 0})
            if status != 429:
                break
            time.sleep(0.05)
        assert status == 200, answer
        if i % 2:
            answer = json.loads(answer)
            assert [c["text"] for c in answer["choices"]] == expected and answer["object"] == "text_completion"
            assert answer["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 2 * num_tokens,
                                       "total_tokens": len(prompt) + 2 * num_tokens}
        else:
            got = ["", ""]
            for line in answer.decode().split("\n\n")[:-2]:
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                got[choice["index"]] += choice["text"]
            assert got == expected
        return True

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(21)))
    serving.quiet()
    assert serving.alone(PROMPTS[0], 20, options, 0) != serving.alone(PROMPTS[0], 20, options, 1)


def test_a_chat_is_the_rendered_conversation_and_ends_where_the_next_question_would_begin(serving):
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    prompt = "System:\nBe brief\nUser:\nHi\nAssistant:\n"
    expected = serving.alone(prompt, 20)
    status, _, answer = serving.ask("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_completion_tokens": 20})
    answer = json.loads(answer)
    assert status == 200 and answer["choices"] == [{"index": 0, "finish_reason": "length", "logprobs": None,
                                                    "message": {"role": "assistant", "content": expected}}]
    parts = serving.stream("/v1/chat/completions", messages=messages, stream_options={"include_usage": True}, logprobs=True)
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(p["choices"][0]["delta"]["content"] for p in parts[:-1]) == expected
    assert [t["token"] for p in parts[:-1] for t in p["choices"][0]["logprobs"]["content"]] == list(expected)
    assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] == 20
    assert {p["object"] for p in parts} == {"chat.completion.chunk"} and len({p["id"] for p in parts}) == 1
    assert serving.service.protocol.ends == (frozenset(), ("\nUser:",))
    rest = json.loads(serving.ask("/v1/chat/completions", {"messages": messages, "temperature": 0})[2])
    assert rest["usage"]["total_tokens"] == CHARACTERS


def test_stop_strings_log_probabilities_and_usage(serving):
    whole = serving.alone("To be", 40)
    stop = whole[11:14]
    at = whole.index(stop)
    for stream in (False, True):
        body = {"prompt": "To be", "max_tokens": 40, "stop": ["no such text", stop], "logprobs": 0}
        if stream:
            choices = [p["choices"][0] for p in serving.stream(**body)]
        else:
            choices = json.loads(serving.ask(body={"temperature": 0, **body})[2])["choices"]
        assert "".join(c["text"] for c in choices) == whole[:at] and choices[-1]["finish_reason"] == "stop"
        log = {name: sum((c["logprobs"][name] for c in choices), []) for name in ("tokens", "token_logprobs", "text_offset")}
        assert "".join(log["tokens"]) == whole[: at + 3] and log["text_offset"] == list(range(at + 3))
        request = Request([int(i) for i in TOKENIZER.encode("To be")], at + 3, GREEDY)
        expected = [t.log_probability for t in serving.generator.stream(serving.run.params, [request])]
        assert log["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    serving.quiet()


TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
RUBBISH = [  # (path, body, status, what the message says, param)
    (TEXT, b"", 400, "not JSON", None), (TEXT, b"{", 400, "not JSON", None),
    (TEXT, b"\xff\xfe", 400, "not JSON", None), (TEXT, b"[1]", 400, "JSON object", None),
    (TEXT, b"[" * 4900, 400, "not JSON", None), (TEXT, b'{"prompt": "a", "seed": NaN}', 400, "NaN", None),
    (TEXT, b'{"prompt": "a", "temperature": 1e999}', 400, "out of range", "temperature"),
    (TEXT, b'{"prompt": "\\ud800"}', 400, "not valid Unicode", "prompt"),
    (TEXT, b"x" * 5001, 413, "max_request_bytes", None),
    (TEXT, {}, 400, "must be a text", "prompt"), (TEXT, {"prompt": ""}, 400, "empty", None),
    (TEXT, {"prompt": []}, 400, "must be", "prompt"), (TEXT, {"prompt": [["a"]]}, 400, "ids", "prompt"),
    (TEXT, {"prompt": [10**30]}, 400, "ids", "prompt"), (TEXT, {"prompt": [-1]}, 400, "ids", "prompt"),
    (TEXT, {"prompt": [True]}, 400, "ids", "prompt"),
    (TEXT, {"prompt": "é"}, 400, "vocabulary", "prompt"),
    (TEXT, {"prompt": "a" * 96}, 400, "context is 96", None),
    (TEXT, {"prompt": "a" * 90, "max_tokens": 7}, 400, "at most 6", "max_tokens"),
    (TEXT, {"prompt": "a", "max_tokens": 0}, 400, "at least 1", "max_tokens"),
    (TEXT, {"prompt": "a", "max_tokens": "9"}, 400, "integer", "max_tokens"),
    (TEXT, {"prompt": "a", "max_tokens": True}, 400, "integer", "max_tokens"),
    (TEXT, {"prompt": "a", "temperature": -1}, 400, "temperature", None),
    (TEXT, {"prompt": "a", "top_p": 0}, 400, "top_p", None),
    (TEXT, {"prompt": "a", "n": 0}, 400, "1 to 128", "n"),
    (TEXT, {"prompt": "a", "n": 9}, 400, "most 7", "n"),
    (TEXT, {"prompt": "a", "stop": [""]}, 400, "stop", "stop"),
    (TEXT, {"prompt": "a", "stop": 3}, 400, "stop", "stop"),
    (TEXT, {"prompt": "a", "logprobs": 5}, 400, "not implemented", "logprobs"),
    (TEXT, {"prompt": "a", "frequency_penalty": 0.5}, 400, "not implemented", "frequency_penalty"),
    (TEXT, {"prompt": "a", "echo": True}, 400, "not implemented", "echo"),
    (TEXT, {"prompt": "a", "best_of": 2}, 400, "not implemented", "best_of"),
    (TEXT, {"prompt": "a", "temprature": 1}, 400, "did you mean temperature", "temprature"),
    (TEXT, {"prompt": "a", "model": "gpt-4"}, 404, "'tiny' is", "model"),
    (CHAT, {"messages": []}, 400, "at least one", "messages"), (CHAT, {"messages": ["Hi"]}, 400, "messages[0]", "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only parts of type text", "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "must be a text", "messages"),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, 400, "not implemented", "tools"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_object"}}, 400, "not implemented", "response_format"),
    (CHAT, {"messages": HI, "chat_template_kwargs": {"messages": []}}, 400, "its own field", "chat_template_kwargs"),
    ("/v1/chat", {}, 404, "no such path", None),
]


def test_rubbish_is_refused_by_name(serving):
    for path, body, status, said, param in RUBBISH:
        got, headers, answer = serving.ask(path, body)
        error = json.loads(answer)["error"]
        assert (got, error["param"]) == (status, param) and said in error["message"], (path, body, got, answer)
        assert error["type"] == "invalid_request_error" and headers["Content-Type"] == "application/json"
    for key in ("", "open sesam", "open sesame!", "öffne"):
        status, headers, answer = serving.ask(body={"prompt": "a"}, key=key.encode().decode("latin-1"))
        assert status == 401 and json.loads(answer)["error"]["code"] == "invalid_api_key"
    assert serving.ask("/metrics", method="GET", key="x")[0] == 401 and serving.ask("/health", method="GET", key="")[0] == 200
    assert serving.ask(method="GET")[0] == 405
    assert serving.ask(body={"prompt": "a"}, headers={"Content-Type": "text/plain"})[0] == 415
    neutral = {"frequency_penalty": 0.0, "echo": False, "best_of": 1, "logit_bias": {}, "user": "me", "top_p": 1, "suffix": None}
    assert serving.text(prompt="To be", **neutral) == serving.alone("To be", 20)
    models = json.loads(serving.ask("/v1/models", method="GET")[2])["data"]
    assert [m["id"] for m in models] == ["tiny"] and serving.ask("/v1/models/tiny", method="GET")[0] == 200
    assert serving.ask("/v1/models/other", method="GET")[0] == 404
    assert serving.metric("jaxlm_engine_errors_total") == 0


def raw(serving, data: bytes, answer=True) -> bytes:
    with socket.create_connection(("127.0.0.1", serving.port), 20) as connection:
        connection.sendall(data)
        return connection.recv(65536) if answer else b""


def test_what_is_no_http_does_no_harm(serving):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    assert raw(serving, b"\x16\x03\x01 rubbish\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert b" 413 " in raw(serving, head.encode() + b"Content-Length: 99999999999\r\n\r\n")
    assert b" 413 " in raw(serving, head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"x" * 4096 + b"\r\n"
                           + b"1000\r\n" + b"x" * 4096 + b"\r\n")
    raw(serving, head.encode() + b"Content-Length: 500\r\n\r\n{", answer=False)  # gone in the middle of the body
    raw(serving, b"POST /v1/comp", answer=False)
    assert serving.text(prompt="To be") == serving.alone("To be", 20)


def start(serving, **body):
    """A request whose answer nobody has read yet."""
    connection = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps({"temperature": 0, "max_tokens": 60, "prompt": "To be", **body}),
                       {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"})
    return connection


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_goes_away_gives_its_row_back(serving, gate):
    engine, before = serving.service.engine, serving.metric("jaxlm_cancelled_total")
    gone = [start(serving, stream=stream) for stream in (True, False, True)]
    wait_for(lambda: len(engine.running) == 3)
    waiting = start(serving)
    wait_for(lambda: len(engine.waiting) == 1)
    jobs, (waiting_job,) = list(engine.running.values()), list(engine.waiting)
    for connection in gone:
        connection.close()
    wait_for(lambda: waiting_job in engine.running.values() and len(engine.running) == 1)
    gate.set()
    assert json.loads(waiting.getresponse().read())["choices"][0]["text"] == serving.alone("To be", 60)
    assert all(len(job.tokens) == 1 for job in jobs) and serving.metric("jaxlm_cancelled_total") == before + 3


def test_a_flood_is_told_to_come_back(serving, gate):
    engine = serving.service.engine
    accepted = [start(serving) for _ in range(3)]
    wait_for(lambda: len(engine.running) == 3)
    accepted += [start(serving) for _ in range(4)]
    wait_for(lambda: len(engine.waiting) == 4)
    for _ in range(20):
        status, headers, answer = serving.ask(body={"prompt": "a"})
        assert status == 429 and int(headers["Retry-After"]) > 0 and json.loads(answer)["error"]["type"] == "rate_limit_error"
    assert serving.ask("/health", method="GET")[0] == 200
    gate.set()
    expected = serving.alone("To be", 60)
    assert [json.loads(c.getresponse().read())["choices"][0]["text"] for c in accepted] == [expected] * 7
    assert serving.text(prompt="To be") == serving.alone("To be", 20)


def test_time_runs_out(serving, gate, monkeypatch):
    monkeypatch.setattr(serving.service, "limits", LIMITS._replace(timeout=0.2))
    whole, streamed = start(serving), start(serving, stream=True)
    answer = whole.getresponse()
    assert answer.status == 504 and "--timeout" in json.loads(answer.read())["error"]["message"]
    text = streamed.getresponse().read().decode()
    assert '"server_error"' in text and text.endswith("data: [DONE]\n\n")


def test_an_error_of_one_leaves_the_others_as_they_were(serving, monkeypatch, capfd):
    """A prompt whose prefill fails; a step that fails, after which all go on from what they had; a step that always fails."""
    engine, before = serving.service.engine, serving.metric("jaxlm_engine_errors_total")
    prefill, step, steps = serving.generator.prefill, engine.session.step, [0]

    def fails_for_one(params, prompts, *args, **kwargs):
        if (prompts[0][:, 0, 0] == int(TOKENIZER.encode("Q")[0])).any():
            raise RuntimeError("out of memory")
        return prefill(params, prompts, *args, **kwargs)

    def fails_once():
        steps[0] += 1
        if steps[0] == 15:
            raise RuntimeError("a device was lost")
        return step()

    monkeypatch.setattr(serving.generator, "prefill", fails_for_one)
    monkeypatch.setattr(engine.session, "step", fails_once)
    sampled = dict(temperature=0.9, top_k=20, top_p=0.9, seed=5, max_tokens=40)
    others = [start(serving), start(serving, **sampled)]
    status, _, answer = serving.ask(body={"prompt": "Q"})
    assert status == 500 and "out of memory" in json.loads(answer)["error"]["message"]
    texts = [json.loads(c.getresponse().read())["choices"][0]["text"] for c in others]
    monkeypatch.setattr(serving.generator, "prefill", prefill)
    assert texts == [serving.alone("To be", 60), serving.alone("To be", 40, Sampling(1.0, 0.9, 20, 0.9, 0.0), 5)]
    assert serving.metric("jaxlm_engine_errors_total") == before + 2 and "a device was lost" in capfd.readouterr().err

    def fails():
        raise RuntimeError("for good")

    monkeypatch.setattr(engine.session, "step", fails)
    status, _, answer = serving.ask(body={"prompt": "To be"})
    assert status == 500 and "failed twice" in json.loads(answer)["error"]["message"]
    monkeypatch.setattr(engine.session, "step", step)
    assert serving.text(prompt="To be") == serving.alone("To be", 20)
    serving.quiet()


def test_a_port_that_is_taken_is_told(serving):
    with pytest.raises(UserError, match="cannot listen"):
        listen("127.0.0.1", serving.port, LIMITS)


def test_shutting_down_finishes_what_is_written_and_refuses_the_rest(serving, gate):
    """The last test of this file: the service is not used again."""
    engine = serving.service.engine
    running = [start(serving) for _ in range(3)]
    wait_for(lambda: len(engine.running) == 3)
    waiting = start(serving)
    wait_for(lambda: len(engine.waiting) == 1)
    engine.drain()
    status, headers, _ = serving.ask(body={"prompt": "a"})
    assert status == 503 and headers["Retry-After"] and serving.ask("/health", method="GET")[0] == 503
    gate.set()
    assert [json.loads(c.getresponse().read())["choices"][0]["text"] for c in running] == [serving.alone("To be", 60)] * 3
    assert waiting.getresponse().status == 503
