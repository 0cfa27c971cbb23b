"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    def __init__(self):
        to, in_seconds = {"registry": CollectorRegistry()}, {"buckets": SECONDS}
        self.registry = to["registry"]
        ProcessCollector(**to)  # memory, file descriptors, CPU seconds
        self.requests = Counter("jaxlm_requests", "HTTP requests answered", ("path", "status"), **to)
        self.tokens = Counter("jaxlm_generated_tokens", "Tokens written", **to)
        self.prompt_tokens = Counter("jaxlm_prompt_tokens", "Tokens of prompts read", **to)
        self.rows_busy = Gauge("jaxlm_rows_busy", "Texts that are being written", **to)
        self.waiting = Gauge("jaxlm_waiting", "Texts that wait for a row", **to)
        self.cancelled = Counter("jaxlm_cancelled", "Texts given up: the client went away, or the time was over", **to)
        self.engine_errors = Counter("jaxlm_engine_errors", "Errors of the engine; each has a traceback in the log", **to)
        self.first_token_seconds = Histogram("jaxlm_first_token_seconds", "From a request to its first token", **to, **in_seconds)
        self.request_seconds = Histogram("jaxlm_request_seconds", "From a request to the end of its answer", **to, **in_seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
