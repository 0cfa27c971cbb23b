"""`jaxlm serve`: completions and chat over HTTP, as OpenAI's clients ask for them."""

import asyncio
import contextlib
import hmac
import json
import os
import pathlib
import signal
import sys
import time
import traceback
from typing import NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxlm.data.chat import ends_of_answers, open_chat_template
from jaxlm.errors import UserError
from jaxlm.generate.decoding import Generator
from jaxlm.generate.decoding import Request as Text
from jaxlm.generate.sampling import Sampling
from jaxlm.serve.engine import Busy, Engine, Failed, Job
from jaxlm.serve.metrics import Metrics
from jaxlm.serve.protocol import Ask, Protocol, Refused

BODY_SECONDS = 30.0  # for a request to arrive
HUNG_SECONDS = 300.0  # without a token: not healthy


class Limits(NamedTuple):
    """What a server takes on."""

    rows: int = 8  # answers written at a time
    queue: int = 64  # answers that may wait for a row
    max_tokens: int = 0  # of one answer; 0: what the context has room for
    max_request_bytes: int = 2**20
    timeout: float = 600.0  # seconds, from a request to the end of its answer


class Service:
    """
    Attributes:
        app: the ASGI application. Its engine starts and ends with it (lifespan).
    """

    def __init__(self, run, name: str, limits: Limits, api_key: str = "", template_options: dict | None = None):
        tokenizer = run.data.tokenizer
        generator = Generator(run.model, tokenizer.vocab_size, run.config.seq_len)
        if generator.has_source:
            raise UserError("model.family=encoder_decoder: writes about a source text, which this protocol has not; "
                            "serve a decoder")
        template = open_chat_template(tokenizer, run.config.data.tokenizer)
        ends = ends_of_answers(template, tokenizer, run.config.data.tokenizer)
        self.limits, self.key, self.tokenizer, self.metrics = limits, api_key.encode(), tokenizer, Metrics()
        self.protocol = Protocol(name, tokenizer, generator, template, ends, template_options or {}, limits.max_tokens,
                                 limits.rows + limits.queue)
        self.engine = Engine(generator, run.params, limits.rows, limits.queue, self.deliver, self.metrics)
        self.app = Starlette(lifespan=self.lifespan, routes=[
            Route("/v1/completions", self.guarded(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", self.guarded(self.chat), methods=["POST"]),
            Route("/v1/models", self.guarded(self.models)), Route("/v1/models/{name:path}", self.guarded(self.model)),
            Route("/metrics", self.guarded(self.show_metrics)), Route("/health", self.health)],
            exception_handlers={status: self.no_route for status in (404, 405)})

    @contextlib.asynccontextmanager
    async def lifespan(self, app):
        self.loop = asyncio.get_running_loop()
        self.engine.thread.start()
        yield
        await asyncio.to_thread(self.engine.stop)

    def deliver(self, events) -> None:
        """From the engine's thread to the loop's."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(lambda: [job.receive(event) for job, event in events])

    def warm_up(self) -> None:
        """Compile what the first requests need, before there are any."""
        prompt, session = [0], self.engine.session
        for options in (Sampling(temperature=0.0), Sampling(top_p=0.9)):
            if not session.add([(0, Text(prompt, 2, options))])[0].last:
                session.step()

    # ---- Paths -------------------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """Open to all, so that a load balancer can ask."""
        silent, alive = self.engine.silent_seconds(), self.engine.thread.is_alive()
        well = alive and silent < HUNG_SECONDS and not self.engine.draining
        return JSONResponse({"status": "ok" if well else "shutting down" if self.engine.draining else "failing",
                             "seconds_since_token": round(silent, 3)}, 200 if well else 503)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return JSONResponse(self.protocol.models())

    async def model(self, request: Request) -> Response:
        if (name := request.path_params["name"]) != self.protocol.name:
            raise Refused(404, f"the model {name!r} is not here; {self.protocol.name!r} is", "model", "model_not_found")
        return JSONResponse(self.protocol.models()["data"][0])

    async def no_route(self, request: Request, error) -> Response:
        self.metrics.requests.labels("other", str(error.status_code)).inc()
        what = "no such path" if error.status_code == 404 else f"{request.method} is not for this path"
        return JSONResponse(Refused(error.status_code, f"{what}: {request.url.path}").body(), error.status_code, error.headers)

    async def completions(self, request: Request) -> Response:
        return await self.answer(request, chat=False)

    async def chat(self, request: Request) -> Response:
        return await self.answer(request, chat=True)

    def guarded(self, endpoint):
        """The API key is asked for; whatever goes wrong is told as OpenAI does."""

        async def call(request: Request) -> Response:
            path = request.scope["route"].path if "route" in request.scope else request.url.path
            try:
                self.check_key(request)
                response = await endpoint(request)
            except Refused as refused:
                response = JSONResponse(refused.body(), refused.status, refused.headers)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it; counted as nginx does
            except Exception as error:
                traceback.print_exc()
                response = JSONResponse(Refused(500, f"internal error: {type(error).__name__}").body(), 500)
            self.metrics.requests.labels(path, str(response.status_code)).inc()
            return response

        return call

    def check_key(self, request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if self.key and not (scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self.key)):
            raise Refused(401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key",
                          headers={"WWW-Authenticate": "Bearer"})

    async def body(self, request: Request) -> bytes:
        # A page in a browser can send other types to a server on the same machine without asking.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "send Content-Type: application/json")
        most, chunks, size = self.limits.max_request_bytes, [], 0
        length = request.headers.get("content-length", "0")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                stream = request.stream()
                while size <= most and not (length.isdecimal() and int(length) > most):
                    chunk = await anext(stream, None)
                    if chunk is None:
                        return b"".join(chunks)
                    chunks.append(chunk)
                    size += len(chunk)
        except TimeoutError:
            raise Refused(408, f"the request did not arrive within {BODY_SECONDS:.0f} s") from None
        raise Refused(413, f"the request has more than {most} bytes, which --max_request_bytes allows",
                      headers={"Connection": "close"})

    # ---- Answers -------------------------------------------------------------------------------------------------------------

    async def answer(self, request: Request, chat: bool) -> Response:
        began = time.monotonic()
        body = await self.body(request)
        ask = await asyncio.to_thread(self.protocol.read, body, chat)
        events = asyncio.Queue()
        jobs = [Job(i, text, self.tokenizer, ask.stop, began + self.limits.timeout, events.put_nowait)
                for i, text in enumerate(ask.requests)]
        try:
            self.engine.submit(jobs)
        except Busy:
            raise Refused(429, f"{self.limits.rows} answers are being written and the queue of {self.limits.queue} is full; try "
                               "again", code="queue_full", headers={"Retry-After": "1"}) from None
        except Failed as failed:
            raise Refused(failed.status, str(failed), headers={"Retry-After": "5"}) from None
        pending = Pending(self, ask, jobs, events, began)
        if ask.stream:
            return EventStream(pending)
        return JSONResponse(await unless_gone(request.receive, pending.whole(), pending))


class Pending:
    """A request whose answers are being written."""

    def __init__(self, service: Service, ask: Ask, jobs: list[Job], events: asyncio.Queue, began: float):
        self.service, self.ask, self.jobs, self.events, self.began = service, ask, jobs, events, began
        self.head, self.left = service.protocol.head(ask), len(jobs)

    def close(self) -> None:
        """What is not written yet never will be."""
        self.service.engine.cancel([job for job in self.jobs if not job.written.done])
        self.service.metrics.request_seconds.observe(time.monotonic() - self.began)

    async def next(self):
        """-> Event. Raises Refused: one of the answers will not come."""
        event = await self.events.get()
        if event.error:
            raise Refused(event.error.status, str(event.error), headers={"Retry-After": "5"} if event.error.status == 503 else {})
        self.left -= event.finish is not None
        return event

    def usage(self) -> dict:
        return self.service.protocol.usage(self.ask, sum(len(job.tokens) for job in self.jobs))

    async def whole(self) -> dict:
        finishes: dict[int, str] = {}
        while self.left:
            event = await self.next()
            if event.finish:
                finishes[event.index] = event.finish
        choices = [self.service.protocol.choice(self.ask, job.index, job.written.text, job.tokens, finishes[job.index])
                   for job in self.jobs]
        return {**self.head, "choices": choices, "usage": self.usage()}

    async def pieces(self):
        """The objects of a stream."""
        choice, usage = self.service.protocol.choice, {"usage": None} if self.ask.include_usage else {}
        offsets = [0] * len(self.jobs)
        if self.ask.chat:
            for job in self.jobs:
                yield {**self.head, "choices": [choice(self.ask, job.index, "", [], None, role="assistant")], **usage}
        while self.left:
            event = await self.next()
            piece = choice(self.ask, event.index, event.text, event.tokens, event.finish, offsets[event.index])
            if self.ask.log_probabilities:
                offsets[event.index] += sum(len(self.service.tokenizer.decode([token.id])) for token in event.tokens)
            yield {**self.head, "choices": [piece], **usage}
        if self.ask.include_usage:
            yield {**self.head, "choices": [], "usage": self.usage()}


class EventStream(Response):
    """Server-sent events; an error after the first is one of them."""

    def __init__(self, pending: Pending):
        self.pending, self.status_code, self.background = pending, 200, None
        self.media_type = "text/event-stream; charset=utf-8"
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope, receive, send) -> None:
        with contextlib.suppress(ClientDisconnect, TimeoutError):
            # A client that does not read holds its connection no longer than one that does.
            async with asyncio.timeout(self.pending.service.limits.timeout + BODY_SECONDS):
                await unless_gone(receive, self.send_all(send), self.pending)

    async def send_all(self, send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        tell = lambda data, more=True: send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more})
        as_json = lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        try:
            async for piece in self.pending.pieces():
                await tell(as_json(piece))
        except Refused as refused:
            await tell(as_json(refused.body()))
        await tell(b"[DONE]", more=False)


async def unless_gone(receive, work, pending: Pending):
    """The result of `work`. Raises ClientDisconnect where the client goes away before; `pending` is closed either way."""

    async def gone():
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        pending.close()


class Server(uvicorn.Server):
    """Says when it listens. SIGTERM and SIGINT: answers that are being written are finished, then it ends."""

    service: Service

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        limits, protocol = self.service.limits, self.service.protocol
        print(f"serving {protocol.name} at http://{host}:{port}/v1, {limits.rows} answers at a time, {limits.queue} waiting, "
              f"context {protocol.generator.seq_len}", flush=True)

    def handle_exit(self, sig, frame) -> None:
        self.service.engine.drain()
        super().handle_exit(sig, frame)


def configure(host: str, port: int, limits: Limits, app=None) -> uvicorn.Config:
    return uvicorn.Config(app, host, port, log_level="warning", access_log=False, server_header=False, http="h11", ws="none",
                          limit_concurrency=4 * (limits.rows + limits.queue) + 256,
                          timeout_graceful_shutdown=int(limits.timeout) + 1)


def listen(host: str, port: int, limits: Limits):
    """A socket that is taken, but does not listen yet. Raises UserError: it cannot be had."""
    import socket

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        return bound
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: cannot listen there ({error}); use another") from error


def serve(open_run, workdir: str, host: str, port: int, limits: Limits, api_key: str, template_options: dict) -> None:
    """Until SIGTERM or SIGINT. open_run: called once the address is ours. Raises UserError as `listen` and `open_run` do."""
    bound = listen(host, port, limits)
    if not api_key and host not in ("127.0.0.1", "::1", "localhost"):
        print(f"jaxlm: --host={host} without --api_key: whoever reaches this machine can use the model", file=sys.stderr)
    service = Service(open_run(), pathlib.Path(os.path.abspath(workdir)).name, limits, api_key, template_options)
    service.warm_up()
    server = Server(configure(host, port, limits, service.app))
    server.service = service
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises them again once it has ended
    try:
        server.run(sockets=[bound])
    finally:
        if service.engine.thread.is_alive():  # after a second signal
            service.engine.stop()
