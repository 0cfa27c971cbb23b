"""How fast a run is: tokens per second, FLOPs per token, MFU against the device's published peak."""

import resource
import sys
import time

from jaxlm.plan.hardware import chip_of


def peak_flops(device_kind: str, quantization: str = "none") -> float | None:
    """FLOP/s of one device in bfloat16. None for a device that is not in the table, and where products are in 8 bits, whose
    peak is another: never a guess."""
    chip = chip_of(device_kind)
    return chip.peak_flops if chip and quantization == "none" else None


def flops_per_token(config, matmul_parameters: int, trained: int | None = None, frozen=None) -> tuple[float, float]:
    """-> (causal, PaLM convention) training FLOPs per token: 6 P + 6 (or 12) N H sum over layers of min(T, window), where P are
    the parameters in matrix products, the head included, the embedding look-up not, and a frozen one counts 4.

    trained: those of `matmul_parameters` that are not frozen; None: all. frozen: a second model, `jaxlm.train.frozen.Frozen`,
    whose forward pass counts too. Rematerialisation never counts. PaLM convention: arXiv:2204.02311, appendix B.
    """
    attention = 6 * attention_width(config.model) * reach(config)
    products = 4 * matmul_parameters + 2 * (matmul_parameters if trained is None else trained)
    causal, palm = (0.0, 0.0) if frozen is None else forward_flops_per_token(frozen.config, frozen.matmul_parameters)
    return products + attention + causal, products + 2 * attention + palm


def forward_flops_per_token(config, matmul_parameters: int) -> tuple[float, float]:
    """As `flops_per_token`, of the forward pass alone."""
    attention = 2 * attention_width(config.model) * reach(config)
    return 2 * matmul_parameters + attention, 2 * matmul_parameters + 2 * attention


def reach(config) -> int:
    """Keys before a query that its window lets it see, were it the last; summed over layers."""
    m, T = config.model, config.seq_len
    of_kind = {"L": min(T, m.window), "G": T}
    return sum(of_kind[m.window_pattern[i % len(m.window_pattern)]] for i in range(m.num_layers))


def attention_width(m) -> float:
    """N H; where values are shorter than keys, of the mean."""
    return m.num_heads * (m.head_dim + (m.value_head_dim or m.head_dim)) / 2


def peak_memory_bytes() -> int:
    """Of the first device of this process where it counts them, else of the process itself."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats and "peak_bytes_in_use" in stats else peak_process_bytes()


def peak_process_bytes() -> int:
    """The most host memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Clock:
    """Rates between log lines, without the time spent in evaluation and saving."""

    def __init__(self, now=time.perf_counter):
        self.now = now
        self.restart(0, 0)

    def restart(self, step: int, tokens: int) -> None:
        """A new interval begins: call it when the loop starts, and after each pause."""
        self._restart(self.now(), step, tokens)

    def _restart(self, now: float, step: int, tokens: int) -> None:
        self._began, self._step, self._tokens, self._waited = now, step, tokens, 0.0

    def waited(self, seconds: float) -> None:
        """Time the loop stood still for data."""
        self._waited += seconds

    def lap(self, step: int, tokens: int, ended: float | None = None) -> dict:
        """Rates since the last lap or restart; None where no step was made. ended: when `step` did; None: now."""
        now = self.now() if ended is None else ended
        seconds, steps = now - self._began, step - self._step
        rates = {"tokens_per_second": (tokens - self._tokens) / seconds if steps > 0 and seconds else None,
                 "step_seconds": seconds / steps if steps > 0 else None,
                 "data_wait_fraction": self._waited / seconds if seconds else None}
        self._restart(now, step, tokens)
        return rates
